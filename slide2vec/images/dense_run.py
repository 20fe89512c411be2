"""A grid of each picture onto disk: read in threads while the encoder runs, written in others."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from slide2vec.compile.batch_size import batch_size_for
from slide2vec.config import ExecutionOptions
from slide2vec.errors import EmbedImagesError, ImageError, Slide2VecError
from slide2vec.images.ahead import WRITERS, ahead, stopping
from slide2vec.images.dense_encoder import GridEncoder
from slide2vec.images.devices import spread
from slide2vec.images.pixels import Pixels
from slide2vec.progress import RunStarted, SlideFinished, SlidePlanned, TilesEncoded, active_reporter

__all__ = ["GridJob", "batch_size_of", "encode_and_write", "grids_in_order"]

logger = logging.getLogger(__name__)

_Made = TypeVar("_Made", covariant=True)
Done = TypeVar("Done")


class GridJob(Protocol, Generic[_Made]):
    """One picture whose grid is to be made."""

    @property
    def name(self) -> str:
        """For messages: "image a", "slide s, region 10,20"."""
        ...

    def read(self) -> Pixels:
        """(H, W, 3) uint8, of the size that was asked for.

        Raises:
            Slide2VecError: it cannot be read, and why.
        """
        ...

    def write(self, grid: torch.Tensor) -> _Made:
        """Write a grid (d, rows, columns)."""
        ...


def encode_and_write(
    jobs: Sequence[GridJob[Done]], encoder: GridEncoder, execution: ExecutionOptions, preset: str, what: str
) -> list[Done | Exception]:
    """Make the grids of pictures; what each came to, in order.

    Args:
        what: they are, for progress.

    Raises:
        OutputError: files cannot be written.
    """
    reporter, made = active_reporter(), list[Done | Exception]()
    reporter.emit(RunStarted(1, preset))
    reporter.emit(SlidePlanned(what, len(jobs), execution.output_format))
    with (
        stopping(ThreadPoolExecutor(WRITERS, "slide2vec-write")) as writers,
        closing(_encoded(jobs, encoder, execution)) as encoded,
    ):
        for _, future in ahead(writers, _written, encoded, 2 * WRITERS):
            made.append(future.result())
            reporter.emit(TilesEncoded(1, what))
    reporter.emit(SlideFinished(what, len(jobs)))
    return made


def _written(item: tuple[GridJob[Done], torch.Tensor | Exception]) -> Done | Exception:
    job, grid = item
    return grid if isinstance(grid, Exception) else job.write(grid)


def _encoded(jobs: Sequence[GridJob[Done]], encoder: GridEncoder, execution: ExecutionOptions) -> Any:
    """Each job with its grid, or with why it has none."""
    size = batch_size_of(encoder, execution)
    readers = execution.budget(encoder.device.type).reading_threads
    encoders = encoder.on_each_device(-(-len(jobs) // size))
    room = readers + 2 * size * len(encoders)
    with stopping(ThreadPoolExecutor(readers, "slide2vec-read")) as pool:
        pictures = ((job, future.result()) for job, future in ahead(pool, _read, jobs, room))
        batches = iter(lambda: list(islice(pictures, size)), [])
        for grids in spread(encoders, _grids, batches):
            yield from grids


def batch_size_of(encoder: GridEncoder, execution: ExecutionOptions) -> int:
    """Pictures that are encoded together."""
    return execution.batch_size or max(1, min(8, batch_size_for(encoder.gflops, encoder.device)))


def _read(job: GridJob[Any]) -> Pixels | Exception:
    try:
        return job.read()
    except Slide2VecError as error:
        return error


def _grids(
    encoder: GridEncoder, batch: Sequence[tuple[GridJob[Done], Pixels | Exception]]
) -> list[tuple[GridJob[Done], torch.Tensor | Exception]]:
    good = [pixels for _, pixels in batch if not isinstance(pixels, Exception)]
    grids = iter(encoder.grids(torch.from_numpy(np.stack(good))) if good else ())
    made: list[tuple[GridJob[Done], torch.Tensor | Exception]] = []
    for job, pixels in batch:
        if isinstance(pixels, Exception):
            made.append((job, pixels))
            continue
        grid = next(grids).clone()  # a view would be stored with all of its batch
        made.append((job, grid if bool(grid.isfinite().all()) else _not_finite(job, encoder)))
    return made


def _not_finite(job: GridJob[Any], encoder: GridEncoder) -> ImageError:
    dtype = str(encoder.dtype).removeprefix("torch.")
    return ImageError(
        f"{job.name}: its features, as {dtype} made in {encoder.precision}, hold NaN or infinities: use "
        'output_dtype="fp32" and precision="bf16" or "fp32"'
    )


def grids_in_order(names: Sequence[str], made: Sequence[Done | Exception], on_error: str) -> list[Done]:
    """The files of all pictures that have some.

    Raises:
        EmbedImagesError: some failed, and that is to be raised.
    """
    failed: Mapping[str, Exception] = {
        name: each for name, each in zip(names, made, strict=True) if isinstance(each, Exception)
    }
    for error in failed.values():
        logger.warning("%s", error)
    if failed and on_error == "raise":
        raise EmbedImagesError.of(failed, [None if isinstance(each, Exception) else each for each in made])
    return [each for each in made if not isinstance(each, Exception)]
