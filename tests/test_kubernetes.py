"""The manifests are what Kubernetes accepts, and agree with the YAML, the properties and the image
they go with.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import kubernetes_validate
import pytest
import yaml
from typer.testing import CliRunner

from preheat.cli import app
from preheat.config.model import ModelConfig
from preheat.device import CPUS_VARIABLE
from preheat.errors import PreheatError, ServerError
from preheat.torchserve import server

ROOT = Path(__file__).parent.parent
ARCHIVE = ROOT / "archive"
FOLDER = ARCHIVE / "kubernetes"
VERSIONS = ["1.25", "1.37"]
"""The oldest and the newest whose schemas are bundled."""
SECONDS_A_GRAPH = 90
"""The most that model-config/sdxl.yaml reckons with."""
PROPERTIES_FILE = "/etc/preheat/config.properties"
RESTART_SECONDS = 600
"""A worker's way back with its compile cache, with room to spare."""


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


KUSTOMIZATION = documents(FOLDER / "kustomization.yaml")[0]
MANIFESTS = {
    f"{manifest['kind']}/{manifest['metadata']['name']}": manifest
    for name in KUSTOMIZATION["resources"]
    for manifest in documents(FOLDER / name)
}
DEPLOYMENT = MANIFESTS["Deployment/preheat"]["spec"]
POD = DEPLOYMENT["template"]["spec"]
(CONTAINER,) = POD["containers"]
PROBES = {name: CONTAINER[name] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
PROPERTIES = server.read_properties(FOLDER / "config.properties")
DOCKERFILE = [
    line.split() for line in (ARCHIVE / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
]


def served() -> ModelConfig:
    """The YAML that the budgets are reckoned for, as the Deployment's first line says."""
    first = (FOLDER / "deployment.yaml").read_text().splitlines()[0]
    (name,) = re.findall(r"model-config/[\w-]+\.yaml", first)
    return ModelConfig.load(ROOT / name)


def given(option: str) -> str:
    """What the container's command says of one of `preheat serve`'s options."""
    arguments: list[str] = CONTAINER["args"]
    return arguments[arguments.index(option) + 1]


def startup_budget() -> int:
    """Seconds until the startup probe gives a pod up."""
    probe = PROBES["startupProbe"]
    return int(
        probe["failureThreshold"] * probe["periodSeconds"] + probe.get("initialDelaySeconds", 0)
    )


def mount_of(path: str) -> dict[str, Any] | None:
    """The mount that `path` lies in."""
    wanted = PurePosixPath(path)
    inside = [
        mount for mount in CONTAINER["volumeMounts"] if wanted.is_relative_to(mount["mountPath"])
    ]
    return max(inside, key=lambda mount: len(mount["mountPath"]), default=None)


def is_writable(path: str) -> bool:
    mount = mount_of(path)
    return mount is not None and not mount.get("readOnly")


def mistakes() -> Iterator[tuple[str, dict[str, Any]]]:
    """The Deployment with one thing wrong each."""

    def change(name: str, edit: Any) -> tuple[str, dict[str, Any]]:
        broken = copy.deepcopy(MANIFESTS["Deployment/preheat"])
        edit(broken["spec"]["template"]["spec"]["containers"][0])
        return name, broken

    yield change(
        "a misspelled key",
        lambda container: container.update(livenesProbe=container["livenessProbe"]),
    )
    yield change(
        "a word for a number",
        lambda container: container["startupProbe"].update(failureThreshold="many"),
    )
    yield change("a missing name", lambda container: container.pop("name"))
    yield change(
        "a capability that is no list",
        lambda container: container["securityContext"]["capabilities"].update(drop="ALL"),
    )


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", MANIFESTS.values(), ids=MANIFESTS)
def test_every_manifest_is_what_kubernetes_accepts(manifest: dict[str, Any], version: str) -> None:
    assert kubernetes_validate.validate(manifest, version, strict=True) == version


@pytest.mark.parametrize(
    ("mistake", "manifest"), list(mistakes()), ids=[name for name, _ in mistakes()]
)
def test_a_mistake_would_be_seen(mistake: str, manifest: dict[str, Any]) -> None:
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)


def test_every_file_is_applied() -> None:
    assert {path.name for path in FOLDER.glob("*.yaml")} == {
        *KUSTOMIZATION["resources"],
        "kustomization.yaml",
    }
    for generated in KUSTOMIZATION["configMapGenerator"]:
        assert all((FOLDER / name).is_file() for name in generated["files"])
    assert {image["name"] for image in KUSTOMIZATION["images"]} == {CONTAINER["image"]}


def test_the_startup_budget_outlasts_a_cold_start() -> None:
    timeout = served().startupTimeout
    assert timeout is not None and startup_budget() >= 1.1 * timeout, (
        "a pod would be killed in the middle of a compile"
    )
    assert DEPLOYMENT["progressDeadlineSeconds"] > startup_budget(), (
        "a rollout that still compiles would have failed"
    )


def test_a_cold_start_at_its_slowest_takes_half_of_its_timeout() -> None:
    """Loading, observing and the proof come on top of what is compiled, and what a timeout ends has
    published nothing.
    """
    config = served()
    graphs_a_bucket = (
        2 if config.pt2.shapes.batch_sizes == "dynamic" else len(config.pt2.shapes.batch_sizes)
    )
    graphs = len(config.pt2.shapes.buckets) * len(config.pt2.targets) * graphs_a_bucket
    assert (
        config.startupTimeout is not None and config.startupTimeout >= 2 * SECONDS_A_GRAPH * graphs
    )


def test_every_probe_asks_whether_the_workers_are_ready() -> None:
    """/ping says Healthy a second after start, and as long as TorchServe tries to start a worker
    again.
    """
    for probe in PROBES.values():
        assert set(probe) & {"httpGet", "tcpSocket", "grpc", "exec"} == {"httpGet"}
        assert probe["httpGet"] == {"path": "/health/ready", "port": "http"}
        assert probe["timeoutSeconds"] > 5, "the gateway gives the management API 5 seconds"


def test_a_pod_whose_worker_dies_again_and_again_starts_anew_before_torchserve_gives_up() -> None:
    probe, patience = PROBES["livenessProbe"], served().maxRetryTimeoutInSec
    seconds = probe["periodSeconds"] * probe["failureThreshold"]
    assert patience is not None and RESTART_SECONDS <= seconds < patience


def test_the_workers_of_a_pod_share_its_cores() -> None:
    """A cpu request is no quota: without being told, they count the node's. OMP_NUM_THREADS would
    be for each of them.
    """
    environment = {entry["name"]: entry for entry in CONTAINER["env"]}
    assert environment[CPUS_VARIABLE]["valueFrom"] == {
        "resourceFieldRef": {"resource": "requests.cpu"}
    }
    assert not {"OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"} & set(environment)
    assert float(CONTAINER["resources"]["requests"]["cpu"]).is_integer(), "Kubernetes rounds it up"


def test_the_image_has_the_environment_that_preheat_serve_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sent,) = [line[1:] for line in DOCKERFILE if line[:1] == ["ENV"]]
    image = dict(setting.split("=", 1) for setting in sent)
    given: list[dict[str, str]] = []

    def run(*_: Any, env: dict[str, str], **__: Any) -> subprocess.CompletedProcess[bytes]:
        given.append(env)
        return subprocess.CompletedProcess([], 1)

    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ServerError):
        server.launch(tmp_path, tmp_path, None, {})
    (environment,) = given
    assert image["GOMP_SPINCOUNT"] == environment["GOMP_SPINCOUNT"]


