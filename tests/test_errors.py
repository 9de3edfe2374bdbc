"""The error tree: one root, messages that name the place, bodies that a client can read."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest

from preheat import errors
from preheat.errors import ArchiveError, ConfigError, PreheatError, RequestError


def drawn(kind: type[PreheatError], before: str = "") -> list[str]:
    """The tree below `kind` as lines, without what stands beside the names."""
    # benches have errors of their own
    below = [each for each in kind.__subclasses__() if each.__module__ == errors.__name__]
    lines = []
    for each in below:
        last = each is below[-1]
        lines.append(f"{before}{'└' if last else '├'}── {each.__name__}")
        lines += drawn(each, before + ("    " if last else "│   "))
    return lines


def test_the_tree_is_as_it_is_drawn() -> None:
    assert errors.__doc__ is not None
    lines = [line[4:] for line in errors.__doc__.splitlines() if "── " in line]
    assert [re.sub(r"(── \w+) .*", r"\1", line) for line in lines] == drawn(PreheatError)


def test_whatever_is_raised_on_purpose_is_in_the_tree_or_a_signal_inside_one_wing() -> None:
    package = Path(errors.__file__).parent
    kinds = re.compile(r"^class (\w+)\((?:\w*Error|\w*Exception)\):", re.MULTILINE)
    outside = {
        name
        for path in package.rglob("*.py")
        if path.name != "errors.py"
        for name in kinds.findall(path.read_text())
    }
    assert outside == {"NoCode", "NotShared", "_Seen"}


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
