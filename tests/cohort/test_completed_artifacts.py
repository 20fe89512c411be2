"""Which embeddings of an output directory are finished, with made-up sidecars: no slide is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slide2vec import ExecutionOptions, PreprocessingConfig
from slide2vec.artifacts.places import Kind, Place
from slide2vec.artifacts.records import SCHEMA_VERSION, find_tile_artifact
from slide2vec.cohort import identity as identity_module
from slide2vec.cohort.identity import CompletedArtifacts, compatibility
from slide2vec.config import FilterConfig
from slide2vec.errors import ConfigError
from slide2vec.geometry import tile_geometry
from slide2vec.readers.fingerprint import fingerprint
from slide2vec.slides import Slide, as_slide
from slide2vec.stream.slide_identity import Identities
from slide2vec.tiling import write_coordinates
from slide2vec.tiling.types import Segmentation, Tiling

CONFIG = PreprocessingConfig(requested_spacing_um=0.5, requested_tile_size_px=96)
ENCODER = {"name": "tiny", "precision": "fp16", "weights": "w"}
IDENTITIES: dict[Kind, dict[str, Any]] = {
    "tile": ENCODER,
    "hierarchical": ENCODER,
    "slide": {"name": "deep", "precision": "fp16", "below": ENCODER},
    "patient": {"name": "wide", "precision": "fp16", "below": ENCODER},
}
#: Of tiles as the run asks the model to compute, of slides and patients fp32.
DTYPES = {"tile": "float16", "hierarchical": "float16", "slide": "float32", "patient": "float32"}


@pytest.fixture
def slide(tmp_path: Path) -> Slide:
    for name in ("a.svs", "a.png"):
        (tmp_path / name).write_bytes(name.encode())
    return as_slide({"image_path": tmp_path / "a.svs", "mask_path": tmp_path / "a.png"})


def completed(
    folder: Path,
    *kinds: Kind,
    config: PreprocessingConfig = CONFIG,
    files: Identities | None = None,
    tilings: dict[str, Tiling] | None = None,
    others: tuple[Path, ...] = (),
    latents: bool = False,
    **execution: Any,
) -> CompletedArtifacts:
    identities = {kind: IDENTITIES[kind] for kind in kinds or ("tile",)}
    place = Place(folder, "tiny", folder, folder, others)
    options = ExecutionOptions(output_dir=folder, **{"precision": "fp16", **execution})
    files = files or Identities(config)
    return CompletedArtifacts(config, options, identities, tilings or {}, files, place, latents=latents)


def made_of(slide: Slide, kind: Kind = "tile", given: Tiling | None = None) -> dict[str, Any]:
    mask = None if slide.mask_path is None or given is not None else fingerprint(slide.mask_path)
    files = {"image": fingerprint(slide.image_path), "mask": mask}
    return compatibility(slide, CONFIG, IDENTITIES[kind], files, given)


def wrote(folder: Path, kind: Kind, made: dict[str, Any], features: Any = None, **changes: Any) -> Path:
    """An embedding of slide (or patient) "a": its features file, and its sidecar with changes."""
    place = folder / f"{kind}_embeddings"
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"a.{changes.get('format', 'pt')}"
    torch.save(torch.zeros(8) if features is None else features, path)
    sidecar = {
        **{"schema_version": SCHEMA_VERSION, "artifact_type": f"{kind}_embeddings", "format": "pt"},
        **{"patient_id" if kind == "patient" else "sample_id": "a", "feature_dim": 8, "num_tiles": 1},
        **{"num_regions": 1, "tiles_per_region": 1},
        **{"num_slides": 1, "file_size_bytes": path.stat().st_size, "feature_dtype": DTYPES[kind]},
        **{"encoder_name": IDENTITIES[kind]["name"], "compatibility": made},
        **changes,
    }
    (place / "a.meta.json").write_text(json.dumps(sidecar))
    return path


def outcome(found: Any) -> Any:
    """The file that is kept, why it is not, None without."""
    return found if found is None or isinstance(found, str) else found.path


def test_finished_other_settings_or_nothing_there(slide: Slide, tmp_path: Path) -> None:
    ours = completed(tmp_path, "tile", "slide")
    assert ours.find(["tile", "slide"], slide) == {"tile": None, "slide": None}
    path = wrote(tmp_path, "tile", made_of(slide))
    vector = wrote(tmp_path, "slide", made_of(slide, "slide"))
    found = ours.find(["tile", "slide"], slide)
    assert {kind: outcome(each) for kind, each in found.items()} == {"tile": path, "slide": vector}
    other = completed(tmp_path, config=CONFIG.updated(overlap=0.5))
    assert other.find(["tile"], slide) == {"tile": "geometry overlap"}


@pytest.mark.parametrize(
    ("kind", "recorded", "asked", "differs"),
    [
        ("tile", {"format": "pt"}, {"output_format": "npz"}, "output_format"),
        ("tile", {"format": "npz"}, {"output_format": "pt"}, "output_format"),
        ("tile", {"format": "npz"}, {"output_format": "npz"}, None),
        ("tile", {"feature_dtype": "float16"}, {"output_dtype": "fp32"}, "output_dtype"),
        ("tile", {"feature_dtype": "float32"}, {"output_dtype": "fp16"}, "output_dtype"),
        ("slide", {"feature_dtype": "float16"}, {}, "output_dtype"),
        ("slide", {"feature_dtype": "float16"}, {"output_dtype": "fp16"}, None),
        ("slide", {"feature_dtype": "fp16"}, {"output_dtype": "fp16"}, None),  # as 7.1.4, and we, record it
        ("tile", {"feature_dtype": "fp32"}, {"output_dtype": "fp16"}, "output_dtype"),
        ("slide", {}, {"latents": True}, "save_latents"),
        ("tile", {}, {"latents": True}, None),
        ("tile", {"skipped_tiles": [1]}, {}, "on_bad_tile"),
        ("tile", {"skipped_tiles": [1]}, {"config": CONFIG.updated(on_bad_tile="skip")}, None),
        ("tile", {"skipped_tiles": []}, {"config": CONFIG.updated(on_bad_tile="skip")}, None),
        ("slide", {"skipped_slides": ["b"]}, {"on_bad_slide": "fail"}, "on_bad_slide"),
        ("slide", {"skipped_slides": ["b"]}, {"on_bad_slide": "skip"}, None),
    ],
)
def test_options_of_the_output_that_differ(
    slide: Slide, tmp_path: Path, kind: Kind, recorded: Any, asked: Any, differs: str | None
) -> None:
    path = wrote(tmp_path, kind, made_of(slide, kind), **recorded)
    found = completed(tmp_path, kind, **asked).find([kind], slide)[kind]
    assert outcome(found) == (differs or path)


def test_a_slide_with_latents_has_them(slide: Slide, tmp_path: Path) -> None:
    path = wrote(tmp_path, "slide", made_of(slide, "slide"))
    (tmp_path / "slide_latents").mkdir()
    (tmp_path / "slide_latents" / "a.pt").write_bytes(b"latents")
    assert outcome(completed(tmp_path, "slide", latents=True).find(["slide"], slide)["slide"]) == path


def test_a_patient_is_made_of_the_identities_of_their_slides(slide: Slide, tmp_path: Path) -> None:
    identities = {"a": made_of(slide), "gone": None}
    made = {"encoder": IDENTITIES["patient"], "slides": identities}
    path = wrote(tmp_path, "patient", made)
    ours = completed(tmp_path, "patient")
    assert outcome(ours.find_patient("a", [slide], identities)) == path
    assert ours.find_patient("a", [slide], {**identities, "more": made_of(slide)}) == "slides"
    assert ours.find_patient("b", [slide], identities) is None


def test_what_coordinates_are_of_is_read_once_for_all_kinds(
    slide: Slide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(folder: Path, name: str, made: Any) -> bool:
        looked.append(name)
        return False

    looked: list[str] = []
    monkeypatch.setattr(identity_module, "are_of_other_files", look)
    for kind in ("tile", "slide"):
        wrote(tmp_path, kind, made_of(slide, kind))
    found = completed(tmp_path, "tile", "slide").find(["tile", "slide"], slide)
    assert None not in found.values() and looked == ["a"]


@pytest.mark.parametrize("why", ["gone", "tiling", "no archive"])
def test_a_slide_that_cannot_be_looked_at_has_nothing_finished(
    slide: Slide, tmp_path: Path, why: str
) -> None:
    wrote(tmp_path, "tile", made_of(slide))
    config = CONFIG
    if why == "gone":
        slide.image_path.unlink()
    elif why == "tiling":
        slide = replace(slide, tiling={"tissue_threshold": 7.0})
    else:
        (tmp_path / "archives").mkdir()
        config = CONFIG.updated(read_tiles_from=tmp_path / "archives")
    ours = completed(tmp_path, config=config)
    assert ours.look(slide) is None and ours.find(["tile"], slide) == {"tile": None}


def test_a_sidecar_that_goes_away_meanwhile_is_none(
    slide: Slide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(folder: Path, name: str) -> Any:
        found = find_tile_artifact(folder, name)
        assert found is not None
        found.metadata_path.unlink()
        return found

    wrote(tmp_path, "tile", made_of(slide))
    monkeypatch.setitem(identity_module._FIND, "tile", find)  # type: ignore[index]
    assert completed(tmp_path).find(["tile"], slide) == {"tile": None}


# other encoders ---------------------------------------------------------------------------------------


def test_tiles_that_another_encoder_is_made_from_serve(slide: Slide, tmp_path: Path) -> None:
    """For what a slide encoder is made from, not for what is asked for itself."""
    others = (tmp_path / "first", tmp_path / "second")
    stale = wrote(others[0], "tile", {**made_of(slide), "tiles_from": "jpeg"})
    path = wrote(others[1], "tile", made_of(slide))
    out = tmp_path / "out"
    both = completed(out, "tile", "slide", others=others)
    assert stale.is_file() and outcome(both.find(["tile"], slide)["tile"]) == path
    assert completed(out, "tile", others=others).find(["tile"], slide) == {"tile": None}
    wrote(others[1], "slide", made_of(slide, "slide"))
    assert both.find(["slide"], slide) == {"slide": None}
    wrote(out, "tile", {**made_of(slide), "tiles_from": "jpeg"})
    assert outcome(both.find(["tile"], slide)["tile"]) == path
    own = wrote(out, "tile", made_of(slide))
    assert outcome(both.find(["tile"], slide)["tile"]) == own
    nothing = completed(out, "tile", "slide", others=others[:1])
    own.unlink()
    assert nothing.find(["tile"], slide) == {"tile": None}
    wrote(out, "tile", {**made_of(slide), "tiles_from": "archive"})
    assert nothing.find(["tile"], slide) == {"tile": "tiles_from"}


def test_embeddings_by_region_serve_too(slide: Slide, tmp_path: Path) -> None:
    path = wrote(tmp_path / "other", "hierarchical", made_of(slide, "hierarchical"))
    ours = completed(tmp_path / "out", "hierarchical", "slide", others=(tmp_path / "other",))
    assert outcome(ours.find(["hierarchical"], slide)["hierarchical"]) == path


@pytest.mark.parametrize("name", ["a", "z"])
def test_another_encoder_in_the_own_folder_is_an_error_elsewhere_it_is_none(
    slide: Slide, tmp_path: Path, name: str
) -> None:
    made = {**made_of(slide), "encoder": {**ENCODER, "name": "other"}}
    wrote(tmp_path / name, "tile", made, encoder_name="other")
    ours = completed(tmp_path / "m", "tile", "slide", others=(tmp_path / name,))
    assert ours.find(["tile"], slide) == {"tile": None}
    wrote(tmp_path / "m", "tile", made, encoder_name="other")
    with pytest.raises(ConfigError, match=r"of another encoder \(other: name differ\)"):
        ours.find(["tile"], slide)


# what earlier versions wrote --------------------------------------------------------------------------


def test_embeddings_of_earlier_versions_are_looked_into(
    slide: Slide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_of(slide)
    del made["reading"]
    path = wrote(tmp_path, "tile", made)
    ours = completed(tmp_path)
    assert outcome(ours.find(["tile"], slide)["tile"]) == path
    wrote(tmp_path, "tile", made, torch.tensor([float("nan")]))
    nan = "embedding: an earlier version wrote NaN or infinities"
    assert ours.find(["tile"], slide) == {"tile": nan}
    monkeypatch.setattr(identity_module, "misread_reason", lambda *_: "reading: earlier versions erred")
    assert ours.find(["tile"], slide) == {"tile": "reading: earlier versions erred"}
    wrote(tmp_path, "tile", made)
    assert ours.find(["tile"], slide) == {"tile": "reading: earlier versions erred"}


# the files of slides ----------------------------------------------------------------------------------


def a_tiling(slide: Slide) -> Tiling:
    geometry = tile_geometry(
        requested_tile_size_px=96, requested_spacing_um=0.5, base_spacing_um=0.25, downsamples=[1.0, 2.0]
    )
    return Tiling(
        sample_id="a",
        image_path=slide.image_path,
        mask_path=None,
        spacing_at_level_0=None,
        backend="tiff",
        requested_backend="auto",
        dimensions=(800, 600),
        downsamples=(1.0, 2.0),
        geometry=geometry,
        x=np.array([0, 192]),
        y=np.array([0, 0]),
        tissue_fractions=np.ones(2, np.float32),
        tissue_threshold=0.1,
        segmentation=Segmentation(
            method="hsv", requested_downsample=64, downsample=64, level=1, spacing_um=1.0
        ),
        filtering=FilterConfig(),
    )


def test_where_tiles_are_given_the_mask_is_not_looked_at(slide: Slide, tmp_path: Path) -> None:
    tiling = a_tiling(slide)
    given = made_of(slide, given=tiling)
    assert given["mask"] is None and made_of(slide)["mask"] is not None
    ours = completed(tmp_path, tilings={"a": tiling})
    assert ours.look(slide) == {"tile": given}
    assert completed(tmp_path).look(slide) == {"tile": made_of(slide)}
    assert completed(tmp_path, tilings={"b": tiling}).look(slide) == {"tile": made_of(slide)}
    write_coordinates(tmp_path / "tiles", tiling)
    config = CONFIG.updated(read_coordinates_from=tmp_path / "tiles")
    assert completed(tmp_path, config=config).look(slide) == {"tile": given}
    moved = replace(tiling, x=tiling.x + 96)  # what is known counts over what is kept
    known = completed(tmp_path, config=config, tilings={"a": moved}).look(slide)
    assert known == {"tile": made_of(slide, given=moved)}


def test_files_as_they_are_or_as_they_were_when_the_slide_was_planned(slide: Slide, tmp_path: Path) -> None:
    files = Identities(CONFIG)
    ours = completed(tmp_path, files=files)
    before = {"tile": made_of(slide)}
    assert ours.look(slide, anew=False) == before  # not known yet
    slide.image_path.write_bytes(b"another slide")
    after = {"tile": made_of(slide)}
    assert before != after
    assert ours.look(slide, anew=False) == before
    assert ours.look(slide) == after
