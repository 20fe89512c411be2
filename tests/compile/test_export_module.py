"""Types inside an exported encoder: islands in fp32, the rest converted, the encoder itself untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compile_helpers import smooth_pixels
from torch import nn
from torch.overrides import TorchFunctionMode

from slide2vec.compile.export_module import ExportedEncoder, typed_copy
from slide2vec.compile.parity import for_layout
from slide2vec.recipes import EnginePolicy, Recipe

#: Same operations in another order.
EXACT = 1e-5
#: bf16 has 8 bits of mantissa; two blocks.
HALF_COSINE = 0.999


def mean_std(recipe: Recipe) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return recipe.transform.mean, recipe.transform.std


def test_normalisation_inside_is_that_of_the_transform(recipe: Recipe, encoder: nn.Module) -> None:
    pixels = smooth_pixels(3)
    policy = EnginePolicy()
    with torch.inference_mode():
        expected = encoder(for_layout(pixels, mean_std(recipe), "float32_nchw"))
        inside = ExportedEncoder(encoder, recipe.transform, "uint8_nhwc", "fp32", policy)(pixels)
        outside = ExportedEncoder(encoder, recipe.transform, "float32_nchw", "fp32", policy)(
            for_layout(pixels, mean_std(recipe), "float32_nchw")
        )
    torch.testing.assert_close(inside, expected, atol=EXACT, rtol=0)
    torch.testing.assert_close(outside, expected, atol=0, rtol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "islands", [(), ("norm",), ("norm", "patch_embed"), ("norm", "patch_embed", "attention")]
)
def test_half_precision_is_close(
    recipe: Recipe, encoder: nn.Module, precision: str, islands: tuple[str, ...]
) -> None:
    pixels = smooth_pixels(4)
    policy = EnginePolicy(islands=islands)  # type: ignore[arg-type]
    exact = ExportedEncoder(encoder, recipe.transform, "uint8_nhwc", "fp32", policy).eval()
    half = ExportedEncoder(encoder, recipe.transform, "uint8_nhwc", precision, policy).eval()
    with torch.inference_mode():
        expected, found = exact(pixels), half(pixels)
    assert found.dtype == torch.float32
    assert nn.functional.cosine_similarity(found, expected).min() > HALF_COSINE
    assert not torch.equal(found, expected)


def test_types_are_where_the_policy_says(recipe: Recipe, encoder: nn.Module) -> None:
    made = typed_copy(encoder, torch.float16, ("norm", "patch_embed"))
    types = {name: parameter.dtype for name, parameter in made.named_parameters()}
    for name, dtype in types.items():
        island = ".norm" in name or "patch_embed" in name
        assert dtype == (torch.float32 if island else torch.float16), name
    assert any(dtype == torch.float32 for dtype in types.values())
    assert all(parameter.dtype == torch.float32 for parameter in encoder.parameters())
    assert not any(module._forward_hooks for module in encoder.modules())


def test_islands_share_nothing_with_the_encoder(recipe: Recipe, encoder: nn.Module) -> None:
    made = typed_copy(encoder, torch.bfloat16, ("norm",))
    own = {parameter.data_ptr() for parameter in encoder.parameters()}
    assert not own & {parameter.data_ptr() for parameter in made.parameters()}


class Watch(TorchFunctionMode):
    """Records the types that attention products are computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            self.types.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("islands", "computed_in"), [(("norm",), torch.bfloat16), (("norm", "attention"), torch.float32)]
)
def test_attention_island_computes_products_in_fp32(
    recipe: Recipe, encoder: nn.Module, islands: tuple[str, ...], computed_in: torch.dtype
) -> None:
    policy = EnginePolicy(islands=islands)  # type: ignore[arg-type]
    made = ExportedEncoder(encoder, recipe.transform, "uint8_nhwc", "bf16", policy).eval()
    with torch.inference_mode(), Watch() as watch:
        made(smooth_pixels(1))
    assert watch.types == {computed_in}
