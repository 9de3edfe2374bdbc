from __future__ import annotations

from collections.abc import Iterator

import pytest

from fake_host import FakeHost, listening
from preheat.gateway.app import create_app
from preheat.gateway.torchserve import Places, TorchServeBackend


@pytest.fixture(scope="session")
def _hosted() -> Iterator[tuple[FakeHost, str, str]]:
    """A fake TorchServe, its URL, and that of a gateway before it."""
    host = FakeHost()
    with listening(host.app()) as url:
        places = Places(inference=url, management=url, metrics=url)
        with listening(create_app(TorchServeBackend(places), max_body_bytes=100_000)) as gateway:
            yield host, url, gateway


@pytest.fixture
def host(_hosted: tuple[FakeHost, str, str]) -> FakeHost:
    """As new."""
    host = _hosted[0]
    host.__init__()  # type: ignore[misc]  # the server holds its methods
    return host


@pytest.fixture
def gateway(_hosted: tuple[FakeHost, str, str]) -> str:
    """The gateway's URL."""
    return _hosted[2]
