"""What an engine on disk says of itself: `engine.json` in its folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from slide2vec.errors import ConfigError, EngineError
from slide2vec.runtime.base import BatchProfile, Layout

__all__ = ["RECORD_NAME", "SCHEMA", "EngineRecord", "read_record"]

RECORD_NAME = "engine.json"
#: Of the record and of what an engine's key is made from: records of another one are misses.
SCHEMA = 1
#: Share of PyTorch's speed below which an engine counts as slower: rounds vary by a few per cent.
NOT_SLOWER = 0.9


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
    checksums: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA

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


def read_record(directory: Path) -> EngineRecord:
    """The record of the engine in a folder.

    Raises:
        EngineError: there is none, it is damaged, or it is of another schema.
    """
    path = directory / RECORD_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"{path} cannot be read: {error}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA:
        raise EngineError(f"{path} has schema_version {version}, this version of slide2vec reads {SCHEMA}")
    try:
        known = {each.name: content[each.name] for each in fields(EngineRecord)}
        known["profile"] = BatchProfile(**known["profile"])
        record = EngineRecord(**known)
    except (KeyError, TypeError, ConfigError) as error:
        raise EngineError(f"{path} is not an engine's record: {error!r}") from error
    if Path(record.file).name != record.file:
        raise EngineError(f"{path}: file {record.file!r} is not in the folder")
    return record
