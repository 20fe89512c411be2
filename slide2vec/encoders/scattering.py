"""A tile encoder without weights: wavelet scattering of the haematoxylin and eosin stains.

Stains are separated by colour deconvolution (Ruifrok and Johnston, Quantification of histochemical
staining by color deconvolution, 2001). Their concentrations go through two orders of a scattering
transform (Mallat, Group invariant scattering, 2012; Bruna and Mallat, Invariant scattering
convolution networks, 2013): Morlet wavelets, modulus, Morlet wavelets of the moduli, modulus, and
averages over the tile. Averages over orientation make the features independent of how the tissue lies
on the glass.

The wavelets of one octave are convolved in space, and the same few filters serve every octave on a
pyramid of halved pictures: no Fourier transform, so that the module exports to any runtime.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from slide2vec.errors import ConfigError
from slide2vec.recipes import EncoderSpec, Variant

__all__ = ["ScatteringEncoder", "morlet_bank", "scattering_encoder", "stain_unmixing"]

#: Optical density of haematoxylin and eosin in red, green and blue light (Ruifrok and Johnston 2001).
STAIN_VECTORS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11))
#: Filters of 8 x 8 px at every second pixel: of even size, the places where they are evaluated lie
#: symmetrically in the tile.
_FILTER_PX, _STRIDE, _PADDING = 8, 2, 3
#: Width (px) and frequency (radians per px) of the finest wavelet. Its modulus varies slowly enough
#: (up to about sqrt(2) / width) to be sampled at every second pixel.
_SIGMA, _FREQUENCY = 1.0, 2.0
_HALVING = (0.125, 0.375, 0.375, 0.125)  # binomial low-pass before every second pixel is dropped
_STAINS = 2
_FIRST_STATISTICS = 3  # mean, deviation over the tile, deviation over orientations
#: Of concentrations and of ratios, about 1 grey level: what is fainter is sensor noise.
_FLOOR = 4e-3


class ScatteringEncoder(nn.Module):
    """RGB pixels in [0, 1], (B, 3, H, W) float -> (B, feature_dim) float32.

    The features of a tile turned by 90 degrees or mirrored are the same up to rounding, provided that
    H and W are multiples of 2^scales. Nothing is random or learnt.

    Args:
        scales: octaves; the wavelets of octave j have a period of about 3.1 * 2^j px.
        orientations: wavelets over half a turn, an even number.

    Attributes:
        feature_dim: length of the feature vector.
    """

    filters: Tensor
    halving: Tensor
    unmixing: Tensor
    by_angle: Tensor

    def __init__(self, scales: int = 5, orientations: int = 6) -> None:
        super().__init__()
        if not 2 <= scales <= 6 or orientations not in (4, 6, 8):
            raise ConfigError(
                f"scattering: scales = {scales}, orientations = {orientations}; scales must be 2 to 6 and "
                "orientations 4, 6 or 8"
            )
        self.scales, self.orientations = scales, orientations
        angles = _averages_by_angle(orientations)
        pairs = scales * (scales - 1) // 2
        per_stain = 2 + _FIRST_STATISTICS * scales + 2 * angles.shape[1] * pairs
        self.feature_dim = _STAINS * per_stain + 1
        bank = morlet_bank(orientations)
        filters = np.concatenate([bank.real, bank.imag])[:, None]
        self.register_buffer("filters", torch.tensor(filters, dtype=torch.float32), persistent=False)
        halving = np.outer(_HALVING, _HALVING)[None, None]
        self.register_buffer("halving", torch.tensor(halving, dtype=torch.float32), persistent=False)
        unmixing = stain_unmixing()[:, :_STAINS].T[:, :, None, None]  # a 1 x 1 convolution
        self.register_buffer("unmixing", torch.tensor(unmixing, dtype=torch.float32), persistent=False)
        self.register_buffer("by_angle", torch.tensor(angles, dtype=torch.float32), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) float RGB in [0, 1] -> (B, feature_dim) float32."""
        stains = self._stains(pixels)
        batch, _, height, width = stains.shape
        pyramid = [stains.reshape(batch * _STAINS, 1, height, width)]
        for _ in range(self.scales - 1):
            pyramid.append(self._halved(pyramid[-1]))
        features = [self._zeroth_order(stains)]
        for octave, picture in enumerate(pyramid):
            moduli = self._moduli(picture)
            energy, first = self._first_order(moduli)
            features.append(first.reshape(batch, -1))
            for coarser in range(octave + 1, self.scales):
                if coarser > octave + 1:
                    moduli = self._halved(moduli)
                features.append(self._second_order(moduli, energy).reshape(batch, -1))
        return torch.cat(features, dim=1)

    def _stains(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) RGB -> (B, 2, H, W) concentrations of haematoxylin and eosin, not negative."""
        light = (pixels.float().clamp(0.0, 1.0) * 255.0 + 1.0) / 256.0
        density = -torch.log(light)
        stains = F.conv2d(density, self.unmixing.float())
        return stains.clamp_min(0.0).to(self.filters.dtype)

    def _halved(self, maps: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H // 2, W // 2), low-passed."""
        channels = maps.shape[1]
        padded = F.pad(maps, (1, 1, 1, 1), mode="reflect")
        kernel = self.halving.expand(channels, 1, 4, 4)
        return F.conv2d(padded, kernel, stride=2, groups=channels)

    def _moduli(self, maps: Tensor) -> Tensor:
        """(N, 1, H, W) -> (N, L, H // 2, W // 2): amplitude at every orientation of the finest wavelet."""
        padded = F.pad(maps, (_PADDING,) * 4, mode="reflect")
        real, imaginary = F.conv2d(padded, self.filters, stride=_STRIDE).chunk(2, dim=1)
        return torch.sqrt(real * real + imaginary * imaginary + 1e-12)

    def _zeroth_order(self, stains: Tensor) -> Tensor:
        """(B, 2, H, W) -> (B, 5): log mean and log deviation of either stain, and their correlation."""
        values = stains.float().flatten(2)
        mean = values.mean(dim=2)
        centred = values - mean[..., None]
        deviation = centred.square().mean(dim=2).sqrt()
        common = (centred[:, 0] * centred[:, 1]).mean(dim=1, keepdim=True)
        correlation = common / (deviation[:, :1] * deviation[:, 1:] + _FLOOR**2)
        return torch.cat([_log(mean), _log(deviation), correlation], dim=1)

    def _first_order(self, moduli: Tensor) -> tuple[Tensor, Tensor]:
        """(N, L, H, W) -> mean amplitude of every orientation (N, L), and features (N, 3).

        The features: log mean, log ratio of deviation to mean (sparse or even?), and the relative
        deviation between orientations (do fibres run one way?).
        """
        values = moduli.float()
        energy = values.mean(dim=(2, 3))
        mean = energy.mean(dim=1)
        isotropic = values.mean(dim=1)
        deviation = (isotropic - mean[:, None, None]).square().mean(dim=(1, 2)).sqrt()
        spread = (energy - mean[:, None]).square().mean(dim=1).sqrt()
        sparse = _log(deviation / (mean + _FLOOR))
        return energy, torch.stack([_log(mean), sparse, spread / (mean + _FLOOR)], dim=1)

    def _second_order(self, moduli: Tensor, energy: Tensor) -> Tensor:
        """(N, L, H, W) moduli, brought to a coarser octave, and their mean (N, L) -> features (N, 2A).

        By angle between the two wavelets: the log of the mean relative to the first order's, and of
        the deviation relative to the mean.
        """
        count, orientations, height, width = moduli.shape
        second = self._moduli(moduli.reshape(count * orientations, 1, height, width)).float()
        second = second.reshape(count, orientations, orientations, height // _STRIDE, width // _STRIDE)
        mean = second.mean(dim=(3, 4)).flatten(1) @ self.by_angle.float()
        power = second.square().mean(dim=(3, 4)).flatten(1) @ self.by_angle.float()
        first = energy.mean(dim=1, keepdim=True)
        deviation = (power - mean.square()).clamp_min(0.0).sqrt()
        return torch.cat([_log(mean / (first + _FLOOR)), _log(deviation / (mean + _FLOOR))], dim=1)


def morlet_bank(orientations: int) -> NDArray[np.complex128]:
    """The finest Morlet wavelets, (L, 8, 8) complex: zero mean, unit amplitude at their own frequency."""
    y, x = np.mgrid[0:_FILTER_PX, 0:_FILTER_PX] - (_FILTER_PX - 1) / 2
    slant = 4.0 / orientations  # narrower in angle where there are more of them
    bank = []
    for angle in np.arange(orientations) * np.pi / orientations:
        along = x * np.cos(angle) + y * np.sin(angle)
        across = -x * np.sin(angle) + y * np.cos(angle)
        window = np.exp(-(along**2 + (slant * across) ** 2) / (2 * _SIGMA**2))
        wave = np.exp(1j * _FREQUENCY * along)
        wavelet = window * (wave - (window * wave).sum() / window.sum())
        bank.append(wavelet / np.abs((wavelet * wave.conj()).sum()))
    return np.stack(bank)


def stain_unmixing() -> NDArray[np.float64]:
    """(3, 3) from optical density (RGB) to concentrations (haematoxylin, eosin, residual)."""
    haematoxylin, eosin = (np.array(v) / np.linalg.norm(v) for v in STAIN_VECTORS)
    residual = np.cross(haematoxylin, eosin)
    return np.linalg.inv(np.stack([haematoxylin, eosin, residual / np.linalg.norm(residual)]))


def _averages_by_angle(orientations: int) -> NDArray[np.float64]:
    """(L * L, A): averages pairs of orientations over equal angles between them, 0 to a quarter turn.

    A mirror turns an angle round, so that both directions count as one.
    """
    first, second = np.divmod(np.arange(orientations**2), orientations)
    turn = (second - first) % orientations
    angle = np.minimum(turn, orientations - turn)
    member = (angle[:, None] == np.arange(orientations // 2 + 1)).astype(np.float64)
    return np.asarray(member / member.sum(axis=0))


def _log(values: Tensor) -> Tensor:
    return torch.log(values + _FLOOR)


def scattering_encoder(spec: EncoderSpec, variant: Variant) -> ScatteringEncoder:
    """The encoder of a recipe; it has one output."""
    return ScatteringEncoder(**spec.kwargs)
