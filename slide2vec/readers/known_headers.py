"""JPEG tiles that begin and end as others that a strict decoder took.

To decode each of them on the CPU is too dear where a GPU decodes them: one that begins with a header known to
be good and ends with the end-of-image marker is accepted; any other is decoded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from slide2vec.readers.codecs import check_jpeg
from slide2vec.readers.tile_table import TileFormat

__all__ = ["KnownHeaders"]

_HEADER_BYTES = 2048
_END, _START_OF_SCAN = b"\xff\xd9", b"\xff\xda"
#: Files whose tiles carry their own Huffman tables have a header per tile: remember only some.
_MOST_HEADERS = 32


class KnownHeaders:
    """How good JPEG tiles of a file begin. Safe to use from several threads.

    Args:
        forms: how the tiles of each level are coded.
    """

    def __init__(self, forms: Sequence[TileFormat]) -> None:
        self._forms = forms
        self._known: list[list[bytes]] = [[] for _ in forms]

    def unknown(self, level: int, jpegs: Sequence[bytes]) -> Iterator[int]:
        """Which of them are to be given to `check`, told one by one: the others begin and end as a whole tile
        that it took."""
        known = self._known[level]
        return (
            number
            for number, jpeg in enumerate(jpegs)
            if not (jpeg.startswith(tuple(known)) and _END in jpeg[-4:])
        )

    def check(self, level: int, jpeg: bytes, shown: tuple[int, int]) -> None:
        """Decode a tile strictly, and remember how it begins. See `check_jpeg`."""
        form, known = self._forms[level], self._known[level]
        size = check_jpeg(jpeg, form, shown)
        head = jpeg[:_HEADER_BYTES]
        scan = head.find(_START_OF_SCAN)
        if scan > 0 and size == (form.height, form.width) and len(known) < _MOST_HEADERS:
            known.append(head[: scan + 2 + int.from_bytes(head[scan + 2 : scan + 4], "big")])
