"""What was given for each key, by whom, and what it comes to: older spellings, defaults, `${a.b.c}`."""

from __future__ import annotations

import difflib
import logging
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from slide2vec.errors import ConfigError, did_you_mean
from slide2vec.settings.keys import FIXED, FREE, KEYS, LABELS, OLDER, SECTIONS, WITHOUT_EFFECT
from slide2vec.settings.text import MAX_DEPTH, MAX_TEXT

__all__ = ["Source", "Values", "escaped", "nested"]

logger = logging.getLogger(__name__)

_ALL = (*KEYS, *OLDER, *WITHOUT_EFFECT, *FIXED)
_DEEPEST = 32
#: A literal `${`, or a reference.
_REFERENCE = re.compile(r"\\\$\{|\$\{([^{}]*)\}?")
_NAME = re.compile(r"[\w-]+(?:\.[\w-]+)*")

#: Spellings that the original takes for the same.
_PRECISIONS = {
    **dict.fromkeys(("fp32", "float32", "32"), "fp32"),
    **dict.fromkeys(("fp16", "float16", "16", "half"), "fp16"),
    **dict.fromkeys(("bf16", "bfloat16"), "bf16"),
}


@dataclass(frozen=True)
class _Given:
    value: Any
    source: str


class Source:
    """The keys that one file, or one override, gives: dotted, older spellings replaced.

    Raises:
        ConfigError: a key is unknown, is no section, or is given twice in different spellings.
    """

    def __init__(self, name: str, content: Any) -> None:
        self.name = name
        self._given: dict[str, Any] = {}
        for key, value in self._leaves(content):
            for target in OLDER.get(key, (key,)):
                self._take(key, target, value)
            if _free(key) in LABELS.values():
                self._given[key] = value

    def __iter__(self) -> Iterator[tuple[str, _Given]]:
        return ((key, _Given(value, self.name)) for key, value in self._given.items())

    def _leaves(self, content: Any, above: str = "") -> Iterator[tuple[str, Any]]:
        """Dotted keys and their values."""
        if content is None:
            return
        if above in LABELS.values() and isinstance(content, list):
            for item in content:  # a list of mappings, of one label each perhaps
                yield from self._leaves(item, above)
            return
        if not isinstance(content, Mapping):
            what = f"{above} is a section of keys" if above else "the file must be a mapping of keys"
            raise self._error(f"{what}, got {reprlib.repr(content)}")
        for name, value in content.items():
            key = f"{above}.{name}" if above else name
            if key.count(".") > MAX_DEPTH:
                raise self._error(f"there is no key {key[:100]}…")
            if key in SECTIONS or (isinstance(value, Mapping) and _free(key) is not None):
                yield from self._leaves(value, key)
            elif key in _ALL or _free(key) is not None:
                yield key, value
            else:
                raise self._error(_unknown(key))

    def _take(self, key: str, target: str, value: Any) -> None:
        before = self._given.get(target)
        if _blank(value) and target in self._given:
            return
        if not _blank(before) and before != value:
            both = f"{key}={reprlib.repr(value)} and {target}={reprlib.repr(before)}"
            raise self._error(f"{both} say the same thing differently; keep one of them")
        self._given[target] = value

    def _error(self, problem: str) -> ConfigError:
        return ConfigError(f"{self.name}: {problem}")


def _free(key: str) -> str | None:
    """The section below which the user names the keys, if the key is in one."""
    return next((section for section in FREE if key.startswith(f"{section}.")), None)


def _unknown(key: str) -> str:
    """What to say of a key that does not exist."""
    shown = key if len(key) <= 100 else f"{key[:100]}…"
    above, wrong = _first_wrong(key)
    beside = {name.removeprefix(above).split(".")[0] for name in _ALL if name.startswith(above)}
    close = [f"{above}{name}" for name in difflib.get_close_matches(wrong, beside, n=1)]
    if close or (close := _same_name(key)):
        whole = key.replace(f"{above}{wrong}", close[0], 1)
        return f"there is no key {shown}. {did_you_mean([whole if whole in _ALL else close[0]])}"
    has = f"{above[:-1]} has" if above else "There are"
    return f"there is no key {shown}. {has}: {', '.join(sorted(beside))}"


def _first_wrong(key: str) -> tuple[str, str]:
    """The sections of a key that exist, with a dot behind, and the part that does not."""
    above, rest = "", key
    while "." in rest and above + rest.partition(".")[0] in SECTIONS:
        part, _, rest = rest.partition(".")
        above += f"{part}."
    return above, rest.partition(".")[0]


def _same_name(key: str) -> list[str]:
    """Keys with the same last part in another section."""
    return [name for name in _ALL if name.rpartition(".")[2] == key.rpartition(".")[2]][:1]


def _blank(value: Any) -> bool:
    return value is None or value == ""


