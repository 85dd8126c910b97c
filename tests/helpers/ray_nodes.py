"""A Ray cluster of several nodes on this machine, in a process of its own.

`ray.cluster_utils.Cluster` writes to its process's environment and to the machine's "current
cluster" file, so the process that runs the tests starts this module as a script and keeps its own
connection to Ray, and a temporary directory of its own keeps other programs from joining.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from helpers.ports import agent_ports, free_port

#: Ray's, by which a killed node is noticed within seconds rather than a quarter of a minute.
HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 4,
}


class RayNodes:
    """The cluster, as the tests see it: a head and further nodes, of one CPU each.

    The last one it starts with seems to have an H200 and TensorRT (see fake_gpu).
    """

    def __init__(self, process: subprocess.Popen[str], started: dict[str, Any]) -> None:
        self._process = process
        self.address: str = started["address"]
        #: Its address, if there is one.
        self.dashboard: str = started["dashboard"]
        #: Ray's ids of the nodes, the head first.
        self.nodes: list[str] = started["nodes"]
        self.gpu_node = self.nodes[-1]

    def kill(self, node: str) -> None:
        """End a node's processes with SIGKILL; it can't be the head."""
        self._command("kill", node)
        self.nodes.remove(node)

    def add(self) -> None:
        self.nodes.append(self._command("add"))

    def environment(self, **more: str) -> dict[str, str]:
        """What a program needs to run on this cluster."""
        return {**os.environ, "RAY_ADDRESS": self.address, "OMP_NUM_THREADS": "1", **more}

    def _command(self, *words: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(*words, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, f"the cluster's process ended of {words}"
        return answer.strip()


@contextlib.contextmanager
def ray_nodes(count: int, *, dashboard: bool = False) -> Iterator[RayNodes]:
    """`dashboard` is for who submits jobs: it takes its time to start."""
    directory = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # paths of sockets have to be short
    # Jobs run what is on the path: the commands of this very environment.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {
        **os.environ,
        "RAY_TMPDIR": directory,
        "PATH": path,
        "PYTHONPATH": str(Path(__file__).parents[1]),  # where it finds `helpers`
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(
        [sys.executable, __file__, str(count), *(["dashboard"] if dashboard else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, "the cluster did not start"
        yield RayNodes(process, json.loads(line))
    finally:
        process.stdin.close()
        process.wait(180)
        shutil.rmtree(directory, ignore_errors=True)


def _main(count: int, dashboard: bool) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints to stdout too
    from ray.cluster_utils import Cluster

    port = free_port()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "include_dashboard": dashboard,
            "dashboard_port": port,
            **agent_ports(),
            "_system_config": HEALTH_CHECKS,
        },
    )
    nodes = [add_node(cluster, num_cpus=1) for _ in range(count - 2)]
    nodes.append(
        add_node(
            cluster,
            num_cpus=1,
            num_gpus=1,
            resources={"accelerator_type:H200": 1},
            env_vars={"PYTHONPATH": str(Path(__file__).with_name("fake_gpu"))},
        )
    )
    cluster.wait_for_nodes(180)  # a busy machine takes its time
    started = {
        "address": cluster.address,
        "dashboard": f"http://127.0.0.1:{port}",
        "nodes": [node.node_id for node in (cluster.head_node, *nodes)],
    }
    print(json.dumps(started), file=answers, flush=True)
    for line in sys.stdin:
        command, *names = line.split()
        answer = ""
        if command == "kill":
            (node,) = (node for node in nodes if node.node_id == names[0])
            nodes.remove(node)
            cluster.remove_node(node, allow_graceful=False)
        elif command == "add":
            nodes.append(add_node(cluster, num_cpus=1))
            answer = nodes[-1].node_id
        print(answer, file=answers, flush=True)
    cluster.shutdown()


def add_node(cluster: Any, **options: Any) -> Any:
    """A further node of Ray's `Cluster`, on a machine that may be too busy for it at first.

    Ray raises if a node is not up in time or has ended (`Node.__init__`), and all of a cluster's
    nodes end with the process that it raised in. So it is asked more patiently here, and for
    another node if the first one did not come.
    """
    from ray._private import services

    ask = services.get_node

    def ask_patiently(*arguments: Any) -> Any:
        until = time.monotonic() + 90
        while True:
            try:
                return ask(*arguments)
            except RuntimeError:  # not there yet  # noqa: PERF203
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)

    with mock.patch.object(services, "get_node", ask_patiently):
        try:
            return cluster.add_node(wait=False, **agent_ports(), **options)
        except Exception:  # it has no type of its own
            traceback.print_exc()
            return cluster.add_node(wait=False, **agent_ports(), **options)


if __name__ == "__main__":
    _main(int(sys.argv[1]), "dashboard" in sys.argv[2:])
