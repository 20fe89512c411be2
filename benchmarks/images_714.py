"""Ready images and dense features: our files against those of slide2vec 7.1.4, both with one file of weights.

    python -m benchmarks.images_714 --peer-python /path/to/bin/python --slide CMU-1-Small-Region.svs

Networks have two blocks and random weights; both read with OpenSlide, in fp32 on the CPU. A table of the
largest difference, relative to the largest absolute value, and of keys of sidecars that differ, besides those
that name paths, versions and identities.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from slide2vec import DenseImageOptions, DenseOptions, ExecutionOptions, ImageSpec, Model, SlideRegions
from slide2vec.encoders import build_encoder
from slide2vec.errors import Slide2VecError
from slide2vec.recipes import Recipe, load_recipe

TOOL = Path(__file__).parents[1] / "tools/slide2vec_images.py"
DEPTH = 2
#: Keys of sidecars that may differ.
OTHER = {"compatibility", "image_path"}
TIMM = (
    *("dinov2-vitb14", "gigapath", "gpfm", "h-optimus-0", "h-optimus-1", "h0-mini", "lunit", "mstar"),
    *("prost40m", "uni", "uni2", "virchow", "virchow2", "conch", "conchv15", "dinov3-vitb16", "mettle"),
)
#: Interpolation of 7.1.4 for ready images where ours, the one of the model's card, is another.
OTHER_IMAGES = {"mstar": "bicubic"}
#: Of transformers: class, configuration, its arguments.
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "phikon": (
        "ViTModel",
        "ViTConfig",
        {  # the epsilon of the hub's configuration; transformers' own default is 1e-12
            **{"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
            "layer_norm_eps": 1e-6,
        },
    ),
    "phikonv2": (
        *("Dinov2Model", "Dinov2Config"),
        {"hidden_size": 1024, "num_attention_heads": 16, "image_size": 224, "patch_size": 16},
    ),
    "midnight": (
        *("Dinov2Model", "Dinov2Config"),
        {
            **{"hidden_size": 1536, "num_attention_heads": 24, "image_size": 518, "patch_size": 14},
            **{"use_swiglu_ffn": True},
        },
    ),
    "hibou-b": (
        *("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig"),
        {
            "hidden_size": 768,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 14,
            "use_swiglu_ffn": True,
        },
    ),
    "hibou-l": (
        *("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig"),
        {
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
            "use_swiglu_ffn": True,
        },
    ),
    "phaet": (
        *("Dinov2Model", "Dinov2Config"),
        {"hidden_size": 1024, "num_attention_heads": 16, "image_size": 224, "patch_size": 16},
    ),
    "mascaret": (
        *("Dinov2Model", "Dinov2Config"),
        {
            **{"hidden_size": 1536, "num_attention_heads": 24, "image_size": 518, "patch_size": 14},
            **{"use_swiglu_ffn": True},
        },
    ),
    "isight": (
        *("CLIPModel", "CLIPConfig"),
        {
            "vision_config": {
                **{"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16},
                **{"image_size": 336, "patch_size": 14, "num_hidden_layers": DEPTH},
            },
            "text_config": {"num_hidden_layers": 1},
        },
    ),
}
#: Whose class holds more than a network of timm; ours loads the keys that are published.
HEADED = ("mettle",)
#: Resampled by code of the hub, which is not here: the stand-in for it does so as transformers 4.35 to 4.44.
SHIFTED = ("conchv15", "hibou-b", "hibou-l")


def shallow(recipe: Recipe) -> Recipe:
    kwargs = {**recipe.encoder.kwargs, "depth": DEPTH}
    made = recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"kwargs": kwargs})})
    if (theirs := OTHER_IMAGES.get(recipe.name)) is None or made.images is None:
        return made
    return made.model_copy(update={"images": made.images.model_copy(update={"interpolation": theirs})})


def job_of(recipe: Recipe, weights: Path) -> dict[str, Any]:
    """The network of a preset, for the other side."""
    made, images = recipe.transform, recipe.images or recipe.transform
    data = {
        "input_size": [3, made.crop, made.crop],
        "mean": made.mean,
        "std": made.std,
        "interpolation": images.interpolation,
        "crop_pct": images.crop / images.resize,
        "crop_mode": "center",
    }
    job = {"preset": recipe.name, "weights": str(weights), "data": data, "variant": recipe.default_variant}
    job["shifted"] = recipe.name in SHIFTED
    if recipe.name in TRANSFORMERS:
        kind, config, kwargs = TRANSFORMERS[recipe.name]
        return {
            **job,
            "transformers": kind,
            "config": config,
            "kwargs": {**kwargs, "num_hidden_layers": DEPTH},
        }
    ours = ("pool_heads", "pool_bias", "head", "head_dim")
    kwargs = {k: v for k, v in shallow(recipe).encoder.kwargs.items() if k not in ours}
    return {**job, "timm": recipe.encoder.arch, "kwargs": kwargs}


def model_of(name: str, weights: Path) -> Model:
    """Ours, with those weights."""
    recipe = shallow(load_recipe(name))
    key, variant = recipe.variant(None)
    state = torch.load(weights, weights_only=True)
    if name in TRANSFORMERS or name in HEADED:
        encoder = build_encoder(recipe, variant, weights)
    else:
        encoder = build_encoder(recipe, variant, "random")
        trunk: Any = getattr(encoder, "trunk", None) or encoder.vit
        trunk.load_state_dict(state, strict=True)
    return Model(
        *(recipe, key, encoder),
        device=torch.device("cpu"),
        precision="fp32",
        weights="compared",
        origin={"allow_non_recommended_settings": True},
    )


def calls(name: str, images: Path, slide: Path) -> Iterator[dict[str, Any]]:
    """What both are asked for."""
    recipe = load_recipe(name)
    side = recipe.tile_size_px
    patch = recipe.encoder.kwargs.get("patch_size") or (16 if "16" in recipe.encoder.arch else 14)
    pictures = [{"sample_id": path.stem, "image_path": str(path)} for path in sorted(images.glob("*.???"))]
    if not name.startswith("conch"):
        yield {"name": "images", "what": "images", "images": pictures}
    regions = [{"sample_id": "slide", "image_path": str(slide), "coordinates": [[40, 80], [2100, 2900]]}]
    common = {"spacing_um": 0.5, "backend": "openslide"}
    yield {"name": "whole", "what": "regions", "regions": regions, "dense": {**common, "target_size": side}}
    padded = side + patch // 2 + 1
    yield {
        "name": "padded",
        "what": "regions",
        "regions": regions,
        "dense": {**common, "target_size": padded},
    }
    windows = {"target_size": 2 * side - 10, "window_size": side, "overlap": 0.5, "pad_mode": "replicate"}
    yield {"name": "windows", "what": "regions", "regions": regions, "dense": {**common, **windows}}
    coarse = {"target_size": side, "spacing_um": 1.1, "pad_mode": "constant", "image_pad_value": 0.3}
    classes = [{**regions[0], "annotation": "tumor"}]
    yield {"name": "coarse", "what": "regions", "regions": classes, "dense": {**common, **coarse}}
    yield {
        **{"name": "prenorm", "what": "regions", "regions": regions},
        "dense": {**common, "target_size": side, "feature_kind": "patch_features_prenorm"},
    }
    attention = {
        "feature_kind": "cls_attention",
        "attention_blocks": [-1, 0],
        "attention_include_registers": True,
    }
    yield {
        **{"name": "attention", "what": "regions", "regions": regions},
        "dense": {**common, "target_size": side, **attention},
    }
    oblong = [{"sample_id": "oblong", "image_path": str(images / "oblong.jpeg"), "spacing_at_level_0": 0.25}]
    size = [side + patch, side]
    yield {
        **{"name": "dense images", "what": "dense images", "images": oblong},
        "dense": {"target_size": size, "spacing_um": 0.5},
    }


def run_ours(model: Model, call: dict[str, Any]) -> str:
    execution = ExecutionOptions(output_dir=call["output"], precision="fp32", batch_size=2, engine="torch")
    dense = {**call.get("dense", {})}
    if isinstance(dense.get("target_size"), list):
        dense["target_size"] = tuple(dense["target_size"])
    try:
        if call["what"] == "images":
            model.embed_images([ImageSpec(**each) for each in call["images"]], execution=execution)
        elif call["what"] == "dense images":
            images = [ImageSpec(**each) for each in call["images"]]
            model.embed_images_dense(images, dense=DenseImageOptions(**dense), execution=execution)
        else:
            regions = [SlideRegions(**each) for each in call["regions"]]
            model.embed_regions_dense(regions, dense=DenseOptions(**dense), execution=execution)
    except Slide2VecError as error:
        return f"refused: {error}"[:100]
    return ""


def compared(ours: Path, theirs: Path) -> tuple[str, float, list[str]]:
    """Files in words, largest relative difference, keys that differ."""
    names = [
        {
            str(p.relative_to(folder))
            for p in folder.rglob("*")
            if p.is_file() and p.suffix in (".pt", ".json")
        }
        for folder in (ours, theirs)
    ]
    if names[0] != names[1]:
        return f"{len(names[0])} of ours, {len(names[1])} of theirs", float("nan"), []
    worst, keys = 0.0, set[str]()
    for name in names[0]:
        if name.endswith(".pt"):
            one, other = (torch.load(folder / name, weights_only=True) for folder in (ours, theirs))
            if one.shape != other.shape or one.dtype != other.dtype:
                return f"{name}: {one.shape} {one.dtype}, {other.shape} {other.dtype}", float("nan"), []
            worst = max(worst, float((one - other).abs().max() / other.abs().max()))
        else:
            one, other = (json.loads((folder / name).read_text()) for folder in (ours, theirs))
            keys |= {
                k
                for k in one.keys() | other.keys()
                if k not in OTHER and one.get(k, "-") != other.get(k, "-")
            }
    return f"{len(names[0])} files", worst, sorted(keys)


def write_images(folder: Path, name: str) -> None:
    """Pictures of odd and even sides, grey and with transparency; "oblong" is twice as large as the target of
    the dense call."""
    recipe, numbers = load_recipe(name), np.random.default_rng(0)
    side = recipe.tile_size_px
    patch = recipe.encoder.kwargs.get("patch_size") or (16 if "16" in recipe.encoder.arch else 14)
    sizes = {"a.png": (300, 411), "b.jpg": (640, 260), "oblong.jpeg": (2 * (side + patch), 2 * side)}
    sizes |= {"c.png": (231, 300), "d.png": (224, 224), "e.png": (518, 519), "grey.png": (225, 310)}
    for file, (height, width) in {**sizes, "rgba.png": (260, 301)}.items():
        channels = {"grey.png": 1, "rgba.png": 4}.get(file, 3)
        noise = numbers.integers(0, 256, (height, width, channels), dtype=np.uint8)
        Image.fromarray(np.asarray(cv2.GaussianBlur(noise, (0, 0), 3))).save(folder / file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="Python of an environment with slide2vec 7.1.4")
    parser.add_argument("--slide", required=True, type=Path)
    parser.add_argument("presets", nargs="*", default=[*TIMM, *TRANSFORMERS])
    parser.add_argument("--calls", nargs="*", help="only these, such as images, whole, windows")
    args = parser.parse_args()
    print("| preset | call | files | largest difference | keys that differ |\n|---|---|---|---|---|")
    for name in args.presets:
        with tempfile.TemporaryDirectory() as folder:
            for row in rows(name, Path(folder), args.slide.resolve(), args.peer_python, args.calls):
                print(f"| {name} | {' | '.join(row)} |", flush=True)


def rows(
    name: str, folder: Path, slide: Path, python: str, only: list[str] | None
) -> Iterator[tuple[str, ...]]:
    images, weights = folder / "images", folder / "state.pth"
    images.mkdir()
    write_images(images, name)
    job = job_of(load_recipe(name), weights)
    asked = [call for call in calls(name, images, slide) if only is None or call["name"] in only]
    theirs = [{**call, "output": str(folder / "theirs" / call["name"])} for call in asked]
    run_theirs(python, {**job, "make": True}, folder)
    said = run_theirs(python, {**job, "calls": theirs}, folder)
    model = model_of(name, weights)
    for call in asked:
        call["output"] = str(folder / "ours" / call["name"])
        refused = run_ours(model, call)
        their_refusal = next((line for line in said if line.startswith(f"REFUSED {call['name']}:")), "")
        if refused or their_refusal:
            yield call["name"], refused or "ours gives it", "", f"7.1.4 {their_refusal or 'gives it'}"
            continue
        files, worst, keys = compared(folder / "ours" / call["name"], folder / "theirs" / call["name"])
        yield call["name"], files, f"{worst:.1e}", ", ".join(keys) or "none"


def run_theirs(python: str, job: dict[str, Any], folder: Path) -> list[str]:
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    done = subprocess.run([python, str(TOOL), str(path)], capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise SystemExit(f"{job['preset']}: {done.stderr[-2500:]}")
    return done.stdout.splitlines()


if __name__ == "__main__":
    main()
