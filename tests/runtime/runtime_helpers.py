"""What the tests of this folder share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slide2vec.runtime.base import BatchProfile
from slide2vec.runtime.record import RECORD_NAME, EngineRecord, key_of


def write_record(folder: Path, **changes: Any) -> None:
    """The engine.json of a TensorRT engine, with the key of its identity; `changes` may be wrong."""
    identity = changes.get("identity", {})
    record = EngineRecord(
        key=key_of(identity),
        identity={},
        preset="tiny",
        variant="cls",
        runtime="tensorrt",
        precision="fp16",
        asked_precision="fp16",
        layout="float32_nchw",
        input_size_px=4,
        feature_dim=5,
        profile=BatchProfile(1, 4, 4),
        file="encoder.plan",
        opset=20,
        parity={},
        licence="MIT",
        versions={},
        built_at="2026-11-25T00:00:00+00:00",
        build_seconds=1.0,
    )
    (folder / RECORD_NAME).write_text(json.dumps({**record.as_dict(), **changes}))
