"""The three TensorRTs behind one face; nothing else in the project knows them apart.

- `tensorrt_rtx`: builds ahead of time, on any machine, for the GPU architectures it lists; kernels
  are made when a plan is loaded. Strongly typed networks.
- `tensorrt` 10.1 and later: builds for the GPU of this machine, timing kernels on it. Strongly
  typed networks.
- `tensorrt` 8.6: likewise, but weakly typed: the types a network asks for are set on each layer
  and TensorRT is told to obey them. No bfloat16.

A `Flavour` makes networks, compiles them to plans and loads plans. It needs TensorRT installed,
which a `Target`, the plain description of what a plan is compiled by and for, does not.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]
#: A dynamic input's smallest, best and largest shape.
ShapeRange = tuple[Shape, Shape, Shape]

#: The modules of each flavour and what installs them.
_INSTALLS = {
    "tensorrt": ("tensorrt", "pip install tensorrt"),
    "tensorrt_rtx": ("tensorrt_rtx_bindings", "pip install '.[rtx]' in Tensorray's source"),
}
FLAVOURS = tuple(_INSTALLS)


class TensorRTError(RuntimeError):
    """TensorRT refused something; the message holds its own words."""


class NeedsKernels(TensorRTError):
    """TensorRT has not what a segment needs; it is one for the project's own kernels."""


class TargetError(ValueError):
    """A target or dtype that cannot be compiled for here; the message lists what can."""


@dataclass(frozen=True)
class Target:
    """What a plan is compiled by and for.

    `gpu` is the GPU's model name where kernels were timed on one, None where the plan serves the
    whole architecture. `settings` is every builder setting that can change a plan.
    """

    flavour: str
    version: str
    architecture: str  # "sm_90"
    gpu: str | None
    settings: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class GPU:
    name: str
    architecture: str


class TimingCache:
    """What TensorRT learnt by timing kernels, passed from one build to the next.

    Belongs to one GPU model and TensorRT version. Flavours that time nothing leave it as it is.
    """

    def __init__(self, data: bytes = b"") -> None:
        self.data = data


def installed() -> list[str]:
    """The flavours this Python can import."""
    return [name for name, (module, _) in _INSTALLS.items() if importlib.util.find_spec(module)]


def load_flavour(name: str) -> Flavour:
    """The named flavour; raises TargetError saying what to install or what there is."""
    if name not in _INSTALLS:
        raise TargetError(f"there is no TensorRT {name!r}; there are {', '.join(FLAVOURS)}")
    module_name, install = _INSTALLS[name]
    try:
        module: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise TargetError(f"{name} cannot be imported ({error}); {install}") from error
    if name == "tensorrt_rtx":
        return TensorRTRTX(module)
    major, minor = (int(part) for part in module.__version__.split(".")[:2])
    if (major, minor) >= (10, 1):
        return TensorRT(module)
    if (major, minor) == (8, 6):
        return TensorRT8(module)
    raise TargetError(f"tensorrt {module.__version__} is not supported; 8.6 and 10.1 or later are")


@cache
def local_gpu() -> GPU | None:
    """This process's current GPU; None without one (or without CuPy)."""
    try:
        cupy: Any = importlib.import_module("cupy")
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
    except Exception as error:  # no CuPy, no driver, no device: each raises a type of its own
        logger.debug("no GPU: %s", error)
        return None
    architecture = f"sm_{properties['major']}{properties['minor']}"
    return GPU(properties["name"].decode(), architecture)


