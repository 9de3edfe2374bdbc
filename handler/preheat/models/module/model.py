"""Any nn.Module as a family: requests for tensors, one variant a bucket and batch size, and what
padding does to the answers.
"""

from __future__ import annotations

import inspect
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from preheat.buckets import Bucket, combinations
from preheat.compilation.closeness import PADDED, compare
from preheat.compilation.pace import Budget, Timing
from preheat.compilation.router import Router
from preheat.compilation.variants import Variant
from preheat.config.model import ModelConfig
from preheat.config.module import ModuleConfig, is_mask
from preheat.config.places import model_place
from preheat.config.pt2 import ShapesConfig
from preheat.device import DTYPES
from preheat.errors import ConfigError, RequestError
from preheat.models.base import Manifest, ModelRunner
from preheat.models.batching import Exactness, RunReport
from preheat.models.module import loader, ranges, tensors
from preheat.models.module.request import ACCEPT, Accept, Reader
from preheat.models.module.runner import Answer, Job, ModuleEngine
from preheat.protocol.call import Call
from preheat.protocol.responses import Response, from_error, preheat_headers, texts

logger = logging.getLogger(__name__)

WHOLE = "model"
"""The target that is the module itself."""
MANY_TENSORS: Sequence[Accept] = ("application/json", "application/safetensors")
"""The forms that hold any number of outputs."""
ACCEPTS: Sequence[Accept] = (*MANY_TENSORS, "application/x-npy")
UNREADABLE = ("text", "accept")


class ModuleModel:
    """A module behind `base.LoadedModel`."""

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any,
        config: ModelConfig,
        device: torch.device,
    ) -> None:
        self._module, self._config, self._device = module, config, device
        self._own = config.section(ModuleConfig)
        # A module of unknown shapes is compiled as BaseHandler would: with torch.compile's own
        # defaults, whenever a request comes.
        unknown = {} if self._own.inputs else {"strategy": "exact"}
        self.shapes: ShapesConfig = config.pt2.shapes.model_copy(update=unknown)
        names = _arguments(module, self._own)
        self.reader = Reader(
            names,
            self._own.inputs or None,
            self._own.limits,
            _bounds(names, module, self._own, self.shapes),
            self.dtype,
            ranges.ranges(names, module, self._own),
            tokenizer,
        )
        self.sizes = _buckets(self._own)
        self.fields = (*names, *UNREADABLE)

    @classmethod
    def load(
        cls, config: ModelConfig, model_dir: Path, manifest: Manifest, device: torch.device
    ) -> ModuleModel:
        """Load the module, and its folder's tokenizer.

        Raises:
            ConfigError, ModuleError: it cannot be served as the YAML says.
        """
        own = config.section(ModuleConfig)
        module = loader.load(own, model_dir, manifest, device)
        tokenizer = None
        if own.path is not None:
            tokenizer = loader.load_tokenizer(model_place(own.path, model_dir, own))
        return cls(module, tokenizer, config, device)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self._own.dtype]

    def targets(self) -> dict[str, nn.Module]:
        return {name: self._target(name) for name in self._config.pt2.targets or (WHOLE,)}

    def _target(self, name: str) -> nn.Module:
        """The module itself (`model`), or one inside it by its dotted name.

        Raises:
            ConfigError: there is no such module.
        """
        if name == WHOLE:
            return self._module
        found: nn.Module | None = dict(self._module.named_modules()).get(name)
        if found is None:
            raise ConfigError(
                f"{type(self._module).__name__} has no module {name!r}", "pt2.targets"
            )
        return found

    def settings(self) -> Mapping[str, Any]:
        return {"module": self._own.model_dump(mode="json", include={"dtype", "inputs", "outputs"})}

    def structure(self) -> Mapping[str, Any]:
        """Classes and settings of every module in it, the shapes of its weights, and its
        transformers config.
        """
        config: Any = getattr(self._module, "config", None)
        settings = config.to_dict() if hasattr(config, "to_dict") else {}
        weights = {
            name: (tuple(tensor.shape), str(tensor.dtype))
            for name, tensor in self._module.state_dict().items()
        }
        return {"module": repr(self._module), "config": settings, "weights": weights}

    def runner(
        self, routers: Mapping[str, Router], report: Callable[[RunReport], None], budget: Budget
    ) -> ModuleRunner:
        """What serves it, tried eagerly: what the YAML says of inputs and outputs shows before
        anything is compiled.
        """
        engine = ModuleEngine(
            self._module,
            self._own,
            routers,
            self.shapes,
            max_rows=self._config.batchSize,
            device=self._device,
            attention=self._config.pt2.attention,
            report=report,
            budget=budget,
        )
        runner = ModuleRunner(engine, self._own, self.shapes, self.reader, self.dtype, self._device)
        runner.try_out(routers)
        return runner


