"""`preheat ready` against a management API that says whatever the test wants."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from preheat import status as worker_status
from preheat.cli.progress import WarmupBars
from preheat.status import Engine, StatusFile, padding_warning, read_statuses
from preheat.torchserve import readiness

HANDLER = Path(__file__).parents[2] / "handler"


class Management(ThreadingHTTPServer):
    """TorchServe's management API as far as it is asked: `models` maps names to (minWorkers, worker
    states).
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.models: dict[str, tuple[int, list[str]]] = {}
        self.token: str | None = None
        self.nonsense: bytes | None = None
        self.pid = 100
        """Of the first worker; the next ones count on."""

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
            self.reply(
                400,
                {
                    "code": 400,
                    "type": "InvalidKeyException",
                    "message": "Token Authorization failed.",
                },
            )
        elif path == "/models":
            self.reply(
                200, {"models": [{"modelName": name, "modelUrl": f"{name}.mar"} for name in models]}
            )
        elif path.removeprefix("/models/") in models:
            name = path.removeprefix("/models/")
            wanted, states = models[name]
            workers = [
                {"id": f"{9000 + i}", "status": state, "pid": self.server.pid + i}
                for i, state in enumerate(states)
            ]
            described = {"modelName": name, "minWorkers": wanted, "workers": workers}
            described |= {"modelVersion": "1.0", "jobQueueStatus": {"pendingRequests": 7}}
            self.reply(200, [described])
        else:
            self.reply(
                404, {"code": 404, "type": "ModelNotFoundException", "message": "Model not found"}
            )

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
        "fox: 1 of 2 workers READY (loading)",
        "elk: 0 of 1 workers READY",
    ]
    assert readiness.check(management.url, "owl").ready
    assert readiness.check(management.url, ["owl", "bat"]).missing == ["bat: not registered"]


def status(
    pid: int,
    state: str,
    done: int = 0,
    message: str = "",
    lasting: bool = False,
    engines: Sequence[Engine] = (),
) -> worker_status.Status:
    rows = [
        {"bucket": bucket, "target": "unet", "engine": engine, "reason": reason}
        for bucket, engine, reason in engines
    ]
    return worker_status.Status(
        "fox", pid, state, done, 6, (), message, 0.0, lasting, served={"buckets": rows}
    )


def test_what_a_worker_wrote_says_how_far_it_is(management: Management) -> None:
    management.models["fox"] = (2, ["UNLOADING", "READY"])
    verdict = readiness.check(
        management.url, statuses=[status(100, "warming", 3), status(101, "hot", 6)]
    )
    assert verdict.missing == ["fox: 1 of 2 workers READY (warming 3/6)"]
    killed = readiness.check(
        management.url, statuses=[status(100, "hot", 6), status(101, "hot", 6)]
    )
    assert killed.missing == ["fox: 1 of 2 workers READY (loading)"]


def test_workers_that_die_while_one_waits_are_counted(management: Management) -> None:
    """A foreign server's: nothing is known but that each answer shows another process."""
    management.models["fox"] = (1, ["UNLOADING"])
    told: list[Sequence[str]] = []

    def dies_three_times() -> bool:
        management.pid += 1
        return management.pid < 104

    verdict = readiness.wait(
        management.url, seconds=60, interval=0, should_wait=dies_three_times, report=told.append
    )
    assert verdict.missing == [
        "fox: 0 of 1 workers READY (loading, restarted 3 times; see its log)"
    ]
    assert told[0] == ["fox: 0 of 1 workers READY (loading)"]


