"""Chooses the road of each target: torch.compile, OpenVINO, IPEX or eager, and puts its router in
place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import nn

from preheat.compilation.backends.openvino import Model, cpu_properties
from preheat.compilation.export import fault
from preheat.compilation.router import Ahead, DynamicDims, EngineName, Inputs, Router
from preheat.config.pt2 import Pt2Config
from preheat.config.schema import thawed
from preheat.device import import_ipex, import_openvino, ipex_requested, missing_compiler
from preheat.errors import ConfigError

logger = logging.getLogger(__name__)

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
"""What channels_last makes faster; a transformer has none of them but for its patches."""


@dataclass(frozen=True, slots=True)
class Road:
    """How a target is made fast, or why it is not: `fast` for any road but OpenVINO's, `make` for
    that; see `Router`.
    """

    engine: EngineName = "eager"
    fast: Callable[..., Any] | None = None
    make: Callable[[Inputs, DynamicDims], Ahead] | None = None
    channels_last: bool = False
    reason: str | None = None


def build_router(
    name: str, module: nn.Module, config: Pt2Config, dtype: torch.dtype, device: torch.device
) -> Router:
    """Optimise one target as the YAML says and put its router in place.

    OpenVINO or torch.compile where `pt2.compile` is enabled, else IPEX where TorchServe enables it,
    else eager, on a CPU with channels_last. What cannot be had falls to eager with an error in the
    log and the reason in the router.

    Raises:
        ConfigError: `pt2.scope: regional` on a module without repeated blocks.
    """
    forward, kwargs = module.forward, thawed(config.compile.kwargs)
    if config.shapes.strategy != "exact":
        # torch's default turns the second bucket into a dynamic graph
        kwargs.setdefault("dynamic", False)
    if config.openvino:
        road = _openvino(name, module, kwargs, device)
    elif config.compile.enable:
        road = _torch_compile(name, module, kwargs, config, device)
    elif ipex_requested() and device.type == "cpu":
        road = _ipex(name, module, dtype)
    else:
        road = _eager(module, config, device)
    if road.reason is not None:
        logger.error("%s: %s; serving it eagerly", name, road.reason)
    router = Router(
        name,
        forward,
        road.fast,
        road.engine,
        shape_bound=road.engine == "compiled",
        cuda_graphs=uses_cuda_graphs(kwargs, device),
        channels_last=road.channels_last,
        make=road.make,
        fault=fault if road.engine == "ipex" else None,
        reason=road.reason,
    )
    module.forward = router
    return router


def _torch_compile(
    name: str, module: nn.Module, kwargs: Mapping[str, Any], config: Pt2Config, device: torch.device
) -> Road:
    """Nothing is compiled yet, so only bad arguments fail here.

    Where packages are expected to serve, `torch.compile` itself is put off to the first call: it
    imports all of Inductor.

    On a GPU convolutions have channels_last weights. Inductor would change their layout in every
    call, or, in graphs with a dynamic batch, leave them and their slower kernels (decide_layout_opt
    in torch/_inductor/graph.py, convolution in kernel/conv.py).
    """
    regional = config.scope == "regional"
    missing = missing_compiler(device, kwargs.get("backend", "inductor"))
    if missing is not None:
        return Road(reason=missing)
    if regional and not getattr(module, "_repeated_blocks", None):
        raise ConfigError(
            f"{name} ({type(module).__name__}) has no repeated blocks; use scope: full", "pt2.scope"
        )
    forward: Callable[..., Any] = module.forward  # now, before a router stands in for it
    if config.export.aot_compile:
        compiled = cache(lambda: compile_target(module, forward, kwargs, regional=regional))
        return Road("compiled", lambda *args, **kwargs: compiled()(*args, **kwargs))
    if device.type == "cuda":
        _lay_out(module)
    try:
        return Road("compiled", compile_target(module, forward, kwargs, regional=regional))
    except (TypeError, ValueError, RuntimeError) as error:
        return Road(reason=f"torch.compile refused its arguments: {error}")


def _openvino(
    name: str, module: nn.Module, kwargs: Mapping[str, Any], device: torch.device
) -> Road:
    """`torch.compile(backend="openvino")` fails on recent torch; this road goes through
    `torch.export` instead.
    """
    if device.type != "cpu":
        return Road(
            reason=(
                f"openvino serves on the CPU, and this worker's device is {device}; use backend: "
                "inductor"
            )
        )
    try:
        import_openvino()
        properties = cpu_properties(kwargs.get("options") or {})
    except (ImportError, ValueError) as error:
        return Road(reason=f"openvino: {error}")
    numbers = count()
    return Road(
        "openvino",
        make=lambda inputs, dims: Model(
            f"{name}-openvino-{next(numbers)}", module, inputs, dims, properties
        ),
    )


def _ipex(name: str, module: nn.Module, dtype: torch.dtype) -> Road:
    """A copy of the module is optimised: what IPEX fails on, or gets wrong, is then served by the
    module as it was.

    Weights are not packed: IPEX packs a convolution's for one input shape, and a ResNet-50 then
    took three to six times as long in every other one (IPEX 2.8, AMD EPYC; a BERT-base gained
    nothing).
    """
    try:
        ipex = import_ipex()
        convolutional = _lay_out(module)
        optimized: nn.Module = ipex.optimize(
            module, dtype=dtype, inplace=False, weights_prepack=False
        )
    except Exception as error:  # whatever Intel's code meets in a module that it does not know
        logger.exception("%s: ipex failed", name)
        return Road(reason=f"ipex: {type(error).__name__}: {error}".strip())
    return Road("ipex", optimized.forward, channels_last=convolutional)


def _eager(module: nn.Module, config: Pt2Config, device: torch.device) -> Road:
    """On a CPU, convolutions have channels_last weights: bfloat16 ResNets 1.2, UNets 1.1 times
    faster (bench/results/cpu.json).

    Not where packages are expected, which are given the same weights and were compiled for their
    plain layout.
    """
    if device.type == "cpu" and not config.export.aot_compile:
        _lay_out(module)
    return Road(reason=config.compile.warning)


def _lay_out(module: nn.Module) -> bool:
    """Whether the module has convolutions; their weights are then channels_last."""
    convolutional = any(isinstance(part, CONVOLUTIONS) for part in module.modules())
    if convolutional:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return convolutional


def uses_cuda_graphs(kwargs: Mapping[str, Any], device: torch.device) -> bool:
    """Whether these torch.compile arguments record CUDA graphs (torch/_inductor/__init__.py,
    list_mode_options).
    """
    options = kwargs.get("options") or {}
    recorded = kwargs.get("mode") in ("reduce-overhead", "max-autotune") or options.get(
        "triton.cudagraphs", False
    )
    return device.type == "cuda" and bool(recorded)


def wants_every_size(kwargs: Mapping[str, Any], device: torch.device) -> bool:
    """Whether warm-up has to meet each batch size although one graph serves them all: CUDA graphs
    are recorded per size, and OpenVINO chooses its kernels at the first call of a size.
    """
    return kwargs.get("backend") == "openvino" or uses_cuda_graphs(kwargs, device)


def compile_target(
    module: nn.Module, forward: Callable[..., Any], kwargs: Mapping[str, Any], *, regional: bool
) -> Callable[..., Any]:
    """`forward`, which is the module's own, compiled, or with diffusers' repeated blocks in it
    compiled.

    torch.compile is lazy: nothing runs yet.
    """
    if not regional:
        compiled: Callable[..., Any] = torch.compile(forward, **kwargs)
        return compiled
    compile_blocks: Callable[..., None] = module.compile_repeated_blocks  # type: ignore[assignment]
    compile_blocks(**kwargs)
    return forward
