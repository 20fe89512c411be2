"""The command line: `slide2vec run`, `plan`, `embed`, `attention`, `tile`, `images`, `merge`, `status`,
`view`, `search`, `report`, `export`, `info`, `models`, `build-engine`, `engines`, `bench`, `doctor`, `demo`.

Subcommands import what they need when they run, so that `--help` answers at once.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from slide2vec.cli.attention import attention
from slide2vec.cli.audit import audit
from slide2vec.cli.bench import bench
from slide2vec.cli.build_engine import build_engine
from slide2vec.cli.console import debugging, log_to_stderr, print_error
from slide2vec.cli.demo import demo
from slide2vec.cli.doctor import doctor
from slide2vec.cli.embed import embed
from slide2vec.cli.engines import engines
from slide2vec.cli.export import export
from slide2vec.cli.fetch_weights import fetch_weights
from slide2vec.cli.help_text import EMBED, LOOK, MAX_WIDTH, SET_UP, GroupedCommand, GroupedCommands
from slide2vec.cli.images import images
from slide2vec.cli.info import info
from slide2vec.cli.merge import merge
from slide2vec.cli.models import models
from slide2vec.cli.plan import plan
from slide2vec.cli.report import report
from slide2vec.cli.run import CONFIG_SUFFIXES, run
from slide2vec.cli.search import search
from slide2vec.cli.status import status
from slide2vec.cli.tile import tile
from slide2vec.cli.view import view
from slide2vec.errors import Slide2VecError, nearest_names
from slide2vec.version import PROJECT, __version__

__all__ = ["app", "main"]

INTERRUPTED = 130  # what shells give for Ctrl-C
RESUMABLE = ("run", "embed", "fetch-weights")
#: Of typer, which gives it no public name.
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]


class _Commands(GroupedCommands):
    """Answers errors made for users with one line, and Ctrl-C quietly; a configuration file alone is run."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        leads = args[0] if args else ""
        if leads.endswith(CONFIG_SUFFIXES) or (
            leads.startswith("--") and any(each.endswith(CONFIG_SUFFIXES) for each in args)
        ):
            args = ["run", *args]
        try:
            return list(super().parse_args(ctx, args))
        except USAGE_ERROR as error:
            _print_usage_error(error)
            raise typer.Exit(2) from None

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            kept = ": what is complete is kept, and the same command goes on"
            typer.echo(f"\ninterrupted{kept if ctx.invoked_subcommand in RESUMABLE else ''}", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except USAGE_ERROR as error:
            _print_usage_error(error)
            raise typer.Exit(2) from None
        except BrokenPipeError:
            raise
        except (Slide2VecError, OSError) as error:
            if debugging():
                raise
            print_error(error)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # the framed help takes twice as long to appear
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": MAX_WIDTH},
)
_GROUPS = {
    EMBED: (demo, plan, run, embed, images, attention, status, merge),
    LOOK: (info, tile, view, search, report, export, audit),
    SET_UP: (doctor, models, fetch_weights, build_engine, bench),
}
for _group, _commands in _GROUPS.items():
    for _command in _commands:
        app.command(cls=GroupedCommand, rich_help_panel=_group)(_command)
app.add_typer(engines, name="engines", rich_help_panel=SET_UP)


def _print_usage_error(error: Any) -> None:
    """As typer does, but broken between words as other errors are, and with the nearest option first."""
    if error.ctx is not None:
        hint = f"Try '{error.ctx.command_path} --help' for help."
        typer.echo(f"{error.ctx.get_usage()}\n{hint}\n", err=True)
    message = error.format_message()
    if (
        error.ctx is not None
        and (wrong := getattr(error, "option_name", None))
        and hasattr(error, "possibilities")
    ):
        options = [text for param in error.ctx.command.params for text in param.opts if text.startswith("--")]
        near = nearest_names(wrong, options)
        message = f"there is no option {wrong}.{f' {near}' if near.startswith('Did') else ''}"
    print_error(message.replace("Value error, ", ""))


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"slide2vec {__version__} ({PROJECT})")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Whole-slide pathology images to foundation-model embeddings.

    Begin with: slide2vec demo
    """
    log_to_stderr()


def main() -> None:
    """Entry point of the `slide2vec` command."""
    app(prog_name="slide2vec")