def test_a_lasting_failure_ends_the_wait_though_torchserve_tries_again(
    management: Management,
) -> None:
    management.models["fox"] = (1, ["UNLOADING"])
    failed = status(99, "failed", message="pipeline.path: no such folder: /x", lasting=True)
    verdict = readiness.wait(
        management.url, seconds=600, statuses=lambda: [failed, status(100, "loading")]
    )
    assert verdict.missing[-1] == "fox: worker 99 failed: pipeline.path: no such folder: /x"
    assert not readiness.wait(management.url, "owl", seconds=0, statuses=lambda: [failed]).ready
    passing = status(99, "failed", message="the hub does not answer")
    assert worker_status.failed([passing]) == passing
    assert worker_status.failed([passing, status(100, "loading")]) is None
    assert worker_status.failed([failed, status(100, "warming")]) is None, (
        "it got further: the fault is mended"
    )


def test_an_address_without_a_scheme_is_http(management: Management) -> None:
    management.models["fox"] = (1, ["READY"])
    assert readiness.check(management.url.removeprefix("http://")).ready


def test_engines_are_told_once_for_workers_that_agree_with_a_warning_where_one_fell_to_eager() -> (
    None
):
    fast = [Engine("256x256", "compiled", ""), Engine("64x64", "compiled", "")]
    assert readiness.describe_engines([status(i, "hot", engines=fast) for i in (1, 2)]) == (
        ["fox: compiled 256x256, 64x64"],
        [],
    )
    slow = [fast[0], Engine("64x64", "eager", "g++ is missing")]
    lines, (warning,) = readiness.describe_engines(
        [status(1, "hot", engines=fast), status(2, "hot", engines=slow)]
    )
    assert lines == [
        "fox worker 1: compiled 256x256, 64x64",
        "fox worker 2: compiled 256x256; eager 64x64",
    ]
    assert warning.startswith("fox worker 2: 1 of 2 buckets are served eagerly: g++ is missing")
    on_purpose = [Engine("64x64", "eager", "")]
    assert readiness.describe_engines([status(1, "hot", engines=on_purpose)]) == (
        ["fox: eager 64x64"],
        [],
    )


def test_what_a_worker_writes_in_the_end_is_what_is_read(tmp_path: Path) -> None:
    row = {"bucket": "64x64", "target": "unet", "engine": "compiled", "reason": ""}
    file = StatusFile(str(tmp_path), "fox")
    file.plan({"64x64": 1, "64x96": 1})
    file.step("64x64", 1.25)
    wide = {**row, "bucket": "64x96"}
    eager = {**wide, "target": "vae.decoder", "engine": "eager", "reason": "no g++"}
    file.serve(lambda: {"state": "hot", "buckets": [row, wide, eager], "requests": 0})
    (read,) = worker_status.read_statuses(tmp_path)
    assert read.buckets[0] == ("64x64", 1, 1, 1.25)
    assert read.engines == (
        Engine("64x64", "compiled", ""),
        Engine("64x96", "unet compiled, vae.decoder eager", "no g++"),
    )
    file.fail("no such folder", lasting=True)
    assert worker_status.read_statuses(tmp_path)[0].lasting


def test_a_worker_that_serves_writes_its_last_state_without_being_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = threading.Event()
    monkeypatch.setattr(worker_status, "INTERVAL", 0.01)
    file = StatusFile(str(tmp_path), "fox")
    file.serve(lambda: {"state": "hot", "requests": 0})
    write = file.write

    def told(*args: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        write(*args)
        written.set()

    monkeypatch.setattr(file, "write", told)
    for requests in range(1, 50):
        file.serve(partial(dict, state="hot", requests=requests))
    while True:
        assert written.wait(60)
        written.clear()
        (read,) = worker_status.read_statuses(tmp_path)
        if read.served["requests"] == 49:
            return


def test_what_is_said_last_is_written_last_however_slow_the_state_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_status, "INTERVAL", 0.0)
    began, ready = threading.Event(), threading.Event()

    def slow() -> dict[str, Any]:
        began.set()
        assert ready.wait(60)
        return {"state": "hot"}

    file = StatusFile(str(tmp_path), "fox")
    file.serve(lambda: {"state": "hot"})
    file.serve(slow)
    assert began.wait(60)
    ending = threading.Thread(target=partial(file.fail, "gone", lasting=True))
    ending.start()
    ending.join(0.2)  # where it does not wait for the slow one, it ends here
    ready.set()
    ending.join(60)
    for timer in [each for each in threading.enumerate() if isinstance(each, threading.Timer)]:
        timer.join(60)
    (read,) = worker_status.read_statuses(tmp_path)
    assert read.state == "failed" and read.lasting