class Values:
    """Values by key: what the last source says, `${a.b.c}` resolved, else the default.

    Asking for a key raises ConfigError, with the key and who gave it, when the value is not allowed.

    Args:
        defaults: by key, where they are others than those of `KEYS`.
    """

    def __init__(self, sources: list[Source], defaults: Mapping[str, Any] = MappingProxyType({})) -> None:
        self._defaults = defaults
        self._given = {key: given for source in sources for key, given in source}
        self._resolved: dict[str, Any] = {}
        self._check_what_has_no_effect()

    def __getitem__(self, key: str) -> Any:
        value = _as_here(key, self._resolve_key(key))
        if _blank(value):
            return self._default(key)
        try:
            return KEYS[key].checked(value)
        except ConfigError as error:
            raise ConfigError(f"{self.where(key)}: {error}") from None

    def _default(self, key: str) -> Any:
        return self._defaults[key] if key in self._defaults else KEYS[key].default

    def is_given(self, key: str) -> bool:
        """Whether anything but a blank is given for a key."""
        return not _blank(self._resolve_key(key))

    def labels(self, section: str) -> dict[str, Any]:
        """What is given for each key of a section of labels; None for one that is left blank."""
        keys = [key for key in self._given if key.startswith(f"{section}.")]
        return {key.removeprefix(f"{section}."): self._resolve_key(key) for key in keys}

    def where(self, key: str) -> str:
        """A key and who gave it, for errors."""
        given = self._given.get(key)
        return f"{given.source}: {key}" if given else key

    def _check_what_has_no_effect(self) -> None:
        for key, given in self._given.items():
            if _blank(given.value):
                continue
            if key in WITHOUT_EFFECT and given.value not in WITHOUT_EFFECT[key]:
                logger.warning("%s: %s has no effect here", given.source, key)
            elif key in FIXED:
                allowed, problem = FIXED[key]
                if given.value != allowed or isinstance(given.value, bool):
                    raise ConfigError(f"{given.source}: {key}={reprlib.repr(given.value)}: {problem}")

    def _resolve_key(self, key: str, trail: tuple[str, ...] = ()) -> Any:
        """The value given for a key, references resolved; None where nothing is given."""
        if key not in self._resolved:
            if key in trail:
                raise ConfigError(f"{self.where(key)}: it refers to itself: {' -> '.join((*trail, key))}")
            if len(trail) > _DEEPEST:
                raise ConfigError(f"{self.where(trail[0])}: more than {_DEEPEST} references in a chain")
            given = self._given.get(key)
            self._resolved[key] = None if given is None else self._resolve(given.value, (*trail, key))
        return self._resolved[key]

    def _resolve(self, value: Any, trail: tuple[str, ...]) -> Any:
        if isinstance(value, list):
            return [self._item(item, trail) for item in value]
        if not isinstance(value, str) or "${" not in value:
            return value
        whole = _REFERENCE.fullmatch(value)
        if whole and whole[1] is not None:
            return self._referred(whole, trail)
        text = _REFERENCE.sub(lambda found: self._as_text(found, trail), value)
        if len(text) > MAX_TEXT:
            raise ConfigError(f"{self.where(trail[-1])}: {len(text):,} characters; at most {MAX_TEXT:,}")
        return text

    def _item(self, item: Any, trail: tuple[str, ...]) -> Any:
        """An item of a list; one that refers to another list could grow without bound."""
        resolved = self._resolve(item, trail)
        if isinstance(resolved, list) and not isinstance(item, list):
            raise ConfigError(f"{self.where(trail[-1])}: {item} is a list; write its values")
        return resolved

    def _as_text(self, found: re.Match[str], trail: tuple[str, ...]) -> str:
        if found[1] is None:
            return "${"
        value = self._referred(found, trail)
        if value is None or isinstance(value, list):
            what = "blank" if value is None else "a list"
            raise ConfigError(f"{self.where(trail[-1])}: {found[0]} is {what}; write the value")
        return str(value)

    def _referred(self, found: re.Match[str], trail: tuple[str, ...]) -> Any:
        """What `${name}` stands for."""
        name = found[1].strip()
        if not found[0].endswith("}") or not _NAME.fullmatch(name):
            raise ConfigError(
                f"{self.where(trail[-1])}: {reprlib.repr(found[0])} is not supported: only ${{a.b.c}}, with "
                "the name of a key, is (no oc.env and other resolvers); write the value"
            )
        key = OLDER.get(name, (name,))[0]
        if key not in _ALL and key not in self._given:
            raise ConfigError(f"{self.where(trail[-1])}: in {found[0]}, {_unknown(name)}")
        value = self._resolve_key(key, trail)
        if not _blank(value):
            return value
        default = self._default(key) if key in KEYS else None
        return str(default) if isinstance(default, Path) else default


def _as_here(key: str, value: Any) -> Any:
    """Values that the original spells otherwise."""
    if key in ("speed.precision", "speed.output_dtype") and not _blank(value):
        return _PRECISIONS.get(str(value).strip().lower(), value)
    if key in ("speed.num_dataloader_workers", "speed.num_preprocessing_workers"):
        return 1 if value == 0 and value is not False else value  # 0: none besides the main process
    if key == "model.device" and value == "auto":
        return None
    if key in _PATHS and isinstance(value, str) and value.startswith("~/"):
        return str(Path(value).expanduser())
    return value


_PATHS = frozenset(
    ("csv", "output_dir", "model.weights", "tiling.read_coordinates_from", "tiling.read_tiles_from")
)


def escaped(text: str) -> str:
    """Text in which `${` refers to nothing."""
    return text.replace("${", "\\${")


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings of mappings from dotted keys, in their order."""
    tree: dict[str, Any] = {}
    for key, value in leaves.items():
        *above, name = key.split(".")
        section = tree
        for part in above:
            section = section.setdefault(part, {})
        section[name] = value
    return tree
