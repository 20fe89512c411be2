"""`slide2vec images`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shallow import few_blocks

from slide2vec.artifacts import load_embeddings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "images"
    for number, name in enumerate(("a.png", "deeper/b.jpg")):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 50, 3), 40 * number, np.uint8)).save(made / name)
    (made / "notes.txt").write_text("no image")
    return made


def test_folders_tables_and_bad_images(run: Callable[..., object], folder: Path, tmp_path: Path) -> None:
    output, table = tmp_path / "out", tmp_path / "table.csv"
    options = ("--preset", "lunit", "--weights", "random", "--device", "cpu", "--output", output, "--json")
    with few_blocks():
        found = run("images", folder, "--recursive", "--id-from", "path", *options)
        assert found.exit_code == 0, found.output  # type: ignore[attr-defined]
        said = json.loads(found.stdout)  # type: ignore[attr-defined]
        assert [each["sample_id"] for each in said["images"]] == ["a", "deeper__b"] and said["failed"] == {}
        (folder / "broken.png").write_bytes(b"")
        table.write_text(f"sample_id,image_path\nfirst,{folder / 'a.png'}\nbroken,{folder / 'broken.png'}\n")
        found = run("images", table, *options)
    said = json.loads(found.stdout)  # type: ignore[attr-defined]
    assert found.exit_code == 1 and list(said["failed"]) == ["broken"]  # type: ignore[attr-defined]
    same = [load_embeddings(output / "image_embeddings" / f"{name}.pt") for name in ("a", "first")]
    assert (same[0] == same[1]).all()


def test_a_folder_without_images(run: Callable[..., object], tmp_path: Path) -> None:
    found = run("images", tmp_path, "--preset", "lunit", "--output", tmp_path / "out")
    assert found.exit_code == 1  # type: ignore[attr-defined]
    assert "holds no images (--recursive looks into its subfolders)" in " ".join(found.stderr.split())  # type: ignore[attr-defined]
