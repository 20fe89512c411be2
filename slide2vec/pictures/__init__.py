"""Pictures: maps of a slide coloured by principal components or by attention, captions below them, files."""

from slide2vec.pictures.footers import slide_size, with_footer
from slide2vec.pictures.maps import (
    attention_key,
    attention_map,
    attention_overlay,
    heat_colours,
    pca_colours,
    pca_key,
    pca_map,
    principal_components,
    variance_shares,
)
from slide2vec.pictures.picture_files import encoded_picture, write_picture
from slide2vec.pictures.squares import lay_squares

__all__ = [
    "attention_key",
    "attention_map",
    "attention_overlay",
    "encoded_picture",
    "heat_colours",
    "lay_squares",
    "pca_colours",
    "pca_key",
    "pca_map",
    "principal_components",
    "slide_size",
    "variance_shares",
    "with_footer",
    "write_picture",
]
