"""Compare our encoders with the original ones: python tools/check_presets.py [PRESET ...]

For maintainers, where the Hugging Face hub can be reached and access to gated weights was granted. Every
preset is loaded by us and as its authors load it (timm from the hub, transformers, or MOOZY's package), and
both see the same: tiles of random pixels and painted tissue, a slide of random tile embeddings, a patient of
random slide embeddings. Downloads every preset's weights; one is in memory at a time.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import timm
import torch
from torch import Tensor, nn

from slide2vec.cli.console import stdout, table
from slide2vec.encoders import build_encoder
from slide2vec.encoders.slide import SlideFeatures, TileBag, build_patient_encoder, build_slide_encoder
from slide2vec.encoders.timm import LAYERS
from slide2vec.encoders.weights import find_weights
from slide2vec.errors import ConfigError, ExtraMissingError, PresetError, WeightsError
from slide2vec.prepare.torch_preparer import TorchPreparer
from slide2vec.recipes import Recipe, Variant, list_models, load_recipe
from slide2vec.synthetic import write_synthetic_slide

#: Largest relative difference between two ways of computing the same features in fp32.
SAME = 1e-4


@dataclass(frozen=True)
class Row:
    """What became of one preset."""

    preset: str
    status: str
    difference: float | None = None
    cosine: float | None = None
    note: str = ""


def main(arguments: list[str] | None = None) -> int:
    """Check the presets and print a table; 1 if any differs from its original, or cannot be loaded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("presets", nargs="*", help="all presets with weights, by default")
    parser.add_argument("--tiles", type=int, default=4, help="of each kind (4)")
    parser.add_argument("--trust-remote-code", action="store_true", help="let repositories run their code")
    chosen = parser.parse_args(arguments)
    recipes = [load_recipe(name) for name in chosen.presets or list_models()]
    tiles = torch.cat([random_tiles(chosen.tiles), tissue_tiles(chosen.tiles)])
    rows = []
    for recipe in recipes:
        if recipe.weights is not None:
            rows.append(check(recipe, tiles, chosen.trust_remote_code))
            print(f"{recipe.name}: {rows[-1].status}", flush=True)
    print()
    stdout().print(table(("preset", "status", "max difference", "cosine", "note"), map(_cells, rows)))
    return 1 if any(row.status in ("DIFFERS", "DOES NOT LOAD") for row in rows) else 0


