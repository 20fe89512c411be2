"""`slide2vec doctor`: what this machine has, what is missing and how to get it.

Optional packages are looked up in the metadata of installed ones, not imported: importing some takes
seconds or GPU memory, and a broken one must not break this.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from slide2vec.choices import BACKENDS, EXECUTORS, PREPARERS, RUNTIMES, OptionalPackage
from slide2vec.cli.console import Debug, Json, facts, note, print_json, stdout, table
from slide2vec.cli.doctor_plugins import plugins
from slide2vec.cli.doctor_runtimes import missing_command, runtimes
from slide2vec.cli.segmenters import cached_weights, networks
from slide2vec.installation import add_extra
from slide2vec.version import PROJECT, __version__

__all__ = ["doctor"]


_PACKAGES = (
    *(row.package for row in (*BACKENDS.ours.values(), *PREPARERS.values()) if row.package),
    OptionalPackage(
        "nvImageCodec", "decoding on the GPU", "cuda", ("nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12")
    ),
    OptionalPackage("nvidia-ml-py", "energy of GPUs", "cuda", ("nvidia-ml-py",)),
    *(row.package for row in RUNTIMES.values() if row.package),
    OptionalPackage("PyCUDA", "TensorRT without PyTorch", "deploy", ("pycuda",)),
    OptionalPackage("ONNX", "exporting encoders", "openvino", ("onnx",)),
    OptionalPackage("ONNX Script", "exporting encoders", "openvino", ("onnxscript",)),
    OptionalPackage("ONNX Runtime", "fp8, NVIDIA", "tensorrt", ("onnxruntime",)),
    OptionalPackage("ml_dtypes", "fp8, NVIDIA", "tensorrt", ("ml-dtypes",)),
    OptionalPackage("Transformers", "some presets", "models", ("transformers",)),
    *(row.package for row in EXECUTORS.values() if row.package),
)

#: Built from source when installed, with a CUDA toolkit: left out of the one command for all that is missing.
NEEDS_TOOLKIT = {"deploy"}
#: Of no use where jobs have no NVIDIA GPU, and gigabytes large.
FOR_NVIDIA = {"cuda", "deploy", "tensorrt", "tensorrt-rtx"}


def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Check the installation: what is there, what is missing."""
    if not as_json:
        note("looking at what is installed …")
    gpus = _gpus()
    found = {
        "versions": _versions(),
        "machine": _machine(),
        "gpus": gpus,
        "backends": _backends(),
        "parts": _parts(),
        "engines": _engines(),
        "runtimes": runtimes(_nvidia(gpus), _version),
        "huggingface": _huggingface(),
        "weights": _weights(),
        "segmenters": _segmenters(),
        "plugins": plugins(),
    }
    if as_json:
        print_json(found)
    else:
        _print(found)


# finding out ----------------------------------------------------------------------------------


def _version(distributions: Iterable[str]) -> str | None:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _versions() -> dict[str, str]:
    found = {
        "slide2vec": __version__,
        "note": PROJECT,
        "Python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(terse=True),
    }
    names = ("torch", "timm", "numpy", "openslide-python", "opencv-python-headless", "huggingface-hub")
    return found | {name: _version([name]) or f"missing: pip install {name}" for name in names}


def _machine() -> dict[str, Any]:
    from slide2vec.cpus import find_cpus

    flags, found = _cpu_flags(), find_cpus()
    return {
        "cpus_for_this_job": found.count,
        "cpus_decided_by": found.decided_by,
        "cpus": os.cpu_count(),
        "cpu": _cpu_name(),
        "memory_gb": _memory_gb(),
        "cpu_bf16": None if flags is None else bool({"avx512_bf16", "amx_bf16", "bf16"} & flags),
    }


def _cpuinfo(*keys: str) -> str | None:
    """The first value of one of the keys in /proc/cpuinfo; None elsewhere than on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in pairs if key.strip() in keys), None)


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> set[str] | None:
    flags = _cpuinfo("flags", "Features")
    return None if flags is None else set(flags.split())


def _memory_gb() -> float | None:
    """Memory of the machine, or of the container if that has less."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):
        limit = total
    return round(min(total, limit) / 1e9, 1)


