"""Serves batches of unrelated requests with any module: pads inputs into a bucket, stacks rows, and
cuts each answer back to its own size.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from preheat.buckets import Bucket, combinations, joined, smallest_covering
from preheat.compilation.closeness import Closeness
from preheat.compilation.pace import Timing
from preheat.compilation.router import Router, every
from preheat.compilation.variants import Variant
from preheat.config.model import ModelConfig
from preheat.config.module import ModuleConfig, OutputConfig, is_mask
from preheat.device import DTYPES
from preheat.errors import ConfigError, ModelError, RequestError
from preheat.models.base import ModelRunner
from preheat.models.batching import Chunk, Exactness, Execution, RunReport
from preheat.models.module import padding_check, responses, tensors
from preheat.models.module.job import Answer, Job, Tensors
from preheat.models.module.padding_check import inside
from preheat.models.module.request import Accept, Reader, sizes_of
from preheat.models.module.tensors import TORCH_DTYPES, cut_to, pad_to
from preheat.protocol.call import Call
from preheat.protocol.responses import Response
from preheat.status import padding_warning

logger = logging.getLogger(__name__)


class ModuleRunner(ModelRunner[Job, Answer]):
    """A module that answers.

    Args:
        module: called with its inputs by name; its router stands in for its forward.
        config: its shapes are resolved.
        reader: reads its requests.
    """

    def __init__(
        self, execution: Execution, module: nn.Module, config: ModelConfig, reader: Reader
    ) -> None:
        self._own, self._shapes = config.section(ModuleConfig), config.pt2.shapes
        super().__init__(execution, buckets(self._own))
        self._module, self._reader, self._dtype = module, reader, DTYPES[self._own.dtype]
        self.padded: Exactness = "padded"
        """What an answer is whose inputs were padded, until `rounding` has been measured."""
        self.output_names = tuple(self._own.outputs)
        """Those of the YAML, else those of the last run; empty before it."""

    @property
    def _dynamic(self) -> bool:
        """Whether one graph serves every size between the buckets: then a run is as large as its
        largest row, and only what is under the smallest bucket is padded alone.
        """
        return self._shapes.strategy == "dynamic"

    def try_out(self) -> None:
        """Run it eagerly.

        Raises:
            ConfigError: it is not what the YAML says.
        """
        if not self._own.inputs:
            self._warn_of_unknown_ranges()
            return
        smallest = dict(self.buckets[-1].sizes)
        with every(self.execution.routers, Router.observing):
            self._try_ranges(smallest)
            if self._shapes.strategy == "exact":
                return
            first, second = (self.sample(smallest, seed) for seed in (0, 1))
            self._try_batches(first, second)
            self._measure_padding()

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
        base = self.sample(smallest, seed=0)
        for name, spec in self._own.inputs.items():
            # of floats too: a module may make indices of them
            for number in _tried(self._reader.ranges[name]) if name in self._reader.ranges else ():
                changed = base.inputs[name].clone()
                changed.view(-1)[0] = int(number) if spec.is_index else number
                job = replace(base, inputs={**base.inputs, name: changed})
                path = f"module.inputs.{name}.range"
                try:
                    error = self.alone(job).error
                except SystemExit as lost:  # CUDA asserts on the device, which is lost with it
                    raise ConfigError(f"{number:.15g} is not what it takes", path) from lost
                if error is not None:
                    raise ConfigError(
                        f"{number:.15g} is not what it takes in its smallest bucket: {error}", path
                    )

    def extremes(self, variants: Sequence[Variant]) -> list[Variant]:
        if self._dynamic:
            largest = [each for each in variants if each.bucket == variants[0].bucket]
            batches = largest if self._shapes.batch_sizes == "dynamic" else largest[:1]
            return [*batches, replace(batches[0], bucket=variants[-1].bucket)]
        if self._shapes.batch_sizes != "dynamic":
            return []
        smallest = [variant for variant in variants if variant.bucket == variants[-1].bucket]
        return [smallest[0], smallest[-1]]

    def between(self, variants: Sequence[Variant]) -> list[Variant]:
        if not self._dynamic:
            return []
        (name,) = self._own.choices
        middle = (self.buckets[0][name] + self.buckets[-1][name]) // 2
        found = (replace(each, bucket=Bucket(**{name: middle})) for each in variants)
        return list(dict.fromkeys(found))

    def run_variant(self, variant: Variant) -> Timing:
        """Run one variant as requests would, without padding and with: of a mask without zeros a
        model may make no mask at all.
        """
        for sizes in (dict(variant.bucket.sizes), inside(variant.bucket, self._own.choices)):
            jobs = [self.sample(sizes, seed) for seed in range(variant.batch_size)]
            answers, seconds = self.batches.timed(jobs)
            self._respond_in_every_form(answers[0])
        return Timing(0.0, seconds)

    def _respond_in_every_form(self, answer: Answer) -> None:
        """What encodes answers is warmed too; what it cannot encode shows now."""
        accepts = responses.ACCEPTS if len(answer.outputs) == 1 else responses.MANY_TENSORS
        self.postprocess(
            [replace(answer, job=replace(answer.job, accept=accept)) for accept in accepts]
        )

    def measure_padding(self) -> Mapping[str, float | str]:
        """Of the warm module; where padding changes more than rounding, the log says so."""
        found = padding_check.document(self._measure_padding())
        warning = padding_warning(found)
        if warning is not None:
            logger.warning("%s", warning)
        return found

    def _measure_padding(self) -> Sequence[Closeness]:
        found = padding_check.measure(self, self.buckets, self._own, self._dtype)
        self.padded = "rounding" if all(close.ok for close in found) else "padded"
        return found

    def prepare(self, inputs: Tensors, accept: Accept, deadline: float | None = None) -> Job:
        """Plan one request, which is as large as it may be (`tensors.Bounds`) or smaller.

        Raises:
            RequestError: two inputs disagree about a dimension.
        """
        if self._shapes.strategy == "exact":
            return Job(inputs, {}, None, accept, deadline=deadline)
        sizes = sizes_of(inputs, self._own.inputs)
        bucket = smallest_covering(self.buckets, Bucket(**sizes))
        if self._dynamic and bucket is not None:
            # Dynamo takes a size of 1 for a case of its own
            bucket = joined([Bucket(**sizes), self.buckets[-1], Bucket(**dict.fromkeys(sizes, 2))])
        return Job(inputs, sizes, bucket, accept, deadline=deadline, bypass=bucket is None)

    def sample(self, sizes: Mapping[str, int], seed: int) -> Job:
        """A job of these sizes whose inputs any module takes: noise, and whole numbers 0 and 1."""
        dice = torch.Generator().manual_seed(seed)
        made: dict[str, torch.Tensor] = {}
        for name, spec in self._own.inputs.items():
            dtype = tensors.TORCH_DTYPES[spec.dtype]
            shape = spec.row_shape(sizes)
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
        return self.prepare(made, "application/json")

    def example(self, bucket: Bucket, steps: int | None = None) -> Job:
        return self.sample(dict(bucket.sizes), seed=0)

    def alone(self, job: Job) -> Answer:
        """The job's answer as the module gives it eagerly and without padding: what a bucket's
        answer is compared with.
        """
        (answer,) = self.batches.run([replace(job, bucket=None, bypass=True)])
        return answer

    def _try_batches(self, one: Job, other: Job) -> None:
        """Run one request, and two of the same bucket in the smallest batch there is for them;
        errors are not kept to the requests.

        Raises:
            ConfigError: an output is no tensor of rows, one a request.
        """
        larger = [size for size in sorted(self.execution.batch_sizes) if size > 1][:1]
        for size in (1, *larger):
            self.run_chunk([(Answer(job), 0) for job in (one, other)[:size]], size)

    def preprocess(self, call: Call) -> Job:
        inputs, accept = self._reader.read(call.row, call.headers)
        names = self.output_names
        if accept == "application/x-npy" and len(names) > 1:
            raise responses.too_many_for_npy(names)
        job = self.prepare(inputs, accept, call.deadline)
        known = self._own.inputs or self._reader.ranges
        unbounded = any(_is_index(tensor) and name not in known for name, tensor in inputs.items())
        if unbounded and self.execution.device.type == "cuda":
            raise RequestError(
                "holds whole numbers of unknown range, and one outside its table would cost the "
                "GPU; declare module.inputs in the YAML",
                "body",
            )
        return replace(job, bypass=True) if unbounded else job

    def result(self, job: Job) -> Answer:
        return Answer(job)

    def groups(self, results: Sequence[Answer]) -> Iterable[list[Answer]]:
        """Whatever its size, a request may run in a larger bucket with others where padding changes
        nothing.
        """
        groups: dict[Hashable, list[Answer]] = {}
        shared = self.padded == "rounding" and not self._shapes.invariant
        for index, answer in enumerate(results):
            bucket = answer.job.bucket
            key: Hashable = ("alone", index) if bucket is None else "shared" if shared else bucket
            groups.setdefault(key, []).append(answer)
        for group in groups.values():
            # The large ones together: a run is as large as its largest row.
            yield sorted(group, key=lambda each: -each.job.bucket.volume if each.job.bucket else 0)

    def run_chunk(self, chunk: Chunk[Answer], size: int) -> RunReport:
        jobs = [answer.job for answer, _ in chunk]
        buckets = [job.bucket for job in jobs if job.bucket is not None]
        bucket = joined(buckets) if buckets else None
        batch = {name: self._stacked(name, jobs, bucket, size) for name in jobs[0].inputs}
        outputs, run = self.execution.run(
            lambda: self._named(self._module(**batch), size if bucket is not None else None),
            num_rows=size,
            num_real_rows=len(jobs),
            bypass=jobs[0].bypass,
        )
        self.output_names = tuple(outputs)
        for index, (answer, _) in enumerate(chunk):
            job = answer.job
            answer.ran_in = bucket
            answer.num_computed = sum(tensor.numel() // size for tensor in batch.values())
            answer.num_real = sum(tensor.numel() for tensor in job.inputs.values())
            answer.exact = self._exactness(answer)
            answer.outputs = {
                name: cut_to(
                    tensor[index : index + 1] if bucket else tensor, self._kept(name, job)
                ).clone()
                for name, tensor in outputs.items()
            }
        return run

    def _exactness(self, answer: Answer) -> Exactness:
        if answer.num_padding and self.padded == "padded":
            return "padded"
        return "bitwise" if self._shapes.invariant else "rounding"

    def _stacked(
        self, name: str, jobs: Sequence[Job], bucket: Bucket | None, size: int
    ) -> torch.Tensor:
        """One input of a run, on the device: the jobs' rows padded to the bucket, the first one
        repeated up to `size`.
        """
        rows = [job.inputs[name] for job in jobs]
        if bucket is not None:
            spec = self._own.inputs[name]
            shape = spec.row_shape(dict(bucket.sizes))
            rows = [pad_to(row, shape, spec.pad) for row in rows]
            rows += [rows[0]] * (size - len(rows))
        stacked = torch.cat(rows) if len(rows) > 1 else rows[0]
        dtype = self._dtype if stacked.is_floating_point() else stacked.dtype
        return stacked.to(self.execution.device, dtype)

    def _named(self, result: object, size: int | None) -> dict[str, torch.Tensor]:
        """The tensors of the module's answer to `size` rows, by name, on the CPU; None: a request
        by itself, whatever its rows.

        Raises:
            ConfigError, ModelError: it is not what can be served.
        """
        if isinstance(result, torch.Tensor):
            declared = list(self._own.outputs)
            found: dict[str, object] = {declared[0] if len(declared) == 1 else "output": result}
        elif isinstance(result, Mapping):
            found = dict(result)
        elif isinstance(result, (list, tuple)):
            found = {f"output_{index}": value for index, value in enumerate(result)}
        else:
            raise ModelError(
                f"the module returns a {type(result).__name__}; tensors, alone, listed or named, "
                "can be served"
            )
        wanted = self._own.outputs or {
            name: OutputConfig() for name, v in found.items() if isinstance(v, torch.Tensor)
        }
        tensors: dict[str, torch.Tensor] = {}
        for name in wanted:
            tensor = found.get(name)
            if not isinstance(tensor, torch.Tensor):
                raise ModelError(
                    f"the module returns no tensor {name!r}; it returns {', '.join(found)}"
                )
            _check_output(name, tensor, size)
            tensors[name] = tensor.cpu()
        return tensors

    def _kept(self, name: str, job: Job) -> dict[int, int]:
        spec = self._own.outputs.get(name)
        return (
            {dim: cut.size(job.sizes) for dim, cut in spec.cuts.items()}
            if spec and job.bucket is not None
            else {}
        )

    def postprocess(self, results: Sequence[Answer]) -> list[Response]:
        most = self._own.limits.max_response_bytes
        return [responses.from_answer(answer, most) for answer in results]


def buckets(own: ModuleConfig) -> tuple[Bucket, ...]:
    """Every one; none where the YAML declares no inputs."""
    return combinations(own.choices) if own.inputs else ()


def _tried(span: tensors.Span) -> list[float]:
    """Its ends and what is next to them and to 0: a range may begin with an `ignore_index`."""
    least, most = span
    near = {least, least + 1, -1.0, 0.0, most - 1, most}
    return sorted(number for number in near if least <= number <= most)


def _is_index(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() and tensor.dtype is not torch.bool


def _check_output(name: str, tensor: torch.Tensor, size: int | None) -> None:
    """Rows are the requests': of anything else, one client would get what is another's."""
    path = f"module.outputs.{name}"
    if tensor.dtype not in TORCH_DTYPES.values():
        raise ConfigError(
            f"is {str(tensor.dtype).removeprefix('torch.')}, which no answer can hold", path
        )
    if size is not None and (tensor.dim() == 0 or tensor.shape[0] != size):
        shape = tuple(tensor.shape)
        raise ConfigError(
            f"has shape {shape} for a batch of {size}; its first dimension must be the batch", path
        )
