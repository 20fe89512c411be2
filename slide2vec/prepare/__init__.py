"""Preparing tiles: cut from supertiles and brought to the requested size, then to the encoder's input."""

from slide2vec.prepare.choose import Preparer, choose_preparer
from slide2vec.prepare.cut import cut_tiles

__all__ = ["Preparer", "choose_preparer", "cut_tiles"]
