"""The shared compile cache: the first worker compiles, every later one loads what it made.

Each worker has an Inductor folder of its own. Around compile and warm-up,
`synchronized_inductor_cache` fills it from the shared bundle or, where there is none, elects one
worker that compiles and publishes while the others wait. What it has compiled so far it puts aside
now and then, for who takes over should it be killed. Whatever goes wrong with the share costs a
warning and a compile, never a request.

    cache = SharedCache(Path("/mnt/cache"), Trust.resolve())
    with synchronized_inductor_cache("sdxl/v1", cache):
        compile_and_warm_up()
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import BaseFileLock

from preheat.cache import bundle
from preheat.cache.fingerprint import fingerprint
from preheat.cache.scratch import own_folder
from preheat.cache.store import NothingPublished, NotShared, Share
from preheat.cache.trust import Trust, keep_to_us
from preheat.errors import Untrusted

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
_COMPILING_PER_KEEPING = 10
"""Packing takes time, and is done at most so often that compiling has this many times as much."""

CacheOutcome = Literal["loaded", "published", "unchanged", "unshared"]


@dataclass(frozen=True, slots=True)
class SharedCache:
    """A shared folder and what its bundles must fit.

    Args:
        folder: `pt2.cache.shared`.
        trust: which bundles are believed.
        fingerprint: of machine, versions, compile config and model structure; default: of machine
            and versions alone.
        device: where the compiled code runs.
        max_bytes: of all bundles in the folder.
    """

    folder: Path
    trust: Trust
    fingerprint: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    max_bytes: int = 10_000_000_000

    def share(self, key: str) -> Share:
        """The place of the bundle `key`. Inductor's code is for one GPU index, and on a CPU for one
        number of threads.
        """
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
        outcome: `loaded`: a bundle was found, and nothing could be added to it. `published`: this
            worker compiled, and others need not. `unchanged`: nothing was compiled, so there was
            nothing to share. `unshared`: see `reason`.
        waited_seconds: until the bundle was there, or it was clear that this worker has to compile.
        digest: of the bundle that was loaded, the whole one; empty where there was none.
    """

    folder: Path
    outcome: CacheOutcome = "unshared"
    reason: str = ""
    waited_seconds: float = 0.0
    digest: str = ""
    _part: Share | None = None
    _next_keeping: float = 0.0

    def withhold(self, reason: str) -> None:
        """What was compiled is not for others."""
        self.reason = reason

    def keep(self) -> None:
        """Put aside what was compiled so far, if this worker compiles for the others: whoever takes
        over from it begins there.
        """
        began = time.monotonic()
        if self._part is None or began < self._next_keeping or not any(bundle.members(self.folder)):
            return
        try:
            self._part.publish(self.folder)
        except (OSError, NotShared) as error:  # what lasts until the end is a warning then
            logger.info(
                "cannot put aside what was compiled so far in %s: %s", self._part.path, _text(error)
            )
            self._part = None
        now = time.monotonic()
        self._next_keeping = now + _COMPILING_PER_KEEPING * (now - began)

    def document(self) -> dict[str, Any]:
        return {
            "outcome": self.outcome,
            "reason": self.reason,
            "waited_seconds": self.waited_seconds,
        }


@contextmanager
def synchronized_inductor_cache(
    key: str,
    cache: SharedCache,
    *,
    timeout: float = 600.0,
    report: Callable[[str], None] = logger.info,
) -> Iterator[CacheUse]:
    """Run the block, which compiles and warms up, with what other workers have compiled; share what
    it adds, if it succeeds.

    Without a usable bundle one worker runs the block while the others wait up to `timeout`
    seconds, telling `report`, and then load. Only what the block raises is raised. The process
    keeps an Inductor folder of its own afterwards.
    """
    local, share, began = own_inductor_folder(), cache.share(key), time.monotonic()
    use = CacheUse(local)
    lock: BaseFileLock | None = None
    try:
        share.prepare()
        use.digest, lock = _load_or_lead(share, local, timeout, report)
    except (OSError, Untrusted, NotShared) as error:
        use.withhold(_text(error))
        level = logging.INFO if isinstance(error, NothingPublished) else logging.WARNING
        logger.log(
            level, "no shared compile cache in %s: %s; compiling alone", cache.folder, use.reason
        )
    use.waited_seconds = round(time.monotonic() - began, 3)
    if not use.digest:
        _load(share.part, local)
    if lock is not None:
        use._part = share.part
    try:
        yield use
        if use.reason:
            logger.info("the shared compile cache gets nothing from this worker: %s", use.reason)
        else:
            use.outcome, use.reason = _sync(share, local, use.digest, lock)
    finally:
        if lock is not None:
            _resign(share, lock)


def load_inductor_cache(key: str, cache: SharedCache) -> str:
    """Give this process an Inductor folder of its own, filled from the shared bundle; returns the
    digest of its contents.

    The digest is empty where there was no bundle, or none that could be used (with a warning).
    Waits for nobody.
    """
    local = own_inductor_folder()
    return _load(cache.share(key), local)


