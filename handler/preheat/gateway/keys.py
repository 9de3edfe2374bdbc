"""API keys: who may ask, and for how much a minute.

The file holds hashes alone. A key has 256 random bits, so that one SHA-256 without salt is as hard
to go back on as the key is to guess.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from preheat.errors import GatewayError, QuotaSpent
from preheat.files import write_whole

logger = logging.getLogger(__name__)

PREFIX = "preheat-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", re.ASCII)
_FIELDS = {"name", "sha256", "requests_per_minute", "pixel_steps_per_minute"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """What a key may have in a minute; None: as much as there is."""

    requests_per_minute: float | None = None
    pixel_steps_per_minute: float | None = None
    """Pixels of the bucket x denoising steps x pictures."""


@dataclass(slots=True)
class _Budget:
    """Refills evenly, up to a minute's worth. What is larger than that waits until it is full, and
    then owes the rest."""

    per_minute: float
    left: float
    at: float

    def refill(self, now: float) -> None:
        self.left = min(self.per_minute, self.left + (now - self.at) * self.per_minute / 60)
        self.at = now

    def seconds_until(self, amount: float) -> float:
        missing = min(amount, self.per_minute) - self.left
        return max(0.0, 60 * missing / self.per_minute)


class Client:
    """Who has a key."""

    def __init__(self, name: str, quota: Quota, clock: Callable[[], float]) -> None:
        self.name, self.quota, self._clock = name, quota, clock
        limits = {"requests": quota.requests_per_minute}
        limits["pixel-steps"] = quota.pixel_steps_per_minute
        self._budgets = {
            unit: _Budget(limit, limit, clock()) for unit, limit in limits.items() if limit
        }

    def spend(self, pixel_steps: float) -> None:
        """A request of so much; all of it or none.

        Raises:
            QuotaSpent: there is not so much left.
        """
        amounts, now = {"requests": 1.0, "pixel-steps": pixel_steps}, self._clock()
        for unit, budget in self._budgets.items():
            budget.refill(now)
            if (wait := budget.seconds_until(amounts[unit])) > 0:
                message = f"this key may have {budget.per_minute:g} {unit} a minute"
                raise QuotaSpent(message, wait)
        for unit, budget in self._budgets.items():
            budget.left -= amounts[unit]


class Keys:
    """The keys in a file, which is read again when it has changed: a line taken out is a key
    withdrawn.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._clients: dict[str, Client] = {}
        self._seen = self._stamp()
        self._load()

    def find(self, key: str) -> Client | None:
        """Whose key it is."""
        if (stamp := self._stamp()) != self._seen:
            self._seen = stamp
            try:
                self._load()
            except GatewayError as error:
                logger.error("%s: the keys as they were before stay valid", error)
        return self._clients.get(_hash(key))

    def _stamp(self) -> tuple[int, int, int]:
        try:
            found = self._path.stat()
        except OSError:
            return 0, 0, 0
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _load(self) -> None:
        known = {(each.name, each.quota): each for each in self._clients.values()}
        self._clients = {
            digest: known.get((name, quota)) or Client(name, quota, self._clock)
            for name, digest, quota in read(self._path)
        }


def create(path: Path, name: str, quota: Quota) -> str:
    """A new key for `name`, whose hash is added to the file; it is nowhere else.

    Raises:
        GatewayError: the name is taken or none, or the file cannot be read or written.
    """
    if not _NAME.fullmatch(name):
        raise GatewayError(f"a name of letters, digits, . _ @ and - is wanted, got {name!r}")
    own = {"requests_per_minute": quota.requests_per_minute}
    own["pixel_steps_per_minute"] = quota.pixel_steps_per_minute
    if wrong := [field for field, value in own.items() if value is not None and not value > 0]:
        raise GatewayError(f"{wrong[0]} must be more than 0")
    rows = _rows(path) if path.exists() else []
    if name in [row.get("name") for row in rows]:
        raise GatewayError(f"{path} has a key of {name!r} already; take its line out first")
    key = PREFIX + secrets.token_urlsafe(32)
    given = {field: value for field, value in own.items() if value is not None}
    _write(path, [*rows, {"name": name, "sha256": _hash(key), **given}])
    return key


def read(path: Path) -> list[tuple[str, str, Quota]]:
    """Name, hash and quota of each key in the file.

    Raises:
        GatewayError: it cannot be read, or holds something else.
    """
    found = []
    for number, row in enumerate(_rows(path), 1):
        name, digest = row.get("name"), row.get("sha256")
        where = f"{path}, line {number}"
        if unknown := row.keys() - _FIELDS:
            raise GatewayError(f"{where}: {min(unknown)} is no field of a key")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise GatewayError(f"{where}: name must be letters, digits, . _ @ and -")
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise GatewayError(f"{where}: sha256 must be 64 digits from 0 to f")
        limits = [_limit(row, f"{unit}_per_minute", where) for unit in ("requests", "pixel_steps")]
        quota = Quota(requests_per_minute=limits[0], pixel_steps_per_minute=limits[1])
        found.append((name, digest, quota))
    for what, each in (("name", [row[0] for row in found]), ("key", [row[1] for row in found])):
        if len({*each}) < len(each):
            raise GatewayError(f"{path}: a {what} stands there twice")
    return found


def _limit(row: Mapping[str, object], field: str, where: str) -> float | None:
    value = row.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise GatewayError(f"{where}: {field} must be a number above 0")
    return float(value)


def _rows(path: Path) -> list[dict[str, object]]:
    """The file's lines, a JSON object each."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise GatewayError(f"cannot read the keys in {path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise GatewayError(f"{path}, line {number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise GatewayError(f"{path}, line {number} is no object")
        rows.append(row)
    return rows


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    """Replaced at once, and for its owner's eyes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_whole(path, text.encode(), f".{path.name}.")
    except OSError as error:
        raise GatewayError(f"cannot write {path}: {error.strerror}") from error


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def bearer(headers: Mapping[str, str]) -> str | None:
    """The key in a request's headers, whose names are in lower case."""
    kind, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" and key.strip() else None
