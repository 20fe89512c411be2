"""An encoder as an engine holds it: pixels in, features out, normalisation and number types inside."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slide2vec.encoders.input_size import positions_for
from slide2vec.recipes import EnginePolicy, Recipe, Transform
from slide2vec.runtime.base import Layout
from slide2vec.runtime.torch_engine import DTYPES, TorchEngine

__all__ = ["GRAPH", "ExportedEncoder", "at_one_size", "torch_engine", "typed_copy"]

#: Counted up when the same encoder is exported as another graph: engines of the old graph are built anew.
#: 2: bytes are cast before they are moved, position embeddings are constants, shape arithmetic is folded.
GRAPH = 2

NORMS: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.RMSNorm)


class ExportedEncoder(nn.Module):
    """What is exported and compiled.

    `forward` takes pixels of `layout`, (B, 3, H, W) float32 or (B, H, W, 3) uint8, and returns features
    (B, D) float32. Strongly typed runtimes compute in the types of the graph, so the precision is
    decided here: parameters of the half precisions are converted once, but for the layers that the recipe
    keeps in fp32 (`engine.islands`).

    Args:
        encoder: in fp32; it is not changed.
        transform: whose mean and std are applied to uint8 pixels.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, encoder: nn.Module, transform: Transform, layout: Layout, precision: str, policy: EnginePolicy
    ) -> None:
        super().__init__()
        dtype, fp32_layers = DTYPES[precision], policy.islands
        encoder = _of_one_size(encoder, transform.crop)
        self.layout = layout
        self.encoder = encoder if precision == "fp32" else typed_copy(encoder, dtype, fp32_layers)
        self.upcasts = "attention" in fp32_layers and precision != "fp32"
        self.input_dtype = torch.float32 if "patch_embed" in fp32_layers else dtype
        mean, std = torch.tensor(transform.mean), torch.tensor(transform.std)
        self.register_buffer("scale", (1 / (255 * std))[:, None, None])
        self.register_buffer("shift", (-mean / std)[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) float32 or (B, H, W, 3) uint8 -> (B, D) float32."""
        if self.layout == "uint8_nhwc":
            pixels = torch.addcmul(self.shift, pixels.float().permute(0, 3, 1, 2), self.scale)
        pixels = pixels.to(self.input_dtype)
        if not self.upcasts:
            return cast("Tensor", self.encoder(pixels).float())
        with _UpcastAttention():
            return cast("Tensor", self.encoder(pixels).float())


def _of_one_size(encoder: nn.Module, size_px: int) -> nn.Module:
    """The encoder with position embeddings for one input size; it shares all other parameters.

    timm resamples them at every batch where a model takes images of any size, and leaves that in an exported
    graph: a compiler would compute a constant over and over, or refuse it (TensorRT knows no antialiasing).
    """
    made: nn.Module = copy.deepcopy(encoder, {id(tensor): tensor for tensor in _tensors(encoder)})
    for module in made.modules():
        set_input_size: Any = getattr(module, "set_input_size", None)
        if getattr(module, "dynamic_img_size", False) and set_input_size is not None:
            patches: Any = module.patch_embed
            height, width = patches.patch_size
            table = positions_for(module, (size_px // height, size_px // width))
            set_input_size(img_size=size_px)
            if getattr(module, "rope", None) is not None:
                _keep_angles(module)
            if table is not None:  # resampled otherwise than by timm
                module.pos_embed = nn.Parameter(table.detach(), requires_grad=False)
    return made


def _keep_angles(vit: Any) -> None:
    """Have a transformer of timm with rotary positions keep their angles, which it computes on the host at
    every batch where it takes images of any size."""
    rope, grid = vit.rope, vit.patch_embed.grid_size
    angles = rope.get_embed(shape=grid)
    if getattr(rope, "pos_embed_cached", angles) is None:  # no buffer yet
        del rope.pos_embed_cached
    rope.register_buffer("pos_embed_cached", angles, persistent=False)
    rope.feat_shape = grid
    vit.dynamic_img_size, vit.patch_embed.flatten = False, True


def torch_engine(
    encoder: nn.Module,
    recipe: Recipe,
    precision: str,
    device: torch.device,
    *,
    feature_dim: int,
    compiled: bool = False,
    cuda_graphs: bool = True,
) -> TorchEngine:
    """The encoder in PyTorch. Below fp32 on CUDA its parameters are converted once, as they are for export;
    elsewhere, and where an encoder cannot be exported or no recipe file describes it, every product converts
    them (autocast).

    Args:
        encoder: in fp32; on CUDA it is left as it is, else it is moved to the device.
        compiled: by `torch.compile`.
        cuda_graphs: as of TorchEngine.
    """
    made, typed = encoder, _is_typed(recipe, precision, device)
    if typed:
        policy = recipe.engine.model_copy(update={"islands": _computed_in_fp32(recipe.engine.islands)})
        made = ExportedEncoder(encoder, recipe.transform, "float32_nchw", precision, policy)
    return TorchEngine(
        made,
        feature_dim=feature_dim,
        precision=precision,
        device=device,
        compiled=compiled,
        typed=typed,
        cuda_graphs=cuda_graphs,
    )


def _is_typed(recipe: Recipe, precision: str, device: torch.device) -> bool:
    """Whether an encoder runs in PyTorch with converted parameters. A CPU keeps autocast: its features are
    those of earlier runs, to the bit, and conversion is a small part of its time."""
    brought = recipe.generic or recipe.encoder.family in ("registered", "module")
    return device.type == "cuda" and precision != "fp32" and recipe.compile and not brought


def _computed_in_fp32(islands: Sequence[str]) -> tuple[str, ...]:
    """The islands that PyTorch needs. Its kernels of norms compute in fp32 whatever goes in and comes out, so
    that casts around them would only move memory: twice as much in all, for virchow2."""
    return tuple(name for name in islands if name != "norm")


@contextmanager
def at_one_size() -> Iterator[None]:
    """Have timm leave out resampling that changes nothing, in what is exported in the block.

    It keeps it on purpose, for graphs that take images of any size (`timm.layers.pos_embed`).
    """
    pos_embed: Any = import_module("timm.layers.pos_embed")
    if not hasattr(pos_embed, "is_exporting"):  # before timm 1.0.20
        yield
        return
    original = pos_embed.is_exporting
    pos_embed.is_exporting = lambda: False
    try:
        yield
    finally:
        pos_embed.is_exporting = original


def typed_copy(encoder: nn.Module, dtype: torch.dtype, fp32_layers: Sequence[str]) -> nn.Module:
    """A copy whose floating-point parameters and buffers have `dtype`, but for the layers that stay in
    fp32."""
    kept = [module for _, module in _fp32_layers(encoder, fp32_layers)]
    spared = {id(tensor) for module in kept for tensor in _tensors(module)}
    memo: dict[int, Any] = {}
    for tensor in _tensors(encoder):
        if tensor.is_floating_point() and id(tensor) not in spared:
            memo[id(tensor)] = _as(tensor, dtype)
        elif not isinstance(tensor, nn.Parameter):  # fake tensors cannot be copied by `deepcopy`
            memo[id(tensor)] = tensor.clone()
    made = copy.deepcopy(encoder, memo)  # takes converted tensors from `memo`: never two copies in fp32
    for _, module in _fp32_layers(made, fp32_layers):
        module.register_forward_pre_hook(_to_float, with_kwargs=True)
        module.register_forward_hook(_to(dtype))
    return made


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    converted = tensor.detach().to(dtype)
    return nn.Parameter(converted, requires_grad=False) if isinstance(tensor, nn.Parameter) else converted


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _fp32_layers(encoder: nn.Module, fp32_layers: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Modules that stay in fp32, by name; those inside of one of them stay so with it."""
    kept: tuple[str, ...] = ()
    for name, module in encoder.named_modules():
        is_norm = "norm" in fp32_layers and isinstance(module, NORMS)
        is_patches = "patch_embed" in fp32_layers and _is_patch_embed(name, module)
        if (is_norm or is_patches) and not name.startswith(kept):
            kept += (f"{name}.",)
            yield name, module


def _is_patch_embed(name: str, module: nn.Module) -> bool:
    """The module of that name; where it only holds others, the projection in it."""
    if isinstance(module, nn.ModuleDict):
        return False
    own, parent = name.split(".")[-1], name.split(".")[-2:-1]
    return own == "patch_embed" or (own == "proj" and parent == ["patch_embed"])


def _to_float(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return tuple(_floated(value) for value in args), {key: _floated(v) for key, v in kwargs.items()}


def _floated(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _to(dtype: torch.dtype) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return output.to(dtype)

    return hook


class _UpcastAttention(TorchFunctionMode):
    """Attention products in fp32, back to the type of the queries."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        dtype = args[0].dtype
        return func(*map(_floated, args), **{k: _floated(v) for k, v in kwargs.items()}).to(dtype)
