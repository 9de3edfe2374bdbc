"""The shared compile cache: the first worker compiles, every later one loads what it made.

Each worker has an Inductor folder of its own. Around compile and warm-up, `synchronized_inductor_cache` fills it from the shared
bundle or, where there is none, elects one worker that compiles and publishes while the others wait. Whatever goes wrong with the
share costs a warning and a compile, never a request.

    cache = SharedCache(Path("/mnt/cache"), Trust.resolve())
    with synchronized_inductor_cache("sdxl/v1", cache):
        compile_and_warm_up()
"""

from __future__ import annotations

import atexit
import fcntl
import glob
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import BaseFileLock

from preheat import bundle
from preheat.errors import Untrusted
from preheat.fingerprint import fingerprint
from preheat.share import GaveUp, NothingPublished, Share
from preheat.trust import Trust

__all__ = [
    "CacheUse",
    "SharedCache",
    "fingerprint",
    "load_inductor_cache",
    "own_inductor_folder",
    "sync_inductor_cache",
    "synchronized_inductor_cache",
    "without_headers_if_warmed",
    "writable_inductor_folder",
]

logger = logging.getLogger(__name__)

_FOLDER, _TRITON_FOLDER = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"
_PREFIX = "preheat-inductor-"
_NEWBORN_SECONDS = 60.0

Outcome = Literal["loaded", "published", "unchanged", "unshared"]


@dataclass(frozen=True, slots=True)
class SharedCache:
    """A shared folder and what its bundles must fit.

    Args:
        folder: `pt2.cache.shared`.
        trust: which bundles are believed.
        fingerprint: of machine, versions, compile config and model structure; default: of machine and versions alone.
        device: where the compiled code runs.
        max_bytes: of all bundles in the folder.
    """

    folder: Path
    trust: Trust
    fingerprint: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    max_bytes: int = 10_000_000_000

    def share(self, key: str) -> Share:
        """The place of the bundle `key`. Inductor's code is for one GPU index, and on a CPU for one number of threads."""
        context = {
            "kind": "inductor",
            "key": key,
            "fingerprint": self.fingerprint or fingerprint(self.device, {}, {}),
            "device": str(self.device),
            "threads": torch.get_num_threads() if self.device.type == "cpu" else 0,
        }
        return Share(self.folder, json.dumps(context, sort_keys=True), self.trust, self.max_bytes)


@dataclass(slots=True)
class CacheUse:
    """What became of sharing, for the log and the state.

    Args:
        folder: this process's Inductor folder.
        outcome: `loaded`: a bundle was found, and nothing could be added to it. `published`: this worker compiled, and others need
            not. `unchanged`: nothing was compiled, so there was nothing to share. `unshared`: see `reason`.
        waited_seconds: until the bundle was there, or it was clear that this worker has to compile.
    """

    folder: Path
    outcome: Outcome = "unshared"
    reason: str = ""
    waited_seconds: float = 0.0

    def withhold(self, reason: str) -> None:
        """Warm-up was no success: what it compiled is not for others."""
        self.reason = reason

    def document(self) -> dict[str, Any]:
        return {"outcome": self.outcome, "reason": self.reason, "waited_seconds": self.waited_seconds}


@contextmanager
def synchronized_inductor_cache(
    key: str, cache: SharedCache, *, patience: float = 600.0, report: Callable[[str], None] = logger.info
) -> Iterator[CacheUse]:
    """Run the block, which compiles and warms up, with what other workers have compiled; share what it adds, if it succeeds.

    Without a usable bundle one worker runs the block while the others wait up to `patience` seconds, telling `report`, and then
    load. Only what the block raises is raised. The process keeps an Inductor folder of its own afterwards.
    """
    local, share, began = own_inductor_folder(), cache.share(key), time.monotonic()
    use = CacheUse(local)
    lock: BaseFileLock | None = None
    digest = ""
    try:
        share.prepare()
        digest, lock = _load_or_lead(share, local, patience, report)
    except (OSError, Untrusted, GaveUp) as error:
        use.withhold(_text(error))
        level = logging.INFO if isinstance(error, NothingPublished) else logging.WARNING
        logger.log(level, "no shared compile cache in %s: %s; compiling alone", cache.folder, use.reason)
    use.waited_seconds = round(time.monotonic() - began, 3)
    try:
        yield use
        if use.reason:
            logger.info("the shared compile cache gets nothing from this worker: %s", use.reason)
        else:
            use.outcome, use.reason = _sync(share, local, digest, lock)
    finally:
        if lock is not None:
            _resign(share, lock)


