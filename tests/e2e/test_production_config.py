"""The two configurations that face others, each on a real server: archive/config.properties with
its tokens, and a pod's without. Nothing is compiled: what is asked here is who may ask.
"""

from __future__ import annotations

import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path

import httpx
import pytest
import yaml
from PIL import Image

from fake_host import listening
from preheat.gateway import tokens
from preheat.gateway.app import create_app
from preheat.gateway.torchserve import Places, TorchServeBackend
from preheat.torchserve import server
from preheat.torchserve.archive import build_archive
from preheat.torchserve.client import Client
from served import started

PRODUCTION = server.ROOT / "archive" / "config.properties"
KUBERNETES = server.ROOT / "archive" / "kubernetes"
REQUEST = {"prompt": "a cat", "height": 50, "width": 40, "seed": 1, "num_inference_steps": 1}
# One bucket, eager: ready as soon as everything is imported.
MODEL = """
minWorkers: 1
maxWorkers: 1
startupTimeout: 300
maxRetryTimeoutInSec: 600
pt2: {compile: {enable: false}, shapes: {buckets: [[64, 64]]}}
pipeline: {guidance: "off", tasks: [text-to-image], defaults: {num_inference_steps: 1}}
"""


@pytest.fixture(scope="module")
def archive(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model under the name that the manifests serve."""
    work = tmp_path_factory.mktemp("archive")
    (work / "sdxl.yaml").write_text(MODEL)
    return build_archive(
        work / "sdxl.yaml", tiny_sdxl, output=work / "archives", archive_format="no-archive"
    )


@pytest.fixture(scope="module")
def production(
    archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[server.TorchServe]:
    """A server with every setting of production but its addresses and places."""
    with started([archive], tmp_path_factory.mktemp("production"), base=PRODUCTION) as warm:
        yield warm


@pytest.fixture(scope="module")
def keys(production: server.TorchServe) -> dict[str, str]:
    """The server's keys: inference, management and API."""
    document = json.loads((production.run_dir / "key_file.json").read_bytes())
    return {name: entry["key"] for name, entry in document.items()}


def probe(command: list[str], running: server.TorchServe, *arguments: str) -> tuple[int, str]:
    """Exit status and output of a probe such as ["preheat", "ready", ...], as a kubelet would run
    it in the pod.
    """
    code = "from preheat.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *command[1:], "--management", running.management, *arguments],
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(server.ROOT / "handler")},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, (done.stdout + done.stderr).strip()


def ask(method: str, url: str, token: str | None = None) -> httpx.Response:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.request(method, url, headers=headers, timeout=60, trust_env=False)


def test_the_keys_lie_in_the_working_folder_for_the_servers_user_alone(
    production: server.TorchServe,
) -> None:
    key_file = production.run_dir / "key_file.json"
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    ends = json.loads(key_file.read_bytes())["management"]["expiration time"][:19]
    left = datetime.fromisoformat(ends).replace(tzinfo=timezone.utc) - datetime.now(timezone.utc)
    assert left > timedelta(days=300), "a probe's token would end, and with it the pod's readiness"


def test_ready_is_said_to_the_management_token_alone(
    production: server.TorchServe, tmp_path: Path
) -> None:
    command, key_file = (
        ["preheat", "ready", "--model", "sdxl"],
        production.run_dir / "key_file.json",
    )
    assert probe(command, production, "--token-file", str(key_file)) == (0, "ready")
    status, said = probe(command, production)
    assert status == 1 and "token" in said
    (tmp_path / "other.json").write_text('{"management": {"key": "AAAAAAAA"}}')
    status, said = probe(command, production, "--token-file", str(tmp_path / "other.json"))
    assert status == 1 and "token" in said
    status, said = probe(command, production, "--token-file", str(tmp_path / "missing.json"))
    assert status == 1 and "missing.json" in said


def test_a_prediction_needs_the_inference_token(
    production: server.TorchServe, keys: dict[str, str]
) -> None:
    for token in (None, "AAAAAAAA", keys["management"], keys["API"]):
        with Client.to(production, token=token) as client:
            rest, grpc = client.predict(REQUEST), client.predict_grpc(REQUEST)
        assert (
            rest.status == 400
            and rest.error is not None
            and rest.error["type"] == "InvalidKeyException"
        )
        assert grpc.status != 0
    with Client.to(production, token=keys["inference"]) as client:
        rest, grpc = client.predict(REQUEST), client.predict_grpc(REQUEST)
    assert (rest.status, grpc.status) == (200, 0) and rest.body == grpc.body
    assert Image.open(io.BytesIO(rest.body)).size == (40, 50)


