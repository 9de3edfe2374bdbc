"""The shared folder under real locks, full and read-only file systems, clocks that are off, and
folders that go away.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from preheat.cache.store import NotShared, Share
from preheat.cache.trust import Trust
from preheat.errors import Untrusted

OWNER, SIGNED = Trust("owner"), Trust("signed", b"0123456789abcdef")
NUM_BYTES = 64 << 10


def share(
    folder: Path, context: str = "here", trust: Trust = OWNER, max_bytes: int = 1 << 30
) -> Share:
    made = Share(folder, context, trust, max_bytes)
    made.prepare()
    return made


@pytest.fixture
def local(tmp_path: Path) -> Path:
    folder = tmp_path / "local"
    folder.mkdir()
    (folder / "kernel.so").write_bytes(os.urandom(NUM_BYTES))
    return folder


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts something at a folder, which only root may: `mounted("-t", "tmpfs", "none")`."""
    done: list[Path] = []

    def mount(*arguments: str) -> Path:
        folder = tmp_path / "mounted"
        folder.mkdir(exist_ok=True)
        told = subprocess.run(
            ["mount", *arguments, str(folder)], check=False, capture_output=True, text=True
        )
        if told.returncode:
            pytest.skip(f"cannot mount here: {told.stderr.strip()}")
        done.append(folder)
        return folder

    yield mount
    for folder in reversed(done):
        subprocess.run(["umount", str(folder)], check=True)


def test_what_was_published_is_loaded(tmp_path: Path, local: Path, empty: Path) -> None:
    place = share(tmp_path / "shared")
    assert not place.load(empty)
    place.publish(local)
    assert place.load(empty)
    assert (empty / "kernel.so").read_bytes() == (local / "kernel.so").read_bytes()
    assert not share(tmp_path / "shared", "there").load(empty)
    assert place.path.stat().st_mode & 0o777 == 0o600


def test_a_folder_that_others_can_write_to_is_only_for_signed_bundles(
    tmp_path: Path, local: Path, empty: Path
) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    with pytest.raises(Untrusted):
        share(folder)
    place = share(folder, trust=SIGNED)
    place.publish(local)
    assert place.load(empty)


