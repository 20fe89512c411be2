"""Where each encoder's files are in an output directory that several share. docs/formats.md has the layout.

The first encoder's are in the directory itself, those of every further one in `encoders/<name>/`, which is
laid out in the same way. Coordinates and previews are those of a geometry (size, spacing and overlap of the
tiles): the first one's are in the directory itself, further ones' in `tilings/<geometry>/`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from slide2vec.artifacts.records import SIDECAR, read_metadata
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.errors import ArtifactError, ConfigError
from slide2vec.files import as_path, entries, names_below
from slide2vec.labels import class_folder

__all__ = [
    "ARTIFACT_FOLDERS",
    "ENCODERS",
    "KINDS",
    "TILINGS",
    "Geometry",
    "Kind",
    "Owner",
    "Place",
    "encoder_of",
    "features_place",
    "names_of_all",
    "owners",
    "owners_called",
    "tell_what_is_not_written",
    "tiling_folders",
    "unlike",
    "with_output_dir",
]

Kind: TypeAlias = Literal["tile", "hierarchical", "slide", "patient"]
KINDS: tuple[Kind, ...] = ("tile", "hierarchical", "slide", "patient")
ENCODERS, TILINGS = "encoders", "tilings"
#: Of an encoder's features and pictures.
ARTIFACT_FOLDERS = (*(f"{kind}_embeddings" for kind in KINDS), "slide_latents", "preview/map")

#: Fields of an identity that make it another encoder where they differ. `transform` is none of them: it once
#: differed because of a bug that was fixed.
_ENCODER = ("name", "aggregator", "output_variant", "precision", "runtime", "input_size_px", "weights")
#: `requested_spacing_um`, `requested_tile_size_px`, `overlap`, `region_tile_multiple` (None without regions).
Geometry: TypeAlias = Mapping[str, Any]
#: Sidecars that are tried before a folder counts as one without any that can be read.
_TRIES = 16

logger = logging.getLogger(__name__)


def with_output_dir(execution: ExecutionOptions | None, method: str) -> tuple[ExecutionOptions, Path]:
    """The options of a call that writes files, and where to.

    Raises:
        ConfigError: they name no directory.
    """
    if execution is None or execution.output_dir is None:
        raise ConfigError(f"{method} writes files: give ExecutionOptions(output_dir=…)")
    return execution, execution.output_dir


def tell_what_is_not_written(execution: ExecutionOptions, config: PreprocessingConfig) -> None:
    """Warn where a call in memory is given a directory into which it writes nothing: slide2vec 7 writes
    embeddings there."""
    preview = config.preview
    if execution.output_dir is None or config.save_tiles or not config.on_the_fly:
        return
    if not (preview.save_mask_preview or preview.save_tiling_preview):
        logger.warning(
            "embeddings are given back and not written into %s: Pipeline(model, …).run(slides) writes them",
            execution.output_dir,
        )


@dataclass(frozen=True)
class Place:
    """Where the files of one encoder are.

    Attributes:
        root: the output directory; the lock, the process list and logs are there.
        name: of the encoder in the process list; "" where slides are only tiled.
        features: the folder of `tile_embeddings/` and the like, of config.yaml and of maps.
        tiling: the folder of `tiles/` and of the previews of tissue and tiles.
        others: the features folders of other encoders, whose embeddings of tiles may serve.
    """

    root: Path
    name: str
    features: Path
    tiling: Path
    others: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Owner:
    """An encoder whose embeddings are in a folder, as some of its sidecars say.

    Attributes:
        root: the output directory that the folder is of.
        sidecars: one of each kind of artifact.
    """

    root: Path
    folder: Path
    sidecars: Mapping[Kind, Mapping[str, Any]]

    @property
    def name(self) -> str:
        """Its name in the process list and in messages: that of the preset, or with what distinguishes it
        from others."""
        preset = self.preset
        return preset if self.folder == self.root or self.folder.name == _safe(preset) else self.folder.name

    def name_of(self, preset: str) -> str:
        """The name in the process list of one of its encoders, which are several where a model of slides or
        patients is in the folder of its tile encoder."""
        if self.folder == self.root:
            return preset
        for named in sorted(map(_safe, {preset, *self._presets}), key=len, reverse=True):
            rest = self.folder.name.removeprefix(named)
            if self.folder.name == named or (rest != self.folder.name and rest.startswith("-")):
                return _safe(preset) + rest if rest else preset
        return self.name

    @property
    def names(self) -> set[str]:
        """Of all its encoders, in the process list."""
        return {self.name, *map(self.name_of, self._presets)}

    @property
    def _presets(self) -> list[str]:
        return [str(sidecar.get("encoder_name") or "unknown") for sidecar in self.sidecars.values()]

    @property
    def preset(self) -> str:
        """Of its highest level."""
        kind = next(kind for kind in reversed(KINDS) if kind in self.sidecars)
        return str(self.sidecars[kind].get("encoder_name") or "unknown")

    @property
    def tiling(self) -> Path:
        """The folder of its `tiles/` and previews."""
        for sidecar in self.sidecars.values():
            path = _coordinates(sidecar)
            if path is not None and path.parents[2].name == TILINGS:
                return self.root / TILINGS / path.parents[1].name
        return self.root

    @property
    def geometry(self) -> Geometry:
        """Of its tiles, as far as it is known."""
        known = (_geometry(sidecar.get("compatibility")) for sidecar in self.sidecars.values())
        return next((found for found in known if found is not None), {})

    def unlike(self, identities: Mapping[Kind, Mapping[str, Any]], geometry: Geometry | None) -> set[str]:
        """What differs between it and an encoder: names of `_ENCODER`, "below", names of a geometry; and
        "kind" where they have no kind of artifact in common.

        Args:
            identities: of the encoder of each kind, `Model.identity()`.
            geometry: of its tiles; None = whatever it is.
        """
        found: set[str] = set()
        common = 0
        for kind, sidecar in self.sidecars.items():
            asked = identities.get(kind)
            if asked is None and kind in ("tile", "hierarchical"):
                asked = identities.get("tile") or identities.get("hierarchical")
            if asked is not None:
                common += 1
                found |= unlike(encoder_of(sidecar), asked)
                found |= set() if geometry is None else _other_geometry(sidecar, geometry)
        below, slides = self._below_patients, identities.get("slide")
        if below is not None and slides is not None:
            found |= unlike(below, slides)
        return found if common else {"kind"}

    @property
    def _below_patients(self) -> Mapping[str, Any] | None:
        """The encoder of slides that one of patients builds on, which may write its embeddings here, too: the
        folder is none for those of another, or that of patients would not be found again."""
        if "patient" not in self.sidecars or "slide" in self.sidecars:
            return None
        below = encoder_of(self.sidecars["patient"]).get("below")
        return below if isinstance(below, Mapping) else None


def owners(root: Path) -> list[Owner]:
    """The encoders that have embeddings in an output directory; the one of the directory itself first."""
    folders = [root, *sorted(entries(root / ENCODERS), key=lambda path: path.name)]
    found = [Owner(root, folder, dict(_sidecars(folder))) for folder in folders]
    return [owner for owner in found if owner.sidecars]


def owners_called(name: str, there: Sequence[Owner]) -> list[Owner]:
    """Those of that name, or folder; else the one that has an encoder of that name among others."""
    own = [owner for owner in there if name in (owner.name, owner.folder.name)]
    return own or [owner for owner in there if name in owner.names][:1]


def names_of_all(there: Sequence[Owner]) -> list[str]:
    """What may be asked for: the names of all their encoders."""
    return list(dict.fromkeys(name for owner in there for name in sorted(owner.names)))


def tiling_folders(root: Path) -> list[Path]:
    """Folders that may hold `tiles/`: the output directory, then those of further geometries."""
    return [root, *sorted(entries(root / TILINGS), key=lambda path: path.name)]


def features_place(
    root: Path,
    there: Sequence[Owner],
    main: Kind,
    identities: Mapping[Kind, Mapping[str, Any]],
    geometry: Geometry | None,
) -> tuple[Path, str]:
    """The folder of an encoder's embeddings, new or there already, and its name in the process list.

    Args:
        there: `owners(root)`.
        main: what it makes.
        identities, geometry: as for `Owner.unlike`.
    """
    preset = str(identities[main]["name"])
    unlikes = [owner.unlike(identities, geometry) for owner in there]
    for owner, found in zip(there, unlikes, strict=True):
        if not found:
            return owner.folder, owner.name_of(preset)
    if all(owner.folder != root for owner in there):
        return root, preset
    same = [found for owner, found in zip(there, unlikes, strict=True) if owner.preset == preset]
    name = _safe(preset) + _suffix(set().union(*same), identities[main], geometry or {})
    if any(owner.folder.name == name for owner in there) or (same and name == _safe(preset)):
        name += f"-{_digest(identities[main], geometry)}"
    return root / ENCODERS / name, preset if name == _safe(preset) else name


def unlike(recorded: Mapping[str, Any], asked: Mapping[str, Any]) -> set[str]:
    """The fields by which two encoders differ; a field that one of them lacks is ignored."""
    found = {
        name
        for name in _ENCODER
        if ((name in recorded and name in asked) or name == "aggregator")
        and recorded.get(name) != asked.get(name)
    }
    below = recorded.get("below"), asked.get("below")
    if isinstance(below[0], Mapping) and isinstance(below[1], Mapping) and unlike(below[0], below[1]):
        found.add("below")
    return found


def _sidecars(folder: Path) -> Iterator[tuple[Kind, Mapping[str, Any]]]:
    for kind in KINDS:
        place = folder / f"{kind}_embeddings"
        for name in names_below(place, SIDECAR)[:_TRIES]:
            try:
                yield kind, read_metadata(place / f"{name}{SIDECAR}")
                break
            except ArtifactError:
                continue


def encoder_of(sidecar: Mapping[str, Any]) -> Mapping[str, Any]:
    """The identity of an encoder, as far as a sidecar says it."""
    compatibility = sidecar.get("compatibility")
    encoder = compatibility.get("encoder") if isinstance(compatibility, Mapping) else None
    recorded = encoder if isinstance(encoder, Mapping) else {}
    return {"name": sidecar.get("encoder_name"), **recorded}


def _other_geometry(sidecar: Mapping[str, Any], asked: Geometry) -> set[str]:
    recorded = _geometry(sidecar.get("compatibility"))
    if recorded is None:
        return set()
    made = {"region_tile_multiple": None, **recorded}
    return {name for name, value in asked.items() if name in made and made[name] != value}


def _geometry(compatibility: Any) -> Mapping[str, Any] | None:
    """What the identity of an embedding, or of one of a patient's slides, says of tiles."""
    if not isinstance(compatibility, Mapping):
        return None
    if isinstance(slides := compatibility.get("slides"), Mapping):
        return next((found for each in slides.values() if (found := _geometry(each)) is not None), None)
    geometry = compatibility.get("geometry")
    return geometry if isinstance(geometry, Mapping) else None


