"""Tests that need an NVIDIA GPU: skipped, visibly, without one. `make gpu-check` runs them.

SLIDE2VEC_GPU_TEST_DEVICE=cpu runs those that do not need CUDA itself on the CPU, to try the tests.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from slide2vec.synthetic import write_synthetic_slide

DEVICE = os.environ.get("SLIDE2VEC_GPU_TEST_DEVICE", "cuda")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    return torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)


@pytest.fixture(scope="session")
def cuda(device: torch.device) -> torch.device:
    """The GPU, for tests of CUDA itself."""
    if device.type != "cuda":
        pytest.skip("needs CUDA")
    return device


@pytest.fixture(scope="session")
def slide(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated JPEG pyramid, 0.25 µm/px; drawn only where there is a device for it."""
    return write_synthetic_slide(tmp_path_factory.mktemp("slides") / "slide.svs", size_px=6144, seed=3)
