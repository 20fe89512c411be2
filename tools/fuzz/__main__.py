"""Damage slides and files by the thousand, read them as runs do, and report what has come of it.

python -m tools.fuzz --cases 8000          # goes on where it was stopped
python -m tools.fuzz --case 1234           # one again, in full
python -m tools.fuzz --again               # those that failed, after a mend
python -m tools.fuzz --report table.md
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.fuzz.cases import Cases, warm_up
from tools.fuzz.report import FORBIDDEN, replay, report

_TOLD_S = 30.0


def main() -> int:
    """Run cases; the exit status is 1 where something forbidden has happened."""
    options = _parser().parse_args()
    warm_up()
    options.folder.mkdir(parents=True, exist_ok=True)
    cases = Cases(options.folder / "sound", options.seed, sample=options.sample)
    states = cases.prepare()
    if options.case is not None:
        result = cases.run(options.case)
        print(json.dumps(result, indent=2))
        return int(result["outcome"] in FORBIDDEN)
    path = options.folder / f"seed-{options.seed}.jsonl"
    results = _read(path)
    if options.again:
        results = {number: each for number, each in results.items() if each["outcome"] not in FORBIDDEN}
        path.write_text("".join(json.dumps(each) + "\n" for each in results.values()))
    _run(cases, [number for number in range(options.cases) if number not in results], path, options.jobs)
    results = _read(path)
    chosen = [results[number] for number in sorted(results)]
    text = report(chosen, states)
    if options.report:
        options.report.write_text(text)
    print(text)
    return int(any(each["outcome"] in FORBIDDEN for each in chosen))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--cases", type=int, default=800, help="how many there are to be, with those that are done"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("fuzz"), help="for sound slides and results")
    parser.add_argument("--case", type=int, help="run this one and print it")
    parser.add_argument("--again", action="store_true", help="run those again that failed")
    parser.add_argument("--sample", action="store_true", help="only the slides of the short run in CI")
    parser.add_argument("--jobs", type=int, default=1, help="processes that run cases")
    parser.add_argument("--report", type=Path, help="write the table there, too")
    return parser


def _read(path: Path) -> dict[int, dict[str, Any]]:
    lines = path.read_text().splitlines() if path.is_file() else []
    return {each["case"]: each for each in map(json.loads, lines)}


def _run(cases: Cases, numbers: Sequence[int], path: Path, jobs: int) -> None:
    """Append the result of every case to a file, as it comes; a line is written at once."""
    workers = [pid for job in range(1, jobs) if (pid := _forked(cases, numbers[job::jobs], path))]
    _run_some(cases, numbers[::jobs], path)
    for pid in workers:
        os.waitpid(pid, 0)


def _forked(cases: Cases, numbers: Sequence[int], path: Path) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            _run_some(cases, numbers, path)
        finally:
            os._exit(0)
    return pid


def _run_some(cases: Cases, numbers: Sequence[int], path: Path) -> None:
    told = time.monotonic()
    with path.open("ab", buffering=0) as file:
        for done, number in enumerate(numbers):
            result = cases.run(number)
            file.write(json.dumps(result).encode() + b"\n")
            if result["outcome"] in FORBIDDEN:
                print(replay(result), file=sys.stderr, flush=True)
            if time.monotonic() - told > _TOLD_S:
                told = time.monotonic()
                print(f"{done + 1} of {len(numbers)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