def _coordinates(sidecar: Mapping[str, Any]) -> Path | None:
    """Of coordinate files that a sidecar names, as if they were of no class."""
    slides = sidecar.get("slides")
    for each in [sidecar, *(slides.values() if isinstance(slides, Mapping) else ())]:
        path = each.get("coordinates_meta_path") if isinstance(each, Mapping) else None
        if isinstance(path, str) and len(as_path(path).parents) > 3:
            found = as_path(path)
            return found.parents[1] / found.name if class_folder(each.get("annotation")) else found
    return None


def _safe(text: str) -> str:
    """As a folder's name: "timm:resnet18" -> "timm-resnet18"."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-")[:100] or "encoder"


def _suffix(names: set[str], encoder: Mapping[str, Any], geometry: Geometry) -> str:
    """What distinguishes an encoder from others of its preset."""
    tiles = encoder
    while isinstance(tiles.get("below"), Mapping):
        tiles = tiles["below"]
    multiple = geometry.get("region_tile_multiple")
    words = {
        "aggregator": encoder.get("aggregator"),
        "output_variant": encoder.get("output_variant"),
        "precision": tiles.get("precision"),
        "runtime": tiles.get("runtime"),
        "input_size_px": f"input{tiles.get('input_size_px')}px",
        "weights": _digest(encoder.get("weights"))[:8],
        "below": _digest(encoder.get("below"))[:8],
        "requested_tile_size_px": f"{geometry.get('requested_tile_size_px')}px",
        "requested_spacing_um": f"{geometry.get('requested_spacing_um'):g}um" if geometry else None,
        "overlap": f"overlap{geometry.get('overlap')}",
        "region_tile_multiple": f"regions{multiple}" if multiple else "tiles",
    }
    return "".join(f"-{_safe(str(word))}" for name, word in words.items() if name in names and word)


def _digest(*what: Any) -> str:
    text = json.dumps(what, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
