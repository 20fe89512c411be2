"""Images as users give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from slide2vec import ImageSpec
from slide2vec.errors import ManifestError
from slide2vec.images import as_images


def test_paths_mappings_and_specs(tmp_path: Path) -> None:
    given: list[Any] = [
        "~/a.b.png",
        {"sample_id": "second", "image_path": tmp_path / "x" / ".." / "b.png"},
        ImageSpec(sample_id="third", image_path="c.png"),
    ]
    found = as_images(given, "m")
    assert [image.sample_id for image in found] == ["a.b", "second", "third"]
    assert [image.source for image in found] == [
        str(Path("~/a.b.png").expanduser()),
        str(tmp_path / "b.png"),
        str(Path("c.png").resolve()),
    ]


def test_what_pixels_in_memory_are_is_their_digest() -> None:
    zeros = np.zeros((4, 6, 3), np.uint8)
    first, same = (ImageSpec(sample_id="a", image=image).source for image in (zeros, zeros.copy()))
    other = ImageSpec(sample_id="a", image=zeros.reshape(6, 4, 3)).source
    picture = ImageSpec(sample_id="a", image=Image.fromarray(zeros)).source
    assert first == same != other and first.startswith("memory:") and picture not in (first, other)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sample_id": "a/b", "image_path": "a.png"}, "becomes a file name"),
        ({"sample_id": "a"}, "either image_path, or image"),
        ({"sample_id": "a", "image_path": "a.png", "image": 1}, "either image_path, or image"),
        ({"sample_id": "a", "image_path": "a.png", "spacing_at_level_0": 0.0}, "finite and positive"),
        (
            {"sample_id": "a", "image_path": "a.png", "spacing_at_level_0": float("nan")},
            "finite and positive",
        ),
        ({"sample_id": "a", "image_path": "a.png", "spacing_at_level_0": True}, "finite and positive"),
    ],
)
def test_what_is_no_image(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        ImageSpec(**fields)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a.png", "a list of images"),
        ([], "at least one image"),
        (["x/a.png", "y/a.jpg"], r"'a' appears twice \(.*x/a.png and .*y/a.jpg\)"),
        ([{"sample_id": "a", "image_pth": "a.png"}], "Did you mean image_path"),
        ([np.zeros((2, 2, 3), np.uint8)], "ImageSpec"),
    ],
)
def test_what_are_no_images(given: Any, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        as_images(given, "embed_images")
