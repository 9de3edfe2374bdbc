"""The shared folder: one bundle per purpose, published whole or not at all, by one writer at a
time.

Everything here is files and locks, of this machine or of a network share; nothing knows what is in
a bundle. The lock is flock(2): the kernel lets go of it when its holder dies, however it dies. On
NFS that needs version 4, or lockd and a mount without `nolock` or `local_lock`; without, every
machine elects a writer of its own, which costs compiles and harms nothing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from preheat.cache import bundle
from preheat.cache.trust import Trust
from preheat.errors import Untrusted
from preheat.files import write_whole

logger = logging.getLogger(__name__)

SUFFIX = ".bundle"
_PARTIAL = f".partial{SUFFIX}"
# others may put there what they like; what is not named as ours is no business of ours
_STEM = "[0-9a-f]" * 32
_MARK = ".writer"
_LONGEST_MARK = 1000
_POLL_SECONDS = 0.2
_REPORT_SECONDS = 10.0


class NotShared(Exception):
    """Nothing is shared with this worker, or by it; the text says why."""


class NothingPublished(NotShared):
    """The worker that was waited for has ended without a bundle: it compiled nothing, or could not
    publish and said so.
    """


@dataclass(frozen=True, slots=True)
class Share:
    """One bundle's place in a shared folder.

    Args:
        folder: shared by workers, on this machine or a network.
        context: everything the compiled files depend on; names the bundle and is covered by its
            signature.
        trust: which bundles are believed.
        max_bytes: of all bundles in the folder.
        partial: see `part`.
    """

    folder: Path
    context: str
    trust: Trust
    max_bytes: int
    partial: bool = False

    @property
    def path(self) -> Path:
        return self._beside(_PARTIAL if self.partial else SUFFIX)

    @property
    def part(self) -> Share:
        """The place of a bundle that its writer has not finished, under the same lock. One is never
        taken for the other.
        """
        return replace(self, partial=True)

    def prepare(self) -> None:
        """Make the folder (not its parents: they are the mount), and see that what is put there
        would be believed.

        Raises:
            Untrusted: `owner` trust, and others can write to it.
            OSError: it is not there, or no folder.
        """
        if not self.folder.is_dir():
            self.folder.mkdir(mode=0o700 if self.trust.mode == "owner" else 0o777)
        self.trust.check_folder(self.folder)

    def load(self, into: Path) -> bool:
        """Unpack the bundle into the empty folder `into`; False where there is none.

        Raises:
            Untrusted: it is refused.
            OSError: the share or the local disk failed.
        """
        try:
            file = self.trust.open(self.path)
        except FileNotFoundError:
            return False
        with file:
            size = os.fstat(file.fileno()).st_size
            if size > self.max_bytes:
                raise Untrusted(
                    f"its {size} bytes are more than pt2.cache.max_bytes ({self.max_bytes})"
                )
            bundle.unpack(file, into, self.trust, self._purpose)
            with suppress(OSError):  # a share that is read-only here: others keep the record of use
                os.utime(file.fileno())
        return True

    def publish(self, folder: Path) -> None:
        """Replace the bundle by the files in `folder`. Hold the lock.

        A reader sees the old bundle or the new one; so does the next start after a power cut.

        Raises:
            OSError: it could not be written.
            NotShared: it is larger than the whole folder may be.
        """
        self._sweep()
        descriptor, name = tempfile.mkstemp(".tmp", f"{self._stem}.", self.folder)
        scratch = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                bundle.pack(folder, file, self.trust, self._purpose)
                os.fchmod(file.fileno(), 0o600 if self.trust.mode == "owner" else 0o644)
                file.flush()
                os.fsync(file.fileno())
                status = os.fstat(file.fileno())
            if status.st_size > self.max_bytes:
                raise NotShared(
                    f"its {status.st_size} bytes are more than pt2.cache.max_bytes "
                    f"({self.max_bytes})"
                )
            self._evict(self.max_bytes - status.st_size, now=status.st_mtime)
            scratch.replace(self.path)
        except BaseException:
            with suppress(OSError):
                scratch.unlink()
            raise
        _sync_folder(self.folder)

    def remove(self) -> None:
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    def stamp(self) -> tuple[int, ...] | None:
        """Tells one bundle at this place from the next; None while there is none."""
        try:
            status = self.path.lstat()
        except OSError:
            return None
        return status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns

    def lock(
        self, timeout: float = 0.0, report: Callable[[str], None] = lambda _: None
    ) -> tuple[BaseFileLock, bool]:
        """Become the writer: the held lock, and whether somebody else held it before.

        Waits up to `timeout` seconds; `report` is told now and then for whom.

        Raises:
            NotShared: it is still taken.
            OSError: the share has no locks, or is read-only.
        """
        # Signed bundles may be shared by several uids; whoever holds the lock for ever costs the
        # others `timeout`, no more.
        lock = FileLock(self._beside(".lock"), mode=0o600 if self.trust.mode == "owner" else 0o666)
        began, waited = time.monotonic(), False
        while True:
            left = timeout - (time.monotonic() - began)
            try:
                lock.acquire(
                    timeout=max(0.0, min(_REPORT_SECONDS, left)) if waited else 0,
                    poll_interval=_POLL_SECONDS,
                )
            except NotImplementedError as error:  # how older filelocks say that there is no flock
                raise OSError(errno.ENOLCK, "the share has no flock(2)") from error
            except Timeout:
                spent = time.monotonic() - began
                if left <= 0:
                    raise NotShared(
                        f"{self._writer()} still holds the lock after {spent:.0f} s"
                    ) from None
                if timeout:
                    report(
                        f"waiting for {self._writer()}, which compiles: {spent:.0f} s, at most "
                        f"{timeout:.0f} s"
                    )
                waited = True
                continue
            if type(lock) is not FileLock:  # filelock's stand-in outlives a killed holder
                lock.release()
                raise OSError(errno.ENOLCK, "the share has no flock(2)")
            return lock, waited

    def mark(self) -> None:
        """Say who writes. The mark of a writer that was killed stays, and so tells the next one to
        take over.

        Raises:
            OSError: not even this fits on the share.
        """
        said = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
        write_whole(self._beside(_MARK), said.encode(), f"{self._stem}.")

    def unmark(self) -> None:
        with suppress(OSError):
            self._beside(_MARK).unlink(missing_ok=True)

    @property
    def marked(self) -> bool:
        """Whether somebody writes, or was killed while writing."""
        return self._beside(_MARK).exists()

    @property
    def _purpose(self) -> str:
        return f"{self.context}, in part" if self.partial else self.context

    @property
    def _stem(self) -> str:
        return hashlib.sha256(self.context.encode()).hexdigest()[:32]

    def _beside(self, suffix: str) -> Path:
        return self.folder / (self._stem + suffix)

    def _writer(self) -> str:
        try:
            # Anybody may have put it there: not a link, not a pipe that is waited for, not a
            # gigabyte.
            descriptor = os.open(
                self._beside(_MARK), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            )
            with os.fdopen(descriptor, "rb") as file:
                mark = json.loads(file.read(_LONGEST_MARK))
            return f"pid {int(mark['pid'])} on {str(mark['host'])[:64]!r}"
        except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
            return "another worker"

    def _sweep(self) -> None:
        """Remove what killed writers left half-written. Whose lock is free has no writer; ours is
        with us.
        """
        for path in self.folder.glob(f"{_STEM}.*.tmp"):
            stem = path.name.partition(".")[0]
            with suppress(OSError, Timeout, NotImplementedError):
                if stem == self._stem:
                    path.unlink()
                else:
                    with FileLock(self.folder / f"{stem}.lock").acquire(timeout=0):
                        path.unlink()

    def _evict(self, room: int, now: float) -> None:
        """Remove other bundles, those unused for longest first, until the rest takes at most `room`
        bytes.

        `now` is the share's own clock. A bundle from the future was touched by a clock that runs
        ahead: it counts as used now, and is set back so that it can grow old.
        """
        found = []
        for path in (
            path for suffix in (SUFFIX, _PARTIAL) for path in self.folder.glob(_STEM + suffix)
        ):
            with suppress(OSError):
                status = path.lstat()
                if path != self.path:
                    found.append((min(status.st_mtime, now), status.st_size, path))
                if status.st_mtime > now:
                    os.utime(path, (now, now), follow_symlinks=False)
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= room:
                return
            with suppress(OSError):
                path.unlink()
                total -= size
                logger.info("evicted %s (%d bytes) from the shared compile cache", path.name, size)


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every network file system can
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
