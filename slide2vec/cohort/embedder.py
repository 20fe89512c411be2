"""What a run needs of a model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from slide2vec.cohort.events import Entry, Settled
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.embedded import EmbeddedSlide
from slide2vec.recipes import Level
from slide2vec.slides import Slide
from slide2vec.stream import Arrivals, InPlace, SlideOutcome, SlidePlan

if TYPE_CHECKING:
    from torch import Tensor

    from slide2vec.artifacts.places import Place
    from slide2vec.stream.identities import Identities
    from slide2vec.tiling import Tiling

__all__ = ["Embedder", "Encoder", "Workers"]


class Encoder(Protocol):
    """What is recorded of the model."""

    @property
    def name(self) -> str: ...

    @property
    def level(self) -> Level: ...

    @property
    def below(self) -> Encoder | None:
        """The model whose embeddings it takes; None for one of tiles."""
        ...

    @property
    def has_latents(self) -> bool: ...

    variant: str

    def identity(
        self, execution: ExecutionOptions | None = None, tile_size_px: int | None = None
    ) -> dict[str, Any]: ...


class Workers(Protocol):
    """Processes that embed a cohort's slides and publish their files themselves."""

    @property
    def lost(self) -> int:
        """How many have died."""
        ...

    def publish(
        self,
        slides: Sequence[Slide],
        config: PreprocessingConfig,
        execution: ExecutionOptions,
        tilings: Mapping[str, Tiling],
        place: Place,
        files: Identities,
    ) -> Generator[Entry | Settled | SlideOutcome, None, None]:
        """Embed slides, and tell what is to be entered in the books; an outcome is told only of a slide that
        no worker has survived."""
        ...


class Embedder(Encoder, Protocol):
    """A model, as far as a cohort needs it."""

    def workers(self, execution: ExecutionOptions) -> Workers | None:
        """Who embeds slides, if not `outcomes` in this process."""
        ...

    def outcomes(
        self,
        slides: Iterable[Slide] | Arrivals,
        config: PreprocessingConfig,
        execution: ExecutionOptions,
        plan: Callable[[Slide, InPlace], SlidePlan],
    ) -> Generator[SlideOutcome, None, None]: ...

    def aggregated(self, embedded: EmbeddedSlide, *, latents: bool = False) -> EmbeddedSlide:
        """With its slide embedding, (D,) float32; as it is for tile-level models and without tiles.

        Raises:
            SlideError: the slide encoder failed.
        """
        ...

    def patient_embedding(self, slides: Mapping[str, Tensor]) -> Tensor:
        """(D,) float32 from the slide embeddings of a patient, by sample_id.

        Raises:
            PatientError: the patient encoder failed.
        """
        ...
