"""`preheat ready` against a management API that says whatever the test wants."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from preheat import readiness
from preheat.progress import WarmupProgress

HANDLER = Path(__file__).parent.parent / "handler"


class Management(ThreadingHTTPServer):
    """TorchServe's management API as far as it is asked: `models` maps names to (minWorkers, worker states)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.models: dict[str, tuple[int, list[str]]] = {}
        self.token: str | None = None
        self.nonsense: bytes | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Management

    def do_GET(self) -> None:
        models, path = self.server.models, self.path.partition("?")[0]
        if self.server.nonsense is not None:
            self.reply(200, self.server.nonsense)
        elif self.server.token and self.headers["Authorization"] != f"Bearer {self.server.token}":
            self.reply(400, {"code": 400, "type": "InvalidKeyException", "message": "Token Authorization failed."})
        elif path == "/models":
            self.reply(200, {"models": [{"modelName": name, "modelUrl": f"{name}.mar"} for name in models]})
        elif path.removeprefix("/models/") in models:
            name = path.removeprefix("/models/")
            wanted, states = models[name]
            self.reply(200, [{"modelName": name, "minWorkers": wanted, "workers": [{"status": s} for s in states]}])
        else:
            self.reply(404, {"code": 404, "type": "ModelNotFoundException", "message": "Model not found"})

    def reply(self, code: int, document: Any) -> None:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def management() -> Iterator[Management]:
    with Management() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("min_workers", "states", "at_least", "ready"),
    [
        (1, ["READY"], None, True),
        (1, ["UNLOADING"], None, False),
        (2, ["READY", "UNLOADING"], None, False),
        (2, ["READY", "READY"], None, True),
        (1, ["READY", "UNLOADING"], 2, False),
        (2, ["READY"], 1, False),  # a lower wish does not lower what the YAML wants
        (0, [], None, False),  # nobody there cannot answer
    ],
)
def test_workers_are_counted(
    management: Management, min_workers: int, states: list[str], at_least: int | None, ready: bool
) -> None:
    management.models["fox"] = (min_workers, states)
    verdict = readiness.check(management.url, "fox", at_least)
    assert verdict.ready is ready
    assert bool(verdict.missing) is not ready


def test_what_is_missing_is_said(management: Management) -> None:
    management.models |= {"fox": (2, ["READY", "UNLOADING"]), "owl": (1, ["READY"]), "elk": (1, [])}
    assert readiness.check(management.url).missing == [
        "fox: 1 of 2 workers READY (others: UNLOADING)",
        "elk: 0 of 1 workers READY",
    ]
    assert readiness.check(management.url, "owl").ready
    assert readiness.check(management.url, ["owl", "bat"]).missing == ["bat: not registered"]


def test_a_server_without_models_is_not_ready(management: Management) -> None:
    assert readiness.check(management.url) == (False, ["no model is registered"])


def test_an_absent_server_is_not_ready(management: Management) -> None:
    management.shutdown()
    management.server_close()
    assert "does not answer" in readiness.check(management.url).missing[0]


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b'{"models": 3}', b'{"models": [7]}'])
def test_nonsense_is_not_ready(management: Management, body: bytes) -> None:
    management.nonsense = body
    assert "not TorchServe's" in readiness.check(management.url).missing[0]
    assert not readiness.check(management.url, "fox").ready


def test_tokens_come_from_the_key_file(management: Management, tmp_path: Path) -> None:
    management.token, management.models = "k3y", {"fox": (1, ["READY"])}
    assert "token" in readiness.check(management.url).missing[0]
    key_file = tmp_path / "key_file.json"
    key_file.write_text(json.dumps({"management": {"key": "k3y"}, "API": {"key": "other"}}))
    assert readiness.check(management.url, token=readiness.read_token(key_file)).ready
    key_file.write_text("{}")
    with pytest.raises(ValueError, match="no management key"):
        readiness.read_token(key_file)


def test_a_proxy_in_the_environment_is_not_used(management: Management, monkeypatch: pytest.MonkeyPatch) -> None:
    management.models["fox"] = (1, ["READY"])
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert readiness.check(management.url).ready


