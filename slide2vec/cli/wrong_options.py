"""Errors of configuration fields, told of the options that they come from."""

from __future__ import annotations

import re
from typing import Any

from slide2vec.errors import ConfigError

__all__ = ["name_options"]

#: "PreprocessingConfig.overlap: …", "PreprocessingConfig.segmentation: SegmentationConfig.downsample: …" of
#: Python, "command line: tiling.params.overlap: …" of configuration files.
_FIELD = re.compile(
    r"\b(?:command line: |(?:\w+Config\.\w+: )*(?=\w+Config\.|ExecutionOptions\.))"
    r"((?:\w+\.)+\w+)(?=:| is missing)"
)

#: Fields and keys whose option has another name.
_PARAMETERS = {
    "a_t": "min_piece",
    "csv": "manifest",
    "input_size_px": "input_size",
    "name": "preset",
    "num_dataloader_workers": "num_workers",
    "output_dir": "output",
    "output_format": "file_format",
    "ray_address": "address",
    "requested_spacing_um": "spacing",
    "requested_tile_size_px": "tile_size",
    "save_mask_preview": "previews",
    "save_tiling_preview": "previews",
}


def name_options(error: ConfigError, ctx: Any) -> None:
    """Have an error name the options of a command in place of the fields or keys that they set.

    Keys that were given as such, `tiling.params.overlap=2`, stay.

    Args:
        ctx: of the command, as it was called.
    """
    options: dict[str, list[str]] = {
        param.name: param.opts for param in ctx.command.params if param.param_type_name == "option"
    }

    def option(found: re.Match[str]) -> str:
        above, _, field = found[1].rpartition(".")
        if above.endswith(("seg_params", "SegmentationConfig")) and f"segmentation_{field}" in options:
            name = f"segmentation_{field}"
        elif above.endswith(("qc", "QualityConfig")):
            name = "qc"
        else:
            name = _PARAMETERS.get(field, field)
        missing = found.string.startswith(" is missing", found.end())
        if name not in options or not (missing or ctx.params.get(name) is not None):
            return found[0]
        return next(text for text in options[name] if text.startswith("--"))

    error.args = (_FIELD.sub(option, str(error)),)
