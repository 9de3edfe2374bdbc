"""Compiles targets in place and routes every call: warmed shapes run compiled, everything else runs
eagerly, at once.

A `Router` stands in for the `forward` of one target. It knows a call by its *signature*: shapes,
dtypes, memory formats and plain values of all arguments, which is what Dynamo guards on. Only
signatures that warm-up has seen reach compiled code, so no request can wait for the compiler.
Guards that a signature cannot foresee (global state) raise under `watch.forbid_compiling` and are
served eagerly too. Code that is not Dynamo's (packages compiled ahead of time, OpenVINO models made
in warm-up) goes first, where there is some that warm-up has compared with eager.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Literal, Protocol

import torch
from torch.utils import _pytree as pytree

from preheat.compilation.watch import eagerly, hit_recompile_limit, num_graphs, refused_guards
from preheat.device import is_device_lost, is_out_of_memory

logger = logging.getLogger(__name__)

EngineName = Literal["openvino", "aot", "compiled", "ipex", "eager"]
Signature = tuple[Any, ...]
Shapes = dict[str, tuple[int, ...]]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the keyword arguments of one call."""


def slowest(engines: Collection[EngineName]) -> EngineName:
    """One name for what ran on several engines: a single eager target makes a run an eager one."""
    order: tuple[EngineName, ...] = ("eager", "ipex", "compiled", "aot", "openvino")
    return next((engine for engine in order if engine in engines), "eager")


class Phase(Enum):
    """What a router does with a call.

    OBSERVE: run eagerly and record shapes. WARM: new signatures are compiled. SERVE: only warmed
    signatures run compiled. PROVE: as SERVE, and what each signature met is recorded. OPEN:
    everything runs compiled, whatever it costs (plain torch.compile: `strategy: exact`, or a module
    of unknown shapes), until a compile fails.
    """

    OBSERVE = auto()
    WARM = auto()
    PROVE = auto()
    SERVE = auto()
    OPEN = auto()


@dataclass(frozen=True, slots=True)
class Route:
    """The engine that runs a signature, and why it is not the one that was asked for. `call` is the
    route's own code, if any.
    """

    engine: EngineName
    reason: str | None = None
    call: Ahead | None = None


@dataclass(frozen=True, slots=True)
class DynamicDims:
    """Dimensions of a target's inputs that one graph covers: argument path -> dimension -> (least,
    greatest) size.

    Sizes below `least` specialise: 0 and 1 under Dynamo, none where torch.export was told the
    range.
    """

    ranges: Mapping[str, Mapping[int, tuple[int, int]]] = field(default_factory=dict)
    least: int = 2

    @classmethod
    def varying(cls, observed: Sequence[Shapes]) -> DynamicDims:
        """The dimensions whose size differs between the observed calls, with the range seen."""
        ranges: dict[str, dict[int, tuple[int, int]]] = {}
        for path in sorted(set.intersection(*(set(shapes) for shapes in observed))):
            sizes = list(zip(*(shapes[path] for shapes in observed), strict=True))
            spans = {
                dim: (min(seen), max(seen))
                for dim, seen in enumerate(sizes)
                if min(seen) != max(seen)
            }
            if spans:
                ranges[path] = spans
        return cls(ranges)

    def canonical(self, path: str, shape: tuple[int, ...]) -> tuple[int | str, ...]:
        """`shape` with sizes that share a graph made equal."""
        spans = self.ranges.get(path)
        if not spans:
            return shape
        shared = {dim for dim, (_, most) in spans.items() if self.least <= shape[dim] <= most}
        return tuple("n" if dim in shared else size for dim, size in enumerate(shape))

    def mark(self, path: str, tensor: torch.Tensor) -> None:
        """Tell Dynamo, before it compiles, that these dimensions vary.

        For the batch that is a demand, and a model that specialises on it fails to compile. Other
        dimensions may keep guards such as "even", which a UNet's halvings need.
        """
        for dim, (_, most) in self.ranges.get(path, {}).items():
            if not 2 <= tensor.shape[dim] <= most:
                continue
            if dim == 0:
                torch._dynamo.mark_dynamic(tensor, dim, min=2, max=most)
            else:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)


