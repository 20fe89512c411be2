"""Attention maps against slide2vec 7.1.4's own, both with one saved state_dict, fp32 on the CPU.

    PEER/bin/python benchmarks/attention_parity.py write FOLDER   (an environment that has slide2vec 7.1.4)
    python -m benchmarks.attention_parity compare FOLDER

The encoders have the published width and two blocks; weights are random, and large: attention is uneven. The
first command imports nothing of ours, the second nothing of the peer's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

#: Two blocks, the last first, as 7.1.4 is asked for them.
BLOCKS = (-1, 0)
SIDE = 224
#: Of the largest absolute value.
CLOSE = 1e-5


def write(folder: Path) -> None:
    """With 7.1.4: weights, pixels and maps of each encoder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, encoder in peers().items():
        pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            maps = [
                encoder.encode_tiles_attention(pixels, blocks=BLOCKS, include_registers=registers)
                for registers in (False, True)
            ]
        torch.save(encoder._model.state_dict(), folder / f"{name}.weights.pt")
        torch.save({"pixels": pixels, "maps": maps}, folder / f"{name}.maps.pt")


def peers() -> dict[str, Any]:
    """Encoders of 7.1.4 by preset; the states of their models have the published keys."""
    import timm
    from slide2vec.encoders.base import TimmTileEncoder
    from slide2vec.encoders.models import hibou, midnight, phikon
    from transformers import (
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        ViTConfig,
        ViTModel,
    )

    gated = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU}
    large = {"num_hidden_layers": 2, "image_size": SIDE, "hidden_size": 768, "num_attention_heads": 12}
    models = {
        "uni": timm.create_model("vit_large_patch16_224", depth=2, init_values=1e-5, num_classes=0),
        "uni2": timm.create_model(
            "vit_giant_patch14_224",
            **{"depth": 2, "num_heads": 24, "init_values": 1e-5, "embed_dim": 1536, "mlp_ratio": 5.33334},
            **{"num_classes": 0, "no_embed_class": True, "reg_tokens": 8, **gated},
        ),
        "virchow2": timm.create_model(
            "vit_huge_patch14_224",
            **{"depth": 2, "init_values": 1e-5, "num_classes": 0, "mlp_ratio": 5.3375, "reg_tokens": 4},
            **{"global_pool": "", **gated},
        ),
        "phikon": ViTModel(ViTConfig(**large), add_pooling_layer=False),
        "midnight": Dinov2Model(
            Dinov2Config(
                **{**large, "hidden_size": 1536, "num_attention_heads": 24, "patch_size": 14},
                use_swiglu_ffn=True,
            )
        ),
        "hibou-b": Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(**large, patch_size=14, num_register_tokens=4, use_swiglu_ffn=True)
        ),
    }
    kinds = {"phikon": phikon.Phikon, "midnight": midnight.Midnight, "hibou-b": hibou.HibouB}
    made = {}
    for name, model in models.items():
        made[name] = _encoder(kinds.get(name, TimmTileEncoder), model)
        made[name]._interpolate_pos_encoding = False
    return made


def _encoder(kind: Any, model: Any) -> Any:
    """An encoder of 7.1.4 around a model that is here, where its own constructor would download one."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.uniform_(-0.1, 0.1, generator=generator)
    encoder = kind.__new__(kind)
    encoder._model, encoder._device = model.eval(), torch.device("cpu")
    return encoder


def compare(folder: Path) -> int:
    """With ours: the largest difference over the largest value of each encoder. How many are not close."""
    from slide2vec.encoders import build_encoder
    from slide2vec.encoders.attention import encode_tiles_attention
    from slide2vec.recipes import load_recipe

    far = 0
    print("| preset | maps (blocks -1 and 0): class token; with registers | difference / largest value |")
    print("|---|---|---|")
    for path in sorted(folder.glob("*.maps.pt")):
        name = path.name.removesuffix(".maps.pt")
        recipe = load_recipe(name)
        kwargs = {**recipe.encoder.kwargs, "depth": 2, "img_size": SIDE}
        recipe = recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"kwargs": kwargs})})
        encoder = build_encoder(recipe, recipe.variant(None)[1], folder / f"{name}.weights.pt")
        saved = torch.load(path, weights_only=True)
        differences, shapes = [], []
        for registers, theirs in zip((False, True), saved["maps"], strict=True):
            with torch.inference_mode():
                ours = encode_tiles_attention(
                    encoder, saved["pixels"], blocks=BLOCKS, include_registers=registers
                )
            assert ours.shape == theirs.shape, (name, ours.shape, theirs.shape)
            differences.append(float((ours - theirs).abs().max() / theirs.abs().max()))
            shapes.append(str(tuple(theirs.shape)))
        far += max(differences) > CLOSE
        print(f"| {name} | {'; '.join(shapes)} | {max(differences):.1e} |")
    return far


if __name__ == "__main__":
    command, where = sys.argv[1], Path(sys.argv[2])
    sys.exit(write(where) if command == "write" else compare(where))
