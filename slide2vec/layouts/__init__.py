"""The embeddings of a run in the folders and under the keys that other tools expect, and as Zarr.

One module per tool (`slide2vec.choices.LAYOUTS`), a `LayoutModule`. Each was written by the tool's own
sources and is tried with its own reader; docs/formats.md says which.
"""

from __future__ import annotations

from slide2vec.layouts.in_layout import export_layout

__all__ = ["export_layout"]
