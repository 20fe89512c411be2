"""Make the two pictures of README and of the documentation's first page anew, from a generated slide.

python tools/docs/pictures.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image

from slide2vec import Model, PreprocessingConfig
from slide2vec.synthetic import write_synthetic_slide

#: Side and colours of a picture: small enough for a repository (140 kB for both).
WIDTH_PX, COLOURS = 520, 160


def main() -> None:
    """Embed a slide without weights, and draw its tiles and its map."""
    folder = Path(__file__).parents[2] / "docs/pictures"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        slide = write_synthetic_slide(Path(place) / "demo.svs", size_px=12_000)
        tiling = PreprocessingConfig(tissue_threshold=0.1)
        embedded = Model.from_preset("scattering").embed_slide(slide, tiling)
        for name in ("tiles", "map"):
            picture = embedded.plot(name).convert("RGB")
            picture = picture.resize(
                (WIDTH_PX, round(picture.height * WIDTH_PX / picture.width)), Image.Resampling.LANCZOS
            )
            picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE).save(
                folder / f"{name}.png", optimize=True
            )


if __name__ == "__main__":
    main()