class ModuleRunner(ModelRunner[Job, Answer]):
    """A module that answers: requests and variants become jobs for its engine."""

    def __init__(
        self,
        engine: ModuleEngine,
        own: ModuleConfig,
        shapes: ShapesConfig,
        reader: Reader,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._engine, self._own, self._shapes, self._device = engine, own, shapes, device
        self.unfit = engine.unfit
        self._reader, self._dtype = reader, dtype
        self._sizes = _buckets(own)

    def try_out(self, routers: Mapping[str, Router]) -> None:
        """Run it eagerly.

        Raises:
            ConfigError: it is not what the YAML says.
        """
        if not self._own.inputs:
            self._warn_of_unknown_ranges()
            return
        smallest = dict(self._sizes[-1].sizes)
        with ExitStack() as stack:
            for router in routers.values():
                stack.enter_context(router.observing())
            self._try_ranges(smallest)
            if self._shapes.strategy == "exact":
                return
            first, second = (self._prepared(smallest, seed) for seed in (0, 1))
            self._engine.try_batches(first, second)
            self._measured_padding()

    def _warn_of_unknown_ranges(self) -> None:
        unknown = [name for name in self._reader.names if name not in self._reader.ranges]
        if unknown:
            logger.warning(
                "module.inputs is not declared: a request with whole numbers for %s is served "
                "eagerly, since an index outside its table would end the worker; declare it, with "
                "its range, to have it compiled",
                " or ".join(unknown),
            )

    def _try_ranges(self, smallest: Mapping[str, int]) -> None:
        """Run the ends of every range eagerly, where an index outside its table is an error like
        any other.

        Raises:
            ConfigError: the module fails on one.
        """
        base = self._prepared(smallest, seed=0)
        for name, spec in self._own.inputs.items():
            # of floats too: a module may make indices of them
            for number in _tried(self._reader.ranges[name]) if name in self._reader.ranges else ():
                changed = base.inputs[name].clone()
                changed.view(-1)[0] = int(number) if spec.is_index else number
                job = replace(base, inputs={**base.inputs, name: changed})
                path = f"module.inputs.{name}.range"
                try:
                    error = self._engine.alone(job).error
                except SystemExit as lost:  # CUDA asserts on the device, which is lost with it
                    raise ConfigError(f"{number:.15g} is not what it takes", path) from lost
                if error is not None:
                    raise ConfigError(
                        f"{number:.15g} is not what it takes in its smallest bucket: {error}", path
                    )

    def variants(self, batch_sizes: Iterable[int]) -> tuple[Variant, ...]:
        descending = sorted(batch_sizes, reverse=True)
        return tuple(Variant(bucket, size) for bucket in self._sizes for size in descending)

    def extremes(self, variants: Sequence[Variant]) -> list[Variant]:
        if self._shapes.batch_sizes != "dynamic":
            return []
        smallest = [variant for variant in variants if variant.bucket == variants[-1].bucket]
        return [smallest[0], smallest[-1]]

    def run_variant(self, variant: Variant) -> Timing:
        """Run one variant as requests would, without padding and with: of a mask without zeros a
        model may make no mask at all.
        """
        for sizes in (dict(variant.bucket.sizes), _inside(variant.bucket, self._own.choices)):
            jobs = [self._prepared(sizes, seed) for seed in range(variant.batch_size)]
            began = time.perf_counter()
            answers = self._engine.run(jobs, retry=False)
            seconds = time.perf_counter() - began
            for answer in answers:
                answer.raise_if_failed()
            self._respond_in_every_form(answers[0])
        return Timing(0.0, seconds)

    def _respond_in_every_form(self, answer: Answer) -> None:
        """What encodes answers is warmed too; what it cannot encode shows now."""
        for accept in ACCEPTS if len(answer.outputs) == 1 else MANY_TENSORS:
            self._response(replace(answer, job=replace(answer.job, accept=accept)))

    def measure_padding(self) -> Mapping[str, Any]:
        """As `_measured_padding`, and said where it is more than rounding."""
        found = self._measured_padding()
        if found["exact"] == "padded":
            share = found["max_share"]
            how_far = (
                f"up to {share:.2g} of the largest magnitude"
                if isinstance(share, float)
                else "into what is not finite"
            )
            logger.warning(
                "padding changes answers by %s; a mask input with default: 1, padded with 0, "
                "would let the module see it",
                how_far,
            )
        return found

    def _measured_padding(self) -> Mapping[str, Any]:
        """How far padding takes an answer from that of the unpadded module run eagerly, in the
        smallest and the largest bucket.

        Raises:
            ConfigError: an output grows with the padding, and the YAML does not cut it.
        """
        found = []
        for sizes in {
            each for bucket in self._ends() for each in _measured(bucket, self._own.choices)
        }:
            job = self._prepared(dict(sizes), seed=0)
            (ours,), alone = self._engine.run([job]), self._engine.alone(job)
            for answer in (ours, alone):
                answer.raise_if_failed()
            for name, tensor in alone.outputs.items():
                _check_cut(name, ours.outputs[name], tensor, self._own)
                found.append(compare(ours.outputs[name], tensor, PADDED, self._dtype))
        exact: Exactness = "rounding" if all(close.ok for close in found) else "padded"
        self._engine.padded = exact
        if not all(math.isfinite(close.max_error) for close in found):  # JSON has no other numbers
            return {"max_error": "not finite", "max_share": "not finite", "exact": exact}
        return {
            "max_error": max((close.max_error for close in found), default=0.0),
            "max_share": round(max((close.share for close in found), default=0.0), 6),
            "exact": exact,
        }

    def _ends(self) -> tuple[Bucket, Bucket]:
        return self._sizes[0], self._sizes[-1]

    def alone(self, job: Job) -> Answer:
        """The job's answer without padding, eagerly; see `ModuleEngine.alone`."""
        return self._engine.alone(job)

    def preprocess(self, call: Call) -> Job:
        inputs, accept = self._reader.read(call.row, call.headers)
        names = self._engine.output_names
        if accept == "application/x-npy" and len(names) > 1:
            raise _too_many_for_npy(names)
        job = self._engine.prepare(inputs, accept, call.deadline)
        known = self._own.inputs or self._reader.ranges
        unbounded = any(_is_index(tensor) and name not in known for name, tensor in inputs.items())
        if unbounded and self._device.type == "cuda":
            raise RequestError(
                "holds whole numbers of unknown range, and one outside its table would cost the "
                "GPU; declare module.inputs in the YAML",
                "body",
            )
        return replace(job, planned_eager=True) if unbounded else job

    def inference(self, jobs: Sequence[Job]) -> list[Answer]:
        return self._engine.run(jobs)

    def postprocess(self, results: Sequence[Answer]) -> list[Response]:
        return [self._response(answer) for answer in results]

    def _response(self, answer: Answer) -> Response:
        """JSON, one .npy, or safetensors, as the request wished."""
        if answer.error is not None:
            return from_error(answer.error)
        facts = {
            "bucket": answer.bucket,
            "engine": answer.engine,
            "padding": round(answer.padding, 4),
            "exact": answer.exact,
        }
        headers = {"content-type": answer.job.accept, **preheat_headers(facts)}
        too_large = self._too_large(answer)
        if too_large is not None:
            return from_error(too_large)
        if answer.job.accept == "application/safetensors":
            return Response(200, tensors.to_safetensors(answer.outputs, texts(facts)), headers)
        if answer.job.accept == "application/x-npy":
            return _npy_response(answer.outputs, headers)
        lists = {name: tensors.to_lists(tensor) for name, tensor in answer.outputs.items()}
        return Response(200, tensors.dumps({"outputs": lists, **facts}), headers)

    def _too_large(self, answer: Answer) -> RequestError | None:
        """Why this answer is not encoded, or None: TorchServe ends a worker that answers more than
        max_response_size.
        """
        most, outputs = self._own.limits.max_response_bytes, answer.outputs.values()
        as_file = sum(tensor.nbytes for tensor in outputs)
        as_json = answer.job.accept == "application/json"
        size = sum(map(tensors.json_bytes, outputs)) if as_json and 26 * as_file > most else as_file
        if size <= most:
            return None
        what = (
            f"the answer has about {size} bytes, at most {most} are allowed "
            "(module.limits.max_response_bytes)"
        )
        if as_json and as_file <= most:
            return RequestError(
                f"{what}; ask for application/safetensors, {as_file} bytes", ACCEPT, code=406
            )
        return RequestError(what, "body", code=413)

    def _prepared(self, sizes: Mapping[str, int], seed: int) -> Job:
        """A job of these sizes whose inputs any module takes: noise, and whole numbers 0 and 1."""
        dice = torch.Generator().manual_seed(seed)
        made: dict[str, torch.Tensor] = {}
        for name, spec in self._own.inputs.items():
            dtype = tensors.TORCH_DTYPES[spec.dtype]
            shape = [
                1,
                *(
                    sizes[extent] if isinstance(extent, str) else extent
                    for extent in spec.shape[1:]
                ),
            ]
            if spec.default is not None:
                made[name] = torch.full(shape, spec.default, dtype=dtype)
            elif dtype.is_floating_point:
                made[name] = torch.randn(shape, generator=dice).to(dtype)
            elif is_mask(name):
                made[name] = torch.ones(shape, dtype=dtype)
            else:
                made[name] = torch.randint(0, 2, shape, generator=dice).to(dtype)
            if name in self._reader.ranges:
                made[name] = made[name].clamp(*self._reader.ranges[name]).to(dtype)
        return self._engine.prepare(made, "application/json")


def _buckets(own: ModuleConfig) -> tuple[Bucket, ...]:
    return combinations(own.choices) if own.inputs else ()


def _arguments(module: nn.Module, config: ModuleConfig) -> tuple[str, ...]:
    """The names of the module's inputs: the YAML's, which its forward must take, or all that its
    forward takes.

    Raises:
        ConfigError: the YAML names one that it does not take.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    known = tuple(
        each.name
        for each in parameters
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    )
    open_ended = any(each.kind is each.VAR_KEYWORD for each in parameters)
    for name in config.inputs:
        if name not in known and (known or not open_ended):
            raise ConfigError(
                f"{type(module).__name__}.forward takes no {name}; it takes {', '.join(known)}",
                f"module.inputs.{name}",
            )
    return tuple(config.inputs) or known


def _bounds(
    names: Sequence[str], module: nn.Module, config: ModuleConfig, shapes: ShapesConfig
) -> tensors.Bounds:
    largest = {name: max(sizes) for name, sizes in config.choices.items()}
    rejecting = shapes.oversize == "reject" and shapes.strategy != "exact"
    lengths = ranges.lengths(names, module)
    ranges.refuse_long_buckets(config, lengths)
    return tensors.Bounds(largest, rejecting, config.limits.max_elements, lengths)


def _tried(span: tensors.Span) -> list[float]:
    """Its ends and what is next to them and to 0: a range may begin with an `ignore_index`."""
    least, most = span
    near = {least, least + 1, -1.0, 0.0, most - 1, most}
    return sorted(number for number in near if least <= number <= most)


def _is_index(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() and tensor.dtype is not torch.bool


def _inside(bucket: Bucket, choices: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Sizes that are padded the most in this bucket: one more than the bucket below holds, or half
    of the smallest.
    """
    sizes = {}
    for name, size in bucket.sizes:
        below = max((other for other in choices[name] if other < size), default=None)
        sizes[name] = below + 1 if below is not None else max(1, size // 2)
    return sizes


def _measured(
    bucket: Bucket, choices: Mapping[str, Sequence[int]]
) -> list[tuple[tuple[str, int], ...]]:
    """Sizes to measure padding with: odd and even ones, since a module that halves them rounds one
    of the two up or down.
    """
    base = _inside(bucket, choices)
    beside = {
        name: size + 1 if size < bucket[name] else max(1, size - 1) for name, size in base.items()
    }
    return [tuple(base.items()), tuple(beside.items())]


def _check_cut(name: str, ours: torch.Tensor, alone: torch.Tensor, config: ModuleConfig) -> None:
    if ours.shape == alone.shape:
        return
    dims = [
        dim
        for dim, sizes in enumerate(zip(ours.shape, alone.shape, strict=False))
        if sizes[0] != sizes[1]
    ]
    what = f"is {tuple(ours.shape)} where the module without padding gives {tuple(alone.shape)}"
    if 0 in dims or ours.dim() != alone.dim():
        raise ConfigError(
            f"{what}; its first dimension must be the batch", f"module.outputs.{name}"
        )
    grown = ", ".join(f"{dim}: ..." for dim in dims)
    raise ConfigError(
        f"{what}; cut it: crop: {{{grown}}} with {' or '.join(config.choices)}, divided where the "
        "module shrinks it, rounded up",
        f"module.outputs.{name}.crop",
    )


def _npy_response(outputs: Mapping[str, torch.Tensor], headers: Mapping[str, str]) -> Response:
    if len(outputs) != 1:
        return from_error(_too_many_for_npy(list(outputs)))
    (tensor,) = outputs.values()
    return Response(200, tensors.to_npy(tensor), headers)


def _too_many_for_npy(names: Sequence[str]) -> RequestError:
    return RequestError(
        f"asks for an .npy file, which holds one tensor, and this model answers {', '.join(names)}",
        "accept",
        code=406,
    )
