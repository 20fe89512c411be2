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
#: Tiles, value, whether only a part was measured.
Point = tuple[float, float, bool]
INK, GREY = (40, 40, 40), (215, 215, 215)


def growth_plot(presets: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Write the picture: a panel of CPU seconds, a panel of peak memory, a line per preset. Seconds of
    which a part was measured are hollow points."""
    canvas = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    seconds, memory = {}, {}
    for name, rows in presets.items():
        seconds[name] = [(row["tiles"], row["seconds"], "measured_s" in row) for row in rows]
        memory[name] = [(row["tiles"], row["peak_mb"] / 1024, False) for row in rows]
    _panel(canvas, LEFT, "CPU seconds", seconds)
    _panel(canvas, LEFT + 740, "peak memory, GB", memory)
    for number, (colour, name) in enumerate(zip(COLOURS, presets, strict=False)):
        x = LEFT + number * 260
        cv2.line(canvas, (x, 36), (x + 40, 36), colour, 3, cv2.LINE_AA)
        _text(canvas, name, (x + 50, 42))
    write_picture(path, canvas)


def _panel(canvas: Any, left: int, title: str, lines: dict[str, list[Point]]) -> None:
    points = [point for line in lines.values() for point in line]
    panel = _Panel(left, _decades([x for x, _, _ in points]), _decades([y for _, y, _ in points]))
    panel.axes(canvas, title)
    for colour, line in zip(COLOURS, lines.values(), strict=False):
        panel.line(canvas, line, colour)


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

    def line(self, canvas: Any, points: list[Point], colour: tuple[int, int, int]) -> None:
        places = [self.at(x, y) for x, y, _ in points]
        for one, other in pairwise(places):
            cv2.line(canvas, one, other, colour, 3, cv2.LINE_AA)
        for place, (_, _, hollow) in zip(places, points, strict=True):
            cv2.circle(canvas, place, 7, colour, -1, cv2.LINE_AA)
            if hollow:
                cv2.circle(canvas, place, 4, (255, 255, 255), -1, cv2.LINE_AA)


def _text(canvas: Any, text: str, place: tuple[int, int]) -> None:
    cv2.putText(canvas, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.6, INK, 1, cv2.LINE_AA)
