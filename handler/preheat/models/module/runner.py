"""Serves batches of strangers with any module: pads inputs into a bucket, stacks rows, and cuts
each answer back to its own size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import nn

from preheat.buckets import Bucket, combinations, joined, smallest_covering
from preheat.compilation.pace import Budget, Load
from preheat.compilation.router import Router
from preheat.config.module import ModuleConfig, OutputConfig
from preheat.config.pt2 import ShapesConfig
from preheat.device import DTYPES
from preheat.errors import ConfigError, ModuleError
from preheat.models.batching import Batcher, Exactness, Outcome, RunReport
from preheat.models.module.request import Accept, sizes_of
from preheat.models.module.tensors import TORCH_DTYPES, cut_to, pad_to

logger = logging.getLogger(__name__)

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Job:
    """A request: one row of every input, in its own size."""

    inputs: Tensors = field(repr=False)
    """Each (1, ...)."""
    sizes: Mapping[str, int]
    """Of the bucketed dimensions."""
    bucket: Bucket | None
    """The smallest that holds it; None where it runs as it is, by itself."""
    planned_eager: bool = False
    """Outside every bucket on purpose (`oversize: eager`)."""
    accept: Accept = "application/json"
    deadline: float | None = None
    """Unix time in seconds after which nobody waits for the answer."""


@dataclass(slots=True)
class Answer(Outcome):
    """What one job got: `outputs` in its own size, (1, ...) each, on the CPU."""

    job: Job
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    ran_in: Bucket | None = None
    """The bucket of the run, which its neighbours may have made larger than the job's own."""
    num_painted: int = 0
    """Elements of its inputs, padding included."""
    num_real: int = 0

    @property
    def is_planned_eager(self) -> bool:
        """Whether it ran eagerly on purpose (`oversize: eager`)."""
        return self.job.planned_eager

    @property
    def bucket(self) -> str:
        return str(self.ran_in) if self.ran_in is not None else "none"

    @property
    def num_cropped(self) -> int:
        return self.num_painted - self.num_real

    @property
    def padding(self) -> float:
        """Share of the inputs' elements that were padding."""
        return self.num_cropped / self.num_painted if self.num_painted else 0.0


