"""Labels of annotation masks: their names, the values that they have in a mask, and slides named by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slide2vec.errors import ConfigError, nearest_names

__all__ = [
    "MERGED",
    "TISSUE",
    "checked_colors",
    "checked_coverage",
    "checked_mapping",
    "class_folder",
    "class_name",
    "split_class_name",
]

#: The label whose files are where those of a run without classes are, and what stands for all classes at
#: once; as HS2P and slide2vec 7.1.4 have it.
TISSUE, MERGED = "tissue", "merged"
#: Bytes; file systems allow 255.
_LONGEST = 100
#: How files beside the folders of classes end, so that none has the name of such a folder.
_SUFFIXES = (
    ".csv",
    ".h5",
    ".jpg",
    ".json",
    ".npz",
    ".parquet",
    ".pt",
    ".png",
    ".safetensors",
    ".tar",
    ".zarr",
)


def class_folder(annotation: str | None) -> str | None:
    """The folder of a class below `tile_embeddings` and the like; None for those that have none."""
    return None if annotation in (None, "", TISSUE, MERGED) else annotation


def class_name(annotation: str | None, sample_id: str) -> str:
    """What the tiles of a class of a slide are called: "tumor/a", the place of their files; "a" where the
    class has no folder."""
    folder = class_folder(annotation)
    return sample_id if folder is None else f"{folder}/{sample_id}"


def split_class_name(name: str) -> tuple[str | None, str]:
    """The class that has a folder, or None, and the sample_id: "tumor/a" -> ("tumor", "a")."""
    folder, _, sample_id = name.rpartition("/")
    return folder or None, sample_id


def checked_mapping(given: Any) -> dict[str, tuple[int, ...]]:
    """Label -> its values in a mask, of a mapping to a value or to several.

    Raises:
        ConfigError: a name cannot be that of a folder, or a value is no number from 0 to 255 or given twice.
    """
    found: dict[str, tuple[int, ...]] = {}
    owners: dict[int, str] = {}
    for label, entry in _items(given):
        _check_name(label)
        values = tuple(entry) if isinstance(entry, Sequence) and not isinstance(entry, str) else (entry,)
        if not values:
            raise ConfigError(f"label {label!r} has no value; give the number that it has in masks")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 255:
                raise ConfigError(
                    f"label {label!r} has the value {value!r}; values are whole numbers, 0 to 255"
                )
            if value in owners:
                raise ConfigError(f"labels {owners[value]!r} and {label!r} both have the value {value}")
            owners[value] = label
        found[label] = values
    return found


def checked_coverage(given: Any, labels: Sequence[str]) -> dict[str, float]:
    """Label -> least share of a tile, for those that are sampled.

    Raises:
        ConfigError: a label is unknown, a share is none, or no label is sampled.
    """
    found: dict[str, float] = {}
    for label, share in _items(given):
        if label not in labels:
            raise ConfigError(
                f"there is no label {label!r} in pixel_mapping. {nearest_names(str(label), labels)}"
            )
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ConfigError(f"label {label!r} has {share!r}; a least coverage is a fraction, 0 to 1")
        found[label] = float(share)
    if not found:
        raise ConfigError(
            f"no label is sampled: say which share of a tile one has to cover, "
            f"{{{next(iter(labels), TISSUE)!r}: 0.5}} say"
        )
    return found


def checked_colors(given: Any, labels: Sequence[str]) -> dict[str, tuple[int, int, int] | None] | None:
    """Label -> red, green, blue of each label, or None where it is not drawn.

    Raises:
        ConfigError: a label is missing or unknown, or a colour is none.
    """
    if given is None:
        return None
    found: dict[str, tuple[int, int, int] | None] = {}
    for label, color in _items(given):
        if color is not None and not _is_color(color):
            raise ConfigError(
                f"label {label!r} has the colour {color!r}; colours are [0 to 255] * 3, or none"
            )
        found[label] = None if color is None else (int(color[0]), int(color[1]), int(color[2]))
    if missing := sorted(set(labels) ^ found.keys()):
        raise ConfigError(
            f"colours and pixel_mapping have different labels ({', '.join(missing)} in one of them only); "
            "give each label a colour, or none (null)"
        )
    return found


def _is_color(given: Any) -> bool:
    return (
        isinstance(given, Sequence)
        and not isinstance(given, str)
        and len(given) == 3
        and all(isinstance(c, int) and not isinstance(c, bool) and 0 <= c <= 255 for c in given)
    )


def _items(given: Any) -> Sequence[tuple[str, Any]]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"labels are given as a mapping, {{label: …}}, got {given!r}")
    return list(given.items())


def _check_name(label: Any) -> None:
    """Refuse a name that could not be that of a folder."""
    if not isinstance(label, str) or not label.strip() or label in {".", ".."}:
        raise ConfigError(f"a label is a non-empty text, got {label!r}")
    if label == MERGED:
        raise ConfigError(f"the label {MERGED!r} stands for all labels at once; call it otherwise")
    wrong = any(char in label for char in "/\\\0") or not label.isprintable()
    if wrong or len(label.encode(errors="replace")) > _LONGEST or label.lower().endswith(_SUFFIXES):
        raise ConfigError(
            f"label {label[:_LONGEST]!r} becomes the name of a folder: at most {_LONGEST} bytes, printable, "
            f'without "/" and "\\", and not ending as files do ({", ".join(_SUFFIXES)})'
        )
