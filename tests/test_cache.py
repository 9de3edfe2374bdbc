"""The shared compile cache with the real Inductor: who compiles, what a hit is, and what a killed writer leaves."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from preheat import cache as preheat_cache
from preheat.cache import (
    SharedCache,
    load_inductor_cache,
    own_inductor_folder,
    sync_inductor_cache,
    synchronized_inductor_cache,
    writable_inductor_folder,
)
from preheat.share import Share
from preheat.trust import Trust

TESTS = Path(__file__).parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folders of this process lie below; nothing of it leaks into other tests."""
    folder = tmp_path / "base"
    folder.mkdir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "triton"))
    torch._dynamo.reset()
    yield folder
    torch._dynamo.reset()


@pytest.fixture
def place(tmp_path: Path) -> SharedCache:
    return SharedCache(tmp_path / "shared", Trust("owner"))


def program(name: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(TESTS / name), *map(str, arguments)]
    environment = {**os.environ, **ENVIRONMENT, **environment}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Four workers that started cold together: the folder they share and what each says.

    Before, another one was killed in the middle of Inductor's work: nothing that it had started may hold them up.
    """
    folder = tmp_path_factory.mktemp("cold")
    shared = folder / "shared"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "killed"))
        first = program("cold_worker.py", shared)
    while not list(folder.glob("killed/*/??/*.main.cpp")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    first.kill()
    first.communicate()
    assert list(shared.glob("*.writer")) and not list(shared.glob("*.bundle"))
    workers = [program("cold_worker.py", shared, 4) for _ in range(4)]
    told = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4, told
    return shared, [json.loads(output) for output, _ in told]


def test_of_four_cold_workers_exactly_one_compiles(cold: tuple[Path, list[dict[str, Any]]]) -> None:
    _, told = cold
    assert sorted((each["cache"], each["outcome"]) for each in told) == [("hit", "loaded")] * 3 + [
        ("miss", "published")
    ]
    assert min(each["waited_seconds"] for each in told if each["cache"] == "hit") > 0


def test_a_bundle_hits_in_another_folder_and_is_not_published_again(
    cold: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    shared, _ = cold
    (path,) = shared.glob("*.bundle")
    before = path.stat().st_ino
    output, errors = program("cold_worker.py", shared, TMPDIR=str(tmp_path)).communicate(timeout=300)
    assert output, errors
    said = json.loads(output)
    assert (said["cache"], said["outcome"]) == ("hit", "loaded") and path.stat().st_ino == before
    assert not list(tmp_path.rglob("precompiled_headers"))  # 5 s, for nothing: there was nothing to compile


WITHOUT_OBJECTS = """
import os, sys
from pathlib import Path
import torch
import cold_worker
from preheat.cache import load_inductor_cache

torch.set_num_threads(1)
digest = load_inductor_cache("tiny", cold_worker.cache(Path(sys.argv[1])))
local = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
objects = list(local.glob("??/*.so"))
assert digest and objects
for path in objects:
    path.unlink()
