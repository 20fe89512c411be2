"""The pages of the API reference, made from signatures and docstrings as they are when imported.

Imported, because methods that live in other rooms (`Model.embed_images`) are assigned in the class body:
a reader of sources would see attributes without a docstring.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import slide2vec

__all__ = ["PAGES", "page"]

#: Page -> its title and the public names on it, which together are slide2vec.__all__.
PAGES = {
    "models": (
        "Models and runs",
        "Model Models Pipeline list_models list_encoder_provider_diagnostics __version__",
    ),
    "settings": (
        "Slides and settings",
        "Slide PreprocessingConfig ExecutionOptions MaskSamplingConfig ImageSpec SlideRegions DenseOptions "
        "DenseImageOptions MISSING_FIELD",
    ),
    "results": (
        "Results",
        "EmbeddedSlide EmbeddedPatient SlideAttention SlideOutcome RunResult BagDataset DenseEncodeKit "
        "DenseEncodeGeometry TileEmbeddingArtifact HierarchicalEmbeddingArtifact SlideEmbeddingArtifact "
        "PatientEmbeddingArtifact ImageEmbeddingArtifact DenseImageArtifact DenseRegionArtifact "
        "PatchTokensArtifact TileFeatures",
    ),
    "errors": ("Errors", "Slide2VecError EmbedSlidesError EmbedPatientsError EmbedImagesError"),
    "encoders": (
        "Encoders of your own",
        "register_encoder TileEncoder TorchTileEncoder TimmTileEncoder EncoderProviderDiagnostic",
    ),
}

#: Methods and properties without an underscore that are for the program's own use: other rooms call them, and
#: they may change in any release.
INTERNAL = {
    "Model": "aggregated confirm_weights decide_engine devices_here embed_here embed_into gain_of_build "
    "has_latents held_bytes memory_bytes tile_encoding tile_model workers",
    "Models": "devices_here grouped prepare take_turns workers",
    "PreprocessingConfig": "for_slide on_device set_only",
    "ExecutionOptions": "budget feature_dtype set_only vector_dtype",
    "MaskSamplingConfig": "by_class class_of classes color_of identity set_only threshold_of",
    "SlideRegions": "slide",
    "RunResult": "of_several with_failed",
    "EmbedSlidesError": "of_several",
    "EmbedPatientsError": "of_several",
    "EmbedImagesError": "of_several",
}

_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):(.*)")
_ENTRY = re.compile(r"(?! )([\w*., \[\]]+): (.*)")
#: Outside of backticks a < would begin an element.
_CODE_OR_LESS = re.compile(r"(`[^`]*`)|<")


def page(title: str, names: str) -> str:
    """The Markdown of one page."""
    return "\n\n".join([f"# {title}", *(part for name in names.split() for part in _described(name))]) + "\n"


def _described(name: str) -> Iterator[str]:
    thing = getattr(slide2vec, name)
    yield f"## `{name}` {{ #slide2vec.{name.strip('_')} }}"  # __ would be bold there
    if inspect.isclass(thing):
        bases = [base.__name__ for base in thing.__mro__[1:-1] if base.__module__ == "builtins"]
        if issubclass(thing, BaseException):
            yield f"An exception, caught as {', '.join(f'`{base}`' for base in bases)} too."
        elif shown := _signature(thing, name):
            yield shown
        yield _marked_up(inspect.getdoc(thing) or "", _defaults(thing))
        for base in _documented_bases(thing):
            yield f"A kind of [`{base}`](#slide2vec.{base}), with all that it has."
        for member, found in _members(thing):
            yield from _member(name, member, found)
    elif isinstance(thing, FunctionType):
        yield _signature(thing, name)
        yield _marked_up(inspect.getdoc(thing) or "")
    elif isinstance(thing, str):
        yield f"A string: this is {thing}."
    else:
        yield _marked_up(inspect.getdoc(type(thing)) or "")


def _documented_bases(cls: type) -> list[str]:
    """Its nearest base that has a description of its own, if it has one."""
    return [base.__name__ for base in cls.__mro__[1:] if base.__name__ in slide2vec.__all__][:1]


def _members(cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties, those of bases of ours included that are not described themselves."""
    left_out = set(INTERNAL.get(cls.__name__, "").split())
    described = _documented_bases(cls)
    for base in cls.__mro__:
        if base.__name__ in described:
            return
        if not base.__module__.startswith("slide2vec"):
            continue
        for name, found in vars(base).items():
            kinds = (FunctionType, classmethod, staticmethod, property)
            if name.startswith("_") or name in left_out or not isinstance(found, kinds):
                continue
            left_out.add(name)
            if found.__doc__ if described else inspect.getdoc(found):
                yield name, found


