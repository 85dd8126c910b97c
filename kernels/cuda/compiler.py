"""CUDA source to running kernels: NVRTC, a disk cache of cubins, and launches.

NVRTC is called through cuda-bindings, since CuPy's own compiler targets plain `sm_90`, which lacks
Hopper's `wgmma`. Compiling needs no GPU; loading and launching use the current CuPy device.

A cubin is kept in `$TENSORRAY_CACHE_DIR/cubins` (default `~/.cache/tensorray/cubins`) under a
digest of all it depends on: the source and the headers beside it, the options and NVRTC's version.
Deleting one is always safe.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import re
import struct
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent

CACHE_VARIABLE = "TENSORRAY_CACHE_DIR"

# What the sources include, and which packages of NVIDIA's carry it.
_HEADERS = ("cuda_fp16.h", "crt/host_defines.h", "nv/target")
_TOOLKITS = ("CUDA_PATH", "CUDA_HOME")
_DEFAULT_TOOLKIT = "/usr/local/cuda"
_HINT = (
    "pip install '.[gpu]' in Tensorray's source brings NVRTC and its headers; so does a CUDA "
    "toolkit, found at $CUDA_PATH or /usr/local/cuda"
)
_INCLUDE = re.compile(rb'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
_DIGEST_SIZE = hashlib.sha256().digest_size
# More dynamic shared memory than this has to be asked for.
_SHARED_LIMIT = 48 * 1024
_FLOAT, _FLOAT_BITS = struct.Struct("<f"), struct.Struct("<I")


class CompileError(RuntimeError):
    """NVRTC is missing or refused a source; the message has its log."""


class LaunchError(RuntimeError):
    """The driver refused to load or launch a kernel."""


# --- compiling --------------------------------------------------------------------------------


def compile(source: str, arch: str | None = None, **constants: int | str) -> bytes:
    """The cubin of a file in this folder for `arch` ("sm_80", "sm_90a", …).

    None: for the current device. Each constant becomes a macro (call none `T`: CUDA's headers
    have templates). Served from the disk cache where possible; needs no GPU if `arch` is given.
    Raises CompileError.
    """
    if arch is None:
        arch = device_arch()
    options = [
        f"--gpu-architecture={arch}",
        "--std=c++17",
        *(
            f"-D{name}={int(v) if isinstance(v, bool) else v}"
            for name, v in sorted(constants.items())
        ),
    ]
    entry = cache_directory() / f"{Path(source).stem}-{arch}-{_key(source, options)}.cubin"
    cubin = _read(entry)
    if cubin is None:
        cubin = _compile(source, options)
        _write(entry, cubin)
    return cubin


def cache_directory() -> Path:
    """`$TENSORRAY_CACHE_DIR/cubins`, or a directory in the user's cache."""
    base = os.environ.get(CACHE_VARIABLE)
    return (Path(base) if base else Path.home() / ".cache" / "tensorray") / "cubins"


def nvrtc_version() -> tuple[int, int]:
    """NVRTC's major and minor version. Raises CompileError where there is none."""
    result: tuple[int, int] = _nvrtc()[1]
    return result


@functools.cache
def _nvrtc() -> tuple[Any, tuple[int, int]]:
    """The NVRTC bindings and the library's version."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise CompileError(f"CUDA kernels need the package cuda-bindings: {_HINT}") from error
    try:
        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # what the loader raises differs between versions
        raise CompileError(f"NVRTC can't be loaded ({error}): {_HINT}") from error
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"NVRTC can't be used: {status}")
    return nvrtc, (int(major), int(minor))


@functools.cache
def include_options() -> tuple[str, ...]:
    """`-I` options for CUDA's own headers: those beside NVRTC's library, else a toolkit's."""
    from cuda import pathfinder

    library = pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path
    roots = [Path(library).parents[1]] if library else []
    roots += [Path(os.environ[name]) for name in _TOOLKITS if os.environ.get(name)]
    roots.append(Path(_DEFAULT_TOOLKIT))
    for root in roots:
        include = root / "include"
        folders = [include, include / "cccl"]  # CUDA 13 moved nv/target one level down
        if all(any((folder / header).exists() for folder in folders) for header in _HEADERS):
            return tuple(f"-I{folder}" for folder in folders)
    looked = ", ".join(str(root / "include") for root in roots)
    raise CompileError(f"no CUDA headers ({', '.join(_HEADERS)}) in {looked}: {_HINT}")


