"""Serves requests for text a step at a time, in slots."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from functools import partial

import torch

from preheat.buckets import Bucket
from preheat.compilation.pace import Timing
from preheat.compilation.variants import Variant
from preheat.config.text import TextConfig
from preheat.device import is_device_lost, is_out_of_memory, release_memory
from preheat.errors import DeadlinePassed, OutOfMemory, PipelineFailure, RunError
from preheat.models.base import StepRunner
from preheat.models.batching import Execution
from preheat.models.text import responses
from preheat.models.text.job import Answer, Job, bucket
from preheat.models.text.pieces import TextStream
from preheat.models.text.request import Reader
from preheat.models.text.sampler import Sampler, Sampling
from preheat.models.text.slots import Slots
from preheat.models.text.step import PADDING, SlotModel
from preheat.protocol.call import Call
from preheat.protocol.events import EventStream
from preheat.protocol.responses import Response

logger = logging.getLogger(__name__)


class _Writer:
    """What writes one answer: its sampler, and its text so far."""

    def __init__(self, answer: Answer, reader: Reader, ends: Collection[int]) -> None:
        decode = partial(reader.tokenizer.decode, clean_up_tokenization_spaces=False)
        self._decode = partial(decode, skip_special_tokens=False)
        self._answer, self._ends = answer, ends
        self._sampler = Sampler(answer.job.sampling)
        self._stream = TextStream(partial(decode, skip_special_tokens=True), answer.job.stops)

    def write(self, logits: torch.Tensor) -> None:
        """The next token, by these logits [vocabulary]."""
        answer, choice = self._answer, self._sampler.choose(logits)
        answer.tokens.append(choice.token)
        ended = choice.token in self._ends
        text = "" if ended else self._stream.push(choice.token)
        if ended or self._stream.stop is not None:
            answer.finish = "stop"
        elif len(answer.tokens) == answer.job.max_new_tokens:
            answer.finish = "length"
        if answer.finish is not None:
            text += self._stream.close()
        if text or choice.logprob is not None:
            answer.job.events.emit("text", text=text, **responses.logprobs(choice, self._decode))


class TextRunner(StepRunner[Job, Answer]):
    """Serves a loaded model."""

    def __init__(
        self,
        execution: Execution,
        slots: SlotModel,
        reader: Reader,
        ends: Collection[int],
        config: TextConfig,
    ) -> None:
        super().__init__(execution, [bucket(length) for length in slots.buckets])
        self._model, self._reader, self._ends, self._config = slots, reader, ends, config
        self._slots: Slots[Answer] = Slots(slots.slots)
        self._writers: dict[int, _Writer] = {}  # by slot

    def variants(self, batch_sizes: object) -> Sequence[Variant]:
        """One a bucket: each prefills one row, and all have the decode step in common."""
        return [Variant(each, 1) for each in reversed(self.buckets)]

    def run_variant(self, variant: Variant) -> Timing:
        """Both steps, whatever tokens there are: an answer might end before it is decoded."""
        began, length = time.perf_counter(), variant.bucket["prompt"]
        prompt, slots = [PADDING] * length, self._model.slots
        self.execution.run(partial(self._model.prefill, 0, prompt), num_rows=1, num_real_rows=1)
        self.execution.run(
            partial(self._model.decode, {0: (PADDING, length)}), num_rows=slots, num_real_rows=1
        )
        return Timing(0.0, time.perf_counter() - began)

    def example(self, bucket: Bucket, steps: int | None = None) -> Job:
        length = bucket["prompt"]
        return Job(
            prompt=[PADDING] * length,
            prefill=length,
            max_new_tokens=min(self.num_steps(steps), self._config.max_length - length),
            sampling=Sampling(),
            stops=(),
            events=EventStream(None, {}),
        )

    def num_steps(self, steps: int | None) -> int:
        """Tokens of an answer."""
        return steps or self._config.defaults.max_new_tokens

    def preprocess(self, call: Call) -> Job:
        return self._reader.read(call)

    def result(self, job: Job) -> Answer:
        return Answer(job)

    @property
    def idle(self) -> bool:
        """Whether every slot is free, and nobody waits for one."""
        return self._slots.idle

    def join(self, result: Answer) -> None:
        result.job.events.emit("queued")
        self._slots.join(result)

    def leave(self, result: Answer) -> None:
        self._slots.leave(result)

    def step(self) -> None:
        admitted = self._slots.admit()
        if admitted is not None:
            self._prefill(*admitted)
        if self._slots.running:
            self._decode()

    def _prefill(self, slot: int, answer: Answer) -> None:
        job = answer.job
        if job.deadline is not None and time.time() > job.deadline:
            self._fail(
                [answer],
                DeadlinePassed("the deadline had passed before the request's turn came"),
            )
            return
        self._writers[slot] = _Writer(answer, self._reader, self._ends)
        try:
            logits, run = self.execution.run(
                partial(self._model.prefill, slot, job.prompt), num_rows=1, num_real_rows=1
            )
        except Exception as error:  # noqa: BLE001  whatever a model raises
            self._fail([answer], self._failure(error))
            return
        answer.note(run)
        self._write({slot: logits})

    def _decode(self) -> None:
        running = dict(self._slots.running)
        rows = {slot: answer.next for slot, answer in running.items()}
        try:
            logits, run = self.execution.run(
                partial(self._model.decode, rows),
                num_rows=self._model.slots,
                num_real_rows=len(rows),
            )
        except Exception as error:  # noqa: BLE001  whatever a model raises
            # what was written of a step that failed nobody knows
            self._fail(list(running.values()), self._failure(error))
            return
        for answer in running.values():
            answer.note(run)
        self._write({slot: logits[slot] for slot in rows})

    def _write(self, logits: dict[int, torch.Tensor]) -> None:
        """A token for each of these slots, by its logits [vocabulary]; a row that fails at it costs
        no other.
        """
        for slot, own in logits.items():
            answer = self._slots.running[slot]
            try:
                self._writers[slot].write(own)
            except Exception as error:  # noqa: BLE001  whatever torch makes of odd logits
                self._fail([answer], self._failure(error))
            if answer.finish is not None:
                self._slots.leave(answer)

    def _fail(self, answers: Sequence[Answer], error: RunError) -> None:
        for answer in answers:
            answer.error = error
            self._slots.leave(answer)

    def _failure(self, error: Exception) -> RunError:
        """What clients are told of what a step raised.

        Raises:
            SystemExit: the device is lost.
        """
        if isinstance(error, RunError):
            return error
        if is_device_lost(error):
            raise SystemExit("the device is lost; TorchServe starts a new worker") from error
        if is_out_of_memory(error):
            logger.warning("a step ran out of memory")
            release_memory(self.execution.device)
            return OutOfMemory("a step does not fit into memory")
        logger.error("a step failed", exc_info=error)
        return PipelineFailure(
            f"the model failed on this request ({type(error).__name__}); the server's log says more"
        )

    def postprocess(self, results: Sequence[Answer]) -> list[Response]:
        return [responses.last(answer) for answer in results]