def load_inductor_cache(key: str, cache: SharedCache) -> str:
    """Give this process an Inductor folder of its own, filled from the shared bundle; returns the digest of its contents.

    The digest is empty where there was no bundle, or none that could be used (with a warning). Waits for nobody.
    """
    local = own_inductor_folder()
    return _load(cache.share(key), local)


def sync_inductor_cache(key: str, digest: str, cache: SharedCache) -> bool:
    """Publish this process's Inductor folder, if it holds something else than `digest` (from `load_inductor_cache`) says.

    Call it after a successful warm-up only. Tells whether a bundle was published; what went wrong is a warning.
    """
    share = cache.share(key)
    try:
        share.prepare()
    except (OSError, Untrusted) as error:
        logger.warning("no shared compile cache in %s: %s", cache.folder, _text(error))
        return False
    outcome, _ = _sync(share, Path(os.environ[_FOLDER]), digest, None)
    return outcome == "published"


def own_inductor_folder() -> Path:
    """Make an empty folder for Inductor and Triton that no other process uses; gone when this process ends.

    Inductor reads the variable each time, so it may have compiled before; TORCHINDUCTOR_CACHE_DIR, where it was set, names
    the parent; where that cannot be written, with a warning, the folder of temporary files is. Folders of this machine's workers
    that were killed are removed on the way.

    Raises:
        OSError: nothing can be written there either.
    """
    parent = Path(os.environ.get(_FOLDER) or tempfile.gettempdir())
    if parent.name.startswith(_PREFIX):
        parent = parent.parent  # a second start in the same process
    try:
        folder = _new_folder(parent)
    except OSError as error:
        elsewhere = Path(tempfile.gettempdir())
        logger.warning("cannot compile in %s: %s; compiling in %s", parent, _text(error), elsewhere)
        folder = _new_folder(elsewhere)
    os.environ[_FOLDER] = str(folder)
    # Triton's default has the GPU's number in it, and the same contents would get another digest on each GPU.
    os.environ[_TRITON_FOLDER] = str(folder / "triton")
    return folder


def writable_inductor_folder() -> None:
    """See to it that Inductor can write: where TORCHINDUCTOR_CACHE_DIR cannot be, this process gets a folder of its own."""
    named = os.environ.get(_FOLDER)
    if named:
        try:
            _try_writing(Path(named))
        except OSError:
            own_inductor_folder()


def _new_folder(parent: Path) -> Path:
    _try_writing(parent)
    _remove_orphans(parent)
    folder = Path(tempfile.mkdtemp(prefix=_of_this_machine(), dir=parent))
    with suppress(OSError):  # a file system without locks: then nobody takes the folder for an orphan either
        # Held, never released: it says that the folder's owner lives. Compile workers are spawned and do not inherit it.
        fcntl.flock(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), fcntl.LOCK_EX)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _try_writing(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(2**16))  # a full disk still makes empty files


def _of_this_machine() -> str:
    """What its folders' names begin with: on a shared parent, locks of other machines may not be seen."""
    return f"{_PREFIX}{platform.node() or 'localhost'}-"


