"""What `make gpu-check` runs can be run where only slide2vec's base packages are installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.gpu_check import ROOT, TESTS, pytest_command

ONLY_BASE = Path(__file__).with_name("base_packages.py")
#: Packages of extras and of the tests only, that the developers' environment has.
OTHERS = ("cucim", "nvidia.nvimgcodec", "nvidia.dali", "openvino", "ray", "moto", "s3fs", "transformers")


def only_base(*command: str) -> subprocess.CompletedProcess[str]:
    hidden = {"CUDA_VISIBLE_DEVICES": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(
        [sys.executable, ONLY_BASE, *command],
        cwd=ROOT,
        env=os.environ | hidden,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_gpu_tests_are_collected_and_skipped_with_base_packages() -> None:
    python, _, *rest = pytest_command(None, ["-p", "no:cacheprovider"])
    assert python == sys.executable
    ended = only_base(*rest)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    skipped = re.search(r"^(\d+) skipped", ended.stdout.splitlines()[-1])
    assert skipped and int(skipped[1]) > 50


def test_other_packages_cannot_be_imported_there(tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    code = (
        "from importlib.util import find_spec\n"
        "import numpy, pydicom\n"
        "def there(name):\n"
        "    try: return find_spec(name) is not None\n"
        "    except ModuleNotFoundError: return False\n"
        f"print(*[name for name in {OTHERS} if there(name)], 'no more')\n"
    )
    (tmp_path / "looks.py").write_text(code)
    ended = subprocess.run(
        [sys.executable, ONLY_BASE, "looks"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ended.stdout.split("\n")[0] == "no more", ended.stderr


def test_every_gpu_test_is_named() -> None:
    named = [ROOT / file for files in TESTS.values() for file in files]
    for file in (ROOT / "tests").rglob("test_*.py"):
        if re.search(r"mark\.gpu\b", file.read_text()):
            assert any(file == one or one in file.parents for one in named), (
                f"{file} is not in gpu_check.TESTS"
            )


@pytest.mark.parametrize("file", sum(TESTS.values(), ()))
def test_named_files_are_there(file: str) -> None:
    assert (ROOT / file).exists()
