"""Which whole numbers a module's inputs may hold, and how long its sequences may be.

An index outside its table is not an error that a request could get: Inductor's loops on a CPU end
the process where they run on more than one thread (an exception cannot leave an OpenMP region),
CUDA loses its device, OpenVINO answers with zeros, and -1 reads the last row. So every such input
needs a range, and a request is held against it before it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from preheat.config.module import NEEDS_RANGE, ModuleConfig, is_mask
from preheat.errors import ConfigError
from preheat.models.module.tensors import Span

_LENGTHS = {
    "input_ids": -1,
    "inputs_embeds": -2,
    "decoder_input_ids": -1,
    "decoder_inputs_embeds": -2,
}
"""The dimension of these inputs that is as long as the sequence."""
_POSITIONS = ("max_position_embeddings", "max_target_positions")


def ranges(names: Sequence[str], module: nn.Module, config: ModuleConfig) -> dict[str, Span]:
    """What each input may hold: what the YAML says, else what the module's transformers config
    does, else 0 and 1 for a mask, by which some models count positions.

    Raises:
        ConfigError: a declared input of whole numbers has no range, or one that is more than the
            module takes.
    """
    own = _spans(module)
    found = own | {name: (0.0, 1.0) for name in names if is_mask(name)}
    for name, spec in config.inputs.items():
        path = f"module.inputs.{name}"
        if spec.range is not None:
            found[name] = (spec.range[0], spec.range[1])
        elif spec.is_index and name not in found:
            raise ConfigError(NEEDS_RANGE, f"{path}.range")
        elif not spec.is_index:
            found.pop(name, None)
        least, most = own.get(name, (-float("inf"), float("inf")))
        if name in found and not (least <= found[name][0] and found[name][1] <= most):
            raise ConfigError(
                f"must lie within [{least:.15g}, {most:.15g}], the module's own", f"{path}.range"
            )
        for key, value in (("pad", spec.pad), ("default", spec.default)):
            if (
                name in found
                and isinstance(value, float)
                and not found[name][0] <= value <= found[name][1]
            ):
                raise ConfigError(
                    f"{value:g} is outside {path}.range, {_shown(found[name])}", f"{path}.{key}"
                )
    return {name: found[name] for name in names if name in found}


def lengths(names: Sequence[str], module: nn.Module) -> dict[str, tuple[int, int]]:
    """Of the inputs that are sequences: which dimension that is, and the longest that the module
    has positions for.
    """
    found = {}
    for name, dim in _LENGTHS.items():
        longest = _longest(module, decoder=name.startswith("decoder")) if name in names else None
        if longest is not None:
            found[name] = (dim, longest)
    return found


def refuse_long_buckets(config: ModuleConfig, longest: Mapping[str, tuple[int, int]]) -> None:
    """Raises ConfigError for a bucket that the module has no positions for."""
    for name, spec in config.inputs.items():
        dim, most = longest.get(name, (0, 0))
        extent = spec.shape[dim] if most and len(spec.shape) >= -dim else 0
        sizes = config.choices.get(extent, ()) if isinstance(extent, str) else (extent,)
        if most and max(sizes, default=0) > most:
            raise ConfigError(
                f"{max(sizes)} is more than the module has positions for, {most}",
                f"module.inputs.{name}",
            )


def _spans(module: nn.Module) -> dict[str, Span]:
    """Of a transformers module; empty for others."""
    tokens = _vocabulary(module) or _setting(module, "vocab_size")
    sizes = {
        "input_ids": tokens,
        "decoder_input_ids": _setting(module, "vocab_size", decoder=True),
        "token_type_ids": _setting(module, "type_vocab_size"),
        "position_ids": _setting(module, *_POSITIONS),
    }
    # A model without token types has 0 of them, and takes what the tokenizer makes: zeros.
    return {
        name: (0.0, float(max(size, 1) - 1)) for name, size in sizes.items() if size is not None
    }


def _longest(module: nn.Module, *, decoder: bool) -> int | None:
    """The positions of a sequence. RoBERTa and its kin start to count behind the padding's number,
    in a table that has no more rows.
    """
    most = _setting(module, *_POSITIONS, decoder=decoder)
    relative = any(
        getattr(config, "position_biased_input", True) is False  # DeBERTa's have no table of them
        for config in _configs(module, "decoder" if decoder else "encoder")
    )
    if most is None or relative:
        return None
    behind = [
        (table.padding_idx or 0) + 1
        for name, table in module.named_modules()
        if isinstance(table, nn.Embedding)
        and "position" in name.rpartition(".")[2]
        and (table.num_embeddings, table.padding_idx is None) == (most, False)
    ]
    return most - max(behind, default=0)


def _vocabulary(module: nn.Module) -> int | None:
    """Of a transformers module (transformers/modeling_utils.py, EmbeddingAccessMixin); those
    without tokens raise.
    """
    find: Any = getattr(module, "get_input_embeddings", None)
    try:
        size = getattr(find(), "num_embeddings", None) if find else None
    except NotImplementedError:
        return None
    return size if isinstance(size, int) else None


def _setting(module: nn.Module, *names: str, decoder: bool = False) -> int | None:
    """The first of these that is in the transformers config of the module's text: its encoder's, or
    its decoder's.
    """
    for config in _configs(module, "decoder" if decoder else "encoder"):
        size = next(
            (size for name in names if type(size := getattr(config, name, None)) is int), None
        )
        if size is not None:
            return size
    return None


def _configs(module: nn.Module, side: str) -> Iterator[Any]:
    """The parts of a composite model have configs of their own."""
    config: Any = getattr(module, "config", None)
    for part in (side, "text_config", "text_encoder"):
        inside = getattr(config, part, None)
        if hasattr(inside, "to_dict"):
            yield inside
    if config is not None:
        yield config


def _shown(span: Span) -> str:
    return f"[{span[0]:.15g}, {span[1]:.15g}]"
