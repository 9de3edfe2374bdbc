"""OpenVINO models made in warm-up from `torch.export`: one per target and bucket, for every batch
size of it.

The package `openvino` does the compiling (`pt2.compile.backend: openvino`); Dynamo is never
entered. As with a package of `aot`, a model serves only the calls that it `matches`, and only after
its result was compared with eager.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from preheat.compilation.backends.base import CompiledCode, EngineName, RoadName
from preheat.compilation.backends.openvino_graphs import (
    Graph,
    KeptGraphs,
    converted,
    give_weights,
    import_openvino,
    unseen,
    weights_of,
)
from preheat.compilation.export import call_key, tensors
from preheat.compilation.signatures import DynamicDims, Inputs, tensor_shapes
from preheat.config.pt2 import Pt2Config

PRECISION = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
"""By the least dtype of a module's weights."""


class OpenVINO:
    """A target's models. `torch.compile(backend="openvino")` fails on recent torch; this goes
    through `torch.export` instead.
    """

    engine: EngineName = "openvino"
    road: RoadName = "openvino"
    wants_every_size = True  # it chooses its kernels at the first call of a size
    reason: str | None = None
    dims: DynamicDims | None = None
    idle = False

    def __init__(self, name: str, module: nn.Module, properties: Mapping[str, Any]) -> None:
        self._name, self._module, self._properties = name, module, properties
        self._kept: KeptGraphs | None = None
        self.models: list[Model] = []

    def keep_in(self, folder: Path, context: str) -> None:
        """Read converted graphs from this folder, whose files are believed, and put new ones there.

        Args:
            context: all that a graph depends on but the call, such as a fingerprint.
        """
        self._kept = KeptGraphs(folder, f"{context}, {self._name}")

    def code_for(self, inputs: Inputs, dims: DynamicDims) -> CompiledCode:
        for model in self.models:
            if model.matches(inputs):
                return model
        name = f"{self._name}-openvino-{len(self.models)}"
        model = Model(name, self._module, inputs, dims, self._properties, self._kept)
        self.models.append(model)
        return self.models[-1]


class Model:
    """A compiled model, called as the module is that it was made from. Weights that it lays out
    anew are copies of its own, the others the module's.

    Args:
        name: for the log.
        module: the target.
        inputs: a call of it.
        dims: the dimensions that vary; static where that is more than a batch size, or where it is
            1 in `inputs`, which torch.export would hold to be the only one.
        properties: of OpenVINO's CPU plugin; see `cpu_properties`. The precision is added: that of
            the module's weights now.
        kept: where its graph may lie already.

    Raises:
        Exception: of any type: it cannot be exported, converted or compiled.
    """

    engine: EngineName = "openvino"
    is_compared = True

    def __init__(
        self,
        name: str,
        module: nn.Module,
        inputs: Inputs,
        dims: DynamicDims,
        properties: Mapping[str, Any],
        kept: KeptGraphs | None = None,
    ) -> None:
        self._openvino = openvino = import_openvino()
        self.name, self.dims = name, _batch_alone(dims, inputs)
        self._key = call_key(*inputs, self.dims)
        graph = self._graph(module, inputs, kept)
        self._returns = pytree.treespec_loads(graph.returns)
        model = graph.model
        # Their memory is the model's too. `Module.to` gives a parameter other memory, so the
        # parameter itself would not keep it.
        self._weights = weights_of(module)
        give_weights(model, self._weights)
        shapes = [self._bounds(path, shape) for path, shape in tensor_shapes(*inputs).items()]
        model.reshape(dict(enumerate(shapes)))
        self._num_outputs = len(model.outputs)
        self._converted = model
        self.request = (
            openvino.Core()
            .compile_model(model, "CPU", {**_precision(module), **properties})
            .create_infer_request()
        )

    def _graph(self, module: nn.Module, inputs: Inputs, kept: KeptGraphs | None) -> Graph:
        if kept is None:
            return converted(module, inputs, self.dims)
        key = f"{self._key} {unseen(module)}"
        graph = kept.read(key, weights_of(module))
        if graph is None:
            graph = converted(module, inputs, self.dims)
            kept.write(key, graph)
        return graph

    def matches(self, inputs: Inputs) -> bool:
        return call_key(*inputs, self.dims) == self._key

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for index, tensor in enumerate(tensors(args, kwargs)):
            self.request.set_input_tensor(index, self._lent(tensor))
        self.request.infer()
        outputs = [
            _taken(self.request.get_output_tensor(index)) for index in range(self._num_outputs)
        ]
        return pytree.tree_unflatten(outputs, self._returns)

    def _bounds(self, path: str, shape: tuple[int, ...]) -> Any:
        """The converter leaves every size open; those that are known make faster code."""
        spans = self.dims.ranges.get(path, {})
        sizes = [
            self._openvino.Dimension(*spans.get(dim, (size, size)))
            for dim, size in enumerate(shape)
        ]
        return self._openvino.PartialShape(sizes)

    def _lent(self, tensor: torch.Tensor) -> Any:
        """The tensor's own memory as OpenVINO takes it; numpy has no bfloat16."""
        openvino = self._openvino
        if tensor.dtype != torch.bfloat16:
            return openvino.Tensor(tensor.numpy(), shared_memory=True)
        return openvino.Tensor(
            tensor.view(torch.int16).numpy(), openvino.Shape(tensor.shape), openvino.Type.bf16
        )


