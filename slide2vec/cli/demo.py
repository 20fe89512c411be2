"""`slide2vec demo`: everything once, on a slide made up for the purpose."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from slide2vec.cli.console import Debug, note

__all__ = ["demo"]

SEED = 0
#: Tiles at the edge, mostly glass, would take the colours of the map.
TISSUE_THRESHOLD = 0.5


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for everything made.")] = Path(
        "demo"
    ),
    size: Annotated[
        int, typer.Option(min=2048, max=200_000, help="Side of the slide in px, at 0.25 µm/px.")
    ] = 12_000,
    preset: Annotated[
        str, typer.Option("--preset", "-p", help="The encoder; scattering needs no weights.")
    ] = "scattering",
    weights: Annotated[str | None, typer.Option(help='Weights file or directory, or "random".')] = None,
    debug: Debug = False,
) -> None:
    """Make a synthetic slide, embed it and draw what was found. No download, no slide needed."""
    from slide2vec.recipes import load_recipe

    load_recipe(preset)  # a wrong name is found before the slide is painted
    slide_path = _slide(output / f"synthetic-{size}-{SEED}.svs", size)
    note(f"loading {preset} …")
    from slide2vec.cli.embed_run import embed_and_write
    from slide2vec.cli.outcome import print_report
    from slide2vec.config import ExecutionOptions, PreprocessingConfig, PreviewConfig
    from slide2vec.model import Model
    from slide2vec.slides import as_slide

    model = Model.from_preset(preset, weights=weights)
    pictures = PreviewConfig(save_mask_preview=True, save_tiling_preview=True, downsample=max(8, size / 2048))
    execution = ExecutionOptions(output_dir=output)
    # Of an earlier demo, whose embeddings would only be warned of: those here are made anew.
    (output / "tile_embeddings" / f"{slide_path.stem}.meta.json").unlink(missing_ok=True)
    report = embed_and_write(
        model,
        [as_slide(slide_path)],
        PreprocessingConfig(preview=pictures, tissue_threshold=TISSUE_THRESHOLD),
        execution,
        draw_map=True,
    )
    print_report(report, model, execution)
    if report.result.failed:
        raise typer.Exit(1)
    made = report.made[0]
    typer.echo(f"\nLook at {made.map_path}: tiles that look alike have like colours.")
    typer.echo(f"Your own slides: slide2vec embed SLIDE --preset {preset} -o embeddings")


def _slide(path: Path, size: int) -> Path:
    """The synthetic slide, painted unless it is there: its name says how it was made."""
    if path.exists():
        note(f"using {path}, made before")
        return path
    note(f"painting {path}, {size:,} × {size:,} px (takes up to a minute) …")
    from slide2vec.synthetic import write_synthetic_slide

    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    write_synthetic_slide(path, size_px=size, seed=SEED)
    note(f"painted in {time.perf_counter() - start:.1f} s, {path.stat().st_size / 1e6:.1f} MB")
    return path
