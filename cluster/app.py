"""The Serve application: ingress replicas before routers.

    HTTP proxy -> Ingress (text, HTTP) -> Router (engine, scheduler) -> shard

With `prefill_replicas` there is a second deployment of routers, which prompts go to first.

By name in a Serve config: `import_path: tensorray.cluster.app:build_app`, with EngineConfig's
fields under `args`. On the command line: `serve run tensorray.cluster.app:build_app model=...`.
"""

# No `from __future__ import annotations`: Serve reads build_app's annotation to check its argument.

import asyncio
import logging
import signal
import socket
import ssl
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import ray
import ray.exceptions
from fastapi import FastAPI
from ray import serve
from ray.serve.config import HTTPOptions, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from tensorray.cluster import request_log
from tensorray.cluster.autoscaling import serve_settings
from tensorray.cluster.closing import Closing
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.connect import connect, joins
from tensorray.cluster.deploy_failure import why_not_deployed
from tensorray.cluster.fleet import Fleet
from tensorray.cluster.frontend import Frontend, PreparedRequest
from tensorray.cluster.ingress import create_app
from tensorray.cluster.lora_module import check_modules
from tensorray.cluster.ports import require_free_port
from tensorray.cluster.replica_number import replica_number
from tensorray.cluster.router import Router
from tensorray.cluster.router_door import RouterDoor
from tensorray.cluster.router_share import Place
from tensorray.cluster.routers import REQUEST_ROUTER, Routers, SplitRouters
from tensorray.cluster.usage_error import UsageError

logger = logging.getLogger(__name__)

APP_NAME = "tensorray"

# What a router may take to end its shards, once it has drained.
_CLOSING_SECONDS = 15.0

# As shells have it of a program that was ended by SIGTERM.
_TERMINATED = 128 + signal.SIGTERM

_PATHS = (
    "model",
    "tokenizer",
    "chat_template",
    "generation_config",
    "download_dir",
    "api_key_file",
)


