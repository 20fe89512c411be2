"""The builder of TensorRT and TensorRT-RTX: parse, configure, build. All that builds plans is here."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from slide2vec.errors import EngineError, OutputError
from slide2vec.files import atomic_path
from slide2vec.runtime.base import BatchProfile
from slide2vec.runtime.tensorrt.library import Library, Log, error_text

if TYPE_CHECKING:
    import tensorrt as trt
else:  # which library a monitor belongs to is known when it is made: `Library.own`
    trt = SimpleNamespace(IProgressMonitor=object)

__all__ = ["Settings", "build"]

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """Settings of the builder; see `slide2vec.compile.tensorrt.build_plan`."""

    profile: BatchProfile
    tf32: bool
    workspace_bytes: int | None
    optimization_level: int
    hardware_compatibility: str
    targets: tuple[str, ...] = ()


class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # untyped where TensorRT is not installed
    """TensorRT's progress, passed on to `on_progress`. Its first exception cancels the build and is `cause`:
    TensorRT would print it and lose it.
    """

    def __init__(self, on_progress: Progress | None) -> None:
        super().__init__()
        self._on_progress = on_progress
        self._steps: dict[str, int] = {}
        self.cause: BaseException | None = None

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        """Called by TensorRT when a phase begins; phases nest."""
        self._steps[phase_name] = num_steps
        self._tell(phase_name, 0)

    def step_complete(self, phase_name: str, step: int) -> bool:
        """Called by TensorRT after a step, counted from 0; False asks it to stop."""
        self._tell(phase_name, step + 1)
        return self.cause is None

    def phase_finish(self, phase_name: str) -> None:
        """Called by TensorRT when a phase ends, perhaps before its last step."""
        self._tell(phase_name, self._steps.get(phase_name, 0))

    def _tell(self, phase: str, done: int) -> None:
        if self._on_progress is None or self.cause is not None:
            return
        try:
            self._on_progress(phase, done, self._steps.get(phase, done))
        except BaseException as error:
            self.cause = error


def build(
    runtime: str,
    onnx: Path,
    plan: Path,
    settings: Settings,
    cache: Path | None,
    on_progress: Progress | None,
) -> None:
    """See `slide2vec.compile.tensorrt.build_plan`."""
    library = Library(runtime)
    log = library.log()
    builder = library.new_builder(log)
    network = builder.create_network(library.strongly_typed)
    _parse(onnx, network, library, log)
    config = _configure(builder, library, settings)
    _add_profile(onnx, builder, network, config, library, settings.profile)
    timings = _read_timings(config, cache)
    data = _compile(onnx, builder, network, config, library, log, on_progress)
    with atomic_path(plan) as temporary:
        temporary.write_bytes(data)
    if cache is not None and timings is not None:
        _write_timings(timings, cache)


def _parse(onnx: Path, network: trt.INetworkDefinition, library: Library, log: Log) -> None:
    parser = library.new_parser(network, log)  # it owns the weights; the network keeps it alive
    if not parser.parse_from_file(str(onnx)):
        errors = [_in_words(parser.get_error(index)) for index in range(parser.num_errors)]
        raise EngineError(f"{library.title} cannot parse {onnx}: {'; '.join(errors) or error_text(log)}")


def _in_words(error: trt.ParserError) -> str:
    operator = error.node_operator()  # none when the file itself cannot be read
    where = f" (node {error.node()}, {operator} {error.node_name()!r})" if operator else ""
    return f"{error.desc()}{where}"


def _configure(builder: trt.Builder, library: Library, settings: Settings) -> trt.IBuilderConfig:
    config = builder.create_builder_config()
    config.builder_optimization_level = settings.optimization_level
    if settings.targets:
        from slide2vec.runtime.tensorrt.rtx import set_targets

        set_targets(config, settings.targets)
    else:
        config.hardware_compatibility_level = library.compatibility[settings.hardware_compatibility]
    if not settings.tf32:
        config.clear_flag(library.tf32)
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(library.workspace, settings.workspace_bytes)
    return config


def _add_profile(
    onnx: Path,
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    config: trt.IBuilderConfig,
    library: Library,
    sizes: BatchProfile,
) -> None:
    """The batch sizes of the network's one input; its other dimensions must be fixed."""
    if network.num_inputs != 1:
        raise EngineError(f"{onnx} has {network.num_inputs} inputs, 1 is needed")
    tensor = network.get_input(0)
    batch, *row = list(tensor.shape) or [0]
    fits = batch == -1 or sizes.min == batch == sizes.max
    if not fits or min(row, default=0) < 1:
        raise EngineError(
            f"{onnx}: input {tensor.name} has shape {(batch, *row)}, which {sizes} does not fit"
        )
    least, best, most = (library.new_dims([size, *row]) for size in (sizes.min, sizes.opt, sizes.max))
    profile = builder.create_optimization_profile()
    profile.set_shape(tensor.name, min=least, opt=best, max=most)
    if config.add_optimization_profile(profile) < 0:
        raise EngineError(f"{onnx}: {library.title} refuses {sizes} for input {tensor.name}")


def _compile(
    onnx: Path,
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    config: trt.IBuilderConfig,
    library: Library,
    log: Log,
    on_progress: Progress | None,
) -> trt.IHostMemory:
    monitor = library.own(Monitor)(on_progress)
    config.progress_monitor = monitor
    with _interruptible(monitor):
        data: trt.IHostMemory | None = builder.build_serialized_network(network, config)
    if monitor.cause is not None:
        raise monitor.cause
    if data is None:
        raise EngineError(f"{library.title} cannot build {onnx}: {error_text(log)}")
    return data


@contextmanager
def _interruptible(monitor: Monitor) -> Iterator[None]:
    """Ctrl-C cancels the build through the monitor. Python would raise KeyboardInterrupt in the first
    bytecode that TensorRT calls, before any `try` of ours, and TensorRT would print it and lose it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread
        return

    def cancel(*_: object) -> None:
        monitor.cause = KeyboardInterrupt()

    previous = signal.signal(signal.SIGINT, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous or signal.SIG_DFL)


def _read_timings(config: trt.IBuilderConfig, path: Path | None) -> trt.ITimingCache | None:
    """The timing cache of a file, attached; an empty one where the file is missing or does not fit."""
    if path is None:
        return None
    if path.is_file():
        found: trt.ITimingCache | None = config.create_timing_cache(path.read_bytes())
        if found is not None and config.set_timing_cache(found, ignore_mismatch=False):
            return found
        logger.info("%s was measured on another GPU or TensorRT: it starts anew", path)
    empty: trt.ITimingCache | None = config.create_timing_cache(b"")
    if empty is None or not config.set_timing_cache(empty, ignore_mismatch=False):
        return None
    return empty


def _write_timings(timings: trt.ITimingCache, path: Path) -> None:
    """A cache that cannot be written costs the next build time, not this one its plan."""
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(timings.serialize())
    except OutputError as error:
        logger.warning("the timing cache is not kept: %s", error)
