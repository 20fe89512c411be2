"""Checkpoints as people have them: an encoder's weights inside of what training code saves around them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from torch import Tensor

from slide2vec.errors import WeightsError

__all__ = ["fitting", "unwrapped"]

logger = logging.getLogger(__name__)

#: Entries under which training code keeps the weights, of which the first that is there counts: where there
#: is a teacher, it is the one that is used.
WRAPPERS = ("teacher", "model_ema", "state_dict", "model_state_dict", "model", "module")
#: What keys begin with where the encoder is a part of another module. A student is never taken.
HOLDERS = frozenset({"module", "model", "backbone", "encoder", "teacher", "trunk", "net", "_orig_mod"})


def unwrapped(content: object, path: Path) -> object:
    """What is under the entries that wrap weights, however deep; what else there is, is left out."""
    names = []
    while isinstance(content, Mapping):
        name = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if name is None:
            break
        content = content[name]
        names.append(name)
    if names:
        logger.info("weights file %s: taken from its entry %s", path, " / ".join(names))
    return content


def fitting(
    state: dict[str, Tensor],
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    wanted: Collection[str],
    path: Path,
) -> dict[str, Tensor]:
    """The converted weights; where they are not all there, those of the part of a larger module, whose prefix
    is taken off its keys, that has them all.

    Args:
        convert: from the published keys to the encoder's.
        wanted: keys of the encoder.

    Raises:
        WeightsError: nothing fits, as `convert` says of the whole.
    """
    for prefix in ("", *_prefixes(state)):
        part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        try:
            converted = convert(part)
        except WeightsError:
            continue
        if set(wanted) <= converted.keys():
            _say_what_was_taken(prefix, state, path)
            return converted
    return convert(state)


def _prefixes(state: Mapping[str, Tensor]) -> list[str]:
    """What the keys begin with that holds an encoder, a teacher's first, then the shortest."""
    found: Counter[str] = Counter()
    for key in state:
        parts = key.split(".")[:-1]
        for count, part in enumerate(parts, 1):
            if part not in HOLDERS:
                break
            found[".".join(parts[:count]) + "."] += 1
    return sorted(found, key=lambda prefix: ("teacher." not in prefix, len(prefix), prefix))


def _say_what_was_taken(prefix: str, state: Mapping[str, Tensor], path: Path) -> None:
    if not prefix:
        return
    left = sorted({key.split(".")[0] for key in state if not key.startswith(prefix)})
    logger.info("weights file %s: the prefix %s is taken off its keys", path, prefix)
    if left:
        logger.warning(
            "weights file %s: left out is what does not begin with %s: %s", path, prefix, ", ".join(left)
        )
