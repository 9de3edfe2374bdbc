"""TorchServe's tokens, out of the key_file.json that it writes: read anew when the file changes,
and renewed before they end.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from time import time
from typing import Literal

import httpx

from preheat.errors import in_one_line

logger = logging.getLogger(__name__)
Kind = Literal["inference", "management"]
MARGIN = 30.0
"""Seconds before its end at which a token is renewed."""
TIMEOUT = 5.0
"""Seconds that TorchServe has for it, and from one try to the next: everybody waits for it."""


class Tokens:
    """Args:
    key_file: TorchServe's; None where it wants no tokens. It need not be there yet.
    management: URL of the API that renews them.
    clock: seconds since the epoch.
    """

    def __init__(
        self,
        key_file: Path | None,
        management: str,
        http: httpx.AsyncClient,
        clock: Callable[[], float] = time,
    ) -> None:
        self._file, self._management, self._http, self._clock = key_file, management, http, clock
        self._renewing = asyncio.Lock()
        self._tried: dict[Kind, float] = {}

    @property
    def wanted(self) -> bool:
        return self._file is not None and self._file.exists()

    async def get(self, kind: Kind) -> str | None:
        """The token for an API as it stands in the file; None where none is wanted.

        The file is small and read each time: TorchServe, and others who renew, replace it.
        """
        if not self.wanted:
            return None
        entry = self._entry(kind)
        if self._is_due(kind, entry):
            async with self._renewing:
                entry = self._entry(kind)  # somebody else may have been here
                if self._is_due(kind, entry):
                    await self._renew(kind)
                    self._tried[kind] = self._clock()
                    entry = self._entry(kind)
        return entry.get("key")

    async def header(self, kind: Kind) -> dict[str, str]:
        token = await self.get(kind)
        return {"authorization": f"Bearer {token}"} if token else {}

    def _entry(self, kind: str) -> Mapping[str, str]:
        assert self._file is not None
        try:
            entry = json.loads(self._file.read_bytes())[kind]
            return {str(name): str(value) for name, value in entry.items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            logger.warning("%s holds no %s token: %s", self._file, kind, error)
            return {}

    def _is_due(self, kind: Kind, entry: Mapping[str, str]) -> bool:
        again = self._tried.get(kind, float("-inf")) + TIMEOUT
        return self._left(entry) < MARGIN and self._clock() >= again

    def _left(self, entry: Mapping[str, str]) -> float:
        """Seconds until it ends; what says nothing of an end has none."""
        text = entry.get("expiration time", "")[:19]  # UTC; digits and a Z follow
        if not text:
            return float("inf")
        ends = datetime.fromisoformat(text).replace(tzinfo=timezone.utc)
        return ends.timestamp() - self._clock()

    async def _renew(self, kind: Kind) -> None:
        """TorchServe writes the new token to the file; its API key, which renews, never ends.

        Where that fails the old one goes on: it may not have ended yet.
        """
        try:
            response = await self._http.get(
                f"{self._management}/token",
                params={"type": kind},
                headers={"authorization": f"Bearer {self._entry('API').get('key')}"},
                timeout=TIMEOUT,
            )
        except httpx.TransportError as error:
            logger.warning("no %s token is renewed: %s", kind, in_one_line(error) or repr(error))
            return
        if response.is_error:
            logger.warning("TorchServe renews no %s token: %s", kind, response.text.strip())
        else:
            logger.info("renewed the %s token", kind)
