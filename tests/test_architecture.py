"""Imports point down the rooms of the design, never in a circle, and heavy libraries load only when used."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "slide2vec"

#: Room -> number; a room imports only from rooms with a smaller number.
ROOMS = {
    "errors": 0,
    "installation": 0,
    "lazy": 0,
    "plugins": 0,
    "version": 0,
    "choices": 1,
    "cpus": 1,
    "energy": 1,
    "geometry": 1,
    "files": 1,
    "labels": 1,
    "config": 2,
    "memory": 2,
    "slides": 2,
    "progress": 2,
    "recipes": 2,
    "frames": 2,
    "pictures": 2,
    "synthetic": 2,
    "manifests": 3,
    "settings": 3,
    "readers": 3,
    "encoders": 3,
    "runtime": 3,
    "tiling": 4,
    "prepare": 4,
    "embedded": 5,
    "artifacts": 6,
    "bags": 7,
    "layouts": 7,
    "search": 7,
    "stream": 7,
    "aggregate": 8,
    "cohort": 8,
    "compile": 8,
    "report": 9,
    "scale": 9,
    "images": 9,
    "segmenters": 9,
    "tile_embedder": 9,
    "attention_maps": 10,
    "viewer": 10,
    "model": 11,
    "audit": 12,
    "estimate": 12,
    "models": 12,
    "pipeline": 13,
    "cli": 14,
}
#: Files at the top that may import from anywhere; so may the package itself.
ENTRANCES = {"__main__"}


def modules_in(*packages: Path) -> dict[str, Path]:
    """The modules of packages that lie beside each other, by their full names."""
    found = {}
    for package in packages:
        for path in package.rglob("*.py"):
            parts = path.relative_to(package.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules_in(PACKAGE, ROOT / "tools", ROOT / "benchmarks")


def imports_of(path: Path, modules: Iterable[str]) -> set[str]:
    """Of these modules, those that a file imports, wherever in the file the import stands: in a function and
    for types only, too."""
    known, found = set(modules), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively: say {node.module} in full"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in names}
    return found & known


def circle_in(modules: Mapping[str, Path]) -> list[str]:
    """Modules each of which imports the next, and the last is the first again; none without a circle."""
    graph = {name: imports_of(path, modules) for name, path in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))  # it lists each after what it imports
    return []


def upward_imports(module: str, imported: Iterable[str]) -> set[str]:
    """What a module of the package imports of rooms that are not below its own."""
    room = module.split(".")[1]
    assert room in ROOMS, f"{room} is not a room of the design"
    upward = set()
    for name in imported:
        other = name.partition(".")[2].partition(".")[0]  # of the package itself: nothing
        if name.startswith("slide2vec") and other != room and ROOMS.get(other, sys.maxsize) >= ROOMS[room]:
            upward.add(name)
    return upward


@pytest.mark.parametrize("module", [name for name in sorted(MODULES) if name.startswith("slide2vec.")])
def test_imports_point_down(module: str) -> None:
    if module.split(".")[1] in ENTRANCES:
        return
    upward = upward_imports(module, imports_of(MODULES[module], MODULES))
    assert not upward, f"{module} imports {upward}, which are not below its room"


def test_no_imports_in_a_circle() -> None:
    circle = circle_in(MODULES)
    assert not circle, f"a circle of imports: {' -> '.join(circle)}"


def test_upward_import_is_noticed() -> None:
    assert upward_imports("slide2vec.readers.probe", {"slide2vec.tiling.grid", "slide2vec.errors"}) == {
        "slide2vec.tiling.grid"
    }
    assert upward_imports("slide2vec.compile.engine_key", {"slide2vec"}) == {"slide2vec"}


@pytest.mark.parametrize(
    "back",
    [
        "from house.room.first import a",
        "def f():\n    import house.room.first",
        "from house.room import first",
    ],
)
def test_circle_inside_a_room_is_noticed(tmp_path: Path, back: str) -> None:
    room = tmp_path / "house" / "room"
    room.mkdir(parents=True)
    (room / "__init__.py").write_text("from house.room.first import a\n")
    (room / "first.py").write_text("from house.room.second import b\n")
    (room / "second.py").write_text("b = 1\n")
    assert circle_in(modules_in(tmp_path / "house")) == []
    (room / "second.py").write_text(
        f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    b = 1\n{back}\n"
    )
    circle = circle_in(modules_in(tmp_path / "house"))
    assert set(circle) == {"house.room.first", "house.room.second"} and circle[0] == circle[-1]


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import slide2vec", ("torch", "numpy", "cv2", "pandas", "pydantic", "rich", "cucim", "timm")),
        ("import slide2vec.readers", ("torch", "cv2", "pandas", "cucim", "openslide", "pyvips", "cupy")),
        ("import slide2vec.cohort.process_list, slide2vec.cohort.lock", ("torch", "cv2", "numpy", "pandas")),
        ("import slide2vec.runtime.tensorrt.deploy", ("torch", "tensorrt", "pycuda", "pandas")),
        ("import slide2vec.pipeline", ("timm", "torchvision", "torch._dynamo", "transformers")),
        ("import slide2vec.encoders.weights", ("timm", "huggingface_hub", "transformers")),
        ("import slide2vec.cli", ("torch", "cv2", "pandas", "numpy", "huggingface_hub")),
    ],
)
def test_import_stays_light(statement: str, absent: tuple[str, ...]) -> None:
    code = f"import sys; {statement}; print(*[m for m in {absent!r} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []


#: Imported name -> distribution, where it cannot be asked for: those that need not be installed here.
DISTRIBUTIONS = {
    "anndata": "anndata",
    "pyarrow": "pyarrow",
    "pycuda": "pycuda",
    "pynvml": "nvidia-ml-py",
    "sentencepiece": "sentencepiece",
    "spatialdata": "spatialdata",
    "tensorrt": "tensorrt",
    "tensorrt_rtx_bindings": "tensorrt-rtx-cu13-bindings",
    "zarr": "zarr",
}
#: Imported where something else has brought it: PyTorch, timm, the notebook that we run in, or SpatialData.
BROUGHT = {"IPython", "geopandas", "shapely", "torchvision", "triton"}


def libraries_in(package: Path) -> set[str]:
    """Names of other people's packages that the modules of ours import, wherever in them."""
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).partition(".")[0])
    return found - sys.stdlib_module_names - {package.name}


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    declared = {re.split(r"[^\w.-]", name)[0].lower().replace("_", "-") for name in asked}
    brought_by = packages_distributions()
    undeclared = set()
    for name in libraries_in(PACKAGE) - BROUGHT:
        distributions = {*brought_by.get(name, ()), DISTRIBUTIONS.get(name, "")}
        if not declared & {distribution.lower().replace("_", "-") for distribution in distributions}:
            undeclared.add(name)
    assert undeclared == set()


