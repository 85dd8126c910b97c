"""What pyproject.toml can't say yet: the CPU kernels in C.

The extension is optional: where it can't be compiled (no compiler, or one without GCC's vector
extensions), the install goes on and the NumPy twins do its work, slower.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import Extension, setup

SOURCE = Path("kernels/csrc")
# No -march: instruction sets are chosen at run time (kernels/csrc/module.c).
FLAGS = ["-std=gnu11", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-pthread"]

setup(
    ext_modules=[
        Extension(
            "tensorray.kernels._native",
            sources=[str(path) for path in sorted(SOURCE.glob("*.c"))],
            depends=[str(path) for path in sorted(SOURCE.glob("*.h"))],
            extra_compile_args=[*FLAGS, "-Wall", "-Wextra"],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
