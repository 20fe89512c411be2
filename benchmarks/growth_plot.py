"""A plot of CPU time and memory over the number of tiles, both axes logarithmic, drawn with OpenCV."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from slide2vec.pictures import write_picture

WIDTH, HEIGHT, LEFT, TOP, SIZE = 1500, 700, 110, 90, (560, 500)
COLOURS = ((31, 119, 180), (214, 94, 0), (0, 140, 90), (160, 60, 160))
INK, GREY = (40, 40, 40), (215, 215, 215)


def growth_plot(presets: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Write the picture: a panel of CPU seconds, a panel of peak memory, a line per preset."""
    canvas = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    tiles = [row["tiles"] for rows in presets.values() for row in rows]
    for number, (title, key, scale) in enumerate(
        (("CPU seconds", "seconds", 1.0), ("peak memory, GB", "peak_mb", 1024.0))
    ):
        lines = {name: [(row["tiles"], row[key] / scale) for row in rows] for name, rows in presets.items()}
        values = [value for line in lines.values() for _, value in line]
        panel = _Panel(LEFT + number * 740, _decades(tiles), _decades(values))
        panel.axes(canvas, title)
        for colour, line in zip(COLOURS, lines.values(), strict=False):
            panel.line(canvas, line, colour)
    for number, (colour, name) in enumerate(zip(COLOURS, presets, strict=False)):
        x = LEFT + number * 260
        cv2.line(canvas, (x, 36), (x + 40, 36), colour, 3, cv2.LINE_AA)
        _text(canvas, name, (x + 50, 42))
    write_picture(path, canvas)


def _decades(values: list[float]) -> tuple[int, int]:
    """Powers of ten around the values, at least two."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) - 1e-9)
    return low, max(high, low + 1)


class _Panel:
    def __init__(self, left: int, x: tuple[int, int], y: tuple[int, int]) -> None:
        self.left, self.x, self.y = left, x, y

    def at(self, x: float, y: float) -> tuple[int, int]:
        across = (math.log10(x) - self.x[0]) / (self.x[1] - self.x[0])
        up = (math.log10(y) - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + round(across * SIZE[0]), TOP + SIZE[1] - round(up * SIZE[1])

    def axes(self, canvas: Any, title: str) -> None:
        for power in range(self.x[0], self.x[1] + 1):
            low, high = self.at(10**power, 10.0 ** self.y[0]), self.at(10**power, 10.0 ** self.y[1])
            cv2.line(canvas, low, high, GREY, 1)
            _text(canvas, f"{10**power:,}", (low[0] - 30, low[1] + 30))
        for power in range(self.y[0], self.y[1] + 1):
            left, right = self.at(10.0 ** self.x[0], 10.0**power), self.at(10.0 ** self.x[1], 10.0**power)
            cv2.line(canvas, left, right, GREY, 1)
            _text(canvas, f"{10.0**power:g}", (left[0] - 70, left[1] + 6))
        _text(canvas, title, (self.left, TOP - 15))
        _text(canvas, "tiles", (self.left + SIZE[0] // 2 - 20, TOP + SIZE[1] + 65))

    def line(self, canvas: Any, points: list[tuple[float, float]], colour: tuple[int, int, int]) -> None:
        places = [self.at(x, y) for x, y in points]
        for one, other in pairwise(places):
            cv2.line(canvas, one, other, colour, 3, cv2.LINE_AA)
        for place in places:
            cv2.circle(canvas, place, 6, colour, -1, cv2.LINE_AA)


def _text(canvas: Any, text: str, place: tuple[int, int]) -> None:
    cv2.putText(canvas, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.6, INK, 1, cv2.LINE_AA)