class Flavour(ABC):
    """One TensorRT. Its builder is made at first use and lives as long as the flavour.

    TensorRT speaks to one logger a process, so builds of one process take turns (`lock`).
    """

    name: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]] = ("bfloat16", "float16", "float32")
    #: Type of the values that shapes are computed with.
    shape_dtype: ClassVar[str] = "int64"
    #: How long a build searches for faster kernels, 0 to 5; None is TensorRT's own choice (3).
    optimization_level: int | None = None

    def __init__(self, module: Any) -> None:
        self.trt = module
        self.version: str = module.__version__
        self.messages = _messages(module)
        self.lock = threading.RLock()

    # --- what can be built ------------------------------------------------------------------

    @abstractmethod
    def architectures(self) -> list[str]:
        """The GPU architectures plans can be built for on this machine."""

    @abstractmethod
    def target(self, architecture: str) -> Target:
        """Plans for an architecture; raises TargetError listing those there are."""

    def check_dtype(self, dtype: str, target: Target) -> None:
        """Raise TargetError if the target can't compute in a dtype."""
        number = int(re.sub(r"\D", "", target.architecture))
        there = [name for name in self.dtypes if name != "bfloat16" or number >= 80]
        if dtype not in there:
            raise TargetError(
                f"{self.name} {self.version} for {target.architecture} has no {dtype}; "
                f"it has {', '.join(there)}"
            )

    # --- networks ---------------------------------------------------------------------------

    @cached_property
    def builder(self) -> Any:
        try:
            return self.trt.Builder(self.messages)
        except TypeError as error:  # what pybind11 makes of a null pointer
            raise TensorRTError(
                f"{self.name} {self.version} can't start: {self.messages.take()}"
            ) from error

    @abstractmethod
    def create_network(self) -> Any: ...

    def data_type(self, name: str) -> Any:
        """TensorRT's name for a dtype; raises TensorRTError if it has none."""
        try:
            return getattr(self.trt.DataType, _DATA_TYPES[name])
        except AttributeError:
            raise TensorRTError(f"{self.name} {self.version} has no {name}") from None

    def add_dequantize(self, network: Any, codes: Any, scale: Any, dtype: str) -> Any:
        """A layer that multiplies codes by scales (none, or as many axes as the codes, each
        dividing theirs). Raises TensorRTError where it takes no weights that are inputs."""
        return network.add_dequantize(codes, scale, self.data_type(dtype))

    @abstractmethod
    def set_types(self, layer: Any, dtype: str) -> None:
        """Have a layer compute in a dtype and give it."""

    @abstractmethod
    def set_output_type(self, tensor: Any, dtype: str) -> None:
        """Have a network's output be of a dtype."""

    def compile(
        self,
        network: Any,
        target: Target,
        profiles: Sequence[Mapping[str, ShapeRange]],
        timing_cache: TimingCache | None = None,
    ) -> bytes:
        """A network as a plan; raises TensorRTError with what TensorRT said."""
        config = self._config(target)
        self.limit_search(config, network)
        for shapes in profiles:
            profile = self.builder.create_optimization_profile()
            for name, (smallest, best, largest) in shapes.items():
                profile.set_shape(name, smallest, best, largest)
            if config.add_optimization_profile(profile) < 0:
                raise TensorRTError(f"profile {dict(shapes)}: {self.messages.take()}")
        if timing_cache is not None and target.gpu is not None:
            config.set_timing_cache(config.create_timing_cache(timing_cache.data), False)
        plan = self.builder.build_serialized_network(network, config)
        if plan is None:
            raise TensorRTError(self.messages.take())
        if timing_cache is not None and target.gpu is not None:
            timing_cache.data = bytes(config.get_timing_cache().serialize())
        return bytes(plan)

    def _config(self, target: Target | None) -> Any:
        config = self.builder.create_builder_config()
        if self.optimization_level is not None:
            config.builder_optimization_level = self.optimization_level
        self.configure(config, target)
        return config

    @abstractmethod
    def configure(self, config: Any, target: Target | None) -> None:
        """Set a builder configuration up; the target is None when only settings are read."""

    def limit_search(self, config: Any, network: Any) -> None:  # noqa: B027  # most need none
        """Keep a build from a search for kernels that does not end."""

    def settings(self) -> tuple[tuple[str, int], ...]:
        """The builder settings that plans depend on."""
        config = self._config(None)
        return (
            ("flags", int(config.flags)),
            ("optimization_level", int(config.builder_optimization_level)),
            ("tactic_sources", int(config.get_tactic_sources())),
        )

    # --- plans at work ----------------------------------------------------------------------

    @cached_property
    def runtime(self) -> Any:
        runtime = self.trt.Runtime(self.messages)
        runtime.max_threads = 1
        return runtime

    def load(self, plan: bytes) -> Any:
        """A plan as an engine on the current device; raises TensorRTError if it does not fit."""
        with self.lock:
            self.messages.take()
            engine = self.runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise TensorRTError(f"a plan cannot be loaded: {self.messages.take()}")
            return engine

    def scratch_bytes(self, engine: Any) -> int:
        """Bytes of device memory that any context of an engine needs while it runs."""
        return int(engine.device_memory_size_v2)

    def create_context(self, engine: Any) -> Any:
        """An execution context without memory of its own."""
        return engine.create_execution_context(
            self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )

    def set_scratch(self, context: Any, address: int, size: int) -> None:
        context.set_device_memory(address, size)


class _StronglyTyped(Flavour):
    def create_network(self) -> Any:
        flag = self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return self.builder.create_network(1 << int(flag))

    def set_types(self, layer: Any, dtype: str) -> None:
        """Nothing: a layer's inputs decide."""

    def set_output_type(self, tensor: Any, dtype: str) -> None:
        """Nothing: a layer's inputs decide."""

    def configure(self, config: Any, target: Target | None) -> None:
        # float32 is asked for where it matters; TF32 would take its precision away.
        config.clear_flag(self.trt.BuilderFlag.TF32)
        # Helper streams would each need scratch of their own, and have nothing to do in a chain.
        config.max_aux_streams = 0


