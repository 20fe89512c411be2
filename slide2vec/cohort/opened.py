"""A run's output directory, held while it lasts: its lock, its process list, its log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from slide2vec.cohort.books import Books, first_rows
from slide2vec.cohort.cohort import Cohort
from slide2vec.cohort.lock import output_lock
from slide2vec.cohort.log import RunLog
from slide2vec.cohort.process_list import ProcessList
from slide2vec.cohort.shard_lists import forget_shards, list_path, write_order
from slide2vec.cohort.shards import my_slides
from slide2vec.errors import OutputError
from slide2vec.files import atomic_path, remove_partial
from slide2vec.progress import activate_progress_reporter, active_reporter, live_progress
from slide2vec.slides import Slide

__all__ = ["opened", "remove_all_partial"]

_FOLDERS = (
    *("", "tiles", "tile_embeddings", "hierarchical_embeddings", "slide_embeddings", "slide_latents"),
    *("patient_embeddings", "preview/mask", "preview/tiling"),
)


@contextmanager
def opened(
    cohort: Cohort, slides: Sequence[Slide], settings: str | None = None
) -> Iterator[tuple[Books, RunLog]]:
    """The books of a cohort, which are its `entries`, and the run's log.

    Of a shard (`ExecutionOptions.shard`) the books are of its slides; `slides` are those of all.

    A file that cannot be written is told with what to do about it.

    Args:
        settings: text to keep as config.yaml.

    Raises:
        OutputLockedError: another run writes there.
        OutputError: a file cannot be written.
    """
    books = None
    try:
        with (
            live_progress(),
            _books(cohort, slides, settings) as books,
            RunLog(cohort.output_dir, active_reporter(), cohort.execution.shard) as log,
            activate_progress_reporter(log),
        ):
            yield books, log
    except OutputError as error:
        done = f"{books.complete} in {cohort.output_dir}: " if books else ""
        told = OutputError(f"{error}. {done}mend it, then run again with resume to go on from there")
        told.errno = error.errno
        raise told from error


@contextmanager
def _books(cohort: Cohort, slides: Sequence[Slide], settings: str | None) -> Iterator[Books]:
    directory, shard = cohort.output_dir, cohort.execution.shard
    with output_lock(directory, shard):
        if shard is None:  # others write there while a shard does
            remove_all_partial(directory)
        if settings is not None:
            with atomic_path(directory / "config.yaml") as temporary:
                temporary.write_text(settings, encoding="utf-8")
        mine = _share(cohort, slides)
        rows = first_rows(directory if shard is None else None, mine, cohort.columns())
        with ProcessList(list_path(directory, shard), rows) as table:
            if shard is None:
                forget_shards(directory, order=True)
            level = cohort.level if cohort.encoder else None
            books = cohort.entries = Books(mine, table, level, cohort.kind)
            yield books


def _share(cohort: Cohort, slides: Sequence[Slide]) -> Sequence[Slide]:
    """The slides that are this run's: all of them, or those of its shard."""
    shard = cohort.execution.shard
    if shard is None:
        return slides
    write_order(cohort.output_dir, (slide.sample_id for slide in slides))
    return my_slides(slides, shard, cohort.config, patients=cohort.kind == "patient")


def remove_all_partial(output_dir: Path) -> None:
    """Remove what killed processes left half-written. Only for who holds the whole directory."""
    for folder in _FOLDERS:
        remove_partial(output_dir / folder)
