"""What goes wrong in production, one function a matter. Each is pure: what it needs of the world is
in the context.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from preheat.cache.trust import KEY_FILE_VARIABLE, Trust
from preheat.config.diffusion import PipelineConfig
from preheat.errors import ConfigError, Untrusted
from preheat.planning.strategies import GRAPH_BYTES
from preheat.preflight.facts import Context
from preheat.preflight.findings import Finding, register
from preheat.preflight.graphs import num_graphs

MIB = 2**20
GRAPH_SECONDS = {"openvino": 3.0, "inductor-cpu": 30.0, "inductor-gpu": 90.0}
"""Of one graph at a cold start (docs/operations.md, Sizing); other backends hardly compile."""
_OTHER_SECONDS = 5.0
_DISK_PER_GRAPH = 50 * MIB
"""Of Inductor's folder, generously: sources, objects and records of one graph."""
_STARTUP_TIMEOUT = _RESPONSE_TIMEOUT = 120
"""TorchServe's own, in seconds."""
_MAX_RESPONSE_SIZE = _MAX_REQUEST_SIZE = 6_553_500
"""TorchServe's own, in bytes."""


@register
def yaml(context: Context) -> Iterator[Finding]:
    """What the YAML itself warns of."""
    for warning in context.config.warnings:
        yield Finding(warning, "it loads, and is hardly meant", "as it says", blocks=False)


@register
def load(context: Context) -> Iterator[Finding]:
    """The model loads as a worker would load it."""
    model = context.model
    if model is None or model.refusal is None:
        return
    what = f"{model.path}: {model.refusal}" if model.path else model.refusal
    yield Finding(what, "no worker would get READY", remedy_for(model.path))


def remedy_for(path: str) -> str:
    """What to do about a YAML path that was refused, beside what the refusal says."""
    if path == "pt2.shapes.fit":
        return "pt2: {shapes: {fit: pad}}"
    return f"change {path} as it says" if path else "give another model folder, or mend this one"


@register
def device(context: Context) -> Iterator[Finding]:
    """The GPUs that the YAML names are there, and torch can use them."""
    config, gpus = context.config, len(context.machine.gpus)
    wanted = config.deviceIds or ((0,) if config.deviceType == "gpu" else ())
    missing = [str(number) for number in wanted if number >= gpus]
    if config.deviceType == "cpu" or not missing:
        return
    built = context.machine.cuda
    why = f"torch {context.machine.torch} {'sees' if built else 'is built without CUDA and sees'}"
    yield Finding(
        f"deviceIds: GPU {', '.join(missing)} cannot be used here: {why} {gpus} GPUs",
        "the worker refuses to start rather than serve on a CPU",
        "deviceType: cpu (and no deviceIds), or a torch with CUDA: pip install torch "
        "--index-url https://download.pytorch.org/whl/cu128",
    )


@register
def compiler(context: Context) -> Iterator[Finding]:
    """There is something to compile with."""
    missing = context.model.missing if context.model is not None else None
    if missing is None or "not installed" in missing:
        return
    command = (
        "apt-get install g++ (on a GPU: gcc)"
        if "no compiler" in missing
        else "pt2: {compile: {enable: true, backend: inductor}}"
    )
    yield Finding(missing, "every bucket would be served eagerly", command)


@register
def extras(context: Context) -> Iterator[Finding]:
    """The optional packages that the YAML needs are installed."""
    config, family = context.config, context.config.family
    lora = isinstance(family, PipelineConfig) and family.fused_lora is not None
    needed = {
        "openvino": ("openvino", config.pt2.openvino, "pt2.compile.backend: openvino"),
        "peft": ("lora", lora, "pipeline.fused_lora"),
    }
    for package, (extra, is_needed, path) in needed.items():
        if is_needed and package not in context.machine.packages:
            yield Finding(
                f"{path} needs the package {package}, which is not installed",
                "every bucket would be served eagerly"
                if package == "openvino"
                else "no worker would get READY",
                f"pip install 'preheat[{extra}]'",
            )


