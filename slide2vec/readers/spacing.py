"""The spacing of level 0: what a file claims, and what to make of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TypeAlias

from slide2vec.errors import SpacingError
from slide2vec.geometry import PLAUSIBLE_SPACING_UM, is_plausible_spacing
from slide2vec.readers.reader import SlideReader
from slide2vec.readers.refusal import Refusal
from slide2vec.slides import Slide

__all__ = [
    "OBJECTIVE",
    "SpacingCandidate",
    "choose_spacing",
    "objective_claim",
    "refuse_oblong_pixels",
    "resolve_spacing",
]

logger = logging.getLogger(__name__)

#: (where it was read, µm/px of level 0, the same along y where that is given).
SpacingCandidate: TypeAlias = tuple[str, float] | tuple[str, float, float]

OBJECTIVE = "objective power"
#: Relative difference of µm/px along x and y up to which pixels count as square.
MOST_OBLONG = 0.01


def objective_claim(power: float) -> SpacingCandidate:
    """What an objective magnification implies: 40x has 0.25 µm/px, 20x 0.5."""
    return OBJECTIVE, 10.0 / power if power > 0 else 0.0


def choose_spacing(claims: Iterable[SpacingCandidate]) -> tuple[float | None, str]:
    """The first plausible claim as (µm/px, its source), or (None, why there is none)."""
    refused = []
    for claim in claims:
        source, spacing = claim[:2]
        if is_plausible_spacing(spacing):
            return spacing, source
        refused.append(f"{source} {spacing:.6g}")
    if not refused:
        return None, "the file gives no spacing"
    low, high = PLAUSIBLE_SPACING_UM
    return (
        None,
        f"the file gives an implausible spacing ({', '.join(refused)}; {low} to {high} µm/px is plausible)",
    )


def refuse_oblong_pixels(claims: Iterable[SpacingCandidate]) -> None:
    """Refuse pixels that are not square: tiles would be distorted.

    Raises:
        Refusal: a claim whose µm/px are plausible differs along x and y by more than 1 %.
    """
    for claim in claims:
        if len(claim) < 3:
            continue
        source, x, y = claim
        coarse = max(x, y)
        if is_plausible_spacing(x) and abs(x - y) > MOST_OBLONG * min(x, y):
            raise Refusal(
                f"its pixels are not square: {x:.6g} µm wide and {y:.6g} µm high ({source}); resample it "
                f"(vips resize IN OUT.tif {x / coarse:.6g} --vscale {y / coarse:.6g}) and write it as a "
                "tiled pyramid; if the file is wrong, give spacing_at_level_0"
            )


def resolve_spacing(reader: SlideReader, slide: Slide) -> float:
    """µm/px of level 0: the slide's `spacing_at_level_0` when given, else the file's.

    Raises:
        SpacingError: neither gives one; the message says what the file has and what to do.
    """
    given = slide.spacing_at_level_0
    if given is not None:
        if reader.spacing_um is None or abs(given - reader.spacing_um) > 1e-6:
            said = (
                reader.spacing_source
                if reader.spacing_um is None
                else f"the file says {reader.spacing_um:.6g}"
            )
            logger.info("slide %s: %.6g µm/px as given (%s)", slide.sample_id, given, said)
        return given
    if reader.spacing_um is None:
        raise SpacingError(
            f"slide {slide.sample_id}: {reader.spacing_source}. Give spacing_at_level_0 (µm/px: about 0.25 "
            "for a 40x scan, 0.5 for 20x): as an argument, --spacing-at-level-0, or a manifest's column"
        )
    if reader.spacing_source == OBJECTIVE:
        logger.warning(
            "slide %s has no µm/px; %.4g is assumed from its objective power (spacing_at_level_0 overrides)",
            slide.sample_id,
            reader.spacing_um,
        )
    return reader.spacing_um
