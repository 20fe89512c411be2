"""The key of an engine: a digest of everything that would make another engine."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from slide2vec.choices import RUNTIMES
from slide2vec.compile.export_module import GRAPH
from slide2vec.recipes import Recipe
from slide2vec.runtime.base import BatchProfile, Layout
from slide2vec.runtime.record import SCHEMA, EngineRecord
from slide2vec.runtime.tensorrt.available import target_of
from slide2vec.version import __version__

__all__ = [
    "EngineTarget",
    "cpu_instructions",
    "device_here",
    "differences",
    "identity",
    "library_versions",
    "target_here",
    "targets_of",
]


@dataclass(frozen=True)
class EngineTarget:
    """The encoder that an engine is of, and the device it is for.

    Attributes:
        variant: name of the output.
        weights: gives the digest of the weights; it reads them all, and is asked last.
    """

    recipe: Recipe
    variant: str
    device: torch.device
    weights: Callable[[], str]


def identity(
    target: EngineTarget,
    *,
    runtime: str,
    precision: str,
    layout: Layout,
    profile: BatchProfile,
    opset: int | None,
    targets: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Everything but the weights that would make another engine, JSON-ready.

    Args:
        targets: compute capabilities that it is for, in place of the subject's device (TensorRT-RTX).
    """
    recipe = target.recipe
    transform = recipe.transform
    found = {
        "schema": SCHEMA,
        "slide2vec": __version__,
        "preset": recipe.name,
        "encoder": recipe.encoder.model_dump(mode="json"),
        "output": recipe.variants[target.variant].model_dump(mode="json"),
        "input_size_px": transform.crop,
        "normalisation": [transform.mean, transform.std],
        "islands": recipe.engine.islands,
        "precision": precision,
        "layout": layout,
        "profile": asdict(profile),
        "opset": opset,
        "graph": GRAPH,
        "runtime": runtime,
        "runtime_version": _version(RUNTIMES[runtime].versions),
        "device": _targeted(targets) if targets else device_here(target.device, runtime),
    }
    if recipe.positions != "antialiased" and recipe.encoder.kwargs.get("img_size") != transform.crop:
        found["positions"] = recipe.positions  # how the graph's own were resampled; once always timm's way
    return dict(json.loads(json.dumps(found)))


def differences(target: EngineTarget, record: EngineRecord) -> Iterator[str]:
    """What makes a recorded engine another one than this machine would build: names of fields."""
    wanted = identity(
        target,
        runtime=record.runtime,
        precision=record.precision,
        layout=record.layout,
        profile=record.profile,
        opset=record.identity.get("opset"),
        targets=_targets(record, target.device),
    )
    names = [name for name in wanted if wanted[name] != record.identity.get(name)]
    if not names and target.weights() != record.identity.get("weights"):
        names = ["weights"]
    yield from names


def targets_of(record: EngineRecord) -> tuple[str, ...]:
    """Compute capabilities that an engine of TensorRT-RTX is for; none of other runtimes."""
    found = record.identity.get("device", {}).get("targets", ())
    return tuple(map(str, found)) if isinstance(found, list) else ()


def target_here(device: torch.device) -> str:
    """The compute capability of a CUDA device of this machine, as a target."""
    return target_of(*torch.cuda.get_device_capability(device))


def _targets(record: EngineRecord, device: torch.device) -> tuple[str, ...]:
    """Those of the record where the device is among them, else the device's own."""
    if record.runtime != "tensorrt-rtx":
        return ()
    own = target_here(device)
    recorded = targets_of(record)
    return recorded if own in recorded else (own,)


def _targeted(targets: tuple[str, ...]) -> dict[str, Any]:
    return {"type": "cuda", "targets": sorted(targets, key=lambda name: int(name[2:]))}


def library_versions(runtime: str) -> dict[str, str]:
    """Of what an engine is built with."""
    names = {"torch": ("torch",), "timm": ("timm",), "onnx": ("onnx",), runtime: RUNTIMES[runtime].versions}
    found = {name: _version(candidates) for name, candidates in names.items()}
    return {"slide2vec": __version__} | {name: each for name, each in found.items() if each}


def _version(distributions: tuple[str, ...]) -> str:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


def device_here(device: torch.device, runtime: str) -> dict[str, Any]:
    """The hardware as far as an engine depends on it, JSON-ready."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        return {"type": "cuda", "name": name, "compute_capability": f"{major}.{minor}"}
    if runtime == "openvino":  # its model is compiled when it is loaded; only what it computes in counts
        from slide2vec.runtime.openvino_engine import capabilities

        return {"type": "cpu", "machine": platform.machine(), "computes_in": capabilities()}
    return {"type": "cpu", "machine": platform.machine(), "instructions": cpu_instructions()}


def cpu_instructions() -> list[str]:
    """Of this CPU: code is compiled for just these."""
    if not hasattr(torch.cpu, "get_capabilities"):  # older PyTorch knows the vector width only
        return [torch.backends.cpu.get_cpu_capability()]
    return sorted(name for name, value in torch.cpu.get_capabilities().items() if value is True)
