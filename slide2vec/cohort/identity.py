"""What decides a slide's embeddings (kept in the sidecar's `compatibility`), and the artifacts that agree
with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slide2vec.artifacts import (
    SlideEmbeddingArtifact,
    find_hierarchical_artifact,
    find_patient_artifact,
    find_slide_artifact,
    find_tile_artifact,
)
from slide2vec.artifacts.places import KINDS, Kind, Place, encoder_of, unlike
from slide2vec.artifacts.records import recorded_dtype
from slide2vec.cohort.misread_embeddings import (
    misread_reason,
    not_finite_reason,
    with_current_reading,
)
from slide2vec.cohort.results import Artifact
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.errors import ArtifactError, ConfigError, ManifestError, TilingError
from slide2vec.readers.fingerprint import same_content
from slide2vec.slides import Slide
from slide2vec.stream import coordinates_dir
from slide2vec.stream.slide_identity import Identities, SlideIdentity
from slide2vec.tiling import Tiling, load_coordinates
from slide2vec.tiling.known_misreads import READING
from slide2vec.tiling.previous_files import ARCHIVE, are_of_other_files, recorded_qc
from slide2vec.tiling.tissue_methods import checkpoint_of

__all__ = ["CompletedArtifacts", "compatibility", "difference", "encoder_identity"]

#: Of these a difference names the inner keys, too.
_EXPLAINED = ("encoder", "below", "geometry")


def compatibility(
    slide: Slide,
    config: PreprocessingConfig,
    encoder: Mapping[str, Any],
    files: Mapping[str, Any],
    given: Tiling | None = None,
) -> dict[str, Any]:
    """The identity of a slide's embeddings, JSON-ready.

    Batch size, workers and devices are not part of it; neither is the back end, as all give the same
    pixels, nor where files are.

    Args:
        config: with requested_spacing_um and requested_tile_size_px resolved.
        encoder: `Model.identity()`.
        files: `SlideIdentity.content`: what the image (or tile archive) and the mask were.
        given: the slide's tiles, where they are not found by segmentation.

    Raises:
        ManifestError: its own tiling options are wrong.
    """
    config = config.for_slide(slide.sample_id, slide.tiling)
    from_archive = config.read_tiles_from is not None
    made = {
        **files,
        "reading": READING,
        "tiles_from": ARCHIVE if from_archive else "slide" if config.on_the_fly else "jpeg",
        "encoder": encoder_identity(encoder),
        "geometry": _geometry(slide, config, given),
    }
    return dict(json.loads(json.dumps(made)))


def encoder_identity(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """`Model.identity()` without where the weights came from, also of the models that it builds on."""
    made = {
        name: encoder_identity(value) if name == "below" else value
        for name, value in encoder.items()
        if name != "weights_source"
    }
    return dict(json.loads(json.dumps(made)))


def _geometry(slide: Slide, config: PreprocessingConfig, given: Tiling | None) -> dict[str, Any]:
    asked: dict[str, Any] = {
        "requested_spacing_um": config.requested_spacing_um,
        "requested_tile_size_px": config.requested_tile_size_px,
        "spacing_at_level_0": slide.spacing_at_level_0,
    }
    if config.region_tile_multiple is not None:
        asked["region_tile_multiple"] = config.region_tile_multiple
    if given is not None:
        return {**asked, "coordinates": _digest(given)}
    if config.masks.by_class:
        asked["masks"] = config.masks.identity(slide.sample_id)
    measured = {"qc": recorded_qc(config.qc)} if config.qc.on else {}
    checkpoint = None if slide.mask_path is not None else checkpoint_of(config.segmentation)
    found_by = {} if checkpoint is None else {"segmenter": checkpoint}
    return {
        **asked,
        **measured,
        **found_by,
        "tolerance": config.tolerance,
        "overlap": config.overlap,
        "tissue_threshold": config.tissue_threshold,
        "segmentation": config.segmentation.model_dump(mode="json"),
        "filtering": config.filtering.model_dump(mode="json"),
    }


def _digest(tiling: Tiling) -> str:
    geometry = tiling.geometry
    sizes = f"{geometry.read_level} {geometry.read_tile_size_px} {geometry.tile_size_lv0}"
    digest = hashlib.blake2b(sizes.encode(), digest_size=16)
    digest.update(tiling.x.tobytes())
    digest.update(tiling.y.tobytes())
    return digest.hexdigest()


def difference(recorded: Any, asked: Mapping[str, Any]) -> str | None:
    """What differs between two identities, in words such as "encoder precision"; None if nothing does."""
    if not isinstance(recorded, Mapping):
        return "settings"
    for name in sorted(asked.keys() | recorded.keys()):
        old, new = recorded.get(name), asked.get(name)
        if not same_content(old, new):
            inner = difference(old, new) if isinstance(old, Mapping) and isinstance(new, Mapping) else None
            return f"{name} {inner}" if inner and (name in _EXPLAINED or inner == "companions") else name
    return None


_FIND: Mapping[Kind, Callable[..., Artifact | None]] = {
    "tile": find_tile_artifact,
    "hierarchical": find_hierarchical_artifact,
    "slide": find_slide_artifact,
    "patient": find_patient_artifact,
}


class CompletedArtifacts:
    """Compares the artifacts in an output directory with what would be made now.

    Args:
        identities: of the encoder of each kind, `Model.identity()`.
        latents: the embeddings of slides are to have latents.
        tilings: of slides whose tiles are known, by sample_id.
        files: what the files of slides are, looked at once.
        place: where the encoder's embeddings are.
    """

    def __init__(
        self,
        config: PreprocessingConfig,
        execution: ExecutionOptions,
        identities: Mapping[Kind, Mapping[str, Any]],
        tilings: Mapping[str, Tiling],
        files: Identities,
        place: Place,
        *,
        latents: bool,
    ) -> None:
        self._config, self._execution, self._identities = config, execution, identities
        self._tilings, self._files, self._place, self._latents = tilings, files, place, latents

    def find(self, kinds: Iterable[Kind], slide: Slide) -> dict[Kind, Artifact | str | None]:
        """A slide's artifacts that are finished; else what differs from the one there, None for none."""
        asked = self.look(slide)
        if asked is None:
            return dict.fromkeys(kinds)
        found = {kind: self._find(kind, slide.sample_id, asked[kind], [slide]) for kind in kinds}
        complete = {kind for kind, each in found.items() if each is not None and not isinstance(each, str)}
        if complete and self._tiled_otherwise(slide, asked[next(iter(complete))]):
            found |= dict.fromkeys(complete, "set of coordinates")
        return found

    def _tiled_otherwise(self, slide: Slide, asked: Mapping[str, Any]) -> bool:
        """Whether another run has tiled a slide anew, from files that now are again as they were.

        Args:
            asked: of any kind: files and tiles are the same for all.
        """
        return are_of_other_files(self._place.tiling / "tiles", slide.sample_id, asked)

    def find_patient(
        self, patient_id: str, slides: Sequence[Slide], identities: Mapping[str, Mapping[str, Any] | None]
    ) -> Artifact | str | None:
        """As `find`, for a patient with the identities of all their slides' embeddings."""
        return self._find("patient", patient_id, self.patient_compatibility(identities), slides)

    def look(self, slide: Slide, *, anew: bool = True) -> dict[Kind, dict[str, Any]] | None:
        """The identity of a slide's embeddings by kind, as its files are; None where one cannot be read.

        Args:
            anew: its files as they are now, not as they were when the slide was planned.
        """
        try:
            given = self._given(slide)
            known = None if anew else self._files.known(slide.sample_id)
            files = known or self._files.of(slide, masked=given is None)
            return self.compatibilities(slide, files, given)
        except (OSError, TilingError, ManifestError):
            return None

    def compatibilities(
        self, slide: Slide, files: SlideIdentity, given: Tiling | None
    ) -> dict[Kind, dict[str, Any]]:
        """The identity of a slide's embeddings, by kind.

        Args:
            files: what its files were when they were read.
            given: its tiles, where they are not found by segmentation.

        Raises:
            ManifestError: its own tiling options are wrong.
        """
        common = compatibility(slide, self._config, {}, files.content, given)
        return {
            kind: {**common, "encoder": encoder_identity(identity)}
            for kind, identity in self._identities.items()
        }

    def patient_compatibility(self, slides: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Any]:
        """The identity of a patient's embedding: that of each slide's (None where its files are missing)."""
        return {"encoder": encoder_identity(self._identities["patient"]), "slides": dict(slides)}

    def _given(self, slide: Slide) -> Tiling | None:
        kept = coordinates_dir(slide, self._config)
        if slide.sample_id in self._tilings or kept is None:
            return self._tilings.get(slide.sample_id)
        return load_coordinates(kept, slide.sample_id)

    def _find(
        self, kind: Kind, name: str, asked: Mapping[str, Any], slides: Sequence[Slide]
    ) -> Artifact | str | None:
        """In the encoder's own folder; of what its embeddings are made from, in those of others, too."""
        own = self._find_in(self._place.features, kind, name, asked, slides)
        main = max(self._identities, key=KINDS.index)
        if kind != main and (own is None or isinstance(own, str)):
            for folder in self._place.others:
                found = self._find_in(folder, kind, name, asked, slides)
                if found is not None and not isinstance(found, str):
                    return found
        return own

    def _find_in(
        self, folder: Path, kind: Kind, name: str, asked: Mapping[str, Any], slides: Sequence[Slide]
    ) -> Artifact | str | None:
        artifact = _FIND[kind](folder, name)
        if artifact is None:
            return None
        try:
            recorded = artifact.metadata
        except ArtifactError:
            return None
        other = unlike(encoder_of(recorded), self._identities[kind])
        if other and folder == self._place.features:
            raise ConfigError(
                f"{artifact.path} is of another encoder ({recorded.get('encoder_name')}: "
                f"{', '.join(sorted(other))} differ) than others in its folder, and would be replaced: move "
                "those of one away, or choose another output directory"
            )
        options = self._differing_option(kind, artifact, recorded)
        made = recorded.get("compatibility")
        differs = options or difference(with_current_reading(made), asked)
        wrong = differs or misread_reason(made, recorded, slides) or not_finite_reason(made, artifact, name)
        return wrong or artifact

    def _differing_option(self, kind: Kind, artifact: Artifact, recorded: Mapping[str, Any]) -> str | None:
        if artifact.format != self._execution.output_format:
            return "output_format"
        if recorded_dtype(str(recorded.get("feature_dtype"))) != recorded_dtype(self._dtype(kind)):
            return "output_dtype"
        if recorded.get("skipped_tiles") and self._config.on_bad_tile == "fail":
            return "on_bad_tile"
        if recorded.get("skipped_slides") and self._execution.on_bad_slide == "fail":
            return "on_bad_slide"
        if self._latents and isinstance(artifact, SlideEmbeddingArtifact) and artifact.latent_path is None:
            return "save_latents"
        return None

    def _dtype(self, kind: Kind) -> str:
        if kind in ("slide", "patient"):
            return self._execution.vector_dtype
        return self._execution.feature_dtype(self._identities[kind]["precision"])
