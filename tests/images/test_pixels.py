"""Pixels of ready images, against Pillow and torchvision."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from images_helpers import picture
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize, v2

from slide2vec import ImageSpec
from slide2vec.errors import ImageError
from slide2vec.images.pixels import fitted, image_geometry, rgb, transform_record
from slide2vec.recipes import ImageGeometry, load_recipe


def read(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(rgb(ImageSpec(sample_id="it", image_path=path)))


def test_pixels_are_pillows(pictures: list[Path]) -> None:
    for path in pictures:
        np.testing.assert_array_equal(
            read(path), np.asarray(Image.open(path).convert("RGB")), err_msg=str(path)
        )


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("size", [(411, 300), (261, 640), (120, 97), (256, 256), (333, 251)])
def test_resized_and_cropped_as_torchvision_does(
    size: tuple[int, int], square: bool, interpolation: Any
) -> None:
    image = Image.fromarray(picture(size[1], size[0], 3))
    geometry = ImageGeometry(resize=256, crop=224, interpolation=interpolation, square=square)
    resized = Resize([256, 256] if square else 256, InterpolationMode(interpolation))(image)
    np.testing.assert_array_equal(fitted(image, geometry), np.asarray(CenterCrop(224)(resized)))


@pytest.mark.parametrize("preset", ["isight", "phikonv2"])
def test_odd_margins_are_cropped_as_processors_of_transformers_do(preset: str) -> None:
    """Margins of 1 and 3 px: half of them is rounded down, where torchvision's even number is 2 of 1.5."""
    from transformers.image_transforms import center_crop

    geometry = image_geometry(load_recipe(preset))
    for sides in ((geometry.crop + 3, geometry.crop), (geometry.crop, geometry.crop + 1)):
        pixels = picture(*sides, 3)
        cropped = center_crop(pixels, (geometry.crop, geometry.crop), input_data_format="channels_last")
        np.testing.assert_array_equal(fitted(Image.fromarray(pixels), geometry), cropped)
    assert transform_record(load_recipe(preset), geometry)["center_crop"]["odd_margin"] == "down"


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(411, 300), (261, 640), (120, 97)])
def test_resized_as_torchvision_resizes_tensors(size: tuple[int, int], interpolation: Any) -> None:
    image = Image.fromarray(picture(size[1], size[0], 3))
    geometry = ImageGeometry(resize=256, crop=224, interpolation=interpolation, tensor=True)
    resize = v2.Compose([v2.ToImage(), v2.Resize(256, InterpolationMode(interpolation)), v2.CenterCrop(224)])
    np.testing.assert_array_equal(fitted(image, geometry), resize(image).permute(1, 2, 0).numpy())


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    pixels = np.full((4, 4, 4), (10, 20, 30, 255), np.uint8)
    pixels[0] = (0, 0, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = read(tmp_path / "a.png")
    assert (found[0] == 255).all() and (found[1:] == (10, 20, 30)).all()


def test_other_modes_become_rgb(tmp_path: Path) -> None:
    image = Image.fromarray(picture(30, 40, 1))
    for mode in ("L", "P", "1"):
        converted = image.convert(mode)
        converted.save(tmp_path / "a.png")
        np.testing.assert_array_equal(read(tmp_path / "a.png"), np.asarray(converted.convert("RGB")))
    image.convert("L").save(tmp_path / "a.jpg")
    assert read(tmp_path / "a.jpg").shape == (30, 40, 3)


def test_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    """Pillow would cut them off at 255."""
    for number, dtype in enumerate((np.uint16, np.float32)):
        path = tmp_path / f"{number}.tif"
        tifffile.imwrite(path, np.full((8, 8), 4000, dtype))
        with pytest.raises(ImageError, match=rf"image it \({path}\): its pixels have more than 8 bits"):
            read(path)


def test_pages_of_one_size_are_refused_and_pyramids_are_not(tmp_path: Path) -> None:
    base = picture(64, 64, 1)
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as writer:
        writer.write(base, photometric="rgb")
        writer.write(base[::2, ::2], photometric="rgb")
    np.testing.assert_array_equal(read(tmp_path / "pyramid.tif"), base)
    tifffile.imwrite(tmp_path / "stack.tif", np.stack([base] * 3), photometric="rgb")
    with pytest.raises(ImageError, match="3 images of one size"):
        read(tmp_path / "stack.tif")


def _jpeg() -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(200, 200, 1)).save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.mark.parametrize(
    "name", ["cut.jpg", "marker.jpg", "cut.png", "nonsense.png", "empty.png", "not-there.png"]
)
def test_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    """A stray marker in its data is what libjpeg only warns of."""
    jpeg, png = _jpeg(), io.BytesIO()
    Image.fromarray(picture(64, 64, 1)).save(png, "PNG")
    content = {
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "marker.jpg": jpeg[: len(jpeg) // 2] + b"\xff\xd3" + jpeg[len(jpeg) // 2 :],
        "cut.png": png.getvalue()[:-200],
        "nonsense.png": b"nonsense",
        "empty.png": b"",
    }
    if name in content:
        (tmp_path / name).write_bytes(content[name])
    with pytest.raises(ImageError, match=rf"image it \({tmp_path / name}\): "):
        read(tmp_path / name)


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)]
)
def test_arrays_that_are_no_images(array: Any) -> None:
    with pytest.raises(ImageError, match=r"image it in memory: an array must be \(H, W, 3\) uint8 RGB"):
        rgb(ImageSpec(sample_id="it", image=array))


def test_geometry_is_the_published_one_and_grows_with_the_input() -> None:
    recipe = load_recipe("lunit")
    assert (image_geometry(recipe).resize, image_geometry(recipe).crop) == (248, 224)
    larger = recipe.model_copy(
        update={"transform": recipe.transform.model_copy(update={"crop": 448, "resize": 448})}
    )
    assert (image_geometry(larger).resize, image_geometry(larger).crop) == (496, 448)
    assert image_geometry(load_recipe("conch")).resize == 448


def test_transform_is_recorded_by_its_steps() -> None:
    recipe = load_recipe("gpfm")
    statistics = {"mean": list(recipe.transform.mean), "std": list(recipe.transform.std)}
    assert transform_record(recipe, image_geometry(recipe)) == {
        "normalize": statistics,
        "resize": {"size": [224, 224], "interpolation": "bicubic"},
        "center_crop": {"size": [224, 224]},
    }
    assert transform_record(recipe) == {"normalize": statistics, "resize": None, "center_crop": None}