def test_asked_sizes_are_written_to_a_file_of_their_own_and_read_by_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_status, "INTERVAL", 0.01)
    monkeypatch.setattr(worker_status, "SIZES_INTERVAL", 0.01)
    asked = threading.Event()
    sizes = [[64, 64, 1]]

    def document() -> dict[str, Any]:
        assert threading.current_thread() is not threading.main_thread()
        asked.set()
        return {"sizes": [*sizes]}

    file = StatusFile(str(tmp_path), "fox")
    (tmp_path / "other.sizes").write_text("no JSON")
    for _ in range(2):  # the first time, and later
        sizes.append([32, 32, len(sizes)])
        asked.clear()
        while worker_status.read_sizes(tmp_path).get("fox", [{}])[0].get("sizes") != sizes:
            file.keep_sizes(document)
            assert asked.wait(60)
    assert worker_status.read_statuses(tmp_path) == [], "no status was written"


def test_a_server_without_models_is_not_ready(management: Management) -> None:
    assert readiness.check(management.url) == (False, ["no model is registered"])


def test_an_absent_server_is_not_ready(management: Management) -> None:
    management.shutdown()
    management.server_close()
    assert "does not answer" in readiness.check(management.url).missing[0]


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b"{}", b'{"models": 3}', b'{"models": [7]}']
)
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


def test_a_proxy_in_the_environment_is_not_used(
    management: Management, monkeypatch: pytest.MonkeyPatch
) -> None:
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

    assert readiness.wait(
        management.url, seconds=60, interval=0.01, should_wait=becomes_ready
    ).ready
    assert seen == 1
    management.models["fox"] = (1, ["UNLOADING"])
    assert not readiness.wait(management.url, seconds=60, should_wait=lambda: False).ready
    assert not readiness.wait(management.url, seconds=0).ready


def test_the_last_word_of_a_model_decides_about_failure(tmp_path: Path) -> None:
    def write(pid: int, state: str, written: float, message: str = "") -> None:
        rows = [{"bucket": "320x192", "total": 4, "done": 2, "seconds": 31.2}]
        document = {
            "model": "fox",
            "pid": pid,
            "state": state,
            "total": 4,
            "done": 2,
            "buckets": rows,
        }
        path = tmp_path / f"fox-{pid}.json"
        path.write_text(json.dumps({**document, "message": message}))
        os.utime(path, (written, written))

    write(1, "failed", 100, "no such folder")
    (tmp_path / "half.json").write_text('{"model"')
    statuses = worker_status.read_statuses(tmp_path)
    assert statuses[0].buckets == (("320x192", 2, 4, 31.2),)
    assert worker_status.failure(statuses) == "fox: worker 1 failed: no such folder"
    write(2, "warming", 200)
    assert worker_status.failure(worker_status.read_statuses(tmp_path)) is None


