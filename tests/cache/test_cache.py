"""The shared compile cache with the real Inductor: who compiles, what a hit is, and what a killed
writer leaves.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import codecache
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from preheat.cache import bundle, scratch
from preheat.cache.shared import (
    SharedCache,
    load_inductor_cache,
    own_inductor_folder,
    sync_inductor_cache,
    synchronized_inductor_cache,
    without_headers_if_warmed,
    writable_inductor_folder,
)
from preheat.cache.store import Share
from preheat.cache.trust import Trust

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folders of this process lie below; nothing of it leaks into other tests."""
    folder = tmp_path / "base"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    # Not what others may share: nothing is ever put there.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "named"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "triton"))
    torch.compiler.reset()
    yield folder
    torch.compiler.reset()


@pytest.fixture
def place(tmp_path: Path) -> SharedCache:
    return SharedCache(tmp_path / "shared", Trust("owner"))


def program(name: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(TESTS / name), *map(str, arguments)]
    environment = {**os.environ, **ENVIRONMENT, **environment}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Three workers that started cold together: the folder they share and what each says.

    Before, another one was killed in the middle of Inductor's work: nothing that it had started may
    hold them up.
    """
    folder = tmp_path_factory.mktemp("cold")
    shared = folder / "shared"
    (folder / "killed").mkdir()
    first = program("cold_worker.py", shared, TMPDIR=str(folder / "killed"))
    while not list(folder.glob("killed/*/??/*.main.cpp")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    first.kill()
    first.communicate()
    assert list(shared.glob("*.writer")) and not list(shared.glob("*.bundle"))
    workers = [program("cold_worker.py", shared, 3) for _ in range(3)]
    told = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 3, told
    return shared, [json.loads(output) for output, _ in told]


def test_of_three_cold_workers_exactly_one_compiles(
    cold: tuple[Path, list[dict[str, Any]]],
) -> None:
    _, told = cold
    assert sorted((each["cache"], each["outcome"]) for each in told) == [("hit", "loaded")] * 2 + [
        ("miss", "published")
    ]
    assert min(each["waited_seconds"] for each in told if each["cache"] == "hit") > 0


def test_a_bundle_hits_in_another_folder_and_is_not_published_again(
    cold: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    shared, _ = cold
    (path,) = shared.glob("*.bundle")
    before = path.stat().st_ino
    output, errors = program("cold_worker.py", shared, TMPDIR=str(tmp_path)).communicate(
        timeout=300
    )
    assert output, errors
    said = json.loads(output)
    assert (said["cache"], said["outcome"]) == ("hit", "loaded") and path.stat().st_ino == before
    # 5 s, for nothing: there was nothing to compile
    assert not list(tmp_path.rglob("precompiled_headers"))


WITHOUT_OBJECTS = """
import os, sys
from pathlib import Path
import torch
import cold_worker
from preheat.cache.shared import load_inductor_cache

torch.set_num_threads(1)
digest = load_inductor_cache("tiny", cold_worker.cache(Path(sys.argv[1])))
local = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
objects = list(local.glob("??/*.so"))
assert digest and objects
for path in objects:
    path.unlink()
