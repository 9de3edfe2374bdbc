"""A language model behind the worker: hot before READY, requests that come, go and fail in each
other's middle, what each is told.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.text.texts import BUCKETS, MAX_LENGTH, SLOTS, Client, config, start, tokens
from preheat.errors import ConfigError, ModelError
from preheat.models import tiny
from preheat.models.text import runner
from preheat.models.text.job import Answer, Job
from preheat.models.text.runner import TextRunner
from preheat.models.text.sampler import Choice, Sampler, Sampling
from preheat.protocol.call import Call
from preheat.worker.worker import Worker


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer knows one token more."""
    folder = tiny.build("llama", tmp_path_factory.mktemp("text") / "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def worker(folder: Path) -> Iterator[Worker[Job, Answer]]:
    torch.compiler.reset()
    with mock.patch.dict(os.environ), start(config(folder)) as own:
        yield own
    torch.compiler.reset()


@pytest.fixture
def client(worker: Worker[Job, Answer]) -> Client:
    return Client(worker)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def generated(model: Any, prompt: str, new: int, **options: Any) -> str:
    """The text that transformers' own `generate` gives, to its end token."""
    inside = torch.tensor([list(tokens(prompt))])
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(options.pop("seed", 0))
        made = model.generate(inside, max_new_tokens=new, **options)
    from preheat.models.text.tiny import tokenizer

    text: str = tokenizer().decode(made[0, inside.shape[1] :], skip_special_tokens=True)
    return text


def test_it_is_compiled_and_hot_a_graph_a_bucket_and_one_to_decode(
    worker: Worker[Job, Answer],
) -> None:
    state = worker.current_state()
    assert (state.state, state.compiles_at_boot) == ("hot", len(BUCKETS) + 1)
    assert {(str(row.bucket), row.target, row.engine) for row in state.buckets} == {
        (f"prompt={length}", target, "compiled")
        for length in BUCKETS
        for target in ("prefill", "decode")
    }


def test_requests_that_come_and_go_compile_nothing_and_mix_nothing(
    worker: Worker[Job, Answer], client: Client, model: Any
) -> None:
    """Of random lengths, greedy and drawn, joining at random times; some leave."""
    dice, before = random.Random(5), worker.current_state().requests
    asked: dict[str, dict[str, Any]] = {}
    gone: set[str] = set()
    while len(asked) < 60 or client.open:
        if len(asked) < 60 and len(client.open) < SLOTS + 2 and dice.random() < 0.7:
            prompt = "".join(dice.choices("abc €", k=dice.randint(1, 8)))
            way: dict[str, Any] = dice.choice(
                [{"temperature": 0.0}, {"seed": dice.randrange(2**63)}]
            )
            name = f"request {len(asked)}"
            asked[name] = {"prompt": prompt, "max_new_tokens": dice.randint(1, 12), **way}
            client.send(name, **asked[name])
        client.turn()
        if client.open and dice.random() < 0.1:
            gone.add(name := dice.choice(list(client.open)))
            client.leave(name)
    stayed = asked.keys() - gone
    assert len(gone) > 3 and len(stayed) > 40
    for name in sorted(stayed):
        own = dict(asked[name])
        prompt, new = own.pop("prompt"), own.pop("max_new_tokens")
        drawn = {"do_sample": own.pop("temperature", 1.0) > 0, "top_k": 0, **own}
        assert client.text(name) == generated(model, prompt, new, **drawn), name
    state = worker.current_state()
    assert (state.compiles_since_ready, state.incidents, state.eager_fallbacks) == (0, 0, 0)
    done = [name for name in asked if client.body(name).count(b'{"event": "done"')]
    assert state.requests - before == len(done)
    assert isinstance(worker.runner, TextRunner) and worker.runner.idle


def test_who_waits_is_served_in_order_and_at_most_one_prefill_a_turn(client: Client) -> None:
    for index in range(SLOTS + 2):
        client.send(str(index), prompt="a", max_new_tokens=6, temperature=0.0, logprobs=0)
    begun: list[list[str]] = []
    while client.open:
        client.turn()
        begun.append([n for n in client.told if len(client.events(n)) > 1])
    assert [len(new) for new in begun[:SLOTS]] == [1, 2, 3, 4]
    order = sorted(client.told, key=lambda n: next(i for i, new in enumerate(begun) if n in new))
    assert order == [str(index) for index in range(SLOTS + 2)]


def test_who_leaves_frees_a_slot_at_the_next_turn(client: Client) -> None:
    for index in range(SLOTS + 1):
        client.send(str(index), prompt="a", max_new_tokens=30, temperature=0.0, logprobs=0)
    for _ in range(SLOTS + 1):
        client.turn()
    waiting = str(SLOTS)
    assert len(client.events(waiting)) == 1
    client.leave("0")
    client.turn()
    assert len(client.events(waiting)) > 1
    client.drain()


def test_an_answer_tells_its_seed_which_gives_it_again(client: Client) -> None:
    client.send("first", prompt="again", max_new_tokens=10)
    client.drain()
    done = client.events("first")[-1]
    assert done["event"] == "done" and done["usage"]["prompt_tokens"] == 5
    client.send("second", prompt="again", max_new_tokens=10, seed=done["seed"])
    client.drain()
    assert client.text("second") == client.text("first")
    (first,) = (part.response for part in client.told["second"][:1])
    assert first is not None
    assert first.headers["content-type"] == "application/x-ndjson"
    assert first.headers["x-preheat-seed"] == str(done["seed"])
    assert first.headers["x-preheat-bucket"] == "prompt=8"


def test_a_stop_string_ends_a_text_and_is_no_part_of_it(client: Client) -> None:
    client.send("whole", prompt="b", max_new_tokens=20, temperature=0.0)
    client.drain()
    whole = client.text("whole")
    stop = whole[6:8]
    client.send("cut", prompt="b", max_new_tokens=20, temperature=0.0, stop=stop)
    client.drain()
    assert client.text("cut") == whole[: whole.index(stop)]
    assert client.events("cut")[-1]["finish_reason"] == "stop"


def test_logprobs_come_with_each_token(client: Client) -> None:
    client.send("x", prompt="c", max_new_tokens=4, temperature=0.0, logprobs=2)
    client.drain()
    told = [event for event in client.events("x") if event["event"] == "text"]
    for event in told:  # a byte, or half of a character
        assert list(tokens(event["token_text"])) == [event["token"]] or (
            event["token_text"] == "\ufffd"
        )
    assert len(told) == client.events("x")[-1]["usage"]["completion_tokens"]
    for event in told:
        (best, second) = event["top_logprobs"]
        assert best == {name: event[name] for name in ("token", "token_text", "logprob")}
        assert second["logprob"] <= best["logprob"] <= 0


def test_who_takes_one_message_only_gets_everything_at_the_end(
    worker: Worker[Job, Answer],
) -> None:
    client = Client(worker, live=False)
    client.send("x", prompt="d", max_new_tokens=5, seed=1)
    client.drain()
    *before, last = client.told["x"]
    assert before and all(part.response is None for part in before)
    assert last.response is not None
    kinds = [json.loads(line)["event"] for line in last.response.body.splitlines()]
    assert (kinds[0], kinds[-1]) == ("queued", "done")


def test_a_host_of_batches_gets_whole_answers(worker: Worker[Job, Answer], model: Any) -> None:
    calls = [Call({"body": {"prompt": p, "max_new_tokens": 6, "temperature": 0}}) for p in "efghij"]
    pending = worker.inference(worker.preprocess(calls))
    for prompt, response in zip("efghij", worker.postprocess(pending), strict=True):
        told = [json.loads(line) for line in response.body.splitlines()]
        text = "".join(event["text"] for event in told if event["event"] == "text")
        assert text == generated(model, prompt, 6, do_sample=False)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": "x" * 40}, "prompt", "has 40 tokens; the largest bucket is 32"),
    ({"prompt": "x" * 30, "max_new_tokens": 19}, "max_new_tokens", "together at most 48"),
    ({"prompt": ""}, "prompt", "is empty"),
    ({}, "prompt", "is missing; send it, or messages"),
    ({"prompt": "x", "messages": []}, "prompt", "stands beside messages"),
    ({"messages": [{"role": "user", "content": "x"}]}, "messages", "need a chat template"),
    ({"prompt": "x", "max_tokens": 3}, "max_tokens", "here it is max_new_tokens"),
    ({"prompt": "x", "temperature": -1}, "temperature", "from 0 to 100"),
    ({"prompt": "x", "temperature": 1e-9}, "temperature", "must be 0, or from 1e-06 to 100"),
    ({"prompt": "x<more>"}, "prompt", "holds a token that the model has no embedding of"),
    ({"prompt": "x", "top_p": 0}, "top_p", "above 0"),
    ({"prompt": "x", "stop": ["a", ""]}, "stop", "1 to 100 characters"),
    ({"prompt": "x", "stop": ["a"] * 9}, "stop", "at most 8"),
    ({"prompt": "x", "logprobs": 21}, "logprobs", "from 0 to 20"),
    ({"prompt": "x", "seed": -1}, "seed", "whole number"),
    ({"prompt": ["x"]}, "prompt", "must be text"),
]


