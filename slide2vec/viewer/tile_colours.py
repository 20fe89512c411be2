"""Colours of a slide's tiles: by principal components, by cluster, by how near they are to something."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from slide2vec.pictures import heat_colours, pca_colours, principal_components

__all__ = ["CLUSTERS", "as_hex", "cluster_colours", "clusters_of", "component_colours", "nearness_colours"]

Colours = NDArray[np.uint8]

#: How many clusters a slide's tiles are parted into.
CLUSTERS = 8
#: Components that clusters are found in: of embeddings of a thousand numbers the others are mostly noise, and
#: k-means of 100,000 tiles takes seconds.
_COMPONENTS = 32
#: Distinct to most kinds of colour vision: Okabe and Ito (2008), with grey for black, which is the stain's.
_PALETTE = np.array(
    [
        (230, 159, 0),
        (86, 180, 233),
        (0, 158, 115),
        (240, 228, 66),
        (0, 114, 178),
        (213, 94, 0),
        (204, 121, 167),
        (120, 120, 120),
    ],
    np.uint8,
)


def component_colours(embeddings: NDArray[np.floating[Any]]) -> Colours:
    """Of embeddings (N, D), as in maps of the slide (`slide2vec.pictures.pca_map`): (N, 3) uint8 sRGB."""
    return pca_colours(embeddings).round().astype(np.uint8)


def clusters_of(embeddings: NDArray[np.floating[Any]], count: int = CLUSTERS) -> NDArray[np.int32]:
    """The cluster of every tile, the largest is 0: k-means of the embeddings (N, D), brought to unit length,
    in their first components. The same embeddings give the same clusters."""
    tiles = len(embeddings)
    if tiles <= count:
        return np.arange(tiles, dtype=np.int32)
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    scores = principal_components(embeddings / np.maximum(lengths, 1e-12), _COMPONENTS).astype(np.float32)
    cv2.setRNGSeed(0)
    until = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 50, 1e-5)
    _, found, _ = cv2.kmeans(scores, count, None, until, 3, cv2.KMEANS_PP_CENTERS)  # type: ignore[call-overload]
    labels = np.asarray(found, np.int32).ravel()
    order = np.argsort(-np.bincount(labels, minlength=count), kind="stable")
    return np.argsort(order).astype(np.int32)[labels]


def cluster_colours(labels: NDArray[np.int32]) -> Colours:
    """Of clusters (N,): (N, 3) uint8 sRGB."""
    return _PALETTE[labels % len(_PALETTE)]


def nearness_colours(cosines: NDArray[np.floating[Any]]) -> Colours:
    """Dark violet for the least of the cosines (N,), yellow for the largest: (N, 3) uint8 sRGB."""
    return heat_colours(cosines)


def as_hex(colours: Colours) -> str:
    """Six digits for each, without anything between them."""
    return np.ascontiguousarray(colours).tobytes().hex()
