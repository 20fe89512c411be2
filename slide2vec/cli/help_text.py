"""What `--help` looks like: options and commands in groups, as wide as the terminal."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from slide2vec.cli.wrong_options import name_options
from slide2vec.errors import ConfigError

__all__ = ["EMBED", "LOOK", "MAX_WIDTH", "SET_UP", "GroupedCommand", "GroupedCommands"]

#: Columns of a line of help at most; longer ones are hard to follow.
MAX_WIDTH = 110

#: Groups of commands.
EMBED, LOOK, SET_UP = "Embed", "Look at slides and results", "Set up"

#: Options by what they are about. The same option is in the same group of every command.
_GROUPS: dict[str, tuple[str, ...]] = {
    "Slides": (
        *("manifest", "slides_dir", "id_from", "recursive", "spacing_at_level_0", "backend", "fingerprint"),
        *("shard", "stage_dir", "stage_gb", "read_coordinates_from", "read_tiles_from", "on_image_mismatch"),
    ),
    "Encoder": (
        *("preset", "weights", "seed", "output_variant", "input_size", "allow_non_recommended_settings"),
        *("trust_remote_code", "block", "registers", "heads"),
    ),
    "Tiles and tissue": (
        *("spacing", "tile_size", "region_tile_multiple", "overlap", "at", "tissue_threshold"),
        *("segmentation_method", "segmentation_downsample", "segmentation_weights", "sthresh"),
        *("min_piece", "masks", "qc"),
    ),
    "Machine": (
        *("device", "devices", "num_gpus", "precision", "engine", "build_engine", "batch_size"),
        *("num_workers", "num_preprocessing_workers", "encoders_gb", "scratch_dir", "scratch_gb"),
        *("executor", "address", "run_on_cpu"),
    ),
    "Output": (
        *("output", "file_format", "output_dtype", "save_tile_embeddings", "save_slide_embeddings"),
        *("save_latents", "save_tiles", "previews", "draw_map", "tiling_only", "resume", "on_bad_tile"),
        "on_bad_slide",
    ),
}
_OTHERS = "Others"

#: Commands with fewer options show them in one list.
_LEAST_OPTIONS = 15


def _heading(text: str) -> str:
    return text if "NO_COLOR" in os.environ else typer.style(text, bold=True)


def group_of(option: str) -> str:
    """The group of an option, by the name of its parameter."""
    return next((group for group, options in _GROUPS.items() if option in options), _OTHERS)


class GroupedCommand(TyperCommand):
    """A command whose options are listed by what they are about, if they are many; its errors name them."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            name_options(error, ctx)
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        lists: dict[str, list[tuple[str, str]]] = {name: [] for name in ("Arguments", *_GROUPS, _OTHERS)}
        shown = [(each, record) for each in self.get_params(ctx) if (record := each.get_help_record(ctx))]
        options = sum(each.param_type_name == "option" for each, _ in shown)
        for each, record in shown:
            if each.param_type_name == "argument":
                lists["Arguments"].append(record)
            else:
                group = group_of(str(each.name)) if options >= _LEAST_OPTIONS else _OTHERS
                lists[group].append(record)
        if options < _LEAST_OPTIONS:
            lists["Options"] = lists.pop(_OTHERS)
        _write(formatter, lists)


class GroupedCommands(TyperGroup):
    """Commands that are listed by what they are for, each with a whole sentence."""

    command_class = GroupedCommand

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        lists: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                group = getattr(command, "rich_help_panel", None)
                sentence = command.get_short_help_str(limit=1000)
                lists.setdefault(group if isinstance(group, str) else "Commands", []).append((name, sentence))
        _write(formatter, lists)


def _write(formatter: Any, lists: dict[str, list[tuple[str, str]]]) -> None:
    widest = max((_first_column(rows) for rows in lists.values()), default=0)
    for name, rows in lists.items():
        if rows:
            with formatter.section(_heading(name)):
                formatter.write_dl(_padded(rows, widest))


def _first_column(rows: Sequence[tuple[str, str]]) -> int:
    return max((len(first) for first, _ in rows), default=0)


def _padded(rows: Sequence[tuple[str, str]], width: int) -> list[tuple[str, str]]:
    """With first columns of one width, so that those of all groups begin at the same place."""
    return [(f"{first:<{min(width, 30)}}", second) for first, second in rows]
