"""The same pipeline, requests and order through Preheat and through what people use without it.

    python -m bench.peers [--profile tiny|small] [--rounds 5] [--seconds 1500] ...

Diffusers alone in a loop, eager and with plain `torch.compile`; OpenVINO GenAI in a loop, from the
environment of `make setup-peers`; TorchServe's own BaseHandler around diffusers; and Preheat. Each
is started cold, one after the other, and paints every size once. Then they stand side by side: each
request goes to every one of them, one at a time, before the next request does, and all of it again
in the next round. All have the same number of threads. What cannot be had is a row with its error.

What is finished is written at once: a call that ends itself after `--seconds`, or is ended, is gone
on with by the next one, which starts the peers again and keeps the figures of the first start.
"""

from __future__ import annotations

import base64
import datetime
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import httpx
import numpy as np
import psutil
import typer
import yaml
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from bench import command, peers_report, report
from bench.machine import machine, versions
from bench.peer_loop import Request, Spec
from bench.peers_report import LOOPS, TITLES
from bench.processes import LineProcess
from bench.profiles import PROFILES, RESULTS, STATE, Profile, model_yaml
from bench.rounds import turns
from bench.servers import external_archive, started
from bench.traffic import GUIDANCE_SCALE, READY_SECONDS, bucket_sizes, payloads
from preheat.device import DTYPES
from preheat.errors import PreheatError
from preheat.files import write_whole
from preheat.torchserve import processes, server
from preheat.torchserve.client import Client

PEERS_BIN = server.ROOT / ".venv-peers" / "bin"
UNFINISHED = 3
"""Exit status: call again."""
HANDLER = Path(__file__).with_name("peer_handler.py")
NAME = "peer"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True)
class Peer:
    """One that is started. `paint` gives milliseconds and the PNG.

    Raises, from `paint`:
        PreheatError, httpx.HTTPError: it has failed.
    """

    paint: Callable[[Request], tuple[float, bytes]]
    pid: int
    """It and all that it started are the peer."""
    told: Callable[[], Mapping[str, Any]]
    """What it says of itself once everything was painted."""

    def peak_bytes(self) -> int:
        """The most memory that its processes have held, each at its own worst moment."""
        return sum(_peak(each.pid) for each in processes.family(psutil.Process(self.pid)))


