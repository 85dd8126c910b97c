"""What pyproject.toml can't say yet: the CPU kernels in C, and that this file is no module.

The extension is optional: where it can't be compiled (no compiler, or one without GCC's vector
extensions), the install goes on and the NumPy twins do its work, slower.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

SOURCE = Path("kernels/csrc")
# No -march: instruction sets are chosen at run time (kernels/csrc/module.c).
FLAGS = ["-std=gnu11", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-pthread"]


class BuildModules(build_py):
    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)
        return [each for each in found if each[:2] != ("tensorray", "setup")]


setup(
    cmdclass={"build_py": BuildModules},
    ext_modules=[
        Extension(
            "tensorray.kernels._native",
            sources=[str(path) for path in sorted(SOURCE.glob("*.c"))],
            depends=[str(path) for path in sorted(SOURCE.glob("*.h"))],
            extra_compile_args=[*FLAGS, "-Wall", "-Wextra"],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ],
)
