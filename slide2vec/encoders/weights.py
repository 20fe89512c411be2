"""Weights: from the Hugging Face hub, a local file or directory, or seeded random."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slide2vec.encoders.checkpoint_keys import PUBLISHED
from slide2vec.encoders.checkpoints import convert
from slide2vec.encoders.pickled_modules import state_of_pickled_module
from slide2vec.encoders.published_files import check_download, check_own_file
from slide2vec.encoders.wrapped import fitting, unwrapped
from slide2vec.errors import GatedWeightsError, WeightsError
from slide2vec.files import hub_or_cache
from slide2vec.files.arrays import check_sums
from slide2vec.recipes import Recipe, WeightsSource

__all__ = [
    "WeightsChoice",
    "assign_strictly",
    "check_weights_file",
    "compute_tables",
    "find_beside",
    "find_weights",
    "load_weights",
    "no_access",
    "read_checkpoint",
    "seeded",
    "weights_digest",
    "weights_files",
]

logger = logging.getLogger(__name__)

WeightsChoice: TypeAlias = "str | os.PathLike[str] | None"

#: Names tried in a directory, after those of the recipe.
USUAL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.pt",
    "model.pt",
    "model.pth",
)
#: How a file ends that says which tensor is in which of several others beside it.
INDEX = ".index.json"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Initialise modules from `seed` in the block; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class _Undrawn(TorchFunctionMode):
    """In the block initial values are neither drawn nor scaled where tensors have no memory: that would load
    PyTorch's compiler (1.3 s)."""

    _LEFT_OUT = frozenset({"normal_", "uniform_", "kaiming_uniform_", "erfinv_", "clamp_", "mul", "neg"})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        values = dict(kwargs or {})
        tensors = [value for value in (*args, *values.values()) if isinstance(value, Tensor)]
        if getattr(func, "__name__", "") in self._LEFT_OUT and [each.is_meta for each in tensors] == [True]:
            return tensors[0]
        return func(*args, **values)


def load_weights(build: Callable[[], nn.Module], recipe: Recipe, weights: WeightsChoice) -> nn.Module:
    """Build an encoder without initialising it and give it the recipe's weights, strictly.

    Raises:
        WeightsError: no such file, an unreadable one, or keys that do not match.
        GatedWeightsError: the repository is gated and access is missing.
    """
    path = find_weights(recipe, weights)
    check_weights_file(path, recipe, weights)
    assert recipe.weights is not None
    name, spec = recipe.weights.convert, recipe.encoder
    with torch.device("meta"), _Undrawn():
        encoder = build()
    module: nn.Module = getattr(encoder, "trunk", encoder)
    state = fitting(
        _state(path, recipe), lambda part: convert(name, part, spec), module.state_dict().keys(), path
    )
    published = state.pop(PUBLISHED, None)
    compute_tables(encoder, build)
    _load_strictly(module, state, recipe, path)
    if published is not None:  # inputs of other sizes resample it, see `input_size`
        trunk: nn.Module = getattr(module, "vit", module)
        trunk.register_buffer(PUBLISHED, published.float(), persistent=False)
    return encoder


def check_weights_file(path: Path, recipe: Recipe, weights: WeightsChoice) -> None:
    """Refuse the file of `find_weights` that is another's; see `check_download` and `check_own_file`."""
    (check_download if weights is None else check_own_file)(path, recipe)


def compute_tables(encoder: nn.Module, build: Callable[[], nn.Module]) -> None:
    """Give an encoder on the meta device the buffers that follow from its sizes and are in no checkpoint,
    such as the angles of rotary positions."""
    saved = encoder.state_dict().keys()
    tables = [name for name, value in encoder.named_buffers() if value.is_meta and name not in saved]
    made = dict(build().named_buffers()) if tables else {}
    for name in tables:
        owner, _, own = name.rpartition(".")
        setattr(encoder.get_submodule(owner), own, made[name])


def find_weights(recipe: Recipe, weights: WeightsChoice) -> Path:
    """The weights file: downloaded (or found in the hub's cache) for None, else the local one.

    Weights in several files are stood for by their index; the others are beside it. Those of a user's recipe
    are looked for beside its file first, and only there where it names no repository.
    """
    if recipe.weights is None:
        raise WeightsError(f"preset {recipe.name} has no weights to load")
    if weights is None and recipe.file:
        folder = Path(recipe.file).parent
        found = next(filter(Path.is_file, (folder / name for name in recipe.weights.files)), None)
        if found is None and not recipe.weights.repo:
            wanted = ", ".join(recipe.weights.files)
            raise WeightsError(f"there is none of {wanted} beside {recipe.file}, which names no repository")
        weights = found
    if weights is None and recipe.weights.url:
        raise WeightsError(
            f"the weights of preset {recipe.name} are not on the Hugging Face hub: get "
            f'{recipe.weights.files[0]} from {recipe.weights.url} and pass weights="/path/to/it"'
        )
    if weights is None:
        return _from_hub(recipe.name, recipe.weights)
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise WeightsError(f'weights={str(weights)!r} is neither a file, a directory nor "random"')
    names = (*recipe.weights.files, *USUAL_FILES)
    for name in names:
        if (path / name).is_file():
            return path / name
    raise WeightsError(f"directory {path} has none of {', '.join(dict.fromkeys(names))}")


