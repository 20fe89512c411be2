"""Every compilable preset through TensorRT-RTX's own parser and builder, without a GPU:
`python -m benchmarks.engine_matrix`.

Each preset is exported at one block in both layouts and in fp32, fp16, bf16 and fp8, parsed, and built for
one compute capability. Nodes per block are those that a second block adds to the graph. Nothing is run: that
needs a GPU. Rows are kept in a file as they are made; started again it goes on with what is missing. Writes
`results/engine-matrix-<date>.{json,md}`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from benchmarks.cpu import RESULTS, machine
from slide2vec.compile.exported import ExportedEncoder
from slide2vec.compile.fp8 import quantise_fp8
from slide2vec.compile.onnx import export_onnx
from slide2vec.compile.onnx_graph import node_counts
from slide2vec.compile.parity import for_layout
from slide2vec.compile.tensorrt import build_plan
from slide2vec.encoders import build_encoder
from slide2vec.errors import EngineError
from slide2vec.recipes import Recipe, list_models, load_recipe
from slide2vec.runtime.base import BatchProfile, Layout

__all__ = ["COMPILABLE", "PRECISIONS", "row", "with_depth"]

COMPILABLE = [name for name in list_models("tile") if load_recipe(name).compile]
PRECISIONS = ("fp32", "fp16", "bf16", "fp8")
LAYOUTS = get_args(Layout)
#: In fp32 TensorRT has no kernel for the Attention operator of newer opsets.
OPSETS = {"fp32": 20}
PROFILE = BatchProfile(1, 8, 8)


def with_depth(name: str, depth: int) -> tuple[Recipe, nn.Module]:
    """A preset with so many blocks and random weights; the scattering transform has none, and is whole."""
    recipe = load_recipe(name)
    if recipe.encoder.family != "scattering":
        spec = recipe.encoder.model_copy(update={"kwargs": {**recipe.encoder.kwargs, "depth": depth}})
        recipe = recipe.model_copy(update={"encoder": spec})
    return recipe, build_encoder(recipe, recipe.variants[recipe.default_variant], "random")


def row(name: str, precision: str, layout: Layout, target: str, folder: Path) -> dict[str, Any]:
    """One engine: export, parse, build; what came of it, and what it took.

    Args:
        target: compute capability ("sm89").
        folder: empty, for its files.
    """
    recipe, encoder = with_depth(name, 1)
    found: dict[str, Any] = {"preset": name, "precision": precision, "layout": layout, "target": target}
    onnx, plan = folder / "encoder.onnx", folder / "encoder.plan"
    try:
        found["opset"] = _export(recipe, encoder, precision, layout, onnx)
        found["nodes"] = sum(node_counts(onnx).values())
        if precision == "fp8":
            found["left_in_fp16"] = _quantise(recipe, layout, onnx, folder / "fp8.onnx")
            onnx = folder / "fp8.onnx"
        started = time.perf_counter()
        build_plan(
            onnx, plan, profile=PROFILE, precision=precision, runtime="tensorrt-rtx", targets=(target,)
        )
        found["build_seconds"] = round(time.perf_counter() - started, 1)
        found["plan_mb"] = round(plan.stat().st_size / 1e6, 1)
    except EngineError as error:
        found["refused"] = str(error).replace(f"{folder}/", "")
    return found


def _export(recipe: Recipe, encoder: nn.Module, precision: str, layout: Layout, path: Path) -> int:
    dtype = "fp16" if precision == "fp8" else precision
    module = ExportedEncoder(encoder, recipe.transform, layout, dtype, recipe.engine).eval()
    size = recipe.transform.crop
    return export_onnx(module, path, input_size_px=size, opset=OPSETS.get(precision))


def _quantise(recipe: Recipe, layout: Layout, source: Path, target: Path) -> list[str]:
    """Calibrated on two tiles of noise with structure: the graph is what matters here."""
    side, draw = recipe.transform.crop, torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 3, 7, 7, generator=draw) * 255
    tiles = nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 255)
    pixels = tiles.permute(0, 2, 3, 1).to(torch.uint8)
    mean_std = (recipe.transform.mean, recipe.transform.std)
    given = for_layout(pixels, mean_std, layout).numpy()
    return list(quantise_fp8(source, target, given, min_cosine=recipe.engine.threshold("fp8")))


def nodes_per_block(name: str, folder: Path) -> int | None:
    """Nodes that a second block adds in bf16; None for presets without blocks."""
    if load_recipe(name).encoder.family == "scattering":
        return None
    counts = []
    for depth in (1, 2):
        recipe, encoder = with_depth(name, depth)
        path = folder / f"depth{depth}.onnx"
        _export(recipe, encoder, "bf16", "uint8_nhwc", path)
        counts.append(sum(node_counts(path).values()))
    return counts[1] - counts[0]


def table(rows: list[dict[str, Any]], blocks: dict[str, int | None], target: str) -> str:
    """Markdown: a line per preset, a column per precision: built in both layouts, or why not."""
    lines = [
        f"| preset | nodes a block | {' | '.join(PRECISIONS)} | refused |",
        f"|---|---|{'---|' * len(PRECISIONS)}---|",
    ]
    for name in dict.fromkeys(each["preset"] for each in rows):
        mine = [each for each in rows if each["preset"] == name]
        cells = [_cell([each for each in mine if each["precision"] == precision]) for precision in PRECISIONS]
        refused = "; ".join(sorted({each["refused"][:160] for each in mine if "refused" in each}))
        per_block = "" if blocks.get(name) is None else str(blocks[name])
        lines.append(f"| {name} | {per_block} | {' | '.join(cells)} | {refused} |")
    return "\n".join(lines)


def _cell(rows: list[dict[str, Any]]) -> str:
    """Seconds of building and MB, layout by layout."""
    cells = [
        "refused" if "refused" in each else f"{each['build_seconds']:g} s, {each['plan_mb']:g} MB"
        for each in rows
    ]
    return " / ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=COMPILABLE)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS)
    parser.add_argument("--target", default="sm89")
    parser.add_argument("--out", type=Path, default=RESULTS / f"engine-matrix-{datetime.date.today()}")
    args = parser.parse_args()
    path = args.out.with_suffix(".json")
    kept = json.loads(path.read_text()) if path.exists() else {"rows": [], "blocks": {}}
    done = {(each["preset"], each["precision"], each["layout"]) for each in kept["rows"]}
    for name in args.presets:
        if name not in kept["blocks"]:
            with tempfile.TemporaryDirectory() as folder:
                kept["blocks"][name] = nodes_per_block(name, Path(folder))
        for precision in args.precisions:
            for layout in LAYOUTS:
                if (name, precision, layout) in done:
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    found = row(name, precision, layout, args.target, Path(folder))
                print(found, flush=True)
                kept["rows"].append(found)
                path.write_text(json.dumps(kept, indent=1) + "\n")
    cpu, library = machine(), version("tensorrt-rtx-cu13-libs")
    packages = cpu["packages"]
    head = (
        f"# Engines of TensorRT-RTX {library} for {args.target}, built without a GPU\n\n"
        f"{datetime.date.today()}, {cpu['cpu']} ({cpu['cpus']} cores, other work on them), torch "
        f"{packages['torch']}, timm {packages['timm']}. Each preset at one block, random weights, batches of "
        f"{PROFILE.min} to {PROFILE.max}; seconds and plan size of building, layouts {' / '.join(LAYOUTS)}. "
        "Nothing was run: that needs a GPU. Command: `python -m benchmarks.engine_matrix`.\n\n"
    )
    args.out.with_suffix(".md").write_text(head + table(kept["rows"], kept["blocks"], args.target) + "\n")


if __name__ == "__main__":
    main()
