"""What the router asks of every way to fast code: a backend makes it in warm-up, call by call."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from preheat.compilation.signatures import DynamicDims, Inputs

EngineName = Literal["openvino", "aot", "compiled", "ipex", "eager"]
RoadName = Literal["aot", "openvino", "cuda_graphs", "compiled", "ipex", "eager"]
"""Engines, and those of them apart that `backend: auto` chooses between."""


def slowest(engines: Collection[EngineName]) -> EngineName:
    """One name for what ran on several engines: a single eager target makes a run an eager one."""
    order: tuple[EngineName, ...] = ("eager", "ipex", "compiled", "aot", "openvino")
    return next((engine for engine in order if engine in engines), "eager")


class NoCode(Exception):
    """A backend has no code for a call; the message says why, and whose words it is."""


@runtime_checkable
class CompiledCode(Protocol):
    """Called as the target's forward is."""

    @property
    def engine(self) -> EngineName: ...

    @property
    def name(self) -> str:
        """For the log, and unique in its target."""

    @property
    def is_compared(self) -> bool:
        """Whether its results are compared with eager in warm-up. Those of torch.compile are not:
        there it is looked whether it has compiled anything.
        """

    def matches(self, inputs: Inputs) -> bool:
        """Whether it serves this call although warm-up did not meet its signature."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class Backend(Protocol):
    """One way to fast code for one target. What runs every call is its own code too."""

    @property
    def engine(self) -> EngineName: ...

    @property
    def road(self) -> RoadName:
        """What a choice between backends calls it."""

    @property
    def wants_every_size(self) -> bool:
        """Whether warm-up has to meet each batch size although one graph serves them all."""

    @property
    def reason(self) -> str | None:
        """Why it does not serve all that it was asked for."""

    @property
    def idle(self) -> bool:
        """Whether it has no code for any call."""

    @property
    def dims(self) -> DynamicDims | None:
        """The dimensions that vary, where it knows them before warm-up."""

    def code_for(self, inputs: Inputs, dims: DynamicDims) -> CompiledCode:
        """The code for this call, made now where that is its way; in warm-up alone.

        Raises:
            NoCode: there is none.
            Exception: of any type; what it is built on fails on this call.
        """


class Precompiled:
    """Code that was there before warm-up, such as packages; or none, and why."""

    def __init__(
        self,
        engine: EngineName,
        codes: Sequence[CompiledCode] = (),
        reason: str | None = None,
        dims: DynamicDims | None = None,
    ) -> None:
        self.engine, self.codes, self.reason, self.dims = engine, codes, reason, dims
        self.road: RoadName = engine
        self.wants_every_size = False

    @property
    def idle(self) -> bool:
        return not self.codes

    def code_for(self, inputs: Inputs, dims: DynamicDims) -> CompiledCode:
        for code in self.codes:
            if code.matches(inputs):
                return code
        raise NoCode(self.reason or f"{self.engine}: no package for this signature")
