"""Kernels and bytes of every tile encoder in PyTorch's engine on a GPU, against a budget; which attention
kernel would run; and whether all can be captured as a CUDA graph. On fake CUDA tensors: nothing is computed.

The budget is of whole encoders: that of one block, times the blocks, and what is around them.
`python tests/runtime/test_cuda_traffic.py` writes it anew.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_traffic import TILES, Traffic, traffic_of
from shallow import each
from torch.backends.cuda import can_use_flash_attention

from slide2vec.recipes import list_models, load_recipe

BUDGET = Path(__file__).with_name("cuda_traffic.json")
#: Of kernels and bytes that come with another version of timm or PyTorch.
MORE = 1.03
#: The kernel's largest (sdp_utils.cpp).
MOST_HEAD_DIM = 256

PRESETS = [name for name in list_models("tile") if load_recipe(name).compile]
#: Swin's attention, in windows, has biases, which the flash kernel does not take.
VITS = [name for name in PRESETS if name != "scattering" and load_recipe(name).encoder.prefix_tokens]


@cache
def traffic(preset: str, depth: int) -> Traffic:
    return traffic_of(preset, depth)


def whole(preset: str, depth: int) -> tuple[int, float]:
    """Kernels, and MB a tile beside products, of an encoder with so many blocks; 0 = it has none."""
    if not depth:
        only = traffic(preset, 0)
        return only.kernels.total(), only.bytes / TILES / 1e6
    one, two = traffic(preset, 1), traffic(preset, 2)
    kernels = one.kernels.total() + (depth - 1) * (two.kernels.total() - one.kernels.total())
    return kernels, (one.bytes + (depth - 1) * (two.bytes - one.bytes)) / TILES / 1e6


def budget() -> dict[str, dict[str, Any]]:
    return dict(json.loads(BUDGET.read_text()))


def test_every_preset_has_a_budget() -> None:
    assert sorted(budget()) == sorted(PRESETS)


@pytest.mark.parametrize("preset", each(PRESETS))
def test_kernels_and_bytes(preset: str) -> None:
    allowed = budget()[preset]
    kernels, megabytes = whole(preset, allowed["blocks"])
    assert kernels <= MORE * allowed["kernels"]
    assert megabytes <= MORE * allowed["mb_per_tile"]


@pytest.mark.parametrize("preset", each(PRESETS))
def test_the_host_never_waits(preset: str) -> None:
    """Which CUDA refuses while a graph is captured, as it does copies from pageable memory."""
    assert traffic(preset, 0 if preset == "scattering" else 1).uncapturable == []


@pytest.mark.parametrize("preset", each(VITS))
def test_attention_is_for_the_flash_kernel(preset: str, capfd: pytest.CaptureFixture[str]) -> None:
    """PyTorch's own choice refuses it for want of a GPU only; of several reasons it says the first."""
    calls = traffic(preset, 1).attention
    assert calls
    for call in calls:
        for given in (call.query, call.key, call.value):
            assert given.dtype == torch.bfloat16 and given.stride(-1) == 1
            assert given.shape[-1] <= MOST_HEAD_DIM
        assert not can_use_flash_attention(call, debug=True)
        reasons = [line for line in capfd.readouterr().err.splitlines() if "Warning" in line]
        assert all("requires a CUDA device" in reason for reason in reasons), reasons


@pytest.mark.slow
def test_blocks_are_alike() -> None:
    """What the budgets of whole encoders rest on."""
    found = traffic("prost40m", 0)
    assert whole("prost40m", budget()["prost40m"]["blocks"]) == (
        found.kernels.total(),
        pytest.approx(found.bytes / TILES / 1e6),
    )


def _blocks(preset: str) -> int:
    """From what timm, or the recipe, makes."""
    return 0 if preset not in VITS else len(traffic(preset, 0).attention) - _poolings(preset)


def _poolings(preset: str) -> int:
    """Attention that is no block's."""
    return 2 * len(traffic(preset, 1).attention) - len(traffic(preset, 2).attention)


def main() -> None:
    rows = {}
    for preset in PRESETS:
        blocks = _blocks(preset)
        kernels, megabytes = whole(preset, blocks)
        rows[preset] = {"blocks": blocks, "kernels": kernels, "mb_per_tile": round(megabytes, 1)}
    BUDGET.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
