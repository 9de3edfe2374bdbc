"""Routes every call of a target: warmed shapes run compiled, everything else runs eagerly, at once.

A `Router` stands in for the `forward` of one target. It knows a call by its *signature*: shapes,
dtypes, memory formats and plain values of all arguments, which is what Dynamo guards on. Only
signatures that warm-up has seen reach compiled code, so no request can wait for the compiler.
Guards that a signature cannot foresee (global state) raise under `watch.forbid_compiling` and are
served eagerly too. Of a target's backends the first that has code for a call serves it, once the
code was compared with eager.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import MappingProxyType
from typing import Any, TypeVar

import torch

from preheat.compilation.backends.base import Backend, RoadName
from preheat.compilation.modes import (
    Calls,
    Eager,
    Observe,
    Open,
    Replay,
    Route,
    Serve,
    Target,
    Visits,
    Warm,
)
from preheat.compilation.modes import channels_last as _channels_last
from preheat.compilation.roads import Roads
from preheat.compilation.signatures import DynamicDims, Shapes, Signature

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Router(Target):
    """Stands in for `module.forward` of one target. At first every new signature is warmed;
    `freeze` ends that.

    Args:
        name: the target, such as `unet` or `vae.decoder`.
        forward: the target's own forward, eager.
        backends: tried in their order; none: everything is eager.
        channels_last: 4-D inputs are converted to channels_last, not to contiguous, before any code
            runs.
        roads: how one of the backends is chosen; default: not at all, they are tried in order.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        backends: Sequence[Backend] = (),
        *,
        channels_last: bool = False,
        roads: Roads | None = None,
    ) -> None:
        layout = _channels_last if channels_last else torch.Tensor.contiguous
        super().__init__(name, forward, tuple(backends), layout, roads or Roads())
        self.channels_last = channels_last
        self._mode: Callable[[Any, Any], Any]
        self._start_warming()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._mode(args, kwargs)

    def prefer(self, backend: Backend) -> None:
        """Ask this backend before all others."""
        if backend.idle and self.roads.is_open:
            self.roads.ruled_out[backend.road] = backend.reason or ""
            return
        self.backends = (backend, *self.backends)
        self._start_warming()

    @contextmanager
    def observing(self, *, keep: bool = False) -> Iterator[Calls]:
        """Calls in here run eagerly and are recorded; `keep` copies of their inputs, too."""
        calls = Calls()
        with self._as(Observe(self, calls, keep=keep)):
            yield calls

    def learn(self, calls: Iterable[Shapes] | None) -> None:
        """From now on sizes that differ between these calls share a graph; None: those that differ
        for its packages.
        """
        known = (backend.dims for backend in self.backends if backend.dims is not None)
        every = DynamicDims.varying(list(calls)) if calls is not None else None
        self.dims = every or next(known, DynamicDims())
        logger.info("%s: dynamic dimensions %s", self.name, dict(self.dims.ranges))

    @contextmanager
    def warming(self) -> Iterator[Visits]:
        """New signatures in here are compiled, and compared with eager."""
        self._warm.visits = visits = Visits()
        with self._as(Eager(self) if self.idle else self._warm):
            yield visits

    @contextmanager
    def replaying(self, num_events: Callable[[], int] = lambda: 0) -> Iterator[Visits]:
        """Calls in here are served as requests will be; `num_events` counts compile events."""
        visits = Visits()
        replay = Replay(self, visits, num_events)
        with self._as(Eager(self) if self.idle else replay):
            yield visits

    def give_up(self, key: Signature, route: Route) -> None:
        """Serve this signature eagerly, for the reason that `route` holds."""
        self._found[key] = route

    def freeze(self) -> None:
        """Serve: from now on nothing is warmed, and no route changes."""
        self.routes = MappingProxyType(dict(self._found))
        self._mode = Eager(self) if self.idle else Serve(self)

    def open(self) -> None:
        """Run everything compiled, whatever it costs: nothing is warmed."""
        self._mode = Eager(self) if self.idle else Open(self)

    @property
    def knows_dims(self) -> bool:
        """Whether nothing is to be learnt: packages know them already, and eager code does not
        care.
        """
        return self.idle or any(backend.dims is not None for backend in self.backends)

    @property
    def compiles(self) -> bool:
        """Whether warm-up has to compile, for all that is known so far."""
        if any(route.engine == "compiled" for route in self.routes.values()):
            return True
        whole = (backend.engine for backend in self.backends if backend.reason is None)
        return next(whole, None) == "compiled"

    @property
    def makes_code(self) -> bool:
        """Whether warm-up makes code that another start could use."""
        return self.roads.is_open or any(
            each.engine in ("compiled", "openvino") for each in self.backends
        )

    @property
    def wants_every_size(self) -> bool:
        """Whether warm-up has to meet each batch size although one graph serves them all."""
        return any(backend.wants_every_size for backend in self.backends)

    @property
    def roads_to_be_had(self) -> tuple[RoadName, ...]:
        return (*(backend.road for backend in self.backends), "eager")

    def _start_warming(self) -> None:
        self._found: dict[Signature, Route] = dict(self.routes)
        self.routes = MappingProxyType(self._found)
        self._warm = Warm(self, self._found)
        self._mode = Eager(self) if self.idle else self._warm

    @contextmanager
    def _as(self, mode: Callable[[Any, Any], Any]) -> Iterator[None]:
        before, self._mode = self._mode, mode
        try:
            yield
        finally:
            self._mode = before


@contextmanager
def every(
    routers: Mapping[str, Router], mode: Callable[[Router], AbstractContextManager[T]]
) -> Iterator[dict[str, T]]:
    """In here each of these routers is in this mode, such as `Router.observing`; what it gives, by
    name.
    """
    with ExitStack() as stack:
        yield {name: stack.enter_context(mode(router)) for name, router in routers.items()}
