"""Several devices of this machine at ready images and dense features: a model on each, and work for whichever
is free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

from slide2vec.artifacts.places import with_output_dir
from slide2vec.errors import ConfigError
from slide2vec.images.ahead import ahead, stopping
from slide2vec.images.reuse import differing_fields

if TYPE_CHECKING:
    import torch

    from slide2vec.config import ExecutionOptions

__all__ = ["LoadedAgain", "check_alike", "on_each_device", "output_here", "spread"]


class LoadedAgain(Protocol):
    """A model that can be loaded a second time, on another device."""

    device: torch.device
    #: Builds it anew, as `loader(device=…)`; None where it was not made by `Model.from_preset`.
    loader: Callable[..., Any] | None

    def devices_here(self, execution: ExecutionOptions) -> tuple[str, ...]: ...


_Model = TypeVar("_Model", bound=LoadedAgain)
_Worker = TypeVar("_Worker")
_In = TypeVar("_In")
_Out = TypeVar("_Out")

#: Models that were loaded anew on other devices, by their number among those of a call; for the next call.
_loaded: WeakKeyDictionary[LoadedAgain, dict[tuple[int, str], Any]] = WeakKeyDictionary()


def output_here(execution: ExecutionOptions | None, method: str) -> tuple[ExecutionOptions, Path]:
    """The options of a call that writes files, and where to.

    Raises:
        ConfigError: they name no directory, or other machines than this one, which are for slides.
    """
    execution, output_dir = with_output_dir(execution, method)
    asked = None
    if execution.executor != "local":
        asked = f'executor="{execution.executor}"'
    elif execution.shard is not None:
        asked = f"shard={execution.shard}"
    if asked is not None:
        raise ConfigError(
            f"{method} works on the devices of this machine, and {asked} is for slides: leave it out, and "
            "give each machine images and an output_dir of its own"
        )
    return execution, output_dir


def on_each_device(model: _Model, execution: ExecutionOptions, batches: int) -> list[_Model]:
    """The model, and the same on the other devices of a call, of which there are not more than batches.

    Raises:
        ConfigError: there are not so many devices, or the model cannot be loaded anew.
    """
    names = model.devices_here(execution)
    if len(names) <= 1 or batches <= 1:
        return [model]
    if model.loader is None:
        raise ConfigError(
            "several devices need a model of Model.from_preset, which is loaded anew on each; for one that "
            "was made otherwise say num_gpus=0, or one device"
        )
    others = list(names)
    own = str(model.device)
    found = [model] if own in others else []
    if found:
        others.remove(own)
    kept = _loaded.setdefault(model, {})
    for number, name in enumerate(others[: batches - len(found)]):
        if (number, name) not in kept:
            kept[number, name] = model.loader(device=name)
        found.append(kept[number, name])
    return found


def check_alike(device: object, own: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raise ConfigError where one of several devices would make other features than the first."""
    if found := differing_fields(own, identity):
        name, (other, value) = next(iter(found.items()))
        raise ConfigError(
            f"{name} would be {value!r} on {device}, and is {other!r} on the first device: features of one "
            'call are made in one way; say devices= of one kind, or engine="torch" and precision='
        )


def spread(
    workers: Sequence[_Worker], work: Callable[[_Worker, _In], _Out], items: Iterable[_In]
) -> Iterator[_Out]:
    """What is made of each item, in their order, by whichever worker is free; each has one item at a time."""
    if len(workers) == 1:
        yield from (work(workers[0], item) for item in items)
        return
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def by_one(item: _In) -> _Out:
        worker = idle.get()
        try:
            return work(worker, item)
        finally:
            idle.put(worker)

    with stopping(ThreadPoolExecutor(len(workers), "slide2vec-encode")) as pool:
        for _, future in ahead(pool, by_one, items, 2 * len(workers)):
            yield future.result()
