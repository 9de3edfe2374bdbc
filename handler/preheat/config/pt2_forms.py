"""`pt2` as TorchServe 0.12.0 reads it: which of its forms compile, and with which arguments.

The source is BaseHandler.initialize (ts/torch_handler/base_handler.py:225-263);
tests/test_pt2_forms.py runs the same YAMLs through both. Where TorchServe's load dies or it
overlooks a key, this raises ConfigError instead. Where it serves eagerly with a line in the log, so
does this for its own YAMLs; one of ours, which names what it serves, is refused.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from preheat.config.schema import FrozenDict, FrozenMapping, Section
from preheat.config.yaml_errors import shown, unknown_key
from preheat.errors import ConfigError

PT2_BACKENDS = (
    "eager",
    "aot_eager",
    "inductor",
    "nvfuser",
    "aot_nvfuser",
    "aot_cudagraphs",
    "ofi",
    "fx2trt",
    "onnxrt",
    "ipex",
    "torchxla_trace_once",
    "openvino",
    "tensorrt",
    "hpu_backend",
)
"""The names that TorchServe lets through to torch.compile (ts/utils/util.py, PT2Backend); others
mean eager.
"""

AUTO = "auto"
"""Our backend that is none of torch.compile's: the first road that this machine has, that agrees
with eager and is not slower.
"""
AUTO_ARGUMENTS = ("dynamic", "fullgraph", "mode")
"""Of torch.compile, for where `auto` comes to Inductor."""

INDUCTOR_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""Those that torch has had since 2.1."""

TORCH_COMPILE_ARGUMENTS = (
    "backend",
    "disable",
    "dynamic",
    "fullgraph",
    "isolate_recompiles",
    "mode",
    "name",
    "options",
    "recompile_limit",
    "shapes_spec",
)
"""What torch 2.8 to 2.13 accept. Asked only outside `pt2.compile`, to tell a legacy form from our
key misspelt.
"""


class CompileConfig(Section):
    """Whether to compile and the arguments for torch.compile, decided as TorchServe decides it."""

    enable: bool = False
    """Whether to compile. In the YAML it must be said: true or false."""
    kwargs: FrozenMapping = FrozenDict()
    """torch.compile's keyword arguments, verbatim."""
    legacy: bool = False
    """Written in the form that TorchServe deprecates: `pt2: inductor` or `pt2: {backend:
    inductor}`."""
    warning: str | None = None
    """Why nothing is compiled although the YAML looks as if it asked for it: the reason of every
    router.
    """

    @property
    def auto(self) -> bool:
        """Whether a road is chosen rather than named."""
        return self.enable and self.kwargs.get("backend") == AUTO

    @property
    def for_inductor(self) -> Mapping[str, Any]:
        """The arguments of torch.compile where Inductor is the road."""
        return {
            key: value for key, value in self.kwargs.items() if (key, value) != ("backend", AUTO)
        }


def normalized(pt2: object, keys: Sequence[str], *, ours: bool) -> dict[str, Any]:
    """The fields of Pt2Config, whose names are `keys`, from any of the forms that TorchServe takes
    for `pt2`.

    Args:
        ours: the YAML names what it serves, so that nothing in it is TorchServe's to overlook.

    Raises:
        ConfigError: not one of the forms, TorchServe's load would die of it, or, in a YAML of ours,
            no backend of that name.
    """
    if isinstance(pt2, str):
        # TorchServe looks for its key inside the string, finds it, and dies of it
        if "compile" in pt2:
            raise ConfigError(
                f"{shown(pt2)} is no backend; to compile, use pt2: {{compile: {{enable: true}}}}",
                "pt2",
            )
        return {"compile": _decided({"backend": pt2}, "pt2", legacy=True, ours=ours)}
    if not isinstance(pt2, Mapping):
        raise ConfigError(
            f"must be a mapping or the name of a torch.compile backend, got {shown(pt2)}", "pt2"
        )
    if any(key in keys for key in pt2):
        return _modern(pt2, ours=ours)
    for key in pt2:
        if key not in TORCH_COMPILE_ARGUMENTS:
            raise ConfigError(unknown_key(key, [*keys, *TORCH_COMPILE_ARGUMENTS]), f"pt2.{key}")
    return {"compile": _decided(pt2, "pt2.backend", legacy=True, ours=ours)}