def find_beside(recipe: Recipe, names: Sequence[str], url: str, weights: WeightsChoice) -> Path | None:
    """A small file that belongs to a recipe's weights: beside them, else in their repository on the hub.

    Args:
        names: tried in order; none: there is nothing to find.
        url: where a user gets it that is not in the repository.

    Raises:
        WeightsError: it is not there; GatedWeightsError: access is missing.
    """
    if not names:
        return None
    if weights != "random":
        folder = find_weights(recipe, weights).parent
        for name in names:
            if (folder / name).is_file():
                return folder / name
    problem = f"preset {recipe.name} needs {' or '.join(names)}, its tokeniser, beside its weights"
    source = recipe.weights
    if weights not in (None, "random") or source is None or not source.repo:
        where = url or (source.page if source else "")
        raise WeightsError(f"{problem}: get it from {where} and put it into the folder of the weights file")
    try:
        return _from_hub(recipe.name, source.model_copy(update={"files": tuple(names)}))
    except GatedWeightsError:
        raise
    except WeightsError as error:
        hint = f". It is at {url}: give weights as a folder that has both" if url else ""
        raise WeightsError(f"{problem}: {error}{hint}") from error


def weights_files(path: Path) -> list[Path]:
    """The file of `find_weights`; of an index, those that it names as well.

    Raises:
        WeightsError: the index cannot be read.
    """
    if not path.name.endswith(INDEX):
        return [path]
    return [path, *(path.with_name(name) for name in sorted(set(_weight_map(path).values())))]


def _from_hub(preset: str, source: WeightsSource) -> Path:
    """One of the source's files at its revision, from the local cache, else downloaded.

    The token is the one that huggingface_hub finds (HF_TOKEN, or `hf auth login`), the cache its
    own (HF_HOME); HF_HUB_OFFLINE=1 is honoured.
    """
    path = _in_cache(source)
    if path is None:
        with hub_or_cache():
            path = _downloaded(preset, source)
    logger.info("weights of %s: %s", preset, path)
    return path


def _in_cache(source: WeightsSource) -> Path | None:
    from huggingface_hub import errors

    for name in source.files:
        with suppress(errors.LocalEntryNotFoundError):
            return _fetched(source, name, cached_only=True)
    return None


def _downloaded(preset: str, source: WeightsSource) -> Path:
    from huggingface_hub import errors

    problem: Exception | None = None
    for name in source.files:
        try:
            return _fetched(source, name, cached_only=False)
        except errors.LocalEntryNotFoundError as error:  # no network
            problem = error
            break
        except errors.EntryNotFoundError as error:
            problem = problem or error
        except (errors.GatedRepoError, errors.RepositoryNotFoundError) as error:
            raise no_access(preset, source, error) from error
        except (errors.HfHubHTTPError, errors.RevisionNotFoundError, OSError, ValueError) as error:
            problem = error
            break
    if isinstance(problem, errors.LocalEntryNotFoundError):
        reason = "it cannot be reached, and the local cache does not hold them"
    else:
        reason = _first_line(problem)
    raise WeightsError(
        f"the weights of preset {preset} could not be fetched from {source.page} "
        f"(revision {source.revision}): {reason}. Where there is a network, `slide2vec "
        f"fetch-weights {preset} --to DIR` fetches them to carry here (HF_HUB_CACHE=DIR); or pass "
        'weights="/path/to/the/file" (--weights FILE); weights="random" tries the pipeline without them'
    ) from problem


def _fetched(source: WeightsSource, name: str, cached_only: bool) -> Path:
    """A file of the source on this machine, and if it is an index, the files that it names."""
    import huggingface_hub

    def fetch(file: str) -> Path:
        return Path(
            huggingface_hub.hf_hub_download(
                source.repo, file, revision=source.revision, local_files_only=cached_only
            )
        )

    path = fetch(name)
    if name.endswith(INDEX):
        for shard in sorted(set(_weight_map(path).values())):
            fetch(Path(name).with_name(shard).as_posix())
    return path


def no_access(preset: str, source: WeightsSource, error: Exception) -> WeightsError:
    """What the hub's refusal of a repository means, and what to do about it."""
    page = source.page
    if not source.gated and not _is_gate(error):
        return WeightsError(
            f"the weights of preset {preset} are not at {page} (any more), or the token in "
            f"use is not valid: {_first_line(error)}"
        )
    return GatedWeightsError(
        f"the weights of preset {preset} are gated: request access at {page}, then log in with "
        f"`hf auth login` (or set HF_TOKEN) and try again ({_first_line(error)})"
    )


def _is_gate(error: Exception) -> bool:
    from huggingface_hub.errors import GatedRepoError

    return isinstance(error, GatedRepoError)


def _first_line(error: Exception | None) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


