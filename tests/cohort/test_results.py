"""What a run gives, as a table."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from slide2vec import (
    HierarchicalEmbeddingArtifact,
    PatientEmbeddingArtifact,
    RunResult,
    SlideEmbeddingArtifact,
    TileEmbeddingArtifact,
)
from slide2vec.cohort.results import FailedPatient, FailedSlide
from slide2vec.errors import PatientError, SlideOpenError
from slide2vec.progress import RunSummary

FILES = {"path": Path("/out/a.pt"), "metadata_path": Path("/out/a.meta.json"), "format": "pt"}


def test_a_row_for_each_artifact_and_failure() -> None:
    result = RunResult(
        tile_artifacts=[TileEmbeddingArtifact(sample_id="0001", num_tiles=5, feature_dim=3, **FILES)],
        hierarchical_artifacts=[
            HierarchicalEmbeddingArtifact(
                sample_id="r", num_regions=2, tiles_per_region=4, feature_dim=3, **FILES
            )
        ],
        slide_artifacts=[SlideEmbeddingArtifact(sample_id="0001", feature_dim=7, **FILES)],
        patient_artifacts=[PatientEmbeddingArtifact(patient_id="p", num_slides=1, feature_dim=9, **FILES)],
        process_list_path=Path("/out/process_list.csv"),
        failed=(FailedSlide("bad", Path("/bad.svs"), "embedding", SlideOpenError("slide bad: no file")),),
        failed_patients=(FailedPatient("q", PatientError("patient q: slides failed")),),
        without_tissue=("blank",),
        skipped_tiles={"0001": 2},
        remarks={"0001": ("One.", "Two.")},
    )
    frame = result.to_frame()
    assert frame["level"].tolist() == ["tile", "region", "slide", "patient", "tile", "tile", "patient"]
    assert frame["status"].tolist() == ["done"] * 4 + ["no tissue", "failed", "failed"]
    assert frame["sample_id"].dropna().tolist() == ["0001", "r", "0001", "blank", "bad"]
    assert frame["patient_id"].dropna().tolist() == ["p", "q"]
    assert frame["num_tiles"].dropna().tolist() == [5, 8, 0]
    assert frame["feature_dim"].dropna().tolist() == [3, 3, 7, 9]
    assert frame.loc[0, ["skipped_tiles", "remarks", "path"]].tolist() == [2, "One. Two.", "/out/a.pt"]
    assert frame["stage"].dropna().tolist() == ["embedding", "aggregation"]
    assert frame["error"].dropna().tolist() == ["slide bad: no file", "patient q: slides failed"]
    assert {str(frame[name].dtype) for name in ("num_tiles", "skipped_tiles", "feature_dim")} == {"Int64"}


def test_slide_without_tissue_that_has_an_artifact_comes_once() -> None:
    blank = TileEmbeddingArtifact(sample_id="blank", num_tiles=0, feature_dim=3, **FILES)
    result = RunResult(
        tile_artifacts=[blank], process_list_path=Path("p.csv"), without_tissue=("blank",)
    ).to_frame()
    assert result[["sample_id", "status", "num_tiles"]].values.tolist() == [["blank", "done", 0]]


def test_nothing_is_a_table_with_columns() -> None:
    frame = RunResult(process_list_path=Path("p.csv")).to_frame()
    assert isinstance(frame, pd.DataFrame) and len(frame) == 0
    assert {"sample_id", "status", "path", "error"} <= set(frame.columns)


def test_in_words_and_as_html() -> None:
    """Failures come first; names and errors are text, whatever they hold; a long run is not a long table."""
    made = [
        TileEmbeddingArtifact(sample_id=f"s{i}", num_tiles=1234, feature_dim=3, **FILES) for i in range(40)
    ]
    error = SlideOpenError("<script>alert(1)</script>")
    result = RunResult(
        tile_artifacts=made,
        process_list_path=Path("/out/p.csv"),
        failed=(FailedSlide("bad & ugly", Path("/bad.svs"), "embedding", error),),
        remarks={"s1": ("Much glass.",)},
        resumed=7,
    )
    said = "40 tile artifacts, 1 failed, 1 with remarks, 7 from an earlier run"
    assert repr(result) == f"RunResult({said}; process_list_path='/out/p.csv')"
    shown = result._repr_html_()
    assert said in shown and "<script>" not in shown and "&lt;script&gt;alert(1)&lt;/script&gt;" in shown
    rows = re.findall("<tr.*?</tr>", shown)[1:]
    assert len(rows) == 20 and "bad &amp; ugly" in rows[0] and "color" in rows[0]
    assert "Much glass." in rows[2] and "1,234" in rows[2] and "color" not in rows[2]
    assert "and 21 more: see to_frame()" in shown
    both = RunResult.of_several({"uni": result, "b": RunResult(process_list_path=Path("/out/p.csv"))})
    assert '<td style="text-align:left">uni</td>' in both._repr_html_()
    assert repr(RunResult(process_list_path=Path("p"))) == "RunResult(no artifacts; process_list_path='p')"


def test_how_tiles_were_read_is_of_every_group() -> None:
    """Encoders of one reading have the same tiles, or tiles of the same slides."""
    roads = {"a": {"tiff": 10}, "b": {"tiff": 5}, "c": {"scratch": 7, "tiff": 3}}
    results = {
        name: RunResult(process_list_path=Path("p"), summary=RunSummary(2, 0, 10, 1.0, (), "read", each))
        for name, each in roads.items()
    }
    whole = RunSummary(2, 0, 30, 3.0, (), "read", from_scratch=1, decoded_again=1, scratch_bytes=54_940_000)
    grouped = RunResult.of_several(results, whole, [["a", "b"], ["c"]]).summary
    assert grouped is not None and grouped.roads == {"tiff": 13, "scratch": 7}
    said = (
        "slides were read 2 times (1 from the scratch, 1 decoded again), for a + b, then for c, with 54.9 MB"
    )
    assert str(grouped).endswith(f"{said} in the scratch")
    together = RunResult.of_several(results).summary
    assert together is not None and together.roads == {"tiff": 10}
