"""Every preset, layout and precision through NVIDIA's own compiler (`benchmarks.engine_matrix`)."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from rtx_compiler import WHY_NOT

from benchmarks.engine_matrix import COMPILABLE, PRECISIONS, row
from slide2vec.runtime.base import Layout

pytestmark = [pytest.mark.slow, pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")]


@pytest.mark.parametrize("layout", get_args(Layout))
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", COMPILABLE)
def test_a_preset_is_built(name: str, precision: str, layout: Layout, tmp_path: Path) -> None:
    found = row(name, precision, layout, "sm89", tmp_path)
    if (name, precision) == ("scattering", "fp8"):
        assert "no matrix product" in found["refused"]  # convolutions only
    else:
        assert "refused" not in found and found["plan_mb"] > 0.1