def _state(path: Path, recipe: Recipe) -> dict[str, Tensor]:
    """The weights of the recipe's encoder, from a file that holds them alone or beside others'."""
    source = recipe.weights
    assert source is not None
    if not source.part:
        return read_checkpoint(path)
    content = _unpickled(path)
    held = content if isinstance(content, Mapping) else {}
    if source.part not in held:
        raise WeightsError(
            f"weights file {path} is not for preset {recipe.name}: it has no {source.part}, only "
            f"{', '.join(map(str, list(held)[:5])) or type(content).__name__}"
        )
    _check_config(held, recipe, path)
    return _tensors(held[source.part], path)


def _check_config(held: Mapping[str, object], recipe: Recipe, path: Path) -> None:
    """The configuration beside the weights must be the recipe's. What it leaves out is off (0, false),
    as the model's own loader takes it."""
    source = recipe.weights
    assert source is not None
    config = next((held[name] for name in source.config if held.get(name)), None)
    if not isinstance(config, Mapping):
        raise WeightsError(f"weights file {path} has no configuration ({' or '.join(source.config)})")
    expected = {**recipe.encoder.kwargs, **source.expect}
    if wrong := [key for key, value in expected.items() if config.get(key, 0) != value]:
        values = ", ".join(f"{key} {config.get(key)} instead of {expected[key]}" for key in wrong)
        raise WeightsError(f"weights file {path} is of another model than preset {recipe.name}: {values}")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, of a PyTorch file read without unpickling code, or of all the
    files that an index names.

    Raises:
        WeightsError: a file is damaged, or holds more than tensors.
    """
    if path.name.endswith(INDEX):
        return _read_shards(path)
    return _tensors(unwrapped(_unpickled(path), path), path)


def _unpickled(path: Path) -> object:
    """What a file holds, read without running code of it."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(path):  # else it is of PyTorch before 1.6
            check_sums(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(error, UnpicklingError) and (module := _of_module(path)) is not None:
            return module
        raise WeightsError(f"weights file {path} cannot be read: {_first_line(error)}") from error


def _of_module(path: Path) -> dict[str, Tensor] | None:
    """The weights of a file that holds a whole module; None where it does not."""
    try:
        return state_of_pickled_module(path)
    except Exception:  # of damaged files any; what is wrong was found out before
        return None


def _tensors(content: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"weights file {path} is not a mapping of names to tensors")
    return dict(content)


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of the files that an index names: every one in its file, and no others."""
    where = _weight_map(index)
    state: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        shard = read_checkpoint(index.with_name(name))
        if strange := sorted(key for key in shard if where.get(key) != name):
            raise WeightsError(f"{index} does not say that {strange[0]} is in {name}")
        state.update(shard)
    if missing := sorted(where.keys() - state.keys()):
        raise WeightsError(f"{missing[0]} is not in {where[missing[0]]}, where {index} says it is")
    return state


def _weight_map(index: Path) -> dict[str, str]:
    """Which tensor is in which file, from an index; the files are beside it and hold tensors."""
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = error if isinstance(error, OSError | ValueError) else "it has no weight_map"
        raise WeightsError(f"weights file {index} cannot be read: {why}") from error
    if not isinstance(where, dict) or not where:
        raise WeightsError(f"weights file {index} names no files in its weight_map")
    for name in where.values():
        # Nothing but a name: an index from the hub must not point elsewhere on this machine.
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.(safetensors|bin|pt|pth)", name):
            raise WeightsError(f"weights file {index} names {name!r}, which is no weights file beside it")
    return where


def _load_strictly(module: nn.Module, state: dict[str, Tensor], recipe: Recipe, path: Path) -> None:
    """Load every key in fp32; anything missing, unexpected or of another shape is an error."""
    assert recipe.weights is not None
    ignored, own = recipe.weights.ignore, module.state_dict()
    kept = {
        key: value
        for key, value in state.items()
        if key in own or not any(fnmatchcase(key, pattern) for pattern in ignored)
    }
    assign_strictly(module, kept, f"weights file {path} is not for preset {recipe.name}")


def assign_strictly(module: nn.Module, kept: Mapping[str, Tensor], problem: str) -> None:
    """Give a module without memory these weights, in fp32.

    Raises:
        WeightsError: a key is missing, not the module's, or of another shape; begins with `problem`.
    """
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - kept.keys()), sorted(kept.keys() - own.keys())
    shapes = [
        f"{key} {tuple(kept[key].shape)} instead of {tuple(own[key].shape)}"
        for key in sorted(own.keys() & kept.keys())
        if kept[key].shape != own[key].shape
    ]
    problems = [
        f"{title}: {', '.join(keys[:5])}{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}"
        for title, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    ]
    if problems:
        raise WeightsError(f"{problem}; {'; '.join(problems)}")
    floats = {k: v.float() if v.is_floating_point() else v for k, v in kept.items()}
    module.load_state_dict(floats, strict=True, assign=True)
    left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if left:
        raise WeightsError(f"{problem}; not in it and not initialised: {left[0]}")


def weights_digest(module: nn.Module) -> str:
    """A digest of a module's parameters and buffers: names, shapes, types and values."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
