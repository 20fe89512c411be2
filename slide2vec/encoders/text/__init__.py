"""Text sides of vision-language presets: texts into the space that is shared with images."""

from __future__ import annotations

from slide2vec.encoders.text.side import TextSide, load_text_side, text_spec

__all__ = ["TextSide", "load_text_side", "text_spec"]