@pytest.mark.parametrize(("body", "field", "message"), REFUSED)
def test_what_cannot_be_served_is_refused_by_name_and_costs_nobody(
    client: Client, body: dict[str, Any], field: str, message: str
) -> None:
    client.send("good", prompt="k", max_new_tokens=2)
    client.send("bad", **body)
    client.turn()
    (refusal,) = client.events("bad")
    assert (client.code("bad"), refusal["field"]) == (400, field)
    assert message in refusal["message"]
    client.drain()
    assert client.events("good")[-1]["event"] == "done"


def test_a_row_that_fails_costs_no_other(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    class Poisoned(Sampler):
        def __init__(self, sampling: Sampling) -> None:
            super().__init__(sampling)
            # an infinite one is what torch.multinomial refuses
            self.added = {12: torch.inf, 13: torch.nan}.get(sampling.seed, 0.0)

        def choose(self, logits: torch.Tensor) -> Choice:
            return super().choose(logits + self.added)

    monkeypatch.setattr(runner, "Sampler", Poisoned)
    for seed in (12, 13, 14):
        client.send(str(seed), prompt="l", seed=seed, max_new_tokens=4)
    client.drain()
    assert [client.events(str(seed))[-1]["event"] for seed in (12, 13, 14)] == [
        "error",
        "error",
        "done",
    ]


def test_a_step_that_fails_fails_who_was_in_it_and_the_next_are_served(
    worker: Worker[Job, Answer], client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.send("in it", prompt="m", max_new_tokens=9, seed=1)
    client.turn()
    with monkeypatch.context() as broken:
        broken.setattr(worker.model.slots, "decode", lambda _: 1 / 0)  # type: ignore[attr-defined]
        client.turn()
    (*_, told) = client.events("in it")
    assert (told["event"], told["code"]) == ("error", 500)
    client.send("next", prompt="m", max_new_tokens=2)
    client.drain()
    assert client.events("next")[-1]["event"] == "done"


def test_who_waited_longer_than_its_deadline_is_told_so(worker: Worker[Job, Answer]) -> None:
    assert worker.turns is not None
    late = Call({"body": {"prompt": "n"}}, {"x-preheat-deadline": str(int(time.time()) * 1000 - 1)})
    (part,) = worker.turns.take({"x": lambda: late}).values()
    assert part.last and part.response is not None
    assert json.loads(part.response.body.splitlines()[-1])["code"] == 504


def test_messages_are_written_by_the_folders_template(folder: Path, tmp_path: Path) -> None:
    from preheat.models.text.request import Reader

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'fool' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.role[0] }}:{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    reader = Reader(config(folder).text, tokenizer, 300)  # type: ignore[arg-type]

    def asked(*messages: dict[str, Any]) -> Call:
        return Call({"body": {"messages": list(messages)}})

    job = reader.read(asked({"role": "user", "content": "hi"}))
    assert tokenizer.decode(job.prompt) == "u:hi;a:"
    with pytest.raises(Exception, match=r"messages\[1\] must be an object of role and content"):
        reader.read(asked({"role": "user", "content": "x"}, {"role": "user"}))
    with pytest.raises(Exception, match="nothing that the model's chat template takes"):
        reader.read(asked({"role": "fool", "content": "x"}))


def test_a_model_of_too_few_positions_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"text.max_length: 1024 is more than the 256 positions"):
        start(config(folder, max_length=1024))


