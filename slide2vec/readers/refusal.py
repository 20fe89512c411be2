"""Why a file is not read as a slide, and how to make it one that is."""

from __future__ import annotations

__all__ = ["CONVERT", "COPY_AGAIN", "EXPORT", "Refusal"]

COPY_AGAIN = "copy it again from its source"

#: For files that libvips opens.
CONVERT = (
    "convert it: vips tiffsave IN OUT.tif --tile --tile-width 256 --tile-height 256 --pyramid --bigtiff "
    "--compression jpeg --Q 90"
)
#: For files that only the vendors' libraries or Bio-Formats open.
EXPORT = (
    "export it as a tiled pyramid: in QuPath with File > Export images > OME TIFF, or with "
    "bfconvert -tilex 512 -tiley 512 -pyramid-resolutions 6 -pyramid-scale 2 IN OUT.ome.tiff"
)


class Refusal(ValueError):
    """A file that holds no slide that can be read: what was found and what to do, without its name."""
