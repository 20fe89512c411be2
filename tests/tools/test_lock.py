"""uv.lock has all that the extras need for each Python that we name, and has it as wheels."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename
from uv import find_uv_bin

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))

#: TensorRT is fetched from NVIDIA, pims (of spatialdata) and pyvips need no compiler; pycuda does.
SOURCES = {"pims", "pycuda", "pyvips", "tensorrt", "tensorrt-cu13", "tensorrt-cu13-libs"}


@pytest.fixture(scope="module")
def locked() -> list[Requirement]:
    """Of the base and all extras, on any Python and system."""
    options = ["--frozen", "--offline", "--all-extras", "--no-dev", "--no-emit-project", "--no-hashes"]
    listed = subprocess.run(
        [find_uv_bin(), "export", *options], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [Requirement(line) for line in listed.splitlines() if re.match(r"\w", line)]


@pytest.fixture(scope="module")
def wheels() -> dict[tuple[str, str], set[Tag]]:
    packages = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))["package"]
    return {
        (package["name"], package["version"]): {
            tag
            for wheel in package.get("wheels", ())
            for tag in parse_wheel_filename(wheel["url"].rpartition("/")[2])[3]
        }
        for package in packages
    }


@pytest.mark.parametrize("python", PYTHONS)
def test_wheels_of_all_extras(
    python: str, locked: list[Requirement], wheels: dict[tuple[str, str], set[Tag]]
) -> None:
    assert PYTHONS[0] == PROJECT["requires-python"].removeprefix(">=")
    linux = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
    }
    version = tuple(map(int, python.split(".")))
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(5, 29)]
    platforms += ["manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64", "linux_x86_64"]
    fitting = {
        *cpython_tags(version, platforms=platforms),
        *compatible_tags(version, interpreter=f"cp{version[0]}{version[1]}", platforms=platforms),
    }
    here = [each for each in locked if each.marker is None or each.marker.evaluate(linux)]
    names = [each.name for each in here]
    assert {"torch", "cucim-cu13", "openvino", "spatialdata", "ray", "sentencepiece"} <= set(names)
    assert len(names) == len(set(names))
    lacking = {
        each.name for each in here if not wheels[each.name, str(each.specifier).removeprefix("==")] & fitting
    }
    assert lacking == SOURCES
