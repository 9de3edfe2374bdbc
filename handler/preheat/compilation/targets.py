"""Chooses the backend of each target: torch.compile, OpenVINO, IPEX or eager, and puts its router
in place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from preheat.cache.shared import refuse_foreign_headers
from preheat.compilation.backends import inductor, ipex, openvino
from preheat.compilation.backends.base import Backend, Precompiled
from preheat.compilation.roads import Roads
from preheat.compilation.router import Router
from preheat.config.pt2 import Pt2Config
from preheat.config.schema import thawed
from preheat.errors import ConfigError

logger = logging.getLogger(__name__)

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
"""What channels_last makes faster; a transformer has none of them but for its patches."""


def build_router(
    name: str, module: nn.Module, config: Pt2Config, dtype: torch.dtype, device: torch.device
) -> Router:
    """Optimise one target as the YAML says and put its router in place.

    OpenVINO, torch.compile or what is still to be chosen where `pt2.compile` is enabled, else IPEX
    where TorchServe enables it, else eager, on a CPU with channels_last. What cannot be had falls
    to eager with an error in the log and the reason in the router.

    Raises:
        ConfigError: `pt2.scope: regional` on a module without repeated blocks.
    """
    forward = module.forward  # now, before a router stands in for it
    roads = Roads()
    if config.compile.auto:
        backends = _every_road(name, module, config, device, roads)
    elif config.openvino:
        backends = [_openvino(name, module, config, device)]
    elif config.compile.enable:
        backends = [_torch_compile(name, module, config, device)]
    elif ipex.requested() and device.type == "cpu":
        backends = [_ipex(name, module, config, dtype, device)]
    else:
        backends = [_eager(module, config, device)]
    for backend in backends:
        if backend.reason is not None:
            logger.error("%s: %s; serving it eagerly", name, backend.reason)
    channels_last = isinstance(backends[0], ipex.Ipex) and _has_convolutions(module)
    router = Router(name, forward, backends, channels_last=channels_last, roads=roads)
    module.forward = router
    return router


def _every_road(
    name: str, module: nn.Module, config: Pt2Config, device: torch.device, roads: Roads
) -> list[Backend]:
    """What `backend: auto` chooses from, the fastest as a rule first; `roads` is told what is not
    on the list. Packages come before all of them where the archive has some.
    """
    listed: list[Backend] = []
    if device.type == "cpu":
        listed.append(_openvino(name, module, config, device))
    elif "mode" not in config.compile.kwargs:
        if config.shapes.strategy in ("dynamic", "exact") or config.shapes.batch_sizes == "dynamic":
            roads.ruled_out["cuda_graphs"] = "they are recorded per size: list batch_sizes"
        elif config.scope == "regional":
            roads.ruled_out["cuda_graphs"] = "they are recorded of whole targets: use scope: full"
        else:
            listed.append(_torch_compile(name, module, config, device, mode="reduce-overhead"))
    listed.append(_torch_compile(name, module, config, device))
    roads.ruled_out |= {each.road: each.reason for each in listed if each.reason is not None}
    for road, reason in roads.ruled_out.items():
        logger.info("%s: %s is not on the list: %s", name, road, reason)
    found = [backend for backend in listed if backend.reason is None]
    if not found:
        return [Precompiled("eager", reason="; ".join(roads.ruled_out.values()))]
    # nothing is warmed under exact, so there is no first call to choose by
    roads.is_open = config.shapes.strategy != "exact"
    return found


def keep_graphs(routers: Iterable[Router], folder: Path, context: str) -> None:
    """Have what OpenVINO converts read from the folder and put there, beside Inductor's code.

    Args:
        folder: whose files are believed.
        context: all that a graph depends on but target and call.
    """
    for router in routers:
        for backend in router.backends:
            if isinstance(backend, openvino.OpenVINO):
                backend.keep_in(folder / "openvino", context)


def lay_out_eager(module: nn.Module, config: Pt2Config, device: torch.device) -> None:
    """Give what `auto` has left to eager the layout that eager is fastest in."""
    with torch.inference_mode(False), torch.no_grad():
        _eager(module, config, device)


def _torch_compile(
    name: str, module: nn.Module, config: Pt2Config, device: torch.device, **preset: Any
) -> Backend:
    """Nothing is compiled yet, so only bad arguments fail here.

    Where packages are expected to serve, or another road may, `torch.compile` itself is put off to
    the first call: it imports all of Inductor.

    On a GPU convolutions have channels_last weights. Inductor would change their layout in every
    call, or, in graphs with a dynamic batch, leave them and their slower kernels (decide_layout_opt
    in torch/_inductor/graph.py, convolution in kernel/conv.py).
    """
    kwargs = thawed(config.compile.for_inductor) | preset
    if config.shapes.strategy != "exact":
        # torch's default turns the second bucket into a dynamic graph
        kwargs.setdefault("dynamic", False)
    regional = config.scope == "regional"
    if (missing := inductor.why_not(device, config)) is not None:
        return Precompiled("compiled", reason=missing)
    if regional and not getattr(module, "_repeated_blocks", None):
        raise ConfigError(
            f"{name} ({type(module).__name__}) has no repeated blocks; use scope: full", "pt2.scope"
        )
    forward: Callable[..., Any] = module.forward
    cuda_graphs, auto = uses_cuda_graphs(kwargs, device), config.compile.auto

    def compiled() -> Callable[..., Any]:
        if auto:  # a named one's start has seen to it
            refuse_foreign_headers()
        return inductor.compile_target(module, forward, kwargs, regional=regional)

    code = f"{name}-cuda-graphs" if auto and cuda_graphs else f"{name}-compiled"
    backend = inductor.TorchCompile(code, compiled, cuda_graphs=cuda_graphs, is_compared=auto)
    if config.export.aot_compile:
        return backend
    if device.type == "cuda":
        _to_channels_last(module)
    if auto:
        return backend
    try:
        _ = backend.compiled
    except (TypeError, ValueError, RuntimeError) as error:
        return Precompiled("compiled", reason=f"torch.compile refused its arguments: {error}")
    return backend


def _openvino(name: str, module: nn.Module, config: Pt2Config, device: torch.device) -> Backend:
    if (missing := openvino.why_not(device, config)) is not None:
        return Precompiled("openvino", reason=missing)
    properties = openvino.cpu_properties(thawed(config.compile.kwargs).get("options") or {})
    return openvino.OpenVINO(name, module, properties)


def _ipex(
    name: str, module: nn.Module, config: Pt2Config, dtype: torch.dtype, device: torch.device
) -> Backend:
    missing = ipex.why_not(device, config)
    if missing is None:
        try:
            _to_channels_last(module)
            return ipex.Ipex(name, module, dtype)
        except Exception as error:  # whatever Intel's code meets in a module that it does not know
            logger.exception("%s: ipex failed", name)
            missing = f"ipex: {type(error).__name__}: {error}".strip()
    return Precompiled("ipex", reason=missing)


def _eager(module: nn.Module, config: Pt2Config, device: torch.device) -> Backend:
    """On a CPU, convolutions have channels_last weights: bfloat16 ResNets 1.2, UNets 1.1 times
    faster (bench/results/cpu.json).

    Not where packages are expected, which are given the same weights and were compiled for their
    plain layout.
    """
    if device.type == "cpu" and not config.export.aot_compile:
        _to_channels_last(module)
    return Precompiled("eager", reason=config.compile.warning)


def _has_convolutions(module: nn.Module) -> bool:
    return any(isinstance(part, CONVOLUTIONS) for part in module.modules())


def _to_channels_last(module: nn.Module) -> None:
    """Weights in channels_last, where the module has convolutions."""
    if _has_convolutions(module):
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def uses_cuda_graphs(kwargs: Mapping[str, Any], device: torch.device) -> bool:
    """Whether these torch.compile arguments record CUDA graphs (torch/_inductor/__init__.py,
    list_mode_options).
    """
    options = kwargs.get("options") or {}
    recorded = kwargs.get("mode") in ("reduce-overhead", "max-autotune") or options.get(
        "triton.cudagraphs", False
    )
    return device.type == "cuda" and bool(recorded)
