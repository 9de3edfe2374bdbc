"""The gateway's queue, with a clock that the tests turn."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from preheat.errors import DeadlinePassed, QueueFull
from preheat.gateway.queue import OVERTAKEN, RUNS_A_WORKER, Entry, Limits, Queue


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def _queue(clock: Clock, **limits: float) -> Queue:
    return Queue(Limits(**limits), clock)  # type: ignore[arg-type]


def _groups(entries: list[Entry]) -> str:
    return "".join(str(entry.group) for entry in entries)


def _answer(queue: Queue, entries: list[Entry]) -> list[Entry]:
    """The host has run them; what it gets next."""
    for entry in entries:
        queue.remove(entry)
    return queue.take()


def _run_first(queue: Queue, inside: list[Entry]) -> list[Entry]:
    """The host has run the first batch of what is inside; what it gets next, which is inside
    now.
    """
    first = [entry for entry in inside if entry.run is inside[0].run]
    inside[:] = [entry for entry in inside if entry not in first]
    given = _answer(queue, first)
    inside += given
    return given


def test_the_oldest_request_says_whose_turn_it_is_and_others_like_it_go_along(
    clock: Clock,
) -> None:
    queue = _queue(clock, batch_size=2)
    for group in "ABABCA":
        queue.offer("key", group, 1.0)
    first = queue.take()
    assert _groups(first) == "AABB"
    assert _answer(queue, first[:2]) == []  # the worker has a run, and C's could still fill
    then = _answer(queue, first[2:])
    assert _groups(then) == "C"  # it is older than the last A
    assert _groups(_answer(queue, then)) == "A"


def test_a_run_goes_ahead_of_a_free_worker_only_if_it_is_full(clock: Clock) -> None:
    queue = _queue(clock, batch_size=2)
    for group in "AAB":
        queue.offer("key", group, 1.0)
    assert _groups(queue.take()) == "AA"
    queue.offer("key", "C", 1.0)
    assert queue.take() == []
    queue.offer("key", "B", 1.0)
    assert _groups(queue.take()) == "BB"


def test_another_group_waits_while_the_host_still_collects(clock: Clock) -> None:
    queue = _queue(clock, batch_size=4, settle=0.02)
    queue.offer("key", "A", 1.0)
    first = queue.take()
    assert _groups(first) == "A"
    queue.offer("key", "B", 1.0)
    assert queue.take() == []
    assert queue.next_event() == 0.02
    queue.offer("key", "A", 1.0)
    more = queue.take()
    assert _groups(more) == "A"
    clock.now = 0.02
    assert queue.take() == []
    assert queue.next_event() == math.inf
    assert _groups(_answer(queue, [*first, *more])) == "B"


def test_who_cannot_be_answered_in_time_is_refused_at_once(clock: Clock) -> None:
    queue = _queue(clock)
    with pytest.raises(DeadlinePassed, match="takes 2 s"):
        queue.offer("key", "A", 2.0, deadline=2.0)
    queue.offer("key", "A", 2.0, deadline=2.1)


def test_who_can_no_longer_be_answered_in_time_is_dropped(clock: Clock) -> None:
    queue = _queue(clock)
    for _ in range(2):
        queue.offer("key", "A", 1.0)
    queue.take()
    late = queue.offer("key", "A", 1.0, deadline=5.0)
    assert queue.next_event() == 4.0
    assert queue.expired() == []
    clock.now = 4.0
    assert queue.take() == []
    assert queue.expired() == [late] and queue.expired() == []
    assert queue.num_queued == 0


def test_too_many_are_refused_with_the_seconds_of_work_before_them(clock: Clock) -> None:
    queue = _queue(clock, num_workers=2, max_queued=5, max_queued_per_key=3)
    for _ in range(4):
        queue.offer("hog", "A", 1.0)
        queue.take()
    for _ in range(3):
        queue.offer("hog", "A", 2.0)
    with pytest.raises(QueueFull, match="3 requests of this key") as refused:
        queue.offer("hog", "A", 1.0)
    assert refused.value.retry_after == (4 * 1.0 + 3 * 2.0) / 2
    queue.offer("other", "A", 3.0)
    queue.offer("third", "A", 3.0)
    with pytest.raises(QueueFull, match="5 requests wait") as refused:
        queue.offer("fourth", "A", 1.0)
    assert refused.value.retry_after == (4 * 1.0 + 3 * 2.0 + 2 * 3.0) / 2


def test_who_leaves_is_not_run_and_makes_room(clock: Clock) -> None:
    queue = _queue(clock, max_queued=1)
    for _ in range(2):
        queue.offer("key", "A", 1.0)
        queue.take()
    left = queue.offer("key", "B", 1.0)
    queue.remove(left)
    queue.remove(left)
    stays = queue.offer("key", "C", 1.0)
    assert queue.num_queued == 1 and queue.num_inside == 2
    assert stays.run is None


def test_more_workers_take_more(clock: Clock) -> None:
    queue = _queue(clock)
    for _ in range(9):
        queue.offer("key", "A", 1.0)
    assert len(queue.take()) == 2
    queue.limits = Limits(num_workers=3)
    assert len(queue.take()) == 4


@pytest.mark.parametrize(
    "wrong", [{"num_workers": 0}, {"batch_size": 0}, {"settle": -1.0}, {"settle": math.nan}]
)
def test_limits_say_what_is_wrong(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Limits(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_a_request_takes_some_time(clock: Clock, seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds of work"):
        _queue(clock).offer("key", "A", seconds)


@given(
    shares=st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=2, max_size=4),
    groups=st.integers(1, 3),
    batch_size=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_keys_that_always_have_requests_get_equal_seconds_of_work(
    shares: list[float], groups: int, batch_size: int, seed: int
) -> None:
    """Though one asks for large pictures and another for small ones."""
    clock, draw = Clock(), random.Random(seed)
    queue = _queue(clock, batch_size=batch_size, max_queued=1000, max_queued_per_key=1000)
    seconds = {f"key{index}": share for index, share in enumerate(shares)}
    given_out, num_queued, inside = dict.fromkeys(seconds, 0.0), Counter[str](), list[Entry]()
    for _ in range(30 * len(seconds)):
        for key, each in seconds.items():
            while num_queued[key] < 3 * batch_size:
                queue.offer(key, draw.randrange(groups), each)
                num_queued[key] += 1
        for entry in _run_first(queue, inside):
            given_out[entry.key] += entry.seconds
            num_queued[entry.key] -= 1
    # one turn of the largest, and what may ride along before a key's oldest has its turn
    slack = max(shares) * (2 + (OVERTAKEN + 1) * batch_size)
    assert max(given_out.values()) - min(given_out.values()) <= 2 * slack


def test_who_was_away_has_saved_up_nothing(clock: Clock) -> None:
    queue = _queue(clock)
    inside: list[Entry] = []
    for _ in range(50):
        queue.offer("busy", "A", 1.0)
        _run_first(queue, inside)
    given_out: Counter[str] = Counter()
    for _ in range(20):
        queue.offer("busy", "A", 1.0)
        queue.offer("back", "A", 1.0)
    for _ in range(20):
        given_out.update(entry.key for entry in _run_first(queue, inside))
    assert abs(given_out["busy"] - given_out["back"]) <= 2


@given(
    batch_size=st.integers(1, 4),
    seconds=st.lists(st.sampled_from([0.3, 1.0]), min_size=1, max_size=4),
    behind=st.integers(0, 6),
    seed=st.integers(0, 1000),
)
@example(batch_size=4, seconds=[1.0, 0.3], behind=0, seed=0)
@settings(max_examples=60, deadline=None)
def test_nobody_starves(batch_size: int, seconds: list[float], behind: int, seed: int) -> None:
    """An endless stream of another group, of its own key and of others, goes past it only so
    often."""
    num_keys = len(seconds)
    clock, draw = Clock(), random.Random(seed)
    queue = _queue(clock, batch_size=batch_size, max_queued=10_000, max_queued_per_key=10_000)
    keys = [f"key{index}" for index in range(num_keys)]
    for _ in range(behind):
        queue.offer(keys[0], draw.choice("AB"), 1.0)
    rare = queue.offer(keys[0], "B", 1.0)
    # behind + 1 turns of its key, before each of which its riders have gone, and of each other
    # key's as much work, of requests a third as long
    bound = (behind + 2) * (
        OVERTAKEN + 2
    ) * batch_size * 4 * num_keys + 2 * RUNS_A_WORKER * batch_size
    passed, inside = 0, list[Entry]()
    while rare.run is None:
        for key, each in zip(keys, seconds, strict=True):
            for _ in range(batch_size):
                queue.offer(key, "A", each)
        passed += len(_run_first(queue, inside))
        assert passed <= bound


class Everything(RuleBasedStateMachine):
    """Requests come, go, run late and leave, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.queue = Queue(Limits(2, 3, 0.5, max_queued=12, max_queued_per_key=7), self.clock)
        self.queued: list[Entry] = []
        self.inside: list[Entry] = []
        self.ended: Counter[int] = Counter()
        self.num_taken = 0

    def _end(self, entry: Entry) -> None:
        self.ended[entry.number] += 1

    @rule(
        key=st.sampled_from("xyz"),
        group=st.sampled_from("AB"),
        seconds=st.sampled_from([0.25, 1.0, 4.0]),
        patience=st.sampled_from([0.25, 2.0, 8.0, math.inf]),
    )
    def offer(self, key: str, group: str, seconds: float, patience: float) -> None:
        own = sum(entry.key == key for entry in self.queued)
        try:
            entry = self.queue.offer(key, group, seconds, self.clock.now + patience)
        except QueueFull as full:
            assert own == 7 or len(self.queued) == 12
            assert full.retry_after > 0
        except DeadlinePassed:
            assert patience <= seconds
        else:
            assert own < 7 and len(self.queued) < 12 and patience > seconds
            self.queued.append(entry)
            self.num_taken += 1

    @rule()
    def take(self) -> None:
        for entry in self.queue.take():
            assert entry.latest > self.clock.now, "too late to be of use"
            self.queued.remove(entry)
            self.inside.append(entry)

    @rule()
    def expire(self) -> None:
        for entry in self.queue.expired():
            self.queued.remove(entry)
            self._end(entry)
        assert all(entry.latest > self.clock.now for entry in self.queued)

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if present := self.queued + self.inside:
            entry = data.draw(st.sampled_from(present))
            self.queue.remove(entry)
            (self.inside if entry in self.inside else self.queued).remove(entry)
            self._end(entry)

    @rule()
    def wait(self) -> None:
        self.clock.now = max(self.clock.now, min(self.queue.next_event(), self.clock.now + 5))

    @rule(seconds=st.sampled_from([0.25, 1.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def no_more_is_inside_than_may_be(self) -> None:
        assert self.queue.num_inside == len(self.inside) <= 2 * 3 * RUNS_A_WORKER
        for run in {id(entry.run): entry.run for entry in self.inside}.values():
            assert run is not None and len(run.inside) <= run.num_sent <= 3
            assert len({entry.group for entry in run.inside}) == 1

    @invariant()
    def each_ends_once_or_is_somewhere(self) -> None:
        assert set(self.ended.values()) <= {1}
        assert self.num_taken == len(self.ended) + len(self.queued) + len(self.inside)

    def teardown(self) -> None:
        """All that is left is served: nothing is stuck."""
        self.expire()
        for _ in range(100):
            self.take()
            for entry in list(self.inside):
                self.queue.remove(entry)
                self.inside.remove(entry)
                self._end(entry)
            self.wait()
            self.expire()
        assert not self.queued and self.queue.num_queued == 0


TestEverything = Everything.TestCase
TestEverything.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