def leaves(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every argument that is not a container, with its path, such as `0` or
    `added_cond_kwargs.time_ids`.
    """

    def walk(path: str, value: Any) -> Iterator[tuple[str, Any]]:
        inside = None if type(value) in _PLAIN else contained(value)
        if inside is None:
            yield path, value
        else:
            for key, item in inside.items():
                yield from walk(f"{path}.{key}", item)

    for index, value in enumerate(args):
        yield from walk(str(index), value)
    for name, value in kwargs.items():
        yield from walk(name, value)


def _memory_format(tensor: torch.Tensor) -> Any:
    if tensor.is_contiguous():
        return "contiguous"
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return "channels_last"
    return tensor.stride()


def signature(args: Sequence[Any], kwargs: Mapping[str, Any], dims: DynamicDims) -> Signature:
    """What decides which graph a call needs; hashable."""
    parts: list[Any] = []
    for path, leaf in leaves(args, kwargs):
        if isinstance(leaf, torch.Tensor):
            shape = dims.canonical(path, tuple(leaf.shape))
            parts.append((path, shape, leaf.dtype, leaf.device.type, _memory_format(leaf)))
        elif leaf is None or isinstance(leaf, (bool, int, float, str)):
            parts.append((path, leaf))
        else:
            parts.append((path, type(leaf).__qualname__))
    return tuple(parts)


def tensor_shapes(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Shapes:
    return {
        path: tuple(leaf.shape)
        for path, leaf in leaves(args, kwargs)
        if isinstance(leaf, torch.Tensor)
    }


_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str}
"""Types that hold nothing, and that most arguments have: one look instead of several."""


def contained(value: Any) -> dict[Any, Any] | None:
    """What a container holds, by key or index; None where it is none.

    Containers are mappings, lists, tuples, and what is registered with torch.utils._pytree.
    """
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    registered = pytree.SUPPORTED_NODES.get(type(value))
    return dict(enumerate(registered.flatten_fn(value)[0])) if registered is not None else None


def rebuilt(value: Any, inside: Mapping[Any, Any]) -> Any:
    """A container of the type of `value` that holds these instead, by the keys of `contained`."""
    kind = type(value)
    if kind is dict:
        return dict(inside)
    if kind is list:
        return list(inside.values())
    if kind is tuple:
        return tuple(inside.values())
    if isinstance(value, tuple) and hasattr(value, "_make"):  # a namedtuple
        return value._make(inside.values())
    # transformers and diffusers register their outputs
    registered = pytree.SUPPORTED_NODES.get(kind)
    if registered is not None:
        return registered.unflatten_fn(list(inside.values()), registered.flatten_fn(value)[1])
    if isinstance(value, (list, tuple)):
        return kind(inside.values())
    copied = copy.copy(value)  # a mapping whose constructor may want anything
    for key, item in inside.items():
        copied[key] = item
    return copied


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with every tensor in it changed; containers are rebuilt in their own types, other
    objects pass.
    """
    if isinstance(value, torch.Tensor):
        return change(value)
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is dict:
        return {key: map_tensors(item, change) for key, item in value.items()}
    if kind is tuple:
        return tuple([map_tensors(item, change) for item in value])
    inside = contained(value)
    if inside is None:
        return value
    return rebuilt(value, {key: map_tensors(item, change) for key, item in inside.items()})


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """Image-to-image latents arrive channels_last, text-to-image latents do not: one graph is to
    serve both.
    """
    return tensor.contiguous()


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return (
        tensor.contiguous(memory_format=torch.channels_last)
        if tensor.dim() == 4
        else tensor.contiguous()
    )


class Ahead(Protocol):
    """Code that exists before Dynamo is asked, for the calls that it `matches`: an `aot.Package`,
    an `openvino_models.Model`.
    """

    @property
    def engine(self) -> EngineName: ...

    @property
    def name(self) -> str: ...

    @property
    def dims(self) -> DynamicDims: ...

    def matches(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def fault(self, result: Any, expected: Any) -> str | None:
        """Why `result` is not what eager gave, or None where it is close enough."""


@dataclass(slots=True)
class Run:
    """What one run of the pipeline met at this target."""

    planned_eager: bool = False  # outside every bucket on purpose (`oversize: eager`)
    smallest: bool = True  # no smaller batch could be tried instead
    engines: set[EngineName] = field(default_factory=set)
    incidents: int = 0  # calls with an unforeseen shape or guard, served eagerly
    fallen: int = 0  # calls that warm-up had found no engine for


class Router:
    """Stands in for `module.forward` of one target.

    Args:
        name: the target, such as `unet` or `vae.decoder`.
        forward: the target's own forward, eager.
        fast: the optimised callable, or None where there is none (then everything is eager).
        engine: what `fast` is called in state and headers.
        shape_bound: whether `fast` must only see warmed signatures (compiled code); IPEX takes any
            shape.
        cuda_graphs: outputs live in a graph's memory and are overwritten by the next replay, so
            they are cloned.
        channels_last: 4-D inputs are converted to channels_last, not to contiguous, before either
            callable runs.
        make: makes, in warm-up alone, the code for a call that nothing in `ahead` matches, given
            the dimensions that vary.
        fault: says why the first argument, what `fast` gave in warm-up, is not the second, what
            eager gave; None: it is not compared.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        fast: Callable[..., Any] | None,
        engine: EngineName,
        *,
        shape_bound: bool = True,
        cuda_graphs: bool = False,
        channels_last: bool = False,
        make: Callable[[Inputs, DynamicDims], Ahead] | None = None,
        fault: Callable[[Any, Any], str | None] | None = None,
        reason: str | None = None,
    ) -> None:
        self.name = name
        self.engine: EngineName = engine if fast is not None or make is not None else "eager"
        self.reason = reason  # why there is no `fast`, where one was asked for
        self.phase = Phase.WARM
        self.dims = DynamicDims()
        self.routes: dict[Signature, Route] = {}
        self.visited: dict[Signature, Route] = {}  # before READY, since the last `start_variant`
        self.run = Run()  # since the last `start_run`
        self.observed: list[Shapes] = []
        # one call per signature, where a dict is given to fill
        self.examples: dict[Signature, Inputs] | None = None
        self.ahead: list[Ahead] = []
        # why there is nothing in `ahead`, where something was asked for
        self.ahead_reason: str | None = None
        # in the proof, since `start_variant`: calls that met a compile event
        self.recompiled: set[Signature] = set()
        # compile events of the process, where somebody counts them
        self.num_events: Callable[[], int] = lambda: 0
        self._captured = False  # whether Dynamo has made a graph of it
        # by package that was compared with eager; None: they agree
        self._faults: dict[str, str | None] = {}
        self._forward, self._fast, self._make, self._fault = forward, fast, make, fault
        self._shape_bound, self._cuda_graphs = shape_bound or fast is None, cuda_graphs
        self._lay_out = _channels_last if channels_last else _contiguous

    @property
    def idle(self) -> bool:
        """Whether there is nothing faster than eager to route to."""
        return self._fast is None and self._make is None and not self.ahead

    @property
    def compiles(self) -> bool:
        """Whether warm-up has to compile, for all that is known so far."""
        if any(route.engine == "compiled" for route in self.routes.values()):
            return True
        return (
            self._fast is not None
            and self._shape_bound
            and not (self.ahead and self.ahead_reason is None)
        )

    def start_variant(self) -> None:
        self.visited, self.recompiled = {}, set()

    def start_run(self, *, planned_eager: bool = False, smallest: bool = True) -> None:
        self.run = Run(planned_eager, smallest)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.idle and self.phase is not Phase.OBSERVE:
            self.run.fallen += (self.reason or self.ahead_reason) is not None
            return self._eager(args, kwargs)
        if self.phase is Phase.OPEN:
            return (
                self._eager(args, kwargs)
                if self.run.planned_eager
                else self._run_open(args, kwargs)
            )
        args, kwargs = map_tensors(args, self._lay_out), map_tensors(kwargs, self._lay_out)
        if self.phase is Phase.OBSERVE:
            return self._observe(args, kwargs)
        key = signature(args, kwargs, self.dims)
        route = self.routes.get(key)
        if self.phase is Phase.WARM:
            return self._warm(key, route, args, kwargs)
        if self.phase is Phase.PROVE:
            return self._prove(key, args, kwargs)
        return self._serve(key, route, args, kwargs)

    def _observe(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.observed.append(tensor_shapes(args, kwargs))
        key = signature(args, kwargs, DynamicDims())
        self.visited[key] = Route("eager")
        if self.examples is not None and key not in self.examples:
            self.examples[key] = (map_tensors(args, torch.clone), map_tensors(kwargs, torch.clone))
        return self._eager(args, kwargs)

    def _eager(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.run.engines.add("eager")
        with eagerly():
            return self._forward(*args, **kwargs)

    def _run_fast(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self._fast is not None
        if not self._cuda_graphs:
            result = self._fast(*args, **kwargs)
        else:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            result = map_tensors(self._fast(*args, **kwargs), torch.clone)
        self.run.engines.add(self.engine)
        return result

    def _run_open(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            if self._fast is not None:
                return self._run_fast(args, kwargs)
            reason = "its models are made for shapes that the YAML names"
        # compiling is lazy: any failure of the compiler surfaces here, as any type
        except Exception as error:
            if is_out_of_memory(error) or is_device_lost(error):
                raise
            reason = f"{type(error).__name__}: {error}".strip()
            if hit_recompile_limit(error):
                return self._past_the_limit(args, kwargs)
        # a fault of the model itself, not of its compilation, raises here
        result = self._eager(args, kwargs)
        self._fast, self._make, self.reason = None, None, f"{self.engine}: {reason}"
        self.run.fallen += 1
        logger.error(
            "%s: %s failed, it is served eagerly from now on: %s", self.name, self.engine, reason
        )
        return result

    def _past_the_limit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Serve a shape for which there will be no graph eagerly; those that have one stay
        compiled.
        """
        if self.reason is None:
            self.reason = "Dynamo's recompile limit is reached: further shapes are served eagerly"
            logger.error(
                "%s: %s; declare shapes in buckets, or let them be dynamic", self.name, self.reason
            )
        self.run.fallen += 1
        return self._eager(args, kwargs)

    def _run_ahead(self, ahead: Ahead, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = ahead(*args, **kwargs)
        self.run.engines.add(ahead.engine)
        return result

    def _warm(
        self, key: Signature, route: Route | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        why = route.reason if route is not None else self.ahead_reason
        if route is None and (self.ahead or self._make is not None):
            route, why = self._compare(args, kwargs)
        if route is None and self._fast is None:
            route = Route("eager", "; ".join(filter(None, (why, self.reason))) or None)
        if route is not None and (route.call is not None or self._fast is None):
            self.routes[key] = self.visited[key] = route
            return (
                self._eager(args, kwargs)
                if route.call is None
                else self._run_ahead(route.call, args, kwargs)
            )
        return self._compile(key, route, why, args, kwargs)

    def _compare(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Route | None, str | None]:
        """The route through the code made for this call, or None and why not: it has to agree with
        eager first.
        """
        ahead, why = self._code_for(args, kwargs)
        if ahead is None:
            return None, why
        if self._faults.get(ahead.name) is None:
            expected = self._eager(args, kwargs)  # a fault of the model itself raises here
            try:
                self._faults[ahead.name] = ahead.fault(ahead(*args, **kwargs), expected)
            except RuntimeError as error:
                if self._is_the_runs(error):
                    raise
                self._faults[ahead.name] = f"{type(error).__name__}: {error}".strip()
            if self._faults[ahead.name] is not None:
                logger.error(
                    "%s: %s is not used: %s", self.name, ahead.name, self._faults[ahead.name]
                )
        fault = self._faults[ahead.name]
        return (
            (Route(ahead.engine, call=ahead), None)
            if fault is None
            else (None, f"{ahead.engine}: {fault}")
        )

    def _code_for(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Ahead | None, str | None]:
        """What was made for this call, made now where that is this target's road; or None and why
        there is none.
        """
        ahead = next((each for each in self.ahead if each.matches(args, kwargs)), None)
        if ahead is not None:
            return ahead, None
        if self._make is None:
            return None, "aot: no package for this signature"
        try:
            ahead = self._make((args, kwargs), self.dims)
        except Exception as error:  # the exporter's and the converter's failures are of any type
            if self._is_the_runs(error):
                raise
            logger.exception("%s: %s failed, this shape stays eager", self.name, self.engine)
            return None, f"{self.engine}: {type(error).__name__}: {error}".strip()
        self.ahead.append(ahead)
        return ahead, None

    def _compile(
        self,
        key: Signature,
        route: Route | None,
        why: str | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if route is None:
            for path, leaf in leaves(args, kwargs):
                if isinstance(leaf, torch.Tensor):
                    self.dims.mark(path, leaf)
        if route is None or route.engine != "eager":
            graphs = num_graphs()
            try:
                result = self._run_fast(args, kwargs)
            # compiling is lazy: any failure of the compiler surfaces here, as any type
            except Exception as error:
                self._captured |= graphs != num_graphs()
                if self._is_the_runs(error):
                    raise
                reason = f"{type(error).__name__}: {error}".strip()
                logger.exception("%s: %s failed, this shape stays eager", self.name, self.engine)
            else:
                self._captured |= graphs != num_graphs()
                if self._shape_bound and not self._captured:
                    reason = "torch.compile produced no graph for this module"
                    logger.error("%s: %s; this shape stays eager", self.name, reason)
                elif (
                    self._fault is not None
                    and (fault := self._fault(result, self._eager(args, kwargs))) is not None
                ):
                    reason = f"{self.engine}: {fault}"
                    logger.error("%s: %s; the target stays eager", self.name, reason)
                    # it takes any shape, so no other one is to be trusted either
                    self._fast, self.reason = None, reason
                else:
                    self.routes[key] = self.visited[key] = Route(self.engine, why)
                    return result
            route = Route("eager", "; ".join(filter(None, (why, reason))))
        self.routes[key] = self.visited[key] = route
        # a fault of the model itself, not of its compilation, raises here
        return self._eager(args, kwargs)

    def _is_the_runs(self, error: Exception) -> bool:
        """Whether a failure in warm-up says nothing of the compiled code: a smaller batch may fit,
        and that is served instead.
        """
        return is_device_lost(error) or (is_out_of_memory(error) and not self.run.smallest)

    def _prove(self, key: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As a request would be served, and note if it compiled."""
        events = self.num_events()
        result = self._serve(key, self.routes.get(key), args, kwargs)
        if self.num_events() != events:
            self.recompiled.add(key)
        return result

    def _serve(
        self, key: Signature, route: Route | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.run.planned_eager:
            return self._eager(args, kwargs)
        if route is None:
            route = self._proven_ahead(key, args, kwargs)
        if route is not None:
            self._visit(key, route)
        if route is not None and route.call is not None:
            return self._run_ahead(route.call, args, kwargs)
        if route is None and self._shape_bound:
            self._incident(key, "no warmed variant has this signature", args, kwargs)
        elif route is not None and route.engine == "eager":
            self.run.fallen += 1
        else:
            try:
                return self._run_fast(args, kwargs)
            except RuntimeError as error:
                guards = refused_guards(error)
                if guards is None:
                    raise
                self._incident(key, guards, args, kwargs)
        return self._eager(args, kwargs)

    def _proven_ahead(
        self, key: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Route | None:
        """The package made for a signature that warm-up did not meet, if it has proven itself at
        another size.
        """
        for ahead in self.ahead:
            if self._faults.get(ahead.name, "unproven") is None and ahead.matches(args, kwargs):
                self.routes[key] = Route(ahead.engine, call=ahead)
                return self.routes[key]
        return None

    def _incident(
        self, key: Signature, why: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not self.run.incidents:  # once a run, not once a step
            logger.error(
                "incident: %s runs eagerly: %s; input shapes %s",
                self.name,
                why,
                tensor_shapes(args, kwargs),
            )
        self.run.incidents += 1
        self._visit(key, Route("eager", why))

    def _visit(self, key: Signature, route: Route) -> None:
        if self.phase is Phase.PROVE:  # later the shapes are clients' own, and would pile up
            self.visited[key] = route
