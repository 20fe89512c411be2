"""The command that adds an extra to this installation, and a wheel outside the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from slide2vec import installation
from slide2vec.installation import add_extra

ROOT = Path(__file__).parents[1]


class Installed:
    """Stands for a distribution's metadata."""

    requires = (
        "numpy>=1.26",
        "cucim-cu13>=25.10; (sys_platform == 'linux') and extra == 'cucim'",
        "cucim-cu13>=25.10; (sys_platform == 'linux') and extra == 'cuda'",
        "nvidia-dali-cuda130>=2.0; extra == 'cuda'",
        "only-on-windows>=1; (sys_platform == 'win32') and extra == 'cuda'",
        "openvino>=2025.2; extra == 'openvino'",
    )

    def __init__(self, said: dict[str, Any] | None) -> None:
        self._said = said

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self._said is None else json.dumps(self._said)


@pytest.fixture(autouse=True)
def pip_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "_is_installed", lambda name: True)
    monkeypatch.setattr(installation.shutil, "which", lambda name: str(Path(sys.executable).parent / name))
    monkeypatch.setattr(sys, "platform", "linux")


def installed(monkeypatch: pytest.MonkeyPatch, said: dict[str, Any] | None) -> None:
    monkeypatch.setattr(installation, "distribution", lambda name: Installed(said))


def test_of_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "my slides"
    folder.mkdir()
    installed(monkeypatch, {"url": folder.as_uri(), "dir_info": {"editable": True}})
    assert add_extra("openvino", "cuda") == f'pip install -e "{folder}[cuda,openvino]"'
    installed(monkeypatch, {"url": folder.as_uri(), "dir_info": {}})
    assert add_extra("cuda") == f'pip install "{folder}[cuda]"'


def test_of_a_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheel = tmp_path / "slide2vec-0.1.0-py3-none-any.whl"
    wheel.touch()
    installed(monkeypatch, {"url": wheel.as_uri(), "archive_info": {}})
    assert add_extra("cuda") == f'pip install "{wheel}[cuda]"'
    wheel.unlink()
    assert add_extra("cuda") == 'pip install "cucim-cu13>=25.10" "nvidia-dali-cuda130>=2.0"'
    assert add_extra("cuda", "cucim", "openvino").count("cucim") == 1


def test_of_a_repository_or_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "https://example.org/slide2vec.git"
    installed(monkeypatch, {"url": url, "vcs_info": {"vcs": "git", "commit_id": "abc"}})
    assert add_extra("cuda") == f'pip install "slide2vec[cuda] @ git+{url}@abc"'
    installed(monkeypatch, {"url": "https://example.org/slide2vec.whl", "archive_info": {}})
    assert add_extra("cuda") == 'pip install "slide2vec[cuda] @ https://example.org/slide2vec.whl"'


def test_of_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, None)
    assert add_extra("openvino") == 'pip install "openvino>=2025.2"'


def test_of_a_folder_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(installation, "distribution", absent)
    assert add_extra("cuda") == f'pip install -e "{ROOT}[cuda]"'


def test_by_the_installer_of_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, None)
    monkeypatch.setattr(sys, "executable", "/opt/a b/bin/python")
    monkeypatch.setattr(installation.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert add_extra("openvino").startswith('"/opt/a b/bin/python" -m pip install "openvino')
    monkeypatch.setattr(installation, "_is_installed", lambda name: False)
    assert add_extra("openvino").startswith('uv pip install --python "/opt/a b/bin/python" "openvino')
    monkeypatch.setattr(installation.shutil, "which", lambda name: f"/opt/a b/bin/{name}")
    assert add_extra("openvino").startswith('uv pip install "openvino')


def test_a_hint_leaves_pytorchs_compiler_alone() -> None:
    """To look for the module pip would make setuptools leave distutils to Python, and its import fail."""
    code = "import slide2vec.installation as here; here.add_extra('cuda'); import distutils.core, setuptools"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_names_the_other_project() -> None:
    """`pip install slide2vec[…]` would fetch the slide2vec of PyPI."""
    texts = [*ROOT.joinpath("slide2vec").rglob("*.py"), *ROOT.glob("docs/**/*.md"), ROOT / "README.md"]
    texts += [*ROOT.glob("engines/*.toml"), ROOT / "Makefile"]
    wrong = [f"{path.relative_to(ROOT)}: {line}" for path in texts for line in _fetching(path)]
    assert not wrong


def _fetching(path: Path) -> list[str]:
    if path == Path(installation.__file__):
        return []
    return [line for line in path.read_text().splitlines() if "install" in line and "slide2vec[" in line]


@pytest.mark.slow
def test_wheel_outside_the_checkout(tmp_path: Path) -> None:
    """Built, installed beside the same packages, used from another folder: the demo, and what it says."""
    uv = str(Path(sys.executable).with_name("uv"))
    build = [uv, "build", "--wheel", "--no-build-isolation", "--offline", "--python", sys.executable]
    subprocess.run([*build, "--out-dir", tmp_path / "dist"], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    place = tmp_path / "site"
    add = [uv, "pip", "install", "--offline", "--no-deps", "--python", sys.executable]
    subprocess.run([*add, "--target", place, wheel], check=True, capture_output=True)

    def run(*args: str) -> str:
        env = os.environ | {"PYTHONPATH": str(place)}
        done = subprocess.run([sys.executable, *args], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("-c", "import slide2vec; print(slide2vec.__file__)").startswith(str(place))
    said = run("-c", "from slide2vec.installation import add_extra; print(add_extra('openvino'))")
    assert f'"{wheel}[openvino]"' in said
    run("-m", "slide2vec", "demo", "--output", str(tmp_path / "demo"))
    assert (tmp_path / "demo").is_dir() and any((tmp_path / "demo").rglob("*.pt"))
    assert "virchow2" in run("-m", "slide2vec", "models")