class Ingress:
    """One HTTP replica; also what `serve.get_app_handle("tensorray")` talks to.

    Prompts are text or token ids, or chat messages by keyword; keyword arguments are
    SamplingParams' fields. Answers are plain dicts: `RequestOutput` and `RequestOutputDelta`.

        handle = serve.get_app_handle("tensorray")
        answer = handle.generate.remote("Once upon a time", max_tokens=32).result()
        print(answer["outputs"][0]["text"])
        for delta in handle.options(stream=True).stream.remote("Once upon a time"):
            print(delta["outputs"][0]["text"], end="")
    """

    # Serve builds the ASGI application apart from the instance, in the same process.
    _here: "Ingress"

    async def __init__(  # type: ignore[misc]
        self,
        config: EngineConfig,
        routers: "DeploymentHandle[Any]",
        prefill: "DeploymentHandle[Any] | None" = None,
    ) -> None:
        request_log.set_up(config.log_format)
        digest, routing = config.model_digest(), config.effective_routing
        ingresses = config.num_ingress_replicas
        place = Place(replica_number() % ingresses, ingresses)
        patience = config.router_timeout_seconds
        decode = Routers(
            routers,
            digest,
            routing,
            patience=patience,
            place=place,
            foresee=prefill is not None,
        )
        self._client: Routers | SplitRouters = decode
        if prefill is not None:
            apart = Routers(prefill, digest, routing, place=place)
            apart.follow()
            self._client = SplitRouters(apart, decode, config.prefill_min_tokens)
        address = await decode.start()
        config = config.model_copy(update={"max_model_len": address.max_model_len})
        self._frontend = Frontend.load(config)
        fleet = None
        if config.enable_lora:
            fleet = Fleet(lambda: [RouterDoor(routers, each.name) for each in decode.members()])
        traces = None
        if config.otlp_traces_endpoint is not None:
            from tensorray.cluster import tracing

            traces = tracing.provider(config.otlp_traces_endpoint)
        self._closing = Closing()
        self.http = create_app(self._frontend, self._client, config, fleet, traces, self._closing)
        Ingress._here = self

    async def generate(
        self,
        prompt: str | list[int] | None = None,
        *,
        messages: list[dict[str, Any]] | None = None,
        **sampling: Any,
    ) -> dict[str, Any]:
        """The whole answer. Raises BadRequest, RequestRefused, EngineFailed or GenerationFailed."""
        prepared = self._prepare(prompt, messages, sampling)
        return asdict(await self._frontend.collect(self._client, prepared))

    async def stream(
        self,
        prompt: str | list[int] | None = None,
        *,
        messages: list[dict[str, Any]] | None = None,
        **sampling: Any,
    ) -> AsyncIterator[dict[str, Any]]:
        """The answer as it comes; call with `.options(stream=True)`. Errors as in `generate`."""
        prepared = self._prepare(prompt, messages, sampling)
        deltas: Any = self._frontend.stream(self._client, prepared)
        async with aclosing(deltas):
            async for delta in deltas:
                yield asdict(delta)

    async def close(self, seconds: float) -> None:
        """Turn away whoever comes; return when those who are here have their answers, or after so
        many seconds."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._closing.close(), seconds)

    async def models(self) -> list[str]:
        """The names that the model is served under."""
        return self._frontend.model_names

    def _prepare(
        self,
        prompt: str | list[int] | None,
        messages: list[dict[str, Any]] | None,
        sampling: dict[str, Any],
    ) -> PreparedRequest:
        if (prompt is None) == (messages is None):
            raise ValueError("give either a prompt or messages")
        params = self._frontend.params(**sampling)
        tokens = self._frontend.chat(messages) if messages is not None else prompt or ""
        return self._frontend.request(tokens, params, request_id=f"handle-{uuid4().hex}")


def _http() -> FastAPI:
    return Ingress._here.http


def build_app(args: EngineConfig) -> serve.Application:
    """The application for a config."""
    return _application(args)


def _application(config: EngineConfig, **options: Any) -> serve.Application:
    """`options` are further ones of the routers' deployments."""
    config = settled(config)
    # Above what the engine itself lets in, so that it is the one to say 429. The service's own
    # processes wait and copy; CPUs are for shards to claim.
    ongoing = 2 * (config.max_num_seqs + config.max_waiting) + 1000
    common: dict[str, Any] = {
        "max_ongoing_requests": ongoing,
        # What is not done by then is cut off: a router hands on what it still runs before.
        "graceful_shutdown_timeout_s": config.drain_timeout_seconds + _CLOSING_SECONDS,
        "graceful_shutdown_wait_loop_s": 0.5,
        "ray_actor_options": {"num_cpus": 0},
    }
    deployment = cast(Any, serve.deployment)
    scaling = serve_settings(config)
    router = {
        "request_router_config": RequestRouterConfig(
            request_router_class=cast(Any, REQUEST_ROUTER)
        ),
        "health_check_period_s": 2,
        "health_check_timeout_s": 10,
        **common,
        **options,
    }
    count: dict[str, Any] = {"num_replicas": config.data_parallel_size}
    if scaling is not None:
        count = {"autoscaling_config": scaling}
    routers = [deployment(Router, name="Router", **count, **router).bind(config)]
    if config.prefill_replicas:
        count = {"num_replicas": config.prefill_replicas}
        routers.append(
            deployment(Router, name="Prefill", **count, **router).bind(config, "prefill-")
        )
    ingress = deployment(
        cast(Any, serve.ingress(_http))(Ingress),
        name="Ingress",
        num_replicas=config.num_ingress_replicas,
        **common,
    )
    return cast(serve.Application, ingress.bind(config, *routers))


