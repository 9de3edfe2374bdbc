"""A folder of compiled files as one file: a line of JSON that says what it is and who vouches for
it, then a gzipped tar.

The same contents give the same payload, whatever the names of folders, the clock or the user.
Nothing of the payload is read before its size and digest are known to be the signer's, and nothing
looked at before it has them; even then only regular files inside the folder are unpacked.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO

from preheat.cache.trust import Trust, digest_of
from preheat.errors import Untrusted

FORMAT = "preheat-bundle-2"
_LONGEST_HEADER = 4096
_DIGEST = re.compile(r"[0-9a-f]{64}:[0-9]{1,18}")
"""SHA-256 and size of the payload."""
_BLOCK = 1 << 20


def members(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files of an Inductor folder that are worth keeping, by name in the bundle, sorted.

    Locks and half-written files belong to the processes that made them; links lead who knows where.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if name.parts[0] == "triton":
            # Inductor's own records hold the kernels, and bring them back only where there is no
            # folder of theirs; Triton's files hold the absolute paths of the one who made them
            # (torch/_inductor/triton_bundler.py).
            continue
        if path.is_symlink() or not path.is_file() or any(_is_passing(part) for part in name.parts):
            continue
        yield name.as_posix(), path


def _is_passing(part: str) -> bool:
    # Inductor writes `.<pid>.<thread>.tmp` and renames; Triton works in folders
    # `tmp.pid_<pid>_<uuid>`.
    return part == "locks" or part.endswith((".lock", ".tmp")) or part.startswith("tmp.pid_")


def content_digest(folder: Path) -> str:
    """SHA-256 of names and contents; empty for a folder that holds nothing to keep."""
    digest, num_files = hashlib.sha256(), 0
    for name, path in members(folder):
        with path.open("rb") as file:
            digest.update(f"{name}\0{digest_of(file)}\n".encode())
        num_files += 1
    return digest.hexdigest() if num_files else ""


def pack(folder: Path, target: BinaryIO, trust: Trust, context: str) -> None:
    """Write the bundle of `folder`, signed for `context`, to `target`.

    Raises:
        OSError: a file cannot be read, or the disk is full.
    """
    with tempfile.TemporaryFile(dir=folder.parent) as payload:
        # Level 1: shared objects shrink to a third, and the next level costs more time than a
        # network share gives back.
        with (
            gzip.GzipFile("", "wb", compresslevel=1, fileobj=payload, mtime=0) as zipped,
            tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for name, path in members(folder):
                _add(archive, name, path)
        size = payload.tell()
        payload.seek(0)
        digest = f"{digest_of(payload)}:{size}"
        header = {
            "format": FORMAT,
            "context": context,
            "digest": digest,
            "signature": trust.sign(digest, context),
        }
        target.write(json.dumps(header).encode() + b"\n")
        payload.seek(0)
        shutil.copyfileobj(payload, target, _BLOCK)


def _add(archive: tarfile.TarFile, name: str, path: Path) -> None:
    info = tarfile.TarInfo(name)
    with path.open("rb") as file:
        info.size, info.mode = path.stat().st_size, 0o600
        archive.addfile(info, file)


def unpack(source: BinaryIO, folder: Path, trust: Trust, context: str) -> None:
    """Unpack the bundle in `source` into the empty `folder`, if it may be run for `context`;
    otherwise leave that empty.

    Raises:
        Untrusted: it may not, or is no whole bundle.
        OSError: it cannot be read, or the disk is full.
    """
    header = _read_header(source)
    if header["context"] != context:
        raise Untrusted("it was made for another machine, version, model or key")
    trust.check(header["signature"], header["digest"], context)
    digest, _, size = header["digest"].partition(":")
    with tempfile.TemporaryFile(dir=folder.parent) as payload:
        # A copy of our own: what is unpacked is what was checked, whatever happens to the shared
        # file meanwhile.
        _copy(source, payload, int(size))
        payload.seek(0)
        if digest_of(payload) != digest:
            raise Untrusted("it is damaged: its contents have another digest than it says")
        payload.seek(0)
        try:
            _extract(payload, folder)
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            _empty(folder)
            raise Untrusted(f"it is no bundle: {error}") from error
        except BaseException:
            _empty(folder)
            raise


def _read_header(source: BinaryIO) -> dict[str, str]:
    line = source.readline(_LONGEST_HEADER)
    try:
        header: Any = json.loads(line)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise Untrusted(f"it is no bundle of the format {FORMAT}")
    if not all(isinstance(header.get(name), str) for name in ("context", "digest", "signature")):
        raise Untrusted("its header is incomplete")
    if not _DIGEST.fullmatch(header["digest"]) or not header["signature"].isascii():
        raise Untrusted("its header holds no digest")
    return header


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    """Copy what is left of `source`, which has to be `size` bytes; not one more is written, for it
    may grow for ever.
    """
    left = size
    while block := source.read(min(_BLOCK, left)):
        target.write(block)
        left -= len(block)
    if left or source.read(1):
        raise Untrusted(f"it is damaged: its contents are not the {size} bytes that it says")


def _extract(payload: IO[bytes], folder: Path) -> None:
    with tarfile.open(fileobj=payload, mode="r:gz") as archive:
        for info in archive:
            name = PurePosixPath(info.name)
            content = archive.extractfile(info) if info.isreg() and not info.issparse() else None
            if content is None:
                raise Untrusted(f"its entry {info.name!r} is no regular file")
            if name.is_absolute() or ".." in name.parts or not name.parts or "\0" in info.name:
                raise Untrusted(f"its entry {info.name!r} leaves the folder")
            target = folder / name
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with content as reading, target.open("xb") as writing:
                shutil.copyfileobj(reading, writing, _BLOCK)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
