"""The other files that runs read: coordinates, archives, manifests, configurations, process lists, features,
weights, engine records. Each is made sound, damaged, and read by what runs read it with."""

from __future__ import annotations

import hashlib
import shutil
import traceback
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from slide2vec.errors import Slide2VecError
from tools.fuzz.otherdamage import damage_file
from tools.fuzz.otherdetect import file_evidence
from tools.fuzz.othermade import NAME, SHAPES, Other
from tools.fuzz.slidecase import badly_said

__all__ = ["OTHERS", "damage_other", "run_other_case"]


def _coordinates(folder: Path) -> Any:
    from slide2vec.tiling import load_coordinates

    return load_coordinates(folder, NAME)


def _archive(folder: Path) -> Any:
    from slide2vec.tiling import load_coordinates
    from slide2vec.tiling.archives import TileArchive

    tiling = load_coordinates(folder, NAME)
    with TileArchive(folder / f"{NAME}.tiles.tar", tiling) as archive:
        side = tiling.geometry.requested_tile_size_px
        pixels = np.empty((len(tiling), side, side, 3), np.uint8)
        for number, tiles in enumerate(archive.blocks):
            archive.place(number, archive.fetch(number), [pixels[tile] for tile in tiles])
    return pixels


def _manifest(folder: Path) -> Any:
    from slide2vec.manifests import read_manifest

    return read_manifest(folder / "manifest.csv")


def _settings(folder: Path) -> Any:
    from slide2vec.settings import load_settings

    return load_settings(folder / "config.yaml")


def _process_list(folder: Path) -> Any:
    from slide2vec.cohort.process_list import read_process_list, state_of

    return [(state_of(row), row) for row in read_process_list(folder / "process_list.csv")]


def _features(folder: Path) -> Any:
    from slide2vec.artifacts import find_tile_artifact
    from slide2vec.artifacts.tile_features import as_embedded, load_stored
    from slide2vec.slides import Slide

    artifact = find_tile_artifact(folder, NAME)
    if artifact is None:
        return None
    found = as_embedded(Slide(sample_id=NAME, image_path=Path("/slides/sound.svs")), load_stored(artifact))
    return found.tile_embeddings, found.x, found.y, found.tile_size_lv0, found.num_tiles, artifact.feature_dim


def _weights(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        from slide2vec.encoders.weights import read_checkpoint
        from slide2vec.errors import WeightsError

        state = read_checkpoint(folder / name)
        shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
        if shapes != SHAPES:  # as the encoder's own loading, which follows, finds it
            raise WeightsError(f"{folder / name}: {shapes} instead of {SHAPES}")
        return state

    return read


def _engines(folder: Path) -> Any:
    from slide2vec.compile.store import EngineStore

    found = [(engine.record, engine.record.is_slower, engine.damage()) for engine in EngineStore(folder)]
    return found or None


OTHERS: tuple[Other, ...] = (
    Other("coordinates", "npz", (f"{NAME}.coordinates.npz",), _coordinates),
    Other("coordinates", "json", (f"{NAME}.coordinates.meta.json",), _coordinates),
    Other("tile archive", "tar", (f"{NAME}.tiles.tar",), _archive),
    Other("tile archive", "csv", (f"{NAME}.tiles.manifest.csv",), _archive),
    Other("manifest", "csv", ("manifest.csv",), _manifest),
    Other("configuration", "yaml", ("config.yaml",), _settings),
    Other("process list", "csv", ("process_list.csv",), _process_list),
    *(
        Other("features", each, (f"tile_embeddings/{NAME}.{each}",), _features)
        for each in ("pt", "npz", "safetensors", "h5")
    ),
    Other("features", "json", (f"tile_embeddings/{NAME}.meta.json",), _features, missed=True),
    Other("weights", "safetensors", ("model.safetensors",), _weights("model.safetensors")),
    Other("weights", "pt", ("model.pt",), _weights("model.pt")),
    Other(
        "weights",
        "index",
        ("model.safetensors.index.json", "part-1.safetensors"),
        _weights("model.safetensors.index.json"),
    ),
    Other("engine", "json", ("engine/engine.json",), _engines, missed=True),
)


def damage_other(other: Other, sound: Path, rng: Random) -> tuple[str, bytes, str]:
    """(Name of a file of a kind, its damaged content, what was done)."""
    victim = rng.choice(other.files)
    return victim, *damage_file(victim, (sound / other.name / victim).read_bytes(), rng)


def run_other_case(other: Other, sound: Path, folder: Path, victim: str, data: bytes) -> dict[str, Any]:
    """Read a kind's files in `folder`, before and after one of them is damaged; the outcome."""
    shutil.copytree(sound / other.name, folder, dirs_exist_ok=True)
    right = _plain(other.read(folder))
    if right is None:
        return {"outcome": "harness", "message": "the sound file counts as absent: nothing is tried"}
    before = (folder / victim).read_bytes()
    (folder / victim).write_bytes(data)
    return _outcome(other, folder, right, before, data)


def _outcome(other: Other, folder: Path, right: Any, before: bytes, data: bytes) -> dict[str, Any]:
    try:
        found = other.read(folder)
    except Slide2VecError as error:
        names = [NAME, folder.name, *(Path(name).name for name in other.files)]
        said = next(
            (None for name in names if badly_said(str(error), name) is None),
            badly_said(str(error), names[-1]),
        )
        return {"outcome": "refused badly" if said else "refused", "message": said or str(error)[:500]}
    except Exception:
        return {"outcome": "exception", "message": traceback.format_exc()[-1500:]}
    if found is None:
        # A features file is not damaged, as far as its size goes: then it counts as absent.
        return {"outcome": "missed", "message": "counts as absent"}
    plain = _plain(found)
    if plain == right:
        return {"outcome": "right", "message": ""}
    told = file_evidence(other.kind, other.format, before, data)
    outcome = "another value, detectable" if told else "another value"
    return {"outcome": outcome, "message": f"{told or 'nothing tells'}: {_difference(right, plain)}"[:500]}


def _plain(value: Any) -> Any:
    """Something that compares: arrays by digest."""
    import torch

    if isinstance(value, torch.Tensor):
        return (
            [*_plain(value.contiguous().view(torch.uint8).numpy()), str(value.dtype)]
            if value.ndim
            else repr(value)
        )
    if isinstance(value, np.ndarray):
        return [
            list(value.shape),
            str(value.dtype),
            hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest(),
        ]
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if hasattr(value, "model_dump"):
        return _plain(value.model_dump())
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, str | int | bool | None) else repr(value)


def _difference(right: Any, found: Any, where: str = "") -> str:
    if isinstance(right, dict) and isinstance(found, dict) and right.keys() == found.keys():
        return next(
            _difference(right[key], found[key], f"{where}.{key}") for key in right if right[key] != found[key]
        )
    if isinstance(right, list) and isinstance(found, list) and len(right) == len(found):
        pairs = enumerate(zip(right, found, strict=True))
        return next(_difference(one, two, f"{where}[{at}]") for at, (one, two) in pairs if one != two)
    return f"{where} {str(right)[:150]} became {str(found)[:150]}"