class TensorRTRTX(_StronglyTyped):
    name = "tensorrt_rtx"

    def architectures(self) -> list[str]:
        members = self.trt.ComputeCapability.__members__
        numbers = [int(name[2:]) for name in members if re.fullmatch(r"SM\d+", name)]
        return [f"sm_{number}" for number in sorted(numbers)]

    def target(self, architecture: str) -> Target:
        if architecture not in self.architectures():
            raise TargetError(
                f"{self.name} {self.version} has no target {architecture!r}; "
                f"it has {', '.join(self.architectures())}"
            )
        return Target(self.name, self.version, architecture, None, self.settings())

    def configure(self, config: Any, target: Target | None) -> None:
        super().configure(config, target)
        if target is not None:
            capability = getattr(self.trt.ComputeCapability, _capability_name(target.architecture))
            config.num_compute_capabilities = 1
            config.set_compute_capability(capability, 0)


class _Local(Flavour):
    """A flavour that builds for the GPU it finds."""

    name = "tensorrt"

    def architectures(self) -> list[str]:
        gpu = local_gpu()
        return [gpu.architecture] if gpu else []

    def target(self, architecture: str) -> Target:
        gpu = local_gpu()
        if gpu is None or gpu.architecture != architecture:
            here = f"a {gpu.name}, {gpu.architecture}" if gpu else "none with CuPy installed"
            raise TargetError(
                f"{self.name} {self.version} builds for this machine's GPU ({here}), not for "
                f"{architecture!r}; build on a machine that has one, or with tensorrt_rtx"
            )
        return Target(self.name, self.version, architecture, gpu.name, self.settings())


class TensorRT(_Local, _StronglyTyped):
    """TensorRT 10.1 and later."""


class TensorRT8(_Local):
    """TensorRT 8.6, the last whose libraries PyPI carries."""

    dtypes = ("float16", "float32")
    shape_dtype = "int32"

    def create_network(self) -> Any:
        flag = self.trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH
        return self.builder.create_network(1 << int(flag))

    def set_types(self, layer: Any, dtype: str) -> None:
        layer.precision = self.data_type(dtype)
        for index in range(layer.num_outputs):
            layer.set_output_type(index, self.data_type(dtype))

    def set_output_type(self, tensor: Any, dtype: str) -> None:
        tensor.dtype = self.data_type(dtype)

    def configure(self, config: Any, target: Target | None) -> None:
        flags = self.trt.BuilderFlag
        config.set_flag(flags.FP16)
        config.set_flag(flags.OBEY_PRECISION_CONSTRAINTS)
        config.clear_flag(flags.TF32)
        config.max_aux_streams = 0
        # One context a captured graph: several share a profile.
        config.set_preview_feature(self.trt.PreviewFeature.PROFILE_SHARING_0806, True)

    def limit_search(self, config: Any, network: Any) -> None:
        """Take the first kernels that do for norms of heads, unless a level was asked for.

        Measured on an H200: segments that end in norms of queries and keys build within 2 s so, and
        had not ended after 150 s at TensorRT's own level.
        """
        layers = (network.get_layer(index) for index in range(network.num_layers))
        reduces = (layer for layer in layers if layer.type == self.trt.LayerType.REDUCE)
        over_heads = any(len(layer.get_input(0).shape) > 2 for layer in reduces)
        if over_heads and self.optimization_level is None:
            config.builder_optimization_level = 0

    def add_dequantize(self, network: Any, codes: Any, scale: Any, dtype: str) -> Any:
        raise TensorRTError(f"{self.name} {self.version} takes scales as constants only")

    def scratch_bytes(self, engine: Any) -> int:
        return int(engine.device_memory_size)

    def create_context(self, engine: Any) -> Any:
        return engine.create_execution_context_without_device_memory()

    def set_scratch(self, context: Any, address: int, size: int) -> None:
        context.device_memory = address


_DATA_TYPES = {
    "bfloat16": "BF16",
    "float16": "HALF",
    "float32": "FLOAT",
    "int32": "INT32",
    "int64": "INT64",
    "int4": "INT4",
    "int8": "INT8",
    "float8": "FP8",
}


def _capability_name(architecture: str) -> str:
    return architecture.upper().replace("_", "")


@cache
def _messages(module: Any) -> Any:
    """The process's one logger for a TensorRT: keeps what went wrong until it is taken."""
    severity = module.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.INFO,  # TensorRT warns of much that is in order
        severity.INFO: logging.DEBUG,
        severity.VERBOSE: logging.DEBUG - 5,  # what a build is at, many lines a second
    }

    class Messages(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self._errors: list[str] = []
            self._warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity)
            if level is None or _NO_GPU.search(message):
                return
            if level == logging.ERROR:
                self._errors.append(message)
            elif level == logging.INFO:
                self._warnings.append(message)
            logger.log(min(level, logging.INFO), "TensorRT: %s", message)

        def take(self) -> str:
            """The errors since they were last taken, each once; warnings if there were none."""
            said = list(dict.fromkeys(self._errors or self._warnings))
            self._errors.clear()
            self._warnings.clear()
            return "; ".join(said) or "TensorRT gave no reason"

    return Messages()


#: What TensorRT-RTX adds to each error on a machine without a GPU.
_NO_GPU = re.compile(r"catchCudaError.*cudaError 35", re.DOTALL)
