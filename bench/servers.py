"""A TorchServe for as long as a bench needs it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from bench.profiles import STATE, Profile
from preheat.torchserve import server
from preheat.torchserve.archive import build_archive


def external_archive(
    profile: Profile, config: Mapping[str, Any], model: Path, folder: Path
) -> Path:
    """Of the pipeline in `model`, which stays where it is, and a YAML that is given as data; both
    are written to `folder`.
    """
    path = folder / f"{profile.name}.yaml"
    path.write_text(yaml.safe_dump(dict(config), sort_keys=False))
    return build_archive(path, model, output=folder, archive_format="no-archive", external=True)


@contextmanager
def started(
    archive: Path, name: str, *, cache: Path, env: Mapping[str, str], seconds: float
) -> Iterator[tuple[server.TorchServe, float]]:
    """A server of that archive, READY, and the seconds it took to be so.

    Args:
        name: of its run folder; what an earlier run that was killed has left there is ended.
        cache: the folder where Inductor keeps what it compiled.
        env: goes over this process's environment.
        seconds: to get READY in.

    Raises:
        ServerError: it did not get READY in that time.
    """
    run_dir = STATE / "run" / name
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    left = server.recall(run_dir)
    if left is not None:
        left.stop()
    begun = time.monotonic()
    running = server.start([archive], run_dir, ports=server.Ports.free(), cache=cache, env=env)
    try:
        running.wait_ready(seconds)
        yield running, time.monotonic() - begun
    finally:
        running.stop()
