"""Folders that belong to one process, on this machine's disk. They go with it, or with the next
start where it was killed.

A folder holds a file that its owner keeps locked with flock(2), of which the kernel lets go however
the owner ends. TorchServe ends workers with SIGKILL, so nothing that runs at exit can be relied on.
"""

from __future__ import annotations

import atexit
import fcntl
import glob
import os
import platform
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path

_LOCK = "owner.lock"
_NEWBORN_SECONDS = 60.0
_SILENT_SECONDS = 86400.0


def own_folder(kind: str) -> Path:
    """A new, empty folder for this process alone among the temporary files (TMPDIR); those of dead
    owners are removed on the way.

    Never on a share: its other users have other names and locks that may not be seen here.

    Raises:
        OSError: nothing can be written there.
    """
    parent = Path(tempfile.gettempdir())
    _remove_orphans(parent, kind)
    folder = Path(tempfile.mkdtemp(prefix=_prefix(kind), dir=parent))
    # Held, never released. Compile workers are spawned and do not inherit it.
    with suppress(OSError):  # a file system without locks: age tells
        _lock(folder / _LOCK, os.O_CREAT)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _prefix(kind: str) -> str:
    """What this machine's folders begin with, and no other's: `@` ends the name, so that `gpu` does
    not begin `gpu-2`.
    """
    return f"preheat-{kind}-{platform.node() or 'localhost'}@"


def _lock(path: Path, flags: int = 0) -> int:
    # For writing: NFS refuses an exclusive lock otherwise (flock(2)).
    descriptor = os.open(
        path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags, 0o600
    )
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_orphans(parent: Path, kind: str) -> None:
    for path in parent.glob(f"preheat-{glob.escape(kind)}-*"):
        with suppress(OSError):
            _remove_orphan(path, here=path.name.startswith(_prefix(kind)))


def _remove_orphan(path: Path, here: bool) -> None:
    """Remove the folder unless its owner may need it. After warm-up nothing in it is read again.

    Raises:
        BlockingIOError: its owner lives.
    """
    status = path.lstat()
    silent = time.time() - status.st_ctime
    # A folder is locked right after it is made; give that moment time.
    if (
        not stat.S_ISDIR(status.st_mode)
        or status.st_uid != os.geteuid()
        or silent < _NEWBORN_SECONDS
    ):
        return
    descriptor = -1
    try:
        descriptor = _lock(path / _LOCK)
    except BlockingIOError:
        raise
    except OSError:  # no lock, or a file system that knows none
        here = False
    # Another machine's lock may not be seen on a network file system. But nobody warms up for a day
    # in silence.
    if here or silent >= _SILENT_SECONDS:
        shutil.rmtree(path, ignore_errors=True)
    if descriptor >= 0:
        os.close(descriptor)
