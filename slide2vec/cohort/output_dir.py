"""A run's output directory, held while it lasts: its lock, its process list, its log."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from slide2vec.artifacts.places import ARTIFACT_FOLDERS, ENCODERS, Owner, owners, tiling_folders
from slide2vec.cohort.context import Cohort
from slide2vec.cohort.lock import one_at_a_time, output_lock
from slide2vec.cohort.log import RunLog
from slide2vec.cohort.process_list import ProcessList
from slide2vec.cohort.reconcile import geometry_of, reconcile
from slide2vec.cohort.recorder import RunRecorder, first_rows
from slide2vec.cohort.shard_lists import (
    encoders_at_work,
    encoders_path,
    forget_shards,
    list_path,
    write_encoders,
    write_order,
)
from slide2vec.cohort.shards import my_slides
from slide2vec.config import PreprocessingConfig
from slide2vec.errors import OutputError
from slide2vec.files import atomic_path, entries, remove, remove_partial
from slide2vec.progress import activate_progress_reporter, active_reporter, live_progress
from slide2vec.slides import Slide

__all__ = ["Settings", "output_directory", "remove_all_partial", "shared_output_directory"]

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
    with (
        shared_output_directory([(cohort, settings)], slides) as (((cohort, recorder),), log),
        activate_progress_reporter(log),
    ):
        yield cohort, recorder, log


@contextmanager
def shared_output_directory(
    runs: Sequence[tuple[Cohort, Settings | None]], slides: Sequence[Slide]
) -> Iterator[tuple[list[tuple[Cohort, RunRecorder]], RunLog]]:
    """As `output_directory`, for several encoders that run into one: each with its own folders and recorder.
    Events do not go to the log by themselves.
    """
    recorders: list[RunRecorder] = []
    root = runs[0][0].place.root
    try:
        with live_progress(), _opened(runs, slides) as opened:
            recorders = [recorder for _, recorder in opened]
            shard = runs[0][0].execution.shard
            with RunLog(root, active_reporter(), shard, partial(_devices, runs)) as log:
                yield opened, log
    except OutputError as error:
        done = "; ".join(
            f"{recorder.encoder}: {recorder.complete}" if len(recorders) > 1 else recorder.complete
            for recorder in recorders
        )
        done = f"{done} in {root}: " if done else ""
        explained = OutputError(f"{error}. {done}mend it, then run again with resume to go on from there")
        explained.errno = error.errno
        raise explained from error


def _devices(runs: Sequence[tuple[Cohort, Settings | None]]) -> tuple[str, ...]:
    """Of this machine, that a run uses."""
    found: list[str] = []
    for cohort, _ in runs:
        found += ("cpu",) if cohort.encoder is None else cohort.encoder.devices_here(cohort.execution)
    return tuple(dict.fromkeys(found))


@contextmanager
def _opened(
    runs: Sequence[tuple[Cohort, Settings | None]], slides: Sequence[Slide]
) -> Iterator[list[tuple[Cohort, RunRecorder]]]:
    first, _ = runs[0]
    directory, shard = first.place.root, first.execution.shard
    with output_lock(directory, shard):
        if shard is None:  # others write there while a shard does
            remove_all_partial(directory)
        else:  # as a killed run of this shard left it; it is read while the shard is held
            remove(encoders_path(directory, shard))
        # one division for all encoders, or they would not share what is read
        share = _share(first, slides, patients=any(cohort.kind == "patient" for cohort, _ in runs))
        with _placed([cohort for cohort, _ in runs], share) as cohorts:
            for (cohort, _), (_, settings) in zip(cohorts, runs, strict=True):
                _keep_settings(cohort, settings)
            yield from _recorded(directory, shard, cohorts)


def _recorded(
    directory: Path, shard: str | None, cohorts: Sequence[tuple[Cohort, Sequence[Slide]]]
) -> Iterator[list[tuple[Cohort, RunRecorder]]]:
    rows = first_rows(directory, shard, [(mine, cohort.columns()) for cohort, mine in cohorts])
    with ProcessList(list_path(directory, shard), rows) as table:
        if shard is None:
            forget_shards(directory, order=True)
        opened = []
        for cohort, mine in cohorts:
            level = cohort.level if cohort.encoder else None
            cohort.recorder = recorder = RunRecorder(mine, table, cohort.place.name, level, cohort.kind)
            opened.append((cohort, recorder))
        yield opened


@contextmanager
def _placed(
    cohorts: Sequence[Cohort], slides: Sequence[Slide]
) -> Iterator[list[tuple[Cohort, Sequence[Slide]]]]:
    """The cohorts with their folders, each with its slides. Shards of other encoders that begin meanwhile see
    these folders, and are seen: none has written anything by which it would be known."""
    directory, shard = cohorts[0].place.root, cohorts[0].execution.shard
    if shard is None:
        yield _reconciled(cohorts, slides, ())[0]
        return
    with one_at_a_time(directory):
        found, owners = _reconciled(cohorts, slides, encoders_at_work(directory, shard))
        write_encoders(directory, shard, owners)
    try:
        yield found
    finally:
        with suppress(OutputError):  # once the shard has ended, nobody reads it
            remove(encoders_path(directory, shard))


def _reconciled(
    cohorts: Sequence[Cohort], slides: Sequence[Slide], others: Sequence[Owner]
) -> tuple[list[tuple[Cohort, Sequence[Slide]]], list[Owner]]:
    """The cohorts with their folders and slides, and their encoders as owners of these.

    Args:
        others: that write there at the same time.
    """
    found: list[tuple[Cohort, Sequence[Slide]]] = []
    beside: list[Owner] = []
    for cohort in cohorts:
        place, mine, config = reconcile(
            cohort.place.root,
            slides,
            cohort.config,
            cohort.kind,
            cohort.identities,
            cohort.tilings.keys(),
            beside=[*others, *beside],
        )
        cohort = cohort.with_place(place, config)
        if cohort.encoder is not None:
            beside.append(_as_owner(cohort, beside))
        found.append((cohort, mine))
    return found, beside


def _as_owner(cohort: Cohort, beside: Sequence[Owner]) -> Owner:
    """What the folder of a cohort will hold, as if it did already: of what its embeddings are made from
    nothing that those before it make.

    Args:
        beside: of the cohorts before it.
    """
    coordinates = cohort.place.tiling / "tiles" / "slide.coordinates.meta.json"
    geometry = geometry_of(cohort.config)
    kinds = [
        kind
        for kind in dict.fromkeys((*cohort.wanted, cohort.kind))
        if kind == cohort.kind
        or all(owner.unlike({kind: cohort.identities[kind]}, geometry) for owner in beside)
    ]
    return Owner(
        cohort.place.root,
        cohort.place.features,
        {
            kind: {
                "encoder_name": cohort.identities[kind]["name"],
                "coordinates_meta_path": str(coordinates),
                "compatibility": {
                    "encoder": cohort.identities[kind],
                    "geometry": {
                        **geometry,
                        "filtering": cohort.config.filtering.model_dump(),
                    },
                },
            }
            for kind in kinds
        },
    )


def _keep_settings(cohort: Cohort, settings: Settings | None) -> None:
    """config.yaml, unless it would replace that of embeddings by one of tiles."""
    place = cohort.place
    if settings is None or (
        cohort.encoder is None and any(o.folder == place.features for o in owners(place.root))
    ):
        return
    with atomic_path(place.features / "config.yaml") as temporary:
        temporary.write_text(settings(cohort.config), encoding="utf-8")


def _share(cohort: Cohort, slides: Sequence[Slide], *, patients: bool) -> Sequence[Slide]:
    """The slides that are this run's: all of them, or those of its shard.

    Args:
        patients: slides of one patient stay together.
    """
    shard = cohort.execution.shard
    if shard is None:
        return slides
    write_order(cohort.place.root, (slide.sample_id for slide in slides))
    return my_slides(slides, shard, cohort.config, patients=patients)


def remove_all_partial(output_dir: Path) -> None:
    """Remove what killed processes left half-written. Only for who holds the whole directory."""
    for folder in tiling_folders(output_dir):
        for name in _TILING_FOLDERS:
            remove_partial(folder / name)
    for folder in (output_dir, *entries(output_dir / ENCODERS)):
        for name in ("", *ARTIFACT_FOLDERS):
            remove_partial(folder / name)