def _peak(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:  # ended meanwhile
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


@dataclass(frozen=True, slots=True)
class Setting:
    """What all peers have in common; `work` keeps what they make between two calls."""

    profile: Profile
    dtype: str
    work: Path
    num_threads: int

    @property
    def model(self) -> Path:
        return self.work / "pipeline"

    def environment(self, kind: str) -> dict[str, str]:
        """Compilers of each peer start without a cache, and keep it for the next call."""
        kept = self.work / f"compiled-{kind}"
        return {
            "OMP_NUM_THREADS": str(self.num_threads),
            "TORCHINDUCTOR_CACHE_DIR": str(kept),
            "TRITON_CACHE_DIR": str(kept / "triton"),
        }

    def prepare(self, kind: str) -> None:
        """What is done once for all starts, before the clock runs: GenAI's conversion.

        Raises:
            PreheatError: it failed.
        """
        if kind.startswith("genai"):
            convert(self.model, self.converted)

    @property
    def converted(self) -> Path:
        return self.work / "openvino"

    def start(self, kind: str, stack: ExitStack) -> Peer:
        """One of TITLES, able to answer.

        Raises:
            PreheatError: it cannot be had; the message says why.
        """
        if kind in LOOPS:
            return self._loop(kind, stack)
        return stack.enter_context(self._served(kind))

    def _loop(self, kind: str, stack: ExitStack) -> Peer:
        module, python, model = "bench.peer_diffusers", Path(sys.executable), self.model
        if kind.startswith("genai"):
            module, python = "bench.peer_genai", PEERS_BIN / "python"
            model = self.converted
        sizes = [(bucket.height, bucket.width) for bucket in self.profile.buckets]
        spec = Spec(
            kind,
            str(model),
            self.dtype,
            sizes,
            GUIDANCE_SCALE,
            self.num_threads,
            on_gpu=self.profile.on_gpu,
        )
        process = LineProcess(module, spec.to_json(), self.environment(kind), str(python))
        stack.enter_context(closing(process))
        no_error(process.first)

        def paint(request: Request) -> tuple[float, bytes]:
            answer = no_error(process.ask(json.dumps(request)))
            return answer["milliseconds"], base64.b64decode(answer["picture"])

        return Peer(paint, process.pid, lambda: {"versions": process.first["versions"]})

    @contextmanager
    def _served(self, kind: str) -> Iterator[Peer]:
        folder = self.work / f"archive-{kind}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if kind == "preheat":
            config = model_yaml(self.profile, "buckets", backend="auto", dtype=self.dtype)
            archive = external_archive(self.profile, config, self.model, folder)
        else:
            archive = self.plain_archive(folder)
        env = self.environment(kind)
        cache = Path(env["TORCHINDUCTOR_CACHE_DIR"])
        cache.mkdir(exist_ok=True)
        with (
            started(archive, f"bench-peer-{kind}", cache=cache, env=env, seconds=READY_SECONDS) as (
                running,
                _,
            ),
            Client.to(running, timeout=1000) as client,
        ):

            def paint(request: Request) -> tuple[float, bytes]:
                reply = client.predict(request)
                if reply.status != 200:
                    raise PreheatError(f"answered with {reply.status}: {reply.body[:200]!r}")
                return reply.milliseconds, reply.body

            def told() -> Mapping[str, Any]:
                if kind != "preheat":
                    return {}
                state = client.state()
                rows = {row["engine"] for row in state["buckets"]}
                return {
                    "engines": sorted(rows),
                    "compiles_since_ready": state["compiles_since_ready"],
                }

            yield Peer(paint, running.pid, told)

    def plain_archive(self, folder: Path) -> Path:
        """What `torch-model-archiver --archive-format no-archive` makes of the handler."""
        archive = folder / NAME
        (archive / "MAR-INF").mkdir(parents=True)
        shutil.copy(HANDLER, archive)
        described = {
            "modelName": NAME,
            "handler": HANDLER.name,
            "modelFile": HANDLER.name,  # that it has one makes BaseHandler load an eager model
            "modelVersion": "1.0",
            "configFile": "model-config.yaml",
        }
        manifest = {"runtime": "python", "model": described, "archiverVersion": "0.12.0"}
        (archive / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
        config = {
            "minWorkers": 1,
            "maxWorkers": 1,
            **({} if self.profile.on_gpu else {"deviceType": "cpu"}),
            "batchSize": 1,
            "startupTimeout": READY_SECONDS,
            "responseTimeout": READY_SECONDS,  # it compiles inside requests
            "pt2": {"compile": {"enable": True, "backend": "inductor"}},
            "handler": {"model_path": str(self.model), "dtype": self.dtype},
        }
        (archive / "model-config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        return archive


def no_error(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """A loop's answer; one that is an error is raised as PreheatError."""
    if "error" in answer:
        raise PreheatError(str(answer["error"]))
    return answer


def convert(model: Path, folder: Path) -> None:
    """Write the pipeline to `folder` as optimum-intel does for OpenVINO, weights in float32.

    Raises:
        PreheatError: its environment is not there, or it could not convert this pipeline.
    """
    if not PEERS_BIN.exists():
        raise PreheatError("not installed: make setup-peers")
    if folder.exists():
        return
    scratch = folder.with_suffix(".new")
    shutil.rmtree(scratch, ignore_errors=True)
    task = ["--task", "text-to-image", "--weight-format", "fp32"]
    done = subprocess.run(
        [PEERS_BIN / "optimum-cli", "export", "openvino", "--model", model, *task, scratch],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise PreheatError(f"optimum-intel could not convert the pipeline: {said[-1]}"[:300])
    scratch.replace(folder)


class Record:
    """The result so far, in a file. One of another run, or of one that is finished, is set aside:
    then everything begins anew, in an empty folder.
    """

    def __init__(self, work: Path, head: Mapping[str, Any], *, anew: bool = False) -> None:
        self._path = work / "progress.json"
        before = json.loads(self._path.read_text()) if self._path.exists() else {}
        same = {key: before.get(key) for key in head} == json.loads(json.dumps(head))
        if anew or not same or peers_report.num_rounds(before) >= head["rounds"]:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            before = {}
        self.document: dict[str, Any] = {"seconds": 0.0, "peers": {}, **before, **head}
        self._began = time.monotonic() - self.document["seconds"]

    @property
    def peers(self) -> dict[str, dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = self.document["peers"]
        return rows

    @property
    def left(self) -> int:
        """Rounds that are still to be done."""
        return int(self.document["rounds"]) - peers_report.num_rounds(self.document)

    def write(self) -> None:
        self.document["seconds"] = round(time.monotonic() - self._began, 1)
        # a call may be ended between two bytes
        write_whole(self._path, json.dumps(self.document).encode())


def start_all(
    kinds: Sequence[str],
    prepare: Callable[[str], None],
    start: Callable[[str], Peer],
    requests: Sequence[Request],
    record: Record,
    console: Console,
) -> dict[str, Peer]:
    """Those that can be had, after each has painted every request once. Their rows keep what the
    first start has shown.

    Args:
        prepare: done before the clock of a start runs.
        requests: one of each size.
    """
    found: dict[str, Peer] = {}
    expected: list[NDArray[Any]] = []
    for kind in kinds:
        if "error" in record.peers.get(kind, {}):
            continue
        console.print(f"{TITLES[kind]}: starting ...")
        took, pictures = [], []
        try:
            prepare(kind)
            begun = time.monotonic()
            peer = start(kind)
            ready = time.monotonic() - begun
            for request in requests:
                pictures.append(peer.paint(request)[1])
                took.append(time.monotonic() - begun)
        except (PreheatError, httpx.HTTPError) as error:
            _give_up(kind, error, record, console)
            continue
        arrays = [_pixels(picture) for picture in pictures]
        expected = expected or arrays
        told = [report.decibels(one, two) for one, two in zip(arrays, expected, strict=True)]
        row = {
            "ready_seconds": round(ready, 1),
            "first_picture_seconds": round(took[0], 1),
            "every_size_seconds": round(took[-1], 1),
            "psnr_db": round(min(told), 1),
            "milliseconds": [],
        }
        record.peers.setdefault(kind, row)
        record.write()
        found[kind] = peer
        console.print(f"{TITLES[kind]}: first picture after {took[0]:.1f} s, all {took[-1]:.1f}")
    return found


def in_rounds(
    peers: dict[str, Peer],
    requests: Sequence[Request],
    record: Record,
    until: float,
    console: Console,
) -> None:
    """Rounds that are left. No round begins after `until`, of time.monotonic(). A round that was
    cut short is not written down; who fails is left out of it and of the later ones.
    """
    while record.left > 0 and peers and time.monotonic() < until:
        index = peers_report.num_rounds(record.document)
        took: dict[str, list[float]] = {kind: [] for kind in peers}
        for number, request in enumerate(requests):
            for kind in turns(list(peers), number + index):
                try:
                    took[kind].append(round(peers[kind].paint(request)[0], 2))
                except (PreheatError, httpx.HTTPError) as error:
                    _give_up(kind, error, record, console)
                    del peers[kind]
        for kind, peer in peers.items():
            row = record.peers[kind]
            row["milliseconds"].append(took[kind])
            row |= {"peak_bytes": peer.peak_bytes(), **peer.told()}
        record.write()
        console.print(f"round {index + 1} of {record.document['rounds']} is done")


def _give_up(kind: str, error: Exception, record: Record, console: Console) -> None:
    said = str(error).strip().splitlines() or [""]
    row = record.peers.setdefault(kind, {})
    row["error"] = f"{type(error).__name__}: {said[0]}"[:300]
    record.write()
    console.print(f"{TITLES[kind]}: {row['error']}", markup=False)


def _pixels(picture: bytes) -> NDArray[Any]:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))


@app.command()
def bench(
    profile: Annotated[
        str, typer.Option(help=f"{', '.join(PROFILES)}; sdxl needs a CUDA GPU.")
    ] = "tiny",
    only: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(TITLES)}; may be repeated.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"Of {', '.join(DTYPES)}. Default: the profile's first.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Of each round.")] = 12,
    rounds: Annotated[int, typer.Option(min=1, help="How often all requests are sent.")] = 5,
    steps: Annotated[int | None, typer.Option(help="Denoising steps per request.")] = None,
    buckets: Annotated[
        int | None, typer.Option(min=1, help="How many of the profile's buckets; the first ones.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="After these no round begins; the next call goes on.")
    ] = float("inf"),
    anew: Annotated[
        bool, typer.Option("--anew", help="Begin anew, even where the last call left something.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for peers.json and peers.png.")] = RESULTS,
) -> None:
    """Measure Preheat against diffusers, OpenVINO GenAI and TorchServe's own handler, in turn."""
    chosen, kinds = _chosen(profile, steps, buckets), _kinds(only)
    kind_of_numbers = dtype or chosen.dtype
    if kind_of_numbers not in DTYPES:
        raise PreheatError(f"unknown dtype {dtype!r}: one of {', '.join(DTYPES)}")
    until = time.monotonic() + seconds
    console = command.console()
    own = payloads(bucket_sizes(chosen), chosen.num_steps)
    asked = [own[index % len(own)] for index in range(requests)]
    num_threads = len(os.sched_getaffinity(0))
    head = {
        "profile": profile,
        "dtype": kind_of_numbers,
        "machine": machine(),
        "on_gpu": chosen.on_gpu,
        "versions": versions(),
        "steps": chosen.num_steps,
        "requests": requests,
        "rounds": rounds,
        "sizes": [str(bucket) for bucket in chosen.buckets],
        "threads": num_threads,
        "asked_for": kinds,
    }
    work = STATE / "bench" / f"peers-{profile}-{kind_of_numbers}"
    record = Record(work, head, anew=anew)
    setting = Setting(chosen, kind_of_numbers, work, num_threads)
    if not setting.model.exists():
        console.print(f"making the pipeline of profile {profile} ...")
        scratch = work / "pipeline.new"
        shutil.rmtree(scratch, ignore_errors=True)
        chosen.build(scratch).replace(setting.model)
    with ExitStack() as stack:
        peers = start_all(
            kinds,
            setting.prepare,
            lambda kind: setting.start(kind, stack),
            own[: len(chosen.buckets)],
            record,
            console,
        )
        if not peers:
            raise PreheatError("no peer could be had")
        in_rounds(peers, asked, record, until, console)
    document = {
        **record.document,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **peers_report.ratios(record.document),
    }
    peers_report.write(document, output)
    Console(width=200).print(peers_report.table(document))
    for sentence in [*peers_report.verdict(document), *document["doubts"]]:
        console.print(sentence, markup=False)
    if record.left > 0:
        _unfinished(record.left, console)


def _unfinished(left: int, console: Console) -> NoReturn:
    console.print(f"{left} rounds are left: call again")
    sys.exit(UNFINISHED)


def _chosen(name: str, steps: int | None, buckets: int | None) -> Profile:
    if name not in PROFILES:
        raise PreheatError(f"unknown profile {name!r}: one of {', '.join(PROFILES)}")
    profile = PROFILES[name]
    return replace(profile, num_steps=steps or profile.num_steps, buckets=profile.buckets[:buckets])


def _kinds(only: Sequence[str] | None) -> list[str]:
    """Those chosen, in the order in which they start; eager comes first, as the others are compared
    with it.
    """
    unknown = sorted(set(only or ()) - set(TITLES))
    if unknown:
        raise PreheatError(f"unknown peer {unknown[0]!r}: one of {', '.join(TITLES)}")
    return [kind for kind in TITLES if not only or kind in only or kind == "eager"]


def main() -> None:
    command.run(app)


if __name__ == "__main__":
    main()
