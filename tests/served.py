"""A warm server as the end-to-end tests see it."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass
from typing import Any

import psutil

from preheat import server
from preheat.client import Client

CONFIG = server.ROOT / "model-config" / "tiny-sdxl.yaml"
CACHE = server.ROOT / ".preheat" / "cache" / "inductor"


@dataclass(frozen=True)
class Served:
    """A warm server with a client for its only model."""

    running: server.TorchServe
    client: Client

    def management(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.running.management}{path}", timeout=60) as answer:
            return json.load(answer)

    def workers(self) -> list[dict[str, Any]]:
        (model,) = self.management(f"/models/{self.client.model}")
        workers: list[dict[str, Any]] = model["workers"]
        return workers

    def worker_pids(self) -> list[int]:
        pids = sorted(worker["pid"] for worker in self.workers())
        assert all(psutil.pid_exists(pid) for pid in pids)
        return pids

    def state(self) -> dict[str, Any]:
        (model,) = self.management(f"/models/{self.client.model}?customized=true")
        state: dict[str, Any] = model["customizedMetadata"]["preheat"]
        return state
