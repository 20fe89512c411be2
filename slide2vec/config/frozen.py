"""What all sets of options have in common."""

from __future__ import annotations

from collections.abc import Set
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from slide2vec.errors import ConfigError, nearest_names

__all__ = ["FrozenConfig"]


class FrozenConfig(BaseModel):
    """A frozen set of options that names the nearest field when given one it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)

    def __init__(self, **values: Any) -> None:
        name = type(self).__name__
        for key in values:
            if key not in type(self).model_fields:
                raise ConfigError(
                    f"{name} has no field {key!r}. {nearest_names(key, type(self).model_fields)}"
                )
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError("; ".join(_in_words(name, item) for item in error.errors())) from None

    def updated(self, **values: Any) -> Self:
        """A validated copy with some fields replaced; what nobody set stays so (`model_fields_set`)."""
        made = type(self)(**{**{k: getattr(self, k) for k in type(self).model_fields}, **values})
        return made.set_only(self.model_fields_set | values.keys())

    def set_only(self, fields: Set[str]) -> Self:
        """The same, with only these fields of those that were given counting as set by the user."""
        self.model_fields_set.intersection_update(fields)
        return self


def _in_words(name: str, error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    cause = (error.get("ctx") or {}).get("error")
    if isinstance(cause, ConfigError):
        return f"{name}.{where}: {cause}" if where else f"{name}: {cause}"
    return f"{name}.{where}: {error['msg'].lower()}, got {error['input']!r}"
