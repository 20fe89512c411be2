"""The report at the end of a run, for people."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from slide2vec.cli.console import Sentences, cause, facts, stdout, table

if TYPE_CHECKING:
    from rich.table import Table

    from slide2vec.artifacts import PatientEmbeddingArtifact
    from slide2vec.cli.embed_run import EmbeddedFiles, Report
    from slide2vec.cohort import RunResult
    from slide2vec.config import ExecutionOptions
    from slide2vec.model import Model
    from slide2vec.models import Models
    from slide2vec.progress import RunSummary

__all__ = ["counted", "print_outcome", "print_report", "print_report_of_several"]

#: Longer runs list their first slides only.
MOST_ROWS = 50
MOST_NAMES = 10
NO_TILES = "0 tiles: no tissue, or too little"

#: What is said of each encoder of several, in a form that shows whether it is the same of all: a slide that
#: cannot be read, or was finished by an earlier run, is told of once.
_SAID: Mapping[str, Callable[[RunResult], object]] = {
    "failed": lambda result: [(item.sample_id, item.stage, str(item.error)) for item in result.failed],
    "failed_patients": lambda result: [(item.patient_id, str(item.error)) for item in result.failed_patients],
    "resumed": lambda result: result.resumed,
    "recomputed": lambda result: dict(result.recomputed),
}


def print_report(report: Report, model: Model, execution: ExecutionOptions) -> None:
    """Print what was made and where, what failed, how fast it was and what held it back."""
    from rich.text import Text

    console = stdout()
    if report.patients:
        console.print(_patients_table(report.patients))
        console.print(facts(_patient_places(report.patients, model, execution)))
    elif report.made:
        console.print(_made_table(report.made))
        if len(report.made) > MOST_ROWS:
            console.print(Text(f"… and {len(report.made) - MOST_ROWS:,} more", "dim"))
        if not all(item.num_tiles for item in report.made):
            drawn = any(item.mask_preview_path for item in report.made)
            where = "preview/mask/ shows" if drawn else "--previews draws"
            console.print(Text(f"{NO_TILES}; {where} what was taken for tissue.", "dim"))
        console.print()
        console.print(facts(_places(report.made, model, execution)))
    print_outcome(report.result)
    _print_next(report, execution)


def print_report_of_several(report: Report, models: Models, execution: ExecutionOptions) -> None:
    """Print what each encoder made and where, what failed, and how fast it was."""
    from slide2vec.cohort import RunResult

    output_dir = execution.output_dir
    assert output_dir is not None
    rows, places = [], [("written to", f"{output_dir}/")]
    for name, each in report.encoders.items():
        model, result = models[name], each.result
        done = len(result.patient_artifacts) if model.level == "patient" else len(each.made)
        tiles = sum(item.num_tiles for item in each.made)
        counts = (f"{done:,}", f"{tiles:,}", str(model.feature_dim))
        rows.append((name, model.level, *counts, model.engine_in_words(execution)))
        places += [(name, f"{_below(folder, output_dir)}/") for folder in islice(_paths(each), 1)]
    heads = ("encoder", "of", "done", "tiles", "dimension", "run by")
    console = stdout()
    console.print(table(heads, rows, numbers=heads[2:-1]))
    console.print(facts(places))
    results = [each.result for each in report.encoders.values()]
    alike = {name for name, said in _SAID.items() if all(said(each) == said(results[0]) for each in results)}
    for name, each in report.encoders.items():
        own = [(what, getattr(each.result, what)) for what in _SAID if what not in alike]
        if any(value for _, value in own):
            console.print()
            console.print(facts([("encoder", name)]))
            print_outcome(RunResult(process_list_path=each.result.process_list_path, **dict(own)))
    nothing = RunResult(process_list_path=report.result.process_list_path)
    once = {what: getattr(results[0] if what in alike else nothing, what) for what in _SAID}
    print_outcome(replace(report.result, **once))
    _print_next(report, execution)


def _print_next(report: Report, execution: ExecutionOptions) -> None:
    """How to look at what was made."""
    from rich.text import Text

    from slide2vec.files import is_remote

    folder = execution.output_dir
    made = [report, *report.encoders.values()]
    if folder is not None and not is_remote(folder) and any(each.made for each in made):
        name = shlex.quote(str(folder))
        said = f"Look at it: slide2vec view {name}\nAs a page:  slide2vec report {name}"
        stdout().print(Text(said, "dim"), soft_wrap=True)


def _paths(report: Report) -> Iterator[Path]:
    """Folders of its embeddings."""
    yield from (patient.path.parent for patient in report.patients)
    yield from (item.embeddings_path.parent for item in report.made)


def print_outcome(result: RunResult) -> None:
    """Print what a run did not embed and why, and how fast it was."""
    from rich.text import Text

    console = stdout()
    for remark in _remarks(result):
        console.print(Text(remark, "dim"))
    if result.failed:
        console.print()
        console.print(Text(f"{counted(len(result.failed), 'slide')} failed", "bold red"))
        rows = [(f.sample_id, f.stage, cause(f.sample_id, f.error)) for f in result.failed[:MOST_ROWS]]
        console.print(Sentences(("slide", "stage", "error"), rows))
        if len(result.failed) > MOST_ROWS:
            console.print(
                Text(f"… and {len(result.failed) - MOST_ROWS:,} more in {result.process_list_path}", "dim")
            )
    if result.failed_patients:
        console.print()
        console.print(Text(f"{counted(len(result.failed_patients), 'patient')} failed", "bold red"))
        failed = [(f.patient_id, str(f.error)) for f in result.failed_patients[:MOST_ROWS]]
        console.print(Sentences(("patient", "error"), failed))
    if result.summary is not None:
        console.print()
        console.print(Text(str(result.summary).replace("; ", "\n"), "bold"))
        if result.summary.tiles:
            console.print(Text(_stations(result.summary), "dim"))


def _remarks(result: RunResult) -> Iterator[str]:
    if result.resumed:
        yield f"{counted(result.resumed, 'slide')} finished by an earlier run (--no-resume embeds anew)"
    for reason, count in result.recomputed.items():
        yield f"{counted(count, 'slide')} embedded anew: finished before with another {reason}"
    if result.without_tissue:
        blank = result.without_tissue
        yield f"{counted(len(blank), 'slide')} without tissue: {_names(blank)}"
    listed = [(name, remark) for name, remarks in result.remarks.items() for remark in remarks]
    for name, remark in listed[:MOST_ROWS]:
        yield f"slide {name}: {remark}"
    if len(listed) > MOST_ROWS:
        yield f"… and {len(listed) - MOST_ROWS:,} more such remarks in {result.process_list_path}"
    for name, count in list(result.skipped_tiles.items())[:MOST_ROWS]:
        yield f"slide {name}: {counted(count, 'tile')} left out that cannot be decoded (see its .meta.json)"


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def _made_table(made: Sequence[EmbeddedFiles]) -> Table:
    rows = [(item.sample_id, f"{item.num_tiles:,}", item.backend or "") for item in made[:MOST_ROWS]]
    return table(("slide", "tiles", "read with"), rows, numbers=("tiles",))


def _patients_table(patients: Sequence[PatientEmbeddingArtifact]) -> Table:
    rows = [(patient.patient_id, f"{patient.num_slides:,}") for patient in patients[:MOST_ROWS]]
    return table(("patient", "slides"), rows, numbers=("slides",))


def _encoder_and_folder(model: Model, execution: ExecutionOptions) -> Iterator[tuple[str, str]]:
    yield "encoder", f"{model.name} ({model.variant}), {model.engine_in_words(execution)}"
    yield "written to", f"{execution.output_dir}/"


def _patient_places(
    patients: Sequence[PatientEmbeddingArtifact], model: Model, execution: ExecutionOptions
) -> Iterator[tuple[str, str]]:
    output_dir = execution.output_dir
    assert output_dir is not None
    yield from _encoder_and_folder(model, execution)
    each = "" if len(patients) == 1 else "each "
    yield "patients", f"{_below(patients[0].path.parent, output_dir)}/, {each}({model.feature_dim},)"


def _places(
    made: Sequence[EmbeddedFiles], model: Model, execution: ExecutionOptions
) -> Iterator[tuple[str, str]]:
    """Where the files are, one line per kind: the file of a single slide, the folder of several."""
    output_dir = execution.output_dir
    assert output_dir is not None
    yield from _encoder_and_folder(model, execution)
    files: dict[str, list[Path | None]] = {
        "embeddings": [item.embeddings_path for item in made],
        "coordinates": [item.coordinates_npz_path or item.coordinates_meta_path for item in made],
        "tissue": [item.mask_preview_path for item in made],
        "tiles": [item.tiling_preview_path for item in made],
        "PCA map": [item.map_path for item in made],
    }
    each = "" if len(made) == 1 else "each "
    axes = "regions, tiles, " if made[0].num_regions is not None else "tiles, " * (model.level == "tile")
    shape = {"embeddings": f", {each}({axes}{model.feature_dim}{'' if axes else ','})"}
    for what, paths in files.items():
        found = [_below(path, output_dir) for path in paths if path is not None]
        if found:
            place = str(found[0]) if len(made) == 1 else f"{found[0].parent}/"
            yield what, place + shape.get(what, "")


def _below(path: Path, folder: Path) -> Path:
    return path.relative_to(folder) if path.is_relative_to(folder) else path


def _stations(summary: RunSummary) -> str:
    shares = (f"{station.name} {station.utilisation(summary.seconds):.0%}" for station in summary.stations)
    return f"busy: {', '.join(shares)}"


def counted(number: int, noun: str) -> str:
    """A number of things: "1 slide", "1,000 slides"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
