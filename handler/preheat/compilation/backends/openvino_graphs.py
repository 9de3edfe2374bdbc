"""Graphs that OpenVINO's converter made of `torch.export`, without weights, and the folder that
they are kept in: converting is nineteen twentieths of making a model.

A graph holds no weights: where they were, it has parameters by their names, which are given the
memory of the loaded module's own. So one graph serves every fine-tune of a structure, as a package
of AOTInductor's does, and it takes a hundredth of a model's bytes.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.export.graph_signature import InputKind, TensorArgument
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from preheat.compilation.export import export
from preheat.compilation.signatures import DynamicDims, Inputs
from preheat.files import write_whole

logger = logging.getLogger(__name__)

_WEIGHT = "weight:"
_VERSIONED = {"torch", "diffusers", "transformers", "preheat"}
_FORMAT = 1
_TELLING = 4
"""So many random numbers are by chance as others once in billions, even in bfloat16."""
_SMALL = 2**16
"""Bytes of a weight up to which the converter is given another in its place."""


@dataclass(frozen=True, slots=True)
class Graph:
    """A converted graph.

    Args:
        model: OpenVINO's, with a parameter for each weight, after those of the call.
        returns: how its outputs are nested (torch.utils._pytree), as text.
        weights: dtype and shape by name.
    """

    model: Any
    returns: str
    weights: Mapping[str, tuple[str, tuple[int, ...]]]

    @property
    def is_whole(self) -> bool:
        """Whether it holds no weight's numbers."""
        names = {each.get_friendly_name() for each in self.model.get_parameters()}
        return all(_WEIGHT + name in names for name in self.weights)


class KeptGraphs:
    """A target's graphs in a folder, one file each.

    Args:
        folder: whose files are believed: ours alone to write, or unpacked from a signed bundle.
        context: all that a graph depends on but the call.
    """

    def __init__(self, folder: Path, context: str) -> None:
        version = import_openvino().__version__
        self._folder, self._context = folder, f"{context}, openvino {version}, {_FORMAT}"

    def read(self, key: str, weights: Mapping[str, torch.Tensor]) -> Graph | None:
        """The graph for this call on a module with these weights; None where there is none."""
        path = self._path(key)
        try:
            with path.open("rb") as file:
                header = json.loads(file.readline())
                xml, constants = file.read(header["xml"]), file.read()
            needed = {
                name: (kind, tuple(shape)) for name, (kind, shape) in header["weights"].items()
            }
            if any(name not in weights or _kind(weights[name]) != needed[name] for name in needed):
                raise ValueError("it was made for other weights")
            model = import_openvino().Core().read_model(xml, constants)
            logger.info("read the converted graph %s", path.name)
            return Graph(model, header["returns"], needed)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
            logger.warning("cannot use the converted graph %s: %s; converting", path, error)
            return None

    def write(self, key: str, graph: Graph) -> None:
        """Whole or not at all; what cannot be kept costs a warning and the next start's time."""
        if not graph.is_whole:
            logger.info("the graph holds weights of this model, and is not kept")
            return
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(self._path(key), _serialized(graph, self._folder))
        except (OSError, RuntimeError) as error:
            logger.warning("cannot keep a converted graph in %s: %s", self._folder, error)

    def _path(self, key: str) -> Path:
        digest = hashlib.sha256(f"{self._context}\0{key}".encode()).hexdigest()
        return self._folder / f"{digest[:32]}.graph"


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, not copied; one that has several names stands under each."""
    found = dict(module.named_parameters(remove_duplicate=False))
    found |= dict(module.named_buffers(remove_duplicate=False))  # type: ignore[arg-type]
    return {name: weight.detach() for name, weight in found.items()}


def unseen(module: nn.Module) -> str:
    """A digest of what a graph holds though neither weights nor classes tell of it: plain
    attributes, tensors that are not saved, and the code of parts that are none of the libraries'
    which a fingerprint knows by their versions.
    """
    found, saved = hashlib.sha256(), module.state_dict(keep_vars=True).keys()
    for name, part in module.named_modules():
        kind = type(part)
        found.update(f"{name}\0{kind.__module__}.{kind.__qualname__}\0".encode())
        if kind.__module__.partition(".")[0] not in _VERSIONED:
            found.update(_source(kind.__module__))
        for key, value in sorted(vars(part).items()):
            if isinstance(value, torch.Tensor):
                found.update(key.encode() + _bytes(value))
            elif _is_plain(value):
                found.update(f"{key}={value!r}\0".encode())
    for name, buffer in module.named_buffers():
        if name not in saved:
            found.update(name.encode() + _bytes(buffer))
    return found.hexdigest()


def _is_plain(value: object) -> bool:
    """Numbers, words and tuples of them; not where a model lies."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float) or (isinstance(value, str) and os.sep not in value)


