"""Maps of embeddings: similar tiles get similar colours, in the right place; small slides work too."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from slide2vec.errors import ConfigError
from slide2vec.pictures import (
    attention_key,
    attention_map,
    attention_overlay,
    pca_key,
    pca_map,
    principal_components,
    variance_shares,
    write_picture,
)

THUMBNAIL = np.full((100, 200, 3), 230, np.uint8)
DIMENSIONS = (2000, 1000)


def two_kinds(tiles_per_side: int = 4) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """A grid of tiles of 100 px whose left and right halves differ."""
    rng = np.random.default_rng(0)
    x, y = (v.ravel() * 100 for v in np.mgrid[0 : 2 * tiles_per_side, 0:tiles_per_side])
    centres = rng.standard_normal((2, 16)) * 5
    embeddings = centres[(x >= 100 * tiles_per_side).astype(int)] + 0.1 * rng.standard_normal((len(x), 16))
    return embeddings.astype(np.float32), x, y


def test_components_match_a_singular_value_decomposition() -> None:
    rng = np.random.default_rng(1)
    for shape in ((50, 8), (8, 50)):
        embeddings = rng.standard_normal(shape)
        scores = principal_components(embeddings, 3)
        u, s, _ = np.linalg.svd(embeddings - embeddings.mean(axis=0), full_matrices=False)
        np.testing.assert_allclose(np.abs(scores), np.abs(u[:, :3] * s[:3]), atol=1e-8)
        assert ((scores**3).sum(axis=0) >= 0).all()


def test_sign_does_not_depend_on_the_sign_of_the_axes() -> None:
    embeddings = np.random.default_rng(2).gamma(1.0, size=(40, 6))
    mirrored = embeddings * np.array([1, -1, 1, -1, 1, -1])
    expected = principal_components(embeddings, 3)
    np.testing.assert_allclose(principal_components(mirrored, 3), expected, atol=1e-8)


def test_kinds_have_their_own_colours_where_they_are() -> None:
    embeddings, x, y = two_kinds()
    picture = pca_map(embeddings, x, y, 100, DIMENSIONS, THUMBNAIL)
    assert picture.shape == THUMBNAIL.shape and picture.dtype == np.uint8
    left, right = picture[:40, :40].reshape(-1, 3), picture[:40, 40:80].reshape(-1, 3)
    apart = np.linalg.norm(left.mean(axis=0) - right.mean(axis=0))
    assert apart > 60
    assert apart > 2 * max(left.std(axis=0).max(), right.std(axis=0).max())
    bare = picture[50:, 100:]
    assert (bare == bare[0, 0]).all() and bare[0, 0].min() > 230  # faded, and grey
    assert len(set(bare[0, 0].tolist())) == 1


@pytest.mark.parametrize("tiles", [0, 1, 2, 3])
def test_few_tiles(tiles: int) -> None:
    embeddings = np.random.default_rng(0).standard_normal((tiles, 5)).astype(np.float32)
    positions = np.arange(tiles) * 100
    picture = pca_map(embeddings, positions, positions, 100, DIMENSIONS, THUMBNAIL)
    bare = pca_map(embeddings[:0], positions[:0], positions[:0], 100, DIMENSIONS, THUMBNAIL)
    coloured = (picture != bare).any(axis=-1).sum()
    assert coloured == tiles * 100


def test_identical_tiles_and_one_dimension() -> None:
    x = np.arange(5) * 100
    same = pca_map(np.ones((5, 7), np.float32), x, x, 100, DIMENSIONS, THUMBNAIL)
    assert (same[5, 5] == same[45, 45]).all()
    line = pca_map(np.arange(5, dtype=np.float32)[:, None], x, x, 100, DIMENSIONS, THUMBNAIL)
    assert (line[5, 5] != line[45, 45]).any()


def test_tiles_at_the_edge_and_below_a_pixel() -> None:
    x, y = np.array([1990, 0]), np.array([990, 0])
    picture = pca_map(np.eye(2, 4, dtype=np.float32), x, y, 4, DIMENSIONS, THUMBNAIL)
    assert np.ptp(picture[0, 0].astype(int)) > 5  # both tiles are less than a pixel and still coloured
    assert np.ptp(picture[99, 199].astype(int)) > 5


def test_arrays_must_belong_together() -> None:
    with pytest.raises(ConfigError, match=r"\(3, 4\)"):
        pca_map(np.zeros((3, 4)), np.zeros(2, int), np.zeros(2, int), 100, DIMENSIONS, THUMBNAIL)


def test_written_pictures_read_back(tmp_path: Path) -> None:
    embeddings, x, y = two_kinds()
    picture = pca_map(embeddings, x, y, 100, DIMENSIONS, THUMBNAIL)
    png = write_picture(tmp_path / "map.png", picture)
    assert (cv2.cvtColor(cv2.imread(str(png)), cv2.COLOR_BGR2RGB) == picture).all()
    jpeg = cv2.cvtColor(cv2.imread(str(write_picture(tmp_path / "map.JPG", picture))), cv2.COLOR_BGR2RGB)
    assert np.abs(jpeg.astype(int) - picture).mean() < 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["map.JPG", "map.png"]
    with pytest.raises(ConfigError, match=r"\.tiff"):
        write_picture(tmp_path / "map.tiff", picture)


def test_attention_is_where_it_is_on_one_scale() -> None:
    """Two tiles of 2 x 2 patches: the hottest patch of all is the brightest, the slide is grey under it."""
    heat = np.array([[[0, 0], [0, 1]], [[0, 0], [0.2, 0]]], np.float32)
    x, y = np.array([0, 1000]), np.array([0, 0])
    picture = attention_map(heat, x, y, 1000, DIMENSIONS, THUMBNAIL)
    assert picture.shape == THUMBNAIL.shape and picture.dtype == np.uint8
    brightness = picture.astype(int).sum(axis=2)
    row, column = np.unravel_index(brightness.argmax(), brightness.shape)
    assert row > 60 and 60 < column < 100
    hot, mild, cold = picture[95, 95].astype(int), picture[95, 105].astype(int), picture[5, 195].astype(int)
    assert hot.sum() > mild.sum() > cold.sum()
    assert hot[0] > hot[2] + 20  # yellow
    bare = attention_map(heat[:1], x[:1], y[:1], 1000, DIMENSIONS, THUMBNAIL)
    np.testing.assert_array_equal(bare[:, 100:], THUMBNAIL[:, 100:])
    np.testing.assert_array_equal(attention_map(heat[:0], x[:0], y[:0], 9, DIMENSIONS, THUMBNAIL), THUMBNAIL)


def test_attention_of_a_tile_at_the_edge_and_of_one_value() -> None:
    """A tile that overhangs the slide is cut, not squeezed; where all values are one, nothing is divided."""
    heat = np.array([[[0, 0], [0, 1]]], np.float32)
    picture = attention_map(heat, np.array([1500]), np.array([500]), 1000, DIMENSIONS, THUMBNAIL)
    whole = attention_map(heat, np.array([1000]), np.array([0]), 1000, DIMENSIONS, THUMBNAIL)
    assert (
        picture[50:, 150:].astype(int).sum() < whole[50:, 150:].astype(int).sum()
    )  # its hot corner is outside
    even = attention_overlay(THUMBNAIL[:50, :50], np.ones((2, 2)))
    assert even.shape == (50, 50, 3) and len(np.unique(even.reshape(-1, 3), axis=0)) == 1


def test_shares_of_variance_add_up() -> None:
    embeddings = np.random.default_rng(3).standard_normal((30, 4)) * (8, 4, 2, 1)
    shares = variance_shares(embeddings, principal_components(embeddings, 4))
    expected = np.linalg.svd(embeddings - embeddings.mean(axis=0), compute_uv=False) ** 2
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=1e-9)
    for few in (embeddings[:0], embeddings[:1], np.ones((5, 4))):
        assert variance_shares(few, principal_components(few, 3)) == [0.0, 0.0, 0.0]


def test_the_key_has_the_colours_of_the_map() -> None:
    """A tile with the largest scores of the first two components has the colour of the upper right corner."""
    x = np.arange(9) * 100
    first, second = (v.ravel().astype(float) for v in np.meshgrid([-3, 0, 3], [-1, 0, 1]))
    embeddings = np.stack([first, second], axis=1)
    picture = pca_map(embeddings, x, x * 0, 100, DIMENSIONS, THUMBNAIL, strength=1.0)
    scores, key = principal_components(embeddings, 2), pca_key(101)
    for number, (a, b) in enumerate(np.sign(scores.round(6)).astype(int)):
        expected = key[50 - 50 * b, 50 + 50 * a].astype(int)
        assert np.abs(picture[5, 10 * number + 5] - expected).max() <= 1
    assert (np.diff(key[:, -1, 0].astype(int)) <= 0).all() and key[0, -1, 0] > key[-1, -1, 0] + 40
    heat = attention_key().astype(int).sum(-1)
    assert (np.diff(heat[:, 0]) <= 3).all() and heat[0, 0] > heat[-1, 0] + 300