def _compile(source: str, options: Sequence[str]) -> bytes:
    nvrtc, _ = _nvrtc()
    flags = [o.encode() for o in (*options, f"-I{SOURCES}", *include_options())]
    text = (SOURCES / source).read_bytes()
    cubin: bytes

    def checked(result: tuple[Any, ...]) -> Any:
        if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"compiling {source}: {nvrtc.nvrtcGetErrorString(result[0])[1]!r}")
        return result[1] if len(result) > 1 else None

    program = checked(nvrtc.nvrtcCreateProgram(text, source.encode(), 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
            checked(nvrtc.nvrtcGetProgramLog(program, log))
            shown = log.rstrip(b"\0 \n").decode(errors="replace")
            raise CompileError(f"{source} does not compile with {' '.join(options)}:\n{shown}")
        cubin = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
        checked(nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _key(source: str, options: Sequence[str]) -> str:
    digest = hashlib.sha256(repr((nvrtc_version(), list(options))).encode())
    for text in _texts(source):
        digest.update(hashlib.sha256(text).digest())
    return digest.hexdigest()[:32]


def _texts(source: str) -> Iterator[bytes]:
    """A source and, each once, the headers of this folder that it includes."""
    pending, seen = [source], {source}
    while pending:
        text = (SOURCES / pending.pop()).read_bytes()
        yield text
        for name in sorted({found.decode() for found in _INCLUDE.findall(text)} - seen):
            seen.add(name)
            pending.append(name)


def _read(entry: Path) -> bytes | None:
    """A cached cubin; None if there is none or it is not whole."""
    try:
        data = entry.read_bytes()
    except OSError:
        return None
    digest, cubin = data[:_DIGEST_SIZE], data[_DIGEST_SIZE:]
    return cubin if digest == hashlib.sha256(cubin).digest() else None


def _write(entry: Path, cubin: bytes) -> None:
    """Keep a cubin, whole or not at all; a cache that can't be written only costs time."""
    temporary = None
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=entry.parent, suffix=".tmp")
        with os.fdopen(descriptor, "wb") as file:
            file.write(hashlib.sha256(cubin).digest() + cubin)
        os.replace(temporary, entry)
    except OSError as error:
        logger.warning("compiled kernels can't be kept in %s: %s", entry.parent, error)
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


# --- loading and launching --------------------------------------------------------------------


def multiprocessors() -> int:
    """How many the current CuPy device has."""
    return _of_current_device("MultiProcessorCount")


def most_shared_bytes() -> int:
    """Shared memory that a block may ask for on the current CuPy device: 99 KiB on most GPUs, 163
    on an A100, 227 on Hopper."""
    return _of_current_device("MaxSharedMemoryPerBlockOptin")


def _of_current_device(attribute: str) -> int:
    import cupy

    return _attribute(cupy.cuda.runtime.getDevice(), attribute)


@functools.cache
def _attribute(device: int, name: str) -> int:
    import cupy

    found: int = cupy.cuda.Device(device).attributes[name]
    return found


def device_arch() -> str:
    """The current CuPy device's target: with its own instructions ("sm_90a") from Hopper on."""
    import cupy

    capability = cupy.cuda.Device().compute_capability  # "90", "120"
    return _target(int(capability), _supported())


def _supported() -> list[int]:
    nvrtc, version = _nvrtc()
    status, supported = nvrtc.nvrtcGetSupportedArchs()
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"NVRTC {version[0]}.{version[1]} does not say what it compiles for")
    return [int(arch) for arch in supported]


def _target(capability: int, supported: Sequence[int]) -> str:
    if capability in supported:
        return f"sm_{capability}{'a' if capability >= 90 else ''}"
    # Machine code runs on later devices of the same major version.
    older = [arch for arch in supported if arch // 10 == capability // 10 and arch < capability]
    if not older:
        raise CompileError(
            f"this NVRTC knows no GPU of compute capability {capability / 10}; it compiles for "
            f"{', '.join(str(arch / 10) for arch in supported)}. Install another CUDA version"
        )
    return f"sm_{max(older)}"


def load(source: str, arch: str | None = None, **constants: int | str) -> Module:
    """A source compiled and loaded on the current CuPy device; one object a process and device."""
    import cupy

    return _load(cupy.cuda.runtime.getDevice(), source, arch, tuple(sorted(constants.items())))


@functools.cache
def _load(
    device: int, source: str, arch: str | None, constants: tuple[tuple[str, int | str], ...]
) -> Module:
    import cupy

    cubin = compile(source, arch, **dict(constants))
    cupy.cuda.runtime.free(0)  # makes the device's context current on this thread
    handle = _checked(_driver().cuModuleLoadData(cubin), f"loading {source}")
    hopper = int(cupy.cuda.Device(device).compute_capability) >= 90
    return Module(handle, source, can_overlap=hopper)


@functools.cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _checked(result: tuple[Any, ...], doing: str) -> Any:
    if int(result[0]):
        raise LaunchError(f"{doing}: {result[0].name}")
    return result[1] if len(result) > 1 else None


class Module:
    """A loaded cubin."""

    def __init__(self, handle: Any, source: str, *, can_overlap: bool) -> None:
        self._handle = handle
        self._source = source
        self._can_overlap = can_overlap
        self._functions: dict[tuple[str, int], Function] = {}

    def function(self, name: str, shared_bytes: int = 0) -> Function:
        """A kernel, declared `extern "C" __global__`, and the dynamic shared memory it needs."""
        known = self._functions.get((name, shared_bytes))
        if known is None:
            label = f"{self._source}:{name}"
            known = Function(self._handle, label, name, shared_bytes, self._can_overlap)
            self._functions[name, shared_bytes] = known
        return known


class Function:
    """A kernel; calling it launches it on CuPy's current stream."""

    def __init__(
        self, module: Any, label: str, name: str, shared_bytes: int, can_overlap: bool
    ) -> None:
        driver = _driver()
        self._can_overlap = can_overlap
        self._label = label
        self._shared_bytes = shared_bytes
        self._handle = _checked(driver.cuModuleGetFunction(module, name.encode()), label)
        if shared_bytes > _SHARED_LIMIT:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            doing = f"{label}: {shared_bytes} bytes of shared memory"
            # The kernel's own, shared by all that launch it: it may only rise.
            allowed = _checked(driver.cuFuncGetAttribute(attribute, self._handle), doing)
            if shared_bytes > allowed:
                _checked(driver.cuFuncSetAttribute(self._handle, attribute, shared_bytes), doing)

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        *arguments: Any,
        shared_bytes: int | None = None,
        overlap: bool = False,
    ) -> None:
        """Launch with up to three extents each of grid and block.

        Arguments: CuPy arrays (their pointer), NumPy scalars and structured scalars (their bytes),
        int (int32), float (float32), bool (int32), None (a null pointer). `shared_bytes` defaults
        to what `Module.function` was told. With `overlap` the kernel may start before the one ahead
        of it in the stream has finished, where the GPU can (programmatic dependent launch, from
        compute capability 9.0 on): every block of it must execute `wait_for_previous_kernel()`
        (common.cuh), and before it touches memory that others write or read. Raises LaunchError.
        """
        import cupy

        if 0 in grid:
            return
        driver = _driver()
        dynamic = self._shared_bytes if shared_bytes is None else shared_bytes
        stream = cupy.cuda.get_current_stream().ptr
        values = _Arguments(arguments)
        if not (overlap and self._can_overlap):
            result = driver.cuLaunchKernel(
                self._handle, *_extents(grid), *_extents(block), dynamic, stream, values.address, 0
            )
        else:
            config = _overlapping(_extents(grid), _extents(block), dynamic, stream)
            result = driver.cuLaunchKernelEx(config, self._handle, values.address, 0)
        if int(result[0]):
            raise LaunchError(
                f"launching {self._label}, grid {grid}, block {block}, {dynamic} bytes of shared "
                f"memory: {result[0].name}"
            )


def _extents(given: tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*given, 1, 1)[:3]
    return x, y, z


@functools.lru_cache(4096)
def _overlapping(
    grid: tuple[int, int, int], block: tuple[int, int, int], shared_bytes: int, stream: int
) -> Any:
    driver = _driver()
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = block
    config.sharedMemBytes = shared_bytes
    config.hStream = driver.CUstream(stream)
    attribute = driver.CUlaunchAttribute()
    name = "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"
    attribute.id = getattr(driver.CUlaunchAttributeID, name)
    attribute.value.programmaticStreamSerializationAllowed = 1
    config.attrs = [attribute]
    config.numAttrs = 1
    return config


class _Arguments:
    """Kernel arguments as the driver wants them: an array of pointers to values."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        values = [_value(argument) for argument in arguments]
        self._kept = {i: value for i, value in enumerate(values) if type(value) is not int}
        for i in self._kept:
            values[i] = 0
        self._words = array("Q", values)
        first, count = self._words.buffer_info()
        self._pointers = array("Q", range(first, first + 8 * count, 8))
        for i, buffer in self._kept.items():
            self._pointers[i] = ctypes.addressof(buffer)
        self.address = self._pointers.buffer_info()[0]


def _value(argument: Any) -> Any:
    """An argument's bytes, the lowest first: up to 8 as an int, others as a ctypes buffer."""
    kind = type(argument)
    if kind is int or kind is bool:
        return argument & 0xFFFFFFFF
    if kind is float:
        return _FLOAT_BITS.unpack(_FLOAT.pack(argument))[0]
    if argument is None:
        return 0
    pointer = getattr(getattr(argument, "data", None), "ptr", None)
    if pointer is not None:  # a CuPy array
        return pointer
    if not hasattr(argument, "dtype"):
        raise TypeError(f"a kernel can't take an argument of type {kind.__name__}")
    content = argument.tobytes()  # a NumPy scalar
    if len(content) <= 8:
        return int.from_bytes(content, "little")
    return ctypes.create_string_buffer(content, len(content))
