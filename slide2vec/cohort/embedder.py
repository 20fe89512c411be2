"""What a run needs of a model."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from slide2vec.cohort.sink import Sink
from slide2vec.config import ExecutionOptions
from slide2vec.embedded import EmbeddedSlide
from slide2vec.recipes import Level
from slide2vec.slides import Slide
from slide2vec.stream import SlideOutcome, SlideQueue

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Embedder", "Encoder"]


class Encoder(Protocol):
    """What is recorded of the model."""

    @property
    def name(self) -> str: ...

    @property
    def level(self) -> Level: ...

    @property
    def upstream(self) -> Encoder | None:
        """The model whose embeddings it takes; None for one of tiles."""
        ...

    @property
    def has_latents(self) -> bool: ...

    variant: str

    def identity(
        self, execution: ExecutionOptions | None = None, tile_size_px: int | None = None
    ) -> dict[str, Any]: ...

    def devices_here(self, execution: ExecutionOptions) -> tuple[str, ...]:
        """Devices of this machine that a run uses; none where it runs on others."""
        ...


class Embedder(Encoder, Protocol):
    """A model, as far as a cohort needs it."""

    def confirm_weights(self) -> None:
        """Wait until the weights are certainly what `identity` says. Nothing is finished before.

        Raises:
            WeightsError: they are not.
        """
        ...

    def release(self) -> None:
        """Free the memory of its encoders, which are loaded anew when they are next needed."""
        ...

    def embed_into(self, sink: Sink, slides: Sequence[Slide]) -> Generator[SlideOutcome, None, None]:
        """Embed slides, here or in workers, and put each into the sink when it is complete; gives what goes
        back from there."""
        ...

    def embed_here(
        self, sink: Sink, slides: Iterable[Slide] | SlideQueue
    ) -> Generator[SlideOutcome, None, None]:
        """As `embed_into`, in this process."""
        ...

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