@register
def attention(context: Context) -> Iterator[Finding]:
    """cuDNN's attention compiles its kernels when it meets a shape, with NVIDIA's libnvrtc."""
    if context.config.pt2.attention != "cudnn":
        return
    if not context.on_gpu:
        yield Finding(
            "pt2.attention: cudnn, and the worker has no GPU",
            "scaled_dot_product_attention would have no kernel",
            "pt2: {attention: default}",
        )
    elif not context.machine.nvrtc:
        yield Finding(
            "pt2.attention: cudnn, and libnvrtc cannot be loaded",
            "cuDNN compiles its attention kernels with it, and would find none",
            "pip install nvidia-cuda-nvrtc-cu12, or pt2: {attention: default}",
        )


@register
def graph_breaks(context: Context) -> Iterator[Finding]:
    """Each target is one graph."""
    model, pt2 = context.model, context.config.pt2
    if model is None:
        return
    exports = pt2.openvino or pt2.export.aot_compile or bool(pt2.compile.kwargs.get("fullgraph"))
    why = (
        "it cannot be exported with a break in it, and is served eagerly"
        if exports
        else "each part is a graph of its own, with Python between: slower, and more to guard"
    )
    for each in model.breaks:
        yield Finding(
            f"{each.target}: graph break at {each.where or 'an unknown place'}: {each.reason}",
            why,
            "say it in tensors (torch.where for an if), or make it a torch.library.custom_op "
            "(docs/modules.md); pt2: {debug: {graph_breaks: true}} logs it all",
            blocks=exports,
        )
    for target, reason in model.failures.items():
        yield Finding(
            f"{target} cannot be traced: {reason}",
            "it would be served eagerly",
            "mend the code that it names, or leave the target out: pt2: {targets: [...]}",
        )


@register
def guards(context: Context) -> Iterator[Finding]:
    """What was warmed stays warm when more requests come."""
    for each in context.model.guards if context.model is not None else ():
        yield Finding(
            f"{each.target}: a guard fails when the warmed call comes again: {each.condition}",
            "what it guards would run eagerly in each request (incidents in the state)",
            "keep what changes from call to call out of forward's Python state: a registered "
            "buffer, or an input",
            blocks=context.config.pt2.on_failure == "fail",
        )


@register
def cache_folder(context: Context) -> Iterator[Finding]:
    """Compiled code is believed, and nobody else can write it."""
    cache = context.config.pt2.cache
    if cache.shared is None:
        return
    try:
        Trust.resolve(cache.trust, context.environ).check_folder(Path(cache.shared))
    except ConfigError as error:
        yield Finding(
            str(error), "no worker would get READY", f"export {KEY_FILE_VARIABLE}=/a/key/file"
        )
    except Untrusted as error:
        yield Finding(
            f"pt2.cache.shared: {cache.shared}: {error}",
            "who writes there runs code in the worker, so nothing in it is believed, and every "
            "start compiles",
            f"chmod go-w {cache.shared}; or sign what lies there: pt2: {{cache: {{trust: signed}}}}"
            f" with {KEY_FILE_VARIABLE}",
        )
    except OSError as error:
        yield Finding(
            f"pt2.cache.shared: {cache.shared}: {error.strerror}",
            "nothing is shared, and every start compiles",
            f"mkdir -p -m 755 {cache.shared}",
        )


@register
def key_file(context: Context) -> Iterator[Finding]:
    """The key that signs compiled code is the workers' alone."""
    name = context.environ.get(KEY_FILE_VARIABLE)
    if name is None or not os.path.exists(name):
        return
    mode = stat.S_IMODE(os.stat(name).st_mode)
    if mode & (stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP):
        yield Finding(
            f"{KEY_FILE_VARIABLE}: {name} can be read or written by others (mode {mode:o})",
            "who has the key can sign code that every worker runs",
            f"chmod 600 {name}; and make a new key: openssl rand -hex 32 > {name}",
        )


