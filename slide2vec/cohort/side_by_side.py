"""Run several encoders over the same slides side by side, each in a thread of its own."""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from slide2vec.config import ExecutionOptions
from slide2vec.progress import activate_progress_reporter
from slide2vec.progress.together import TogetherReporter
from slide2vec.slides import Slide
from slide2vec.stream.shared_slides import Share, SharedSlides
from slide2vec.stream.staging import stager_for

__all__ = ["run_side_by_side"]

Result = TypeVar("Result")


def run_side_by_side(
    tasks: Mapping[str, Callable[[Share], Result]],
    slides: Mapping[str, Sequence[Slide]],
    execution: ExecutionOptions,
    reporter: TogetherReporter,
) -> dict[str, Result | Exception]:
    """Do what each encoder has to do, sharing what is read; what it gave, or its error: that of one encoder
    does not stop the others.

    Args:
        tasks: of each encoder, called with its part in the slides.
        slides: that each encoder will plan.
        execution: says where slides are staged, if they are.
        reporter: is told of all of them.

    Raises:
        ConfigError: nothing can be written into stage_dir.
    """
    started = time.perf_counter()
    with stager_for(execution) as stager:
        shared = SharedSlides(tasks, stager)

        def run(name: str, task: Callable[[Share], Result]) -> Result:
            share = shared.share(name, slides[name])
            with share.membership(), activate_progress_reporter(reporter.of(name)):
                return task(share)

        with ThreadPoolExecutor(max(1, len(tasks)), thread_name_prefix="encoder") as pool:
            running = {
                name: pool.submit(contextvars.copy_context().run, run, name, task)
                for name, task in tasks.items()
            }
            try:
                wait(running.values())
            except BaseException:  # an interrupt: no thread would notice it
                reporter.cancel()
                stager.stop()
                raise
    found = {name: _result(future) for name, future in running.items()}
    for name, result in found.items():
        if isinstance(result, Exception):
            reporter.broken(name, result)
    reporter.finish(time.perf_counter() - started)
    return found


def _result(future: Future[Result]) -> Result | Exception:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, Exception):
        return error
    raise error
