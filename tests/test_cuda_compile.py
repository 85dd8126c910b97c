"""Every CUDA kernel compiles, for each architecture, without a GPU; the cache of cubins."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tensorray.kernels import cuda
from tensorray.kernels.cuda import compiler
from tensorray.kernels.device import is_cuda

pytest.importorskip("cuda.bindings.nvrtc", reason="compiling CUDA kernels needs cuda-bindings")

ARCHITECTURES = ("sm_90a", "sm_80", "sm_120")

Constants = dict[str, int | str]


def declared() -> dict[str, list[Constants]]:
    """Every source's sets of constants, as the modules of its operations state them."""
    sets: dict[str, list[Constants]] = {}
    for module in pkgutil.iter_modules(cuda.__path__, f"{cuda.__name__}."):
        for source, own in getattr(
            importlib.import_module(module.name), "CONSTANT_SETS", {}
        ).items():
            sets.setdefault(source, []).extend(own)
    return sets


def cases() -> list[tuple[str, str, Constants]]:
    """A source's sets of constants for one architecture each, in turn, and every architecture."""
    return [
        (source, arch, constants)
        for source, sets in sorted(declared().items())
        for i, constants in enumerate(sets)
        for j, arch in enumerate(ARCHITECTURES)
        if i == j % len(sets) or (i >= len(ARCHITECTURES) and i % len(ARCHITECTURES) == j)
    ]


def label(case: object) -> str:
    if isinstance(case, dict):
        return ",".join(f"{name}={value}" for name, value in case.items())
    return str(case)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path))
    return tmp_path / "cubins"


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one kernel, and a header it includes, in place of the project's own."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "value.cuh").write_text("#define VALUE 1\n")
    (folder / "small.cu").write_text(
        '#include "value.cuh"\n'
        'extern "C" __global__ void small(int* out) { out[threadIdx.x] = VALUE + N; }\n'
    )
    monkeypatch.setattr(compiler, "SOURCES", folder)
    return folder


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources given to NVRTC, one entry a compilation."""
    seen: list[str] = []
    original = compiler._compile

    def counted(source: str, options: list[str]) -> bytes:
        seen.append(source)
        return original(source, options)

    monkeypatch.setattr(compiler, "_compile", counted)
    return seen


@pytest.mark.parametrize(("source", "arch", "constants"), cases(), ids=label)
def test_a_kernel_compiles(source: str, arch: str, constants: Constants) -> None:
    assert compiler.compile(source, arch, **constants).startswith(b"\x7fELF")


def test_every_source_has_constant_sets() -> None:
    assert {path.name for path in compiler.SOURCES.glob("*.cu")} == set(declared())


def test_a_cubin_is_compiled_once(cache: Path, sources: Path, compilations: list[str]) -> None:
    first = compiler.compile("small.cu", "sm_80", N=1)
    assert compiler.compile("small.cu", "sm_80", N=1) == first
    assert compilations == ["small.cu"]
    assert len(list(cache.iterdir())) == 1


def test_the_order_of_constants_is_no_other_cubin(
    cache: Path, sources: Path, compilations: list[str]
) -> None:
    compiler.compile("small.cu", "sm_80", N=1, M=2)
    compiler.compile("small.cu", "sm_80", M=2, N=1)
    assert compilations == ["small.cu"]
    assert len(list(cache.iterdir())) == 1


def test_what_a_cubin_depends_on_is_in_its_key(
    cache: Path, sources: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.compile("small.cu", "sm_80", N=1)
    compiler.compile("small.cu", "sm_80", N=2)
    compiler.compile("small.cu", "sm_90a", N=1)
    (sources / "value.cuh").write_text("#define VALUE 2\n")
    compiler.compile("small.cu", "sm_80", N=1)
    (sources / "small.cu").write_text((sources / "small.cu").read_text() + "// changed\n")
    compiler.compile("small.cu", "sm_80", N=1)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (99, 0))
    compiler.compile("small.cu", "sm_80", N=1)
    assert len(compilations) == len(list(cache.iterdir())) == 6


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_corrupt_cubin_is_compiled_again(
    cache: Path, sources: Path, compilations: list[str], damage: str
) -> None:
    cubin = compiler.compile("small.cu", "sm_80", N=1)
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    entry.write_bytes({"truncated": whole[:-9], "flipped": flipped, "empty": b""}[damage])
    assert compiler.compile("small.cu", "sm_80", N=1) == cubin
    assert compilations == ["small.cu", "small.cu"]
    assert entry.read_bytes() == whole


def test_writers_at_once_leave_one_whole_cubin(cache: Path, sources: Path) -> None:
    command = (
        "from pathlib import Path; from tensorray.kernels.cuda import compiler; "
        f"compiler.SOURCES = Path({str(sources)!r}); "
        "print(len(compiler.compile('small.cu', 'sm_80', N=1)))"
    )

    def run(_: int) -> str:
        return subprocess.run(
            [sys.executable, "-c", command], capture_output=True, text=True, check=True
        ).stdout

    with ThreadPoolExecutor(3) as pool:
        sizes = list(pool.map(run, range(3)))
    (entry,) = cache.iterdir()
    assert compiler._read(entry) is not None
    assert set(sizes) == {f"{len(compiler._read(entry) or b'')}\n"}


def test_a_cache_that_cannot_be_written_only_costs_time(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "file"))
    assert compiler.compile("small.cu", "sm_80", N=1).startswith(b"\x7fELF")
    assert "can't be kept" in caplog.text


def test_an_error_shows_the_log(cache: Path, sources: Path) -> None:
    with pytest.raises(compiler.CompileError, match='identifier "N" is undefined'):
        compiler.compile("small.cu", "sm_80")
    assert not cache.exists()


def test_headers_are_found_in_a_toolkit_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Where NVRTC's library has no headers beside it, CUDA_PATH's serve."""
    from cuda import pathfinder

    class Elsewhere:
        abs_path = str(tmp_path / "lib" / "libnvrtc.so")

    toolkit = tmp_path / "toolkit"
    for header in compiler._HEADERS:
        path = toolkit / "include" / "cccl" / header
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    request.addfinalizer(compiler.include_options.cache_clear)
    compiler.include_options.cache_clear()
    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", lambda _: Elsewhere)
    monkeypatch.setattr(compiler, "_DEFAULT_TOOLKIT", str(tmp_path / "none"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("CUDA_PATH", str(toolkit))
    assert compiler.include_options()[1] == f"-I{toolkit / 'include' / 'cccl'}"
    compiler.include_options.cache_clear()
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "other"))
    with pytest.raises(compiler.CompileError, match="no CUDA headers"):
        compiler.include_options()


@pytest.mark.parametrize(
    ("capability", "target"),
    [(80, "sm_80"), (89, "sm_89"), (90, "sm_90a"), (100, "sm_100a"), (121, "sm_120")],
)
def test_the_target_of_a_device(capability: int, target: str) -> None:
    assert compiler._target(capability, [80, 86, 89, 90, 100, 120]) == target


def test_a_device_newer_than_nvrtc_is_named() -> None:
    with pytest.raises(compiler.CompileError, match=r"capability 13\.0"):
        compiler._target(130, [80, 90, 120])


def test_numpy_arrays_are_not_on_a_gpu() -> None:
    assert not is_cuda(np.zeros(3))
    assert not is_cuda([1.0])
