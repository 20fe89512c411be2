"""What an engine on disk says of itself: `engine.json` in its folder."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from slide2vec.errors import ConfigError, EngineError
from slide2vec.files import open_plain
from slide2vec.runtime.base import BatchProfile, Layout

__all__ = ["RECORD_NAME", "SCHEMA", "EngineRecord", "key_of", "per_gpu", "read_record"]

RECORD_NAME = "engine.json"
#: Of the record and of what an engine's key is made from: records of another one are misses.
SCHEMA = 1
#: Share of PyTorch's speed below which an engine counts as slower: rounds vary by a few per cent.
NOT_SLOWER = 0.9
#: Records have a few KB.
_MOST_BYTES = 16 * 2**20
_TEXTS = (
    *("key", "preset", "variant", "runtime", "precision", "asked_precision", "layout", "file", "licence"),
    "built_at",
)
#: Field -> its type in JSON.
_KINDS: Mapping[str, type] = {
    **dict.fromkeys(_TEXTS, str),
    **dict.fromkeys(("identity", "profile", "parity", "versions", "speed", "checksums"), dict),
    **dict.fromkeys(("steps_down", "left_out"), list),
}
#: Fields that an identity has, too.
_SHARED = ("preset", "runtime", "precision", "layout", "input_size_px", "profile")


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """A published engine.

    Attributes:
        key: digest of `identity`.
        identity: everything that would make another engine: encoder, weights, types, libraries, device.
        preset, variant: what it embeds.
        runtime: that runs it.
        precision: that it computes in; asked_precision: that was to be built (they differ where it was
            not close enough to the encoder, see `steps_down`).
        layout, input_size_px: of the pixels it takes.
        feature_dim: D.
        profile: the batch sizes it was built for.
        file: the engine in its folder.
        checksums: SHA-256 of every file in the folder, by name.
        opset: of the ONNX it was made from; None without.
        parity: see `slide2vec.compile.parity.Parity`.
        speed: tiles/s of the engine and of PyTorch on this machine, when it was built.
        steps_down: precisions that failed before this one, and why.
        left_out: layers that are in fp16 in an engine of fp8, since fp8 disturbs them most.
        licence: of the weights, in a line.
        versions: of the libraries that built it.
        built_at: ISO 8601, UTC; build_seconds: what it took.
    """

    key: str
    identity: dict[str, Any]
    preset: str
    variant: str
    runtime: str
    precision: str
    asked_precision: str
    layout: Layout
    input_size_px: int
    feature_dim: int
    profile: BatchProfile
    file: str
    opset: int | None
    parity: dict[str, Any]
    licence: str
    versions: dict[str, str]
    built_at: str
    build_seconds: float
    speed: dict[str, float] = field(default_factory=dict)
    steps_down: list[dict[str, str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    checksums: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA

    @property
    def engine_arguments(self) -> dict[str, Any]:
        """Arguments that every runtime's engine takes."""
        return {"precision": self.precision, "feature_dim": self.feature_dim, "layout": self.layout}

    @property
    def is_slower(self) -> bool:
        """Whether PyTorch was faster when the engine was built, beyond what is noise."""
        speed = self.speed
        return bool(speed) and speed["engine"] < NOT_SLOWER * speed["torch"]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def as_json(self) -> str:
        """The text of `engine.json`."""
        return json.dumps(self.as_dict(), indent=2, sort_keys=True) + "\n"


def per_gpu(what: str, gpu: str, ending: str) -> str:
    """Name of a file beside an engine about one kind of GPU, which comes after the engine is published."""
    return f"{what}-{re.sub(r'[^A-Za-z0-9]+', '_', gpu)}.{ending}"


def key_of(identity: Mapping[str, Any]) -> str:
    """Digest of an identity, weights included."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def read_record(directory: Path) -> EngineRecord:
    """The record of the engine in a folder.

    Raises:
        EngineError: there is none, it is damaged (its key is not that of its identity, say), or it is of
            another schema.
    """
    path = directory / RECORD_NAME
    try:
        with open_plain(path) as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
        content = json.loads(data.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EngineError(f"{path} cannot be read: {error}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA:
        raise EngineError(f"{path} has schema_version {version}, this version of slide2vec reads {SCHEMA}")
    try:
        content.setdefault("left_out", [])  # of records that older versions wrote
        known = {each.name: content[each.name] for each in fields(EngineRecord)}
        _check_types(known)
        known["profile"] = BatchProfile(**known["profile"])
        record = EngineRecord(**known)
    except (KeyError, TypeError, ConfigError) as error:
        raise EngineError(f"{path} is not an engine's record: {error!r}") from error
    for name in (record.file, *record.checksums):
        if Path(name).name != name or name in ("", "..") or "\0" in name:
            raise EngineError(f"{path}: file {name!r} is not in the folder")
    return record


def _check_types(known: Mapping[str, Any]) -> None:
    """Refuse records whose fields have unexpected types.

    Raises:
        TypeError: naming the field.
        KeyError: something is missing within one.
    """
    identity, parity, speed = known["identity"], known["parity"], known["speed"]
    for name, kind in _KINDS.items():
        _require(isinstance(known[name], kind), name, known[name])
    for name in ("input_size_px", "feature_dim"):
        _require(type(known[name]) is int and known[name] > 0, name, known[name])
    _require(type(known["opset"]) in (int, type(None)), "opset", known["opset"])
    _require(_is_number(known["build_seconds"]), "build_seconds", known["build_seconds"])
    profile = known["profile"]
    _require(all(type(size) is int for size in profile.values()), "profile", profile)
    _require(not speed or all(_is_number(speed[name]) for name in ("engine", "torch")), "speed", speed)
    _require(not parity or _is_parity(parity), "parity", parity)
    _require(not identity or isinstance(identity["device"]["type"], str), "identity", identity)
    _require(not identity or isinstance(identity["weights"], str), "identity", identity)
    _require(known["key"] == key_of(identity), "key", known["key"])
    same = {name: identity[name] for name in _SHARED if name in identity}
    if "output" in identity:
        same["feature_dim"] = identity["output"]["dim"]
    for name, value in same.items():
        _require(known[name] == value, name, known[name])
    for name in ("versions", "checksums"):
        _require(all(isinstance(value, str) for value in known[name].values()), name, known[name])
    _require(all(isinstance(name, str) for name in known["left_out"]), "left_out", known["left_out"])
    steps = known["steps_down"]
    _require(all(isinstance(step["precision"] + step["reason"], str) for step in steps), "steps_down", steps)


def _require(holds: bool, name: str, value: Any) -> None:
    if not holds:
        raise TypeError(f"{name} is {str(value)[:100]!r}")


def _is_parity(parity: Mapping[str, Any]) -> bool:
    """Whether it may be one of `slide2vec.compile.parity.Parity`."""
    sizes = parity["batch_sizes"]
    return (
        all(_is_number(parity[name]) for name in ("min_cosine", "mean_cosine", "least"))
        and type(parity["finite"]) is bool
        and isinstance(sizes, list)
        and all(type(size) is int and size > 0 for size in (parity["tiles"], *sizes))
    )


def _is_number(value: Any) -> bool:
    """Whether it is a finite one; Python's JSON takes NaN and Infinity, too."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
