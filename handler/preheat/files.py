"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, content: bytes, prefix: str | None = None) -> None:
    """Replace the file at `path`, for its owner alone to read: who opens it finds the old content
    or the new, and a failure leaves nothing behind.

    Args:
        prefix: of the name that it has until then, beside `path`, and that ends in `.tmp`.

    Raises:
        OSError: it cannot be written.
    """
    descriptor, scratch = tempfile.mkstemp(".tmp", prefix, path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(scratch, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(scratch)
        raise