def sync_inductor_cache(key: str, digest: str, cache: SharedCache) -> bool:
    """Publish this process's Inductor folder, if it holds something else than `digest` (from
    `load_inductor_cache`) says.

    Call it after a successful warm-up only. Tells whether a bundle was published; what went wrong
    is a warning.
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
    """Make an empty folder for Inductor and Triton that no other process uses; see
    `scratch.own_folder`.

    Inductor reads the variable each time, so it may have compiled before. Where
    TORCHINDUCTOR_CACHE_DIR pointed does not matter: others may share it.

    Raises:
        OSError: nothing can be written among the temporary files.
    """
    folder = own_folder("inductor")
    os.environ[_FOLDER] = str(folder)
    # Triton's default has the GPU's number in it.
    os.environ[_TRITON_FOLDER] = str(folder / "triton")
    return folder


def writable_inductor_folder() -> Path | None:
    """See to it that Inductor can write to its folder and finds nothing there that others have put:
    what it reads, it runs. Gives the folder, or None where it will be gone with this process.

    A folder that TORCHINDUCTOR_CACHE_DIR names is believed as it is. Inductor's default has a name
    that anybody can make first. Where the folder cannot be used, this process gets one of its own,
    with a warning.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folder = Path(os.environ.get(_FOLDER) or default_cache_dir())
    try:
        if not os.environ.get(_FOLDER):
            keep_to_us(folder)
        _try_writing(folder)
        return folder
    except (OSError, Untrusted) as error:
        own = own_inductor_folder()
        logger.warning(
            "cannot compile in %s: %s; compiling in %s, for this start alone",
            folder,
            _text(error),
            own,
        )
        return None


def _try_writing(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(2**16))  # a full disk still makes empty files


@contextmanager
def without_headers_if_warmed(context: str) -> Iterator[None]:
    """Compile and warm up in here: where the Inductor folder holds all of `context`, no C++ header
    is precompiled.

    That header (75 MB; 5 s on two cores) halves the time of every compile that follows. But
    Inductor makes it even to load what is compiled already, and keeps it outside its folder
    (`CppCodeCache.load_async` in torch/_inductor/codecache.py of 2.13). A mark in the folder, which
    travels in the bundle, says that `context` was warmed from it.
    """
    from torch._inductor.codecache import CppPythonBindingsCodeCache as Kernels
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    refuse_foreign_headers()
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


def refuse_foreign_headers() -> None:
    """Precompiled headers lie in Inductor's default folder whatever TORCHINDUCTOR_CACHE_DIR says,
    and go into all that is built.
    """
    from torch._inductor import codecache

    folder = Path(codecache._HEADER_DIR)
    try:
        keep_to_us(folder.parent)
    except (OSError, Untrusted) as error:
        logger.warning("no precompiled header is taken from %s: %s", folder, _text(error))
        codecache._HEADER_DIR = str(own_folder("headers"))
        codecache._HEADER_LOCK_DIR = str(Path(codecache._HEADER_DIR) / "locks")


def _load_or_lead(
    share: Share, local: Path, timeout: float, report: Callable[[str], None]
) -> tuple[str, BaseFileLock | None]:
    """The digest of what was loaded, or the held lock of the one who is to compile.

    Raises:
        NotShared, OSError: neither; compile alone, side by side with the others.
    """
    before = share.stamp()
    digest = _load(share, local)
    if digest:
        return digest, None
    lock, waited = share.lock(timeout, report)
    try:
        if share.stamp() != before:  # not what was refused a moment ago
            digest = _load(share, local)
        if not digest:
            # A writer that was killed leaves its mark, and somebody takes over. One that ended in
            # order takes it away; if it could not publish neither could we, and one after the other
            # would be the slowest way to find out.
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
    """The digest of what was loaded; empty if nothing was, with a warning if it has a reason."""
    began = time.monotonic()
    try:
        if not share.load(local):
            return ""
        digest = bundle.content_digest(local)
    except Untrusted as error:
        logger.warning("refused the compile cache %s: %s; compiling instead", share.path, error)
        return ""
    except OSError as error:
        logger.warning(
            "cannot read the compile cache %s: %s; compiling instead", share.path, _text(error)
        )
        return ""
    logger.info("loaded the compile cache %s in %.1f s", share.path, time.monotonic() - began)
    return digest


def _sync(
    share: Share, local: Path, digest: str, lock: BaseFileLock | None
) -> tuple[CacheOutcome, str]:
    """Publish what is in `local` unless it is what `digest` says. Without the lock, and while
    another writes, leave it to them.
    """
    own: BaseFileLock | None = None
    try:
        now = bundle.content_digest(local)
        if now == digest:
            return ("loaded" if digest else "unchanged"), ""
        if lock is None:
            own, _ = share.lock()
        share.publish(local)
        share.part.remove()
    except (OSError, NotShared) as error:
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
    return (
        f"{error.strerror} ({error.filename})"
        if isinstance(error, OSError) and error.filename
        else str(error)
    )
