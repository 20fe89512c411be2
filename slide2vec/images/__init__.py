"""Ready images (patches that somebody has cut out): an embedding, or a grid of patch tokens, of each; such
grids of regions of slides, too.

`specs` and `dense_options` are what users give, `pixels` opens and fits an image, `reuse` decides what an
earlier call has done. `pooled` embeds; `dense_encoder` makes grids, over the windows of `windows`, for
`dense_regions` and `dense_images`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slide2vec.lazy import lazy_attributes

if TYPE_CHECKING:
    from slide2vec.images.dense_encoder import DenseEncodeKit, prepare_dense_encoder
    from slide2vec.images.dense_images import embed_images_dense
    from slide2vec.images.dense_options import DenseImageOptions, DenseOptions, SlideRegions
    from slide2vec.images.dense_regions import embed_regions_dense
    from slide2vec.images.differences import dense_identity_differences, pooled_identity_differences
    from slide2vec.images.pooled import embed_images
    from slide2vec.images.reuse import MISSING_FIELD
    from slide2vec.images.slide_tokens import PatchTokensArtifact, check_patch_tokens, save_patch_tokens
    from slide2vec.images.specs import ImageLike, ImageSpec, as_images
    from slide2vec.images.windows import DenseEncodeGeometry

__all__ = [
    "MISSING_FIELD",
    "DenseEncodeGeometry",
    "DenseEncodeKit",
    "DenseImageOptions",
    "DenseOptions",
    "ImageLike",
    "ImageSpec",
    "PatchTokensArtifact",
    "SlideRegions",
    "as_images",
    "check_patch_tokens",
    "dense_identity_differences",
    "embed_images",
    "embed_images_dense",
    "embed_regions_dense",
    "pooled_identity_differences",
    "prepare_dense_encoder",
    "save_patch_tokens",
]

#: Loaded on first use: `import slide2vec` names some of them.
_HOMES = {
    "DenseEncodeGeometry": "windows",
    "DenseEncodeKit": "dense_encoder",
    "DenseImageOptions": "dense_options",
    "DenseOptions": "dense_options",
    "ImageLike": "specs",
    "ImageSpec": "specs",
    "MISSING_FIELD": "reuse",
    "PatchTokensArtifact": "slide_tokens",
    "SlideRegions": "dense_options",
    "as_images": "specs",
    "check_patch_tokens": "slide_tokens",
    "dense_identity_differences": "differences",
    "embed_images": "pooled",
    "embed_images_dense": "dense_images",
    "embed_regions_dense": "dense_regions",
    "pooled_identity_differences": "differences",
    "prepare_dense_encoder": "dense_encoder",
    "save_patch_tokens": "slide_tokens",
}

__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