def _member(owner: str, name: str, found: Any) -> Iterator[str]:
    yield f'### `{owner}.{name}` {{ #slide2vec.{owner}.{name} data-toc-label="{name}" }}'
    if isinstance(found, property):
        result = inspect.signature(found.fget).return_annotation if found.fget else inspect.Signature.empty
        yield "A property" + ("." if result is inspect.Signature.empty else f": `{_annotation(result)}`.")
    else:
        function = found.__func__ if isinstance(found, (classmethod, staticmethod)) else found
        yield _signature(function, name, bound=not isinstance(found, staticmethod))
    yield _marked_up(inspect.getdoc(found) or "")


def _signature(thing: Any, name: str, *, bound: bool = False) -> str:
    """As a block of code, one parameter a line where they are many; settings list theirs as attributes."""
    if inspect.isclass(thing) and (hasattr(thing, "model_fields") or thing.__init__ is object.__init__):
        return ""
    if inspect.isclass(thing) and "Build it with" in (thing.__doc__ or ""):
        return ""
    signature = inspect.signature(thing)
    parameters, star = [], False
    for parameter in list(signature.parameters.values())[int(bound) :]:
        if parameter.kind is parameter.VAR_POSITIONAL:
            star = True
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            parameters, star = [*parameters, "*"], True
        parameters.append(_parameter(parameter))
    result = signature.return_annotation
    end = "" if result in (inspect.Signature.empty, None, "None") else f" -> {_annotation(result)}"
    line = f"{name}({', '.join(parameters)}){end}"
    if len(line) > 90:
        line = f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){end}"
    return f"```python\n{line}\n```"


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    kind = "" if parameter.annotation is parameter.empty else f": {_annotation(parameter.annotation)}"
    if parameter.default is parameter.empty:
        return f"{stars}{parameter.name}{kind}"
    return f"{parameter.name}{kind} = {_value(parameter.default)}"


def _annotation(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _value(value: object) -> str:
    shown = repr(value)
    return "…" if " at 0x" in shown or "<factory>" in shown or len(shown) > 40 else shown


def _defaults(cls: type) -> dict[str, str]:
    """Of the fields of settings and dataclasses, as far as they have simple ones."""
    if fields := getattr(cls, "model_fields", None):
        return {name: _value(field.default) for name, field in fields.items() if not field.is_required()}
    if dataclasses.is_dataclass(cls):
        given = {field.name: field.default for field in dataclasses.fields(cls)}
        return {name: _value(value) for name, value in given.items() if value is not dataclasses.MISSING}
    return {}


def _marked_up(docstring: str, defaults: dict[str, str] | None = None) -> str:
    """Markdown of a docstring: its sections become lists."""
    out: list[str] = []
    in_section = False
    for line in docstring.splitlines():
        if heading := _SECTION.fullmatch(line):
            in_section = not heading[2].strip()
            out += ["", f"**{heading[1]}**{heading[2]}", ""]
        elif in_section and line.startswith("    "):
            out.append(_entry(_escaped(line[4:]), defaults or {}))
        else:
            in_section = in_section and not line.strip()
            out.append(line if line.startswith("    ") else _escaped(line))
    return "\n".join(out).strip()


def _escaped(line: str) -> str:
    return _CODE_OR_LESS.sub(lambda found: found[1] or "&lt;", line)


def _entry(line: str, defaults: dict[str, str]) -> str:
    if line.startswith(" ") or not (found := _ENTRY.match(line)):
        return "    " + line.strip()
    default = defaults.get(found[1], "PydanticUndefined")
    shown = "" if default in ("PydanticUndefined", "…") else f" (`{default}`)"
    names = ", ".join(f"`{name.strip()}`" for name in found[1].split(","))
    return f"- {names}{shown}: {found[2]}"
