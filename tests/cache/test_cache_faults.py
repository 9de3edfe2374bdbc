"""Whatever is wrong with the share: the worker gets hot and serves, and nobody loads what was
refused. Whole workers, real files.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import counted_compiler
from cache.test_cache import program
from cached_service import POINTS, caches, is_hot_and_serves, start
from preheat.cache import fingerprint
from preheat.compilation.backends.base import EngineName
from preheat.models import tiny

KEY = "0123456789abcdef"


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "base"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "triton"))
    monkeypatch.setenv("PREHEAT_CACHE_KEY", KEY)
    yield
    torch.compiler.set_stance("default")
    torch.compiler.reset()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.build("sdxl", folder / "model")
    return folder


@pytest.fixture(scope="module")
def signed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A share with one good bundle, made by a worker that found none."""
    folder = tmp_path_factory.mktemp("signed") / "shared"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREHEAT_CACHE_KEY", KEY)
        first = str(tmp_path_factory.mktemp("first"))
        patch.setattr(tempfile, "tempdir", first)
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):  # which the worker sets
            patch.setenv(name, first)
        with start(model, folder) as service:
            assert is_hot_and_serves(service) and caches(service) == {"miss"}
            assert service.state.shared_cache["outcome"] == "published"
    return folder


@pytest.fixture
def shared(signed: Path, tmp_path: Path) -> Path:
    """A copy of it to do harm to."""
    return Path(shutil.copytree(signed, tmp_path / "shared"))


def bundle_in(shared: Path) -> Path:
    (path,) = shared.glob("*.bundle")
    return path


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    ours = (
        record
        for record in caplog.records
        if record.name in ("preheat.cache.shared", "preheat.cache.store")
    )
    return [record.getMessage() for record in ours if record.levelno >= logging.WARNING]


def test_a_good_bundle_is_a_hit_in_state_log_and_outcome(
    model: Path, shared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        service = start(model, shared)
    assert is_hot_and_serves(service) and caches(service) == {"hit"}
    assert service.state.shared_cache["outcome"] == "loaded" and not warnings(caplog)
    assert "cache hit" in caplog.text


def _flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def _unsign(path: Path) -> None:
    header, payload = path.read_bytes().split(b"\n", 1)
    path.write_bytes(json.dumps(json.loads(header) | {"signature": ""}).encode() + b"\n" + payload)


def _become_a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: _flip(path, -30000),
        _unsign,
        _become_a_link,
    ],
    ids=["truncated", "bit-flipped", "unsigned", "link"],
)
def test_a_harmed_bundle_is_refused_and_replaced(
    model: Path, shared: Path, caplog: pytest.LogCaptureFixture, harm: Callable[[Path], None]
) -> None:
    harm(bundle_in(shared))
    service = start(model, shared)
    assert is_hot_and_serves(service) and caches(service) == {"miss"}
    (warning,) = warnings(caplog)
    assert "refused the compile cache" in warning
    assert service.state.shared_cache["outcome"] == "published"
    assert caches(start(model, shared)) == {"hit"} and len(warnings(caplog)) == 1


