from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

CACHE = Path(__file__).resolve().parents[2] / ".preheat" / "cache" / "inductor-gpu"


@pytest.fixture(scope="session", autouse=True)
def kept_compiles() -> Iterator[None]:
    """What Inductor makes lies where it outlives the run: a cold one compiles for minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(CACHE))
        yield
