"""Which kernels compute attention (`pt2.attention`), in warm-up and serving alike."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

_ATTENTION = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


@contextmanager
def attention_backend(name: str) -> Iterator[None]:
    """Restrict scaled_dot_product_attention to one backend (`pt2.attention`); `default` leaves the
    choice to torch.

    The choice is compiled in, but torch 2.13 leaves it out of the keys of its compile caches: what
    was compiled under another one would be found and run. Hence the tag.
    """
    if name == "default":
        yield
        return
    caches: Any = importlib.import_module("torch.compiler.config")
    with (
        sdpa_kernel(_ATTENTION[name]),
        caches.patch(cache_key_tag=f"{caches.cache_key_tag}attention-{name}"),
    ):
        yield
