"""Run several encoders over the same slides side by side, each in a thread of its own."""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, TypeAlias, TypeVar

from slide2vec.artifacts import TileEmbeddingArtifact
from slide2vec.cohort.bill import write_bill
from slide2vec.cohort.context import Cohort
from slide2vec.cohort.embedder import Embedder
from slide2vec.cohort.kept_tiles import FROM_SCRATCH, TileScratch, tile_scratch
from slide2vec.cohort.output_dir import Settings, shared_output_directory
from slide2vec.cohort.pending_patients import Patient, by_patient
from slide2vec.cohort.recorder import RunRecorder
from slide2vec.cohort.results import Artifact, RunResult
from slide2vec.cohort.resume import ResumePlan, plan_everything, resume_run
from slide2vec.cohort.run import embed_what_is_left, left_in_words, sink_of_run
from slide2vec.cohort.scratch_room import Tiles, tiles_wanted
from slide2vec.cohort.sink import Sink
from slide2vec.cohort.slide_writer import OnPersisted
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.errors import OutputError, PatientError
from slide2vec.manifests import by_class
from slide2vec.progress import ProgressReporter, RunSummary, activate_progress_reporter
from slide2vec.progress.together import TogetherReporter
from slide2vec.slides import Slide
from slide2vec.stream import SlideOutcome
from slide2vec.stream.shared_slides import Share, SharedSlides
from slide2vec.stream.staging import stager_for

