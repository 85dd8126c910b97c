"""The service in a process of its own, on a cluster of several nodes; run as a script too.

Ingress and router are kept on the head node, which tests don't kill, so that shards are all there
is on the others.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from helpers.ray_nodes import RayNodes

_HEAD = "node:__internal_head__"  # a resource that Ray gives the head


class Service:
    """A running service."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self._process = process
        self.port = port

    def shards(self) -> list[dict[str, Any]]:
        """The shards' processes, by rank."""
        return self._ask("shards")

    def router(self) -> dict[str, Any]:
        return self._ask("process")

    def _ask(self, what: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(what, file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


@contextlib.contextmanager
def service(nodes: RayNodes, port: int, **settings: Any) -> Iterator[Service]:
    """`settings` are EngineConfig's fields."""
    process = subprocess.Popen(
        [sys.executable, "-m", "helpers.serve_process", str(port), json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=nodes.environment(PYTHONPATH=":".join(filter(None, sys.path))),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline().strip() == "ready", "the service did not start"
        yield Service(process, port)
    finally:
        process.stdin.close()
        process.wait(180)


def keep_on_head() -> None:
    """From here on, what this process deploys runs on the head node."""
    from ray import serve

    plain = serve.deployment

    def on_head(*arguments: Any, ray_actor_options: Any, **options: Any) -> Any:
        pinned = {**ray_actor_options, "resources": {_HEAD: 0.001}}
        return plain(*arguments, ray_actor_options=pinned, **options)

    serve.deployment = on_head


def _main(port: int, settings: dict[str, Any]) -> None:
    from tensorray.cluster.generate import results_on_stdout

    with results_on_stdout() as answers:
        from ray import serve

        from tensorray.cluster import app
        from tensorray.cluster.config import EngineConfig

        keep_on_head()
        app.run(EngineConfig(**settings), port=port, blocking=False)
        print("ready", file=answers, flush=True)
        router = serve.get_deployment_handle("Router", app.APP_NAME)
        for line in sys.stdin:
            found = getattr(router, line.strip()).remote().result(timeout_s=180)
            print(json.dumps(found), file=answers, flush=True)
        serve.shutdown()


if __name__ == "__main__":
    _main(int(sys.argv[1]), json.loads(sys.argv[2]))
