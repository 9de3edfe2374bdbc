"""What `preheat check` says of a YAML that can be served."""

from __future__ import annotations

from math import prod

from preheat.config.model import ModelConfig


def num_graphs(config: ModelConfig) -> int | None:
    """At most so many graphs are compiled at a start; None where nothing bounds them.

    As in docs/operations.md: buckets x (the denoiser's batches x guidance + 1 for each VAE target),
    since the VAE takes one picture at a time.
    """
    shapes, compile_ = config.pt2.shapes, config.pt2.compile
    if not compile_.enable:
        return 0
    if shapes.strategy == "exact" or (config.module is not None and not config.module.inputs):
        return None
    openvino = compile_.kwargs.get("backend") == "openvino"
    guided = config.module is None and config.pipeline.guidance == "on"
    if shapes.invariant:
        batches = 1
    elif shapes.batch_sizes == "dynamic":
        # Dynamo takes one row for a case of its own; with guidance there is never one alone.
        batches = 1 if openvino or guided or config.batchSize == 1 else 2
    else:
        batches = len(shapes.batch_sizes)
    if config.module is not None:
        return batches * prod(len(sizes) for sizes in config.module.choices.values())
    targets = config.pt2.targets or ("unet",)
    vae = sum(name.startswith("vae.") for name in targets)
    both = config.pipeline.guidance == "both" and shapes.batch_sizes != "dynamic"
    denoiser = batches * (2 if both else 1) if vae < len(targets) else 0
    sizes = 1 if shapes.strategy == "dynamic" else max(1, len(shapes.buckets))
    return sizes * (denoiser + vae)


def summary(config: ModelConfig, place: str | None) -> str:
    """One line: where the model lies, what compiles it, and how many graphs that takes."""
    kwargs, graphs = config.pt2.compile.kwargs, num_graphs(config)
    engine = str(kwargs.get("backend", "inductor")) if config.pt2.compile.enable else "eager"
    compiled = {0: "nothing is compiled", None: "requests wait for the compiler"}.get(
        graphs, f"{graphs} {'graph' if graphs == 1 else 'graphs'} at most"
    )
    return f"{config.family} {place or 'of a factory'}, {engine}, {compiled}"
