"""How close sound runs are to what `slide2vec audit` compares them with, by precision; see README.md."""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, SPACING_UM, Row, generated, machine

#: Preset, runtime, precision.
RUNS = (
    ("prost40m", "torch", "fp32"),
    ("prost40m", "torch", "bf16"),
    ("prost40m", "openvino", "fp32"),
    ("prost40m", "openvino", "bf16"),
    ("phikon", "torch", "bf16"),
    ("scattering", "torch", "fp32"),
)


def measured(slide: Path, preset: str, engine: Any, precision: Any, sample: float) -> Row:
    from slide2vec import ExecutionOptions, Model, Pipeline, PreprocessingConfig
    from slide2vec.audit import audit_run

    config = PreprocessingConfig(requested_spacing_um=SPACING_UM, requested_tile_size_px=224)
    model = Model.from_preset(
        preset, weights="random", device="cpu", precision=precision, allow_non_recommended_settings=True
    )
    with tempfile.TemporaryDirectory() as output:
        execution = ExecutionOptions(output_dir=output, engine=engine, precision=precision)
        Pipeline(model, config, execution).run([slide])
        (row,) = audit_run(Path(output), sample=sample, device="cpu")["encoders"][0]["slides"]
    return {"preset": preset, "runtime": engine, "precision": precision, **row}


def report(found: Row) -> str:
    lines = [
        f"# What `slide2vec audit` finds in sound runs, {found['date']}",
        "",
        f"{found['machine']['cpu']}; random weights, a generated slide. Allowed are the last two columns.",
        "",
        "| preset | runtime | precision | tiles | least cosine | median shift | verdict | cosine allowed "
        "| shift allowed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["runs"]:
        cosine, shift = row["cosine"], row["shift"]
        lines.append(
            f"| {row['preset']} | {row['runtime']} | {row['precision']} | {row['compared']} | "
            f"{cosine['min']:.9f} | {shift['median']:.6f} | {row['verdict']} | {cosine['required']:g} | "
            f"{shift['allowed']:g} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("/tmp/slide2vec-bench"))
    parser.add_argument("--size", type=int, default=4096, help="of the generated slide, px")
    parser.add_argument("--sample", type=float, default=1.0)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    slide = generated(args.work_dir, args.size)
    runs = []
    for run in RUNS:
        try:
            runs.append(measured(slide, *run, args.sample))
            print(runs[-1]["preset"], run[1:], runs[-1]["cosine"], runs[-1]["shift"], flush=True)
        except Exception as error:  # a runtime that is not there, an engine that nobody has built
            print(*run, "not run:", error, flush=True)
    found: Row = {"date": f"{datetime.date.today()}", "machine": machine(), "runs": runs}
    out = RESULTS / f"audit-{found['date']}"
    out.with_suffix(".json").write_text(json.dumps(found, indent=1))
    out.with_suffix(".md").write_text(report(found))
    print(report(found))


if __name__ == "__main__":
    main()
