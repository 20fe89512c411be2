"""Files that are recognised and that no back end reads, each with its own message."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from slide2vec.readers.refusal import CONVERT, COPY_AGAIN, EXPORT

__all__ = ["unsupported_reason"]

#: How pictures begin. A CZI begins with ZISRAWFILE: OpenSlide reads some.
_PICTURES = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"\x00\x00\x00\x0cjP  ": "a JPEG 2000 image (JP2)",
    b"\xff\x4f\xff\x51": "a JPEG 2000 image (J2K)",
    b"\x00\x00\x00\x0cJXL ": "a JPEG XL image",
    b"II\xbc": "a JPEG XR image",
}
_OTHERS = {
    b"%PDF": "a PDF",
    b"PK\3\4": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"\x89HDF": "an HDF5 file",
}
_TEXTS = {b"{": "a text of JSON (annotations?)", b"<": "a text of XML (annotations?)"}
#: A byte order mark and blanks.
_BEFORE_TEXT = b"\xef\xbb\xbf \t\r\n"
#: Suffixes of vendors' files that only the vendors' own libraries or Bio-Formats open.
_SUFFIXES = {
    ".isyntax": "a Philips iSyntax file",
    ".kfb": "a KFBio file",
    ".lif": "a Leica LIF file",
    ".mds": "a Motic file",
    ".mdsx": "a Motic file",
    ".nd2": "a Nikon ND2 file",
    ".oir": "an Olympus OIR file",
    ".sdpc": "an SQS file",
    ".tron": "a 3DHISTECH TRON file",
    ".zvi": "a Zeiss ZVI file",
}


def unsupported_reason(path: Path, opened: Path, head: bytes) -> str | None:
    """Why a file is none that a slide can be read from, and what to do; None where it may be one.

    Args:
        path: the file.
        opened: the copy of it that is opened.
        head: its first bytes.
    """
    suffix = path.suffix.lower()
    if suffix == ".vsi":
        folder = path.parent / f"_{path.stem}_"
        lost = "" if folder.is_dir() else ", which is not there"
        return (
            f"is the index of an Olympus slide: its pixels lie beside it, in the folder {folder.name}{lost}, "
            f"and no back end reads them; {EXPORT}"
        )
    if suffix == ".mrxs":
        return _mrxs(opened)
    if suffix in _SUFFIXES:
        return f"is {_SUFFIXES[suffix]}, which no back end reads; {EXPORT}"
    if picture := _begins(head, _PICTURES):
        return f"is {picture}, not a slide; {CONVERT}, and give spacing_at_level_0 (µm/px)"
    other = _begins(head, _OTHERS) or _begins(head.lstrip(_BEFORE_TEXT), _TEXTS)
    return f"is {other}, not a slide; give the slide file itself" if other else None


def _begins(head: bytes, kinds: Mapping[bytes, str]) -> str | None:
    return next((what for magic, what in kinds.items() if head.startswith(magic)), None)


def _mrxs(opened: Path) -> str | None:
    folder = opened.with_suffix("")
    if not folder.is_dir():
        return (
            f"is the index of a 3DHISTECH slide: its pixels are in the folder {folder.name} beside it, which "
            "is not there; copy that folder, too, and rename neither of them"
        )
    if not (folder / "Slidedat.ini").is_file():
        return (
            f"is the index of a 3DHISTECH slide whose folder {folder.name} has no Slidedat.ini: it is "
            f"incomplete; {COPY_AGAIN}"
        )
    return None