def test_waiting_ends_when_ready_or_without_hope(management: Management) -> None:
    management.models["fox"] = (1, ["UNLOADING"])
    seen = 0

    def becomes_ready() -> bool:
        nonlocal seen
        seen += 1
        management.models["fox"] = (1, ["READY"])
        return True

    assert readiness.wait(management.url, seconds=60, interval=0.01, hopeful=becomes_ready).ready
    assert seen == 1
    management.models["fox"] = (1, ["UNLOADING"])
    assert not readiness.wait(management.url, seconds=60, hopeful=lambda: False).ready
    assert not readiness.wait(management.url, seconds=0).ready


def test_the_last_word_of_a_model_decides_about_failure(tmp_path: Path) -> None:
    def write(pid: int, state: str, written: float, message: str = "") -> None:
        rows = [{"bucket": "320x192", "total": 4, "done": 2, "seconds": 31.2}]
        document = {"model": "fox", "pid": pid, "state": state, "total": 4, "done": 2, "buckets": rows}
        path = tmp_path / f"fox-{pid}.json"
        path.write_text(json.dumps({**document, "message": message}))
        os.utime(path, (written, written))

    write(1, "failed", 100, "no such folder")
    (tmp_path / "half.json").write_text('{"model"')
    statuses = readiness.read_statuses(tmp_path)
    assert statuses[0].buckets == (("320x192", 2, 4, 31.2),)
    assert readiness.failure(statuses) == "fox: worker 1 failed: no such folder"
    write(2, "warming", 200)
    assert readiness.failure(readiness.read_statuses(tmp_path)) is None


def run_ready(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command as a probe runs it; the last line on stderr is what it imported."""
    code = (
        "import sys\nfrom preheat.cli import main\ntry: main()\nfinally: print(*sorted(sys.modules), file=sys.stderr)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, "ready", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(HANDLER)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_waits_for_a_server_that_was_not_started_here(tmp_path: Path) -> None:
    """As in a pod: no record of a server, and TorchServe's default address."""
    code = "from preheat import readiness, cli; readiness.wait = lambda *args, **kwargs: exit(f'waits {kwargs}'); cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "ready", "--wait", "7"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(HANDLER)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == "waits {'seconds': 7.0}\n"


def test_the_command_exits_0_or_1_and_imports_nothing_heavy(management: Management, tmp_path: Path) -> None:
    management.models["fox"] = (1, ["UNLOADING"])
    no = run_ready("--management", management.url, cwd=tmp_path)
    assert (no.returncode, no.stdout) == (1, "fox: 0 of 1 workers READY (others: UNLOADING)\n")
    management.models["fox"] = (1, ["READY"])
    yes = run_ready("--management", management.url, "--model", "fox", cwd=tmp_path)
    assert (yes.returncode, yes.stdout) == (0, "ready\n")
    imported = {name.partition(".")[0] for name in yes.stderr.split()}
    heavy = {"torch", "diffusers", "transformers", "numpy", "PIL", "yaml", "httpx", "grpc", "psutil", "ts"}
    assert not imported & heavy


def test_the_command_finds_the_server_that_was_started_here(management: Management, tmp_path: Path) -> None:
    management.models = {"fox": (1, ["READY"])}
    record(tmp_path, "fox", management, ["fox"])
    assert run_ready(cwd=tmp_path).returncode == 0
    record(tmp_path, "owl", management, ["owl"])
    several = run_ready(cwd=tmp_path)
    assert several.returncode == 1
    assert "--name" in several.stderr
    assert run_ready("--name", "fox", cwd=tmp_path).returncode == 0
    assert run_ready("--name", "owl", cwd=tmp_path).stdout == "owl: not registered\n"
    assert run_ready("--name", "elk", cwd=tmp_path).returncode == 1


def record(folder: Path, name: str, management: Management, models: list[str]) -> None:
    run_dir = folder / ".preheat" / "run" / name
    run_dir.mkdir(parents=True)
    (run_dir / "server.json").write_text(json.dumps({"management": management.url, "models": models}))


def test_progress_shows_workers_that_run_and_their_buckets() -> None:
    shown = io.StringIO()
    rows = (("320x192", 2, 2, 31.2), ("256x256", 0, 2, 0.0))
    with WarmupProgress(Console(file=shown, width=100)) as progress:
        for state in ("warming", "hot"):
            progress.update([readiness.Status("fox", os.getpid(), state, 2, 4, rows, "", 0.0)])
        progress.update([readiness.Status("owl", 2**22 + 1, "hot", 2, 4, (), "", 0.0)])  # no such process
    text = shown.getvalue()
    assert f"fox worker {os.getpid()}" in text
    assert "31.2 s" in text
    assert "hot" in text
    assert "owl" not in text
