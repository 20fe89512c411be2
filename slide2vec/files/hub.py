"""Whether the Hugging Face hub can be reached: its own clients take half a minute, and five tries, to see.
And whether it is to be asked at all."""

from __future__ import annotations

import logging
import os
import ssl
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["ANSWER_S", "go_offline", "hub_or_cache", "keep_hub_files_in"]

logger = logging.getLogger(__name__)

#: Seconds within which the hub has to answer.
ANSWER_S = 4.0


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Have huggingface_hub, and what is built on it, use its cache alone in the block if the hub cannot be
    reached: what is not there fails at once. As with HF_HUB_OFFLINE=1, which is honoured."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _answers(constants.ENDPOINT):
        yield
        return
    logger.info("%s cannot be reached: its local cache is used", constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def go_offline() -> None:
    """Never ask the hub, in this process and those that it starts."""
    _set("HF_HUB_OFFLINE", "1", HF_HUB_OFFLINE=True)


def keep_hub_files_in(folder: Path) -> None:
    """Have a folder as the hub's cache, in this process and those that it starts."""
    _set("HF_HUB_CACHE", str(folder), HF_HUB_CACHE=str(folder))


def _set(variable: str, value: str, **known: str | bool) -> None:
    """huggingface_hub looks at its variables when it is imported."""
    os.environ[variable] = value
    if (constants := sys.modules.get("huggingface_hub.constants")) is not None:
        vars(constants).update(known)


def _answers(endpoint: str) -> bool:
    """Whether a server answers, whatever it says, in time. Proxies of the environment are used."""
    answered = threading.Event()

    def ask() -> None:
        try:
            request = urllib.request.Request(endpoint, method="HEAD")
            with urllib.request.urlopen(request, timeout=ANSWER_S):
                answered.set()
        except urllib.error.HTTPError:
            answered.set()
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLError):  # the hub's own client may know other certificates
                answered.set()
        except (OSError, ValueError):
            pass

    # In a thread, as looking up a name has no time-out.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER_S)
    return answered.is_set()