def test_a_kubelet_can_ask_ping_which_has_no_token() -> None:
    assert PROPERTIES["disable_token_authorization"] == "true"
    assert "NetworkPolicy/preheat" in MANIFESTS, (
        "without tokens something else must say who may ask"
    )


def test_the_containers_command_is_one_that_exists(tmp_path: Path) -> None:
    """Every option is known; its folder of archives is empty here, its files too."""
    (tmp_path / "file").touch()
    here = {path: str(tmp_path / "file") for path in ("/etc/preheat/keys.jsonl", PROPERTIES_FILE)}
    here["/opt/preheat/models"] = str(tmp_path)
    assert CONTAINER["args"][:2] == ["preheat", "serve"]
    (image,) = [json.loads(" ".join(line[1:])) for line in DOCKERFILE if line[:1] == ["CMD"]]
    for arguments in (CONTAINER["args"], image):
        refused = CliRunner().invoke(app.app, [here.get(word, word) for word in arguments[1:]])
        assert isinstance(refused.exception, PreheatError), refused.output
        assert f"{tmp_path} holds no archive" in str(refused.exception)
        assert {"--foreground", "--open", "--keys"} & set(arguments) >= {"--foreground"}
    assert "--keys" in image, "the image alone is open to nobody without one"
    assert "--open" in CONTAINER["args"] and "NetworkPolicy/preheat" in MANIFESTS


def test_what_is_mounted_exists_and_what_exists_is_mounted() -> None:
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == set(volumes)
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for volume in volumes.values()
        if "persistentVolumeClaim" in volume
    }
    assert claims == {
        name.partition("/")[2] for name in MANIFESTS if name.startswith("PersistentVolumeClaim/")
    }
    maps = {volume["configMap"]["name"] for volume in volumes.values() if "configMap" in volume}
    assert maps == {generated["name"] for generated in KUSTOMIZATION["configMapGenerator"]}