@contextmanager
def without_headers_if_warmed(context: str) -> Iterator[None]:
    """Compile and warm up in here: where the Inductor folder holds all of `context`, no C++ header is precompiled.

    That header (75 MB; 5 s on two cores) halves the time of every compile that follows. But Inductor makes it even to load what
    is compiled already, and keeps it outside its folder (`CppCodeCache.load_async` in torch/_inductor/codecache.py of 2.13). A
    mark in the folder, which travels in the bundle, says that `context` was warmed from it.
    """
    from torch._inductor.codecache import CppPythonBindingsCodeCache as Kernels
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    digest = hashlib.sha256(f"{context}, {torch.get_num_threads()} threads".encode()).hexdigest()
    mark = Path(cache_dir()) / f"preheat-warmed-{digest[:32]}"
    if mark.exists() and "_get_uncompiled_header" in vars(Kernels):
        named = vars(Kernels)["_get_uncompiled_header"]
        Kernels._get_uncompiled_header = classmethod(lambda cls, device: None)  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            Kernels._get_uncompiled_header = named  # type: ignore[method-assign]
    else:
        yield
    with suppress(OSError):  # the next start makes the header once more
        mark.touch()


def _remove_orphans(parent: Path) -> None:
    for path in parent.glob(f"{glob.escape(_of_this_machine())}*"):
        with suppress(OSError):
            # A folder is locked right after it is made; give that moment time.
            if path.is_symlink() or time.time() - path.lstat().st_ctime < _NEWBORN_SECONDS:
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _load_or_lead(
    share: Share, local: Path, patience: float, report: Callable[[str], None]
) -> tuple[str, BaseFileLock | None]:
    """The digest of what was loaded, or the held lock of the one who is to compile.

    Raises:
        GaveUp, OSError: neither; compile alone, side by side with the others.
    """
    before = share.stamp()
    digest = _load(share, local)
    if digest:
        return digest, None
    lock, waited = share.lock(patience, report)
    try:
        if share.stamp() != before:  # not what was refused a moment ago
            digest = _load(share, local)
        if not digest:
            # A writer that was killed leaves its mark, and somebody takes over. One that ended in order takes it away; if it
            # could not publish neither could we, and one after the other would be the slowest way to find out.
            if waited and not share.marked:
                raise NothingPublished("the worker that was waited for has ended without a bundle")
            share.mark()
            return "", lock
    except BaseException:
        lock.release()
        raise
    lock.release()
    return digest, None


def _load(share: Share, local: Path) -> str:
    """The digest of what was loaded; empty, with a warning where there is a reason, if nothing was."""
    began = time.monotonic()
    try:
        if not share.load(local):
            return ""
        digest = bundle.content_digest(local)
    except Untrusted as error:
        logger.warning("refused the compile cache %s: %s; compiling instead", share.path, error)
        return ""
    except OSError as error:
        logger.warning("cannot read the compile cache %s: %s; compiling instead", share.path, _text(error))
        return ""
    logger.info("loaded the compile cache %s in %.1f s", share.path, time.monotonic() - began)
    return digest


def _sync(share: Share, local: Path, digest: str, lock: BaseFileLock | None) -> tuple[Outcome, str]:
    """Publish what is in `local` unless it is what `digest` says. Without the lock, and while another writes, leave it to them."""
    own: BaseFileLock | None = None
    try:
        now = bundle.content_digest(local)
        if now == digest:
            return ("loaded" if digest else "unchanged"), ""
        if lock is None:
            own, _ = share.lock()
        share.publish(local)
    except (OSError, GaveUp) as error:
        logger.warning("cannot publish the compile cache %s: %s", share.path, _text(error))
        return ("loaded" if digest else "unshared"), _text(error)
    finally:
        if own is not None:
            own.release()
    logger.info("published the compile cache %s", share.path)
    return "published", ""


def _resign(share: Share, lock: BaseFileLock) -> None:
    share.unmark()
    with suppress(OSError):
        lock.release()


def _text(error: Exception) -> str:
    return f"{error.strerror} ({error.filename})" if isinstance(error, OSError) and error.filename else str(error)