def test_a_missing_mount_is_not_made_up(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        share(tmp_path / "mount" / "shared")


def test_one_holds_the_lock_and_the_other_hears_who(tmp_path: Path) -> None:
    place, told = share(tmp_path / "shared"), list[str]()
    lock, waited = place.lock()
    place.mark()
    assert not waited
    with pytest.raises(NotShared, match=f"pid {os.getpid()} on"):
        place.lock(0.3, told.append)
    assert told and f"pid {os.getpid()} on" in told[0]
    lock.release()
    lock, waited = place.lock(5)
    assert not waited
    lock.release()


def test_a_mark_is_only_text_whatever_it_says(tmp_path: Path) -> None:
    place = share(tmp_path / "shared")
    lock, _ = place.lock()
    deep, endless = b"[" * 5000, b'{"pid": Infinity, "host": ""}'
    for content in (b"", b"[]", b"\xff" * 5000, b'{"pid": "x", "host": 1}', deep, endless):
        place.path.with_suffix(".writer").write_bytes(content)
        with pytest.raises(NotShared, match="another worker"):
            place.lock()
    place.unmark()
    os.mkfifo(place.path.with_suffix(".writer"))
    with pytest.raises(NotShared, match="another worker"):
        place.lock()
    lock.release()


def test_half_written_files_of_the_dead_are_swept_and_those_of_the_living_stay(
    tmp_path: Path, local: Path
) -> None:
    mine, dead, living = (share(tmp_path / "shared", name) for name in ("mine", "dead", "living"))
    halves = [place.path.with_suffix(".abc.tmp") for place in (mine, dead, living)]
    for half in halves:
        half.write_bytes(b"half")
    lock, _ = living.lock()
    mine.publish(local)
    lock.release()
    assert [half.exists() for half in halves] == [False, False, True]


def test_the_least_recently_used_bundles_go_first(tmp_path: Path, local: Path, empty: Path) -> None:
    folder, room = tmp_path / "shared", 3 * NUM_BYTES + NUM_BYTES // 2
    places = [share(folder, str(number), max_bytes=room) for number in range(4)]
    for age, place in enumerate(places[:3]):
        place.publish(local)
        os.utime(place.path, (time.time() - 1000 + age,) * 2)
    assert places[0].load(empty)  # used just now
    places[3].publish(local)
    assert [place.path.exists() for place in places] == [True, False, True, True]


def test_a_clock_that_runs_ahead_makes_no_bundle_immortal(
    tmp_path: Path, local: Path, empty: Path
) -> None:
    folder, room = tmp_path / "shared", 2 * NUM_BYTES + NUM_BYTES // 2
    ahead, *others = (share(folder, str(number), max_bytes=room) for number in range(4))
    ahead.publish(local)
    os.utime(ahead.path, (time.time() + 10 * 365 * 86400,) * 2)
    assert ahead.load(empty)
    os.utime(ahead.path, (time.time() + 10 * 365 * 86400,) * 2)
    for place in others:
        place.publish(local)
        os.utime(place.path)
    assert not ahead.path.exists() and others[-1].path.exists()


def test_a_bundle_over_the_cap_is_neither_published_nor_read(
    tmp_path: Path, local: Path, empty: Path
) -> None:
    small, large = (
        share(tmp_path / "shared", max_bytes=size) for size in (NUM_BYTES, 10 * NUM_BYTES)
    )
    with pytest.raises(NotShared, match="max_bytes"):
        small.publish(local)
    assert not small.path.exists() and not list(small.folder.glob("*.tmp"))
    large.publish(local)
    with pytest.raises(Untrusted, match="max_bytes"):
        small.load(empty)


def test_a_full_share_keeps_the_old_bundle_whole(
    mounted: Callable[..., Path], local: Path, empty: Path
) -> None:
    folder = mounted("-t", "tmpfs", "-o", "size=192k,mode=0700", "none")
    place = share(folder)
    place.publish(local)
    before = place.path.read_bytes()
    (folder / "filler").write_bytes(b"x" * (192 * 1024 - len(before) - 16384))
    with pytest.raises(OSError, match="No space left"):
        place.publish(local)
    assert place.path.read_bytes() == before and not list(folder.glob("*.tmp"))
    assert place.load(empty)


def test_a_read_only_share_is_read(
    mounted: Callable[..., Path], tmp_path: Path, local: Path, empty: Path
) -> None:
    writable = share(tmp_path / "shared")
    writable.publish(local)
    folder = mounted("--bind", "-o", "ro", str(writable.folder))
    place = share(folder)
    assert place.load(empty)
    with pytest.raises(OSError, match="Read-only"):
        share(folder, "there").lock()


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    place, victim = share(tmp_path / "shared"), tmp_path / "victim"
    victim.write_text("precious")
    place.path.with_suffix(".lock").symlink_to(victim)
    with pytest.raises(OSError):
        place.lock()
    assert victim.read_text() == "precious"


def test_what_is_not_named_as_ours_is_left_alone(tmp_path: Path, local: Path) -> None:
    place = share(tmp_path / "shared", max_bytes=2 * NUM_BYTES)
    stem = os.fsencode(place.folder)
    names = [
        b"\xff\n.bundle",
        b"x" * 240 + b".tmp",
        b".tmp",
        b"0" * 31 + b"g.bundle",
        b"0" * 32 + b"\n.bundle",
    ]
    for name in names:
        with open(stem + b"/" + name, "wb") as file:
            file.truncate(10 << 30)
    place.publish(local)
    assert sorted(os.listdir(stem)) == sorted([*names, os.fsencode(place.path.name)])


def test_the_lock_is_the_kernels(tmp_path: Path) -> None:
    """flock(2) and nothing else: a lock file that merely lies there holds nobody up."""
    place = share(tmp_path / "shared")
    place.path.with_suffix(".lock").write_text("of a dead worker")
    lock, waited = place.lock()
    assert type(lock) is FileLock and not waited
    lock.release()
