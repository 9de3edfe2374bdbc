"""What is wrong with a model YAML, said in its own words: path, value, what would be right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeGuard, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_Model = type[BaseModel] | list[type[BaseModel]] | None

from preheat.errors import ConfigError

# By pydantic's error type; what stands in braces comes from the error's context.
_WANTED = {
    "batch_sizes": "must be a list of batch sizes or dynamic",
    "bool_type": "must be true or false",
    "bucket": "must be a bucket, [height, width] in pixels",
    "dict_type": "must be a mapping (key: value)",
    "extent": "must be a size or the name of a dimension",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_type": "must be a whole number",
    "invalid_key": "every key must be text",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "mapping_type": "must be a mapping (key: value)",
    "missing": "is missing",
    "model_type": "must be a mapping (key: value)",
    "pad": "must be edge or a number",
    "string_too_short": "must not be empty",
    "string_type": "must be text",
    "too_short": "must have at least one entry",
    "tuple_type": "must be a list",
}


def explained(error: ValidationError, data: object, root: type[BaseModel]) -> ConfigError:
    """The first thing pydantic found wrong with `data` as a `root`."""
    found = error.errors(include_url=False)[0]
    path, node = "", data
    model: _Model = root
    parents: list[_Model] = []
    for part in found["loc"]:
        if isinstance(part, int) and isinstance(node, Sequence):
            path, node = f"{path}[{part}]", node[part]
        # else it is the tag of a union, which has no place in the YAML
        elif isinstance(node, Mapping):
            path, node = f"{path}.{part}" if path else str(part), node.get(part)
            parents.append(model)
            model = _section_at(model, str(part))
    return ConfigError(_reason(found, parents[-1] if parents else None), path)


def _section_at(model: _Model, key: str) -> _Model:
    """What the value at `key` is: a section, a mapping to sections (as a list of one), or anything
    else.
    """
    if isinstance(model, list):
        return model[0]
    fields = (
        {field.alias or name: field for name, field in model.model_fields.items()} if model else {}
    )
    section: Any = fields[key].annotation if key in fields else None
    inside = next(filter(_is_section, get_args(section)), None)
    if inside is not None and get_origin(section) is Mapping:
        return [inside]
    return inside or (section if _is_section(section) else None)  # `inside`: of `Section | None`


def _is_section(annotation: object) -> TypeGuard[type[BaseModel]]:
    # To Python 3.10, tuple[int, ...] is a type.
    return (
        get_origin(annotation) is None
        and isinstance(annotation, type)
        and issubclass(annotation, BaseModel)
    )


def keys_of(model: type[BaseModel]) -> list[str]:
    """The keys of a section as the YAML spells them."""
    return [field.alias or name for name, field in model.model_fields.items()]


def _reason(found: ErrorDetails, model: _Model) -> str:
    kind, value, context = found["type"], found["input"], found.get("ctx", {})
    if kind == "extra_forbidden":
        return unknown_key(found["loc"][-1], keys_of(model) if isinstance(model, type) else [])
    if kind == "multiple_of":
        multiple = context["multiple_of"]
        below = value // multiple * multiple
        nearest = f"{below} or {below + multiple}" if below else str(multiple)
        return f"{shown(value)} is not a multiple of {multiple}; use {nearest}"
    if kind == "missing":
        return _WANTED[kind]
    wanted = _WANTED[kind].format(**context) if kind in _WANTED else found["msg"]
    return f"{wanted}, got {shown(value)}"


def refuse_twice(values: Sequence[object], path: str) -> None:
    """Raise ConfigError at the first entry of the list at `path` that stands there already."""
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ConfigError(f"{value} is listed twice; once is enough", f"{path}[{index}]")


def shown(value: Any) -> str:
    """A value about as the YAML says it, cut to 80 characters."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def unknown_key(key: object, known: Sequence[str]) -> str:
    """What to say about a key that is none of `known`."""
    close = get_close_matches(str(key), known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
    return f"unknown key; {hint}"
