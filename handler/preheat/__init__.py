"""Preheat: serve torch.compiled diffusers pipelines that are hot before the first request."""

from __future__ import annotations

__version__ = "0.1.0"
