"""A plot of efficiency over the number of workers, drawn with OpenCV: a panel per mix of slides."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks.growth_plot import COLOURS, GREY, INK
from slide2vec.pictures import write_picture

WIDTH, HEIGHT, LEFT, TOP, SIZE, NEXT = 1500, 720, 90, 130, (590, 480), 720
BEST, AIM = "at best", 0.97
LINES = (*COLOURS, (150, 110, 60))
#: Workers, median, lowest and highest efficiency.
Point = tuple[int, float, float, float]


def scaling_plot(mixes: dict[str, dict[str, list[Point]]], path: Path) -> None:
    """Write the picture: a line per policy, its range as a bar; `BEST` is grey."""
    canvas = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    names = [name for name in next(iter(mixes.values())) if name != BEST]
    colours = dict(zip(names, LINES, strict=True)) | {BEST: (150, 150, 150)}
    for number, (name, colour) in enumerate(colours.items()):
        x = LEFT + number * 235
        cv2.line(canvas, (x, 36), (x + 34, 36), colour, 3, cv2.LINE_AA)
        _text(canvas, name, (x + 42, 42))
    for number, (title, lines) in enumerate(mixes.items()):
        _panel(canvas, LEFT + number * NEXT, title, lines, colours)
    write_picture(path, canvas)


def _panel(
    canvas: Any,
    left: int,
    title: str,
    lines: dict[str, list[Point]],
    colours: dict[str, tuple[int, int, int]],
) -> None:
    most = math.log(max(point[0] for points in lines.values() for point in points))

    def at(workers: float, efficiency: float) -> tuple[int, int]:
        return left + round(math.log(workers) / most * SIZE[0]), TOP + round((1 - efficiency) * SIZE[1])

    _axes(canvas, at, next(iter(lines.values())))
    _text(canvas, title, (left, TOP - 18))
    for name, points in reversed(lines.items()):
        for one, other in pairwise(points):
            cv2.line(canvas, at(*one[:2]), at(*other[:2]), colours[name], 3, cv2.LINE_AA)
        for workers, _, low, high in points if name != BEST else []:
            cv2.line(canvas, at(workers, low), at(workers, high), colours[name], 2, cv2.LINE_AA)


def _axes(canvas: Any, at: Any, points: list[Point]) -> None:
    first, last = points[0][0], points[-1][0]
    for tenth in range(0, 11, 2):
        low, high = at(first, tenth / 10), at(last, tenth / 10)
        cv2.line(canvas, low, high, GREY, 1)
        _text(canvas, f"{tenth / 10:.1f}", (low[0] - 42, low[1] + 6))
    for workers, *_ in points:
        low, high = at(workers, 0), at(workers, 1)
        cv2.line(canvas, low, high, GREY, 1)
        _text(canvas, f"{workers:,}", (low[0] - 8 * len(str(workers)), low[1] + 26))
    for x in range(at(first, AIM)[0], at(last, AIM)[0], 12):
        cv2.line(canvas, (x, at(first, AIM)[1]), (x + 5, at(first, AIM)[1]), INK, 1)
    _text(canvas, "workers", ((at(first, 0)[0] + at(last, 0)[0]) // 2 - 35, at(first, 0)[1] + 58))


def _text(canvas: Any, text: str, place: tuple[int, int]) -> None:
    cv2.putText(canvas, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.55, INK, 1, cv2.LINE_AA)
