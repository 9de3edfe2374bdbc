"""One file out of a folder and back: the same bytes for the same contents, and nothing unpacked
that should not be.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from preheat.cache import bundle
from preheat.cache.trust import Trust
from preheat.errors import Untrusted

SIGNED = Trust("signed", b"0123456789abcdef")
FILES = {"ab/kernel.so": b"machine code" * 1000, "fxgraph/x/y": b"record"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return filled(tmp_path / "filled")


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    path = tmp_path / "empty"
    path.mkdir()
    return path


def filled(folder: Path) -> Path:
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def packed(folder: Path, trust: Trust = SIGNED, context: str = "here") -> bytes:
    target = io.BytesIO()
    bundle.pack(folder, target, trust, context)
    return target.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def forged(add: Callable[[tarfile.TarFile], None]) -> bytes:
    """A bundle with entries of our choice, signed with the right key: what is refused here is
    refused for itself.
    """
    payload = io.BytesIO()
    with (
        gzip.GzipFile("", "wb", fileobj=payload) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as archive,
    ):
        add(archive)
    digest = f"{hashlib.sha256(payload.getvalue()).hexdigest()}:{len(payload.getvalue())}"
    header = {
        "format": bundle.FORMAT,
        "context": "here",
        "digest": digest,
        "signature": SIGNED.sign(digest, "here"),
    }
    return json.dumps(header).encode() + b"\n" + payload.getvalue()


def entry(
    name: str, kind: bytes = tarfile.REGTYPE, link: str = ""
) -> Callable[[tarfile.TarFile], None]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, 4 if kind == tarfile.REGTYPE else 0
    return lambda archive: archive.addfile(info, io.BytesIO(b"evil"))


def test_a_folder_comes_back_as_it_was(folder: Path, empty: Path) -> None:
    bundle.unpack(io.BytesIO(packed(folder)), empty, SIGNED, "here")
    assert contents(empty) == FILES
    assert bundle.content_digest(empty) == bundle.content_digest(folder)


def test_contents_alone_decide_the_bytes(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    for name in reversed(FILES):
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_bytes(FILES[name])
        os.utime(other / name, (1, 1))
        (other / name).chmod(0o755)
    assert packed(other) == packed(folder)
    (other / "ab" / "kernel.so").write_bytes(b"other code")
    assert bundle.content_digest(other) != bundle.content_digest(folder)


def test_what_belongs_to_a_process_stays_out(folder: Path) -> None:
    before = packed(folder)
    # Triton's folder holds its makers' paths, and Inductor's records hold the kernels.
    for name in ("locks/a.lock", "ab/.12.34.tmp", "triton/0/X/kernel.cubin", "x.lock"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "link").symlink_to("/etc/passwd")
    (folder / "linked").symlink_to("/etc")
    assert packed(folder) == before


def test_an_empty_folder_has_no_digest(empty: Path) -> None:
    (empty / "locks").mkdir()
    assert bundle.content_digest(empty) == ""


@pytest.mark.parametrize(
    "add",
    [
        entry("../evil"),
        entry("ab/../../evil"),
        entry("/tmp/evil"),
        entry("evil", tarfile.SYMTYPE, "/etc/passwd"),
        entry("evil", tarfile.LNKTYPE, "ab/kernel.so"),
        entry("evil", tarfile.FIFOTYPE),
        entry("evil", tarfile.CHRTYPE),
        entry("evil", tarfile.DIRTYPE),
        entry("."),
    ],
    ids=[
        "parent",
        "inner-parent",
        "absolute",
        "symlink",
        "hard-link",
        "fifo",
        "device",
        "folder",
        "itself",
    ],
)
def test_even_a_signed_bundle_stays_in_its_folder(
    empty: Path, add: Callable[[tarfile.TarFile], None]
) -> None:
    def good_then_evil(archive: tarfile.TarFile) -> None:
        entry("good")(archive)
        add(archive)

    with pytest.raises(Untrusted, match="its entry"):
        bundle.unpack(io.BytesIO(forged(good_then_evil)), empty, SIGNED, "here")
    assert not any(empty.iterdir()) and not (empty.parent / "evil").exists()


@pytest.mark.parametrize("trust", [SIGNED, Trust("owner")], ids=["signed", "owner"])
@pytest.mark.parametrize(
    "harm",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: content[:200] + bytes([content[200] ^ 64]) + content[201:],
        lambda content: content.split(b"\n", 1)[1],
        lambda content: b"",
        lambda content: b'["preheat-bundle-1"]\n' + content,
        lambda content: b'{"format": "preheat-bundle-1"}\n' + content,
    ],
    ids=["truncated", "last-bit", "header-bit", "no-header", "empty", "list", "incomplete"],
)
def test_damage_is_seen_before_anything_is_unpacked(
    folder: Path, empty: Path, harm: Callable[[bytes], bytes], trust: Trust
) -> None:
    with pytest.raises(Untrusted):
        bundle.unpack(io.BytesIO(harm(packed(folder, trust))), empty, trust, "here")
    assert not any(empty.iterdir())


def test_signed_with_another_key_for_another_purpose_or_not_at_all(
    folder: Path, empty: Path
) -> None:
    for content in (
        packed(folder, Trust("signed", b"another key of 16")),
        packed(folder, context="there"),
        packed(folder, context="there").replace(b'"there"', b'"here"', 1),
        packed(folder, Trust("owner")),
    ):
        with pytest.raises(Untrusted):
            bundle.unpack(io.BytesIO(content), empty, SIGNED, "here")
    assert not any(empty.iterdir())


class Endless(io.BytesIO):
    """A file that grows for ever, as others can make theirs; tells how much of it was read."""

    num_read = 0

    def read(self, size: int | None = -1, /) -> bytes:
        assert size is not None and size >= 0, "all that there is"
        block = super().read(size)
        block += bytes(size - len(block))
        self.num_read += len(block)
        return block


@pytest.mark.parametrize(
    "signature",
    ["", "0" * 64, "\ud800", Trust("signed", b"another key of 16").sign("0" * 64 + ":9", "here")],
)
def test_nothing_of_an_unsigned_payload_is_read(empty: Path, signature: str) -> None:
    header = {
        "format": bundle.FORMAT,
        "context": "here",
        "digest": "0" * 64 + ":9",
        "signature": signature,
    }
    source = Endless(json.dumps(header).encode() + b"\n")
    with pytest.raises(Untrusted):
        bundle.unpack(source, empty, SIGNED, "here")
    assert source.num_read == 0


@pytest.mark.parametrize("trust", [SIGNED, Trust("owner")], ids=["signed", "owner"])
def test_of_a_file_that_grows_no_more_is_read_than_was_signed(
    folder: Path, empty: Path, trust: Trust
) -> None:
    content = packed(folder, trust)
    source = Endless(content)
    with pytest.raises(Untrusted, match="its contents are not"):
        bundle.unpack(source, empty, trust, "here")
    assert source.num_read == len(content) - content.index(b"\n")  # a byte more than the payload


HEADERS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@pytest.mark.parametrize("trust", [SIGNED, Trust("owner")], ids=["signed", "owner"])
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(b"[" * 4096)
@example(b'{"format":' * 1000)
@given(
    st.binary()
    | HEADERS.map(lambda header: json.dumps(header).encode())
    | st.fixed_dictionaries(
        {
            "format": st.just(bundle.FORMAT),
            "context": st.just("here"),
            "digest": st.from_regex(r"[0-9a-f]{64}:-?[0-9\u0660-\u0669]{0,30}", fullmatch=True)
            | st.text(),
            "signature": st.text(st.characters()),
        }
    ).map(lambda header: json.dumps(header).encode() + b"\nnothing")
)
def test_whatever_a_header_says_it_is_refused(empty: Path, trust: Trust, content: bytes) -> None:
    with pytest.raises(Untrusted):
        bundle.unpack(io.BytesIO(content), empty, trust, "here")
