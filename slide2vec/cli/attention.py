"""`slide2vec attention`: what an encoder looks at in a slide, as arrays and as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slide2vec.choices import Backend
from slide2vec.cli.console import (
    Debug,
    Json,
    Offline,
    given,
    note,
    print_json,
    stdout,
)
from slide2vec.cli.embed import NonRecommended, TrustRemoteCode
from slide2vec.errors import ConfigError

__all__ = ["attention"]


def attention(
    slide: Annotated[Path, typer.Argument(help="The slide.", show_default=False)],
    preset: Annotated[str, typer.Option("--preset", "-p", help="The encoder; see `slide2vec models`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the files.")],
    at: Annotated[
        list[str] | None,
        typer.Option(
            "--at",
            help="X,Y of a tile's top-left corner, level-0 px; may be given several times "
            "[all tiles that hold tissue].",
            show_default=False,
        ),
    ] = None,
    block: Annotated[
        list[int] | None,
        typer.Option(
            "--block",
            help="Of the encoder, 0 the first, -1 the last; may be given several times [-1].",
            show_default=False,
        ),
    ] = None,
    registers: Annotated[
        bool, typer.Option("--registers", help="Maps of the registers, too, beside the class token's.")
    ] = False,
    heads: Annotated[
        bool, typer.Option("--heads", help="A map of each head, rather than their mean.")
    ] = False,
    weights: Annotated[
        str | None, typer.Option(help='Weights file or directory, or "random"; by default from Hugging Face.')
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random weights.")] = 0,
    spacing: Annotated[float | None, typer.Option(help="µm/px of the tiles [the preset's].")] = None,
    tile_size: Annotated[int | None, typer.Option(help="Side of the tiles in px [the preset's].")] = None,
    spacing_at_level_0: Annotated[
        float | None,
        typer.Option("--spacing-at-level-0", help="µm/px of the slide, where the file is wrong."),
    ] = None,
    backend: Annotated[Backend, typer.Option(help="What reads the slide.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, mps or cpu; by default the best.")] = None,
    allow_non_recommended_settings: NonRecommended = False,
    trust_remote_code: TrustRemoteCode = False,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Attention maps of a slide's tiles, as arrays and as pictures.

    <slide>.attention.npz has `maps`, `channels`, `x`, `y` and the tiles' `embeddings`; the pictures are of
    the slide, or of each tile that was asked for with --at.
    """
    places = None if at is None else [_place(text) for text in at]
    from slide2vec.attention_maps import draw_attention, write_attention
    from slide2vec.config import PreprocessingConfig
    from slide2vec.model import Model
    from slide2vec.pictures import write_picture
    from slide2vec.slides import as_slide

    config = PreprocessingConfig(
        backend=backend, **given(requested_spacing_um=spacing, requested_tile_size_px=tile_size)
    )
    note(f"loading {preset} …")
    model = Model.from_preset(
        preset,
        weights=weights,
        seed=seed,
        device=device,
        allow_non_recommended_settings=allow_non_recommended_settings,
        trust_remote_code=trust_remote_code,
    )
    found = model.attention_maps(
        as_slide(slide, spacing_at_level_0),
        config,
        at=places,
        blocks=tuple(block or (-1,)),
        include_registers=registers,
        mean_heads=not heads,
    )
    name = found.sample_id
    written = write_attention(output / f"{name}.attention.npz", found)
    pictures = []
    for number in [None] if places is None else range(len(places)):
        place = "" if number is None else f".{found.x[number]}_{found.y[number]}"
        drawn = draw_attention(found, tile=number, backend=backend)
        pictures.append(write_picture(output / f"{name}{place}.attention.png", drawn))
    if as_json:
        print_json({"sample_id": name, "tiles": len(found.x), "path": written, "pictures": pictures})
    else:
        drawn_in = ", ".join(map(str, pictures))
        stdout().print(f"{name}: attention of {len(found.x)} tiles in {written}; pictures: {drawn_in}")


def _place(text: str) -> tuple[int, int]:
    try:
        x, y = (int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--at {text}: give a place as X,Y in level-0 px, such as 12000,8000") from None
    return x, y
