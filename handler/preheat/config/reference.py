"""The model YAML as a page (docs/configuration.md) and as a JSON schema for editors.

Both are made from the config classes, whose field docstrings say unit and meaning, so that neither
can tell of a key what the code does not do. `python -m preheat.config.reference` prints the page.
"""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic.json_schema import PydanticJsonSchemaWarning

from preheat.config.model import ModelConfig
from preheat.config.pt2_forms import TORCH_COMPILE_ARGUMENTS

Schema = dict[str, Any]

HEAD = """\
# Configuration

Every key of a model YAML. TorchServe's own (camelCase) and its `pt2.compile` keep their meaning,
deprecated forms included; ours stand beside them. An unknown key or a wrong value stops the load
with its path, as in `pt2.shapes.buckets[1][0]: 1150 is not a multiple of 8; use 1144 or 1152`.

`preheat schema > preheat.json` prints the same as a JSON schema. With

    # yaml-language-server: $schema=preheat.json

as a YAML's first line, editors complete keys and underline misspelt ones while you type.

The files in `model-config/` are examples to copy; the file's stem becomes the model's name.
This page is generated: `python -m preheat.config.reference > docs/configuration.md`.
"""

COMPILE: Schema = {
    "description": "TorchServe's: `enable`, and beside it verbatim arguments of torch.compile.",
    "type": "object",
    "properties": {
        "enable": {"type": "boolean", "description": "Whether to compile; must be said."},
        "backend": {
            "type": "string",
            "default": "inductor",
            "description": "Who compiles: `auto`, the first that this machine has, that agrees "
            "with eager and is not slower (see cold-start.md); `inductor`, which needs g++; "
            "`openvino`, the fastest on a CPU. TorchServe's other names are let through to "
            "torch.compile. Beside `auto` stand `dynamic`, `fullgraph` and `mode` alone.",
        },
        "mode": {"type": "string", "description": "Inductor's preset, such as `max-autotune`."},
        "dynamic": {
            "type": ["boolean", "null"],
            "description": "`false`, as in every shipped YAML, means one static graph per bucket.",
        },
        "options": {
            "type": "object",
            "description": "`{freezing: true}` for Inductor, `{config: {}}` for OpenVINO.",
        },
    },
    "required": ["enable"],
}
"""What a YAML may say there: CompileConfig holds what has become of it (pt2_forms)."""


def schema() -> Schema:
    """The JSON schema (draft 2020-12) of a model YAML.

    It is as strict as the classes about names and types. What concerns several keys at once is
    checked when the YAML is loaded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PydanticJsonSchemaWarning)  # an empty default has no JSON
        document = ModelConfig.model_json_schema(by_alias=True)
    sections = document["$defs"]
    sections["CompileConfig"] = COMPILE
    guidance = sections["PipelineConfig"]["properties"]["guidance"]
    guidance["enum"] += [True, False]  # a bare on or off is a boolean in YAML 1.1
    del guidance["type"]
    pt2 = document["properties"]["pt2"]
    legacy = {"type": "object", "propertyNames": {"enum": list(TORCH_COMPILE_ARGUMENTS)}}
    forms = [{"$ref": pt2.pop("$ref")}, {"type": "string"}, legacy]
    document["properties"]["pt2"] = {**pt2, "anyOf": forms}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **document,
        "title": "A model YAML of Preheat",
        "description": "docs/configuration.md has the same as a page.",
    }


def page() -> str:
    """docs/configuration.md: a table of keys for each section, in the order of the classes."""
    document = schema()
    parts = [HEAD]
    for path, section in _sections("", document, document):
        parts.append(f"## {f'`{path}`' if path else 'At the top'}\n")
        if path:
            parts.append(f"{_wrapped(section['description'])}\n")
        required = section.get("required", [])
        fields = section["properties"].items()
        rows = [_row(path, key, field, document, key in required) for key, field in fields]
        head = ["| key | type | default | meaning |", "|---|---|---|---|"]
        parts.append("\n".join([*head, *rows]) + "\n")
    return "\n".join(parts)


def _sections(path: str, section: Schema, document: Schema) -> Iterator[tuple[str, Schema]]:
    """The section at `path` and those below it."""
    yield path, section
    for key, field in section["properties"].items():
        inner = _inner(field, document)
        if inner is not None:
            yield from _sections(_below(path, key, field), inner, document)


def _below(path: str, key: str, field: Schema) -> str:
    """Where the section lies that the field `key` of the section at `path` holds."""
    here = f"{path}.{key}" if path else key
    return f"{here}.<name>" if _is_named(field) else here


def _is_named(field: Schema) -> bool:
    """Whether the field maps names that the user gives to sections."""
    inner = field.get("additionalProperties")
    return isinstance(inner, Mapping) and "$ref" in inner


def _inner(field: Schema, document: Schema) -> Schema | None:
    """The section that a field holds: alone, as one of its forms, or under the user's names."""
    forms = [field, *field.get("anyOf", []), field.get("additionalProperties")]
    for form in forms:
        if isinstance(form, Mapping) and "$ref" in form:
            section: Schema = document["$defs"][form["$ref"].rpartition("/")[2]]
            return section
    return None


def _row(path: str, key: str, field: Schema, document: Schema, required: bool) -> str:
    inner = _inner(field, document)
    kind, meaning = _kind(field), field.get("description", "")
    if inner is not None:
        anchor = re.sub(r"[^a-z0-9_-]", "", _below(path, key, field).lower())
        kind = f"{'name: ' if _is_named(field) else ''}[section](#{anchor})"
        meaning = meaning or inner["description"]
    default = "required" if required else _default(field)
    return f"| `{key}` | {kind} | {default} | {' '.join(meaning.split())} |"


def _default(field: Schema) -> str:
    default = field.get("default")
    if default is None or isinstance(default, Mapping):
        return ""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, list):
        return f"`[{', '.join(map(str, default))}]`"
    return f"`{default:_}`" if isinstance(default, int) else f"`{default}`"


def _kind(field: Schema) -> str:
    """The field's type in the YAML's words."""
    if "$ref" in field:
        return "section"
    if "enum" in field:
        return ", ".join(f"`{word}`" for word in field["enum"] if isinstance(word, str))
    if "const" in field:
        return f"`{field['const']}`"
    forms = field.get("anyOf", field.get("oneOf", []))
    if forms:
        return " or ".join(_kind(form) for form in forms if form != {"type": "null"})
    kinds = field.get("type", "object")
    kind = next(kind for kind in kinds if kind != "null") if isinstance(kinds, list) else kinds
    return _container(kind, field) or _SCALARS[kind] + _bounds(field)


_SCALARS = {
    "boolean": "true or false",
    "integer": "whole number",
    "number": "number",
    "string": "text",
}


def _container(kind: str, field: Schema) -> str | None:
    """What a list or a mapping holds; None where the field is neither."""
    if kind == "array" and "prefixItems" in field:
        return f"[{', '.join(map(_kind, field['prefixItems']))}]"
    if kind == "array":
        return "list of " + re.sub(r"^(whole number|number|text)", r"\1s", _kind(field["items"]))
    if kind == "object":
        inner = field.get("additionalProperties")
        return f"mapping to {_kind(inner)}" if isinstance(inner, dict) and inner else "mapping"
    return None


def _bounds(field: Schema) -> str:
    """The least and the greatest value, where there are any."""
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "maximum": "≤"}
    return "".join(f" {sign} {field[name]:_}" for name, sign in signs.items() if name in field)


def _wrapped(text: str) -> str:
    text = " ".join(text.split())
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    print(page(), end="")
