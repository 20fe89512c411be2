"""Staging from slow storage: does copying overlap with embedding; see README.md.

`python -m benchmarks.staging` writes results/staging-<date>.md. The storage is slow on purpose: copies are
held to so many MB/s, together, that copying takes about as long as embedding does. The encoder is a stand-in
that takes its time without the CPU, as a GPU does, so that the figures do not hang on the machine's load.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, TILE_PX, NullEngine, configs, machine

SLIDES, SIZE_PX = 16, 2048
#: Of the stand-in encoder.
SECONDS_PER_TILE = 0.02


class Waiting(NullEngine):
    """An encoder that takes its time, and no CPU."""

    def run(self, pixels: Any) -> Any:
        time.sleep(SECONDS_PER_TILE * len(pixels))
        return super().run(pixels)


class Untransformed:
    def prepare(self, tiles: Any) -> Any:
        return tiles


class Throttle:
    """One road of so many bytes per second for all threads."""

    def __init__(self, bytes_per_s: float) -> None:
        self._rate, self._free_at, self._lock = bytes_per_s, 0.0, threading.Lock()

    def copy(self, source: Path, target: Path, chunk_bytes: int = 2**14) -> None:
        with source.open("rb") as reading, target.open("wb") as writing:
            while chunk := reading.read(chunk_bytes):
                with self._lock:
                    self._free_at = max(self._free_at, time.perf_counter()) + len(chunk) / self._rate
                    until = self._free_at
                time.sleep(max(0.0, until - time.perf_counter()))
                writing.write(chunk)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    from slide2vec import ExecutionOptions
    from slide2vec.progress import NullReporter
    from slide2vec.slides import as_slide
    from slide2vec.stream import Planner, Stream, stager_for
    from slide2vec.stream.staging import Stager
    from slide2vec.synthetic import write_synthetic_slide

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slides = [
            write_synthetic_slide(folder / f"{n}.svs", size_px=SIZE_PX, seed=n, levels=1)
            for n in range(SLIDES)
        ]
        total = sum(path.stat().st_size for path in slides)
        options = ExecutionOptions()
        staged = options.updated(stage_dir=folder / "stage", stage_gb=1)

        def embed(given: ExecutionOptions) -> float:
            started = time.perf_counter()
            with Planner(configs(), given) as planner:
                stream = Stream(
                    Waiting(),
                    Untransformed(),
                    batch_size=16,
                    tile_size_px=TILE_PX,
                    readers=2,
                    planners=1,
                    ahead=4,
                    reporter=NullReporter(),
                )
                asked = [as_slide(path) for path in slides]
                for outcome in stream.run(asked, planner):
                    if outcome.error is not None:
                        raise outcome.error
            return time.perf_counter() - started

        def copy() -> float:
            started = time.perf_counter()
            with stager_for(staged) as stager:
                for slide in list(stager.ahead(as_slide(path) for path in slides)):
                    copied = stager.take(slide)
                    if copied.image_path == slide.image_path:
                        raise SystemExit(f"{slide.image_path} was not staged: nothing is measured")
                    copied.close()
            return time.perf_counter() - started

        embed(options)
        rate = total / embed(options)
        throttle = Throttle(rate)
        Stager._copy_file = lambda _, source, target: throttle.copy(source, target)  # type: ignore[method-assign]
        rows = [(embed(options), copy(), embed(staged)) for _ in range(args.rounds)]
    date, found = datetime.date.today(), machine()
    lines = [
        f"# Staging, {date}",
        "",
        f"{found['cpu']}, {found['cpus']} CPUs. {SLIDES} generated slides of {SIZE_PX:,} px, "
        f"{total / 1e6:.1f} MB in all, "
        f"a stand-in encoder of {SECONDS_PER_TILE} s a tile; storage held to {rate / 1e6:.2f} MB/s; seconds.",
        "Reading in place through the same throttle was not measured: libraries read files by themselves.",
        "",
        "| embedding, slides local | copying alone | sum | larger of both | staged | hidden |",
        "|---|---|---|---|---|---|",
    ]
    for local, alone, run in rows:
        hidden = (local + alone - run) / min(local, alone)
        lines.append(
            f"| {local:.2f} | {alone:.2f} | {local + alone:.2f} | {max(local, alone):.2f} | {run:.2f} "
            f"| {hidden:.0%} |"
        )
    lines += [
        "",
        "Hidden: of the shorter of both, how much took no time of its own. The copy of the first slides "
        "(two are copied at once) and the embedding of the last ones never can.",
    ]
    (RESULTS / f"staging-{date}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
