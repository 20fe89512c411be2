"""Boxes of a level, averaged while their pixels come in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["AveragedBox", "AveragedBoxes"]

Pixels = NDArray[np.uint8]


class AveragedBox:
    """A box of cells of ratio x ratio px, each averaged as OpenCV's INTER_AREA does, bit by bit. A cell that
    reaches over the edge of a piece waits in full resolution until `finish`; what no piece covers of it is
    white. Filled by one thread.

    Args:
        canvas: (h, w, 3) uint8, one pixel for each cell.
        x, y: of its first cell's corner, level px; may lie beyond the level.
        ratio: 1 = pixels as they are.
    """

    def __init__(self, canvas: Pixels, x: int, y: int, ratio: int) -> None:
        self.canvas, self.x, self.y, self.ratio = canvas, x, y, ratio
        #: Rows (axis 0) and columns of cells that reach over edges, in full resolution.
        self._strips = dict[tuple[int, int], Pixels]()

    def blank(self) -> None:
        """Make it white."""
        self.canvas[:] = 255

    def put(self, pixels: Any, x: int, y: int, ratio: int = 1) -> None:
        """Take what the box holds of a piece.

        Args:
            pixels: (h, w, 3) uint8.
            x, y: of its corner, level px.
            ratio: by which it is reduced, to cells of the box: the box's, or 1.
        """
        own, canvas = self.ratio // ratio, self.canvas
        u, v = (x - self.x) // ratio, (y - self.y) // ratio
        left, right = u if u > 0 else 0, min(u + pixels.shape[1], canvas.shape[1] * own)
        top, bottom = v if v > 0 else 0, min(v + pixels.shape[0], canvas.shape[0] * own)
        if left >= right or top >= bottom:
            return
        if own == 1:
            canvas[top:bottom, left:right] = pixels[top - v : bottom - v, left - u : right - u]
            return
        part = pixels[top - v : bottom - v, left - u : right - u]
        first, last = -(-left // own), right // own
        upper, lower = -(-top // own), bottom // own
        if first < last and upper < lower:
            whole = part[upper * own - top : lower * own - top, first * own - left : last * own - left]
            target = canvas[upper:lower, first:last]
            cv2.resize(whole, target.shape[1::-1], dst=target, interpolation=cv2.INTER_AREA)
        if top % own:
            self._keep(part, 0, top, upper * own if lower >= upper else bottom, top, left, own)
        if bottom % own and lower >= upper:
            self._keep(part, 0, lower * own, bottom, top, left, own)
        if left % own:
            self._keep(part, 1, left, first * own if last >= first else right, top, left, own)
        if right % own and last >= first:
            self._keep(part, 1, last * own, right, top, left, own)

    def _keep(self, part: Pixels, axis: int, start: int, end: int, top: int, left: int, own: int) -> None:
        """Let rows (axis 0), or columns, of a part wait: start to end, px of the box, of one cell."""
        if (line := (axis, start // own)) not in self._strips:
            shape = [side * own for side in self.canvas.shape[:2]]
            shape[axis] = own
            self._strips[line] = np.full((*shape, 3), 255, np.uint8)
        strip, at = self._strips[line], start - start % own
        if axis:
            strip[top : top + part.shape[0], start - at : end - at] = part[:, start - left : end - left]
        else:
            strip[start - at : end - at, left : left + part.shape[1]] = part[start - top : end - top]

    def finish(self) -> None:
        """All pieces are there."""
        for (axis, cell), strip in self._strips.items():
            line = self.canvas[:, cell : cell + 1] if axis else self.canvas[cell : cell + 1]
            line[:] = cv2.resize(strip, line.shape[1::-1], interpolation=cv2.INTER_AREA).reshape(line.shape)
        self._strips.clear()


class AveragedBoxes:
    """Several over the same pixels, filled at once."""

    x, y, ratio = 0, 0, 1

    def __init__(self, boxes: Sequence[AveragedBox]) -> None:
        self._boxes = boxes

    def blank(self) -> None:
        """Make all white."""
        for box in self._boxes:
            box.blank()

    def put(self, pixels: Any, x: int, y: int, ratio: int = 1) -> None:
        """Take what they hold of a piece."""
        for box in self._boxes:
            box.put(pixels, x, y, ratio)

    def finish(self) -> None:
        """All pieces are there."""
        for box in self._boxes:
            box.finish()
