"""Slides and patients in memory: moozy with a quick tile encoder, and once as it is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from aggregate_helpers import QuickEncoder
from shallow import DEPTHS
from torch import Tensor, nn

from slide2vec import (
    EmbeddedPatient,
    EmbedPatientsError,
    EmbedSlidesError,
    ExecutionOptions,
    Model,
    PreprocessingConfig,
)
from slide2vec.encoders.slide import SlideFeatures, TileBag
from slide2vec.errors import (
    ManifestError,
    ModelLevelError,
    PatientError,
    PresetError,
    SlideError,
    SlideOpenError,
    WeightsError,
)
from slide2vec.recipes import Recipe, Variant
from slide2vec.stream import SlideOutcome

PREPROCESSING = PreprocessingConfig(requested_tile_size_px=64, requested_spacing_um=0.5)
#: Fused and plain attention of the encoders in fp32, on values of about 1.
ROUNDING = 1e-4

Depth = Callable[[], AbstractContextManager[None]]


def test_a_slide_has_the_embedding_of_its_tiles(slide_model: Model, slides: list[Path]) -> None:
    found = slide_model.embed_slide(slides[0], PREPROCESSING)
    assert found.tile_embeddings.shape == (found.num_tiles, 384) and found.num_tiles > 4
    bag = TileBag(
        features=found.tile_embeddings,
        coords=torch.from_numpy(np.stack([found.x, found.y], 1)),
        tile_size_lv0=found.tile_size_lv0,
    )
    expected = slide_model.encoder(bag).embedding
    assert found.slide_embedding is not None and found.slide_embedding.dtype == torch.float32
    assert torch.allclose(found.slide_embedding, expected, atol=ROUNDING)
    assert found.latents is None and not slide_model.has_latents


def test_the_preset_brings_tile_encoder_spacing_and_tile_size(patient_model: Model) -> None:
    identity = patient_model.identity()
    assert (identity["name"], identity["level"]) == ("moozy", "patient")
    assert (identity["below"]["name"], identity["below"]["below"]["name"]) == ("moozy-slide", "lunit")
    config = patient_model.resolve_preprocessing()
    assert (config.requested_spacing_um, config.requested_tile_size_px) == (0.5, 224)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(
    ("preset", "tiles", "size_px", "dim", "latents"),
    [
        ("titan", "conchv15", 512, 768, None),
        ("gigapath-slide", "gigapath", 224, 768, None),
        ("prism", "virchow", 224, 1280, (512, 1280)),
    ],
)
def test_every_slide_preset(
    preset: str,
    tiles: str,
    size_px: int,
    dim: int,
    latents: tuple[int, int] | None,
    depth: Depth,
    slides: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With its own slide encoder, spacing, tile size and output of the tile encoder, itself stood in for."""

    def quick(recipe: Recipe, variant: Variant, *rest: Any, **more: Any) -> nn.Module:
        return QuickEncoder(variant.dim)

    monkeypatch.setattr("slide2vec.encoders.preset_chain.build_encoder", quick)
    with depth():
        model = Model.from_preset(preset, weights="random", device="cpu")
    assert model.upstream is not None and model.upstream.name == tiles
    execution = ExecutionOptions(save_latents=True, batch_size=1)
    found = model.embed_slide(slides[2], PreprocessingConfig(filtering={"a_t": 0}), execution)
    assert found.num_tiles > 0 and found.tile_size_lv0 == 2 * size_px
    assert found.slide_embedding is not None and found.slide_embedding.shape == (dim,)
    assert found.slide_embedding.isfinite().all() and model.feature_dim == dim
    assert (None if found.latents is None else tuple(found.latents.shape)) == latents


