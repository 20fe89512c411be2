"""process_list.csv: columns, atomic updates, other people's rows, size."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from slide2vec.cohort import process_list
from slide2vec.cohort.process_list import COLUMNS, ProcessList, read_process_list
from slide2vec.errors import ArtifactError, OutputError


def rows(count: int) -> list[dict[str, str]]:
    return [
        {"sample_id": f"{n:04d}", "image_path": f"{n}.svs", "feature_status": "tbp"} for n in range(count)
    ]


def test_columns_are_those_of_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "process_list.csv"
    with ProcessList(path, rows(2)) as table:
        table.update("0001", error='a "quoted"\nline, and more', num_tiles=7, mask_path=None)
    assert path.read_text().splitlines()[0] == (
        "sample_id,image_path,mask_path,requested_backend,backend,spacing_at_level_0,tiling_status,num_tiles,"
        "coordinates_npz_path,coordinates_meta_path,tiles_tar_path,mask_preview_path,tiling_preview_path,"
        "feature_status,feature_path,encoder_name,output_variant,feature_kind,aggregation_status,error,traceback"
    )
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    assert frame["sample_id"].tolist() == ["0000", "0001"]
    assert frame["error"][1] == 'a "quoted"\nline, and more' and frame["num_tiles"][1] == "7"
    assert read_process_list(path) == frame.to_dict("records")


def test_unknown_columns_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "process_list.csv"
    with ProcessList(path, [{"sample_id": "a", "annotation": "tissue"}, {"sample_id": "b"}]):
        pass
    assert [row["annotation"] for row in read_process_list(path)] == ["tissue", ""]


def test_readers_never_see_half_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_list, "_EVERY_S", 0.001)
    monkeypatch.setattr(process_list, "_SHARE", 0)
    path, seen = tmp_path / "process_list.csv", set()
    with ProcessList(path, rows(300)) as table:

        def work(name: str) -> None:
            for number in range(200):
                table.update(name, num_tiles=number)
                time.sleep(0.0005)

        threads = [threading.Thread(target=work, args=(f"{n:04d}",)) for n in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            found = read_process_list(path)
            assert len(found) == 300
            seen.add(found[0]["num_tiles"])
    assert len(seen) > 2  # it was written while the rows changed
    assert [row["num_tiles"] for row in read_process_list(path)[:5]] == ["199"] * 4 + [""]


def test_a_disk_that_is_full_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_list, "_EVERY_S", 0.001)
    folder = tmp_path / "run"
    with (
        pytest.raises(OutputError, match=r"process_list\.csv"),
        ProcessList(folder / "process_list.csv", rows(3)) as table,
    ):
        (folder / "process_list.csv").unlink()
        folder.rmdir()
        folder.write_text("in the way")
        for number in range(10_000):
            table.update("0000", num_tiles=number)
            time.sleep(0.001)
        raise AssertionError("never told")


def test_garbage_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "process_list.csv"
    with ProcessList(path, rows(20)):
        pass
    whole, generator = path.read_bytes(), random.Random(0)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(generator.randint(1, 20)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        path.write_bytes(data[: generator.randrange(len(data))])
        try:
            assert all(set(COLUMNS) <= row.keys() for row in read_process_list(path))
        except ArtifactError as error:
            assert str(path) in str(error)
    with pytest.raises(ArtifactError):
        read_process_list(tmp_path / "none.csv")


@pytest.mark.parametrize("damage", [lambda text: text[:-40], lambda text: text.replace("mask_path,", "", 1)])
def test_a_row_of_other_cells_than_the_header_is_damage(damage: Callable[[str], str], tmp_path: Path) -> None:
    """A list that was cut off in a row is not read as a slide that is still to do."""
    path = tmp_path / "process_list.csv"
    with ProcessList(path, rows(3)):
        pass
    path.write_text(damage(path.read_text()))
    with pytest.raises(ArtifactError, match=r"process_list\.csv is damaged: line \d+ has"):
        read_process_list(path)
