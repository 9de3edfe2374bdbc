"""How much a start compiles, as far as the YAML alone tells."""

from __future__ import annotations

from preheat.config.model import ModelConfig


def num_graphs(config: ModelConfig) -> int | None:
    """At most so many graphs are compiled at a start; None where nothing bounds them."""
    shapes, compile_ = config.pt2.shapes, config.pt2.compile
    if not compile_.enable:
        return 0
    if shapes.strategy == "exact":
        return None
    if shapes.invariant:
        batches = 1
    elif shapes.batch_sizes == "dynamic":
        # Dynamo takes one row for a case of its own; OpenVINO does not.
        several = compile_.kwargs.get("backend") == "openvino" or config.family.always_guided
        batches = 1 if several or config.batchSize == 1 else 2
    else:
        batches = len(shapes.batch_sizes)
    return config.family.num_graphs(config.pt2, batches)