def _gpus() -> dict[str, Any]:
    """What PyTorch sees; where it sees nothing, what the driver says."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"devices": [], "problem": f"torch cannot be imported: {error}", "driver": _nvidia_smi()}
    devices = [
        {
            "device": f"cuda:{index}",
            "name": properties.name,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
        }
        for index in range(torch.cuda.device_count())
        for properties in [torch.cuda.get_device_properties(index)]
    ]
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": "Apple GPU"})
    driver = _nvidia_smi()
    problem = None
    if not devices and driver:
        problem = f"there is a GPU, but torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it"
    return {"devices": devices, "problem": problem, "driver": driver, "torch_cuda": torch.version.cuda}


def _nvidia(gpus: dict[str, Any]) -> list[dict[str, Any]]:
    return [device for device in gpus["devices"] if "compute_capability" in device]


def _nvidia_smi() -> list[str]:
    """One line per GPU that the NVIDIA driver knows, with its version."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        ran = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return ran.stdout.strip().splitlines()


def _backends() -> dict[str, str | None]:
    """Reader -> None where it can be used, else why not."""
    from slide2vec.readers import backends

    return backends()


def _parts() -> list[dict[str, str | None]]:
    return [
        {
            "name": part.name,
            "purpose": part.purpose,
            "version": _version(part.distributions),
            "extra": part.extra,
            "install": part.install,
        }
        for part in _PACKAGES
    ]


def _engines() -> dict[str, Any]:
    """Compiled encoders, and where they are kept."""
    try:
        from slide2vec.compile import EngineStore
    except (ImportError, OSError) as error:
        return {"folder": None, "names": [], "problem": f"{error}"}
    store = EngineStore()
    return {"folder": str(store.root), "names": [engine.name for engine in store]}


def _huggingface() -> dict[str, Any]:
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError as error:
        return {"problem": f"huggingface-hub cannot be imported: {error}"}
    return {
        "token": huggingface_hub.get_token() is not None,
        "cache": str(constants.HF_HUB_CACHE),
        "offline": bool(constants.HF_HUB_OFFLINE),
    }


def _weights() -> dict[str, str | None]:
    """Preset -> its weights file in the Hugging Face cache, None where it is not there."""
    from slide2vec.recipes import list_models, load_recipe

    recipes = [load_recipe(name) for name in list_models()]
    return {
        recipe.name: cached_weights(recipe)
        for recipe in recipes
        if recipe.weights is not None and recipe.weights.repo
    }


def _segmenters() -> dict[str, str | None]:
    """Segmentation method -> its weights file there, None where it is not."""
    return {row["name"]: row["path"] for row in networks()}


# for people -----------------------------------------------------------------------------------


def _print(found: dict[str, Any]) -> None:
    console = stdout()

    def section(title: str) -> None:
        console.print(f"\n{title}", style="bold")

    console.print("Software", style="bold")
    console.print(facts(found["versions"].items()))
    section("Machine")
    console.print(facts(_machine_facts(found["machine"], found["gpus"])))
    section("Slide readers, in the order of --backend auto")
    console.print(facts((name, _mark(reason)) for name, reason in found["backends"].items()))
    section("Optional parts")
    idle = set() if _nvidia(found["gpus"]) or found["gpus"]["driver"] else FOR_NVIDIA
    rows = [(part["name"], part["purpose"], _state(part, idle)) for part in found["parts"]]
    console.print(table(("part", "for", "version"), rows))
    missing = {part["extra"] for part in found["parts"] if not part["version"]}
    console.print()
    for to, extras in (
        ("add them", missing - idle),
        ("run on NVIDIA GPUs, of which none is here", missing & idle),
    ):
        if extras - NEEDS_TOOLKIT:
            command = add_extra(*(extras - NEEDS_TOOLKIT))
            console.print(f"To {to}: {command}", markup=False, soft_wrap=True)
    if found["plugins"]:
        section("Plug-ins of installed packages")
        console.print(facts(map(_plugin_fact, found["plugins"])))
    section("Compiled encoders")
    console.print(facts(_engine_facts(found["engines"])))
    console.print(table(("engines of", "built here", "run here", ""), _runtime_rows(found["runtimes"])))
    command = missing_command(_nvidia(found["gpus"]), found["runtimes"])
    console.print(f"\nNext: {command}", markup=False, soft_wrap=True)
    section("Hugging Face")
    console.print(facts(_huggingface_facts(found["huggingface"], found["weights"])))
    section("Weights of segmentation methods (slide2vec models --segmenters)")
    console.print(facts(_there(found["segmenters"])))