def test_a_model_that_gives_other_logits_in_slots_is_refused_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def scaled(model: Any, *args: Any, **kwargs: Any) -> Any:
        result = forward(model, *args, **kwargs)
        result.logits *= 1.0 if kwargs.get("attention_mask") is None else 1.01
        return result

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with pytest.raises(ModelError, match="LlamaForCausalLM gives other logits in slots"):
        start(config(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batchSize": 3}, "batchSize: must be 4, as many as text.slots, got 3"),
        ({"continuousBatching": False}, "continuousBatching: must be true for text"),
        ({"pt2": {"shapes": {"batch_sizes": [2]}}}, "pt2.shapes.batch_sizes: is not for text"),
        ({"pt2": {"compile": {"enable": True, "backend": "openvino"}}}, "openvino is not for text"),
        ({"pt2": {"compile": {"enable": True, "backend": "auto"}}}, "auto is not for text"),
        ({"text": {"prefill_buckets": [8, 8]}}, "text.prefill_buckets"),
        ({"text": {"max_length": 256}}, "256 leaves no room for an answer"),
    ],
)
def test_a_yaml_that_cannot_be_served_is_refused_by_path(
    change: dict[str, Any], message: str
) -> None:
    from preheat.config.model import ModelConfig

    yaml = {"batchSize": 4, "continuousBatching": True, "text": {"slots": 4}}
    yaml = {**yaml, **change}
    yaml["text"] = {"slots": 4, **change.get("text", {})}
    with pytest.raises(ConfigError) as refused:
        ModelConfig.parse(yaml)
    assert message in str(refused.value)


def test_the_longest_sequence_is_served(client: Client) -> None:
    client.send("x", prompt="o" * BUCKETS[-1], temperature=0.0)
    client.drain()
    done = client.events("x")[-1]
    assert done["finish_reason"] == "stop" or (
        done["usage"]["completion_tokens"] == MAX_LENGTH - BUCKETS[-1]
    )


def test_both_steps_are_warmed_whatever_ends_an_answer(folder: Path) -> None:
    """Here the first token is its last: no more fit."""
    torch.compiler.reset()
    with start(config(folder, prefill_buckets=[MAX_LENGTH - 1])) as own:
        engines = {(row.target, row.engine) for row in own.state.buckets}
        assert engines == {("prefill", "compiled"), ("decode", "compiled")}
    torch.compiler.reset()


def test_a_default_temperature_that_logits_overflow_by_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="must be 0, or from 1e-06 to 100") as refusal:
        config(folder, defaults={"temperature": 1e-40})
    assert "text.defaults.temperature" in str(refusal.value)