def test_models_come_and_go_with_the_server_alone(
    production: server.TorchServe, keys: dict[str, str]
) -> None:
    token, models = keys["management"], f"{production.management}/models"
    assert ask("POST", f"{models}?url=sdxl&model_name=another", token).status_code == 405
    assert ask("DELETE", f"{models}/sdxl", token).status_code == 405
    assert [entry["modelName"] for entry in ask("GET", models, token).json()["models"]] == ["sdxl"]
    # Scaling is not part of what `enable_model_api` turns off; it takes the management token.
    for wrong in (None, keys["inference"]):
        assert ask("PUT", f"{models}/sdxl?min_worker=0", wrong).status_code == 400


def test_ping_wants_a_token_too_which_no_kubelet_has(
    production: server.TorchServe, keys: dict[str, str]
) -> None:
    assert ask("GET", f"{production.inference}/ping").status_code == 400
    assert ask("GET", f"{production.inference}/ping", keys["inference"]).status_code == 200


def test_metrics_are_served_without_one(production: server.TorchServe) -> None:
    answer = ask("GET", f"{production.metrics}/metrics")
    assert answer.status_code == 200
    assert 'preheat_ready_seconds{ModelName="sdxl"' in answer.text


@contextmanager
def gateway(running: server.TorchServe) -> Iterator[str]:
    """The URL of one that knows the server as `preheat gateway --name` does."""
    recorded = json.loads((running.run_dir / "server.json").read_bytes())
    places = Places.of({**recorded, "run_dir": str(running.run_dir)}, {}, None, None)
    with listening(create_app(TorchServeBackend(places))) as url:
        yield url


def test_the_gateway_has_the_tokens_and_asks_nobody_for_one(
    production: server.TorchServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renewed at every call: as if they ended within the hour that TorchServe gives them."""
    monkeypatch.setattr(tokens, "MARGIN", float("inf"))
    before = json.loads((production.run_dir / "key_file.json").read_bytes())
    with gateway(production) as url:
        assert ask("GET", f"{url}/health/ready").json() == {"ready": True, "missing": []}
        with Client("sdxl", inference=url) as client:
            replies = [client.predict(REQUEST) for _ in range(3)]
    assert [reply.status for reply in replies] == [200] * 3
    after = json.loads((production.run_dir / "key_file.json").read_bytes())
    for kind in ("inference", "management"):
        assert after[kind]["key"] != before[kind]["key"], f"the {kind} token was not renewed"
        stale = ask("GET", f"{production.management}/models", before[kind]["key"])
        assert stale.status_code == 400


def test_a_pods_probes_wait_for_its_workers_while_ping_does_not_and_it_serves_without_tokens(
    archive: Path, tmp_path: Path
) -> None:
    """The Deployment's own probes against its own properties."""
    deployment = yaml.safe_load((KUBERNETES / "deployment.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    kinds = ("startupProbe", "readinessProbe", "livenessProbe")
    paths = [container[kind]["httpGet"]["path"] for kind in kinds]
    base = KUBERNETES / "config.properties"
    with started([archive], tmp_path, wait=0, base=base) as pod, gateway(pod) as url:
        assert ask("GET", f"{pod.inference}/ping").json() == {"status": "Healthy"}
        answers = [ask("GET", f"{url}{path}") for path in paths]
        assert [answer.status_code for answer in answers] == [503] * 3
        assert "0 of 1 workers READY" in answers[0].json()["missing"][0]
        pod.wait_ready(300)
        await_status(f"{url}/health/ready", 200)
        assert [ask("GET", f"{url}{path}").status_code for path in paths] == [200] * 3
        assert not (pod.run_dir / "key_file.json").exists()
        with Client.to(pod) as client, Client.to(pod, inference=url) as through:
            assert (client.predict(REQUEST).status, client.predict_grpc(REQUEST).status) == (200, 0)
            assert through.predict(REQUEST).body == client.predict(REQUEST).body
            (worker,) = client.worker_pids()
        assert ask("DELETE", f"{pod.management}/models/sdxl").status_code == 405
        os.kill(worker, signal.SIGKILL)
        await_status(f"{url}/health/ready", 503)
        await_status(f"{url}/health/ready", 200)


def await_status(url: str, status: int, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while ask("GET", url).status_code != status:
        assert time.monotonic() < deadline, f"{url} is not {status} within {seconds} s"
        time.sleep(0.05)
