"""Who is believed: signatures against every kind of change, and owners by real files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from preheat.cache.trust import Trust
from preheat.errors import ConfigError, Untrusted

KEY = "0123456789abcdef"
SIGNED = Trust("signed", KEY.encode())
OWNER = Trust("owner")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    path = tmp_path / "package.pt2"
    path.write_bytes(b"machine code")
    path.chmod(0o600)
    return path


def test_a_signed_file_is_read_back(file: Path) -> None:
    SIGNED.sign_file(file, "fingerprint-1")
    assert SIGNED.read_file(file, "fingerprint-1") == b"machine code"


@pytest.mark.parametrize(
    "harm",
    [
        lambda file: file.write_bytes(b"machine cod3"),
        lambda file: file.write_bytes(b"machine"),
        lambda file: file.with_name("package.pt2.sig").unlink(),
        lambda file: file.with_name("package.pt2.sig").write_text(""),
        lambda file: file.with_name("package.pt2.sig").write_bytes(b"\xff" * 500),
        lambda file: Trust("signed", b"another key of 16").sign_file(file, "fingerprint-1"),
        lambda file: SIGNED.sign_file(file, "fingerprint-2"),
    ],
    ids=["altered", "truncated", "unsigned", "empty", "noise", "wrong-key", "other-purpose"],
)
def test_what_is_not_ours_is_refused(file: Path, harm: Callable[[Path], object]) -> None:
    SIGNED.sign_file(file, "fingerprint-1")
    harm(file)
    with pytest.raises(Untrusted):
        SIGNED.read_file(file, "fingerprint-1")


def test_owner_mode_wants_file_and_folder_to_be_ours_alone(file: Path) -> None:
    assert OWNER.read_file(file, "any") == b"machine code"
    file.chmod(0o620)
    with pytest.raises(Untrusted, match="can be written by others"):
        OWNER.read_file(file, "any")
    file.chmod(0o600)
    file.parent.chmod(0o702)
    with pytest.raises(Untrusted, match="its folder can be written"):
        OWNER.read_file(file, "any")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_owner_mode_refuses_somebody_elses_file(file: Path) -> None:
    os.chown(file, 12345, -1)
    with pytest.raises(Untrusted, match="uid 12345"):
        OWNER.read_file(file, "any")


@pytest.mark.parametrize("trust", [SIGNED, OWNER], ids=["signed", "owner"])
def test_links_and_devices_are_not_even_read(file: Path, trust: Trust) -> None:
    link, pipe = file.with_name("link"), file.with_name("pipe")
    link.symlink_to(file)
    os.mkfifo(pipe, 0o600)
    for path in (link, pipe):
        with pytest.raises(Untrusted):
            trust.open(path)
    with pytest.raises(FileNotFoundError):
        trust.open(file.with_name("absent"))


def test_the_key_decides_the_default(file: Path) -> None:
    assert Trust.resolve(None, {}).mode == "owner"
    assert Trust.resolve(None, {"PREHEAT_CACHE_KEY": KEY}) == SIGNED
    file.write_text(KEY + "\n")
    assert Trust.resolve(None, {"PREHEAT_CACHE_KEY_FILE": str(file)}) == SIGNED
    # A key that is not asked for still signs, for those who do ask.
    assert Trust.resolve("owner", {"PREHEAT_CACHE_KEY": KEY}).sign("digest", "context")
    assert KEY not in repr(SIGNED)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"PREHEAT_CACHE_KEY": ""},
        {"PREHEAT_CACHE_KEY": "short"},
        {"PREHEAT_CACHE_KEY_FILE": "/no/such/file", "PREHEAT_CACHE_KEY": KEY},
    ],
    ids=["none", "empty", "short", "missing-file"],
)
def test_a_key_that_cannot_be_used_stops_the_load(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"pt2\.cache\.trust"):
        Trust.resolve("signed", environ)