def why_not(device: torch.device, config: Pt2Config) -> str | None:
    """Why it cannot serve here, or None."""
    if device.type != "cpu":
        where = f"this worker's device is {device}"
        return f"openvino serves on the CPU, and {where}; use backend: inductor"
    for path, reason in config.against_openvino.items():
        return f"{path}: {reason}"
    try:
        import_openvino()
        cpu_properties(config.compile.kwargs.get("options") or {})
    except (ImportError, ValueError) as error:
        return f"openvino: {error}"
    return None


def cpu_properties(options: Mapping[str, Any]) -> dict[str, Any]:
    """OpenVINO's properties for a model on this worker's share of the cores.

    Args:
        options: `pt2.compile.options` as OpenVINO documents them for torch.compile: `device` (CPU),
            `config` (properties, which go over ours), `model_caching` and `cache_dir`.

    Raises:
        ValueError: an option that has no meaning here.
    """
    unknown = options.keys() - {"device", "config", "model_caching", "cache_dir"}
    if unknown:
        raise ValueError(
            f"unknown option {', '.join(sorted(unknown))}; known: device, config, model_caching, "
            "cache_dir"
        )
    if str(options.get("device", "CPU")).upper() != "CPU":
        raise ValueError(f"option device is {options['device']}, and only CPU is served")
    config = options.get("config") or {}
    if not isinstance(config, Mapping):
        raise ValueError(f"option config is no mapping of properties: {config!r}")  # noqa: TRY004  as every option
    cached = (
        {"CACHE_DIR": str(options.get("cache_dir", "cache"))}
        if options.get("model_caching")
        else {}
    )
    return {
        # one stream with all threads: a worker runs one batch at a time
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # each of several workers would pin its threads to the same first cores
        "ENABLE_CPU_PINNING": False,
        **cached,
        **config,
    }


def _precision(module: nn.Module) -> dict[str, Any]:
    """Said outright: on a CPU with bfloat16 instructions OpenVINO computes in bfloat16 whatever the
    model's dtype is.
    """
    dtypes = {weight.dtype for weight in module.parameters()}
    return {
        "INFERENCE_PRECISION_HINT": next(
            (hint for dtype, hint in PRECISION.items() if dtype in dtypes), "f32"
        )
    }


def _batch_alone(dims: DynamicDims, inputs: Inputs) -> DynamicDims:
    shapes = tensor_shapes(*inputs)
    spans = {path: dims.ranges[path] for path in shapes if path in dims.ranges}
    varying = {
        (span, shapes[path][dim]) for path, by_dim in spans.items() for dim, span in by_dim.items()
    }
    if len(varying) != 1 or any(size == 1 for _, size in varying):
        return DynamicDims()
    return DynamicDims(spans, least=1)


def _taken(tensor: Any) -> torch.Tensor:
    """A copy: the next inference writes over OpenVINO's own. Its numpy view of bfloat16 calls
    itself float16.
    """
    array = tensor.data
    if tensor.element_type.get_type_name() == "bf16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).clone()
    return torch.from_numpy(array).clone()
