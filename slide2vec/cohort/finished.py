"""What earlier runs have finished with the settings of this one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from slide2vec.artifacts import (
    HierarchicalEmbeddingArtifact,
    PatientEmbeddingArtifact,
    SlideEmbeddingArtifact,
    TileEmbeddingArtifact,
    find_hierarchical_artifact,
    find_patient_artifact,
    find_slide_artifact,
    find_tile_artifact,
)
from slide2vec.cohort.identity import compatibility, difference, encoder_identity
from slide2vec.cohort.misread import as_if_read_now, misread
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.errors import ArtifactError, ManifestError, TilingError
from slide2vec.slides import Slide
from slide2vec.stream import coordinates_dir
from slide2vec.stream.identities import Identities, SlideIdentity
from slide2vec.tiling import Tiling, load_coordinates

__all__ = ["Artifact", "Finished", "Kind"]

Kind: TypeAlias = Literal["tile", "hierarchical", "slide", "patient"]
Artifact: TypeAlias = (
    TileEmbeddingArtifact | HierarchicalEmbeddingArtifact | SlideEmbeddingArtifact | PatientEmbeddingArtifact
)

_FIND: Mapping[Kind, Callable[..., Artifact | None]] = {
    "tile": find_tile_artifact,
    "hierarchical": find_hierarchical_artifact,
    "slide": find_slide_artifact,
    "patient": find_patient_artifact,
}


class Finished:
    """Compares the artifacts in an output directory with what would be made now.

    Args:
        identities: of the encoder of each kind, `Model.identity()`.
        latents: the embeddings of slides are to have latents.
        tilings: of slides whose tiles are known, by sample_id.
        files: what the files of slides are, looked at once.
    """

    def __init__(
        self,
        config: PreprocessingConfig,
        execution: ExecutionOptions,
        identities: Mapping[Kind, Mapping[str, Any]],
        tilings: Mapping[str, Tiling],
        files: Identities,
        *,
        latents: bool,
    ) -> None:
        self._config, self._execution, self._identities = config, execution, identities
        self._tilings, self._files, self._latents = tilings, files, latents

    def find(self, kinds: Iterable[Kind], slide: Slide) -> dict[Kind, Artifact | str | None]:
        """A slide's artifacts that are finished; else what differs from the one there, None for none."""
        asked = self.look(slide)
        return {
            kind: None if asked is None else self._find(kind, slide.sample_id, asked[kind], [slide])
            for kind in kinds
        }

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
        assert self._execution.output_dir is not None
        artifact = _FIND[kind](self._execution.output_dir, name)
        if artifact is None:
            return None
        try:
            recorded = artifact.metadata
        except ArtifactError:
            return None
        options = self._differing_option(kind, artifact, recorded)
        made = recorded.get("compatibility")
        differs = options or difference(as_if_read_now(made), asked)
        return differs or misread(made, recorded, slides) or artifact

    def _differing_option(self, kind: Kind, artifact: Artifact, recorded: Mapping[str, Any]) -> str | None:
        if artifact.format != self._execution.output_format:
            return "output_format"
        if recorded.get("feature_dtype") != self._dtype(kind):
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
