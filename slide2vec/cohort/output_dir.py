"""A run's output directory, held while it lasts: its lock, its process list, its log."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from slide2vec.artifacts.places import ARTIFACT_FOLDERS, ENCODERS, owners, tiling_folders
from slide2vec.cohort.context import Cohort
from slide2vec.cohort.lock import output_lock
from slide2vec.cohort.log import RunLog
from slide2vec.cohort.process_list import ProcessList
from slide2vec.cohort.reconcile import reconcile
from slide2vec.cohort.recorder import RunRecorder, first_rows
from slide2vec.cohort.shard_lists import forget_shards, list_path, write_order
from slide2vec.cohort.shards import my_slides
from slide2vec.config import PreprocessingConfig
from slide2vec.errors import OutputError
from slide2vec.files import atomic_path, entries, remove_partial
from slide2vec.progress import activate_progress_reporter, active_reporter, live_progress
from slide2vec.slides import Slide

__all__ = ["Settings", "output_directory", "remove_all_partial"]

_TILING_FOLDERS = ("", "tiles", "preview/mask", "preview/tiling")

#: The text of config.yaml for a configuration.
Settings = Callable[[PreprocessingConfig], str]


@contextmanager
def output_directory(
    cohort: Cohort, slides: Sequence[Slide], settings: Settings | None = None
) -> Iterator[tuple[Cohort, RunRecorder, RunLog]]:
    """The cohort with its folders and the tiles that it takes over from earlier runs; its recorder; the run's
    log.

    Of a shard (`ExecutionOptions.shard`) the recorder has its slides only; `slides` are those of all shards.

    The error of a file that cannot be written says what to do about it.

    Args:
        settings: gives the text to keep as config.yaml.

    Raises:
        ConfigError: the directory holds other tiles than those that were asked for.
        OutputLockedError: another run writes there.
        OutputError: a file cannot be written.
    """
    recorder, root = None, cohort.place.root
    try:
        with (
            live_progress(),
            _recorder(cohort, slides, settings) as (cohort, recorder),
            RunLog(root, active_reporter(), cohort.execution.shard) as log,
            activate_progress_reporter(log),
        ):
            yield cohort, recorder, log
    except OutputError as error:
        done = f"{recorder.complete} in {root}: " if recorder else ""
        explained = OutputError(f"{error}. {done}mend it, then run again with resume to go on from there")
        explained.errno = error.errno
        raise explained from error


@contextmanager
def _recorder(
    cohort: Cohort, slides: Sequence[Slide], settings: Settings | None
) -> Iterator[tuple[Cohort, RunRecorder]]:
    directory, shard = cohort.place.root, cohort.execution.shard
    with output_lock(directory, shard):
        if shard is None:  # others write there while a shard does
            remove_all_partial(directory)
        mine = _share(cohort, slides)
        place, mine, config = reconcile(
            directory, mine, cohort.config, cohort.kind, cohort.identities, cohort.tilings.keys()
        )
        cohort = cohort.with_place(place, config)
        _keep_settings(cohort, settings)
        rows = first_rows(directory, shard, mine, cohort.columns())
        with ProcessList(list_path(directory, shard), rows, place.name) as table:
            if shard is None:
                forget_shards(directory, order=True)
            level = cohort.level if cohort.encoder else None
            recorder = cohort.recorder = RunRecorder(mine, table, level, cohort.kind)
            yield cohort, recorder


def _keep_settings(cohort: Cohort, settings: Settings | None) -> None:
    """config.yaml, unless it would replace that of embeddings by one of tiles."""
    place = cohort.place
    if settings is None or (
        cohort.encoder is None and any(o.folder == place.features for o in owners(place.root))
    ):
        return
    with atomic_path(place.features / "config.yaml") as temporary:
        temporary.write_text(settings(cohort.config), encoding="utf-8")


def _share(cohort: Cohort, slides: Sequence[Slide]) -> Sequence[Slide]:
    """The slides that are this run's: all of them, or those of its shard."""
    shard = cohort.execution.shard
    if shard is None:
        return slides
    write_order(cohort.place.root, (slide.sample_id for slide in slides))
    return my_slides(slides, shard, cohort.config, patients=cohort.kind == "patient")


def remove_all_partial(output_dir: Path) -> None:
    """Remove what killed processes left half-written. Only for who holds the whole directory."""
    for folder in tiling_folders(output_dir):
        for name in _TILING_FOLDERS:
            remove_partial(folder / name)
    for folder in (output_dir, *entries(output_dir / ENCODERS)):
        for name in ("", *ARTIFACT_FOLDERS):
            remove_partial(folder / name)