def test_a_bundle_signed_with_another_key_is_refused(
    model: Path, shared: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREHEAT_CACHE_KEY", "another key of 16")
    service = start(model, shared)
    assert is_hot_and_serves(service) and caches(service) == {"miss"}
    assert "signature is wrong" in warnings(caplog)[0]


def test_a_bundle_of_another_torch_is_refused_under_our_name(
    model: Path,
    shared: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = tmp_path / "other"
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "_version", lambda package: "2.0.0")
        start(model, other)
    ours = bundle_in(shared)
    assert bundle_in(other).name != ours.name  # not found under its own name in the first place
    bundle_in(other).replace(ours)
    service = start(model, shared)
    assert is_hot_and_serves(service) and caches(service) == {"miss"}
    assert "another machine, version" in warnings(caplog)[0]


@pytest.mark.parametrize(
    "open_to_others", [lambda path: path, lambda path: path.parent], ids=["file", "folder"]
)
def test_owner_trust_refuses_what_others_can_write(
    model: Path,
    shared: Path,
    caplog: pytest.LogCaptureFixture,
    open_to_others: Callable[[Path], Path],
) -> None:
    assert caches(start(model, shared, trust="owner")) == {"hit"}
    open_to_others(bundle_in(shared)).chmod(0o777)
    service = start(model, shared, trust="owner")
    assert is_hot_and_serves(service) and caches(service) == {"miss"}
    assert "can be written by others" in warnings(caplog)[0] and len(warnings(caplog)) == 1


@pytest.mark.parametrize("days", [-4000, 4000])
def test_clocks_decide_nothing(model: Path, shared: Path, days: int) -> None:
    then = bundle_in(shared).stat().st_mtime + days * 86400
    for path in (shared, *shared.iterdir()):
        os.utime(path, (then, then))
    assert caches(start(model, shared)) == {"hit"}


def test_a_cap_too_small_for_any_bundle_means_no_sharing(
    model: Path, shared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = start(model, shared, max_bytes=1000)
    assert is_hot_and_serves(service) and caches(service) == {"miss"}
    assert (
        service.state.shared_cache["outcome"] == "unshared" and "max_bytes" in warnings(caplog)[-1]
    )


def test_a_missing_share_is_a_warning(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = start(model, tmp_path / "unmounted" / "shared")
    assert is_hot_and_serves(service) and caches(service) == {"miss"}
    assert service.state.shared_cache["outcome"] == "unshared" and len(warnings(caplog)) == 1


@pytest.fixture
def read_only(shared: Path) -> Iterator[Path]:
    """Root passes over modes, so for root it is mounted read-only."""
    bundle_in(shared).write_bytes(b"corrupt")
    if os.geteuid() != 0:
        shared.chmod(0o500)
        yield shared
        shared.chmod(0o700)
        return
    told = subprocess.run(
        ["mount", "--bind", "-o", "ro", shared, shared], check=False, capture_output=True, text=True
    )
    if told.returncode:
        pytest.skip(f"cannot mount here: {told.stderr.strip()}")
    yield shared
    subprocess.run(["umount", shared], check=True)


def test_a_refused_bundle_that_cannot_be_replaced_is_refused_every_time(
    model: Path, read_only: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        caplog.clear()
        service = start(model, read_only)
        assert is_hot_and_serves(service) and caches(service) == {"miss"}
        assert service.state.shared_cache["outcome"] == "unshared"
        refused, alone = warnings(caplog)
        assert "refused" in refused and "compiling alone" in alone


@pytest.mark.parametrize("spare", [0, 16384], ids=["to-the-last-byte", "room-for-a-mark"])
def test_a_full_share_is_a_warning(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, spare: int
) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    size = 256 << 10
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "none", str(folder)]
    told = subprocess.run(mount, check=False, capture_output=True, text=True)
    if told.returncode:
        pytest.skip(f"cannot mount here: {told.stderr.strip()}")
    try:
        (folder / "filler").write_bytes(b"x" * (size - spare))
        service = start(model, folder)
        assert is_hot_and_serves(service) and caches(service) == {"miss"}
        (warning,) = warnings(caplog)
        assert "No space left" in warning and service.state.shared_cache["outcome"] == "unshared"
        assert not list(folder.glob("*.bundle")) and not list(folder.glob("*.tmp"))
        (folder / "filler").unlink()
        assert caches(start(model, folder)) == {"miss"} and caches(start(model, folder)) == {"hit"}
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="module")
def killed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Shares as writers left them that were killed with SIGKILL at each point, and what the cache
    was of a process like theirs that served the last one: in this one, which may have built
    packages, torch 2.8's keys are others.
    """
    folder = tmp_path_factory.mktemp("killed")
    writers = program("cached_service.py", model, folder, PREHEAT_CACHE_KEY=KEY)
    told = writers.communicate(timeout=300)
    assert writers.returncode == 0, told
    ends = json.loads(told[0].splitlines()[-1])
    served = ends.pop("served")
    assert ends == dict.fromkeys(POINTS, "SIGKILL"), told
    return folder, served


@pytest.mark.parametrize("point", POINTS)
def test_a_writer_killed_at_any_point_leaves_nothing_harmful(
    model: Path, killed: tuple[Path, str], caplog: pytest.LogCaptureFixture, point: str
) -> None:
    folder, served = killed[0] / point, killed[1]
    left = {path.suffix for path in folder.iterdir()}
    assert (
        left
        == {".lock", ".writer"}
        | {
            "compiling": set(),
            "second": {".bundle"},
            "packing": {".tmp"},
            "renaming": {".tmp"},
            "published": {".bundle"},
        }[point]
    )
    if point == "published":
        assert served == "hit"
        return
    num_buckets = 2 if point == "second" else 1
    service = start(model, folder, num_buckets)
    assert is_hot_and_serves(service) and not warnings(caplog)
    assert [row.cache for row in service.state.buckets] == (
        ["hit", "miss"] if point == "second" else ["miss"]
    )
    assert service.state.shared_cache["outcome"] == "published"
    assert caches(start(model, folder, num_buckets)) == {"hit"}
    assert not list(folder.glob("*.tmp")) and not list(folder.glob("*.partial.*"))


def test_a_bucket_that_does_not_compile_costs_the_others_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shared"
    monkeypatch.setattr(
        counted_compiler, "broken", lambda shapes: any(shape[-2:] == (8, 12) for shape in shapes)
    )

    def outcomes() -> tuple[str, dict[int, tuple[EngineName, str]]]:
        service = start(model, folder, num_buckets=2)
        rows = {row.bucket.width: (row.engine, row.cache) for row in service.state.buckets}
        return str(service.state.shared_cache["outcome"]), rows

    assert outcomes() == ("published", {64: ("compiled", "miss"), 96: ("eager", "none")})
    before = bundle_in(folder).stat()
    assert outcomes() == ("unshared", {64: ("compiled", "hit"), 96: ("eager", "none")})
    assert bundle_in(folder).stat().st_ino == before.st_ino
    monkeypatch.setattr(counted_compiler, "broken", lambda shapes: False)
    assert outcomes() == ("published", {64: ("compiled", "hit"), 96: ("compiled", "miss")})
    assert outcomes() == ("loaded", {64: ("compiled", "hit"), 96: ("compiled", "hit")})