@register
def startup(context: Context) -> Iterator[Finding]:
    """startupTimeout is enough for a cold start, twice over."""
    config, graphs = context.config, num_graphs(context.config)
    if not graphs or config.pt2.export.aot_compile:
        return
    warm, source = measured_warm_up(context.state), "measured"
    if warm is None:
        warm, source = cold_start_seconds(context), f"{graphs} graphs, by docs/operations.md"
    timeout, needed = config.startupTimeout or _STARTUP_TIMEOUT, 2 * warm
    if timeout >= needed:
        return
    asked = 100 * math.ceil(needed / 100)
    yield Finding(
        f"startupTimeout: {timeout} s, and a cold start compiles for about {warm:.0f} s ({source})",
        "TorchServe ends a worker that compiles for longer, again and again",
        f"startupTimeout: {asked}\nmaxRetryTimeoutInSec: {4 * asked}",
    )


def cold_start_seconds(context: Context) -> float:
    """To compile all graphs, as they are documented."""
    backend = context.config.pt2.compile.for_inductor.get("backend", "inductor")
    if backend == "inductor":
        backend += "-gpu" if context.on_gpu else "-cpu"
    return (num_graphs(context.config) or 0) * GRAPH_SECONDS.get(backend, _OTHER_SECONDS)


def measured_warm_up(state: Any) -> float | None:
    """Seconds that a worker's start compiled; None where a cache had some of it."""
    rows = state.get("buckets", []) if state is not None else []
    if not rows or any(row.get("cache") in ("hit", "partial") for row in rows):
        return None
    by_run = {(row["bucket"], row["batch_size"]): row["warm_seconds"] for row in rows}
    return float(sum(by_run.values())) or None


@register
def answer_time(context: Context) -> Iterator[Finding]:
    """A batch of the dearest requests that are legal ends within responseTimeout."""
    config, own = context.config, context.config.family
    if context.state is None or not isinstance(own, PipelineConfig):
        return
    rates = [rate for row in context.state.get("buckets", []) if (rate := pixel_rate(row))]
    areas = [bucket.volume for bucket in config.pt2.shapes.buckets]
    most = max(areas, default=0) * own.limits.max_steps * own.limits.max_images
    cost, timeout = own.limits.max_cost or most, config.responseTimeout or _RESPONSE_TIMEOUT
    if not rates or not cost:
        return
    seconds = config.batchSize * cost * max(rates)
    if seconds > timeout:
        fits = int(timeout / 1.5 / config.batchSize / max(rates))
        yield Finding(
            f"pipeline.limits: {config.batchSize} legal requests can take {seconds:.0f} s "
            f"(measured), responseTimeout is {timeout} s",
            "some of them are told to come again (503)",
            f"pipeline: {{limits: {{max_cost: {fits}}}}}, or responseTimeout: "
            f"{math.ceil(1.5 * seconds)}",
        )


def pixel_rate(row: Any) -> float:
    """Seconds a step, picture and pixel, of a row of a worker's state."""
    height, _, width = str(row["bucket"]).partition("x")
    if not (height.isdigit() and width.isdigit()):
        return 0.0
    seconds = float(row.get("seconds_per_step") or 0)
    return seconds / int(row["batch_size"]) / int(height) / int(width)


