"""`slide2vec audit`: read tiles of a finished run again by other code, and compare."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from slide2vec.cli.console import (
    Debug,
    Json,
    Offline,
    Sentences,
    facts,
    note,
    print_json,
    stdout,
    table,
)
from slide2vec.cli.embed import TrustRemoteCode
from slide2vec.errors import ConfigError

__all__ = ["audit"]

#: Of the certificate, in the run's directory.
CERTIFICATE = "audit.json"
#: Slides that are listed.
MOST_ROWS = 40


def audit(
    run: Annotated[
        Path,
        typer.Argument(help="Output directory of a run; with --verify a certificate.", show_default=False),
    ],
    sample: Annotated[str, typer.Option(help="Tiles of every slide to compare: 0.5%, 0.005.")] = "0.5%",
    seed: Annotated[int, typer.Option(help="Decides which.")] = 0,
    encoder: Annotated[
        str | None, typer.Option(help="Only of this one, where the run has several.", show_default=False)
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Of the tile encoder; by default those of the run.", show_default=False)
    ] = None,
    slides_dir: Annotated[
        Path | None, typer.Option(help="Where the slides are now, if they were moved.", show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option(help="For PyTorch: cuda, cuda:1, mps or cpu.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help=f"Of the certificate; by default RUN/{CERTIFICATE}.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Only check a certificate, and that its files are unchanged.")
    ] = False,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare a sample of a run's embeddings with tiles read and encoded by other code, in fp32.

    Pixels by OpenSlide or tifffile, torchvision's transform, PyTorch. Writes a certificate; the exit status
    is 1 where embeddings differ, or none of an encoder could be compared.
    """
    if verify:
        _verify(run, as_json=as_json)
        return
    note("reading and encoding the sample again …")
    from slide2vec.audit import audit_run, write_certificate

    found = audit_run(
        run,
        sample=_part(sample),
        seed=seed,
        encoder=encoder,
        weights=weights,
        slides_dir=slides_dir,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=lambda done, count: note(f"{done} of {count} slides") if done % 50 == 0 else None,
    )
    place = output or run / CERTIFICATE
    write_certificate(place, found)
    if as_json:
        print_json({**found, "certificate": place})
    else:
        _print(found, place)
    if found["verdict"] != "agrees":
        raise typer.Exit(1)


def _verify(given: Path, *, as_json: bool) -> None:
    from slide2vec.audit import verify_certificate

    certificate = given / CERTIFICATE if given.is_dir() else given
    problems = verify_certificate(certificate)
    if as_json:
        print_json({"certificate": certificate, "holds": not problems, "problems": problems})
    else:
        for problem in problems:
            typer.echo(problem)
        typer.echo(f"{certificate}: " + ("does not hold" if problems else "holds, its files are unchanged"))
    if problems:
        raise typer.Exit(1)


def _part(text: str) -> float:
    number, per_cent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        return float(number) / (100 if per_cent else 1)
    except ValueError:
        raise ConfigError(f"--sample {text}: give a part of the tiles, as 0.5% or 0.005") from None


def _print(found: dict[str, Any], place: Path) -> None:
    from rich.text import Text

    console = stdout()
    rows = [(each["encoder"], row) for each in found["encoders"] for row in each["slides"]]
    rows.sort(key=lambda item: ("differs", "not audited", "agrees").index(item[1]["verdict"]))
    several = len(found["encoders"]) > 1
    columns = ("slide", *(["encoder"] * several), "verdict", "compared", "least cosine", "shift", "read by")
    cells = [(row["sample_id"], *([name] * several), *_cells(row)) for name, row in rows[:MOST_ROWS]]
    console.print(table(columns, cells, numbers=("compared", "least cosine", "shift")))
    if len(rows) > MOST_ROWS:
        console.print(Text(f"… and {len(rows) - MOST_ROWS:,} more", "dim"))
    reasons = [(row["sample_id"], row["why"]) for _, row in rows if row["why"]]
    if reasons:
        console.print()
        console.print(Sentences(("slide", "why"), reasons[:MOST_ROWS]))
    console.print()
    console.print(facts(_summary(found, place)))


def _cells(row: dict[str, Any]) -> tuple[object, ...]:
    from rich.text import Text

    colour = {"agrees": "green", "differs": "bold red"}.get(row["verdict"], "yellow")
    cosine, shift = row.get("cosine"), row.get("shift")
    return (
        Text(row["verdict"], colour),
        f"{row['compared']:,}",
        f"{cosine['min']:.7f}" if cosine else "",
        f"{shift['median']:.4f}" if shift else "",
        row.get("reader", ""),
    )


def _summary(found: dict[str, Any], place: Path) -> Iterator[tuple[str, str]]:
    plural = {"agrees": "agree", "differs": "differ"}
    slides = ", ".join(
        f"{count:,} {verdict if count == 1 else plural.get(verdict, verdict)}"
        for verdict, count in found["slides"].items()
    )
    yield "verdict", str(found["verdict"])
    yield "slides", slides
    yield "tiles compared", f"{found['tiles_compared']:,}"
    yield "certificate", f"{place} (slide2vec audit --verify {place})"
