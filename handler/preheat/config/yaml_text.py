"""A YAML file as data, which TorchServe's reading is not always: of a key that stands twice it
keeps the last, in silence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from preheat.errors import ConfigError


def read_yaml(path: Path) -> Any:
    """The document in the file at `path`.

    Raises:
        ConfigError: it cannot be read, is no YAML, or holds a mapping with one key twice.
    """
    try:
        loader = yaml.SafeLoader(path.read_bytes())
        node = loader.get_single_node()
        _refuse_twice(loader, node, "", set())
        return None if node is None else loader.construct_document(node)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error


def _refuse_twice(
    loader: yaml.SafeLoader, node: yaml.Node | None, path: str, seen: set[int]
) -> None:
    """Raise ConfigError where a mapping in `node`, which stands at `path`, has a key twice; `seen`
    ends what refers to itself.
    """
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _refuse_twice(loader, item, f"{path}[{index}]", seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[Any, int] = {}
        for name, value in node.value:
            plain = isinstance(name, yaml.ScalarNode) and name.tag != "tag:yaml.org,2002:merge"
            key = loader.construct_object(name) if plain else id(name)
            here, line = (
                f"{path}.{name.value}" if path else str(name.value),
                name.start_mark.line + 1,
            )
            if key in lines:
                raise ConfigError(
                    f"stands twice, in lines {lines[key]} and {line}; once is enough", here
                )
            lines[key] = line
            _refuse_twice(loader, value, here, seen)
