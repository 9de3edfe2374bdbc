"""The gateway as a server's child: started, recorded, seen to be gone, and ended with it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import httpx
import psutil
import pytest

from preheat.cli import app
from preheat.errors import ServerError
from preheat.status import STATUS_DIR_VARIABLE
from preheat.torchserve import front, server
from preheat.torchserve.server import Birth, Ports, TorchServe


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TorchServe]:
    """A server that `preheat serve` recorded here, whose Java has ended."""
    monkeypatch.chdir(tmp_path)
    handler = Path(__file__).parents[2] / "handler"
    monkeypatch.setenv("PYTHONPATH", str(handler))
    run_dir = tmp_path / ".preheat" / "run" / "fox"
    for name in ("status", "logs", "tmp"):
        (run_dir / name).mkdir(parents=True)
    running = TorchServe(
        run_dir,
        Ports(inference=9, management=9009, gateway=free_port()),
        1,
        0.0,
        ("fox",),
        run_dir / "tmp",
    )
    server.remember(running)
    yield running
    left = server.recall(run_dir)
    if left is not None:
        left.stop()


def test_a_gateway_is_started_recorded_and_started_again_until_it_is_stopped(
    recorded: TorchServe,
) -> None:
    running = front.start(recorded)
    assert server.recall(running.run_dir) == running
    assert running.front == f"http://127.0.0.1:{running.ports.gateway}"
    assert front.trouble(running) is None
    with httpx.Client(base_url=running.front, trust_env=False, timeout=5) as http:
        assert http.get("/health/live").status_code == 200
        missing = http.get("/health/ready").json()["missing"]
        assert "127.0.0.1:9009 does not answer" in missing[0], "it asks another server"
    assert running.gateway is not None
    keeper = running.gateway.process
    assert keeper is not None
    (gateway,) = keeper.children()
    assert gateway.environ()[STATUS_DIR_VARIABLE] == str(running.status_dir)
    gateway.kill()
    deadline = time.monotonic() + 60
    while {child.pid for child in keeper.children()} <= {gateway.pid}:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "status -9; it is started again" in front.log_of(running).read_text()
    running.stop()
    assert running.gateway.process is None and not keeper.children()
    assert server.recall(running.run_dir) is None


def test_the_url_that_is_told_is_where_the_gateway_listens(
    recorded: TorchServe, capsys: pytest.CaptureFixture[str]
) -> None:
    running = front.start(recorded, "127.0.0.2")
    assert running.front == f"http://127.0.0.2:{running.ports.gateway}"
    assert httpx.get(f"{running.front}/v2", trust_env=False).is_success
    app._say_started(running, Path("fox.yaml"))
    assert server.recall(running.run_dir) == running
    assert f"page        {running.front}/\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("fd00::7", "http://[fd00::7]:80"),
        ("lighthouse.local", "http://lighthouse.local:80"),
    ],
)
def test_where_this_machine_reaches_what_listens(host: str, url: str) -> None:
    assert server.url_of(host, 80) == url


def test_a_gateway_that_cannot_start_says_why(
    recorded: TorchServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "_COMMAND", "raise SystemExit('no gateway today')")
    with pytest.raises(ServerError, match="no gateway today"):
        front.start(recorded)


def test_a_gateway_that_has_ended_is_told_of(recorded: TorchServe) -> None:
    alive = replace(recorded, pid=os.getpid(), created=psutil.Process().create_time())
    gone = replace(alive, gateway=Birth(1, 0.0))
    said = front.trouble(gone)
    assert said is not None and str(front.log_of(gone)) in said
    with pytest.raises(ServerError, match="the gateway has ended"):
        front.stay(gone)
    assert front.trouble(recorded) is None
    with pytest.raises(ServerError, match="TorchServe has ended"):
        front.stay(recorded)


def test_the_gateways_port_is_checked_with_the_others(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {number} "):
            server.check_free(tmp_path, replace(Ports.free(), gateway=number))
    with pytest.raises(ServerError, match="8081 is asked for twice"):
        Ports(gateway=8081)


def test_the_gateways_port_is_checked_where_it_is_to_listen(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.2", 0)) as taken:
        number = taken.getsockname()[1]
        ports = replace(Ports.free(), gateway=number)
        server.check_free(tmp_path, ports)
        with pytest.raises(ServerError, match=f"port {number} on 127.0.0.2 "):
            server.check_free(tmp_path, ports, "127.0.0.2")
        server.check_free(tmp_path, ports, "no-such-host.invalid")  # the gateway will say so


def test_another_listener_is_no_gateway(
    recorded: TorchServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "_COMMAND", "raise SystemExit('no gateway today')")
    with (
        socket.create_server(("127.0.0.1", recorded.ports.gateway or 0)),
        pytest.raises(ServerError, match="no gateway today"),
    ):
        front.start(recorded)


def test_a_second_signal_ends_the_wait_for_what_is_under_way() -> None:
    told: list[dict[str, float]] = []

    class Running:
        def stop(self, **seconds: float) -> None:
            told.append(seconds)
            if len(told) == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        app.end(cast(TorchServe, Running()), 120)
    assert told == [{"drain": 120}, {"seconds": 5}]
