"""The router's verbs on code that tests write themselves: nothing is compiled here."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from preheat.compilation.backends.base import EngineName, Precompiled
from preheat.compilation.modes import Route
from preheat.compilation.router import Router
from preheat.compilation.signatures import Inputs


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


class Code:
    """Doubles as eager does, but for `error`; `fails` on tensors of that many rows."""

    engine: EngineName = "aot"
    is_compared = True

    def __init__(self, name: str = "code", error: float = 0.0, fails: int = 0, most: int = 9):
        self.name, self.error, self.fails, self.most = name, error, fails, most
        self.calls = 0

    def matches(self, inputs: Inputs) -> bool:
        return len(inputs[0][0]) <= self.most

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if len(x) == self.fails:
            raise NotImplementedError("no kernel")
        return double(x) + self.error


def routed(*codes: Code) -> Router:
    return Router("toy", double, [Precompiled(code.engine, [code]) for code in codes])


def warm(router: Router, *rows: int) -> dict[int, Route]:
    found = {}
    for number in rows:
        with router.warming() as visits:
            router(torch.ones(number))
        (found[number],) = visits.routes.values()
    return found


def serve(router: Router, rows: int) -> tuple[set[EngineName], int, int]:
    """The engines, the unwarmed calls and the fallbacks of a run with one call."""
    router.start_run()
    assert torch.equal(router(torch.ones(rows)), torch.full((rows,), 2.0))
    return router.run.engines, router.run.unwarmed, router.run.fallbacks


def test_the_first_backend_that_has_code_for_a_call_serves_it() -> None:
    small, large = Code("small", most=2), Code("large")
    router = routed(small, large)
    engines = {rows: route.code for rows, route in warm(router, 1, 2, 3).items()}
    assert engines == {1: small, 2: small, 3: large}
    router.freeze()
    assert serve(router, 3) == ({"aot"}, 0, 0)


def test_code_that_fails_on_a_shape_leaves_that_shape_to_the_next(
    caplog: pytest.LogCaptureFixture,
) -> None:
    router = routed(Code("first", fails=2), second := Code("second"))
    with caplog.at_level(logging.ERROR):
        routes = warm(router, 1, 2)
    assert routes[1].reason is None and routes[2].code is second
    assert "NotImplementedError: no kernel" in str(routes[2].reason)
    assert "toy: aot failed, this shape stays eager" in caplog.text


def test_code_that_is_wrong_once_serves_no_shape_that_was_not_compared() -> None:
    """And those that it served before, each of which agreed with eager, it goes on serving."""
    code = Code()
    router = routed(code)
    warm(router, 1)
    code.error = 0.1
    wrong = warm(router, 2)
    code.error = 0.0
    wrong |= warm(router, 3)
    assert all("differs from eager" in str(route.reason) for route in wrong.values())
    router.freeze()
    assert serve(router, 1) == ({"aot"}, 0, 0)
    assert serve(router, 2) == ({"eager"}, 0, 1)


def test_proven_code_serves_a_shape_that_warm_up_did_not_meet_and_unproven_code_does_not() -> None:
    proven = routed(Code(most=4))
    warm(proven, 1)
    for router, expected in ((proven, ({"aot"}, 0, 0)), (routed(Code()), ({"eager"}, 1, 0))):
        router.freeze()
        assert serve(router, 2) == expected
    assert serve(proven, 5) == ({"eager"}, 1, 0)


def test_observed_calls_run_eagerly_and_are_kept_as_they_came() -> None:
    code = Code()
    router = routed(code)

    given = torch.ones(2)
    with router.observing(keep=True) as calls:
        router(given)
        given.zero_()
    ((inputs, _),) = calls.examples.values()
    assert code.calls == 0 and torch.equal(inputs[0], torch.ones(2))
    with router.observing() as others:
        router(torch.ones(3))
    assert not others.examples and not router.routes and len(calls.shapes) == 1


def test_a_replay_serves_and_names_the_calls_that_compiled() -> None:
    code, events = Code(), 0
    router = routed(code)
    warm(router, 1, 2)
    with router.replaying(lambda: events) as quiet:
        router(torch.ones(1))
    assert not quiet.recompiled and [each.code for each in quiet.routes.values()] == [code]
    with router.replaying(lambda: code.calls) as loud:
        router(torch.ones(2))
    assert loud.recompiled == set(loud.routes)


def test_after_the_proof_no_route_changes() -> None:
    router = routed(Code())
    (route,) = warm(router, 1).values()
    router.freeze()
    (key,) = router.routes
    with pytest.raises(TypeError):
        router.routes[key] = Route("eager")  # type: ignore[index]
    router.give_up(key, Route("eager", "too late"))
    assert serve(router, 1) == ({"aot"}, 0, 0) and route.engine == "aot"


def test_a_run_outside_every_bucket_is_eager_and_no_fallback() -> None:
    code = Code()
    router = routed(code)
    warm(router, 1)
    calls = code.calls
    for settle in (router.freeze, router.open):
        settle()
        router.start_run(bypass=True)
        router(torch.ones(1))
        run = router.run
        assert (run.engines, run.unwarmed, run.fallbacks) == ({"eager"}, 0, 0)
    assert code.calls == calls


def test_nor_is_it_one_where_nothing_but_eager_is_left() -> None:
    refused = Precompiled("aot", [], "the package is another machine's")
    router = Router("toy", double, [refused])
    router.freeze()
    for bypass, fallbacks in ((True, 0), (False, 1)):
        router.start_run(bypass=bypass)
        router(torch.ones(1))
        assert (router.run.engines, router.run.fallbacks) == ({"eager"}, fallbacks)


@pytest.mark.parametrize("smallest", [True, False])
def test_want_of_memory_counts_against_code_at_the_smallest_batch_alone(smallest: bool) -> None:
    class Hungry(Code):
        def __call__(self, x: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

    router = routed(Hungry())
    router.start_run(smallest=smallest)
    if smallest:
        assert "OutOfMemoryError" in str(warm(router, 1)[1].reason)
    else:
        with pytest.raises(torch.OutOfMemoryError):
            warm(router, 1)
        assert not router.routes