def random_tiles(count: int) -> Tensor:
    """(N, 512, 512, 3) uint8 noise."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 512, 512, 3), dtype=torch.uint8, generator=generator)


def tissue_tiles(count: int) -> Tensor:
    """(N, 512, 512, 3) uint8 around the middle of a painted slide."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_synthetic_slide(Path(folder) / "slide.svs", size_px=4096, seed=1)
        with openslide.OpenSlide(path) as slide:
            places = [(1024 + 512 * (i % 4), 1024 + 512 * (i // 4 % 4)) for i in range(count)]
            pictures = [slide.read_region(place, 0, (512, 512)).convert("RGB") for place in places]
    pixels = [torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8) for picture in pictures]
    return torch.stack(pixels).reshape(count, 512, 512, 3)


def check(recipe: Recipe, tiles: Tensor, trusted: bool) -> Row:
    """Load a preset in both ways and compare its default output."""
    name, variant = recipe.variant(None)
    try:
        ours = load_ours(recipe, variant, trusted)
    except (PresetError, ExtraMissingError, ConfigError) as error:
        return Row(recipe.name, "not run", note=_line(error))
    except WeightsError as error:
        fetching = ("https://huggingface.co", "not on the Hugging Face hub")  # errors of loading name a file
        if any(words in str(error) for words in fetching):
            return Row(recipe.name, "no access", note=_line(error.__cause__ or error))
        return Row(recipe.name, "DOES NOT LOAD", note=_line(error))
    given = inputs(recipe, tiles)
    found = _features(ours, given)
    if found.shape[1] != variant.dim:
        return Row(recipe.name, "DIFFERS", note=f"{name} has {found.shape[1]} dimensions, not {variant.dim}")
    del ours
    try:
        original = load_original(recipe, variant, trusted)
    except Exception as error:  # of other people's loaders, which raise anything
        return Row(recipe.name, "loads", note=f"the original does not: {_line(error)}")
    if original is None:
        return Row(recipe.name, "loads", note="its original is no model of timm or transformers")
    return compared(recipe.name, found, _features(original, given))


def load_ours(recipe: Recipe, variant: Variant, trusted: bool) -> nn.Module:
    if recipe.level == "patient":
        return build_patient_encoder(recipe, variant)
    build = build_encoder if recipe.level == "tile" else build_slide_encoder
    return build(recipe, variant, trust_remote_code=trusted)


def inputs(recipe: Recipe, tiles: Tensor) -> list[Any]:
    """What the preset is run on, one by one: prepared tiles, a slide's tiles, a patient's slides."""
    if recipe.level == "tile":
        pixels = TorchPreparer(recipe.transform, torch.device("cpu")).prepare(tiles)
        return [tile[None] for tile in pixels]
    kwargs, generator = recipe.encoder.kwargs, torch.Generator().manual_seed(0)
    if recipe.level == "patient":
        return [torch.randn(3, kwargs["d_model"], generator=generator)]
    places = torch.randperm(400, generator=generator)[:150].sort().values
    features = torch.randn(150, kwargs.get("in_dim") or kwargs["feat_dim"], generator=generator)
    return [TileBag(features, torch.stack([places // 20, places % 20], dim=1) * 512, 512)]


def compared(preset: str, found: Tensor, expected: Tensor) -> Row:
    """Features (N, D) of ours and of the original."""
    if found.shape != expected.shape:
        return Row(preset, "DIFFERS", note=f"{tuple(found.shape)} and {tuple(expected.shape)}")
    difference = float((found - expected).abs().max())
    cosine = float(nn.functional.cosine_similarity(found, expected).min())
    same = difference <= SAME * float(expected.abs().max())
    return Row(preset, "same" if same else "DIFFERS", difference, cosine)


def load_original(recipe: Recipe, variant: Variant, trusted: bool) -> Callable[[Any], Tensor] | None:
    """Features (N, D) of what `inputs` gives, with the loader of the model's authors; None where it is
    another package's, or ours runs it already."""
    source = recipe.weights
    assert source is not None
    if recipe.encoder.family in ("titan", "prism"):
        return _slides_of_transformers(recipe, trusted)
    if recipe.encoder.family in ("moozy_slide", "moozy_case"):
        return _of_moozy(recipe)
    if recipe.encoder.family != "timm":
        return None
    if source.convert.startswith("transformers_"):
        return _of_transformers(recipe, variant, trusted)
    if source.convert:  # the authors' own class, of no library
        return None
    kwargs = {key: LAYERS.get(str(value), value) for key, value in recipe.encoder.kwargs.items()}
    hub = f"hf-hub:{source.repo}@{source.revision}"
    model = timm.create_model(hub, pretrained=True, **kwargs).eval()
    if variant.pool == "none":
        return model
    return lambda pixels: _pooled(model.forward_features(pixels), variant, model.num_prefix_tokens)


def _of_transformers(recipe: Recipe, variant: Variant, trusted: bool) -> Callable[[Tensor], Tensor]:
    from transformers import AutoModel

    source = recipe.weights
    assert source is not None
    model = AutoModel.from_pretrained(source.repo, revision=source.revision, trust_remote_code=trusted).eval()
    prefix = recipe.encoder.prefix_tokens
    return lambda pixels: _pooled(model(pixel_values=pixels).last_hidden_state, variant, prefix)


def _slides_of_transformers(recipe: Recipe, trusted: bool) -> Callable[[TileBag], Tensor]:
    from transformers import AutoModel

    source = recipe.weights
    assert source is not None
    model = AutoModel.from_pretrained(source.repo, revision=source.revision, trust_remote_code=trusted).eval()
    if recipe.encoder.family == "prism":
        return lambda bag: model.slide_representations(bag.features[None])["image_embedding"]
    return lambda bag: model.encode_slide_from_patch_features(
        bag.features[None], bag.coords[None], np.int64(bag.tile_size_lv0)
    )


def _of_moozy(recipe: Recipe) -> Callable[[Any], Tensor]:
    """pip install --no-deps moozy"""
    from moozy.models.case_transformer import CaseAggregator
    from moozy.models.serialization import build_slide_encoder_from_payload

    payload = torch.load(find_weights(recipe, None), map_location="cpu", weights_only=True)
    if recipe.level == "patient":
        case = CaseAggregator(**payload["case_transformer_config"]).eval()
        case.load_state_dict(payload["case_transformer"])
        return lambda slides: case(slides)[None]
    config = payload.get("slide_encoder_config") or payload["meta"]
    encoder = build_slide_encoder_from_payload(payload["teacher_slide_encoder"], config).eval()
    return lambda bag: encoder(
        bag.features[None, None],
        coords_xy=bag.coords[None, None].float(),
        patch_sizes=torch.tensor([float(bag.tile_size_lv0)]),
    )[0]


def _pooled(tokens: Tensor, variant: Variant, prefix: int) -> Tensor:
    parts = {
        "cls": lambda: tokens[:, 0],
        "token_mean": lambda: tokens.mean(1),
        "patch_mean": lambda: tokens[:, prefix:].mean(1),
        "cls_patch_mean": lambda: torch.cat([tokens[:, 0], tokens[:, prefix:].mean(1)], dim=1),
    }
    features = parts[variant.pool]()
    return nn.functional.normalize(features, dim=1) if variant.normalise else features


def _features(model: Callable[[Any], Any], given: list[Any]) -> Tensor:
    """(N, D), one input at a time: a giant model then needs little more than its weights."""
    with torch.inference_mode():
        found = [model(each) for each in given]
    found = [each.embedding if isinstance(each, SlideFeatures) else each for each in found]
    return torch.cat([each.reshape(-1, each.shape[-1]) for each in found])


def _cells(row: Row) -> Iterator[str]:
    yield row.preset
    yield row.status
    yield "" if row.difference is None else f"{row.difference:.1e}"
    yield "" if row.cosine is None else f"{row.cosine:.6f}"
    yield row.note


def _line(error: BaseException) -> str:
    text = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"


if __name__ == "__main__":
    raise SystemExit(main())
