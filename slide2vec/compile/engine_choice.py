"""Which engine runs an encoder: one of the store's, or PyTorch."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial

from slide2vec.choices import RUNTIMES
from slide2vec.compile.builders import default_runtime
from slide2vec.compile.engine_key import EngineTarget, differences
from slide2vec.compile.export_module import torch_engine
from slide2vec.compile.gain import expected_gain
from slide2vec.compile.late_engine import LateTorchEngine
from slide2vec.compile.parity import check_files
from slide2vec.compile.proof import is_to_be_proven, proof_on, prove, proven
from slide2vec.compile.store import EngineStore, StoredEngine
from slide2vec.encoders.late import AnyEncoder, LateEncoder, as_module
from slide2vec.errors import ConfigError, EngineError, ExtraMissingError
from slide2vec.runtime.base import Engine
from slide2vec.runtime.loading import load_engine, not_here, runtimes_for
from slide2vec.runtime.torch_engine import DTYPES
from slide2vec.version import __version__

__all__ = ["ADVICE", "MatchingEngines", "Selected", "find_engine", "select_engine"]

#: Name of the logger of what users may want to know about faster ways; the command line shows all of it.
ADVICE = __name__
logger = logging.getLogger(ADVICE)

_suggested: set[tuple[str, str]] = set()


@dataclass
class MatchingEngines:
    """Engines of an encoder that fit, the best first; and why others of it do not, by name."""

    matching: list[StoredEngine] = field(default_factory=list)
    stale: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Selected:
    """What runs an encoder; the batch size that it was built for, None for PyTorch."""

    engine: Engine
    batch_size: int | None = None


def find_engine(
    store: EngineStore, target: EngineTarget, precision: str, runtimes: tuple[str, ...]
) -> MatchingEngines:
    """Look for the engines of an encoder that were built for a precision, in the order of `runtimes`.

    The weights are read only where everything else agrees.
    """
    found = MatchingEngines()
    for engine in store:
        record = engine.record
        if (record.preset, record.variant) != (target.recipe.name, target.variant):
            continue
        if record.runtime not in runtimes or precision not in (record.precision, record.asked_precision):
            continue
        if reason := not_here(record.runtime, record.precision, target.device):
            found.stale[engine.name] = reason
        elif changed := list(differences(target, record)):
            found.stale[engine.name] = f"built with another {', '.join(changed)}"
        elif is_to_be_proven(record):
            _sort(engine, target, found)
        else:
            found.matching.append(engine)
    found.matching.sort(key=lambda engine: _rank(engine, precision, runtimes))
    return found


def _sort(engine: StoredEngine, target: EngineTarget, found: MatchingEngines) -> None:
    """An engine that is proven on each kind of GPU: as it was here, if it was. One that failed is stale."""
    proof = proof_on(engine, target.device)
    if proof is not None and proof.problem:
        found.stale[engine.name] = f"on {proof.gpu} {proof.problem}; `slide2vec engines verify` tries again"
    else:
        found.matching.append(engine if proof is None else proven(engine, proof))


def _rank(engine: StoredEngine, precision: str, runtimes: tuple[str, ...]) -> tuple[int, bool, float]:
    """By runtime, then exactly the precision, then speed when it was built."""
    record = engine.record
    return runtimes.index(record.runtime), record.precision != precision, -record.speed.get("engine", 0.0)


def select_engine(
    choice: str,
    encoder: AnyEncoder,
    target: EngineTarget,
    precision: str,
    *,
    store: EngineStore | None = None,
    compiled: bool = False,
) -> Selected:
    """Find what runs the encoder.

    Args:
        encoder: is built where PyTorch runs it, when it does so first.
        choice: "auto": an engine of the store that fits and was not slower than PyTorch when it was built,
            else PyTorch, saying in one line (logged) what `slide2vec build-engine` would do; "torch"; or a
            runtime, whose engine has to be there.
        compiled: PyTorch's just-in-time compiler, where PyTorch runs it.

    Raises:
        EngineError: the runtime asked for has no engine of this encoder that can run here; or fp8 is
            asked for, which PyTorch does not do, and there is no engine.
    """
    if choice == "torch":
        return _torch(encoder, target, precision, compiled)
    runtimes = runtimes_for(target.device)
    if choice != "auto":
        runtimes = tuple(name for name in runtimes if name == choice)
        if choice not in RUNTIMES:
            raise ConfigError(f"engine={choice!r} is not auto, torch, {', '.join(RUNTIMES)}")
        if not runtimes:
            raise EngineError(f"engine={choice!r} does not run on {target.device}")
    try:
        store = store or EngineStore()
    except EngineError as error:
        if choice != "auto":
            raise
        logger.info("%s runs in PyTorch: %s", target.recipe.name, error)
        return _torch(encoder, target, precision, compiled)
    found = find_engine(store, target, precision, runtimes)
    problems = dict(found.stale)
    for engine in found.matching:
        if choice == "auto" and engine.record.is_slower:
            logger.info("engine %s is not used: PyTorch was faster when it was built", engine.name)
            continue
        try:
            loaded = _loaded(engine, encoder, target, choice)
        except (EngineError, ExtraMissingError) as error:
            problems[engine.name] = str(error)
            continue
        if loaded is None:
            continue
        _tell_precision(engine, precision)
        _tell_lock(engine, loaded)
        return Selected(loaded, engine.record.profile.opt)
    if choice != "auto":
        raise EngineError(_missing(choice, target, precision, problems))
    for name, problem in problems.items():
        logger.warning("engine %s is not used: %s", name, problem)
    _suggest(store, target, precision)
    return _torch(encoder, target, precision, compiled)


def _loaded(engine: StoredEngine, encoder: AnyEncoder, target: EngineTarget, choice: str) -> Engine | None:
    """An engine that may be used, proven if that is still to be done; None where PyTorch is faster.

    Raises:
        EngineError: it does not load, or is not close enough to its encoder on this GPU.
        ExtraMissingError: as `load_engine`.
    """
    if not is_to_be_proven(engine.record) or engine.record.parity:
        return load_engine(engine.directory, target.device)
    check_files(engine)
    loaded = load_engine(engine.directory, target.device)
    try:
        proof = prove(engine, loaded, as_module(encoder), target.recipe)
    except BaseException:
        loaded.close()
        raise
    if proof.problem:
        loaded.close()
        raise EngineError(f"on {proof.gpu} {proof.problem}")
    if choice == "auto" and proven(engine, proof).record.is_slower:
        logger.info("engine %s is not used: PyTorch is faster on %s", engine.name, proof.gpu)
        loaded.close()
        return None
    return loaded


def _torch(encoder: AnyEncoder, target: EngineTarget, precision: str, compiled: bool) -> Selected:
    if precision not in DTYPES:
        raise EngineError(
            f"PyTorch does not run {target.recipe.name} in {precision}, and no engine does: "
            f"{_command(target, precision)} builds one where the hardware can"
        )
    dim = target.recipe.variants[target.variant].dim
    make = partial(torch_engine, feature_dim=dim, compiled=compiled)
    recipe, device = target.recipe, target.device
    # On CUDA weights must be there before memory is measured, and before another encoder's graph is captured.
    if isinstance(encoder, LateEncoder) and not encoder.is_built and device.type != "cuda":
        late = lambda: make(encoder.module, recipe, precision, device)  # noqa: E731
        return Selected(LateTorchEngine(late, feature_dim=dim, precision=precision, device=device))
    return Selected(make(as_module(encoder), recipe, precision, device))


def _tell_precision(engine: StoredEngine, precision: str) -> None:
    record = engine.record
    if record.precision != precision:
        reasons = "; ".join(f"{each['precision']}: {each['reason']}" for each in record.steps_down)
        logger.warning(
            "engine %s computes in %s, not %s (%s)", engine.name, record.precision, precision, reasons
        )


def _tell_lock(engine: StoredEngine, loaded: Engine) -> None:
    """What it costs on a CPU, where `run` lasts as long as the batch: reading threads stand still."""
    speed = engine.record.speed.get("engine")
    if loaded.holds_gil and loaded.device.type == "cpu" and speed:
        logger.info(
            "engine %s holds Python's lock while it encodes, %.0f ms a batch: reading threads wait meanwhile",
            engine.name,
            1e3 * engine.record.profile.opt / speed,
        )


def _missing(runtime: str, target: EngineTarget, precision: str, problems: dict[str, str]) -> str:
    others = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
    return (
        f"there is no {runtime} engine of {target.recipe.name} ({target.variant}) in {precision} for this "
        f"machine{f' ({others})' if others else ''}: build it with {_command(target, precision, runtime)}"
    )


def _suggest(store: EngineStore, target: EngineTarget, precision: str) -> None:
    """Say, once per preset and precision on this machine, what could be done instead, and its gain."""
    name = target.recipe.name
    if not logger.isEnabledFor(logging.INFO) or (name, precision) in _suggested:
        return
    _suggested.add((name, precision))
    if not runtimes_for(target.device) or not target.recipe.engine.advised:
        return
    if not store.takes_note(f"advice {__version__} {name} {precision} {target.device.type}"):
        return
    if not target.recipe.compile:
        logger.info("%s cannot be compiled: %s", name, target.recipe.compile_note)
        return
    try:
        runtime = default_runtime(precision, target.device)
    except EngineError as error:
        logger.info("%s runs in PyTorch: %s", name, error)
        return
    gain = expected_gain(store, target, precision, runtime)
    logger.info(
        "%s runs in PyTorch; %s compiles it for this machine with %s%s",
        name,
        _command(target, precision),
        runtime,
        f", which is about {gain.times:.1f} times as fast" if gain else "",
    )


def _command(target: EngineTarget, precision: str, runtime: str | None = None) -> str:
    chosen = f" --runtime {runtime}" if runtime else ""
    return f"`slide2vec build-engine --preset {target.recipe.name} --precision {precision}{chosen}`"