def test_the_compile_cache_is_shared_and_outlives_a_pod() -> None:
    mount = mount_of("/mnt/cache")
    assert mount is not None and not mount.get("readOnly")
    (volume,) = [volume for volume in POD["volumes"] if volume["name"] == mount["name"]]
    claim = MANIFESTS[f"PersistentVolumeClaim/{volume['persistentVolumeClaim']['claimName']}"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_a_worker_compiles_on_the_pods_own_disk() -> None:
    named = {entry["name"] for entry in CONTAINER["env"]} | {
        name for line in DOCKERFILE for name in line
    }
    assert not [name for name in named if "TORCHINDUCTOR_CACHE_DIR" in name]
    mount = mount_of("/tmp")
    assert mount is not None
    (volume,) = [volume for volume in POD["volumes"] if volume["name"] == mount["name"]]
    assert "emptyDir" in volume


def test_a_pod_may_do_nothing_but_serve() -> None:
    pod, container = POD["securityContext"], CONTAINER["securityContext"]
    assert pod["runAsNonRoot"] is True and pod["runAsUser"] > 0
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["allowPrivilegeEscalation"] is False
    assert container["readOnlyRootFilesystem"] is True
    assert container["capabilities"] == {"drop": ["ALL"]}
    assert POD["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(POD)
    assert not any("hostPath" in volume for volume in POD["volumes"])


def test_everything_that_is_written_has_a_place_on_a_read_only_root() -> None:
    environment = {entry["name"]: entry.get("value") for entry in CONTAINER["env"]}
    for path in (CONTAINER["workingDir"], "/tmp", environment["HOME"], "/mnt/cache"):
        assert is_writable(str(path)), path
    assert not is_writable(PROPERTIES["model_store"]), "what lies there is run"


def test_the_properties_are_those_of_production_but_for_the_tokens() -> None:
    production = server.read_properties(ARCHIVE / "config.properties")
    assert production.pop("token_expiration_min")
    assert production.pop("disable_token_authorization") == "false"
    assert PROPERTIES == production | {"disable_token_authorization": "true"}


def test_the_server_finds_its_files() -> None:
    config = mount_of(given("--properties"))
    assert config is not None and config["name"] == "config"
    assert given("--properties") == PROPERTIES_FILE
    store = mount_of(given("serve"))
    assert store is not None and store["name"] == "models"
    assert given("serve") == PROPERTIES["model_store"]
    metrics = PurePosixPath(PROPERTIES["metrics_config"])
    assert ["COPY", "archive/metrics.yaml", f"{metrics.parent}/"] in DOCKERFILE and mount_of(
        str(metrics)
    ) is None


def test_ports_are_those_that_the_server_opens() -> None:
    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    default = inspect.signature(app.serve).parameters
    assert ports == {
        "http": default["gateway_port"].default,
        "grpc": default["grpc_port"].default,
    }
    assert given("--gateway-host") == given("--grpc-host") == "0.0.0.0"
    assert DEPLOYMENT["template"]["metadata"]["annotations"]["prometheus.io/port"] == str(
        ports["http"]
    )
    (exposed,) = [line[1:] for line in DOCKERFILE if line[:1] == ["EXPOSE"]]
    assert {int(port) for port in exposed} == set(ports.values())
    used = {port["targetPort"] for port in MANIFESTS["Service/preheat"]["spec"]["ports"]}
    used |= {
        port["port"]
        for rule in MANIFESTS["NetworkPolicy/preheat"]["spec"]["ingress"]
        for port in rule["ports"]
    }
    assert used == set(ports)


def test_every_selector_means_these_pods() -> None:
    labels = DEPLOYMENT["template"]["metadata"]["labels"].items()
    selectors = [
        DEPLOYMENT["selector"]["matchLabels"],
        MANIFESTS["Service/preheat"]["spec"]["selector"],
        MANIFESTS["NetworkPolicy/preheat"]["spec"]["podSelector"]["matchLabels"],
        MANIFESTS["PodDisruptionBudget/preheat"]["spec"]["selector"]["matchLabels"],
        *(spread["labelSelector"]["matchLabels"] for spread in POD["topologySpreadConstraints"]),
    ]
    assert all(selector and selector.items() <= labels for selector in selectors)


def test_a_pod_ends_after_its_longest_batch() -> None:
    command = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    assert command[0] == "sleep"
    assert int(command[1]) > (served().responseTimeout or 120)
    assert POD["terminationGracePeriodSeconds"] >= int(command[1]) + 15


def test_every_worker_has_a_gpu() -> None:
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == served().maxWorkers


def test_the_image_is_built_from_what_is_here() -> None:
    ignored = (ARCHIVE / "Dockerfile.dockerignore").read_text().splitlines()
    sources = [source for line in DOCKERFILE if line[:1] == ["COPY"] for source in line[1:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source.partition('/')[0]}" in ignored, f"{source} would not reach the builder"
    assert ["USER", str(POD["securityContext"]["runAsUser"])] in DOCKERFILE
