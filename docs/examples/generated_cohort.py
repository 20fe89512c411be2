"""Slides for `attention_mil.py`: pale tissue all over, and in half of them a few tiles of dense nuclei."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import tifffile

#: Tiles a side, px of a tile, µm/px.
SIDE, TILE_PX, SPACING_UM = 6, 64, 0.5


def write_cohort(folder: Path, slides: int, seed: int) -> Path:
    """Write slides and `labels.csv` (sample_id, image_path, label); the same seed gives the same ones."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(slides):
        label = "tumour" if number % 2 else "normal"
        path = folder / f"{seed}-{number:03}.tif"
        dense = set(rng.choice(SIDE**2, 3, replace=False).tolist()) if label == "tumour" else set()
        tiles = [_tile(rng, dense=place in dense) for place in range(SIDE**2)]
        rows_of_tiles = [np.concatenate(tiles[row * SIDE : (row + 1) * SIDE], axis=1) for row in range(SIDE)]
        _write(path, np.concatenate(rows_of_tiles))
        rows.append({"sample_id": path.stem, "image_path": path, "label": label})
    with (folder / "labels.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return folder / "labels.csv"


def _tile(rng: np.random.Generator, *, dense: bool) -> np.ndarray:
    """Eosin with some nuclei, of a shade of its own; dense: four times as many."""
    picture = np.full((TILE_PX, TILE_PX, 3), (225, 160, 195), np.int16) + rng.integers(-15, 16)
    picture += rng.integers(-12, 13, picture.shape, dtype=np.int16)
    picture = np.ascontiguousarray(picture.clip(0, 255).astype(np.uint8))
    for x, y in rng.integers(0, TILE_PX, (24 if dense else 6, 2)).tolist():
        cv2.circle(picture, (x, y), int(rng.integers(2, 5)), (95, 60, 140), -1)
    return picture


def _write(path: Path, picture: np.ndarray) -> None:
    per_cm = 1e4 / SPACING_UM
    options = {"tile": (TILE_PX, TILE_PX), "photometric": "rgb", "compression": "deflate"}
    tifffile.imwrite(path, picture, resolution=(per_cm, per_cm), resolutionunit="CENTIMETER", **options)