__all__ = ["EncoderRun", "InWorkers", "embed_cohort_together", "run_in_threads", "run_side_by_side"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

#: Embeds slides with several encoders in workers: `WorkerExecutor.embed_together`.
InWorkers: TypeAlias = Callable[
    [Mapping[str, Sink], Mapping[str, Sequence[Slide]], TogetherReporter, TileScratch | None],
    Mapping[str, list[SlideOutcome] | Exception],
]


@dataclass(frozen=True)
class EncoderRun:
    """What one of several encoders is to do with the slides of a cohort.

    Attributes:
        config: with requested_spacing_um and requested_tile_size_px resolved.
        settings: as for `embed_cohort`.
        after: the encoder after which it runs, since they have one tile encoder and so one folder: its
            embeddings of tiles are taken over, where it keeps them. "" = it waits for none.
    """

    embedder: Embedder
    config: PreprocessingConfig
    settings: Settings | None = None
    after: str = ""


def embed_cohort_together(
    runs: Mapping[str, EncoderRun],
    slides: Sequence[Slide],
    execution: ExecutionOptions,
    *,
    groups: Sequence[Sequence[str]] = (),
    in_workers: InWorkers | None = None,
    on_slide_persisted: OnPersisted | None = None,
) -> RunResult:
    """As `embed_cohort`, with several encoders: slides are read once for all that take their
    turn together. Each writes what it would write alone, one run after the other, into the same directory.

    An encoder that breaks off fails the slides that it has not finished; the others go on. The result of each
    is in `encoders`, in the order of `runs`.

    Args:
        runs: by name.
        groups: names of those that are in memory together, where they are not all; each is released after its
            turn.
        in_workers: None: in this process.
        on_slide_persisted: as for `embed_cohort`, one call at a time. What it raises ends the run.

    Raises:
        ConfigError, OutputLockedError, OutputError: as `embed_cohort`.
    """
    if on_slide_persisted is not None:
        on_slide_persisted = _one_at_a_time(on_slide_persisted)
    slides = by_class(slides, next(iter(runs.values())).config.masks)
    opened_as = sorted(runs, key=lambda name: runs[name].after != "")
    cohorts = [
        (Cohort(runs[name].config, execution, runs[name].embedder), runs[name].settings) for name in opened_as
    ]
    with shared_output_directory(cohorts, slides) as (opened, log), ExitStack() as kept:
        whole = dict(zip(opened_as, opened, strict=True))
        summaries: dict[str, RunSummary] = {}
        turns = list(_turns(runs, whole, groups, ordered=in_workers is None))
        # before anybody's turn, as it says which tiles are wanted later
        left = {name: _left(*whole[name], None) for name in runs if not runs[name].after}
        scratch = kept.enter_context(tile_scratch(execution, len(turns)))
        readings = _Readings()
        for number, names in enumerate(turns):
            todo = {}
            for name in names:
                cohort, recorder = whole[name]
                if runs[name].after:
                    left[name] = _left(cohort, recorder, whole[runs[name].after][1])
                todo[name] = left[name]
                if not todo[name]:
                    runs[name].embedder.confirm_weights()  # that all is finished is said of these weights
                log.write(f"{name}: {left_in_words(todo[name], recorder.slides)}")
            if scratch is not None:
                scratch.begin_turn(
                    *(_tiles_of(each, whole, left) for each in (names, chain(*turns[number + 1 :])))
                )
            reporter = TogetherReporter(
                log,
                {name: [slide.sample_id for slide in left.slides] for name, left in todo.items()},
                log.write,
            )
            if any(todo.values()):
                reporter.start(names)
            to_do = {
                name: (*whole[name], runs[name].embedder, left, on_slide_persisted)
                for name, left in todo.items()
                if left
            }
            if in_workers is not None:
                broken = _embed_in_workers(to_do, in_workers, reporter, scratch)
            else:
                tasks = {name: partial(_embed_shared, *each) for name, each in to_do.items()}
                planned = {name: todo[name].slides for name in tasks}
                broken = _errors(run_side_by_side(tasks, planned, execution, reporter, scratch))
            for name, error in broken.items():
                _break_off(whole[name][0], whole[name][1], todo[name], error)
            readings.add(names, reporter, {name: whole[name][0].config for name in names})
            if scratch is not None:
                readings.bytes = max(readings.bytes, scratch.bytes)
            summaries |= reporter.summaries
            for name in names if len(groups) > 1 else ():
                runs[name].embedder.release()
        results = {name: whole[name][1].result(summaries.get(name)) for name in runs}
        read = [names for names in turns if any(summaries[name].tiles for name in names if name in summaries)]
        summary = readings.told(log.summary, read)
        write_bill(log, summary, {whole[name][0].place.name: each for name, each in summaries.items()})
        return RunResult.of_several(results, summary, read)


def _turns(
    runs: Mapping[str, EncoderRun],
    whole: Mapping[str, tuple[Cohort, RunRecorder]],
    groups: Sequence[Sequence[str]],
    ordered: bool,
) -> Iterator[list[str]]:
    """Names that run side by side: of one of the groups, and first those that come after none. Encoders of
    patients, which take slides patient by patient, have a turn of their own if that is another order (and
    slides are `ordered`)."""
    orders = {
        name: tuple(slide.sample_id for slide in plan_everything(recorder.slides, cohort.kind).slides)
        for name, (cohort, recorder) in whole.items()
    }
    done: set[str] = {""}
    left = list(runs)
    while left:
        ready = [name for name in left if runs[name].after in done]
        beside = next((group for group in groups if ready[0] in group), ready)
        ready = [name for name in ready if name in beside]
        now = [name for name in ready if not ordered or orders[name] == orders[ready[0]]]
        if apart := [name for name in ready if name not in now]:
            logger.warning(
                "%s and %s take slides in different orders, so that each reads them: a manifest in which the "
                "slides of each patient follow one another has them read once",
                *(", ".join(now), ", ".join(apart)),
            )
        yield now
        done |= set(now)
        left = [name for name in left if name not in now]


class _Readings:
    """How slides came to groups of encoders that take turns.

    Attributes:
        from_scratch, again: how many slides later groups took from the scratch, and how many they decoded
            again, each group counted.
        bytes: the most that waited in the scratch when a group was done.
    """

    def __init__(self) -> None:
        self.from_scratch = self.again = self.bytes = 0
        self._before: set[str] = set()

    def add(
        self, names: Iterable[str], reporter: TogetherReporter, configs: Mapping[str, PreprocessingConfig]
    ) -> None:
        """What a group has read.

        Args:
            reporter: that was told of it.
        """
        taken, decoded = set[Tiles](), set[Tiles]()
        for name in names:
            asked = configs[name].requested_spacing_um, configs[name].requested_tile_size_px
            for slide in reporter.planned(name):
                if slide.tiles:
                    (taken if slide.backend == FROM_SCRATCH else decoded).add((slide.sample_id, *asked))
        again = {tiles for tiles in decoded - taken if tiles[0] in self._before}
        self.from_scratch, self.again = self.from_scratch + len(taken), self.again + len(again)
        self._before |= {tiles[0] for tiles in taken | decoded}

    def told(self, summary: RunSummary | None, groups: Sequence[Sequence[str]]) -> RunSummary | None:
        """The summary of a run, with how slides came to these groups."""
        return summary and replace(
            summary,
            readings=tuple(" + ".join(names) for names in groups),
            from_scratch=self.from_scratch,
            decoded_again=self.again,
            scratch_bytes=self.bytes,
        )


def _tiles_of(
    names: Iterable[str],
    whole: Mapping[str, tuple[Cohort, RunRecorder]],
    left: Mapping[str, ResumePlan],
) -> set[Any]:
    """Tiles that are left to these encoders, as far as that is known; see `tiles_wanted`."""
    return set().union(
        *(tiles_wanted(whole[name][0].config, left[name].slides) for name in names if name in left)
    )


class _CallbackFailed(BaseException):
    """What the caller's own function has raised, as the cause: no failure of an encoder."""


def _left(cohort: Cohort, recorder: RunRecorder, before: RunRecorder | None) -> ResumePlan:
    """What is left to do; a run that resumes nothing takes over what the one before it has just embedded."""
    left = resume_run(cohort, recorder)
    if before is None or cohort.config.resume or cohort.level == "tile":
        return left
    tiles = before.made("tile")
    taken = [(slide, tiles[slide.sample_id]) for slide in left.slides if slide.sample_id in tiles]
    return replace(
        left,
        slides=[slide for slide in left.slides if slide.sample_id not in tiles],
        tiles=[(slide, each) for slide, each in taken if isinstance(each, TileEmbeddingArtifact)],
    )


def _one_at_a_time(call: OnPersisted) -> OnPersisted:
    lock = threading.Lock()

    def locked(artifact: Artifact) -> None:
        with lock:
            try:
                call(artifact)
            except Exception as error:
                raise _CallbackFailed from error

    return locked


def _errors(found: Mapping[str, Any]) -> dict[str, Exception]:
    return {name: each for name, each in found.items() if isinstance(each, Exception)}


def _embed_in_workers(
    to_do: Mapping[str, tuple[Cohort, RunRecorder, Embedder, ResumePlan, OnPersisted | None]],
    in_workers: InWorkers,
    reporter: TogetherReporter,
    scratch: TileScratch | None,
) -> dict[str, Exception]:
    """Embed in workers what is left to each encoder; the errors of those that broke off."""
    found: dict[str, Any] = {}

    @contextmanager
    def apart(name: str) -> Iterator[None]:
        """What its sink raises at the end is the encoder's own error; whatever comes before is the run's."""
        try:
            yield
        except Exception as error:
            if name not in found or isinstance(error, OutputError):
                raise
            found[name] = error

    try:
        with ExitStack() as opened:
            sinks: dict[str, Sink] = {}
            for name, each in to_do.items():
                opened.enter_context(apart(name))
                sinks[name] = opened.enter_context(sink_of_run(*each))
            slides = {name: todo.slides for name, (_, _, _, todo, _) in to_do.items()}
            done = in_workers(sinks, slides, reporter, scratch) if any(slides.values()) else {}
            found = {**dict.fromkeys(to_do), **done}
    except _CallbackFailed as error:
        raise error.__cause__ or error from None
    reporter.end(found)
    return _errors(found)


def _embed_shared(
    cohort: Cohort,
    recorder: RunRecorder,
    embedder: Embedder,
    todo: ResumePlan,
    on_slide_persisted: OnPersisted | None,
    share: Share,
) -> None:
    cohort.share = share
    embed_what_is_left(cohort, recorder, embedder, todo, embedder.embed_here, on_slide_persisted)


def _break_off(cohort: Cohort, recorder: RunRecorder, todo: ResumePlan, error: Exception) -> None:
    """Enter the failure of an encoder for the slides, and patients, that it has not finished."""
    unfinished = [slide for slide in todo.in_progress() if not recorder.has(slide)]
    for slide in unfinished:
        cohort.fail(slide, error, "embedding")
    if cohort.kind == "patient":
        for name, theirs in by_patient(unfinished).items():
            broken = PatientError(f"patient {name}: {cohort.place.name} broke off: {error}")
            broken.__cause__ = error
            recorder.fail_patient(Patient(name, theirs, failed={s.sample_id: error for s in theirs}), broken)


def run_side_by_side(
    tasks: Mapping[str, Callable[[Share], Result]],
    slides: Mapping[str, Sequence[Slide]],
    execution: ExecutionOptions,
    reporter: TogetherReporter,
    scratch: TileScratch | None = None,
) -> dict[str, Result | Exception]:
    """Do what each encoder has to do, sharing what is read; what it gave, or its error: that of one encoder
    does not stop the others.

    Args:
        tasks: of each encoder, called with its part in the slides.
        slides: that each encoder will plan, in one order that they have in common.
        execution: says where slides are staged, if they are.
        reporter: gets the events of all of them.
        scratch: keeps decoded tiles for encoders that come later, and has those that were.

    Raises:
        OutputError: one of them cannot write a file; the others are stopped.
        ConfigError: nothing can be written into stage_dir.
    """
    with stager_for(execution) as stager:
        over = {} if scratch is None else {"over": scratch.over}
        shared = SharedSlides(tasks, stager, readers=execution.num_workers, **over)
        shares = {name: shared.share(name, slides[name]) for name in tasks}

        def cancel() -> None:
            reporter.cancel()
            stager.stop()

        found = run_in_threads(tasks, shares, {name: reporter.of(name) for name in tasks}, cancel)
    reporter.end(found)
    return found


def run_in_threads(
    tasks: Mapping[str, Callable[[Share], Result]],
    shares: Mapping[str, Share],
    reporters: Mapping[str, ProgressReporter],
    cancel: Callable[[], None],
) -> dict[str, Result | Exception]:
    """Do what each encoder has to do, in threads; what it gave, or its error.

    Args:
        tasks: of each encoder, called with its part in the slides.
        cancel: has all of them end, when something ends the call.

    Raises:
        OutputError: one of them cannot write a file; the others are stopped.
    """

    def run(name: str, task: Callable[[Share], Result]) -> Result:
        with shares[name].membership(), activate_progress_reporter(reporters[name]):
            return task(shares[name])

    with ThreadPoolExecutor(max(1, len(tasks)), thread_name_prefix="encoder") as pool:
        running: dict[str, Future[Result]] = {
            name: pool.submit(contextvars.copy_context().run, run, name, task) for name, task in tasks.items()
        }
        try:
            left = set(running.values())
            while left:
                done, left = wait(left, return_when=FIRST_COMPLETED)
                for future in done:
                    if isinstance(error := _result(future), OutputError):  # nobody can write
                        raise error
        except BaseException:  # an interrupt, say: no thread would notice it
            cancel()
            raise
    return {name: _result(future) for name, future in running.items()}


def _result(future: Future[Any]) -> Any:
    """What it gave, or its error; raises what is none of one encoder."""
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, Exception):
        return error
    raise error.__cause__ if isinstance(error, _CallbackFailed) and error.__cause__ else error
