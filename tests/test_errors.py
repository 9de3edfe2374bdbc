"""The error tree: one root, messages that name the place, bodies that a client can read."""

from __future__ import annotations

import json
import pickle

import pytest

from preheat import errors
from preheat.errors import (
    ArchiveError,
    ConfigError,
    PipelineError,
    PreheatError,
    RequestError,
    WarmupError,
)

TREE = [ConfigError, RequestError, ArchiveError, WarmupError, PipelineError]


@pytest.mark.parametrize("kind", TREE)
def test_every_error_has_the_one_root_and_is_drawn(kind: type[PreheatError]) -> None:
    assert kind.__mro__[1] is PreheatError
    assert errors.__doc__ is not None
    assert kind.__name__ in errors.__doc__


def test_a_config_error_begins_with_its_path() -> None:
    assert (
        str(ConfigError("must be a list, got 3", "pt2.targets"))
        == "pt2.targets: must be a list, got 3"
    )
    assert str(ConfigError("cannot read it")) == "cannot read it"


def test_a_request_error_is_its_body() -> None:
    error = RequestError("must be at least 16, got 2", "width")
    assert str(error) == "width must be at least 16, got 2"
    assert json.loads(json.dumps(error.body())) == {
        "code": 400,
        "type": "InvalidRequest",
        "message": "width must be at least 16, got 2",
        "field": "width",
    }
    assert RequestError("an empty body").body()["field"] is None
    assert RequestError("too large", code=413).body()["code"] == 413


@pytest.mark.parametrize(
    "error", [ConfigError("a", "b"), RequestError("a", "b", 413), ArchiveError("a")]
)
def test_errors_cross_a_process(error: PreheatError) -> None:
    copied = pickle.loads(pickle.dumps(error))
    assert (type(copied), str(copied), vars(copied)) == (type(error), str(error), vars(error))
