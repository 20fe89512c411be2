"""Every compilable preset through OpenVINO, and run: `python -m benchmarks.openvino_matrix`.

Each preset is exported at one block in both layouts, built, loaded and run in fp32 and bf16 as engines of the
store are, and its features are compared with those of the encoder in PyTorch in fp32. Rows are kept in
`results/openvino-matrix-<date>.json` as they are made; started again it goes on with what is missing, and
prints the tables when nothing is. `--depth 0` takes all blocks of a preset.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.engine_matrix import Row, arguments, kept_rows, noise_tiles, with_depth
from slide2vec.compile import openvino_builder
from slide2vec.compile.builders import BuildJob
from slide2vec.compile.parity import for_layout, reference_features
from slide2vec.errors import EngineError
from slide2vec.recipes import Recipe
from slide2vec.runtime.base import BatchProfile, Layout
from slide2vec.runtime.openvino_engine import OpenVINOEngine

__all__ = ["PRECISIONS", "rows"]

PRECISIONS = ("fp32", "bf16")
#: Compared in a batch, and the first of them alone.
TILES = 3
CPU = torch.device("cpu")


def rows(name: str, layout: Layout, depth: int, wanted: Collection[str]) -> Iterator[Row]:
    """The engines of a preset in one layout: the file, which is one for all precisions, and how close its
    features are in each.

    Args:
        depth: blocks; 0 = all.
        wanted: precisions. One that this CPU does not compute in says so.
    """
    if not wanted:
        return
    recipe, encoder = with_depth(name, depth)
    dim, mean_std = recipe.variants[recipe.default_variant].dim, (recipe.transform.mean, recipe.transform.std)
    tiles = noise_tiles(TILES, recipe.transform.crop)
    expected = reference_features(encoder, mean_std, tiles, CPU, dim)
    given = for_layout(tiles, mean_std, layout)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        job = _job(recipe, encoder, layout, Path(folder))
        built = openvino_builder.build(job)
        seconds = round(time.perf_counter() - started, 1)
        model = Path(folder) / built.file
        size = sum(each.stat().st_size for each in Path(folder).iterdir())
        file = {"opset": built.opset, "build_seconds": seconds, "size_mb": round(size / 1e6, 1)}
        for precision in (each for each in PRECISIONS if each in wanted):
            row = {"preset": name, "precision": precision, "layout": layout, "depth": depth, **file}
            try:
                engine = OpenVINOEngine(model, precision=precision, feature_dim=dim, layout=layout)
            except EngineError as error:
                yield {**row, "refused": str(error).replace(f"{folder}/", "")}
                continue
            found = torch.cat([engine.run(given), engine.run(given[:1])])
            engine.close()
            yield {**row, **_compared(found, torch.cat([expected, expected[:1]]), recipe, precision)}


def _job(recipe: Recipe, encoder: nn.Module, layout: Layout, folder: Path) -> BuildJob:
    return BuildJob(
        encoder=encoder,
        recipe=recipe,
        folder=folder,
        device=CPU,
        runtime="openvino",
        precision="fp32",
        layout=layout,
        profile=BatchProfile(1, TILES, TILES),
        opset=None,
        calibration=torch.empty(0),
        progress=lambda *_: None,
    )


def _compared(found: Tensor, expected: Tensor, recipe: Recipe, precision: str) -> Row:
    """How close; and how far apart the tiles are, without which that would say little."""
    cosine = nn.functional.cosine_similarity(found, expected).min()
    return {
        "cosine": round(float(cosine), 7),
        "least_cosine": recipe.engine.threshold(precision),
        "difference": float((found - expected).abs().max()),
        "largest": float(expected.abs().max()),
        "between_tiles": float((expected[0] - expected[1]).abs().max()),
    }


def table(found: list[Row]) -> str:
    """Markdown: a line per preset, layout and precision."""
    lines = [
        "| preset | layout | precision | opset | MB | cosine | largest difference | of the largest value "
        "| of the difference between two tiles | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_line, sorted(found, key=lambda row: (row["preset"], row["layout"])))])


def _line(row: Row) -> str:
    head = (
        f"| {row['preset']} | {row['layout']} | {row['precision']} | {row['opset']} | {row['size_mb']:g} MB |"
    )
    if "refused" in row:
        return f"{head} | | | | {row['refused']} |"
    of_value, of_tiles = (row["difference"] / row[key] for key in ("largest", "between_tiles"))
    far = "" if row["cosine"] >= row["least_cosine"] else f"below {row['least_cosine']:g}"
    return f"{head} {row['cosine']:.7f} | {row['difference']:.1e} | {of_value:.1e} | {of_tiles:.1e} | {far} |"


def main() -> None:
    given = arguments(__doc__, "openvino-matrix", PRECISIONS).parse_args()

    def made(name: str, layout: Layout, wanted: set[str]) -> Iterator[Row]:
        return rows(name, layout, given.depth, wanted)

    for depth, found in kept_rows(given, made).items():
        print(f"\nDepth {depth or 'whole'}\n\n{table(found)}")


if __name__ == "__main__":
    main()