def _source(module: str) -> bytes:
    file = getattr(sys.modules.get(module), "__file__", None)
    return Path(file).read_bytes() if file else b""


def converted(module: nn.Module, inputs: Inputs, dims: DynamicDims) -> Graph:
    """Export and convert one call of `module`.

    Raises:
        Exception: of any type: the exporter or the converter fails.
    """
    exported = export(module, inputs, dims)
    returns = pytree.treespec_dumps(exported.call_spec.out_spec)
    kinds = {name: _kind(weight) for name, weight in _used_weights(exported).items()}
    if any(isinstance(part, _BatchNorm) for part in module.modules()):
        # they are folded into convolutions, so the graph would hold numbers of both
        return Graph(_converted(exported, by_content=False), returns, kinds)
    with _told_apart(exported):
        graph = Graph(_converted(exported, by_content=True), returns, kinds)
    if graph.is_whole:
        return graph
    # computed with in the conversion: noise will not do
    return Graph(_converted(exported, by_content=False), returns, kinds)


def _converted(exported: torch.export.ExportedProgram, *, by_content: bool) -> Any:
    with _log_kept():
        model = import_openvino().convert_model(exported)
    _keep_tensors(model, exported)
    _take_weights(model, _used_weights(exported), by_content=by_content)
    return model


@contextmanager
def _log_kept() -> Iterator[None]:
    """The root logger is as before, whatever is raised: the converter sets its level to ERROR, adds
    a filter, and takes both back only where it succeeds (openvino/tools/ovc/convert.py).
    """
    root = logging.getLogger()
    level, filters, handlers = root.level, list(root.filters), list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.filters, root.handlers = filters, handlers


