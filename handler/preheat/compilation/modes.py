"""What a router does with a call: a class for each time of its life, all on one `Target`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from preheat.compilation.backends.base import (
    Backend,
    CompiledCode,
    EngineName,
    NoCode,
    RoadName,
)
from preheat.compilation.closeness import mismatch
from preheat.compilation.race import run as race
from preheat.compilation.roads import Roads
from preheat.compilation.signatures import (
    DynamicDims,
    Inputs,
    Shapes,
    Signature,
    leaves,
    map_tensors,
    signature,
    tensor_shapes,
)
from preheat.compilation.watch import GraphWatch, eagerly, hit_recompile_limit, refused_guards
from preheat.device import is_device_lost, is_out_of_memory, synchronize

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Route:
    """The engine that runs a signature, and why it is not the one that was asked for; `code` is
    None for eager.
    """

    engine: EngineName
    reason: str | None = None
    code: CompiledCode | None = None


@dataclass(slots=True)
class Run:
    """What one run of the pipeline met at this target."""

    bypass: bool = False  # outside every bucket on purpose (`oversize: eager`)
    smallest: bool = True  # no smaller batch could be tried instead
    engines: set[EngineName] = field(default_factory=set)
    unwarmed: int = 0  # calls with an unforeseen shape or guard, served eagerly
    fallbacks: int = 0  # calls that warm-up had found no engine for


@dataclass(slots=True)
class Calls:
    """Calls that were observed, one a signature; `examples` holds copies of them, where asked."""

    shapes: dict[Signature, Shapes] = field(default_factory=dict)
    examples: dict[Signature, Inputs] = field(default_factory=dict)


@dataclass(slots=True)
class Visits:
    """The routes that calls took, and the signatures whose calls met a compile event."""

    routes: dict[Signature, Route] = field(default_factory=dict)
    recompiled: set[Signature] = field(default_factory=set)


_CALLS_TO_RECORD = 3
"""Until a CUDA graph is replayed (torch/_inductor/cudagraph_trees.py)."""
Layout = Callable[[torch.Tensor], torch.Tensor]
"""Image-to-image latents arrive channels_last, text-to-image latents do not: one graph is to serve
both.
"""


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """In that memory format where it has four dimensions, else contiguous."""
    if tensor.dim() != 4:
        return tensor.contiguous()
    return tensor.contiguous(memory_format=torch.channels_last)


class Target:
    """What the modes of a router share: the target's code, and what is known of its calls."""

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        backends: Sequence[Backend],
        layout: Layout,
        roads: Roads,
    ) -> None:
        self.name, self.backends, self.forward, self._layout = name, backends, forward, layout
        self.roads = roads
        self.dims = DynamicDims()
        """The dimensions that one graph covers."""
        self.routes: Mapping[Signature, Route] = {}
        self.verified: list[CompiledCode] = []
        """Code that agreed with eager at some signature."""
        self.failure: str | None = None
        """Of compiling in a request, where that is allowed, or of every road that could be had."""
        self.run = Run()
        """What the run has met that `start_run` began last."""

    def start_run(self, *, bypass: bool = False, smallest: bool = True) -> None:
        """A run of the model begins; see `Run`."""
        self.run = Run(bypass, smallest)

    @property
    def idle(self) -> bool:
        """Whether there is nothing faster than eager to route to."""
        return all(backend.idle for backend in self.backends)

    @property
    def reason(self) -> str | None:
        """Why a backend does not serve all that it was asked for."""
        reasons = [self.failure, *(backend.reason for backend in self.backends)]
        return "; ".join(filter(None, reasons)) or None

    def settle(self, road: RoadName, why: str | None = None, *, source: str) -> bool:
        """Serve by this road from now on, and by those behind it in the list what it has no code
        for; False where it is not to be had.

        Args:
            road: `eager`: by none.
            why: the failure that left nothing but eager.
            source: see `Roads`.
        """
        names = [backend.road for backend in self.backends]
        if road != "eager" and road not in names:
            return False
        self.backends = () if road == "eager" else tuple(self.backends[names.index(road) :])
        self.failure = why if road == "eager" else None
        self.roads.chosen, self.roads.source, self.roads.is_open = road, source, False
        logger.info("%s: serves by %s (%s)", self.name, road, source)
        return True

    def with_layout(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return map_tensors(args, self._layout), map_tensors(kwargs, self._layout)

    def eager(self, args: Any, kwargs: Any) -> Any:
        self.run.engines.add("eager")
        with eagerly():
            return self.forward(*args, **kwargs)

    def through(self, code: CompiledCode, args: Any, kwargs: Any) -> Any:
        result = code(*args, **kwargs)
        self.run.engines.add(code.engine)
        return result


Done = tuple[CompiledCode, Any]
"""Code, and its result."""


class LostRace(NoCode):
    """Code that agrees with eager and is slower, where that is a reason not to choose it."""


class Eager:
    """There is nothing faster than eager to route to."""

    def __init__(self, target: Target) -> None:
        self._target, self._is_fallback = target, target.reason is not None

    def __call__(self, args: Any, kwargs: Any) -> Any:
        self._target.run.fallbacks += self._is_fallback and not self._target.run.bypass
        return self._target.eager(args, kwargs)


class Observe:
    """Runs eagerly and records the calls; keeps copies of their inputs where asked to."""

    def __init__(self, target: Target, calls: Calls, *, keep: bool) -> None:
        self._target, self._calls, self._keep = target, calls, keep

    def __call__(self, args: Any, kwargs: Any) -> Any:
        args, kwargs = self._target.with_layout(args, kwargs)
        key = signature(args, kwargs, DynamicDims())
        if key not in self._calls.shapes:
            self._calls.shapes[key] = tensor_shapes(args, kwargs)
            if self._keep:  # before the call, which may write to them
                copied = map_tensors(args, torch.clone), map_tensors(kwargs, torch.clone)
                self._calls.examples[key] = copied
        return self._target.eager(args, kwargs)


class Warm:
    """Finds code for every new signature: that of the first backend that has some, if its first
    result agrees with eager.
    """

    def __init__(self, target: Target, routes: dict[Signature, Route]) -> None:
        self._target, self._routes = target, routes
        self.visits = Visits()
        self._graphs = GraphWatch(target.forward)
        self._refuted: dict[str, str] = {}  # by name of the code: how it differs from eager

    def __call__(self, args: Any, kwargs: Any) -> Any:
        target = self._target
        args, kwargs = target.with_layout(args, kwargs)
        key = signature(args, kwargs, target.dims)
        route, done = self._routes.get(key), None
        reasons = [route.reason] if route is not None and route.reason else []
        if route is None:
            done = self._found(reasons, args, kwargs)
        elif route.code is not None:
            done = self._tried(route.engine, reasons, self._again, route.code, args, kwargs)
        code, result = done or (None, None)
        route = Route(code.engine if code else "eager", "; ".join(reasons) or None, code)
        self._routes[key] = self.visits.routes[key] = route
        # a fault of the model itself, not of its compilation, raises here
        return result if code is not None else target.eager(args, kwargs)

    def _found(self, reasons: list[str], args: Any, kwargs: Any) -> Done | None:
        """The first backend's code that there is, and its result. While the roads are open, that
        is the choice; None is eager's.
        """
        target, roads = self._target, self._target.roads
        chosen: RoadName = "eager"
        done = None
        for backend in target.backends:
            before = len(reasons)
            done = self._tried(backend.engine, reasons, self._first, backend, args, kwargs)
            if done is not None:
                chosen = backend.road
                break
            if roads.is_open and reasons[before:]:
                roads.failures[backend.road] = "; ".join(reasons[before:])
        if roads.is_open:
            why = roads.failed if done is None else None
            target.settle(chosen, why, source="measured" if roads.may_veto else "order")
        return done

    def _tried(
        self, engine: EngineName, reasons: list[str], attempt: Callable[..., Done], *of_it: Any
    ) -> Done | None:
        """What the attempt gives; None where it fails, and then `reasons` has one more."""
        try:
            return attempt(*of_it)
        except LostRace:
            pass
        except NoCode as error:
            reasons.append(str(error))
        # compilers and exporters fail with any type, the lazy ones in the call itself
        except Exception as error:
            # Of the run, not of the code: a smaller batch may fit, and is served instead.
            if is_device_lost(error) or (is_out_of_memory(error) and not self._target.run.smallest):
                raise
            logger.exception("%s: %s failed, this shape stays eager", self._target.name, engine)
            reasons.append(f"{engine}: {type(error).__name__}: {error}".strip())
        return None

    def _first(self, backend: Backend, args: Any, kwargs: Any) -> Done:
        """The code for a new signature, and its first result.

        Raises:
            NoCode: there is none, or none to be trusted.
        """
        target = self._target
        code = backend.code_for((args, kwargs), target.dims)
        if code.name in self._refuted:
            raise NoCode(self._refuted[code.name])
        _, result = self._again(code, args, kwargs)
        why = None
        if code.engine == "compiled" and not self._graphs.ran_graph:
            why = "torch.compile produced no graph for this module"
        elif code.is_compared:
            why = mismatch(result, target.eager(args, kwargs), code.name)
        if why is None:
            if backend.road not in target.roads.races:
                self._race(backend.road, code, args, kwargs)
            if code not in target.verified:
                target.verified.append(code)
            return code, result
        logger.error("%s: %s is not used: %s", target.name, code.name, why)
        if code.is_compared:
            self._refuted[code.name] = f"{backend.engine}: {why}"
        raise NoCode(f"{backend.engine}: {why}")

    def _race(self, road: RoadName, code: CompiledCode, args: Any, kwargs: Any) -> None:
        """Time the code beside eager, once a target: on the first shape, which is the largest.

        Raises:
            LostRace: it is slower, and that counts.
        """
        target, roads = self._target, self._target.roads
        devices = {
            leaf.device for _, leaf in leaves(args, kwargs) if isinstance(leaf, torch.Tensor)
        }

        def compiled() -> None:
            code(*args, **kwargs)
            for device in devices:
                synchronize(device)

        def eager() -> None:
            with eagerly():
                target.forward(*args, **kwargs)
            for device in devices:
                synchronize(device)

        try:
            for _ in range(_CALLS_TO_RECORD if road == "cuda_graphs" else 1):
                compiled()
                eager()
            raced = race(compiled, eager, patient=roads.is_open, clock=roads.clock)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("%s: %s cannot be timed: eager does not fit", target.name, road)
            return
        if roads.note(target.name, road, raced):
            raise LostRace(road)

    def _again(self, code: CompiledCode, args: Any, kwargs: Any) -> Done:
        with self._graphs():
            return code, self._target.through(code, args, kwargs)


class Serve:
    """Only what has been warmed and agrees with eager runs compiled, everything else eagerly."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def __call__(self, args: Any, kwargs: Any) -> Any:
        target = self._target
        args, kwargs = target.with_layout(args, kwargs)
        if target.run.bypass:
            return target.eager(args, kwargs)
        return self._serve(signature(args, kwargs, target.dims), args, kwargs)

    def _serve(self, key: Signature, args: Any, kwargs: Any) -> Any:
        target = self._target
        route = target.routes.get(key) or self._unmet(args, kwargs)
        if route is None:
            self._unwarmed(key, "no warmed variant has this signature", args, kwargs)
            return target.eager(args, kwargs)
        self._visit(key, route)
        if route.code is None:
            target.run.fallbacks += 1
            return target.eager(args, kwargs)
        try:
            return target.through(route.code, args, kwargs)
        except RuntimeError as error:
            guards = refused_guards(error)
            if guards is None:
                raise
            self._unwarmed(key, guards, args, kwargs)
        return target.eager(args, kwargs)

    def _unmet(self, args: Any, kwargs: Any) -> Route | None:
        """Code for a signature that warm-up did not meet, if it agreed with eager at another."""
        for code in self._target.verified:
            if code.matches((args, kwargs)):
                return Route(code.engine, code=code)
        return None

    def _unwarmed(self, key: Signature, why: str, args: Any, kwargs: Any) -> None:
        run = self._target.run
        if not run.unwarmed:  # once a run, not once a step
            logger.error(
                "unwarmed call: %s runs eagerly: %s; input shapes %s",
                self._target.name,
                why,
                tensor_shapes(args, kwargs),
            )
        run.unwarmed += 1
        self._visit(key, Route("eager", why))

    def _visit(self, key: Signature, route: Route) -> None:
        """Not kept: the shapes are clients' own, and would pile up."""


class Replay(Serve):
    """Serves as requests will be served, and notes each route, and whose calls compiled."""

    def __init__(self, target: Target, visits: Visits, num_events: Callable[[], int]) -> None:
        super().__init__(target)
        self._visits, self._num_events = visits, num_events

    def _serve(self, key: Signature, args: Any, kwargs: Any) -> Any:
        events = self._num_events()
        result = super()._serve(key, args, kwargs)
        if self._num_events() != events:
            self._visits.recompiled.add(key)
        return result

    def _visit(self, key: Signature, route: Route) -> None:
        self._visits.routes[key] = route


class Open:
    """Everything runs compiled, whatever it costs (plain torch.compile: `strategy: exact`, or a
    module of unknown shapes), until a compile fails.
    """

    def __init__(self, target: Target) -> None:
        self._target, self._is_over = target, False
        codes = (each for each in target.backends if isinstance(each, CompiledCode))
        self._code = next(codes, None)  # what runs every call is its own code

    def __call__(self, args: Any, kwargs: Any) -> Any:
        target = self._target
        if target.run.bypass or self._is_over:
            target.run.fallbacks += not target.run.bypass
            return target.eager(args, kwargs)
        try:
            if self._code is not None:
                return target.through(self._code, args, kwargs)
            why = "its models are made for shapes that the YAML names"
        # compiling is lazy: any failure of the compiler surfaces here, as any type
        except Exception as error:
            if is_out_of_memory(error) or is_device_lost(error):
                raise
            why = f"{type(error).__name__}: {error}".strip()
            if hit_recompile_limit(error):
                return self._past_the_limit(args, kwargs)
        # a fault of the model itself, not of its compilation, raises here
        result = target.eager(args, kwargs)
        target.run.fallbacks += 1
        self._is_over, engine = True, target.backends[-1].engine
        target.failure = f"{engine}: {why}"
        logger.error(
            "%s: %s failed, it is served eagerly from now on: %s", target.name, engine, why
        )
        return result

    def _past_the_limit(self, args: Any, kwargs: Any) -> Any:
        """Serve a shape for which there will be no graph eagerly; those that have one stay
        compiled.
        """
        target = self._target
        if target.failure is None:
            target.failure = (
                "Dynamo's recompile limit is reached: further shapes are served eagerly"
            )
            advice = "declare shapes in buckets, or let them be dynamic"
            logger.error("%s: %s; %s", target.name, target.failure, advice)
        target.run.fallbacks += 1
        return target.eager(args, kwargs)
