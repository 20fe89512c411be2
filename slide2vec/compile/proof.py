"""Whether an engine that was built without its GPU does what it should on the GPU that is to use it.

Such an engine could not be compared with its encoder when it was built. It is at first use, once per kind of
GPU, on the tiles and features that were kept beside it; what came of it is kept there too.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slide2vec.compile.parity import Parity, Reference, check_files, parity_of
from slide2vec.compile.speed import beside_torch
from slide2vec.compile.store import StoredEngine
from slide2vec.errors import EngineError, OutputError
from slide2vec.files import atomic_path, open_plain
from slide2vec.recipes import Recipe
from slide2vec.runtime.base import Engine
from slide2vec.runtime.loading import load_engine
from slide2vec.runtime.record import EngineRecord, per_gpu

__all__ = [
    "Proof",
    "as_proven",
    "is_to_be_proven",
    "proof_on",
    "proofs",
    "prove",
    "prove_anew",
    "proven",
    "state",
    "write_proof",
]

logger = logging.getLogger(__name__)

#: Proofs have a few hundred bytes.
_MOST_BYTES = 2**20
_TYPES: Mapping[str, type] = {"gpu": str, "plan": str, "parity": dict, "speed": dict, "problem": str}


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What came of comparing an engine with its encoder on a kind of GPU.

    Attributes:
        gpu: its name.
        plan: SHA-256 of the plan that was run; a proof of another one is none.
        parity, speed: as in `EngineRecord`.
        problem: why the engine must not be used on such a GPU; empty when it may.
    """

    gpu: str
    plan: str
    parity: dict[str, Any]
    speed: dict[str, float]
    problem: str

    def as_parity(self) -> Parity:
        """What was measured."""
        return Parity(**{**self.parity, "batch_sizes": tuple(self.parity["batch_sizes"])})


def is_to_be_proven(record: EngineRecord) -> bool:
    """Whether an engine needs a proof on each kind of GPU: it is for compute capabilities, not for one."""
    return record.runtime == "tensorrt-rtx"


def proofs(engine: StoredEngine) -> Iterator[Proof]:
    """Those that there are, by the name of the GPU."""
    for path in sorted(engine.directory.glob("proof-*.json")):
        found = _read(path, engine.record)
        if found is not None:
            yield found


def state(engine: StoredEngine) -> str:
    """Where an engine may be used, in words."""
    found = list(proofs(engine))
    if not found:
        return "not yet proven: compared with its encoder at first use on a GPU, and used if it is close"
    return "; ".join(
        f"failed on {proof.gpu}: {proof.problem}" if proof.problem else f"proven on {proof.gpu}"
        for proof in found
    )


def as_proven(engine: StoredEngine) -> StoredEngine:
    """The engine with the least parity that a proof found; as it is where there are none."""
    found = sorted(proofs(engine), key=lambda proof: float(proof.parity["min_cosine"]))
    return proven(engine, found[0]) if found else engine


def proof_on(engine: StoredEngine, device: torch.device) -> Proof | None:
    """That of a CUDA device's kind; None where there is none yet."""
    gpu = torch.cuda.get_device_name(device)
    found = _read(engine.directory / per_gpu("proof", gpu, "json"), engine.record)
    return found if found is not None and found.gpu == gpu else None


def prove(
    engine: StoredEngine, loaded: Engine, encoder: nn.Module | None = None, recipe: Recipe | None = None
) -> Proof:
    """Compare a loaded engine, whose files are sound, with what its encoder gave; keep what comes of it.

    Args:
        encoder, recipe: to be timed beside it in PyTorch; None = what was measured before is kept.

    Raises:
        EngineError: the engine does not run.
    """
    gpu = torch.cuda.get_device_name(loaded.device)
    logger.info("engine %s is used for the first time on %s: comparing it", engine.name, gpu)
    parity = parity_of(engine, loaded)
    if encoder is not None and recipe is not None and not parity.problem():
        speed = _timed(engine, loaded, encoder, recipe)
    else:
        before = proof_on(engine, loaded.device)
        speed = before.speed if before is not None else {}
    return write_proof(engine, loaded.device, parity, speed)


def prove_anew(engine: StoredEngine, device: torch.device) -> Parity:
    """As `verify_engine`; what comes of it is kept.

    Raises:
        EngineError: as `verify_engine`, or the engine needs a GPU, and there is none.
    """
    check_files(engine)
    loaded = load_engine(engine.directory, device)
    try:
        proof = prove(engine, loaded)
    finally:
        loaded.close()
    if proof.problem:
        raise EngineError(f"engine {engine.name}: {proof.problem}; build it again")
    return proof.as_parity()


def write_proof(engine: StoredEngine, device: torch.device, parity: Parity, speed: dict[str, float]) -> Proof:
    """Keep a proof beside an engine; where the store cannot be written to, it is made again next time."""
    record = engine.record
    made = Proof(
        gpu=torch.cuda.get_device_name(device),
        plan=record.checksums[record.file],
        parity={**asdict(parity), "batch_sizes": list(parity.batch_sizes)},
        speed=speed,
        problem=parity.problem() or "",
    )
    try:
        with atomic_path(engine.directory / per_gpu("proof", made.gpu, "json")) as temporary:
            temporary.write_text(json.dumps(asdict(made), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except OutputError as error:
        logger.info("that engine %s was compared is not kept: %s", engine.name, error)
    return made


def proven(engine: StoredEngine, proof: Proof) -> StoredEngine:
    """The engine as it is on the GPU of a proof: with parity and speed there."""
    return replace(engine, record=replace(engine.record, parity=proof.parity, speed=proof.speed))


def _timed(engine: StoredEngine, loaded: Engine, encoder: nn.Module, recipe: Recipe) -> dict[str, float]:
    """Nothing where the GPU has no room for both."""
    pixels = Reference.of(engine).pixels
    try:
        return beside_torch(loaded, encoder, recipe, pixels, engine.record.profile.opt)
    except torch.cuda.OutOfMemoryError:
        logger.info("engine %s is not timed: there is no memory for PyTorch beside it", engine.name)
        encoder.cpu()
        return {}


def _read(path: Path, record: EngineRecord) -> Proof | None:
    """None where there is no proof, a broken one, or one of another plan."""
    try:
        with open_plain(path) as file:
            content = json.loads(file.read(_MOST_BYTES).decode("utf-8"))
        known = {name: content[name] for name in _TYPES}
        sound = all(isinstance(known[name], kind) for name, kind in _TYPES.items())
        numbers = [known["parity"][name] for name in ("min_cosine", "mean_cosine", "tiles")]
        numbers += [known["speed"][name] for name in ("engine", "torch") if known["speed"]]
        sound = sound and all(isinstance(each, int | float) for each in numbers)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        logger.info("%s is no proof (%r): the engine is compared anew", path, error)
        return None
    if not sound or known["plan"] != record.checksums.get(record.file):
        logger.info("%s is no proof of this plan: the engine is compared anew", path)
        return None
    return Proof(**known)