def give_weights(model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Put constants in the place of a graph's parameters for weights; their memory is not copied.

    Raises:
        KeyError: the module has no such weight.
    """
    for parameter in list(model.get_parameters()):
        name = parameter.get_friendly_name()
        if not name.startswith(_WEIGHT):
            continue
        weight = weights[name.removeprefix(_WEIGHT)]
        _replace(parameter, _constant(weight, tuple(parameter.get_output_shape(0))))
        model.remove_parameter(parameter)


def _used_weights(exported: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    """By name. Buffers that are not saved are no weights: they are the structure's."""
    used = {node.name for node in exported.graph.nodes if node.op == "placeholder" and node.users}
    signature = exported.graph_signature
    by_input = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names = (name for each, name in by_input.items() if each in used)
    return {name: exported.state_dict[name] for name in names if name in exported.state_dict}


@contextmanager
def _told_apart(exported: torch.export.ExportedProgram) -> Iterator[None]:
    """In here small weights are noise.

    The converter makes one constant of equal ones, such as the ones and zeros of fresh norms, and
    of the next model's they need not be equal. It copies some too: those are known by their bytes.
    """
    own = dict(exported.state_dict)
    with torch.inference_mode(False):
        for name, weight in _used_weights(exported).items():
            if weight.nbytes <= _SMALL and weight.is_floating_point():
                noise = torch.rand_like(weight, requires_grad=False)
                is_parameter = isinstance(weight, nn.Parameter)
                exported.state_dict[name] = (
                    nn.Parameter(noise, requires_grad=False) if is_parameter else noise
                )
    try:
        yield
    finally:
        exported.state_dict.update(own)


def _take_weights(model: Any, weights: Mapping[str, torch.Tensor], *, by_content: bool) -> None:
    """Put parameters in the place of the constants that are weights: that lie where one does, or
    hold what one does that is like no other.
    """
    openvino = import_openvino()
    by_place = {weight.data_ptr(): name for name, weight in weights.items()}
    by_bytes = {
        _bytes(weight): name
        for name, weight in weights.items()
        if by_content and _is_telling(weight)
    }
    found = []
    for node in model.get_ops():
        if node.get_type_name() != "Constant" or not node.get_byte_size():
            continue
        data = node.get_data()
        name = by_place.get(data.ctypes.data)
        if name is None and data.nbytes <= _SMALL:
            name = by_bytes.get(data.tobytes())
        if name is None:
            continue
        shape, kind = list(node.get_output_shape(0)), node.get_output_element_type(0)
        parameter = openvino.opset13.parameter(shape, kind, name=_WEIGHT + name)
        _replace(node, parameter)
        found.append(parameter)
    model.add_parameters(found)


def _is_telling(weight: torch.Tensor) -> bool:
    return weight.nbytes <= _SMALL and weight.numel() >= _TELLING


def _bytes(weight: torch.Tensor) -> bytes:
    return bytes(weight.detach().contiguous().flatten().view(torch.uint8).numpy())


def _replace(node: Any, other: Any) -> None:
    for target in node.output(0).get_target_inputs():
        target.replace_source_output(other.output(0))


def _constant(weight: torch.Tensor, shape: tuple[int, ...]) -> Any:
    """A constant on the weight's own memory where that is contiguous; numpy has no bfloat16."""
    openvino = import_openvino()
    flat = weight.contiguous().reshape(shape)
    if flat.dtype != torch.bfloat16:
        return openvino.opset13.constant(flat.numpy(), shared_memory=True)
    lent = openvino.Tensor(
        flat.view(torch.int16).numpy(), openvino.Shape(list(shape)), openvino.Type.bf16
    )
    return openvino.op.Constant(lent, shared_memory=True)


def _kind(weight: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    return str(weight.dtype), tuple(weight.shape)


def _serialized(graph: Graph, folder: Path) -> bytes:
    """A line of JSON, OpenVINO's XML, and what few constants there are."""
    with tempfile.TemporaryDirectory(dir=folder, suffix=".tmp") as scratch:
        xml, constants = Path(scratch, "graph.xml"), Path(scratch, "graph.bin")
        import_openvino().serialize(graph.model, xml, constants)
        text = xml.read_bytes()
        header = {"xml": len(text), "returns": graph.returns, "weights": dict(graph.weights)}
        return json.dumps(header).encode() + b"\n" + text + constants.read_bytes()


def _keep_tensors(model: Any, exported: torch.export.ExportedProgram) -> None:
    """Drop the parameters of plain values, such as `return_dict=False`: the export has settled what
    they are.

    Raises:
        RuntimeError: the converter made other parameters than the export has inputs.
    """
    specs = [
        spec for spec in exported.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT
    ]
    parameters = model.get_parameters()
    if len(specs) != len(parameters):
        raise RuntimeError(f"OpenVINO made {len(parameters)} parameters of {len(specs)} inputs")
    for spec, parameter in zip(specs, parameters, strict=True):
        if not isinstance(spec.arg, TensorArgument):
            model.remove_parameter(parameter)


def import_openvino() -> ModuleType:
    """OpenVINO's runtime and converter, without its telemetry: else each import and conversion
    would be reported over the network.

    Raises:
        ImportError: it is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        return importlib.import_module("openvino")
    except ModuleNotFoundError as error:
        raise ImportError("openvino is not installed (pip install openvino)") from error
