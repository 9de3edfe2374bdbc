"""Starting, finding and stopping, as far as it goes without TorchServe; tests/e2e has the rest."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from preheat.errors import ServerError
from preheat.torchserve import processes, server
from preheat.torchserve.server import Ports, TorchServe

ROOT = Path(__file__).parents[2]
SLEEPER = "import time\nprint('up', flush=True)\ntime.sleep(600)"
STUBBORN = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEPER


def spawn(code: str, **env: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, **env}
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def recorded(run_dir: Path, pid: int, created: float) -> TorchServe:
    """A server as another process would find it."""
    temp = run_dir / "tmp"
    temp.mkdir(parents=True)
    running = TorchServe(run_dir, Ports(), pid, created, ("fox",), temp)
    server.remember(running)
    return running


def test_free_ports_are_five_and_free() -> None:
    ports = Ports.free()
    assert len({*asdict(ports).values()} - {None}) == 5
    assert len({*asdict(Ports.free(gateway=True)).values()}) == 6
    assert ports.taken() == []


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        ports = Ports(**{**asdict(Ports.free()), "metrics": number})
        with pytest.raises(ServerError, match=f"port {number} "):
            server.start([], tmp_path, ports=ports)


def test_properties_are_read_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.properties"
    path.write_text("# comment\n\n! another\n key = a=b \nempty=\n")
    assert server.read_properties(path) == {"key": "a=b", "empty": ""}
    with pytest.raises(ServerError, match="nowhere"):
        server.read_properties(tmp_path / "nowhere")


def test_properties_are_written_as_java_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "x.properties"
    server.write_properties(path, {"model_store": "/tmp/ü 🦊\\x"})
    assert path.read_bytes() == b"model_store=/tmp/\\u00fc \\ud83e\\udd8a\\\\x\n"


def test_own_settings_keep_everything_on_loopback() -> None:
    ports = Ports(inference=1, management=2, metrics=3, grpc_inference=4, grpc_management=5)
    settings = server.own_properties(ports, {"fox": "fox.mar", "owl": "owl"})
    assert settings["inference_address"] == "http://127.0.0.1:1"
    assert settings["management_address"] == "http://127.0.0.1:2"
    assert settings["metrics_address"] == "http://127.0.0.1:3"
    assert (settings["grpc_inference_address"], settings["grpc_inference_port"]) == (
        "127.0.0.1",
        "4",
    )
    assert (settings["grpc_management_address"], settings["grpc_management_port"]) == (
        "127.0.0.1",
        "5",
    )
    assert settings["load_models"] == "fox=fox.mar,owl=owl"


def test_the_demo_properties_listen_on_loopback_alone() -> None:
    settings = server.read_properties(ROOT / "archive" / "config-demo.properties")
    addresses = [value for key, value in settings.items() if key.endswith("_address")]
    assert len(addresses) == 5
    assert all("127.0.0.1" in address for address in addresses)


def test_the_production_properties_are_closed() -> None:
    settings = server.read_properties(ROOT / "archive" / "config.properties")
    assert "127.0.0.1" in settings["management_address"]
    assert settings["grpc_management_address"] == "127.0.0.1"
    assert settings["disable_token_authorization"] == "false"
    assert settings["enable_model_api"] == "false"
    assert settings["allowed_urls"] == "none"
    assert settings["metrics_mode"] == "prometheus"
    # Two inputs of 10 MB in base64 fit a request, four 4096x4096 pictures in base64 a response.
    assert int(settings["max_request_size"]) > 2 * 10_000_000 * 4 / 3
    assert int(settings["max_response_size"]) > 4 * 4096 * 4096 * 3 * 4 / 3


def test_a_deep_run_folder_keeps_its_sockets_elsewhere(tmp_path: Path) -> None:
    near, deep = (
        server.prepare(Path("/tmp") / tmp_path.name),
        server.prepare(tmp_path / ("d" * 100)),
    )
    assert near == Path("/tmp") / tmp_path.name / "tmp"
    assert len(str(deep)) <= server.LONGEST_SOCKET_FOLDER
    deep.rmdir()
    for folder in ("tmp", "store", "status", "logs"):
        (near.parent / folder).rmdir()
    near.parent.rmdir()


def test_an_earlier_run_is_cleared_but_nothing_else(tmp_path: Path) -> None:
    for path in (
        "status/fox-1.json",
        "logs/model_log.log",
        "store/fox.mar",
        "archives/fox/MANIFEST",
        "key_file.json",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    temp = server.prepare(tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()] == [
        "archives/fox/MANIFEST"
    ]
    if temp.parent != tmp_path:
        temp.rmdir()


def test_a_missing_archive_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"fox\.mar"):
        server.start([tmp_path / "fox.mar"], tmp_path / "run", ports=Ports.free())


def test_a_server_is_found_by_its_folder_while_it_lives(tmp_path: Path) -> None:
    assert server.recall(tmp_path) is None
    java = spawn(SLEEPER)
    running = recorded(tmp_path, java.pid, psutil.Process(java.pid).create_time())
    assert server.find(tmp_path) == running
    with pytest.raises(ServerError, match="runs already"):
        server.start([], tmp_path, ports=Ports.free())
    java.kill()
    java.wait()
    assert server.find(tmp_path) is None
    assert server.recall(tmp_path) == running


def test_another_process_with_the_same_number_is_let_alone(tmp_path: Path) -> None:
    bystander = spawn(SLEEPER)
    running = recorded(tmp_path, bystander.pid, psutil.Process(bystander.pid).create_time() - 100)
    assert not running.alive
    running.stop()
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_stop_ends_the_server_its_workers_and_strays_and_no_one_else(tmp_path: Path) -> None:
    status = str(tmp_path / "status")
    java = spawn(
        f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {STUBBORN!r}])\n"
        + SLEEPER
    )
    stray, bystander = (
        spawn(SLEEPER, PREHEAT_STATUS_DIR=status),
        spawn(SLEEPER, PREHEAT_STATUS_DIR=status + "2"),
    )
    running = recorded(tmp_path, java.pid, psutil.Process(java.pid).create_time())
    family = processes.family(psutil.Process(java.pid))
    assert len(family) == 2
    running.stop(seconds=0.5)
    assert (java.wait(), stray.wait()) == (-signal.SIGTERM, -signal.SIGTERM)
    assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in family)
    assert bystander.poll() is None
    assert not (tmp_path / "server.json").exists()
    assert not running.temp.exists()
    bystander.kill()
    bystander.wait()


def test_the_record_is_what_the_probe_reads(tmp_path: Path) -> None:
    recorded(tmp_path, 1, 0.0)
    data = json.loads((tmp_path / "server.json").read_bytes())
    assert (data["management"], data["models"]) == ("http://127.0.0.1:8081", ["fox"])


def test_two_archives_of_one_name_are_refused(tmp_path: Path) -> None:
    archives = [tmp_path / version / "lighthouse.mar" for version in ("1", "2")]
    for archive in archives:
        archive.parent.mkdir()
        archive.touch()
    with pytest.raises(ServerError, match=r"two archives are named lighthouse\.mar"):
        server.start(archives, tmp_path / "run", ports=Ports.free())
