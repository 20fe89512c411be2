"""bill.json: what runs into one directory took, whatever they were."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from slide2vec import ExecutionOptions, Model, Pipeline, PreprocessingConfig, RunResult
from slide2vec.cohort.bill import bill_path, collect_bills
from slide2vec.energy import Energy


class Meter:
    """Measures 3 Wh, whatever happens, where there are devices of this machine."""

    def __init__(self, devices: Sequence[str]) -> None:
        self.devices = tuple(devices)

    def stop(self) -> Energy:
        return Energy(3.0, f"RAPL (package-0) beside {' '.join(self.devices)}") if self.devices else Energy()


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slide2vec.progress.metering.EnergyMeter", Meter)


def run(model: Model, slides: Sequence[Any], output_dir: Path, **options: Any) -> RunResult:
    execution = ExecutionOptions(output_dir=output_dir, **options)
    return Pipeline(model, PreprocessingConfig(resume=True), execution).run(slides)


def bills(output_dir: Path, shard: str | None = None) -> list[dict[str, Any]]:
    content = json.loads(bill_path(output_dir, shard).read_text())
    assert content["schema_version"] == 1
    return content["runs"]  # type: ignore[no-any-return]


def test_a_run_ends_with_its_bill(model: Model, slides: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.svs"
    bad.write_bytes(b"no slide")
    result = run(model, [slides[0], slides[1], slides[5], bad], tmp_path / "out")
    (bill,) = bills(tmp_path / "out")
    summary, tiles = result.summary, [artifact.num_tiles for artifact in result.tile_artifacts]
    assert summary is not None and summary.watt_hours == 3.0
    assert "3 Wh by RAPL (package-0) beside cpu: 1 Wh a slide" in str(summary)
    assert {name: bill[name] for name in summary.bill()} == summary.bill()
    assert (bill["slides"], bill["failed"], bill["tiles"]) == (3, 1, sum(tiles))
    assert bill["encoders"] == {"scattering": summary.bill()} and bill["shard"] is None
    shares = {share["sample_id"]: share for share in bill["of_slides"]}
    assert [shares[name]["tiles"] for name in ("s0", "s1", "s5")] == tiles and len(shares) == 3
    assert sum(share["seconds"] for share in shares.values()) == pytest.approx(summary.seconds)
    assert shares["s1"]["watt_hours"] == pytest.approx(3.0 * tiles[1] / sum(tiles))
    logs = "".join(path.read_text() for path in (tmp_path / "out/logs").iterdir())
    assert str(summary) in logs


def test_later_runs_are_added_and_those_without_work_are_not(
    model: Model, slides: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(model, slides[:1], tmp_path)
    run(model, slides[:1], tmp_path)
    first = bills(tmp_path)
    assert len(first) == 1
    run(model, slides[:2], tmp_path)
    both = bills(tmp_path)
    assert both[:1] == first and [share["sample_id"] for share in both[1]["of_slides"]] == ["s1"]
    for count, broken in enumerate(("{", "[]", '{"runs": [{}]}'), 3):
        bill_path(tmp_path).write_text(broken)
        caplog.clear()
        run(model, slides[:count], tmp_path)
        assert "bill.json cannot be read" in caplog.text
        assert len(bills(tmp_path)) == 1


def test_shards_have_their_own_which_are_collected(model: Model, slides: list[Path], tmp_path: Path) -> None:
    for shard in ("1/2", "2/2"):
        run(model, slides[:4], tmp_path, shard=shard)
    parts = [bills(tmp_path, shard) for shard in ("1/2", "2/2")]
    assert [part[0]["shard"] for part in parts] == ["1/2", "2/2"] and not bill_path(tmp_path).exists()
    collect_bills(tmp_path)
    assert bills(tmp_path) == [*parts[0], *parts[1]]
    assert not bill_path(tmp_path, "1/2").exists()
    collect_bills(tmp_path)
    assert len(bills(tmp_path)) == 2


def test_a_run_on_a_cluster_is_not_measured(model: Model) -> None:
    assert model.devices_here(ExecutionOptions(executor="ray")) == ()
    assert model.devices_here(ExecutionOptions()) == ("cpu",)
    assert model.devices_here(ExecutionOptions(devices=("cpu", "cpu"))) == ("cpu", "cpu")
