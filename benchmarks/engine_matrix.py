"""Every compilable preset through TensorRT-RTX's own parser and builder, without a GPU:
`python -m benchmarks.engine_matrix`.

Each preset is exported at one block in both layouts and in fp32, fp16, bf16 and fp8, parsed, and built for
one compute capability. Nothing is run: that needs a GPU. Rows are kept in `results/engine-matrix-<date>.json`
as they are made; started again it goes on with what is missing, and prints the tables when nothing is.
`--depth 0` takes all blocks of a preset: minutes and gigabytes each. `benchmarks.openvino_matrix` does the
same with OpenVINO, and runs what it builds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeAlias, get_args
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.common import RESULTS, of_depth
from slide2vec.compile import onnx_graph
from slide2vec.compile.bench import peak_mb
from slide2vec.compile.export_module import ExportedEncoder
from slide2vec.compile.fp8 import quantise_fp8
from slide2vec.compile.onnx import export_onnx
from slide2vec.compile.onnx_graph import node_counts
from slide2vec.compile.parity import for_layout
from slide2vec.compile.tensorrt import build_plan
from slide2vec.encoders import build_encoder
from slide2vec.errors import EngineError
from slide2vec.recipes import Recipe, list_models, load_recipe
from slide2vec.runtime.base import BatchProfile, Layout

__all__ = [
    "COMPILABLE",
    "LAYOUTS",
    "PRECISIONS",
    "arguments",
    "kept_rows",
    "noise_tiles",
    "rows",
    "with_depth",
]

Row: TypeAlias = dict[str, Any]

COMPILABLE = [name for name in list_models("tile") if load_recipe(name).compile]
PRECISIONS = ("fp32", "fp16", "bf16", "fp8")
LAYOUTS = get_args(Layout)
#: In fp32 TensorRT has no kernel for the Attention operator of newer opsets.
OPSETS: dict[str, int | None] = {"bf16": None, "fp16": None, "fp32": 20}
PROFILE = BatchProfile(1, 8, 8)


def with_depth(name: str, depth: int) -> tuple[Recipe, nn.Module]:
    """A preset with so many blocks (0 = all) and random weights, whose layer scales do not hide them; the
    scattering transform has none."""
    recipe = of_depth(load_recipe(name), depth)
    encoder = build_encoder(recipe, recipe.variants[recipe.default_variant], "random")
    for key, parameter in encoder.named_parameters():
        if "gamma" in key.rpartition(".")[2]:
            parameter.data.fill_(0.5)
    return recipe, encoder


def noise_tiles(count: int, side: int) -> Tensor:
    """(count, side, side, 3) uint8, noise with structure."""
    coarse = torch.rand(count, 3, 7, 7, generator=torch.Generator().manual_seed(0)) * 255
    tiles = nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 255)
    return tiles.permute(0, 2, 3, 1).to(torch.uint8).contiguous()


def rows(name: str, layout: Layout, target: str, depth: int, wanted: Collection[str]) -> Iterator[Row]:
    """The engines of a preset in one layout: export, parse, build; what came of it, and what it took.

    Args:
        target: compute capability ("sm89").
        depth: blocks; 0 = all.
        wanted: precisions. That of fp8 is the graph of fp16, which is exported once for both.
    """
    recipe, encoder = with_depth(name, depth)
    for exported, opset in OPSETS.items():
        precisions = [each for each in ("fp16", "fp8") if exported == "fp16"] or [exported]
        precisions = [each for each in precisions if each in wanted]
        if not precisions:
            continue
        with tempfile.TemporaryDirectory() as given:
            folder = Path(given)
            graph = _exported(recipe, encoder, exported, layout, opset, folder / "encoder.onnx")
            for precision in precisions:
                found = {
                    "preset": name,
                    "precision": precision,
                    "layout": layout,
                    "target": target,
                    "depth": depth,
                }
                yield {**found, **graph, **_built(recipe, precision, layout, target, folder)}


def _exported(
    recipe: Recipe, encoder: nn.Module, precision: str, layout: Layout, opset: int | None, path: Path
) -> Row:
    """Write the graph; nodes as the exporter made them, and what is left of them."""
    module = ExportedEncoder(encoder, recipe.transform, layout, precision, recipe.engine).eval()
    before: list[int] = []
    tidy = onnx_graph.tidy

    def counting(file: Path) -> None:
        before.append(node_counts(file).total())
        tidy(file)

    started = time.perf_counter()
    with patch.object(onnx_graph, "tidy", counting):
        opset = export_onnx(module, path, input_size_px=recipe.transform.crop, opset=opset)
    seconds = round(time.perf_counter() - started, 1)
    nodes = {"nodes_exported": before[-1], "nodes": node_counts(path).total()}
    return {"opset": opset, **nodes, "export_seconds": seconds}


def _built(recipe: Recipe, precision: str, layout: Layout, target: str, folder: Path) -> Row:
    onnx, plan = folder / "encoder.onnx", folder / "encoder.plan"
    found: Row = {}
    try:
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
    return {**found, "layers": _layers(onnx), "peak_gb": round(peak_mb() / 1024, 1)}


def _layers(onnx: Path) -> int:
    """Layers of the network that TensorRT's parser makes of a file; of shape arithmetic, too."""
    import tensorrt_rtx_bindings as trt

    log = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    trt.OnnxParser(network, log).parse_from_file(str(onnx))
    return int(network.num_layers)


