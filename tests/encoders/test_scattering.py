"""The scattering encoder against a NumPy implementation, its invariances, and what it tells apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from slide2vec.encoders.scattering import ScatteringEncoder, morlet_bank, stain_unmixing
from slide2vec.errors import ConfigError
from slide2vec.synthetic import TISSUES
from slide2vec.synthetic.painting import Painter

#: float32 convolutions and logs of small numbers against float64.
REFERENCE_TOLERANCE = 2e-3
#: Turning a tile permutes the terms of every sum exactly; only rounding differs.
TURN_TOLERANCE = 1e-4
#: Half precision resolves light grey levels to 1/8: nearly blank tiles (fat) feel it most.
HALF_SIMILARITY = 0.995
FLOOR = 4e-3

Maps = NDArray[np.float64]


@pytest.fixture(scope="module")
def encoder() -> ScatteringEncoder:
    return ScatteringEncoder().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tiles() -> torch.Tensor:
    """(6, 3, 224, 224) float32: tissue of a synthetic slide."""
    pixels, _ = labelled_tiles(seed=1, per_kind=1)
    return as_input(pixels)[:6]


def as_input(pixels: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def labelled_tiles(seed: int, per_kind: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Tiles (N, 224, 224, 3) at 0.5 µm/px that lie well inside one kind of tissue, and which."""
    side, px = 8192, 224
    painter = Painter((side, side), seed, 0.5)
    layout = painter._layout
    cells = px // layout.cell_px
    pixels, kinds = [], []
    counts = dict.fromkeys(range(len(TISSUES)), 0)
    for y in range(0, side - px, px // 2):
        for x in range(0, side - px, px // 2):
            row, column = y // layout.cell_px, x // layout.cell_px
            window = np.s_[row : row + cells, column : column + cells]
            shares = layout.weights[(slice(None), *window)].mean(axis=(1, 2))
            kind = int(shares.argmax())
            if shares[kind] < 0.97 or layout.tissue[window].min() < 0.03 or counts[kind] == per_kind:
                continue
            counts[kind] += 1
            pixels.append(painter.paint(x, y, px))
            kinds.append(kind)
    return np.stack(pixels), np.array(kinds)


# An implementation that shares nothing with the encoder but the filters: float64, direct sums.


def halved(image: Maps) -> Maps:
    weights = np.array([1, 3, 3, 1]) / 8
    padded = np.pad(image, 1, mode="reflect")
    rows = sum(w * padded[k : k + 2 * (image.shape[0] // 2) : 2] for k, w in enumerate(weights))
    return np.asarray(sum(w * rows[:, k : k + 2 * (image.shape[1] // 2) : 2] for k, w in enumerate(weights)))


def amplitude(image: Maps, wavelet: NDArray[np.complex128]) -> Maps:
    padded = np.pad(image, 3, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (8, 8))[::2, ::2]
    return np.abs(np.einsum("yxij,ij->yx", windows, wavelet))


def reference(rgb: NDArray[np.uint8], scales: int, orientations: int) -> Maps:
    density = -np.log((rgb.astype(np.float64) + 1) / 256)
    stains = np.clip(np.einsum("hwc,cs->hws", density, stain_unmixing()), 0, None)[..., :2]
    bank = morlet_bank(orientations)
    mean, deviation = stains.mean(axis=(0, 1)), stains.std(axis=(0, 1))
    centred = stains - mean
    correlation = (centred[..., 0] * centred[..., 1]).mean() / (deviation.prod() + FLOOR**2)
    features = [np.log(mean + FLOOR), np.log(deviation + FLOOR), [correlation]]
    pyramids = [[stains[..., s]] for s in range(2)]
    for pyramid in pyramids:
        for _ in range(scales - 1):
            pyramid.append(halved(pyramid[-1]))
    for octave in range(scales):
        first = [[amplitude(pyramid[octave], wavelet) for wavelet in bank] for pyramid in pyramids]
        features += [order_one(np.stack(maps)) for maps in first]
        upstream = first
        for coarser in range(octave + 1, scales):
            if coarser > octave + 1:
                upstream = [[halved(u) for u in maps] for maps in upstream]
            features += [order_two(maps, bank, np.stack(first[s]).mean()) for s, maps in enumerate(upstream)]
    return np.concatenate(features)


def order_one(maps: Maps) -> Maps:
    mean = maps.mean()
    deviation, spread = maps.mean(axis=0).std(), maps.mean(axis=(1, 2)).std()
    ratio = deviation / (mean + FLOOR)
    return np.array([np.log(mean + FLOOR), np.log(ratio + FLOOR), spread / (mean + FLOOR)])


def order_two(maps: list[Maps], bank: NDArray[np.complex128], first: float) -> Maps:
    count = len(bank)
    by_angle: dict[int, list[Maps]] = {angle: [] for angle in range(count // 2 + 1)}
    for a, image in enumerate(maps):
        for b, wavelet in enumerate(bank):
            by_angle[min((b - a) % count, (a - b) % count)].append(amplitude(image, wavelet))
    means = np.array([np.mean(v) for v in by_angle.values()])
    deviations = np.array([np.std(v) for v in by_angle.values()])
    ratios = np.log(means / (first + FLOOR) + FLOOR), np.log(deviations / (means + FLOOR) + FLOOR)
    return np.concatenate(ratios)


@pytest.mark.parametrize(("scales", "orientations"), [(5, 6), (3, 4), (4, 8)])
def test_matches_the_reference(tiles: torch.Tensor, scales: int, orientations: int) -> None:
    encoder = ScatteringEncoder(scales, orientations)
    found = encoder(tiles[:2]).numpy()
    assert found.shape == (2, encoder.feature_dim) and found.dtype == np.float32
    for tile, features in zip(tiles[:2], found, strict=True):
        rgb = (tile.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        np.testing.assert_allclose(features, reference(rgb, scales, orientations), atol=REFERENCE_TOLERANCE)


def test_wavelets_have_no_mean_and_answer_their_own_frequency() -> None:
    bank = morlet_bank(6)
    assert np.abs(bank.sum(axis=(1, 2))).max() < 1e-12
    y, x = np.mgrid[0:64, 0:64].astype(float)
    answers = []
    for angle in np.arange(6) * np.pi / 6:
        wave = np.cos(2.0 * (x * np.cos(angle) + y * np.sin(angle)))
        answers.append([amplitude(wave, wavelet).mean() for wavelet in bank])
    assert (np.argmax(answers, axis=1) == np.arange(6)).all()


def test_turned_and_mirrored_tiles_have_the_same_features(
    encoder: ScatteringEncoder, tiles: torch.Tensor
) -> None:
    expected = encoder(tiles)
    for turned in (torch.rot90(tiles, 1, (2, 3)), torch.rot90(tiles, 2, (2, 3)), tiles.flip(3)):
        assert (encoder(turned) - expected).abs().max() < TURN_TOLERANCE
    assert expected.std(dim=0).mean() > 0.05  # and yet they differ from tile to tile


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_blank_tiles_are_finite(encoder: ScatteringEncoder, level: float) -> None:
    assert encoder(torch.full((1, 3, 224, 224), level)).isfinite().all()


def test_a_tile_does_not_depend_on_its_batch(encoder: ScatteringEncoder, tiles: torch.Tensor) -> None:
    alone = torch.cat([encoder(tile[None]) for tile in tiles])
    torch.testing.assert_close(encoder(tiles), alone, atol=1e-5, rtol=1e-5)


def test_other_sizes_and_half_precision(encoder: ScatteringEncoder, tiles: torch.Tensor) -> None:
    assert encoder(tiles[:1, :, :96, :160]).shape == (1, encoder.feature_dim)
    half = ScatteringEncoder().half()(tiles.half())
    assert half.dtype == torch.float32
    similarity = torch.nn.functional.cosine_similarity(half, encoder(tiles))
    assert similarity.min() > HALF_SIMILARITY


def test_exports(encoder: ScatteringEncoder, tiles: torch.Tensor) -> None:
    exported = torch.export.export(encoder, (tiles,))
    torch.testing.assert_close(exported.module()(tiles), encoder(tiles), atol=1e-5, rtol=1e-5)
    assert not [name for name in encoder.state_dict()], "there are no weights to load"


@pytest.mark.parametrize("arguments", [{"scales": 1}, {"orientations": 5}])
def test_settings_are_checked(arguments: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        ScatteringEncoder(**arguments)


def test_tells_tissues_apart_on_another_slide_with_another_stain(encoder: ScatteringEncoder) -> None:
    """Nearest class mean, learnt on one slide, on a second one whose tiles are stained unevenly."""
    known, known_kinds = labelled_tiles(seed=1, per_kind=8)
    new, new_kinds = labelled_tiles(seed=2, per_kind=8)
    strength = np.random.default_rng(0).uniform(0.6, 1.5, (len(new), 1, 1, 1))
    density = -np.log((new.astype(np.float64) + 1) / 256)
    new = np.clip(256 * np.exp(-density * strength) - 1, 0, 255).round().astype(np.uint8)
    scattering = accuracy(embed(encoder, known), known_kinds, embed(encoder, new), new_kinds)
    colour = accuracy(known.mean(axis=(1, 2)), known_kinds, new.mean(axis=(1, 2)), new_kinds)
    assert len(set(new_kinds)) >= 6
    assert scattering > 0.85
    assert scattering > colour + 0.15


def embed(encoder: ScatteringEncoder, pixels: NDArray[np.uint8]) -> Maps:
    return torch.cat([encoder(as_input(part)) for part in np.array_split(pixels, 4)]).numpy().astype(float)


def accuracy(known: Maps, known_kinds: NDArray[np.int64], new: Maps, kinds: NDArray[np.int64]) -> float:
    scale = known.std(axis=0) + 1e-9
    classes = np.unique(known_kinds)
    centres = np.stack([known[known_kinds == kind].mean(axis=0) for kind in classes])
    distances = np.linalg.norm((new[:, None] - centres) / scale, axis=2)
    return float((classes[distances.argmin(axis=1)] == kinds).mean())
