"""Writing the report of a run: what each slide is, its pictures, and the page around them."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slide2vec.cpus import job_cpus
from slide2vec.errors import ConfigError
from slide2vec.files import as_path, atomic_path, is_remote
from slide2vec.pictures import encoded_picture
from slide2vec.report.page import page_of
from slide2vec.report.slide_facts import ReportedRun, ReportedSlide
from slide2vec.report.slide_images import DrawnPicture, draw_images

__all__ = ["MOST_INLINE", "PICTURE_PX", "WrittenReport", "write_report"]

#: Slides of a page that holds its pictures itself; those of more are in a folder beside it.
MOST_INLINE = 200
#: Longer side of a picture.
PICTURE_PX = 400
_QUALITY = 82


@dataclass(frozen=True, kw_only=True)
class WrittenReport:
    """A report that was written.

    Attributes:
        path: of the page.
        pictures_dir: of its pictures; None where they are in the page.
        slides: how many are on it.
        states: how many of these are in which state.
        without_picture: slide -> why it cannot be drawn.
    """

    path: Path
    pictures_dir: Path | None
    slides: int
    states: Mapping[str, int]
    without_picture: Mapping[str, str]


def write_report(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    slides_dir: str | os.PathLike[str] | None = None,
    pictures: bool = True,
    picture_px: int = PICTURE_PX,
    most_inline: int = MOST_INLINE,
    progress: Callable[[int, int], None] | None = None,
) -> WrittenReport:
    """Write one HTML page of a run, which needs nothing else to be read: no network, no server.

    Slides are opened again for their pictures; those that are gone are drawn over white, and the page says
    so. Of more than `most_inline` slides the pictures are in a folder beside the page.

    Args:
        run: output directory of a run or of `slide2vec tile`, or its URL.
        output: of the page, .html; by default report.html in the run's directory.
        slides_dir: where the slides are now, if they were moved.
        pictures: False writes the table alone, in seconds.
        picture_px: longer side of a picture.
        progress: called with the slides that are done, and all.

    Raises:
        ArtifactError: it is not the output directory of a run.
        ConfigError: the output is no .html file, or behind a URL with pictures beside it.
        OutputError: a file cannot be written.
    """
    directory = as_path(run)
    path = directory / "report.html" if output is None else as_path(output)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--output {path}: the report is a page, name it .html")
    moved = None if slides_dir is None else as_path(slides_dir)
    found = ReportedRun(directory, path.parent, moved)
    beside = len(found.slides) > most_inline and pictures
    if beside and is_remote(path):
        raise ConfigError(
            f"{path} is behind a URL, and pictures of {len(found.slides):,} slides lie beside it: give a "
            "local --output, or --no-pictures"
        )
    folder = path.with_name(f"{path.stem}_files") if beside else None

    def one(numbered: tuple[int, ReportedSlide]) -> dict[str, Any]:
        number, slide = numbered
        slide.load()
        facts = slide.facts()
        drawn = draw_images(slide, picture_px) if pictures else []
        slide.tilings.clear()  # of 10,000 slides they take gigabytes
        facts["pictures"] = [_as_json(image, folder, number, index) for index, image in enumerate(drawn)]
        return facts

    rows = []
    with ThreadPoolExecutor(min(8, job_cpus())) as pool:
        for facts in pool.map(one, enumerate(found.slides)):
            rows.append(facts)
            if progress is not None:
                progress(len(rows), len(found.slides))
    about = found.facts()
    with atomic_path(path) as temporary:
        temporary.write_text(page_of(about, rows), encoding="utf-8")
    return WrittenReport(
        path=path,
        pictures_dir=folder,
        slides=len(rows),
        states=about["states"],
        without_picture={
            row["id"]: picture["text"] for row in rows for picture in row["pictures"] if not picture["src"]
        },
    )


def _as_json(image: DrawnPicture, folder: Path | None, number: int, index: int) -> dict[str, str]:
    """A picture, in itself or in a file of the folder, whose name is made of numbers only."""
    if image.pixels is None:
        return {"kind": image.kind, "text": image.text, "src": ""}
    data = encoded_picture(image.pixels, ".jpg", _QUALITY)
    if folder is None:
        source = "data:image/jpeg;base64," + base64.b64encode(data).decode()
    else:
        name = f"{number:06d}-{index}.jpg"
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes(data)
        source = f"{folder.name}/{name}"
    return {"kind": image.kind, "text": image.text, "src": source}