#: Rooms that run per tile. Nothing here may know of cohorts, command lines, pictures or configuration files.
CORE = ("stream", "prepare", "readers", "runtime")
NOT_FOR_THE_CORE = {
    "aggregate",
    "cli",
    "cohort",
    "compile",
    "manifests",
    "model",
    "pictures",
    "pipeline",
    "scale",
}
NOT_FOR_THE_CORE |= {"settings", "synthetic", "tile_embedder"}
#: Lines of the core, docstrings included. Make it smaller before you make this larger.
MOST_CORE_LINES = 13_500
#: Subcommands are named after what they do, as the modules that do it may be.
NAMED_AFTER_SUBCOMMANDS = {"cli"}


def same_names(package: Path) -> dict[str, list[str]]:
    """Names of files that occur in several rooms, and where. Siblings under one protocol are in one room."""
    rooms: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        if parts[-1] not in {"__init__", "__main__"} and parts[0] not in NAMED_AFTER_SUBCOMMANDS:
            rooms.setdefault(parts[-1], set()).add(parts[0])
    return {name: sorted(where) for name, where in rooms.items() if len(where) > 1}


def same_classes(package: Path) -> dict[str, list[str]]:
    """Public classes of one name, and the files that they are in."""
    files: dict[str, list[str]] = {}
    for path in sorted(package.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                files.setdefault(node.name, []).append(str(path.relative_to(package)))
    return {name: where for name, where in files.items() if len(where) > 1}


def test_every_file_name_is_in_one_room() -> None:
    assert same_names(PACKAGE) == {}


def test_every_public_class_has_its_own_name() -> None:
    assert same_classes(PACKAGE) == {}


def test_same_names_are_noticed(tmp_path: Path) -> None:
    for name in ("readers/base.py", "readers/sub/base.py", "cli/base.py", "cli/run.py", "cohort/run.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("class _Own: ...\n")
    assert same_names(tmp_path) == same_classes(tmp_path) == {}
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime/base.py").write_text("class Job: ...\n")
    (tmp_path / "readers/base.py").write_text("class Job: ...\n")
    assert same_names(tmp_path) == {"base": ["readers", "runtime"]}
    assert same_classes(tmp_path) == {"Job": ["readers/base.py", "runtime/base.py"]}


#: Lines of a file, docstrings included. More are two rooms: part it by what it is for.
MOST_FILE_LINES = 500


def test_files_are_short() -> None:
    lines = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    long = {name: len(path.read_text().splitlines()) for name, path in lines.items()}
    assert {name for name, n in long.items() if n > MOST_FILE_LINES} == set()


def test_core_is_small() -> None:
    lines = sum(
        len(path.read_text().splitlines()) for room in CORE for path in (PACKAGE / room).rglob("*.py")
    )
    assert lines <= MOST_CORE_LINES


@pytest.mark.parametrize("room", CORE)
def test_core_knows_nothing_of_what_is_around_it(room: str) -> None:
    for path in (PACKAGE / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [module or ""]
            known = {name.split(".")[1] for name in names if name.startswith("slide2vec.")}
            assert not known & NOT_FOR_THE_CORE, f"{path} imports {known & NOT_FOR_THE_CORE}"


def test_design_names_files_that_are_there() -> None:
    named = set(
        re.findall(
            r"`((?:slide2vec|tests|docs|engines)/[\w./]+\.\w+)`", (ROOT / "docs/design.md").read_text()
        )
    )
    assert len(named) > 40
    assert {name for name in named if not (ROOT / name).is_file()} == set()