def _runtime_rows(runtimes: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    return [(row["runtime"], _yes(row["builds"]), _yes(row["runs"]), row["note"]) for row in runtimes]


def _yes(value: bool) -> object:
    from rich.text import Text

    return Text("yes", "green") if value else Text("no", "yellow")


def _mark(reason: str | None) -> object:
    from rich.text import Text

    return Text("ready", "green") if reason is None else Text(reason, "yellow")


def _state(part: dict[str, str | None], idle: set[str]) -> object:
    from rich.text import Text

    if part["version"]:
        return Text(part["version"], "green")
    return Text(f"missing, extra [{part['extra']}]", "dim" if part["extra"] in idle else "yellow")


def _plugin_fact(plugin: dict[str, str | None]) -> tuple[str, object]:
    from rich.text import Text

    name, of = f"{plugin['kind']} {plugin['name']}", plugin["package"] or plugin["provider"]
    if plugin["problem"] is None:
        return name, Text(f"ready, of {of}", "green")
    return name, Text(f"left out: {plugin['problem']} ({of}, {plugin['provider']})", "yellow")


def _machine_facts(machine: dict[str, Any], gpus: dict[str, Any]) -> Iterable[tuple[str, str]]:
    yield "CPU", machine["cpu"]
    count = f"{machine['cpus_for_this_job']} of {machine['cpus']}"
    yield "CPUs for this job", f"{count} ({machine['cpus_decided_by']})"
    bf16 = {True: "native", False: "emulated: use fp32", None: "unknown"}[machine["cpu_bf16"]]
    yield "bf16 on CPU", bf16
    memory = machine["memory_gb"]
    yield "memory", "unknown" if memory is None else f"{memory:g} GB"
    for device in gpus["devices"]:
        size = f", {device['memory_gb']:g} GB" if "memory_gb" in device else ""
        yield device["device"], f"{device['name']}{size}"
    if gpus["problem"]:
        yield "GPU", gpus["problem"]
    elif not gpus["devices"]:
        yield "GPU", "none"
    for line in gpus["driver"]:
        yield "NVIDIA driver", line


def _engine_facts(engines: dict[str, Any]) -> Iterable[tuple[str, str]]:
    if "problem" in engines:
        yield "problem", engines["problem"]
        return
    yield "folder", engines["folder"]
    yield "engines", ", ".join(engines["names"]) or "none: `slide2vec build-engine --preset NAME` builds one"


def _huggingface_facts(hub: dict[str, Any], weights: dict[str, str | None]) -> Iterable[tuple[str, str]]:
    if "problem" in hub:
        yield "problem", hub["problem"]
        return
    yield "token", "found" if hub["token"] else "none: `hf auth login`, or set HF_TOKEN, for gated weights"
    yield "cache", hub["cache"] + (" (offline: HF_HUB_OFFLINE is set)" if hub["offline"] else "")
    yield from _there(weights)


def _there(weights: dict[str, str | None]) -> Iterable[tuple[str, str]]:
    there = [name for name, path in weights.items() if path]
    absent = [name for name, path in weights.items() if not path]
    yield "weights there", ", ".join(there) or "none"
    yield "not there yet", ", ".join(absent) or "none"
