"""What passes between processes, and which devices there are."""

from __future__ import annotations

import json
import logging
import pickle
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from slide2vec.errors import ConfigError, OutputError, SlideOpenError
from slide2vec.progress import RunSummary, StationTime, merged
from slide2vec.runtime import devices_for
from slide2vec.scale import shared_tensors
from slide2vec.scale.local_pool import _environment
from slide2vec.scale.messages import portable
from slide2vec.scale.shared_tensors import load_features, spool_folder, store

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3), (0, 3)])
def test_embeddings_come_back_as_they_are(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    values = torch.randn(shape).to(dtype)
    found = load_features(pickle.loads(pickle.dumps(store(values, tmp_path))))
    assert found.dtype == dtype and torch.equal(found, values)
    assert not list(tmp_path.iterdir()), "the file has no name any more"
    found += 1  # mapped memory may be written to


def test_embeddings_go_to_a_disk_where_shared_memory_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, disk = tmp_path / "full", tmp_path / "disk"
    full.mkdir(), disk.mkdir()
    usage: Any = shared_tensors.shutil.disk_usage
    monkeypatch.setattr(
        shared_tensors.shutil,
        "disk_usage",
        lambda path: usage(path)._replace(free=0) if path == full else usage(path),
    )
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    values = torch.randn(4, 3)
    stored = store(values, full)
    assert stored.path.parent == disk and not list(full.iterdir())
    assert torch.equal(load_features(stored), values)


def test_spool_folder_is_new() -> None:
    first, second = spool_folder(), spool_folder()
    assert first != second and first.is_dir()
    first.rmdir(), second.rmdir()


class Peculiar(Exception):
    """Cannot be unpickled: it is made from two values."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


def test_errors_survive_the_way() -> None:
    for error in (SlideOpenError("slide a: gone"), OutputError.of("/out", OSError(28, "No space"))):
        found = portable(error)
        again = pickle.loads(pickle.dumps(found))
        assert type(again) is type(error) and str(again) == str(error)
        assert getattr(again, "errno", None) == getattr(error, "errno", None)
    assert str(portable(Peculiar("a", "b"))) == "Peculiar: a b"


def test_devices_of_a_cpu(caplog: pytest.LogCaptureFixture) -> None:
    assert devices_for(CPU, chosen=False) == ("cpu",)
    assert devices_for(CPU, chosen=False, devices=("cpu", "cpu")) == ("cpu", "cpu")
    with caplog.at_level(logging.WARNING):
        assert devices_for(CPU, chosen=False, num_gpus=2) == ("cpu",)
    assert "num_gpus=2" in caplog.text


def test_devices_of_a_machine_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert devices_for(GPU, chosen=False) == ("cuda:0", "cuda:1", "cuda:2", "cuda:3")
    assert devices_for(GPU, chosen=False, num_gpus=2) == ("cuda:0", "cuda:1")
    assert devices_for(torch.device("cuda:2"), chosen=True) == ("cuda:2",)
    assert devices_for(torch.device("cuda:2"), chosen=True, num_gpus=2) == ("cuda:0", "cuda:1")
    assert devices_for(GPU, chosen=False, num_gpus=0) == ("cuda",)
    assert devices_for(GPU, chosen=False, devices=("cuda:1", "cuda:3")) == ("cuda:1", "cuda:3")
    with pytest.raises(ConfigError, match="num_gpus=8: PyTorch sees 4"):
        devices_for(GPU, chosen=False, num_gpus=8)
    with pytest.raises(ConfigError, match="the model is on cuda"):
        devices_for(GPU, chosen=False, devices=("cpu", "cuda:1"))


def test_a_worker_sees_its_own_gpu_only() -> None:
    assert _environment("cuda:1", 3, {})["CUDA_VISIBLE_DEVICES"] == "1"
    assert _environment("cuda:1", 3, {"CUDA_VISIBLE_DEVICES": "4,GPU-ab"})["CUDA_VISIBLE_DEVICES"] == "GPU-ab"
    made = _environment("cpu", 3, {})
    assert made["SLIDE2VEC_CPUS"] == "3" and "CUDA_VISIBLE_DEVICES" not in made


def test_summaries_of_streams_side_by_side() -> None:
    def summary(tiles: int, bottleneck: str) -> RunSummary:
        stations = (StationTime("read", 2, 3.0, 1.0), StationTime("encode", 1, 4.0, 0.5))
        return RunSummary(2, 1, tiles, 9.0, stations, bottleneck, {"cucim": 3})

    found = merged([summary(10, "read"), summary(30, "encode")], 10.0)
    assert (found.slides, found.failed, found.tiles, found.seconds) == (4, 2, 40, 10.0)
    assert found.stations[0] == StationTime("read", 4, 6.0, 2.0) and found.roads == {"cucim": 6}
    assert found.bottleneck == "encode", "of the stream that did the most"
    assert str(merged([], 1.0)).startswith("0 tiles")
    assert json.loads(json.dumps(asdict(found)))["roads"] == {"cucim": 6}
