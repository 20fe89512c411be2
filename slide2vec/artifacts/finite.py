"""Embeddings that are no numbers: NaN, or beyond what their type can hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["remedy", "rows_not_finite"]

#: Looked at together, so that what is looked at needs little memory.
_ROWS = 4096


def rows_not_finite(values: torch.Tensor) -> torch.Tensor:
    """Indices into the first axis of what holds NaN or an infinity; of a vector, of its elements.

    Args:
        values: at least 1-D, floats, in host memory.

    Returns:
        (n,) int64, ascending.
    """
    import torch

    found = [torch.empty(0, dtype=torch.int64)]
    for start in range(0, len(values), _ROWS):
        finite = torch.isfinite(values[start : start + _ROWS])
        if not finite.all():
            found.append((~finite.reshape(len(finite), -1).all(1)).nonzero()[:, 0] + start)
    return torch.cat(found)


def remedy(precision: str, runtime: str = "torch") -> str:
    """What to do about an encoder that gives such embeddings in a precision."""
    if precision in ("fp16", "fp8"):
        return 'use precision="bf16" or "fp32" (--precision), whose numbers go further'
    if precision == "bf16":
        return 'use precision="fp32" (--precision fp32)'
    other = "" if runtime == "torch" else 'use engine="torch" (--engine torch), or '
    return f"{other}check its weights: numbers do not go further than fp32's"