class ModuleEngine(Batcher[Answer, Job]):
    """Runs jobs through a module.

    Args:
        module: called with its inputs by name; its router stands in for its forward.
        config: which inputs are padded, and how outputs are cut.

    The others are those of `Batcher`.
    """

    def __init__(
        self,
        module: nn.Module,
        config: ModuleConfig,
        routers: Mapping[str, Router],
        shapes: ShapesConfig,
        *,
        max_rows: int,
        device: torch.device,
        attention: str = "default",
        report: Callable[[RunReport], None] = lambda _: None,
        budget: Budget | None = None,
    ) -> None:
        super().__init__(
            routers,
            shapes,
            max_rows=max_rows,
            device=device,
            attention=attention,
            report=report,
            budget=budget,
        )
        self._module, self._config, self._shapes = module, config, shapes
        self._buckets, self._dtype = combinations(config.choices), DTYPES[config.dtype]
        self.padded: Exactness = "padded"
        """What an answer is whose inputs were padded, until `rounding` has been measured."""
        self.output_names = tuple(config.outputs)
        """Those of the YAML, else those of the last run; empty before it."""

    def prepare(self, inputs: Tensors, accept: Accept, deadline: float | None = None) -> Job:
        """Plan one request, which is as large as it may be (`tensors.Bounds`) or smaller.

        Raises:
            RequestError: two inputs disagree about a dimension.
        """
        if self._shapes.strategy == "exact":
            return Job(inputs, {}, None, accept=accept, deadline=deadline)
        sizes = sizes_of(inputs, self._config.inputs)
        bucket = smallest_covering(self._buckets, Bucket(**sizes))
        return Job(inputs, sizes, bucket, bucket is None, accept, deadline)

    def run(self, jobs: Sequence[Job], *, retry: bool = True) -> list[Answer]:
        """Answers in the order of the jobs; for `retry` see `Batcher.answer`."""
        answers = [Answer(job) for job in jobs]
        self.answer(answers, retry=retry)
        return answers

    def alone(self, job: Job) -> Answer:
        """The job's answer as the module gives it eagerly and without padding: what a bucket's
        answer is compared with.
        """
        (answer,) = self.run([Job(job.inputs, job.sizes, None, planned_eager=True)])
        return answer

    def try_batches(self, one: Job, other: Job) -> None:
        """Run one request, and two of the same bucket in the smallest batch there is for them;
        errors are not kept to the requests.

        Raises:
            ConfigError: an output is no tensor of rows, one a request.
        """
        larger = [size for size in sorted(self._batch_sizes) if size > 1][:1]
        for size in (1, *larger):
            self._run_chunk([(Answer(job), job) for job in (one, other)[:size]], size)

    def _job(self, answer: Answer) -> Job:
        return answer.job

    def _rows(self, answer: Answer) -> list[Job]:
        return [answer.job]

    def _kind(self, answer: Answer) -> str:
        return str(answer.job.bucket)

    def _load(self, answers: Sequence[Answer], size: int) -> Load:
        bucket = _joined([answer.job for answer in answers])
        volume = bucket.volume if bucket else prod(answers[0].job.sizes.values())
        return Load(volume, size, size, 1)

    def _identity(self, answer: Answer) -> int:
        inputs = sorted(answer.job.inputs.items())
        return hash(
            tuple(
                (name, tensor.shape, tensor.contiguous().view(torch.uint8).numpy().tobytes())
                for name, tensor in inputs
            )
        )

    def _too_large(self, answer: Answer) -> str:
        return f"bucket {answer.job.bucket} does not fit into memory"

    def _grouped(self, answers: Sequence[Answer]) -> Iterable[list[Answer]]:
        """Whatever its size, a request may run in a larger bucket with others where padding changes
        nothing.
        """
        groups: dict[object, list[Answer]] = {}
        shared = self.padded == "rounding" and not self._shapes.invariant
        for index, answer in enumerate(answers):
            bucket = answer.job.bucket
            key: object = ("alone", index) if bucket is None else "shared" if shared else bucket
            groups.setdefault(key, []).append(answer)
        for group in groups.values():
            # The large ones together: a run is as large as its largest row.
            yield sorted(group, key=lambda each: -each.job.bucket.volume if each.job.bucket else 0)

    def _sizes(self, answer: Answer) -> Sequence[int]:
        # A request outside every bucket runs by itself and is not filled up.
        return [1] if answer.job.bucket is None else self._batch_sizes

    def _run_chunk(self, chunk: Sequence[tuple[Answer, Job]], size: int) -> None:
        jobs = [job for _, job in chunk]
        bucket = _joined(jobs)
        batch = {name: self._stacked(name, jobs, bucket, size) for name in jobs[0].inputs}
        outputs, run = self._called(
            lambda: self._named(self._module(**batch), size if bucket is not None else None),
            num_rows=size,
            num_real_rows=len(jobs),
            planned_eager=jobs[0].planned_eager,
        )
        self.output_names = tuple(outputs)
        for index, (answer, job) in enumerate(chunk):
            answer.note(run, first=True)
            answer.ran_in = bucket
            answer.num_painted = sum(tensor.numel() // size for tensor in batch.values())
            answer.num_real = sum(tensor.numel() for tensor in job.inputs.values())
            answer.exact = self._exactness(answer)
            answer.outputs = {
                name: cut_to(
                    tensor[index : index + 1] if bucket else tensor, self._kept(name, job)
                ).clone()
                for name, tensor in outputs.items()
            }

    def _exactness(self, answer: Answer) -> Exactness:
        if answer.num_cropped and self.padded == "padded":
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
            spec = self._config.inputs[name]
            shape = [
                1,
                *(
                    bucket[extent] if isinstance(extent, str) else extent
                    for extent in spec.shape[1:]
                ),
            ]
            rows = [pad_to(row, shape, spec.pad) for row in rows]
            rows += [rows[0]] * (size - len(rows))
        stacked = torch.cat(rows) if len(rows) > 1 else rows[0]
        dtype = self._dtype if stacked.is_floating_point() else stacked.dtype
        return stacked.to(self._device, dtype)

    def _named(self, result: object, size: int | None) -> dict[str, torch.Tensor]:
        """The tensors of the module's answer to `size` rows, by name, on the CPU; None: a request
        by itself, whatever its rows.

        Raises:
            ConfigError, ModuleError: it is not what can be served.
        """
        if isinstance(result, torch.Tensor):
            declared = list(self._config.outputs)
            found: dict[str, object] = {declared[0] if len(declared) == 1 else "output": result}
        elif isinstance(result, Mapping):
            found = dict(result)
        elif isinstance(result, (list, tuple)):
            found = {f"output_{index}": value for index, value in enumerate(result)}
        else:
            raise ModuleError(
                f"the module returns a {type(result).__name__}; tensors, alone, listed or named, "
                "can be served"
            )
        wanted = self._config.outputs or {
            name: OutputConfig() for name, v in found.items() if isinstance(v, torch.Tensor)
        }
        tensors: dict[str, torch.Tensor] = {}
        for name in wanted:
            tensor = found.get(name)
            if not isinstance(tensor, torch.Tensor):
                raise ModuleError(
                    f"the module returns no tensor {name!r}; it returns {', '.join(found)}"
                )
            _check_output(name, tensor, size)
            tensors[name] = tensor.cpu()
        return tensors

    def _kept(self, name: str, job: Job) -> dict[int, int]:
        spec = self._config.outputs.get(name)
        return (
            {dim: cut.size(job.sizes) for dim, cut in spec.cuts.items()}
            if spec and job.bucket is not None
            else {}
        )


def _joined(jobs: Sequence[Job]) -> Bucket | None:
    """The smallest bucket that holds them all; None for one that runs as it is."""
    buckets = [job.bucket for job in jobs if job.bucket is not None]
    return joined(buckets) if buckets else None


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
