"""Every entry of slide2vec 7.1.4, called with its own arguments: run by the Python of 7.1.4 and by ours, for
benchmarks/entries_714.py, which compares what they return and write:

    python tools/slide2vec_entries.py MATERIAL OUT [CALL …]

MATERIAL holds slides, masks, images and a file of weights; OUT gets a folder of each call, as it left it, and
`returned.pt`, what the calls returned in plain types and tensors (if only some are asked for, others stay in
it). Where the two packages spell an argument in two ways, as docs/migration.md says, `Side` has both.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from PIL import Image

import slide2vec
from slide2vec import (
    DenseImageOptions,
    DenseOptions,
    ImageSpec,
    Pipeline,
    SlideRegions,
    TimmTileEncoder,
    TorchTileEncoder,
    register_encoder,
)
from slide2vec.encoders import PatientEncoder, SlideEncoder

S: Any = slide2vec
PEER = slide2vec.__version__ == "7.1.4"
MATERIAL = Path(sys.argv[1])
DIM, CHANNELS = 48, 8
NORMAL: Any = {"mean": (0.5, 0.4, 0.6), "std": (0.2, 0.3, 0.25)}


@register_encoder(
    "small-tile",
    output_variants={"cls": {"encode_dim": DIM}, "cls_patch_mean": {"encode_dim": 2 * DIM}},
    default_output_variant="cls",
    input_size=224,
    supports_variable_input_size=True,
    patch_size=16,
    supported_spacing_um=0.5,
    precision="fp32",
    source="benchmarks",
)
class SmallTile(TimmTileEncoder):
    """A small vision transformer with registers, its weights from a file."""

    def __init__(self, *, output_variant: str | None = None) -> None:
        self._output_variant = output_variant or "cls"
        small = {"depth": 2, "embed_dim": DIM, "num_heads": 3, "reg_tokens": 2}
        super().__init__("vit_tiny_patch16_224", pretrained=False, dynamic_img_size=True, **small)
        self._model.load_state_dict(torch.load(MATERIAL / "small.pth", weights_only=True))

    @property
    def encode_dim(self) -> int:
        return DIM if self._output_variant == "cls" else 2 * DIM

    def encode_tiles(self, batch: torch.Tensor) -> torch.Tensor:
        tokens = self._model.forward_features(batch)  # type: ignore[operator]
        if self._output_variant == "cls":
            return tokens[:, 0]
        return torch.cat([tokens[:, 0], tokens[:, self._model.num_prefix_tokens :].mean(1)], dim=-1)


@register_encoder(
    "small-torch",
    encode_dim=CHANNELS,
    input_size=128,
    supports_variable_input_size=False,
    supported_spacing_um=[0.5, 1.0],
    default_spacing_um=1.0,
    precision="fp32",
)
class SmallTorch(TorchTileEncoder):
    """A convolution, its weights from a file."""

    def __init__(self, *, output_variant: str | None = None) -> None:
        torch.manual_seed(1)
        network = torch.nn.Sequential(
            torch.nn.Conv2d(3, CHANNELS, 7, stride=4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)
        )
        network.append(torch.nn.Flatten())
        super().__init__(
            network, encode_dim=CHANNELS, input_size=128, output_variant=output_variant, **NORMAL
        )


class _Pooling:
    """A mean of tiles that depends on where they are."""

    def __init__(self, *, output_variant: str | None = None) -> None:
        self._device = torch.device("cpu")

    @property
    def encode_dim(self) -> int:
        return DIM

    @property
    def device(self) -> torch.device:
        return self._device

    def to(self, device: torch.device | str) -> Any:
        self._device = torch.device(device)
        return self

    def encode_slide(
        self,
        tile_features: torch.Tensor,
        coordinates: torch.Tensor | None = None,
        *,
        tile_size_lv0: int | None = None,
    ) -> torch.Tensor:
        assert coordinates is not None and tile_size_lv0 is not None
        weights = torch.cos(coordinates.sum(1) / tile_size_lv0)
        return (tile_features * weights[:, None]).mean(0)


@register_encoder(
    "small-slide",
    level="slide",
    tile_encoder="small-tile",
    tile_encoder_output_variant="cls",
    encode_dim=DIM,
    supported_spacing_um=0.5,
    precision="fp32",
)
class SmallSlide(_Pooling, SlideEncoder):
    """Of slides, with latents."""

    def encode_slide_with_latents(
        self,
        tile_features: torch.Tensor,
        coordinates: torch.Tensor | None = None,
        *,
        tile_size_lv0: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        embedding = self.encode_slide(tile_features, coordinates, tile_size_lv0=tile_size_lv0)
        return embedding, tile_features[:5] * 2


@register_encoder(
    "small-apart",
    level="slide",
    tile_encoder="small-tile",
    tile_encoder_output_variant="cls",
    encode_dim=DIM,
    supported_spacing_um=0.5,
    precision="fp32",
)
class SmallApart(_Pooling, SlideEncoder):
    """Of slides whose tiles do not overlap."""

    supports_tile_overlap = False


@register_encoder(
    "small-patient",
    level="patient",
    tile_encoder="small-tile",
    tile_encoder_output_variant="cls",
    encode_dim=DIM,
    supported_spacing_um=0.5,
    precision="fp32",
)
class SmallPatient(_Pooling, PatientEncoder):
    """Of patients: depends on the order of slides."""

    def encode_patient(self, slide_embeddings: torch.Tensor) -> torch.Tensor:
        order = torch.arange(1, len(slide_embeddings) + 1, dtype=torch.float32)
        return (slide_embeddings * order[:, None]).sum(0)


@dataclasses.dataclass
class Side:
    """One call's folder and the arguments that the two packages spell in two ways."""

    out: Path
    slide = MATERIAL / "tissue.svs"
    other = MATERIAL / "other.svs"
    blank = MATERIAL / "blank.tif"
    labels = MATERIAL / "labels.tif"
    mask = MATERIAL / "mask.tif"

    def model(self, name: str = "small-tile", **given: Any) -> Any:
        return S.Model.from_preset(name, **{"device": "cpu", **given})

    def preprocessing(
        self,
        *,
        size: int | None = 224,
        spacing: float = 0.5,
        overlap: float = 0.0,
        masks: Mapping[str, Any] | None = None,
        filtering: Mapping[str, Any] | None = None,
        segmentation: Mapping[str, Any] | None = None,
        preview: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> Any:
        """Both read with OpenSlide, and neither draws previews unless asked."""
        if not PEER:
            tiling = {"requested_spacing_um": spacing, "requested_tile_size_px": size, "overlap": overlap}
            parts = {"filtering": filtering, "segmentation": segmentation, "preview": preview}
            if masks is not None:
                parts["masks"] = S.MaskSamplingConfig(**masks)
            given = {**given, **{k: v for k, v in parts.items() if v is not None}}
            return S.PreprocessingConfig(**tiling, backend="openslide", **given)
        import hs2p

        drawn = {"save_mask_preview": False, "save_tiling_preview": False, "mask_overlay_alpha": 0.0}
        given["preview"] = hs2p.PreviewConfig(
            **{**drawn, "tissue_contour_color": (157, 219, 129), **(preview or {})}
        )
        if filtering is not None:
            given["filter"] = hs2p.FilterConfig(**{"ref_tile_size": size, **filtering})
        if segmentation is not None:
            given["segmentation"] = hs2p.SegmentationConfig(**segmentation)
        if masks is not None:
            given["masks"] = hs2p.MaskSamplingConfig(**masks)
        tiling_config = hs2p.TilingConfig(
            requested_spacing_um=spacing,
            requested_tile_size_px=size,
            tolerance=0.05,
            overlap=overlap,
            backend="openslide",
            mask_backend="openslide" if masks is not None else "auto",
        )
        return S.PreprocessingConfig(tiling=tiling_config, **given)

    def execution(self, *, workers: int = 0, **given: Any) -> Any:
        """A batch that is no divisor of anything; everything goes to the folder of the call."""
        given = {"batch_size": 5, "num_gpus": 1, "num_preprocessing_workers": 1, **given}
        if PEER:
            given["num_workers_per_gpu"] = workers
        elif workers:
            given["num_workers"] = workers
        if not PEER:
            given["engine"] = "torch"
        return S.ExecutionOptions(output_dir=self.out, **given)

    def in_memory(self, **given: Any) -> Any:
        made = self.execution(**given)
        return dataclasses.replace(made, output_dir=None) if PEER else made.updated(output_dir=None)

    def bags(self, found: Any) -> list[Any]:
        """Of `embed_slides`, a dictionary of dictionaries there and a list here."""
        return [bag for inner in found.values() for bag in inner.values()] if PEER else found

    def tiling(self, folder: Path, sample_id: str) -> Any:
        """Of a slide that was tiled into a folder."""
        if PEER:
            from slide2vec.runtime.manifest import load_successful_tiled_slides

            slides, found = load_successful_tiled_slides(folder)
            return found[[slide.sample_id for slide in slides].index(sample_id)]
        from slide2vec.tiling import load_coordinates

        return load_coordinates(folder / "tiles", sample_id)

    def command(self, *arguments: str) -> Any:
        if PEER:
            from slide2vec.cli import main

            return main(list(arguments))
        from slide2vec.cli import app

        return app(list(arguments), standalone_mode=False)


CALLS: dict[str, Callable[[Side], Any]] = {}


def call(function: Callable[[Side], Any]) -> Callable[[Side], Any]:
    CALLS[function.__name__] = function
    return function


# --- slides, in memory


@call
def embed_slide_path(s: Side) -> Any:
    return s.model().embed_slide(s.slide, preprocessing=s.preprocessing(), execution=s.in_memory())


@call
def embed_slide_text_path(s: Side) -> Any:
    return s.model().embed_slide(str(s.slide), preprocessing=s.preprocessing(), execution=s.in_memory())


@call
def embed_slide_defaults(s: Side) -> Any:
    """Readers of each one's own choice."""
    return s.model().embed_slide(s.slide, execution=s.in_memory())


@call
def embed_slide_keywords(s: Side) -> Any:
    given = {"sample_id": "named", "mask_path": s.mask, "spacing_at_level_0": 0.499}
    return s.model().embed_slide(s.slide, preprocessing=s.preprocessing(), execution=s.in_memory(), **given)


@call
def embed_slide_mapping(s: Side) -> Any:
    slide = {"sample_id": "named", "image_path": s.slide, "mask_path": s.mask, "spacing_at_level_0": None}
    return s.model().embed_slide(slide, preprocessing=s.preprocessing(), execution=s.in_memory())


@call
def embed_slide_object(s: Side) -> Any:
    slide = SimpleNamespace(sample_id="7", image_path=str(s.slide), mask_path=None, spacing_at_level_0=None)
    return s.model().embed_slide(slide, preprocessing=s.preprocessing(), execution=s.in_memory())


@call
def embed_slide_mapping_and_sample_id(s: Side) -> Any:
    """A ValueError."""
    slide = {"sample_id": "named", "image_path": s.slide}
    return s.model().embed_slide(slide, sample_id="other", preprocessing=s.preprocessing())


@call
def embed_slide_tile_512(s: Side) -> Any:
    return s.model(allow_non_recommended_settings=True).embed_slide(
        s.slide, preprocessing=s.preprocessing(size=512, spacing=1.0, overlap=0.25), execution=s.in_memory()
    )


@call
def embed_slide_non_recommended(s: Side) -> Any:
    """A ValueError: a spacing of another."""
    return s.model().embed_slide(s.slide, preprocessing=s.preprocessing(spacing=1.0), execution=s.in_memory())


@call
def embed_slide_fixed_input(s: Side) -> Any:
    """A ValueError: a side that the encoder does not take."""
    model = s.model("small-torch", allow_non_recommended_settings=True)
    return model.embed_slide(s.slide, preprocessing=s.preprocessing(size=224), execution=s.in_memory())


@call
def embed_slide_default_spacing(s: Side) -> Any:
    return s.model("small-torch").embed_slide(
        s.slide, preprocessing=s.preprocessing(size=128, spacing=1.0), execution=s.in_memory()
    )


@call
def embed_slide_fp16_features(s: Side) -> Any:
    execution = s.in_memory(output_dtype="fp16", precision="fp32")
    return s.model().embed_slide(s.slide, preprocessing=s.preprocessing(), execution=execution)


@call
def embed_slide_otsu_and_filters(s: Side) -> Any:
    preprocessing = s.preprocessing(
        segmentation={"method": "otsu", "downsample": 16, "close": 8},
        filtering={"a_t": 1, "filter_white": True, "white_threshold": 200, "fraction_threshold": 0.5},
    )
    return s.model().embed_slide(s.slide, preprocessing=preprocessing, execution=s.in_memory())


@call
def embed_slide_previews(s: Side) -> Any:
    drawn = {"save_mask_preview": True, "save_tiling_preview": True, "downsample": 16}
    return s.model().embed_slide(
        s.slide, preprocessing=s.preprocessing(preview=drawn), execution=s.execution()
    )


@call
def embed_slide_regions(s: Side) -> Any:
    return s.model().embed_slide(
        s.slide, preprocessing=s.preprocessing(region_tile_multiple=2), execution=s.execution()
    )


@call
def embed_slide_blank(s: Side) -> Any:
    return s.model().embed_slide(s.blank, preprocessing=s.preprocessing(), execution=s.execution())


@call
def embed_slide_missing(s: Side) -> Any:
    """An error that is no loss of data."""
    return s.model().embed_slide(MATERIAL / "none.svs", preprocessing=s.preprocessing())


@call
def embed_slides_two(s: Side) -> Any:
    found = s.model().embed_slides(
        [s.other, {"sample_id": "b", "image_path": s.slide}],
        preprocessing=s.preprocessing(),
        execution=s.execution(),
    )
    return s.bags(found)


@call
def embed_slides_npz_and_blank(s: Side) -> Any:
    execution = s.execution(output_format="npz", workers=1)
    found = s.model().embed_slides([s.slide, s.blank], preprocessing=s.preprocessing(), execution=execution)
    return s.bags(found)


@call
def embed_slides_none(s: Side) -> Any:
    """A ValueError."""
    return s.model().embed_slides([], preprocessing=s.preprocessing())


@call
def embed_slide_variant(s: Side) -> Any:
    model = s.model(output_variant="cls_patch_mean")
    return [
        (model.name, model.level, model.feature_dim, str(model.device)),
        model.embed_slide(s.slide, preprocessing=s.preprocessing(), execution=s.execution()),
    ]


@call
def from_preset_unknown(s: Side) -> Any:
    """A ValueError."""
    return s.model("no-such-encoder")


@call
def from_preset_auto_device(s: Side) -> Any:
    return str(s.model(device="auto").device)


# --- levels


@call
def embed_slide_slide_level(s: Side) -> Any:
    return s.model("small-slide").embed_slide(
        s.slide, preprocessing=s.preprocessing(), execution=s.in_memory()
    )


@call
def embed_slide_latents(s: Side) -> Any:
    execution = s.execution(save_latents=True, save_tile_embeddings=True)
    return s.model("small-slide").embed_slide(s.slide, preprocessing=s.preprocessing(), execution=execution)


@call
def embed_slide_latents_npz(s: Side) -> Any:
    execution = s.execution(save_latents=True, output_format="npz")
    return s.model("small-slide").embed_slide(s.slide, preprocessing=s.preprocessing(), execution=execution)


@call
def embed_slide_overlap_refused(s: Side) -> Any:
    """A ValueError: its tiles must not overlap."""
    return s.model("small-apart").embed_slide(
        s.slide, preprocessing=s.preprocessing(overlap=0.5), execution=s.in_memory()
    )


@call
def embed_patient_by_position(s: Side) -> Any:
    return s.model("small-patient").embed_patient(
        [s.slide, s.other], "p1", preprocessing=s.preprocessing(), execution=s.in_memory()
    )


@call
def embed_patients_by_map(s: Side) -> Any:
    ids = {"tissue": "p2", "other": "p1", "third": "p2"}
    third = {"sample_id": "third", "image_path": s.other}
    return s.model("small-patient").embed_patients(
        [s.slide, s.other, third], ids, preprocessing=s.preprocessing(), execution=s.in_memory()
    )


@call
def embed_patients_of_slides(s: Side) -> Any:
    slides = [
        {"sample_id": "a", "image_path": s.slide, "patient_id": "x"},
        {"sample_id": "b", "image_path": s.other},
    ]
    return s.model("small-patient").embed_patients(
        slides, preprocessing=s.preprocessing(), execution=s.in_memory()
    )


@call
def embed_patients_wrong_level(s: Side) -> Any:
    """A ValueError."""
    return s.model().embed_patients([s.slide], preprocessing=s.preprocessing())


# --- masks

MASKS = {
    "pixel_mapping": {"background": (0,), "tumor": (1,), "stroma": (2, 3)},
    "min_coverage": {"tumor": 0.2, "stroma": 0.5},
}


def labelled(s: Side, **given: Any) -> Any:
    return s.preprocessing(masks={**MASKS, **given})


def with_mask(s: Side, sample_id: str = "m") -> dict[str, Any]:
    return {"sample_id": sample_id, "image_path": s.slide, "mask_path": s.labels}


@call
def annotation_one(s: Side) -> Any:
    return s.model().embed_slide(
        with_mask(s), annotation="tumor", preprocessing=labelled(s), execution=s.in_memory()
    )


@call
def annotation_list(s: Side) -> Any:
    return s.model().embed_slide(
        with_mask(s),
        annotation=["stroma", "tumor"],
        preprocessing=labelled(s, strategy="independent"),
        execution=s.execution(),
    )


@call
def annotation_missing(s: Side) -> Any:
    """A ValueError."""
    return s.model().embed_slide(with_mask(s), annotation="necrosis", preprocessing=labelled(s))


@call
def annotation_several_and_none_named(s: Side) -> Any:
    """A ValueError."""
    return s.model().embed_slide(with_mask(s), preprocessing=labelled(s), execution=s.in_memory())


@call
def annotation_tissue(s: Side) -> Any:
    return s.model().embed_slide(
        s.slide, annotation="tissue", preprocessing=s.preprocessing(), execution=s.in_memory()
    )


@call
def annotation_merged(s: Side) -> Any:
    return s.model().embed_slide(
        with_mask(s), preprocessing=labelled(s, output_mode="merged"), execution=s.execution()
    )


@call
def annotations_of_slides(s: Side) -> Any:
    found = s.model().embed_slides(
        [with_mask(s, "a"), with_mask(s, "b")],
        annotations=["stroma"],
        preprocessing=labelled(s),
        execution=s.execution(),
    )
    return s.bags(found)


@call
def annotation_slide_level(s: Side) -> Any:
    execution = s.execution(save_latents=True, save_tile_embeddings=True)
    found = s.model("small-slide").embed_slides(
        [with_mask(s)], preprocessing=labelled(s), execution=execution
    )
    return s.bags(found)


@call
def annotation_regions(s: Side) -> Any:
    preprocessing = s.preprocessing(masks=MASKS, region_tile_multiple=2)
    return s.bags(
        s.model().embed_slides([with_mask(s)], preprocessing=preprocessing, execution=s.execution())
    )


@call
def annotation_patient_refused(s: Side) -> Any:
    """A ValueError."""
    return s.model("small-patient").embed_patients([with_mask(s)], preprocessing=labelled(s))


@call
def annotation_undeclared_value(s: Side) -> Any:
    """A ValueError, or the slide's own: the mask has values that the vocabulary lacks."""
    masks = {"pixel_mapping": {"background": (0,), "tumor": (1,)}, "min_coverage": {"tumor": 0.2}}
    return s.model().embed_slide(with_mask(s), preprocessing=s.preprocessing(masks=masks))


# --- pipelines


def manifest(s: Side, patients: bool = False) -> Path:
    path = s.out.parent / f"{s.out.name}.csv"
    head, tail = ("sample_id,image_path,mask_path", ["", ""])
    if patients:
        head, tail = f"{head},patient_id", [",p1", ",p1"]
    path.write_text(f"{head}\n0007,{s.slide},{tail[0]}\nb,{s.other},{tail[1]}\n")
    return path


@call
def pipeline_tiles(s: Side) -> Any:
    pipeline = Pipeline(s.model(), s.preprocessing(), execution=s.execution())
    found = pipeline.run([s.slide, s.other])
    return found, [artifact.metadata for artifact in found.tile_artifacts]


@call
def pipeline_manifest_by_keyword(s: Side) -> Any:
    return Pipeline(model=s.model(), preprocessing=s.preprocessing(), execution=s.execution()).run(
        manifest_path=manifest(s)
    )


@call
def pipeline_manifest_by_position(s: Side) -> Any:
    return Pipeline(s.model(), s.preprocessing(), execution=s.execution()).run(None, str(manifest(s)))


@call
def pipeline_tiling_only(s: Side) -> Any:
    return Pipeline(s.model(), s.preprocessing(), execution=s.execution()).run(
        manifest_path=manifest(s), tiling_only=True
    )


@call
def pipeline_slide_level(s: Side) -> Any:
    execution = s.execution(save_tile_embeddings=True, save_latents=True)
    return Pipeline(s.model("small-slide"), s.preprocessing(), execution=execution).run(
        manifest_path=manifest(s)
    )


@call
def pipeline_slide_level_alone(s: Side) -> Any:
    return Pipeline(s.model("small-slide"), s.preprocessing(), execution=s.execution()).run([s.slide])


@call
def pipeline_patient_level(s: Side) -> Any:
    execution = s.execution(save_tile_embeddings=True, save_slide_embeddings=True)
    return Pipeline(s.model("small-patient"), s.preprocessing(), execution=execution).run(
        manifest_path=manifest(s, patients=True)
    )


@call
def pipeline_patient_level_alone(s: Side) -> Any:
    return Pipeline(s.model("small-patient"), s.preprocessing(), execution=s.execution()).run(
        manifest_path=manifest(s, patients=True)
    )


@call
def pipeline_patients_without_ids(s: Side) -> Any:
    """A ValueError."""
    return Pipeline(s.model("small-patient"), s.preprocessing(), execution=s.execution()).run(
        manifest_path=manifest(s)
    )


@call
def pipeline_regions(s: Side) -> Any:
    return Pipeline(
        s.model(), s.preprocessing(requested_region_size_px=448), execution=s.execution(output_format="npz")
    ).run([s.slide])


@call
def pipeline_classes(s: Side) -> Any:
    return Pipeline(s.model(), labelled(s), execution=s.execution()).run([with_mask(s)])


@call
def pipeline_blank(s: Side) -> Any:
    return Pipeline(s.model(), s.preprocessing(), execution=s.execution()).run([s.slide, s.blank])


@call
def pipeline_archives(s: Side) -> Any:
    return Pipeline(s.model(), s.preprocessing(save_tiles=True), execution=s.execution()).run([s.slide])


@call
def pipeline_from_archives(s: Side) -> Any:
    return Pipeline(s.model(), s.preprocessing(on_the_fly=False), execution=s.execution()).run([s.slide])


@call
def pipeline_resumed(s: Side) -> Any:
    """The second run finds everything."""
    Pipeline(s.model(), s.preprocessing(), execution=s.execution()).run([s.slide])
    before = {p: p.stat().st_mtime_ns for p in s.out.rglob("*.pt")}
    found = Pipeline(s.model(), s.preprocessing(resume=True), execution=s.execution()).run([s.slide])
    return found, before == {p: p.stat().st_mtime_ns for p in s.out.rglob("*.pt")}


@call
def pipeline_resumed_with_more(s: Side) -> Any:
    Pipeline(s.model(), s.preprocessing(), execution=s.execution()).run([s.slide])
    return Pipeline(s.model(), s.preprocessing(resume=True), execution=s.execution()).run([s.slide, s.other])


@call
def pipeline_without_folder(s: Side) -> Any:
    """A ValueError."""
    return Pipeline(s.model(), s.preprocessing(), execution=s.in_memory()).run([s.slide])


@call
def pipeline_coordinates(s: Side) -> Any:
    """Of another run; only one of its slides, each persisted in turn."""
    first, persisted = s.out / "first", list[Any]()
    inner = dataclasses.replace(s, out=first)
    Pipeline(s.model(), s.preprocessing(), execution=inner.execution()).run(
        [s.slide, s.other], tiling_only=True
    )
    found = Pipeline(s.model(), s.preprocessing(), execution=s.execution()).run_with_coordinates(
        str(first), slides=[s.slide], on_slide_persisted=persisted.append
    )
    return found, persisted


@call
def pipeline_read_coordinates_from(s: Side) -> Any:
    first = s.out / "first"
    inner = dataclasses.replace(s, out=first)
    Pipeline(s.model(), s.preprocessing(), execution=inner.execution()).run([s.slide], tiling_only=True)
    preprocessing = s.preprocessing(read_coordinates_from=first / "tiles")
    return Pipeline(s.model(), preprocessing, execution=s.execution()).run([s.slide])


@call
def pipeline_read_tiles_from(s: Side) -> Any:
    first = s.out / "first"
    inner = dataclasses.replace(s, out=first)
    Pipeline(s.model(), s.preprocessing(save_tiles=True), execution=inner.execution()).run(
        [s.slide], tiling_only=True
    )
    preprocessing = s.preprocessing(read_tiles_from=first / "tiles", on_the_fly=False)
    return Pipeline(s.model(), preprocessing, execution=s.execution()).run([s.slide])


# --- tiles, then slides


def tiled(s: Side) -> Any:
    inner = dataclasses.replace(s, out=s.out / "first")
    Pipeline(s.model(), s.preprocessing(), execution=inner.execution()).run([s.slide], tiling_only=True)
    return s.tiling(inner.out, "tissue")


@call
def embed_tiles_by_position(s: Side) -> Any:
    persisted = list[Any]()
    found = s.model().embed_tiles(
        [s.slide],
        [tiled(s)],
        preprocessing=s.preprocessing(),
        execution=s.execution(),
        on_slide_persisted=persisted.append,
    )
    return found, persisted


@call
def embed_tiles_then_aggregate(s: Side) -> Any:
    tiles = s.model("small-slide").embed_tiles(
        [s.slide], {"tissue": tiled(s)}, preprocessing=s.preprocessing(), execution=s.execution()
    )
    return tiles, s.model("small-slide").aggregate_tiles(
        tiles, preprocessing=s.preprocessing(), execution=s.execution()
    )


@call
def embed_tiles_without_folder(s: Side) -> Any:
    """A ValueError."""
    return s.model().embed_tiles([s.slide], [tiled(s)], execution=s.in_memory())


# --- images


def images(*names: str) -> list[Any]:
    return [ImageSpec(sample_id=Path(name).stem, image_path=MATERIAL / "images" / name) for name in names]


ALL_IMAGES = ("odd.png", "grey.png", "opaque.png", "photo.jpg", "large.png", "palette.png", "small.tif")


@call
def images_all(s: Side) -> Any:
    found = s.model().embed_images(images(*ALL_IMAGES), execution=s.execution())
    return found, [artifact.metadata for artifact in found]


@call
def images_transparent(s: Side) -> Any:
    return s.model().embed_images(images("rgba.png"), execution=s.execution())


@call
def images_torch_npz(s: Side) -> Any:
    execution = s.execution(output_format="npz", output_dtype="fp16", workers=1)
    return s.model("small-torch").embed_images(images("odd.png", "photo.jpg"), execution=execution)


@call
def images_again(s: Side) -> Any:
    s.model().embed_images(images("odd.png"), execution=s.execution())
    before = (s.out / "image_embeddings/odd.pt").stat().st_mtime_ns
    found = s.model().embed_images(images("grey.png", "odd.png"), execution=s.execution())
    return found, before == (s.out / "image_embeddings/odd.pt").stat().st_mtime_ns


@call
def images_mismatch(s: Side) -> Any:
    """A ValueError: the name was another file's."""
    s.model().embed_images(images("odd.png"), execution=s.execution())
    other = [ImageSpec(sample_id="odd", image_path=MATERIAL / "images/grey.png")]
    return s.model().embed_images(other, execution=s.execution())


@call
def images_mismatch_reencoded(s: Side) -> Any:
    s.model().embed_images(images("odd.png"), execution=s.execution())
    other = [ImageSpec(sample_id="odd", image_path=MATERIAL / "images/grey.png")]
    return s.model().embed_images(other, execution=s.execution(on_image_mismatch="reencode"))


@call
def images_other_identity(s: Side) -> Any:
    """A ValueError: embeddings of another variant."""
    s.model().embed_images(images("odd.png"), execution=s.execution())
    return s.model(output_variant="cls_patch_mean").embed_images(images("odd.png"), execution=s.execution())


@call
def images_twice_one_id(s: Side) -> Any:
    """A ValueError."""
    return s.model().embed_images(images("odd.png", "odd.png"), execution=s.execution())


@call
def images_with_spacing(s: Side) -> Any:
    """A ValueError."""
    spec = ImageSpec(sample_id="a", image_path=MATERIAL / "images/odd.png", spacing_at_level_0=0.5)
    return s.model().embed_images([spec], execution=s.execution())


@call
def images_bad_spacing(s: Side) -> Any:
    """A ValueError."""
    return ImageSpec(sample_id="a", image_path="a.png", spacing_at_level_0=-1)


@call
def images_slide_level(s: Side) -> Any:
    """A ValueError."""
    return s.model("small-slide").embed_images(images("odd.png"), execution=s.execution())


@call
def images_without_folder(s: Side) -> Any:
    """A ValueError."""
    return s.model().embed_images(images("odd.png"), execution=s.in_memory())


# --- dense features


def regions(s: Side, **given: Any) -> list[Any]:
    spots = np.array([[40, 80], [700, 900], [2100, 2900]])
    return [SlideRegions(**{"sample_id": "slide", "image_path": s.slide, "coordinates": spots, **given})]


def dense(**given: Any) -> Any:
    return DenseOptions(**{"spacing_um": 0.5, "target_size": 224, "backend": "openslide", **given})


@call
def regions_whole(s: Side) -> Any:
    found = s.model().embed_regions_dense(regions(s), dense=dense(), execution=s.execution())
    return found, [artifact.metadata for artifact in found]


@call
def regions_class_and_windows(s: Side) -> Any:
    options = dense(target_size=500, window_size=224, overlap=0.5, pad_mode="replicate", spacing_um=0.7)
    return s.model().embed_regions_dense(
        regions(s, annotation="tumor", spacing_at_level_0=0.6), dense=options, execution=s.execution()
    )


@call
def regions_prenorm_fp16(s: Side) -> Any:
    options = dense(
        feature_kind="patch_features_prenorm", pad_mode="constant", image_pad_value=0.2, target_size=230
    )
    return s.model().embed_regions_dense(
        regions(s), dense=options, execution=s.execution(output_dtype="fp16")
    )


@call
def regions_attention(s: Side) -> Any:
    options = dense(feature_kind="cls_attention", attention_blocks=(-1, 0), attention_include_registers=True)
    return s.model().embed_regions_dense(regions(s), dense=options, execution=s.execution())


@call
def regions_again(s: Side) -> Any:
    s.model().embed_regions_dense(regions(s), dense=dense(), execution=s.execution())
    before = {p: p.stat().st_mtime_ns for p in s.out.rglob("*.pt")}
    s.model().embed_regions_dense(regions(s), dense=dense(), execution=s.execution())
    return before == {p: p.stat().st_mtime_ns for p in s.out.rglob("*.pt")}


@call
def regions_bad_window(s: Side) -> Any:
    """A ValueError: no multiple of the patch."""
    return s.model().embed_regions_dense(
        regions(s), dense=dense(target_size=448, window_size=100), execution=s.execution()
    )


@call
def regions_upsampled(s: Side) -> Any:
    """A ValueError: finer than the slide."""
    return s.model().embed_regions_dense(regions(s), dense=dense(spacing_um=0.2), execution=s.execution())


@call
def regions_slide_level(s: Side) -> Any:
    """A ValueError."""
    return s.model("small-slide").embed_regions_dense(regions(s), dense=dense(), execution=s.execution())


@call
def regions_of_a_convolution(s: Side) -> Any:
    """Refused: no patch tokens."""
    return s.model("small-torch").embed_regions_dense(
        regions(s), dense=dense(target_size=128), execution=s.execution()
    )


@call
def dense_images(s: Side) -> Any:
    specs = [
        ImageSpec(
            sample_id=name, image_path=MATERIAL / "images" / f"dense-{name}.png", spacing_at_level_0=0.25
        )
        for name in ("a", "b")
    ]
    options = DenseImageOptions(target_size=(240, 224), spacing_um=0.5)
    found = s.model().embed_images_dense(specs, dense=options, execution=s.execution())
    return found, [artifact.metadata for artifact in found]


@call
def dense_images_preset_spacing(s: Side) -> Any:
    spec = ImageSpec(sample_id="a", image_path=MATERIAL / "images/dense-a.png", spacing_at_level_0=0.5)
    options = DenseImageOptions(target_size=(480, 448), window_size=224, overlap=0.25, pad_mode="zero")
    return s.model().embed_images_dense([spec], dense=options, execution=s.execution())


@call
def dense_images_wrong_size(s: Side) -> Any:
    """A ValueError, or the image's own."""
    spec = ImageSpec(sample_id="a", image_path=MATERIAL / "images/dense-a.png", spacing_at_level_0=0.5)
    return s.model().embed_images_dense(
        [spec], dense=DenseImageOptions(target_size=224), execution=s.execution()
    )


@call
def dense_images_without_spacing(s: Side) -> Any:
    """A ValueError, or the image's own."""
    spec = ImageSpec(sample_id="a", image_path=MATERIAL / "images/dense-a.png")
    return s.model().embed_images_dense(
        [spec], dense=DenseImageOptions(target_size=(480, 448)), execution=s.execution()
    )


@call
def dense_kit(s: Side) -> Any:
    options = DenseImageOptions(target_size=(230, 224), feature_kind="patch_features")
    kit = s.model().prepare_dense_encoder(dense=options, execution=s.in_memory(precision="fp32"))
    pixels = torch.randint(
        0, 256, (3, 230, 224), generator=torch.Generator().manual_seed(3), dtype=torch.uint8
    )
    prepared = kit.preprocessor()(pixels)
    return kit.geometry, prepared, kit.encode(torch.stack([prepared, prepared.flip(2)]))


@call
def dense_kit_windows(s: Side) -> Any:
    options = DenseOptions(spacing_um=0.5, target_size=448, window_size=224, overlap=0.5)
    kit = s.model().prepare_dense_encoder(dense=options)
    pixels = torch.randint(
        0, 256, (3, 448, 448), generator=torch.Generator().manual_seed(3), dtype=torch.uint8
    )
    return kit.geometry, kit.encode(kit.preprocessor()(pixels)[None])


@call
def dense_kit_slide_level(s: Side) -> Any:
    """A ValueError."""
    return s.model("small-slide").prepare_dense_encoder(dense=DenseImageOptions(target_size=224))


@call
def dense_kit_wrong_options(s: Side) -> Any:
    """A TypeError."""
    return s.model().prepare_dense_encoder(dense=s.preprocessing())


@call
def methods_of_an_encoder(s: Side) -> Any:
    encoder = SmallTile().to("cpu")
    batch = torch.randn(2, 3, 224, 240, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return {
            "tiles": encoder.encode_tiles(batch),
            "dense": encoder.encode_tiles_dense(batch),
            "prenorm": encoder.encode_tiles_dense_prenorm(batch),
            "attention": encoder.encode_tiles_attention(batch, blocks=(0, -1), include_registers=True),
            "attention by default": encoder.encode_tiles_attention(batch),
            "transform": encoder.get_transform()(Image.open(MATERIAL / "images/odd.png").convert("RGB")),
            "normalised": encoder.get_normalization_transform()(
                Image.open(MATERIAL / "images/odd.png").convert("RGB")
            ),
            "numbers": [encoder.encode_dim, encoder.patch_size, str(encoder.device)],
        }


# --- identities


@call
def identity_of_tiles(s: Side) -> Any:
    """None differ; other variants' do."""
    Pipeline(s.model(), s.preprocessing(), execution=s.execution()).run([s.slide])
    recorded = json.loads((s.out / "tile_embeddings/tissue.meta.json").read_text())["compatibility"]
    same = s.model().pooled_identity_differences(
        recorded, preprocessing=s.preprocessing(), execution=s.in_memory()
    )
    other = s.model(output_variant="cls_patch_mean").pooled_identity_differences(
        recorded, preprocessing=s.preprocessing(), execution=s.in_memory()
    )
    missing = s.model().pooled_identity_differences({}, preprocessing=s.preprocessing())
    return same, bool(other), all(before is S.MISSING_FIELD for before, _ in missing.values()), bool(missing)


@call
def identity_of_images(s: Side) -> Any:
    (artifact,) = s.model().embed_images(images("odd.png"), execution=s.execution())
    return s.model().pooled_identity_differences(
        artifact.metadata["compatibility"], preprocessing=None, execution=s.in_memory()
    )


@call
def identity_of_dense(s: Side) -> Any:
    found = s.model().embed_regions_dense(regions(s), dense=dense(), execution=s.execution())
    recorded = found[0].metadata["compatibility"]
    same = s.model().dense_identity_differences(recorded, dense=dense(), execution=s.in_memory())
    other = s.model().dense_identity_differences(
        recorded, dense=dense(target_size=448), execution=s.in_memory()
    )
    return same, bool(other)


@call
def identity_wrong_options(s: Side) -> Any:
    """A TypeError."""
    return s.model().dense_identity_differences({}, dense={"target_size": 224})


# --- the rest


@call
def options_refused(s: Side) -> Any:
    """Which of these are ValueErrors."""
    wrong: list[dict[str, Any]] = [
        *({"batch_size": 0}, {"prefetch_factor": 0}, {"num_preprocessing_workers": -1}),
        *({"precision": "int8"}, {"output_dtype": "bf16"}, {"on_image_mismatch": "maybe"}),
    ]
    found = []
    for given in wrong:
        try:
            S.ExecutionOptions(**given)
            found.append(f"{given} taken")
        except ValueError:
            found.append(f"{given} refused")
    return found


@call
def listed(s: Side) -> Any:
    """Names that were registered here are listed by their level."""
    ours = {level: [n for n in S.list_models(level) if n.startswith("small-")] for level in ("tile", "slide")}
    return (
        ours,
        [n for n in S.list_models("patient") if n.startswith("small-")],
        S.list_encoder_provider_diagnostics(),
    )


@call
def listed_wrong_level(s: Side) -> Any:
    """A ValueError."""
    return S.list_models("organ")


@call
def registered_twice(s: Side) -> Any:
    """A ValueError: a preset's own name."""
    return register_encoder(
        "uni", encode_dim=8, input_size=128, supports_variable_input_size=True, supported_spacing_um=None
    )(SmallTorch)


CONFIG = """
csv: {csv}
output_dir: {out}
resume: false
model:
  name: {model}
  batch_size: 5
  save_tile_embeddings: {tiles}
  save_latents: {tiles}
tiling:
  backend: openslide
  params:
    requested_spacing_um: 0.5
    requested_tile_size_px: 224
    tolerance: 0.05
    overlap: 0.0
    region_tile_multiple: {multiple}
  masks:
    min_coverage:
      tissue: {threshold}
  preview:
    save_mask_preview: false
    save_tiling_preview: false
speed:
  precision: fp32
  num_gpus: 1
  num_dataloader_workers: 0
  num_preprocessing_workers: 1
wandb:
  enable: false
"""


def config(
    s: Side,
    model: str = "small-tile",
    tiles: bool = False,
    multiple: int | None = None,
    threshold: float | None = 0.01,
) -> str:
    path = s.out.parent / f"{s.out.name}.yaml"
    filled = {"csv": manifest(s), "out": s.out, "model": model, "tiles": str(tiles).lower()}
    text = CONFIG if threshold is not None else re.sub(r"  masks:.*?}\n", "", CONFIG, flags=re.DOTALL)
    path.write_text(text.format(**filled, multiple=multiple or "", threshold=threshold))
    return str(path)


@call
def command_tiles(s: Side) -> Any:
    s.command(config(s), "--skip-datetime", "--run-on-cpu")


@call
def command_slide_level(s: Side) -> Any:
    s.command(
        config(s, "small-slide", tiles=True), "--skip-datetime", "--run-on-cpu", "--output-dir", str(s.out)
    )


@call
def command_regions(s: Side) -> Any:
    s.command(config(s, multiple=2), "--skip-datetime", "--run-on-cpu")


@call
def command_tiling_only(s: Side) -> Any:
    s.command(config(s), "--skip-datetime", "--run-on-cpu", "--tiling-only")


@call
def command_threshold_by_default(s: Side) -> Any:
    s.command(config(s, threshold=None), "--skip-datetime", "--run-on-cpu", "--tiling-only")


@call
def command_options_after(s: Side) -> Any:
    """Further keys after the arguments, as OmegaConf's."""
    s.command(config(s), "--skip-datetime", "--run-on-cpu", "model.batch_size=3", "speed.output_dtype=fp16")


# --- what came of it


def plain(value: Any, out: Path) -> Any:
    """What was returned, in types that both sides can load."""
    if isinstance(value, torch.Tensor):
        return {"tensor": value.detach().cpu(), "kind": "torch"}
    if isinstance(value, np.ndarray):
        return {"tensor": torch.from_numpy(np.ascontiguousarray(value)), "kind": "numpy"}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: plain(getattr(value, field.name), out) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__, "fields": fields}
    if isinstance(value, PurePath):
        try:
            return f"path {Path(value).resolve().relative_to(out.resolve())}"
        except ValueError:
            return f"path …/{value.name}"
    if isinstance(value, Mapping):
        return {"mapping": {str(key): plain(item, out) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [plain(item, out) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return f"object {type(value).__name__}"


def main() -> None:
    out, asked = Path(sys.argv[2]), sys.argv[3:] or list(CALLS)
    kept = sys.argv[3:] and (out / "returned.pt").exists()
    returned = torch.load(out / "returned.pt", weights_only=True) if kept else {}
    for name in asked:
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            returned[name] = {"value": plain(CALLS[name](Side(folder)), folder)}
        except (Exception, SystemExit) as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            returned[name] = {"raised": kinds, "message": str(error)[:600]}
            (out / f"{name}.traceback").write_text(traceback.format_exc())
    torch.save(returned, out / "returned.pt")


if __name__ == "__main__":
    main()
