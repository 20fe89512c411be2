"""What stands beside a plan: engine.json, as far as a runner needs it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slide2vec.errors import ConfigError, EngineError
from slide2vec.runtime.base import BatchProfile, Layout

__all__ = ["PlanRecord", "read_record"]

NAME = "engine.json"
LAYOUTS: tuple[Layout, ...] = ("float32_nchw", "uint8_nhwc")


@dataclass(frozen=True)
class PlanRecord:
    """A plan's file, the layout of the pixels it takes, its precision, D, and its batch sizes."""

    plan: Path
    layout: Layout
    precision: str
    feature_dim: int
    profile: BatchProfile


def read_record(path: Path) -> PlanRecord:
    """The record of an engine directory, or of the plan that stands in one.

    Raises:
        EngineError: there is no engine.json, or keys are missing or wrong; names them.
    """
    file = (path if path.is_dir() else path.parent) / NAME
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        sizes = found["profile"]
        record = PlanRecord(
            plan=path if path.is_file() else file.parent / found["file"],
            layout=found["layout"],
            precision=str(found["precision"]),
            feature_dim=int(found["feature_dim"]),
            profile=BatchProfile(*(int(sizes[key]) for key in ("min", "opt", "max"))),
        )
    except OSError as error:
        raise EngineError(
            f"{file} cannot be read ({error.strerror}): give a directory that `slide2vec build-engine` wrote"
        ) from error
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise EngineError(f"{file} is not the record of an engine: {type(error).__name__} {error}") from error
    if record.layout not in LAYOUTS:
        raise EngineError(f"{file}: layout {record.layout!r} is not one of {', '.join(LAYOUTS)}")
    return record