print(cold_worker.compile_and_run(local))
"""


def test_records_without_their_shared_objects_are_no_hit(cold: tuple[Path, list[dict[str, Any]]]) -> None:
    command = [sys.executable, "-c", WITHOUT_OBJECTS, str(cold[0])]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "partial", done.stderr


def test_the_two_halves_share_and_skip_what_has_not_changed(place: SharedCache, base: Path) -> None:
    digest = load_inductor_cache("key", place)
    local = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert digest == "" and local.parent == base and os.environ["TRITON_CACHE_DIR"] == str(local / "triton")
    assert not sync_inductor_cache("key", digest, place)  # nothing there
    (local / "a").write_text("compiled")
    assert sync_inductor_cache("key", digest, place)
    digest = load_inductor_cache("key", place)
    assert digest and Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) != local
    assert not sync_inductor_cache("key", digest, place)
    Path(os.environ["TORCHINDUCTOR_CACHE_DIR"], "b").write_text("more")
    assert sync_inductor_cache("key", digest, place)
    assert load_inductor_cache("other", place) == ""


def test_a_failed_warm_up_publishes_nothing(place: SharedCache) -> None:
    with pytest.raises(ZeroDivisionError), synchronized_inductor_cache("key", place) as use:
        (use.folder / "a").write_text("half")
        raise ZeroDivisionError
    with synchronized_inductor_cache("key", place) as use:
        (use.folder / "a").write_text("slow")
        use.withhold("a bucket fell to eager")
    assert use.outcome == "unshared" and not list(place.folder.glob("*.bundle"))
    assert not list(place.folder.glob("*.writer"))


def test_waiting_is_bounded_and_ends_in_a_compile(place: SharedCache, caplog: pytest.LogCaptureFixture) -> None:
    share = place.share("key")
    share.prepare()
    lock, _ = share.lock()
    share.mark()
    told: list[str] = []
    began = time.monotonic()
    with synchronized_inductor_cache("key", place, patience=0.5, report=told.append) as use:
        assert 0.5 <= time.monotonic() - began < 5
        (use.folder / "a").write_text("compiled")
    lock.release()
    assert told and use.outcome == "unshared" and "still holds the lock" in use.reason
    assert [record.levelname for record in caplog.records if record.levelno >= logging.WARNING] == ["WARNING"]
    assert not share.path.exists()


def test_who_waited_for_a_writer_that_could_not_publish_goes_on_at_once(place: SharedCache) -> None:
    share = place.share("key")
    share.prepare()
    lock, _ = share.lock()
    with (
        synchronized_inductor_cache("key", place, patience=30, report=lambda _: lock.release()) as use,
        synchronized_inductor_cache("key", place, patience=0) as other,  # the lock is free for the others
    ):
        assert other.reason == ""
    assert "has ended without a bundle" in use.reason


def test_a_waiter_takes_over_from_a_writer_that_is_killed(place: SharedCache, tmp_path: Path) -> None:
    share = place.share("key")
    share.prepare()
    code = (
        "import sys, time; from pathlib import Path; from preheat.share import Share; from preheat.trust import Trust;"
        "share = Share(Path(sys.argv[1]), sys.argv[2], Trust('owner'), 1 << 30);"
        "lock, _ = share.lock(); share.mark(); print('compiling', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(place.folder), share.context]
    writer = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None and writer.stdout.readline() == "compiling\n"
    told: list[str] = []

    def kill(message: str) -> None:
        told.append(message)
        writer.kill()

    with synchronized_inductor_cache("key", place, patience=60, report=kill) as use:
        (use.folder / "a").write_text("compiled")
    writer.communicate()
    assert f"pid {writer.pid}" in told[0] and use.outcome == "published"


def test_a_share_that_goes_away_costs_a_warning(
    place: SharedCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with synchronized_inductor_cache("key", place) as use:
        (use.folder / "a").write_text("compiled")
        shutil.rmtree(place.folder)
    assert use.outcome == "unshared" and "cannot publish" in caplog.text
    with synchronized_inductor_cache("key", SharedCache(tmp_path / "gone" / "shared", Trust("owner"))) as use:
        (use.folder / "a").write_text("compiled")
    assert use.outcome == "unshared" and "compiling alone" in caplog.text


def test_folders_of_dead_workers_are_removed_and_those_of_the_living_stay(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    living = own_inductor_folder()
    dead, elsewhere = living.with_name(f"{living.name}-dead"), base / "preheat-inductor-another-machine-1"
    dead.mkdir()
    elsewhere.mkdir()  # its worker may live: on a network file system its lock may not be seen here
    monkeypatch.setattr(preheat_cache, "_NEWBORN_SECONDS", 0.0)
    own_inductor_folder()
    assert living.is_dir() and elsewhere.is_dir() and not dead.exists()


@pytest.mark.parametrize("prepare", [own_inductor_folder, writable_inductor_folder])
def test_a_folder_that_cannot_be_written_costs_a_warning(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    prepare: Callable[[], object],
) -> None:
    (base / "file").write_text("in the way")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(base / "file" / "inductor"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    prepare()
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder.is_dir() and folder.parent == tmp_path and "cannot compile in" in caplog.text


def test_a_folder_that_can_be_written_stays(base: Path) -> None:
    writable_inductor_folder()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(base)


@pytest.mark.parametrize(
    "other",
    [{"fingerprint": "another model"}, {"device": torch.device("cuda:1")}],
    ids=["model", "device"],
)
def test_what_code_depends_on_gives_it_a_place_of_its_own(tmp_path: Path, other: dict[str, Any]) -> None:
    def path(key: str = "key", **kwargs: Any) -> Path:
        share: Share = SharedCache(tmp_path, Trust("owner"), **({"fingerprint": "a model"} | kwargs)).share(key)
        return share.path

    assert len({path(), path("other key"), path(**other)}) == 3


def test_so_does_the_number_of_threads(tmp_path: Path) -> None:
    place = SharedCache(tmp_path, Trust("owner"), "a model")
    before = place.share("key").path
    torch.set_num_threads(2)
    try:
        assert place.share("key").path != before
    finally:
        torch.set_num_threads(1)