def run_ready(
    *arguments: str, cwd: Path, command: str = "ready"
) -> subprocess.CompletedProcess[str]:
    """The command as a probe runs it; the last line on stderr is what it imported."""
    code = (
        "import sys\nfrom preheat.cli.app import main\ntry: main()\n"
        "finally: print(*sorted(sys.modules), file=sys.stderr)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, command, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(HANDLER)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_waits_for_a_server_that_was_not_started_here(tmp_path: Path) -> None:
    """As in a pod: no record of a server, and TorchServe's default address."""
    code = (
        "from preheat.cli import app; from preheat.torchserve import readiness; "
        "readiness.wait = lambda *args, **kwargs: exit('waits {seconds}'.format(**kwargs)); "
        "app.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "ready", "--wait", "7"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(HANDLER)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == "waits 7.0\n"


def test_the_command_says_what_it_waits_for(tmp_path: Path) -> None:
    """Connection refused: the port is nobody's, as it is bound here but not listened on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        said = run_ready(
            "--management", f"127.0.0.1:{bound.getsockname()[1]}", "--wait", "0.1", cwd=tmp_path
        )
    assert said.returncode == 1
    assert said.stderr.startswith("waiting: the management API at http://127.0.0.1:")


def test_the_command_shows_the_engines_of_the_server_that_it_knows(
    management: Management, tmp_path: Path
) -> None:
    management.models = {"fox": (1, ["READY"])}
    record(tmp_path, "fox", management, ["fox"], status_dir=str(tmp_path / "status"))
    file = StatusFile(str(tmp_path / "status"), "fox")
    file.plan({"64x64": 1})
    row = {"bucket": "64x64", "target": "unet", "engine": "eager", "reason": "no g++"}
    file.serve(lambda: {"state": "hot", "buckets": [row]})
    lines = run_ready(cwd=tmp_path).stdout.splitlines()
    assert (
        lines[0] == "fox: eager 64x64"
        and "served eagerly: no g++" in lines[1]
        and lines[2:] == ["ready"]
    )


def test_the_command_exits_0_or_1_and_imports_nothing_heavy(
    management: Management, tmp_path: Path
) -> None:
    management.models["fox"] = (1, ["UNLOADING"])
    no = run_ready("--management", management.url, cwd=tmp_path)
    assert (no.returncode, no.stdout) == (1, "fox: 0 of 1 workers READY (loading)\n")
    management.models["fox"] = (1, ["READY"])
    yes = run_ready("--management", management.url, "--model", "fox", cwd=tmp_path)
    assert (yes.returncode, yes.stdout) == (0, "ready\n")
    imported = {name.partition(".")[0] for name in yes.stderr.split()}
    heavy = {
        "torch",
        "diffusers",
        "transformers",
        "numpy",
        "PIL",
        "yaml",
        "httpx",
        "grpc",
        "psutil",
        "ts",
    }
    assert not imported & heavy


def test_the_command_finds_the_server_that_was_started_here(
    management: Management, tmp_path: Path
) -> None:
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


def record(folder: Path, name: str, management: Management, models: list[str], **more: str) -> None:
    run_dir = folder / ".preheat" / "run" / name
    run_dir.mkdir(parents=True)
    (run_dir / "server.json").write_text(
        json.dumps({"management": management.url, "models": models, **more})
    )


SERVED = {
    "version": "9.9",
    "state": "hot",
    "requests": 12,
    "compiles_since_ready": 0,
    "incidents": 1,
    "eager_fallbacks": 2,
    "padding": {"max_error": 0.01, "max_share": 0.165, "exact": "padded"},
    "buckets": [
        {
            "bucket": "64x64",
            "batch_size": 1,
            "target": "unet",
            "engine": "eager",
            "reason": "no g++",
            "seconds_per_step": 0.25,
        }
    ],
}


def status_of(folder: Path, management: Management, *arguments: str) -> str:
    record(folder, "fox", management, ["fox"], status_dir=str(folder / "status"))
    asked = run_ready(*arguments, cwd=folder, command="status")
    assert asked.returncode == 0, asked.stderr
    return asked.stdout


def test_status_shows_workers_queue_restarts_and_what_serves(
    management: Management, tmp_path: Path
) -> None:
    management.pid, management.models["fox"] = os.getpid(), (2, ["READY", "UNLOADING"])
    for name, pid in (("dead", 1), ("old", 2)):
        gone = {"model": "fox", "pid": pid, "state": "hot", "done": 1, "total": 1, "buckets": []}
        (tmp_path / "status").mkdir(exist_ok=True)
        (tmp_path / "status" / f"{name}.json").write_text(json.dumps(gone))
    StatusFile(str(tmp_path / "status"), "fox").serve(lambda: SERVED)
    (model,) = json.loads(status_of(tmp_path, management, "--json"))["models"]
    wanted = {"model": "fox", "version": "1.0", "preheat": "9.9", "wanted": 2, "ready": 1}
    wanted |= {"restarts": 2, "queue": 7, "failure": ""}
    assert wanted.items() <= model.items()
    warm, loading = model["workers"]
    assert (warm["pid"], warm["state"], loading["state"]) == (os.getpid(), "READY", "loading")
    assert warm["uptime_seconds"] >= 0 and loading["uptime_seconds"] is None
    assert [warm["requests"], warm["incidents"], warm["eager_fallbacks"]] == [12, 1, 2]
    assert warm["padding"]["max_error"] == 0.01 and loading["requests"] is None
    assert warm["buckets"][0] == {
        "bucket": "64x64",
        "batch_size": 1,
        "target": "unet",
        "engine": "eager",
        "reason": "no g++",
        "seconds_per_step": 0.25,
    }


def test_status_is_readable(management: Management, tmp_path: Path) -> None:
    management.pid, management.models["fox"] = os.getpid(), (1, ["READY"])
    StatusFile(str(tmp_path / "status"), "fox").serve(lambda: SERVED)
    text = status_of(tmp_path, management)
    assert text.startswith("fox 1.0: 1 of 1 workers READY, 7 waiting, 0 restarts (preheat 9.9)\n")
    assert "0.25" in text and "no g++" in text
    assert "padding changes answers by up to 0.17 of the largest magnitude; a mask input" in text


def test_ready_warns_where_padding_changes_answers(tmp_path: Path) -> None:
    for name, exact, share in (("fox", "padded", 0.165), ("owl", "rounding", 1e-6)):
        padding = {"max_error": 0.01, "max_share": share, "exact": exact}
        StatusFile(str(tmp_path), name).serve(partial(dict, SERVED, padding=padding))
    _, warnings = readiness.describe_engines(read_statuses(tmp_path))
    assert [each.partition(";")[0] for each in warnings if "padding" in each] == [
        "fox: padding changes answers by up to 0.17 of the largest magnitude"
    ]
    endless = {"max_error": "not finite", "max_share": "not finite", "exact": "padded"}
    assert "into what is not finite" in str(padding_warning(endless))


def test_status_of_a_server_that_is_gone_says_so(management: Management, tmp_path: Path) -> None:
    management.shutdown()
    management.server_close()
    gone = run_ready("--management", management.url, cwd=tmp_path, command="status")
    assert gone.returncode == 1 and "does not answer" in gone.stderr


def test_progress_shows_workers_that_run_and_their_buckets() -> None:
    shown = io.StringIO()
    rows = (("320x192", 2, 2, 31.2), ("256x256", 0, 2, 0.0))
    with WarmupBars(Console(file=shown, width=100)) as progress:
        for state in ("warming", "hot"):
            progress.update([worker_status.Status("fox", os.getpid(), state, 2, 4, rows, "", 0.0)])
        # no such process
        progress.update([worker_status.Status("owl", 2**22 + 1, "hot", 2, 4, (), "", 0.0)])
    text = shown.getvalue()
    assert f"fox worker {os.getpid()}" in text
    assert "31.2 s" in text
    assert "hot" in text
    assert "owl" not in text


def test_progress_of_two_workers_says_whose_bucket_it_is() -> None:
    shown = io.StringIO()
    rows = (("320x192", 2, 2, 31.2),)
    pids = (os.getpid(), os.getppid())
    with WarmupBars(Console(file=shown, width=100)) as progress:
        progress.update(
            [worker_status.Status("fox", pid, "warming", 2, 4, rows, "", 0.0) for pid in pids]
        )
    for pid in pids:
        assert f"  {pid} 320x192" in shown.getvalue()