print(cold_worker.compile_and_run(local))
"""


def test_records_without_their_shared_objects_are_no_hit(
    cold: tuple[Path, list[dict[str, Any]]],
) -> None:
    command = [sys.executable, "-c", WITHOUT_OBJECTS, str(cold[0])]
    done = subprocess.run(
        command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "partial", done.stderr


def test_the_two_halves_share_and_skip_what_has_not_changed(place: SharedCache, base: Path) -> None:
    digest = load_inductor_cache("key", place)
    local = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert digest == "" and local.parent == base and not (base.parent / "named").exists()
    assert os.environ["TRITON_CACHE_DIR"] == str(local / "triton")
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


def test_what_was_put_aside_is_for_who_takes_over_and_goes_once_all_is_published(
    place: SharedCache, caplog: pytest.LogCaptureFixture
) -> None:
    share = place.share("key")
    with pytest.raises(ZeroDivisionError), synchronized_inductor_cache("key", place) as use:
        use.keep()
        assert not share.part.path.exists()  # there was nothing yet
        (use.folder / "a").write_text("compiled")
        use.keep()
        (use.folder / "b").write_text(
            "packed so soon again, it would take more time than compiling"
        )
        use.keep()
        raise ZeroDivisionError
    assert share.part.path.exists() and not share.path.exists()
    with synchronized_inductor_cache("key", place) as use:
        assert sorted(os.listdir(use.folder)) == ["a", "owner.lock"]
        # alone, and begins there too
        with synchronized_inductor_cache("key", place, timeout=0) as other:
            assert (other.folder / "a").exists()
            other.keep()  # which is the writer's business
        (use.folder / "c").write_text("compiled")
    assert use.outcome == "published" and share.path.exists() and not share.part.path.exists()
    digest = load_inductor_cache("key", place)
    share.path.rename(share.part.path)
    with synchronized_inductor_cache("key", place) as use:
        assert os.listdir(use.folder) == ["owner.lock"]
    assert digest and "it was made for another" in caplog.text


def test_waiting_is_bounded_and_ends_in_a_compile(
    place: SharedCache, caplog: pytest.LogCaptureFixture
) -> None:
    share = place.share("key")
    share.prepare()
    lock, _ = share.lock()
    share.mark()
    told: list[str] = []
    began = time.monotonic()
    with synchronized_inductor_cache("key", place, timeout=0.5, report=told.append) as use:
        assert 0.5 <= time.monotonic() - began < 5
        (use.folder / "a").write_text("compiled")
    lock.release()
    assert told and use.outcome == "unshared" and "still holds the lock" in use.reason
    assert [record.levelname for record in caplog.records if record.levelno >= logging.WARNING] == [
        "WARNING"
    ]
    assert not share.path.exists()


def test_who_waited_for_a_writer_that_could_not_publish_goes_on_at_once(place: SharedCache) -> None:
    share = place.share("key")
    share.prepare()
    lock, _ = share.lock()
    with (
        synchronized_inductor_cache(
            "key", place, timeout=30, report=lambda _: lock.release()
        ) as use,
        # the lock is free for the others
        synchronized_inductor_cache("key", place, timeout=0) as other,
    ):
        assert other.reason == ""
    assert "has ended without a bundle" in use.reason


def test_a_waiter_takes_over_from_a_writer_that_is_killed(
    place: SharedCache, tmp_path: Path
) -> None:
    share = place.share("key")
    share.prepare()
    code = (
        "import sys, time; from pathlib import Path; from preheat.cache.store import Share; from "
        "preheat.cache.trust import Trust;"
        "share = Share(Path(sys.argv[1]), sys.argv[2], Trust('owner'), 1 << 30);"
        "lock, _ = share.lock(); share.mark(); print('compiling', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(place.folder), share.context]
    writer = subprocess.Popen(
        command, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None and writer.stdout.readline() == "compiling\n"
    told: list[str] = []

    def kill(message: str) -> None:
        told.append(message)
        writer.kill()

    with synchronized_inductor_cache("key", place, timeout=60, report=kill) as use:
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
    with synchronized_inductor_cache(
        "key", SharedCache(tmp_path / "gone" / "shared", Trust("owner"))
    ) as use:
        (use.folder / "a").write_text("compiled")
    assert use.outcome == "unshared" and "compiling alone" in caplog.text


def test_folders_of_dead_workers_are_removed_and_those_of_the_living_stay(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    living = own_inductor_folder()
    node = living.name.removeprefix("preheat-inductor-").partition("@")[0]
    dead, longer, elsewhere = (
        base / f"preheat-inductor-{name}@x" for name in (node, f"{node}-2", "another")
    )
    # workers of other machines may live: on a network their locks may not be seen
    for folder in (dead, longer, elsewhere):
        folder.mkdir()
        (folder / "owner.lock").touch()
    (base / f"preheat-inductor-{node}@link").symlink_to(base)
    own_inductor_folder()
    assert dead.is_dir()  # it may be about to be locked
    monkeypatch.setattr(scratch, "_NEWBORN_SECONDS", 0.0)
    own_inductor_folder()
    assert not dead.exists() and all(
        folder.is_dir() for folder in (living, longer, elsewhere, base)
    )
    monkeypatch.setattr(scratch, "_SILENT_SECONDS", 0.0)
    own_inductor_folder()
    assert living.is_dir() and not longer.exists() and not elsewhere.exists()


def test_without_locks_age_tells_which_folders_are_of_the_dead(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(scratch, "_NEWBORN_SECONDS", 0.0)
    young = own_inductor_folder()
    own_inductor_folder()
    assert young.is_dir()
    monkeypatch.setattr(scratch, "_SILENT_SECONDS", 0.0)
    own_inductor_folder()
    assert not young.exists()


def test_the_folder_of_a_worker_that_was_killed_goes_with_the_next_start(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, signal; from preheat.cache.scratch import own_folder; "
        "print(own_folder('inductor'), flush=True);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, **ENVIRONMENT, "TMPDIR": str(base)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    folder = Path(done.stdout.strip())
    assert done.returncode == -signal.SIGKILL and folder.parent == base and folder.is_dir()
    monkeypatch.setattr(scratch, "_NEWBORN_SECONDS", 0.0)
    own_inductor_folder()
    assert not folder.exists()


def test_a_named_folder_that_cannot_be_written_costs_a_warning(
    base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (base / "file").write_text("in the way")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(base / "file" / "inductor"))
    writable_inductor_folder()
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder.is_dir() and folder.parent == base and "cannot compile in" in caplog.text


def test_a_named_folder_that_can_be_written_stays(base: Path) -> None:
    writable_inductor_folder()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(base.parent / "named")


def open_to_others(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def a_link(folder: Path) -> None:
    folder.symlink_to(folder.parent)


@pytest.mark.parametrize("make_first", [open_to_others, a_link])
def test_inductors_default_folder_is_not_believed_where_others_could_have_made_it(
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    make_first: Callable[[Path], None],
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    default = Path(default_cache_dir())
    assert default.parent == base
    writable_inductor_folder()  # made so that only we can write to it
    assert default.stat().st_mode & 0o777 == 0o700 and "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    default.rmdir()
    make_first(default)
    writable_inductor_folder()
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).name.startswith("preheat-inductor-")
    assert f"cannot compile in {default}" in caplog.text


def test_nor_are_the_headers_in_it_which_go_into_every_build(
    base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    open_to_others(base / "default")
    monkeypatch.setattr(codecache, "_HEADER_DIR", str(base / "default" / "precompiled_headers"))
    monkeypatch.setattr(
        codecache, "_HEADER_LOCK_DIR", str(base / "default" / "precompiled_headers" / "locks")
    )
    with without_headers_if_warmed("anything"):
        for folder in (codecache._HEADER_DIR, codecache._HEADER_LOCK_DIR):
            assert Path(folder).relative_to(base).parts[0].startswith("preheat-headers-")
    assert "no precompiled header is taken" in caplog.text


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(9_900_000_000)


def unsigned(path: Path) -> None:
    header = {
        "format": bundle.FORMAT,
        "context": "",
        "digest": "0" * 64 + ":9000000000",
        "signature": "",
    }
    sparse(path)
    with path.open("r+b") as file:
        file.write(json.dumps(header).encode() + b"\n")


HOSTILE: dict[str, Callable[[Path], object]] = {
    "deep": lambda path: path.write_bytes(b"[" * 4096),
    "lone-surrogate": lambda path: path.write_bytes(b'{"pid": "\\ud800", "host": "\\ud800"}'),
    "infinity": lambda path: path.write_bytes(b'{"pid": Infinity, "host": "x"}'),
    "noise": lambda path: path.write_bytes(os.urandom(5000)),
    "sparse": sparse,
    "unsigned": unsigned,
    "fifo": os.mkfifo,
    "folder": lambda path: path.mkdir(),
    "link-to-zeros": lambda path: path.symlink_to("/dev/zero"),
    "link-to-itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("suffix", [".bundle", ".partial.bundle", ".writer", ".lock"])
@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_whatever_lies_in_the_share_a_worker_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, make: Callable[[Path], object]
) -> None:
    place = SharedCache(tmp_path / "shared", Trust("signed", b"0123456789abcdef"))
    share = place.share("key")
    share.prepare()
    make(share.path.with_suffix(suffix))
    # the mark is read to say who is waited for
    lock = share.lock()[0] if suffix == ".writer" else None
    blocks = []
    monkeypatch.setattr(bundle, "_copy", lambda *_: blocks.append("copied"))
    with synchronized_inductor_cache("key", place, timeout=0) as use:
        assert os.listdir(use.folder) == ["owner.lock"]
        (use.folder / "a").write_text("compiled")
        use.keep()
    if lock is not None:
        lock.release()
    assert (
        not blocks
        and use.outcome in ("published", "unshared")
        and bool(use.reason) == (use.outcome == "unshared")
    )


@pytest.mark.parametrize(
    "other",
    [{"fingerprint": "another model"}, {"device": torch.device("cuda:1")}],
    ids=["model", "device"],
)
def test_what_code_depends_on_gives_it_a_place_of_its_own(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    def path(key: str = "key", **kwargs: Any) -> Path:
        share: Share = SharedCache(
            tmp_path, Trust("owner"), **({"fingerprint": "a model"} | kwargs)
        ).share(key)
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