def test_latents_come_where_they_are_asked_for(
    slide_model: Model, slides: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class WithLatents(nn.Module):
        def forward(self, bag: TileBag) -> SlideFeatures:
            return SlideFeatures(embedding=bag.features.mean(0), latents=bag.features[:3])

    monkeypatch.setattr(slide_model, "_encoder", WithLatents())
    assert slide_model.embed_slide(slides[0], PREPROCESSING).latents is None
    found = slide_model.embed_slide(slides[0], PREPROCESSING, ExecutionOptions(save_latents=True))
    assert found.latents is not None and torch.equal(found.latents, found.tile_embeddings[:3])


def test_a_slide_without_tissue_has_no_embedding(
    slide_model: Model, patient_model: Model, slides: list[Path], blank_slide: Path
) -> None:
    first, second = slide_model.embed_slides([blank_slide, slides[0]], PREPROCESSING)
    assert first.slide_embedding is None and first.tile_embeddings.shape == (0, 384)
    assert second.slide_embedding is not None
    patient = patient_model.embed_patient([blank_slide, slides[0]], "p", preprocessing=PREPROCESSING)
    assert list(patient.slide_embeddings) == ["s0"] and patient.patient_embedding is not None
    nobody = patient_model.embed_patient([blank_slide], preprocessing=PREPROCESSING)
    assert (nobody.patient_id, nobody.patient_embedding, nobody.slide_embeddings) == ("blank", None, {})


def test_a_failing_slide_encoder_fails_its_slide_only(
    slide_model: Model, slides: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = slide_model.encoder
    fewest = min(s.num_tiles for s in slide_model.embed_slides(slides, PREPROCESSING))

    class Failing(nn.Module):
        def forward(self, bag: TileBag) -> SlideFeatures:
            if len(bag.features) == fewest:
                raise RuntimeError("out of memory")
            found: SlideFeatures = real(bag)
            return found

    monkeypatch.setattr(slide_model, "_encoder", Failing())
    with pytest.raises(EmbedSlidesError) as caught:
        slide_model.embed_slides(slides, PREPROCESSING)
    ((name, error),) = caught.value.failed.items()
    assert isinstance(error, SlideError)
    assert (
        str(error)
        == f"slide {name}: the slide encoder moozy-slide failed on its {fewest} tiles: out of memory"
    )
    assert sum(result is not None for result in caught.value.results) == 2


# patients ---------------------------------------------------------------------------------------


def expected_patient(model: Model, embeddings: Mapping[str, Tensor]) -> Tensor:
    found: Tensor = model.encoder(torch.stack(list(embeddings.values())))
    return found


@pytest.fixture(scope="module")
def by_slide(patient_model: Model, slides: list[Path]) -> dict[str, Tensor]:
    assert patient_model.upstream is not None
    found = patient_model.upstream.embed_slides(slides, PREPROCESSING)
    return {s.sample_id: s.slide_embedding for s in found if s.slide_embedding is not None}


def test_patients_in_order_of_first_appearance(
    patient_model: Model, slides: list[Path], by_slide: dict[str, Tensor]
) -> None:
    given = [
        {"sample_id": "s2", "image_path": slides[2], "patient_id": "b"},
        {"sample_id": "s0", "image_path": slides[0], "patient_id": "a"},
        {"sample_id": "s1", "image_path": slides[1], "patient_id": "b"},
    ]
    results = patient_model.embed_patients(given, preprocessing=PREPROCESSING)
    assert [r.patient_id for r in results] == ["b", "a"]
    assert [list(r.slide_embeddings) for r in results] == [["s2", "s1"], ["s0"]]
    for result in results:
        assert result.patient_embedding is not None and result.patient_embedding.shape == (768,)
        for name, embedding in result.slide_embeddings.items():
            assert torch.allclose(embedding, by_slide[name], atol=ROUNDING)
        expected = expected_patient(patient_model, result.slide_embeddings)
        assert torch.allclose(result.patient_embedding, expected, atol=ROUNDING)


def test_who_the_patient_is(
    patient_model: Model, slides: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A map counts over a slide's patient_id, that over its sample_id; an id for embed_patient over all."""

    def names(results: list[EmbeddedPatient]) -> dict[str, list[str]]:
        return {r.patient_id: list(r.slide_embeddings) for r in results}

    given: list[Any] = [slides[0], {"image_path": slides[1], "patient_id": "own"}, slides[2]]
    options: dict[str, Any] = {"preprocessing": PREPROCESSING}
    assert names(patient_model.embed_patients(given, **options)) == {
        "s0": ["s0"],
        "own": ["s1"],
        "s2": ["s2"],
    }
    mapped = patient_model.embed_patients(given, {"s0": "x", "s1": "x"}, **options)
    assert names(mapped) == {"x": ["s0", "s1"], "s2": ["s2"]}
    assert patient_model.embed_patient(given[:2], "mine", **options).patient_id == "mine"
    assert patient_model.embed_patient(given[:2], **options).patient_id == "own"
    assert patient_model.embed_patient(given[:1], **options).patient_id == "s0"


def test_wrong_calls(tile_model: Model, slide_model: Model, patient_model: Model, slides: list[Path]) -> None:
    for model in (tile_model, slide_model):
        for method in (model.embed_patient, model.embed_patients):
            with pytest.raises(ModelLevelError, match="patient-level") as caught:
                method(slides)
            assert isinstance(caught.value, ValueError)
    differing = [{"image_path": path, "patient_id": path.stem} for path in slides[:2]]
    with pytest.raises(ManifestError, match="different patients") as different:
        patient_model.embed_patient(differing)
    assert isinstance(different.value, ValueError)
    for embed in (patient_model.embed_patient, patient_model.embed_patients):
        with pytest.raises(ManifestError, match="appears twice") as twice:
            embed([slides[0], Path("elsewhere") / slides[0].name])
        assert isinstance(twice.value, ValueError)
    with pytest.raises(ManifestError, match="at least one"):
        patient_model.embed_patient([])
    with pytest.raises(ManifestError, match="not given: s9"):
        patient_model.embed_patients(slides, {"s9": "p"})
    assert patient_model.embed_patients([]) == []


def test_a_patient_with_a_bad_slide(
    patient_model: Model, slides: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bad.svs").write_text("no slide")
    good, bad = slides[0], tmp_path / "bad.svs"
    with pytest.raises(PatientError, match=r"patient p: 1 of 2 slides failed \(bad\)") as caught:
        patient_model.embed_patient([good, bad], "p", preprocessing=PREPROCESSING)
    assert isinstance(caught.value.__cause__, SlideOpenError)
    with caplog.at_level(logging.ERROR):
        found = patient_model.embed_patient([good, bad], "p", preprocessing=PREPROCESSING, on_error="skip")
    assert list(found.slide_embeddings) == ["s0"] and "slide bad left out" in caplog.text
    with pytest.raises(PatientError):  # nothing is left of this one
        patient_model.embed_patient([bad], "p", preprocessing=PREPROCESSING, on_error="skip")


def test_the_other_patients_survive(patient_model: Model, slides: list[Path], tmp_path: Path) -> None:
    (tmp_path / "bad.svs").write_text("no slide")
    mapping = {"s0": "a", "bad": "b", "s1": "b"}
    given = [slides[0], tmp_path / "bad.svs", slides[1]]
    with pytest.raises(EmbedPatientsError, match="1 of 2 patients failed") as caught:
        patient_model.embed_patients(given, mapping, preprocessing=PREPROCESSING)
    assert list(caught.value.failed) == ["b"]
    first, second = caught.value.results
    assert first.patient_id == "a" and second is None
    skipped = patient_model.embed_patients(given, mapping, preprocessing=PREPROCESSING, on_error="skip")
    assert {r.patient_id: list(r.slide_embeddings) for r in skipped} == {"a": ["s0"], "b": ["s1"]}


# weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_who_is_complete_survives_a_run_that_breaks_off(
    patient_model: Model,
    slides: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    on_error: Literal["raise", "skip"],
) -> None:
    given = [{"sample_id": f"s{n}", "image_path": path} for n, path in enumerate(slides[:3])]
    mapping = {"s0": "a", "s1": "b", "s2": "b"}
    whole = patient_model.embed_patients(given, mapping, preprocessing=PREPROCESSING)
    outcomes = patient_model.iter_slides

    def breaking(*arguments: Any, **options: Any) -> Iterator[SlideOutcome]:
        collect_outcomes = {outcome.slide.sample_id: outcome for outcome in outcomes(*arguments, **options)}
        yield from (collect_outcomes["s0"], collect_outcomes["s1"])
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(patient_model, "iter_slides", breaking)
    with pytest.raises(EmbedPatientsError, match="1 of 2 patients failed") as caught:
        patient_model.embed_patients(given, mapping, preprocessing=PREPROCESSING, on_error=on_error)
    first, second = caught.value.results
    assert second is None and torch.equal(first.patient_embedding, whole[0].patient_embedding)
    assert "the device is gone" in str(caught.value.failed["b"])


def test_weights_of_several_parts(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"3 parts .* \(moozy, moozy-slide, lunit\).*weights=\{"):
        Model.from_preset("moozy", weights=tmp_path / "moozy.pt")
    with pytest.raises(PresetError, match="has no part 'uni'"):
        Model.from_preset("moozy", weights={"uni": "random"})
    with pytest.raises(WeightsError, match=r"lunit\.pth"):
        Model.from_preset(
            "moozy", weights={"moozy": "random", "moozy-slide": "random", "lunit": tmp_path / "lunit.pth"}
        )
    with pytest.raises(
        WeightsError, match=r"lunit\.pth"
    ):  # as the command line and configuration files say it
        Model.from_preset("moozy", weights=f"moozy=random,moozy-slide=random,lunit={tmp_path}/lunit.pth")


def test_weights_of_each_part_are_its_own(patient_model: Model, tmp_path: Path) -> None:
    assert patient_model.upstream is not None
    path = tmp_path / "lunit.pt"
    lunit = Model.from_preset("lunit", weights="random", seed=11, device="cpu")
    torch.save(lunit.encoder.trunk.state_dict(), path)  # type: ignore[union-attr, operator]
    given = {"lunit": path, "moozy-slide": "random", "moozy": "random"}
    model = Model.from_preset("moozy", weights=given, seed=3, device="cpu")
    identity = model.identity()
    assert identity["weights"] == "random:3" and identity["below"]["weights"] == "random:3"
    assert identity["below"]["below"]["weights"] not in ("random:3", "random:11")
    assert model.origin["weights"] == f"lunit={path},moozy-slide=random,moozy=random"


# as the document has it ---------------------------------------------------------------------------


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_documents_examples(depth: Depth, real_slide: Callable[[str], Path]) -> None:
    """As written, with random weights, at 2 µm/px so that the slides have few tiles."""
    with depth():
        model = Model.from_preset(
            "moozy", weights="random", device="cpu", allow_non_recommended_settings=True
        )
    few = PreprocessingConfig(requested_spacing_um=2.0, tissue_threshold=0.5, filtering={"a_t": 0})
    slide_1a, slide_1b = real_slide("CMU-1-Small-Region.svs"), real_slide("aperio-jpeg-pyramid.svs")
    result = model.embed_patient([slide_1a, slide_1b], patient_id="patient_1", preprocessing=few)
    assert result.patient_id == "patient_1"
    assert result.patient_embedding is not None and result.patient_embedding.shape == torch.Size([768])
    assert list(result.slide_embeddings) == [slide_1a.stem, slide_1b.stem]
    results = model.embed_patients(
        [
            {"sample_id": "slide_1a", "image_path": slide_1a, "patient_id": "patient_1"},
            {"sample_id": "slide_1b", "image_path": slide_1b, "patient_id": "patient_1"},
            {"sample_id": "slide_2a", "image_path": slide_1b, "patient_id": "patient_2"},
        ],
        preprocessing=few,
    )
    assert [r.patient_id for r in results] == ["patient_1", "patient_2"]
    assert all(r.patient_embedding is not None and r.patient_embedding.shape == (768,) for r in results)
    first = results[0].patient_embedding
    assert first is not None and torch.allclose(first, result.patient_embedding, atol=ROUNDING)
