"""What the bench of peers makes of its rounds, and how it goes on; nothing here is timed."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from bench import peers, peers_report
from bench.peer_loop import Spec
from bench.peers import Peer, Record, Setting
from bench.processes import LineProcess
from bench.profiles import PROFILES
from preheat.errors import PreheatError
from preheat.torchserve.server import ROOT

TINY = PROFILES["tiny"]
QUIET = Console(file=io.StringIO())
REQUESTS = [{"prompt": "x", "height": 8, "width": 8, "seed": seed} for seed in range(3)]
HEAD = {
    "profile": "tiny",
    "dtype": "float32",
    "steps": 4,
    "machine": {"cpu": "a processor", "num_cores": 2, "gpus": []},
    "on_gpu": False,
    "versions": {"torch": "2.13.0"},
    "rounds": 3,
    "asked_for": ["eager", "genai", "handler", "preheat"],
}


def png(value: int) -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(encoded, "png")
    return encoded.getvalue()


class Fake:
    """A peer that takes so many milliseconds for a request, and fails at the given one."""

    def __init__(self, milliseconds: float, value: int = 100, fails_at: int = -1) -> None:
        self.milliseconds, self.picture, self.fails_at = milliseconds, png(value), fails_at
        self.seeds: list[int] = []

    def paint(self, request: Any) -> tuple[float, bytes]:
        if len(self.seeds) == self.fails_at:
            raise PreheatError("out of paint\nand more")
        self.seeds.append(request["seed"])
        return self.milliseconds, self.picture

    @property
    def peer(self) -> Peer:
        return Peer(self.paint, 1, lambda: {"engines": ["openvino"]})


FAKES = {"eager": 200.0, "handler": 150.0, "preheat": 100.0}


def run(work: Path, fakes: dict[str, Fake], until: float = float("inf")) -> dict[str, Any]:
    """A call of the bench with these for peers."""
    record = Record(work, HEAD)

    def start(kind: str) -> Peer:
        if kind not in fakes:
            raise PreheatError("not installed")
        return fakes[kind].peer

    kinds: Sequence[str] = HEAD["asked_for"]  # type: ignore[assignment]
    found = peers.start_all(kinds, lambda _: None, start, REQUESTS[:1], record, QUIET)
    peers.in_rounds(found, REQUESTS, record, until, QUIET)
    return {**record.document, **peers_report.ratios(record.document)}


def fakes(**other: Fake) -> dict[str, Fake]:
    return {**{kind: Fake(took) for kind, took in FAKES.items()}, **other}


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Peer, "peak_bytes", lambda self: 2**20)


def test_every_request_goes_to_every_peer_in_every_round(tmp_path: Path) -> None:
    made = fakes()
    document = run(tmp_path, made)
    for fake in made.values():
        assert fake.seeds == [0, *[0, 1, 2] * 3], "once to warm, then three rounds"
    assert {kind: len(row.get("milliseconds", ())) for kind, row in document["peers"].items()} == {
        "eager": 3,
        "genai": 0,
        "handler": 3,
        "preheat": 3,
    }
    assert document["peers"]["preheat"]["engines"] == ["openvino"]


def test_ratios_are_of_the_rounds_and_the_verdict_of_the_fastest_loop(tmp_path: Path) -> None:
    document = run(tmp_path, fakes(genai=Fake(90.0)))
    assert document["x_eager"]["preheat"]["median"] == 2.0
    assert document["preheat_over"]["genai"]["median"] == 0.9
    first, second = peers_report.verdict(document)
    assert "OpenVINO GenAI, a loop): 0.90; 0.95 missed" in first
    assert second == "Preheat over TorchServe's BaseHandler, pt2, served: 1.50"
    document = run(tmp_path / "other", fakes())
    assert "diffusers, eager, a loop): 2.00; 0.95 reached" in peers_report.verdict(document)[0]


def test_a_call_goes_on_where_the_last_one_was(tmp_path: Path) -> None:
    first = run(tmp_path, fakes(), until=0.0)
    assert peers_report.num_rounds(first) == 0
    rows = json.loads((tmp_path / "progress.json").read_text())
    rows["peers"]["eager"]["first_picture_seconds"] = 77.0  # of the first start, to be kept
    for row in rows["peers"].values():
        if "error" not in row:
            row["milliseconds"] = [[1.0, 1.0, 1.0]] * 2
    (tmp_path / "progress.json").write_text(json.dumps(rows))
    made = fakes()
    document = run(tmp_path, made)
    assert made["preheat"].seeds == [0, 0, 1, 2], "one round was left"
    assert document["peers"]["eager"]["first_picture_seconds"] == 77.0
    assert peers_report.num_rounds(run(tmp_path, made)) == 3, "a finished run begins anew"
    assert made["preheat"].seeds[4:] == [0, *[0, 1, 2] * 3]


def test_what_is_of_another_run_is_thrown_away(tmp_path: Path) -> None:
    run(tmp_path, fakes(), until=0.0)
    (tmp_path / "compiled-eager").mkdir()
    assert Record(tmp_path, HEAD).peers
    assert not Record(tmp_path, {**HEAD, "steps": 8}).peers
    assert not (tmp_path / "compiled-eager").exists(), "and what it had compiled"


def test_a_peer_that_fails_is_a_row_with_its_error_and_the_others_go_on(tmp_path: Path) -> None:
    document = run(tmp_path, fakes(handler=Fake(150.0, fails_at=5)))
    assert document["peers"]["genai"] == {"error": "PreheatError: not installed"}
    assert document["peers"]["handler"]["error"] == "PreheatError: out of paint"
    assert peers_report.num_rounds(document) == 3
    assert set(document["x_eager"]) == {"eager", "preheat"}


def test_pictures_are_held_against_eagers(tmp_path: Path) -> None:
    document = run(tmp_path, fakes(preheat=Fake(100.0, value=101)))
    assert document["peers"]["handler"]["psnr_db"] == 99.0
    assert document["peers"]["preheat"]["psnr_db"] == 48.1


def test_the_result_is_a_file_a_picture_and_a_table_for_a_document(tmp_path: Path) -> None:
    document = run(tmp_path, fakes())
    peers_report.write(document, tmp_path)
    assert json.loads((tmp_path / "peers.json").read_text()) == document
    assert (tmp_path / "peers.png").read_bytes()[:4] == b"\x89PNG"
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(peers_report.table(document))
    rows = [line for line in console.export_text().splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 4 and "2.00 (2.00-2.00)" in rows[-1]
    assert "not installed" in rows[3]


def test_without_its_environment_genai_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "PEERS_BIN", tmp_path / "bin")
    setting = Setting(TINY, "float32", tmp_path, 1)
    with pytest.raises(PreheatError, match="make setup-peers"):
        setting.prepare("genai")


def told(load: str, *requests: Any) -> list[Any]:
    """What a loop answers whose `load` is this expression."""
    spec = Spec("eager", "/m", "float32", [(64, 64)], 5.0, 1)
    done = subprocess.run(
        [sys.executable, "-c", f"from bench.peer_loop import serve; serve({load}, dict)"],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        input="\n".join([spec.to_json(), *map(json.dumps, requests)]) + "\n",
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_loop_paints_what_each_line_asks_for() -> None:
    first, *rest = told("lambda spec: lambda request: spec.kind.encode() * request", 1, 2)
    assert first == {"versions": {}}
    pictures = [base64.b64decode(peers.no_error(answer)["picture"]) for answer in rest]
    assert pictures == [b"eager", b"eagereager"]
    assert all(answer["milliseconds"] >= 0 for answer in rest)


def test_a_loop_that_cannot_load_or_paint_says_why() -> None:
    (answer,) = told("lambda spec: open(spec.model + '/none')")
    with pytest.raises(PreheatError, match=r"FileNotFoundError: .*'/m/none'"):
        peers.no_error(answer)
    assert told("lambda spec: lambda request: b'' / request", 1, 1)[1:] == [
        {"error": "TypeError: unsupported operand type(s) for /: 'bytes' and 'int'"}
    ]


def test_a_loop_of_an_environment_that_lacks_something_has_failed() -> None:
    with pytest.raises(PreheatError, match=r"peer_genai failed: .*openvino_genai"):
        LineProcess("bench.peer_genai", "{}", {})