def _modern(pt2: Mapping[str, Any], *, ours: bool) -> dict[str, Any]:
    for key in pt2:
        if key in TORCH_COMPILE_ARGUMENTS:  # TorchServe ignores it beside `compile` without a word
            raise ConfigError(
                "is an argument of torch.compile; it belongs under pt2.compile", f"pt2.{key}"
            )
    if "compile" not in pt2:
        return dict(pt2)
    return {
        **pt2,
        "compile": _compile_section(pt2["compile"], ours=ours, registers=bool(pt2.get("import"))),
    }


def _compile_section(section: object, *, ours: bool, registers: bool) -> CompileConfig:
    """`registers`: files are imported that may bring a backend, so that only torch.compile itself
    can refuse its name.
    """
    path = "pt2.compile"
    if not isinstance(section, Mapping):
        raise ConfigError(
            f"must be a mapping such as {{enable: true, backend: inductor}}, got {shown(section)}",
            path,
        )
    if "enable" not in section:
        raise ConfigError("is missing; use true or false", f"{path}.enable")
    for key in section:
        if not isinstance(key, str):
            raise ConfigError(
                f"must be the name of an argument of torch.compile, got {shown(key)}",
                f"{path}.{key}",
            )
    kwargs = {key: value for key, value in section.items() if key != "enable"}
    enable = section["enable"]
    if ours and not isinstance(enable, bool):
        raise ConfigError(f"must be true or false, got {shown(enable)}", f"{path}.enable")
    if enable == True:  # TorchServe's very comparison: 1 and 1.0 enable, "true" in quotes does not
        named = kwargs.get("backend")
        if ours and registers and isinstance(named, str) and named != AUTO:
            return CompileConfig(enable=True, kwargs=kwargs)
        return _decided(kwargs, f"{path}.backend", legacy=False, ours=ours)
    odd = (
        None
        if enable is False
        else f"{path}.enable: {shown(enable)} is not true, so nothing is compiled"
    )
    return CompileConfig(enable=False, kwargs=kwargs, warning=odd)


def _decided(kwargs: Mapping[str, Any], path: str, *, legacy: bool, ours: bool) -> CompileConfig:
    """Compile with `kwargs`, unless they name a backend that is none, or that TorchServe would not
    let through.
    """
    backend = kwargs.get("backend", "inductor")
    if ours and backend == AUTO:
        _refuse_beside_auto(kwargs, path.removesuffix(".backend"))
    if ours and backend in ("inductor", AUTO):
        _refuse_unknown_mode(kwargs.get("mode"), path.removesuffix("backend") + "mode")
    if backend in PT2_BACKENDS or (ours and backend == AUTO):
        return CompileConfig(enable=True, kwargs=kwargs, legacy=legacy)
    if ours:
        _refuse_unknown(backend, path)
        return CompileConfig(enable=True, kwargs=kwargs, legacy=legacy)
    warning = (
        f"{path}: {shown(backend)} is not a backend that TorchServe supports, so nothing is "
        f"compiled; it knows {', '.join(PT2_BACKENDS)}"
    )
    return CompileConfig(enable=False, kwargs=kwargs, legacy=legacy, warning=warning)


def _refuse_beside_auto(kwargs: Mapping[str, Any], path: str) -> None:
    """Raise ConfigError for an argument that one backend has and another has not."""
    for key in kwargs.keys() - {"backend", *AUTO_ARGUMENTS}:
        raise ConfigError(
            f"is not for backend: auto, which takes {', '.join(AUTO_ARGUMENTS)} (for Inductor); "
            "name the backend that it is for",
            f"{path}.{key}",
        )


def _refuse_unknown_mode(mode: object, path: str) -> None:
    """Raise ConfigError where Inductor has no such mode: it would say so once for each bucket, and
    each would be served eagerly.
    """
    if mode is None or mode in INDUCTOR_MODES:
        return
    inductor: Any = importlib.import_module("torch._inductor")  # it may know more
    known = sorted(inductor.list_mode_options())
    if mode not in known:
        close = get_close_matches(str(mode), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        raise ConfigError(f"Inductor has no mode {shown(mode)}; {hint}", path)


def _refuse_unknown(backend: object, path: str) -> None:
    """Raise ConfigError where torch.compile has no backend of that name either, its debugging ones
    and plug-ins counted.
    """
    # Not above: a YAML is read without torch, and the two seconds are for a name that TorchServe
    # does not know.
    dynamo: Any = importlib.import_module("torch._dynamo")
    # those break on purpose
    torchs = (name for name in dynamo.list_backends(()) if not name.endswith("_TESTING_ONLY"))
    known = sorted({AUTO, *PT2_BACKENDS, *torchs})
    if backend not in known:
        close = get_close_matches(str(backend).lower(), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        raise ConfigError(f"{shown(backend)} is no backend of torch.compile; {hint}", path)
