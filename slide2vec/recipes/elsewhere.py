"""Names that other tools have for what is no preset here, and what there is instead.

Read in the sources of TRIDENT 0.3 (June 2026), lazyslide-models 0.1.0, AtlasPatch 1.1.0, raw2features 0.2.1,
STAMP 2.5.0, Mussel 1.5.0 and THUNDER 0.2.2. Names of theirs that mean a preset are the aliases of its recipe.
"""

from __future__ import annotations

import re

__all__ = ["named_elsewhere"]

#: Networks of timm with weights that are no pathology model's.
_TIMM = {
    "resnet18": "resnet18.tv_in1k",
    "resnet34": "resnet34.tv_in1k",
    "resnet50": "resnet50.tv_in1k",
    "resnet101": "resnet101.tv2_in1k",
    "resnet152": "resnet152.tv2_in1k",
    "convnext_tiny": "convnext_tiny.fb_in1k",
    "convnext_small": "convnext_small.fb_in1k",
    "convnext_base": "convnext_base.fb_in1k",
    "convnext_large": "convnext_large.fb_in1k",
    "vit_b_16": "vit_base_patch16_224.augreg_in1k",
    "vit_b_32": "vit_base_patch32_224.augreg_in1k",
    "vit_l_16": "vit_large_patch16_224.augreg_in21k_ft_in1k",
    "vit_l_32": "vit_large_patch32_384.orig_in21k_ft_in1k",
    "vit_h_14": "vit_huge_patch14_224.orig_in21k",
    "dinov2": "vit_large_patch14_dinov2.lvd142m",
    "dinov2_small": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_large": "vit_large_patch14_dinov2.lvd142m",
    "dinov2_giant": "vit_giant_patch14_dinov2.lvd142m",
    "dinov3_vits16": "vit_small_patch16_dinov3.lvd1689m",
    "dinov3_vits16_plus": "vit_small_plus_patch16_dinov3.lvd1689m",
    "dinov3_vitl16": "vit_large_patch16_dinov3.lvd1689m",
    "dinov3_vitl16_sat": "vit_large_patch16_dinov3.sat493m",
    "dinov3_vith16_plus": "vit_huge_plus_patch16_dinov3.lvd1689m",
    "dinov3_vit7b16": "vit_7b_patch16_dinov3.lvd1689m",
    "dinov3_vit7b16_sat": "vit_7b_patch16_dinov3.sat493m",
    "clip_rn50": "resnet50_clip.openai",
    "clip_rn101": "resnet101_clip.openai",
    "clip_rn50x4": "resnet50x4_clip.openai",
    "clip_rn50x16": "resnet50x16_clip.openai",
    "clip_rn50x64": "resnet50x64_clip.openai",
    "clip_vit_b_32": "vit_base_patch32_clip_224.openai",
    "clip_vit_b_16": "vit_base_patch16_clip_224.openai",
    "clip_vit_l_14": "vit_large_patch14_clip_224.openai",
    "clip_vit_l_14_336": "vit_large_patch14_clip_336.openai",
    "clipvitbasepatch32": "vit_base_patch32_clip_224.openai",
    "clipvitlargepatch14": "vit_large_patch14_clip_224.openai",
    "dinov2large": "vit_large_patch14_dinov2.lvd142m",
    "dinov3vits16pretrainlvd1689m": "vit_small_patch16_dinov3.lvd1689m",
    "dinov3vitl16pretrainlvd1689m": "vit_large_patch16_dinov3.lvd1689m",
    "vitbasepatch16224in21k": "vit_base_patch16_224.orig_in21k",
    "vitlargepatch16224in21k": "vit_large_patch16_224.orig_in21k",
}

#: Why each is none, and the nearest that is.
_INSTEAD = {
    "abmil": "it is a network to be trained; docs/examples/attention_mil.py trains one on features",
    "abmil_slide": "it is a network to be trained; docs/examples/attention_mil.py trains one on features",
    "clip": "Mussel's is preset quiltnet-b16-pmb, OpenAI's is timm:vit_base_patch32_clip_224.openai",
    "cobra": "it takes embeddings of several tile encoders; of slide encoders the nearest is titan",
    "cobra2": "it takes embeddings of several tile encoders; of slide encoders the nearest is titan",
    "conceptclip": "of encoders with texts the nearest is conch",
    "conch-madeleine": "it is CONCH as MADELEINE takes it: preset madeleine embeds the tiles, too",
    "dino-bloom": "it is for cells of blood; of networks of its kind the nearest is dinov2-vitb14",
    "eagle": "it takes embeddings of several tile encoders; of slide encoders the nearest is chief",
    "empty": "it embeds nothing; preset scattering needs no weights",
    "gemma4-26b": "it is a language model that sees; of encoders with texts the nearest is conch",
    "gemma4-e4b": "it is a language model that sees; of encoders with texts the nearest is conch",
    "googlepath": "it runs in TensorFlow; of ViT-S/16s of pathology the nearest is lunit-s16",
    "hipt": "its ViT-S/16 is one of 256 px; of pathology models of that size the nearest is lunit-s16",
    "kronos": "it is for multiplexed images, and slides are read in colour here",
    "lunit-dino-s8-moozy": "it is preset lunit, prepared as MOOZY takes it, which preset moozy-slide does",
    "medsiglip": "of encoders with texts the nearest is conch",
    "omiclip": "of encoders with texts the nearest is conch",
    "red-dino": "it is for cells of blood; of networks of its kind the nearest is dinov2-vitb14",
    "retccl": "of ResNet-50s of pathology the nearest is lunit-moco",
    "seal_conch": "it is CONCH with adapters of its own; without them it is preset conch",
    "seal_univ2": "it is UNI2-h with adapters of its own; without them it is preset uni2",
    "sp22m": "of ViT-S/16s of pathology the nearest is lunit-s16",
    "tangle": "of slide encoders the nearest is feather-uni, which takes the same tile encoder",
    "tcga": "its weights are not published; of slide encoders of conchv15 the nearest is titan",
    "threads": "its weights are not published; of slide encoders of conchv15 the nearest is titan",
    "ticon": "it makes tile embeddings of others anew with their neighbours; the nearest is h-optimus-1",
}
_POOLED = re.compile(r"(mean|max|meanmax)(?:-(.+))?")


def named_elsewhere(name: str) -> str | None:
    """What a name of another tool is, and what there is instead; None for one that is not known."""
    if name in _TIMM:
        return f"that is a network of timm, which works by its own name: timm:{_TIMM[name]}"
    if found := _POOLED.fullmatch(name):
        how, tiles = found.groups()
        fed = f"preset {f'timm:{_TIMM[tiles]}' if tiles in _TIMM else tiles}" if tiles else "a tile preset"
        ways = " and ".join(f'aggregator="{each}"' for each in ("mean", "max") if each in how)
        return f"that is plain pooling: embed tiles with {fed}, and take Model.aggregate_tiles(…, {ways})"
    if name in _INSTEAD:
        own = "of one of your own, a recipe file or register_encoder makes a preset (docs/extending.md)"
        return f"other tools have it, slide2vec has not: {_INSTEAD[name]}; {own}"
    return None
