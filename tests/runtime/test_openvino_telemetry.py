"""OpenVINO is loaded without its telemetry."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed"
)

CODE = """
import socket, sys
def refused(*arguments): raise AssertionError(f"asks for {arguments}")
socket.getaddrinfo = refused
from slide2vec.runtime.openvino_engine import capabilities
assert "FP32" in capabilities()
loaded = [name for name in sys.modules if name.startswith("openvino_telemetry.")]
assert not loaded, loaded
"""


def test_to_use_openvino_tells_nobody(tmp_path: Path) -> None:
    """Its package reports each import, but in CI, and keeps a number for this user in their home."""
    told = {"CI", "TF_BUILD", "JENKINS_URL"}
    environment = {key: value for key, value in os.environ.items() if key not in told}
    environment |= {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert not (tmp_path / "intel").exists()
