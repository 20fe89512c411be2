"""Reconcile the settings of a run with what its output directory holds: where files go, and which tiles are
used."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from math import isclose
from pathlib import Path
from typing import Any, NamedTuple

from slide2vec.artifacts.places import TILINGS, Kind, Owner, Place, features_place, owners, tiling_folders
from slide2vec.choices import SEGMENTATION_METHODS
from slide2vec.config import PreprocessingConfig
from slide2vec.errors import ConfigError
from slide2vec.slides import Slide
from slide2vec.tiling.previous_settings import (
    CHECKPOINT,
    PreviousTiles,
    any_previous,
    differences,
    given_options,
    previous_tiles,
    with_previous_options,
)

__all__ = ["geometry_of", "reconcile"]

logger = logging.getLogger(__name__)

#: Slides that an error names.
_MOST_NAMES = 3
_GEOMETRY = ("requested_spacing_um", "requested_tile_size_px", "overlap", "region_tile_multiple")


def reconcile(
    root: Path,
    slides: Sequence[Slide],
    config: PreprocessingConfig,
    kind: Kind,
    identities: Mapping[Kind, Mapping[str, Any]],
    tiled: AbstractSet[str] = frozenset(),
    beside: Sequence[Owner] = (),
) -> tuple[Place, Sequence[Slide], PreprocessingConfig]:
    """Compare what is asked for with what the output directory holds. Returns the folders, and the slides and
    the configuration with what they take over.

    A run that resumes takes over the tiles that are there, with the settings they were found with, unless
    the user gave others. Tiles that embeddings are of are never replaced by those of other settings.

    Args:
        root: the output directory.
        config: with requested_spacing_um and requested_tile_size_px resolved.
        kind: what the run makes.
        identities: of the encoder of each kind; empty where slides are only tiled.
        tiled: sample_ids of slides whose tiles are given.
        beside: encoders whose folders were found in this way, and that will write there in the same run.

    Raises:
        ConfigError: the directory holds other tiles than those that were asked for, and how they differ.
        ManifestError: a slide's own tiling options are wrong.
    """
    on_disk = owners(root)
    together = _by_folder([*on_disk, *beside])
    there, new = together[: len(on_disk)], together[len(on_disk) :]
    takes_over = bool(identities) and config.resume
    if config.read_coordinates_from is not None:
        tiling = root
    else:
        tiling, config = _tiling(root, there, new, config, identities, takes_over=takes_over)
        found = previous_tiles(tiling / "tiles", [s for s in slides if s.sample_id not in tiled], config)
        geometry = geometry_of(config)
        users = [
            owner
            for owner in (*there, *new)
            if owner.tiling == tiling and not (identities and not owner.unlike(identities, geometry))
        ]
        if takes_over:
            slides, config = _take_over(tiling, slides, config, found, users)
        else:
            _check_replaced(tiling, slides, config, found, users)
    if not identities:
        return Place(root, "", tiling, tiling), slides, config
    geometry = geometry_of(config)
    if config.read_coordinates_from is not None:
        geometry.pop("overlap")
    there = [*there, *new]
    features, name = features_place(root, there, kind, identities, geometry)
    same = [owner for owner in there if owner.preset == identities[kind]["name"]]
    if same and all(owner.folder != features for owner in there):
        differing = ", ".join(sorted(same[0].unlike(identities, geometry)))
        logger.warning(
            "%s has embeddings of %s with other settings (%s): they stay, and those of this run go to %s",
            *(same[0].folder, same[0].name, differing, features),
        )
    others = tuple(owner.folder for owner in there if owner.folder != features)
    return Place(root, name, features, tiling, others), slides, config


def _by_folder(found: Sequence[Owner]) -> list[Owner]:
    """One for each folder, with the artifacts of all that are in it: an encoder of slides shares that of its
    tile encoder."""
    merged: dict[Path, Owner] = {}
    for owner in found:
        before = merged.get(owner.folder, owner)
        merged[owner.folder] = replace(before, sidecars={**owner.sidecars, **before.sidecars})
    return list(merged.values())


def geometry_of(config: PreprocessingConfig) -> dict[str, Any]:
    """What of a configuration decides where tiles are, and how large."""
    return {name: getattr(config, name) for name in _GEOMETRY}


# which coordinates ---------------------------------------------------------------------------------


def _tiling(
    root: Path,
    there: Sequence[Owner],
    new: Sequence[Owner],
    config: PreprocessingConfig,
    identities: Mapping[Kind, Mapping[str, Any]],
    *,
    takes_over: bool,
) -> tuple[Path, PreprocessingConfig]:
    """The folder of the coordinates of this geometry, and the configuration with its overlap."""
    found: dict[Path, _Tiles] = {owner.tiling: _Tiles.of(owner) for owner in new}
    for folder in tiling_folders(root):
        if (each := any_previous(folder / "tiles", config)) is not None:
            found[folder] = _Tiles(each.size_px, each.spacing_um, each.overlap)
    free = takes_over and "overlap" not in config.model_fields_set
    fits = [
        folder
        for folder, each in found.items()
        if _same_tiles(each, config)
        and (free or each.overlap == config.overlap)
        and _same_pieces([owner for owner in (*there, *new) if owner.tiling == folder], config)
    ]
    if fits:
        own = {owner.tiling for owner in (*there, *new) if identities and not owner.unlike(identities, None)}
        folder = min(fits, key=lambda folder: folder not in own)
        overlap = found[folder].overlap
        if overlap != config.overlap:
            config = config.updated(overlap=overlap).set_only(config.model_fields_set)
        return folder, config
    if root not in found:
        return root, config
    if not there and not new:
        if takes_over:
            raise _other_tiles(root, _geometry_differences(found[root], config))
        return root, config  # tiled anew
    if takes_over:
        _check_chosen(there, config, identities)
    size = config.requested_region_size_px or config.requested_tile_size_px
    words = f"-overlap{config.overlap:g}" if config.overlap else ""
    words += f"-regions{config.region_tile_multiple}" if config.hierarchical else ""
    return root / TILINGS / f"{size}px-{config.requested_spacing_um:g}um{words}", config


class _Tiles(NamedTuple):
    """Of the tiles (or regions) in a folder: side in px, spacing in µm/px, overlap as a fraction."""

    size_px: int
    spacing_um: float
    overlap: float

    @classmethod
    def of(cls, owner: Owner) -> _Tiles:
        geometry = owner.geometry
        size = geometry["requested_tile_size_px"] * (geometry["region_tile_multiple"] or 1)
        return cls(size, geometry["requested_spacing_um"], geometry["overlap"])


def _same_tiles(earlier: _Tiles, config: PreprocessingConfig) -> bool:
    size = config.requested_region_size_px or config.requested_tile_size_px
    assert config.requested_spacing_um is not None
    return earlier.size_px == size and isclose(earlier.spacing_um, config.requested_spacing_um, rel_tol=1e-3)


def _same_pieces(users: Sequence[Owner], config: PreprocessingConfig) -> bool:
    """Whether pieces of tissue that are too small for these encoders are so for this one. Which those are
    depends on the tile where nobody says it, and regions of one size may be of tiles of several."""
    sizes = {owner.geometry.get("requested_tile_size_px", config.requested_tile_size_px) for owner in users}
    if not users or config.requested_tile_size_px in sizes:
        return True
    asked = {(owner.geometry.get("filtering") or {}).get("ref_tile_size") for owner in users}
    if None in asked:
        asked = {*asked - {None}, *sizes}
    return (config.filtering.ref_tile_size or config.requested_tile_size_px) in asked


def _geometry_differences(earlier: _Tiles, config: PreprocessingConfig) -> dict[str, tuple[Any, Any]]:
    size = config.requested_region_size_px or config.requested_tile_size_px
    both = {
        "tile size in px": (earlier.size_px, size),
        "spacing in µm/px": (earlier.spacing_um, config.requested_spacing_um),
        "overlap": (earlier.overlap, config.overlap),
    }
    return {name: pair for name, pair in both.items() if pair[0] != pair[1]}


def _check_chosen(
    there: Sequence[Owner], config: PreprocessingConfig, identities: Mapping[Kind, Mapping[str, Any]]
) -> None:
    """Refuse tiles of another geometry for an encoder that has embeddings there, unless they were asked for:
    an option was forgotten."""
    given = set(given_options(config))
    if "requested_region_size_px" in given:
        given.add("region_tile_multiple")
    for owner in there:
        names = set() if owner.unlike(identities, None) else owner.unlike(identities, geometry_of(config))
        if names and names.isdisjoint(given):
            differing = {name: (owner.geometry.get(name), getattr(config, name)) for name in sorted(names)}
            raise ConfigError(
                f"{owner.folder} has embeddings of {owner.name} with {_in_words(differing)}. Give the same "
                "settings to go on with those, say yours to have both, or choose another output directory"
            )


# with which settings -------------------------------------------------------------------------------


def _take_over(
    tiling: Path,
    slides: Sequence[Slide],
    config: PreprocessingConfig,
    found: Mapping[str, PreviousTiles],
    others: Sequence[Owner],
) -> tuple[Sequence[Slide], PreprocessingConfig]:
    conflicts: dict[str, tuple[Any, Any]] = {}
    names = []
    for slide in slides:
        if slide.sample_id not in found:
            continue
        earlier = found[slide.sample_id]
        method = earlier.options.get("segmentation_method", "hsv")
        if method not in SEGMENTATION_METHODS:
            raise ConfigError(
                f"the tiles in {tiling}/tiles were found with {method}, which is not known here: embed them "
                f"with --read-coordinates-from {tiling} (read_coordinates_from), or choose another output "
                "directory"
            )
        given = given_options(config, slide) | {"mask_path"}
        if others and method == config.segmentation.method:
            given = given | {CHECKPOINT}
        if slide.spacing_at_level_0 is not None:
            given = given | {"spacing_at_level_0"}
        differing = differences(earlier, slide, config)
        if wrong := {name: both for name, both in differing.items() if name in given}:
            conflicts |= wrong
            names.append(slide.sample_id)
    if conflicts:
        raise _other_tiles(tiling, conflicts, names, others)
    taken = found
    if not found and (one := any_previous(tiling / "tiles", config)) is not None and slides:
        return slides, with_previous_options([slides[0]], config, {slides[0].sample_id: one})[1]
    return with_previous_options(slides, config, taken)


def _check_replaced(
    tiling: Path,
    slides: Sequence[Slide],
    config: PreprocessingConfig,
    found: Mapping[str, PreviousTiles],
    others: Sequence[Owner],
) -> None:
    """Refuse to replace the tiles of embeddings that stay; warn of other tiles that are replaced."""
    differing = {
        slide.sample_id: wrong
        for slide in slides
        if slide.sample_id in found and (wrong := differences(found[slide.sample_id], slide, config))
    }
    if not differing:
        return
    all_of_them = {name: both for wrong in differing.values() for name, both in wrong.items()}
    if others:
        raise _other_tiles(tiling, all_of_them, list(differing), others)
    logger.warning(
        "%s/tiles has tiles of %d slides that were found with other settings (%s): they are replaced",
        *(tiling, len(differing), _in_words(all_of_them)),
    )


def _other_tiles(
    tiling: Path,
    differing: Mapping[str, tuple[Any, Any]],
    names: Sequence[str] = (),
    others: Sequence[Owner] = (),
) -> ConfigError:
    of = ""
    if names:
        more = f" and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
        of = f" of {', '.join(names[:_MOST_NAMES])}{more}"
    whose = (
        f" They are those of the embeddings of {', '.join(owner.name for owner in others)}." if others else ""
    )
    anew = "" if others else ", --no-resume (resume=False) to tile the slides anew"
    return ConfigError(
        f"{tiling}/tiles has tiles{of} with {_in_words(differing)}.{whose} Give the same settings to go on "
        f"with those{anew}, or choose another output directory"
    )


def _in_words(differing: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(
        f"{_option(name)} {_value(found)}, not {_value(asked)}" for name, (found, asked) in differing.items()
    )


def _option(name: str) -> str:
    for section in ("segmentation", "filtering", "qc"):
        if name.startswith(f"{section}_"):
            return f"{section}.{name.removeprefix(f'{section}_')}"
    return name


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
