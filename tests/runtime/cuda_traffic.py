"""What an encoder would do on a GPU, on a machine without: its operations on fake CUDA tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.backends.cuda import SDPAParams
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import of_depth
from slide2vec.compile.export_module import torch_engine
from slide2vec.encoders import build_encoder
from slide2vec.recipes import load_recipe

GPU = torch.device("cuda", 0)
TILES = 64
ATTENTION = "scaled_dot_product_attention"
#: Matrix products: what is beside them is overhead.
PRODUCTS = {"linear", "conv2d", "mm", "addmm", "bmm", "matmul", ATTENTION}
#: The host waits for the device: such an encoder cannot be captured as a CUDA graph.
WAITS = {"item", "_local_scalar_dense", "nonzero", "is_nonzero"}


class Traffic(TorchDispatchMode):
    """Counts kernels, and the bytes that those beside products read and write; keeps what attention is given,
    and what would stop a capture."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.bytes = 0
        self.attention: list[SDPAParams] = []
        self.uncapturable: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == ATTENTION:
            return self._attend(*args, **kwargs)
        made = func(*args, **kwargs)
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        found = [each for each in tree_leaves(made) if isinstance(each, Tensor)]
        if name in WAITS or {each.device.type for each in (*given, *found)} > {"cuda"}:
            self.uncapturable.append(name)
        if name.startswith("empty") or (_is_view(given, found) and not name.endswith("_")):
            return made
        self.kernels[name] += 1
        if name not in PRODUCTS:
            self.bytes += sum(each.numel() * each.element_size() for each in (*given, *found))
        return made

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0
    ) -> Tensor:
        """What the flash kernel gives, whose result has its heads in another order in memory."""
        self.attention.append(SDPAParams(query, key, value, attn_mask, dropout_p, False, False))
        self.kernels[ATTENTION] += 1
        attended: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
        return attended


def _is_view(given: list[Tensor], found: list[Tensor]) -> bool:
    memory = {each.untyped_storage()._cdata for each in given}
    return all(each.untyped_storage()._cdata in memory for each in found)


def _moved(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with memory of a device; `to` cannot move what has none."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                fake = torch.empty_like(parameter, device=device)
                part._parameters[name] = nn.Parameter(fake, requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty_like(buffer, device=device)
    return module


@contextmanager
def _fake_gpu() -> Iterator[None]:
    """A GPU that computes in bf16, and whose memory nobody has."""
    with (
        patch.multiple(torch.cuda, is_bf16_supported=lambda *_: True, get_device_properties=lambda *_: None),
        patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        patch("slide2vec.runtime.torch_engine.CudaGraphs"),
        patch.object(nn.Module, "to", _moved),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


def traffic_of(preset: str, depth: int = 0, precision: str = "bf16") -> Traffic:
    """What a preset's encoder does in PyTorch's engine with a batch of `TILES`.

    Args:
        depth: blocks; 0 = all.
    """
    recipe = of_depth(load_recipe(preset), depth)
    variant = recipe.variants[recipe.default_variant]
    with torch.device("meta"):
        encoder = build_encoder(recipe, variant, "random")
    traffic, side = Traffic(), recipe.transform.crop
    with _fake_gpu():
        engine = torch_engine(encoder, recipe, precision, GPU, feature_dim=variant.dim)
        pixels = torch.empty(TILES, 3, side, side, device=GPU)
        with torch.inference_mode(), traffic:
            features = engine._encode(pixels)
    assert features.shape == (TILES, variant.dim) and features.dtype == torch.float32
    return traffic
