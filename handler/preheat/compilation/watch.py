"""Sees every compilation: counts Dynamo's compile events, and forbids new ones once the server is
hot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch._C._dynamo.eval_frame import set_guard_complete_hook
from torch._dynamo import callback as dynamo_callback
from torch._dynamo.utils import counters as dynamo_counters

# What torch says when the stance is fail_on_recompile (torch/_dynamo/eval_frame.py); it is a plain
# RuntimeError.
_REFUSAL = "Detected recompile when torch.compile stance is 'fail_on_recompile'"


class CompileWatch:
    """Counts compile events of this process: Dynamo traces, lazy backward compiles, CUDA graph
    recordings.

    Nested events count once (torch reports the outermost). Cache hits still trace, so they count
    too: the watch answers "did a request wait for the compiler", not "was machine code made".
    """

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()
        dynamo_callback.callback_handler.register_start_callback(self._note)

    def _note(self, args: Any) -> None:
        self.events[args.callback_trigger.name.lower()] += 1

    @property
    def num_events(self) -> int:
        return sum(dict(self.events).values())  # a copy: another thread may compile meanwhile

    def close(self) -> None:
        with suppress(ValueError):  # torch.compiler.reset() has let go of it already
            dynamo_callback.callback_handler.remove_start_callback(self._note)


def forbid_compiling() -> None:
    """From here on a guard that fails raises before anything compiles; see `refused_guards`.
    Process-wide.
    """
    torch.compiler.set_stance("fail_on_recompile")


def allow_compiling() -> None:
    torch.compiler.set_stance("default")


@contextmanager
def eagerly() -> Iterator[None]:
    """Run without compiled code, regional blocks included, whatever the stance outside is."""
    with torch.compiler.set_stance("force_eager"):
        yield


def refused_guards(error: BaseException) -> str | None:
    """The guards that failed, if `error` is torch refusing to compile under `forbid_compiling`;
    None for any other error.

    The text names code locations, shapes and dtypes, never tensor contents.
    """
    text = str(error)
    if not isinstance(error, RuntimeError) or not text.startswith(_REFUSAL):
        return None
    return text[len(_REFUSAL) :].lstrip(". ") or "a guard that this version of torch does not name"


def raise_recompile_limits(num_graphs: int) -> None:
    """Make room for `num_graphs` more per code object, and make hitting the limit an error.

    Dynamo's default is 8 per code object, and past it it goes eager silently
    (torch/_dynamo/config.py). Other modules of the class may have some already.
    """
    config: Any = torch._dynamo.config
    most = num_graphs and _num_graphs() + num_graphs
    config.recompile_limit = max(config.recompile_limit, most)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, most)
    config.fail_on_recompile_limit_hit = True


def hit_recompile_limit(error: BaseException) -> bool:
    """Whether Dynamo has as many graphs of this code as it may; those that it has still run."""
    return isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit)


_with_graphs = WeakSet[object]()


class GraphWatch:
    """Whether what runs in here runs a graph of Dynamo's: a compile event alone says nothing.

    Dynamo keeps graphs by code, and a module's parameters are inputs of them: another module of the
    class, such as that of a worker that was started again, runs the first one's and makes none.

    Args:
        forward: what is run.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        module = getattr(forward, "__self__", None)
        self._kind: object = forward if module is None else type(module)
        self._ran = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        graphs, hits = _num_graphs(), list[bool]()
        before = set_guard_complete_hook(None)

        def looked_up(cache_hit: bool) -> bool:
            hits.append(cache_hit)
            return before(cache_hit) if before is not None else cache_hit

        set_guard_complete_hook(looked_up)
        try:
            yield
        finally:
            set_guard_complete_hook(before)
            if _num_graphs() != graphs:
                _with_graphs.add(self._kind)
                self._ran = True
            self._ran |= any(hits) and self._kind in _with_graphs

    @property
    def ran_graph(self) -> bool:
        return self._ran


def _num_graphs() -> int:
    """Those that Dynamo has captured in this process."""
    return int(dynamo_counters["stats"]["unique_graphs"])


def cache_counters(own_folder: Path | None = None) -> tuple[int, int]:
    """(hits, misses) of the compiler's caches so far, as the compiler counts them.

    On a CPU it counts a hit when it finds its own records, even if it then builds shared objects
    that were not there. Every one in `own_folder`, the Inductor folder that no other process writes
    to, counts as a miss.
    """
    autograd, inductor = dynamo_counters["aot_autograd"], dynamo_counters["inductor"]
    hits = autograd["autograd_cache_hit"] + inductor["fxgraph_cache_hit"]
    # An AOTAutograd miss asks the FX graph cache next, so only the latter's miss means that
    # Inductor worked.
    built = sum(1 for _ in own_folder.glob("??/*.so")) if own_folder else 0
    return hits, inductor["fxgraph_cache_miss"] + built


def cache_outcome(before: tuple[int, int], after: tuple[int, int]) -> str | None:
    """`hit`, `partial` or `miss` between two readings of `cache_counters`; None where nothing was
    looked up.
    """
    hits, misses = after[0] - before[0], after[1] - before[1]
    if hits and misses:
        return "partial"
    if misses:
        return "miss"
    return "hit" if hits else None