def build_demo(args: dict[str, Any]) -> serve.Application:
    """The application for the demo model; `args` are further fields of EngineConfig."""
    from tensorray.cluster import demo

    defaults = {"model": str(demo.model_path()), "served_model_name": [demo.MODEL_NAME]}
    return build_app(EngineConfig(**{**defaults, **args}))


def settled(config: EngineConfig) -> EngineConfig:
    """The config as replicas get it, who start in another directory: with the model's name, and
    with local paths made absolute."""
    changes: dict[str, Any] = {"served_model_name": config.names()}
    for name in _PATHS:
        changes[name] = _absolute(getattr(config, name))
    changes["allowed_lora_path"] = [
        str(Path(each).expanduser().absolute()) for each in config.allowed_lora_path
    ]
    changes["lora_modules"] = [
        each.model_copy(update={"path": _absolute(each.path)}) for each in config.lora_modules
    ]
    if config.model_class is not None:
        file, _, kind = config.model_class.rpartition(":")
        changes["model_class"] = f"{_absolute(file)}:{kind}"
    if config.plan_store is not None and "://" not in config.plan_store:  # it may be to be made
        changes["plan_store"] = str(Path(config.plan_store).expanduser().absolute())
    return config.model_copy(update=changes)


def _absolute(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        found = Path(path).expanduser()
        return str(found.resolve()) if found.exists() else path
    except OSError:  # an inline template is no file's name
        return path


@dataclass(frozen=True)
class Tls:
    """PEM files, on every node that has a proxy: a certificate with its chain, its key, and whose
    certificates clients must show (None: they need none)."""

    certfile: str
    keyfile: str
    ca_certs: str | None = None


def _http_options(host: str, port: int, tls: Tls | None) -> HTTPOptions:
    if tls is None:
        return HTTPOptions(host=host, port=port)
    if "ssl_certfile" not in HTTPOptions.model_fields:
        raise RuntimeError(
            f"Ray {ray.__version__}'s Serve has no TLS; upgrade Ray, or put a reverse proxy before "
            "it (SECURITY.md)"
        )
    files = {"ssl_certfile": tls.certfile, "ssl_keyfile": tls.keyfile, "ssl_ca_certs": tls.ca_certs}
    found = {name: str(Path(path).resolve()) for name, path in files.items() if path is not None}
    for path in found.values():
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: there is no such file, which TLS needs")
    return HTTPOptions(host=host, port=port, **found)


def _check_tls(host: str, port: int) -> None:
    """A Serve that ran before keeps its own options, which may be plain HTTP: not unnoticed."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        with socket.create_connection((here, port), 10) as plain, context.wrap_socket(plain):
            pass
    except ssl.SSLError as error:
        raise RuntimeError(
            f"Serve runs on port {port} already, without TLS; `serve shutdown` it first"
        ) from error


def _check_free(config: EngineConfig) -> None:
    """Raises UsageError where the cluster that was joined serves another model by now.

    It would be replaced, and its streams with it. The same model's settings may be changed.
    """
    running = serve.status().applications.get(APP_NAME)
    if running is None or running.status != ApplicationStatus.RUNNING:
        return
    names = serve.get_app_handle(APP_NAME).models.remote().result(timeout_s=30)
    if names != config.names():
        raise UsageError(
            f"this cluster serves {names[0]} already, which {config.names()[0]} would take the "
            "place of: end it first (`serve shutdown`), or serve both by one file (`serve deploy`, "
            "as in deploy/models.yaml)"
        )


def _answers(host: str, port: int) -> bool:
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        socket.create_connection((here, port), 10).close()
    except OSError:
        return False
    return True


def run(
    config: EngineConfig,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    blocking: bool = True,
    tls: Tls | None = None,
) -> None:
    """Serve a model, on the cluster that RAY_ADDRESS names or a new one; return once it is healthy.

    With `blocking` it shows what it does, then serves until Ctrl-C or SIGTERM and takes down what
    it started. Raises the loader's errors for a model that can't be served, and RuntimeError when
    Serve can't deploy it.
    """
    from rich.console import Console  # not for replicas, which import this module too

    console = Console(stderr=True, highlight=False)
    own_cluster = False
    told_to_end = threading.Event()

    def end(*_: object) -> None:
        told_to_end.set()
        sys.exit(_TERMINATED)

    with console.status("") if blocking else nullcontext() as status:

        def stage(text: str) -> None:
            logger.info(text)
            if status is not None:
                status.update(text)
                if not console.is_terminal:
                    console.print(text)

        if not joins():
            require_free_port(host, port)
            stage(f"Reading {config.model} ...")
            Frontend.load(config)  # what is wrong with the model, said at once
            check_modules(config.lora_modules)
        stage("Starting Ray ...")
        own_cluster = connect()
        if blocking:  # from Ray, which ends a process as if it had crashed
            signal.signal(signal.SIGTERM, end)
        if blocking and not logger.isEnabledFor(logging.DEBUG):
            logging.getLogger("ray.serve").setLevel(logging.WARNING)  # `stage` says it
        if blocking and not own_cluster:
            _check_free(config)
        try:
            stage("Starting Ray Serve ...")
            start_serve(_http_options(host, port, tls))
            stage(f"Loading {config.model} ...")
            # Alone here, what fails to start fails again: said at once. A cluster may change.
            once = {"max_constructor_retry_count": 1} if own_cluster else {}
            try:
                serve.run(_application(config, **once), name=APP_NAME, route_prefix="/")
            except (RuntimeError, TimeoutError) as error:
                raise RuntimeError(why_not_deployed(serve.status(), APP_NAME) or error) from error
            if tls is not None:
                _check_tls(host, port)
        except BaseException:
            stage("Stopping ...")
            try:
                stop(own_cluster)
            finally:
                if told_to_end.is_set():  # Ray may have made another exception of it
                    sys.exit(_TERMINATED)
            raise
    if not blocking:
        return
    signal.signal(signal.SIGTERM, lambda *_: told_to_end.set())
    try:
        place = f"{'http' if tls is None else 'https'}://{host}:{port}"
        if not own_cluster and not _answers(host, port):
            place = f"this cluster's own address (`serve config` tells it), which is not {place},"
        console.print(f"Serving {config.names()[0]} on {place} until Ctrl-C", soft_wrap=True)
        told_to_end.wait()
    except KeyboardInterrupt:
        pass
    finally:
        with console.status("Stopping ..."):
            try:
                _close(config.drain_timeout_seconds)
            finally:  # another Ctrl-C does not wait for streams
                stop(own_cluster)


def _close(seconds: float) -> None:
    """Have every ingress take nothing more and end what it has."""
    handle = serve.get_deployment_handle("Ingress", APP_NAME)
    if hasattr(handle, "broadcast"):  # of later Rays
        try:
            handle.broadcast("close", seconds).results(timeout_s=seconds + _CLOSING_SECONDS)
        except Exception as error:  # then what runs ends as Serve has it
            logger.warning("the ingresses did not close: %r", error)


def start_serve(options: HTTPOptions) -> None:
    """Start Ray Serve, or use the one there is.

    Serve waits for its proxies for 60 s, and gives up at once if it has to replace one: little on a
    machine that is busy with other work. They go on starting; asked again it does not wait, and
    `serve.run` does, as long again.
    """
    try:
        serve.start(http_options=options)
    except (TimeoutError, ray.exceptions.RayActorError) as error:
        logger.warning("Serve's proxies take their time, waiting on: %s", error)
        serve.start(http_options=options)


def stop(own_cluster: bool) -> None:
    """Take the application down, and the cluster it was started with."""
    try:
        with suppress(RayServeException):  # it may have failed before Serve was up
            serve.delete(APP_NAME)
    finally:
        if own_cluster:
            ray.shutdown()  # Serve's own processes go with it
