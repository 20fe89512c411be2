"""Ready images (patches that somebody has cut out): an embedding of each, beside the slides' own path.

`specs` is what users give, `pixels` opens and fits an image, `reuse` decides what an earlier run has done,
`pooled` embeds the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slide2vec.lazy import lazy_attributes

if TYPE_CHECKING:
    from slide2vec.images.pooled import embed_images
    from slide2vec.images.specs import ImageLike, ImageSpec, as_images

__all__ = ["ImageLike", "ImageSpec", "as_images", "embed_images"]

#: Loaded on first use: `import slide2vec` names ImageSpec.
_HOMES = {
    "ImageLike": "specs",
    "ImageSpec": "specs",
    "as_images": "specs",
    "embed_images": "pooled",
}

__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