def _quantise(recipe: Recipe, layout: Layout, source: Path, target: Path) -> list[str]:
    """Calibrated on two tiles: the graph is what matters here."""
    mean_std = (recipe.transform.mean, recipe.transform.std)
    given = for_layout(noise_tiles(2, recipe.transform.crop), mean_std, layout).numpy()
    return list(quantise_fp8(source, target, given, min_cosine=recipe.engine.threshold("fp8")))


def table(found: list[Row]) -> str:
    """Markdown: a line per preset and precision, the layouts beside each other."""
    lines = [
        "| preset | precision | opset | nodes, exported → tidy | layers | build | plan | notes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, precision in sorted(
        {(each["preset"], each["precision"]) for each in found},
        key=lambda each: (each[0], PRECISIONS.index(each[1])),
    ):
        mine = [each for each in found if (each["preset"], each["precision"]) == (name, precision)]
        mine.sort(key=lambda each: LAYOUTS.index(each["layout"]))
        cells = (" / ".join(map(cell, mine)) for cell in (_nodes, _layer_count, _seconds, _megabytes))
        notes = "; ".join(sorted({_note(each) for each in mine} - {""}))
        lines.append(f"| {name} | {precision} | {mine[0]['opset']} | {' | '.join(cells)} | {notes} |")
    return "\n".join(lines)


def _nodes(found: Row) -> str:
    return f"{found.get('nodes_exported', '–')} → {found['nodes']}"


def _layer_count(found: Row) -> str:
    return f"{found['layers']:,}" if "layers" in found else "–"


def _seconds(found: Row) -> str:
    return f"{found['build_seconds']:g} s" if "build_seconds" in found else "refused"


def _megabytes(found: Row) -> str:
    return f"{found['plan_mb']:,g} MB" if "plan_mb" in found else "none"


def _note(found: Row) -> str:
    left = ", ".join(found.get("left_in_fp16", []))
    return str(found.get("refused", f"in fp16: {left}" if left else ""))[:160]


def arguments(doc: str | None, out: str, precisions: Collection[str]) -> argparse.ArgumentParser:
    """Those of a matrix, kept in results/<out>-<today>.json."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=COMPILABLE)
    parser.add_argument("--precisions", nargs="+", default=precisions)
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS)
    parser.add_argument("--depth", type=int, default=1, help="blocks; 0 = all")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{out}-{datetime.date.today()}")
    return parser


def kept_rows(
    given: argparse.Namespace, made: Callable[[str, Layout, set[str]], Iterator[Row]]
) -> dict[int, list[Row]]:
    """The rows of a matrix by depth, the deepest first: those that are missing are made and kept, one by one.

    Args:
        given: `arguments`.
        made: the rows of a preset in a layout, in these precisions.
    """
    path = given.out.with_suffix(".json")
    file = json.loads(path.read_text()) if path.exists() else {"rows": []}
    kept: list[Row] = file["rows"]
    for layout in given.layouts:
        for name in given.presets:
            asked = (name, layout, given.depth)
            done = {e["precision"] for e in kept if (e["preset"], e["layout"], e["depth"]) == asked}
            for found in made(name, layout, set(given.precisions) - done):
                print(found, flush=True)
                kept.append(found)
                path.write_text(json.dumps(file, indent=1) + "\n")
    depths = sorted({each["depth"] for each in kept}, reverse=True)
    return {depth: [each for each in kept if each["depth"] == depth] for depth in depths}


def main() -> None:
    parser = arguments(__doc__, "engine-matrix", PRECISIONS)
    parser.add_argument("--target", default="sm89")
    given = parser.parse_args()

    def made(name: str, layout: Layout, wanted: set[str]) -> Iterator[Row]:
        return rows(name, layout, given.target, given.depth, wanted)

    for depth, found in kept_rows(given, made).items():
        print(f"\nDepth {depth or 'whole'}\n\n{table(found)}")


if __name__ == "__main__":
    main()
