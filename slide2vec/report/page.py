"""The page of a report: frame, style and script are files beside this one, slides are JSON within it.

All text of slides goes in as JSON and is shown as text: nothing of it is ever markup.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from slide2vec.pictures import encoded_picture, pca_key
from slide2vec.version import __version__

__all__ = ["own_file", "page_of"]


def page_of(run: Mapping[str, Any], slides: Sequence[Mapping[str, Any]]) -> str:
    """The page, as text.

    Args:
        run: of the run as a whole, see `ReportedRun.facts`.
        slides: of each, see `ReportedSlide.facts`, with `pictures`.
    """
    data = json.dumps({"run": run, "slides": slides}, ensure_ascii=False, separators=(",", ":"))
    key = base64.b64encode(encoded_picture(pca_key(92), ".png")).decode()
    return Template(own_file("page.html")).substitute(
        version=__version__,
        title=escape(f"Report of {run['directory']}"),
        style=own_file("page.css"),
        script=own_file("elements.js") + own_file("page.js"),
        key=f"data:image/png;base64,{key}",
        # within a script element nothing but its end is markup
        data=data.replace("<", "\\u003c"),
    )


def own_file(name: str) -> str:
    """A file of this room, as text: "page.css" and "elements.js" are the viewer's, too."""
    return files("slide2vec.report").joinpath(name).read_text(encoding="utf-8")
