"""Which compiled files may be run. They are read with pickle and as shared libraries: whoever wrote
one runs code here.

`signed`: the file carries an HMAC-SHA256 made with a key that only the workers and the builder
hold. `owner`: the file and its folder belong to our uid and nobody else can write to them. A
signature covers what the file is for as well (its `context`, such as a fingerprint), so that a
genuine file cannot be passed off as another.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from preheat.config.pt2 import TrustMode
from preheat.errors import ConfigError, Untrusted

KEY_VARIABLE = "PREHEAT_CACHE_KEY"
KEY_FILE_VARIABLE = "PREHEAT_CACHE_KEY_FILE"
MIN_KEY_BYTES = 16
SIGNATURE_SUFFIX = ".sig"

_DOMAIN = b"preheat-signature-1"
_LONGEST_SIGNATURE = 128


@dataclass(frozen=True, slots=True)
class Trust:
    """The rule by which files are believed, and the key that signs them. Files are signed whenever
    there is a key.
    """

    mode: TrustMode
    key: bytes | None = field(default=None, repr=False)

    @classmethod
    def resolve(
        cls, asked: TrustMode | None = None, environ: Mapping[str, str] = os.environ
    ) -> Trust:
        """The rule that `pt2.cache.trust` and the environment mean; by default `signed` where there
        is a key, else `owner`.

        Raises:
            ConfigError: `signed` without a key, or a key that cannot be used. Going on without
                would believe anybody.
        """
        key = _read_key(environ)
        if asked == "signed" and key is None:
            raise ConfigError(
                f"signed needs a key: set {KEY_FILE_VARIABLE} or {KEY_VARIABLE}", "pt2.cache.trust"
            )
        return cls(asked or ("owner" if key is None else "signed"), key)

    def sign(self, digest: str, context: str) -> str:
        """The signature of contents with this SHA-256 `digest`, for this purpose; empty where there
        is no key.
        """
        if self.key is None:
            return ""
        message = b"\0".join((_DOMAIN, context.encode(), digest.encode()))
        return hmac.new(self.key, message, hashlib.sha256).hexdigest()

    def check(self, signature: str, digest: str, context: str) -> None:
        """Nothing, if contents with this digest may be run for this purpose. In `owner` mode `open`
        has already decided.

        Raises:
            Untrusted: unsigned, altered, signed with another key or for another purpose.
        """
        if self.mode == "owner":
            return
        if not signature:
            raise Untrusted("it is not signed")
        if not hmac.compare_digest(signature.encode(), self.sign(digest, context).encode()):
            raise Untrusted(
                "its signature is wrong: altered, or made with another key or for another purpose"
            )

    def open(self, path: Path) -> BinaryIO:
        """The regular file at `path`, open for reading. In `owner` mode it and its folder are ours
        alone to write.

        What is checked is what was opened: a file that is swapped afterwards changes nothing.

        Raises:
            Untrusted: a link, a device, somebody else's, or writable by others.
            OSError: it cannot be read.
        """
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                # O_NONBLOCK: opening a FIFO that somebody put there must not wait for a writer.
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                file = os.fdopen(os.open(path.name, flags, dir_fd=folder), "rb")
            except OSError as error:
                if path.is_symlink():
                    raise Untrusted("it is a symbolic link") from error
                raise
            try:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise Untrusted("it is not a regular file")
                if self.mode == "owner":
                    _refuse_foreign("it", os.fstat(file.fileno()))
                    _refuse_foreign("its folder", os.fstat(folder))
            except BaseException:
                file.close()
                raise
            return file
        finally:
            os.close(folder)

    def check_folder(self, folder: Path) -> None:
        """Nothing, if files in `folder` could be believed; in `signed` mode anybody may write
        there.

        Raises:
            Untrusted: `owner` mode, and it is not ours alone to write.
            OSError: it is not there.
        """
        if self.mode == "owner":
            _refuse_foreign("the folder", folder.stat())

    def sign_file(self, path: Path, context: str) -> None:
        """Write the signature of the file at `path` beside it, as `<name>.sig`; nothing where there
        is no key.
        """
        if self.key is None:
            return
        with path.open("rb") as file:
            digest = digest_of(file)
        path.with_name(path.name + SIGNATURE_SUFFIX).write_text(
            self.sign(digest, context) + "\n", encoding="ascii"
        )

    def read_file(self, path: Path, context: str) -> bytes:
        """What is in the file at `path`, if it may be run for this purpose; the signature is in
        `<name>.sig` beside it.

        Use the bytes, not the path: between check and use, somebody may change what lies there.

        Raises:
            Untrusted: it may not.
            OSError: it cannot be read.
        """
        with self.open(path) as file:
            content = file.read()
        self.check(self._read_signature(path), hashlib.sha256(content).hexdigest(), context)
        return content

    def _read_signature(self, path: Path) -> str:
        if self.mode == "owner":
            return ""
        try:
            with self.open(path.with_name(path.name + SIGNATURE_SUFFIX)) as file:
                return file.read(_LONGEST_SIGNATURE).decode("ascii", "replace").strip()
        except FileNotFoundError:
            return ""


def digest_of(file: BinaryIO) -> str:
    """SHA-256 of what is left to read in `file`, as hex."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def keep_to_us(folder: Path) -> None:
    """Nothing, if `folder` is ours alone to write; where it is not there, it is made so.

    Raises:
        Untrusted: somebody else made it, or others can write to it.
        OSError: it cannot be made.
    """
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise Untrusted("it is no folder")
    _refuse_foreign("it", status)


def _refuse_foreign(what: str, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise Untrusted(f"{what} belongs to uid {status.st_uid}, and we are {os.geteuid()}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Untrusted(f"{what} can be written by others (mode {stat.S_IMODE(status.st_mode):o})")


def _read_key(environ: Mapping[str, str]) -> bytes | None:
    """The key from the file or the environment. An empty one is a mistake, no wish to have none."""
    file, text = environ.get(KEY_FILE_VARIABLE), environ.get(KEY_VARIABLE)
    if file is not None:
        source = f"{KEY_FILE_VARIABLE} ({file})"
        try:
            key = Path(file).read_bytes().strip()
        except OSError as error:
            raise ConfigError(
                f"cannot read the key in {source}: {error.strerror}", "pt2.cache.trust"
            ) from error
    elif text is not None:
        source, key = KEY_VARIABLE, text.encode().strip()
    else:
        return None
    if len(key) < MIN_KEY_BYTES:
        raise ConfigError(
            f"the key in {source} has {len(key)} bytes and needs {MIN_KEY_BYTES}: openssl rand "
            "-hex 32",
            "pt2.cache.trust",
        )
    return key
