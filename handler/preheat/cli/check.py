"""What `preheat check` says of a YAML that can be served."""

from __future__ import annotations

from preheat.config.model import ModelConfig
from preheat.preflight.graphs import num_graphs


def summary(config: ModelConfig, place: str | None) -> str:
    """One line: where the model lies, what compiles it, and how many graphs that takes."""
    kwargs, graphs = config.pt2.compile.kwargs, num_graphs(config)
    engine = str(kwargs.get("backend", "inductor")) if config.pt2.compile.enable else "eager"
    compiled = {0: "nothing is compiled", None: "requests wait for the compiler"}.get(
        graphs, f"{graphs} {'graph' if graphs == 1 else 'graphs'} at most"
    )
    return f"{config.family.name} {place or 'of a factory'}, {engine}, {compiled}"