@register
def response_size(context: Context) -> Iterator[Finding]:
    """The server lets the largest legal answer through, and the largest legal request in."""
    limits: Any = getattr(context.config.family, "limits", None)
    if limits is None:
        return
    name = context.config.family.name
    answer = getattr(limits, "max_response_bytes", 0)
    most = int(context.server.get("max_response_size", _MAX_RESPONSE_SIZE))
    if answer > most:
        yield Finding(
            f"{name}.limits.max_response_bytes: {answer} is over the server's max_response_size, "
            f"{most}",
            "an answer between the two ends the worker, and its whole batch with it",
            f"{name}: {{limits: {{max_response_bytes: {most}}}}}, or in config.properties "
            f"max_response_size={answer}",
        )
    image = getattr(limits, "max_image_bytes", 0)
    needed = -(-4 * image // 3)  # as base64
    most = int(context.server.get("max_request_size", _MAX_REQUEST_SIZE))
    if needed > most:
        yield Finding(
            f"{name}.limits.max_image_bytes: {image} as base64 is over the server's "
            f"max_request_size, {most}",
            "such a request has its connection reset, without an answer that says why",
            f"{name}: {{limits: {{max_image_bytes: {3 * most // 4}}}}}, or in config.properties "
            f"max_request_size={needed}",
            blocks=False,
        )


@register
def packages(context: Context) -> Iterator[Finding]:
    """Packages that were compiled ahead of time are of this machine, these versions, this YAML."""
    if context.model is not None and context.model.stale is not None:
        yield Finding(
            context.model.stale,
            "the worker compiles at its start after all",
            "build the archive anew where it will run: make archive CONFIG=... AOT=1; or compile "
            "at the start: pt2: {export: {aot_compile: false}}",
        )


@register
def memory(context: Context) -> Iterator[Finding]:
    """All workers' weights and graphs fit into memory."""
    config, graphs, weights = context.config, num_graphs(context.config), context.weight_bytes
    gpus, machine = context.machine.gpus, context.machine
    has = (gpus[0] if gpus else 0) if context.on_gpu else machine.memory_bytes
    share = (
        max(1, context.num_workers // max(1, len(gpus)))
        if context.on_gpu
        else (context.num_workers)
    )
    if not graphs or not weights or not has:
        return
    buckets = max(1, len(config.pt2.shapes.buckets))
    per_bucket = weights if config.pt2.openvino else graphs * GRAPH_BYTES // buckets
    needed = share * (weights + buckets * per_bucket)
    if needed <= has:
        return
    fit = max(0, (has // share - weights) // per_bucket)
    yield Finding(
        f"pt2.shapes.buckets: weights and code of {buckets} buckets take about "
        f"{needed // MIB} MiB in {share} workers, and there are {has // MIB}",
        "the worker would be killed, or run out of memory in warm-up",
        f"keep {fit} of the buckets (preheat plan --max-buckets {fit})"
        if fit
        else "fewer workers (minWorkers), or a machine with more memory",
    )


@register
def disk(context: Context) -> Iterator[Finding]:
    """There is room for what is compiled, and for what `pt2.debug` writes."""
    pt2, environ = context.config.pt2, context.environ
    graphs = 0 if pt2.openvino else num_graphs(context.config) or 0
    local = environ.get("TORCHINDUCTOR_CACHE_DIR") or environ.get("TMPDIR") or "/tmp"
    places = {
        "the compile cache": (pt2.cache.shared or local, graphs * _DISK_PER_GRAPH),
        "pt2.debug.trace_dir": (pt2.debug.trace_dir, pt2.debug.trace_bytes),
    }
    for name, (place, needed) in places.items():
        free = context.free_bytes(Path(place).absolute()) if place is not None else needed
        if free < needed:
            yield Finding(
                f"{name}, {place}: {free // MIB} MiB are free, and about {needed // MIB} are "
                "wanted",
                "what is compiled is not kept, or not compiled at all",
                f"free some of it (du -xh {place} | sort -h | tail), or name another disk: "
                + (
                    "pt2: {debug: {trace_dir: ...}}"
                    if name.startswith("pt2")
                    else "pt2: {cache: {shared: ...}} or TORCHINDUCTOR_CACHE_DIR"
                ),
            )


@register
def long_prompts(context: Context) -> Iterator[Finding]:
    """The prompts that were given are read to their ends."""
    own, model = context.config.family, context.model
    cut = [number for number in model.dropped if number] if model is not None else []
    if not cut or not isinstance(own, PipelineConfig) or own.limits.long_prompts == "reject":
        return
    assert model is not None
    yield Finding(
        f"{len(cut)} of {len(model.dropped)} prompts are longer than the text encoders read, by up "
        f"to {max(cut)} tokens",
        "what is past it changes nothing in the picture; the answer says how much was dropped, "
        "which few read",
        "pipeline: {limits: {long_prompts: reject}}, which is a 400 that says so",
        blocks=False,
    )


@register
def slow_dtype(context: Context) -> Iterator[Finding]:
    """The CPU has instructions for what is computed in."""
    name, dtype = context.config.family.name, context.config.family.dtype
    if dtype == "bfloat16" and not context.on_gpu and not context.machine.bfloat16:
        yield Finding(
            f"{name}.dtype: this CPU has no instructions for bfloat16",
            "it is slower than float32",
            f"{name}: {{dtype: float32}}",
            blocks=False,
        )
