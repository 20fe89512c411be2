"""Configuration files of the original slide2vec, as text; and what loads text."""

from __future__ import annotations

from collections.abc import Callable

from slide2vec.settings import RunSettings

Load = Callable[..., RunSettings]

#: What the original 7.1 has as its default file, with a manifest and a preset filled in.
NEWEST = """
csv: slides.csv
output_dir: "output"
resume: false
resume_dirname:
save_tiles: false
seed: 0
model:
  name: uni
  output_variant:
  batch_size: 32
  save_tile_embeddings: false
  save_slide_embeddings: false
  save_latents: false
  allow_non_recommended_settings: false
tiling:
  on_the_fly: true
  gpu_decode: false
  adaptive_batching: false
  use_supertiles: true
  jpeg_backend: "pil"
  read_coordinates_from:
  read_tiles_from:
  backend: "auto"
  mask_backend: "auto"
  masks:
    output_mode: per_annotation
    strategy: joint
    pixel_mapping:
      background: 0
      tissue: 1
    colors:
      background:
      tissue: [157, 219, 129]
    min_coverage:
      background:
      tissue: 0.01
  params:
    requested_spacing_um:
    tolerance: 0.05
    requested_tile_size_px:
    requested_region_size_px:
    region_tile_multiple:
    overlap: 0.0
  seg_params:
    downsample: 64
    sthresh: 8
    sthresh_up: 255
    mthresh: 7
    close: 4
    method: "hsv"
    sam2_checkpoint_path:
    sam2_config_path:
    sam2_device: "cpu"
    sam2_num_workers:
  filter_params:
    ref_tile_size: ${tiling.params.requested_tile_size_px}
    a_t: 4
    a_h: 2
    filter_white: false
    filter_black: false
    white_threshold: 220
    black_threshold: 25
    fraction_threshold: 0.9
    filter_grayspace: false
    grayspace_saturation_threshold: 0.05
    grayspace_fraction_threshold: 0.6
    filter_blur: false
    blur_threshold: 50.0
    qc_spacing_um: 2.0
  preview:
    save_mask_preview: true
    save_tiling_preview: true
    downsample: 32
    tissue_contour_color: [157, 219, 129]
    mask_overlay_alpha: 0.5
speed:
  precision:
  output_dtype:
  num_dataloader_workers:
  num_gpus:
  num_preprocessing_workers:
  num_cucim_workers: 4
  prefetch_factor_embedding: 4
wandb:
  enable: false
  project: ""
  tags: ["features", "${model.name}", "${tiling.params.requested_tile_size_px}"]
  dir: "/home/user/"
  group:
  resume_id: "${resume_dirname}"
"""

#: As 4.0 and 4.1 spell what differs from it.
OLDEST = """
csv: slides.csv
model: {name: uni}
tiling:
  jpeg_backend: turbojpeg
  params:
    target_spacing_um: 0.5
    target_tile_size_px: 256
    target_region_size_px: 2048
    tissue_threshold: 0.2
  seg_params: {use_otsu: true, use_hsv: false}
  filter_params: {ref_tile_size: "${tiling.params.target_tile_size_px}"}
  preview: {save: false, mask_overlay_color: [1, 2, 3]}
speed: {num_dataloader_workers: 8, persistent_workers_embedding: false}
"""
