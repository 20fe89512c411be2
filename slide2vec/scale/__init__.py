"""One cohort over several devices and machines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from slide2vec.choices import EXECUTORS
from slide2vec.errors import ConfigError
from slide2vec.runtime import devices_for

if TYPE_CHECKING:
    import torch

    from slide2vec.cohort.embedder import Encoder
    from slide2vec.config import ExecutionOptions
    from slide2vec.scale.executor import WorkerExecutor, WorkerPools

__all__ = ["WorkerExecutor", "WorkerPools", "in_one_pool", "workers_for"]


def workers_for(
    model: Encoder,
    loader: Callable[..., Any] | None,
    device: torch.device,
    execution: ExecutionOptions,
    kept: WorkerPools,
    *,
    chosen: bool,
) -> WorkerExecutor | None:
    """Who embeds the slides of a call; None: its own process, on the model's own device.

    Args:
        loader: builds the model anew, as `loader(device=…)`.
        device: of the model in this process.
        kept: pools of earlier calls.
        chosen: that device was asked for, rather than any of its kind.

    Raises:
        ConfigError: there are not so many devices; or workers are asked for, and cannot load the model, or
            the cluster is not there.
        ExtraMissingError: executor="ray", and Ray is not installed.
    """
    local = execution.executor == "local"
    if not local:  # whose devices are not of this machine
        devices = tuple(execution.devices or ())
    else:
        devices = devices_for(device, chosen=chosen, num_gpus=execution.num_gpus, devices=execution.devices)
    if local and len(devices) == 1:
        return None
    if loader is None:
        alone = "num_gpus=0" if local else 'executor="local"'
        raise ConfigError(
            "workers need a model of Model.from_preset, which each of them loads anew; for one that "
            f"was made otherwise say {alone}"
        )
    from slide2vec.scale.executor import WorkerExecutor
    from slide2vec.scale.messages import ALONE

    key: tuple[object, ...] = (*devices, execution.executor, execution.ray_address, execution.num_gpus)
    start = partial(EXECUTORS[execution.executor].imported(), devices=devices, execution=execution)
    return WorkerExecutor({ALONE: model}, loader, start, key, kept)


def in_one_pool(alone: Mapping[str, WorkerExecutor | None], kept: WorkerPools) -> WorkerExecutor | None:
    """Who embeds with several models side by side, in workers that each have all of them.

    Args:
        alone: who would with each model, by name.
        kept: pools of earlier calls.

    Returns:
        None: they are not all for the same workers.
    """
    found = {name: each for name, each in alone.items() if each is not None}
    if len(found) < len(alone) or len({each.key for each in found.values()}) > 1:
        return None
    from slide2vec.scale.executor import WorkerExecutor

    return WorkerExecutor.of_several(found, kept)
