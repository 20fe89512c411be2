"""A broken engine.json is a miss, told in a line; never the end of a run."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runtime_helpers import write_record

from slide2vec.compile.store import EngineStore
from slide2vec.errors import EngineError
from slide2vec.runtime.record import RECORD_NAME, key_of, read_record

PARITY = {
    **{"min_cosine": 0.999, "mean_cosine": 1, "finite": True, "least": 0.99, "tiles": 16},
    "batch_sizes": [1, 4],
}
IDENTITY = {
    **{"preset": "tiny", "runtime": "tensorrt", "precision": "fp16", "layout": "float32_nchw"},
    **{"input_size_px": 4, "output": {"dim": 5}, "profile": {"min": 1, "opt": 4, "max": 4}, "opset": 20},
    **{"device": {"type": "cuda"}, "weights": "0"},
}


@pytest.mark.parametrize("identity", [{}, IDENTITY])
@pytest.mark.parametrize("parity", [{}, PARITY])
def test_a_good_record(identity: dict[str, Any], parity: dict[str, Any], tmp_path: Path) -> None:
    write_record(tmp_path, identity=identity, parity=parity)
    record = read_record(tmp_path)
    assert (record.preset, record.identity, record.parity) == ("tiny", identity, parity)


def test_what_a_later_version_adds_is_passed_over(tmp_path: Path) -> None:
    write_record(tmp_path, colour="blue")
    assert read_record(tmp_path).preset == "tiny"


@pytest.mark.parametrize(
    "changes",
    [
        *({name: value} for name in ("preset", "identity", "profile", "speed") for value in (3, None, [1])),
        *({"checksums": value} for value in ({"a": 1}, {"../a": "0"}, {"a\0": "0"}, [])),
        *({"file": name} for name in ("..", "", "/etc/passwd", "a/b", "a\0b", 7)),
        *({name: value} for name in ("feature_dim", "input_size_px") for value in (0, -1, 1.5, True, "5")),
        {"speed": {"engine": 1.0}},
        {"speed": {"engine": "fast", "torch": 1.0}},
        {"speed": {"engine": math.nan, "torch": 1.0}},
        {"speed": {"engine": 10**400, "torch": 1.0}},
        {"parity": {"min_cosine": 1.0}},
        *(
            {"parity": {**PARITY, name: value}}
            for name, values in {
                "min_cosine": (None, math.nan),
                "mean_cosine": ("1.0", True),
                "least": (math.inf, None),
                "finite": (1, math.nan),
                "tiles": (0, 64.5),
                "batch_sizes": (16, [0], [True], ["1"], {"1": 2}),
            }.items()
            for value in values
        ),
        *({"parity": {key: PARITY[key] for key in PARITY if key != missing}} for missing in PARITY),
        {"key": "0" * 32},
        {"key": key_of({**IDENTITY, "opset": 21}), "identity": IDENTITY},
        *(
            {"identity": IDENTITY, name: value}
            for name, value in (
                *(("preset", "other"), ("runtime", "openvino"), ("precision", "fp32"), ("feature_dim", 6)),
                *(
                    ("layout", "uint8_nhwc"),
                    ("input_size_px", 8),
                    ("profile", {"min": 1, "opt": 2, "max": 4}),
                ),
            )
        ),
        {"identity": {"weights": "0"}},
        {"steps_down": [{}]},
        {"steps_down": [3]},
        {"profile": {"min": "1", "opt": 4, "max": 4}},
        {"schema_version": None},
        {"build_seconds": None},
        {"opset": "20"},
    ],
    ids=repr,
)
def test_wrong_types(changes: dict[str, Any], tmp_path: Path) -> None:
    write_record(tmp_path, **changes)
    with pytest.raises(EngineError, match=r"engine\.json"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda identity: identity.pop("opset"),
        lambda identity: identity.update(opset=None),
        lambda identity: identity.update(opset=math.inf),
        lambda identity: identity["device"].update(type="cpu"),
        lambda identity: identity.update(opzet=identity.pop("opset")),
    ],
)
def test_an_identity_that_is_not_that_of_the_key(change: Callable[[Any], Any], tmp_path: Path) -> None:
    """A bit that has flipped, say."""
    write_record(tmp_path, identity=IDENTITY)
    changed_record(tmp_path / RECORD_NAME, lambda content: change(content["identity"]))
    with pytest.raises(EngineError, match=r"engine\.json is not an engine's record: TypeError..key is "):
        read_record(tmp_path)


def changed_record(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


#: What may be found in the place of a record.
BROKEN: dict[str, Callable[[Path], Any]] = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "empty": Path.touch,
    "no JSON": lambda path: path.write_text("{"),
    "no object": lambda path: path.write_text("[1]"),
    "no UTF-8": lambda path: path.write_bytes(b'{"preset": "\xff"}'),
    "deep": lambda path: path.write_text("[" * 100_000),
    "long numbers": lambda path: path.write_text('{"schema_version": ' + "9" * 100_000 + "}"),
    "another key": lambda path: write_record(path.parent, key="0" * 32),
    "parity of another type": lambda path: write_record(path.parent, parity={**PARITY, "finite": 1}),
    "huge": lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 1 << 40),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_record_is_a_miss(what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("broken", "good"):
        (tmp_path / name).mkdir()
    write_record(tmp_path / "good")
    BROKEN[what](tmp_path / "broken" / RECORD_NAME)
    with caplog.at_level(logging.WARNING, "slide2vec"):
        for _ in range(2):
            assert [engine.name for engine in EngineStore(tmp_path)] == ["good"]
    assert len(caplog.records) == 1 or what == "a link to itself"


def test_a_missing_key_is_a_miss(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    write_record(tmp_path / "broken")
    changed_record(tmp_path / "broken" / RECORD_NAME, lambda content: content.pop("parity"))
    assert not list(EngineStore(tmp_path))


def test_records_of_before_name_no_layers_left_out(tmp_path: Path) -> None:
    write_record(tmp_path)
    path = tmp_path / RECORD_NAME
    content = json.loads(path.read_text())
    del content["left_out"]
    path.write_text(json.dumps(content))
    assert read_record(tmp_path).left_out == []
