"""Imports point down the rooms of the design only, and heavy libraries load only when used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "slide2vec"

#: Room -> number; a room imports only from rooms with a smaller number.
ROOMS = {
    "errors": 0,
    "cpus": 1,
    "geometry": 1,
    "files": 1,
    "config": 2,
    "slides": 2,
    "progress": 2,
    "recipes": 2,
    "embedded": 2,
    "pictures": 2,
    "synthetic": 2,
    "manifests": 3,
    "settings": 3,
    "readers": 3,
    "encoders": 3,
    "runtime": 3,
    "tiling": 4,
    "prepare": 4,
    "artifacts": 5,
    "stream": 6,
    "aggregate": 7,
    "cohort": 7,
    "compile": 7,
    "scale": 8,
    "model": 9,
    "pipeline": 10,
    "cli": 11,
}
#: Files at the top that may import from anywhere.
ENTRANCES = {"__init__", "__main__"}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imports_of(path: Path) -> set[str]:
    """Rooms that a file imports, wherever in the file the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "slide2vec":
            found.add(room_of(node.module))
        elif isinstance(node, ast.Import):
            found.update(room_of(a.name) for a in node.names if a.name.split(".")[0] == "slide2vec")
    return found


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "engines" not in path.parts)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[0] in ENTRANCES:
        return
    assert parts[0] in ROOMS, f"{parts[0]} is not a room of the design"
    number = ROOMS[parts[0]]
    upward = {room for room in imports_of(path) - {parts[0], "__init__"} if ROOMS[room] >= number}
    assert not upward, f"{path} imports {upward}, which are not below {parts[0]}"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import slide2vec", ("torch", "numpy", "cv2", "pandas", "pydantic", "rich", "cucim", "timm")),
        ("import slide2vec.readers", ("torch", "cv2", "pandas", "cucim", "openslide", "pyvips", "cupy")),
        ("import slide2vec.cohort.process_list, slide2vec.cohort.lock", ("torch", "cv2", "numpy", "pandas")),
        ("import slide2vec.runtime.tensorrt.deploy", ("torch", "tensorrt", "pycuda", "pandas")),
        ("import slide2vec.encoders.weights", ("timm", "huggingface_hub", "transformers")),
        ("import slide2vec.cli", ("torch", "cv2", "pandas", "numpy", "huggingface_hub")),
    ],
)
def test_import_stays_light(statement: str, absent: tuple[str, ...]) -> None:
    code = f"import sys; {statement}; print(*[m for m in {absent!r} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []
