"""Export to ONNX."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

import torch

from slide2vec.compile.compiler_messages import first_line, silenced
from slide2vec.compile.export_module import ExportedEncoder, at_one_size
from slide2vec.errors import EngineError, ExtraMissingError
from slide2vec.installation import add_extra

__all__ = ["OPSETS", "batch_dimension", "example_pixels", "export_onnx", "unavailable"]

logger = logging.getLogger(__name__)

#: Tried in turn: 23 has the Attention operator; 20 is understood by older runtimes.
OPSETS = (23, 20)


def unavailable() -> str | None:
    """Why nothing can be exported here, None when it can."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    return f"{' and '.join(missing)} not installed: {add_extra('openvino')}" if missing else None


def export_onnx(module: ExportedEncoder, path: Path, *, input_size_px: int, opset: int | None = None) -> int:
    """Write an encoder as ONNX with a dynamic batch; its weights go beside it, into `<path>.data`.

    Args:
        module: on the CPU.
        input_size_px: side of its input.
        opset: of the file; None = the first of OPSETS that works.

    Returns:
        The opset of the file.

    Raises:
        ExtraMissingError: the packages are not installed.
        EngineError: the encoder cannot be exported, or what was written is not valid ONNX.
    """
    if reason := unavailable():
        raise ExtraMissingError(reason)
    reasons = []
    for tried in (opset,) if opset is not None else OPSETS:
        try:
            _export(module, path, input_size_px, tried)
            _tidy(path)
            _check(path)
            return tried
        except EngineError as error:
            reasons.append(f"opset {tried}: {error}")
            logger.info("ONNX export with %s", reasons[-1])
    raise EngineError(f"the encoder cannot be exported to ONNX ({'; '.join(reasons)})")


def example_pixels(module: ExportedEncoder, input_size_px: int, batch: int = 2) -> torch.Tensor:
    """Pixels of the module's layout, on the CPU: what it is traced with."""
    if module.layout == "uint8_nhwc":
        return torch.zeros(batch, input_size_px, input_size_px, 3, dtype=torch.uint8)
    return torch.zeros(batch, 3, input_size_px, input_size_px)


def batch_dimension(most: int = 1024) -> tuple[dict[int, torch.export.Dim]]:
    """The dynamic shape of the one input: any batch of 1 to `most` tiles."""
    return ({0: torch.export.Dim("batch", min=1, max=most)},)


def _export(module: ExportedEncoder, path: Path, size_px: int, opset: int) -> None:
    pixels = example_pixels(module, size_px)
    with silenced(), torch.no_grad(), at_one_size():
        try:
            torch.onnx.export(
                module.eval(),
                (pixels,),
                path,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=batch_dimension(),
                external_data=True,
                input_names=["pixels"],
                output_names=["features"],
                verbose=False,
            )
        except Exception as error:  # the exporter's own errors have no common base
            raise EngineError(first_line(error)) from error


def _tidy(path: Path) -> None:
    from slide2vec.compile.onnx_graph import tidy  # needs onnx

    tidy(path)


def _check(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(path))  # by path: the weights may exceed 2 GB
    except onnx.checker.ValidationError as error:
        raise EngineError(f"not valid ONNX: {first_line(error)}") from error
    found = onnx.load(str(path), load_external_data=False)
    versions = [each.version for each in found.opset_import if each.domain in ("", "ai.onnx")]
    logger.debug("%s has opset %s", path, versions)
