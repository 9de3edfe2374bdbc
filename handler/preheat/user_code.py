"""Python that an archive brings along: `pt2.import`, a module's factory, TorchServe's model file.
Loaded from the archive alone.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from preheat.errors import ConfigError

INSTALL = "install"
"""A function of this name in an imported file is called with every target before it is compiled."""
_PREHEAT = ("preheat", "preheat_handler")
# marks what was loaded here, which another archive's file of that name may replace
_ARCHIVE = "__preheat_archive__"


def load_files(names: Sequence[str], folder: Path, path: str = "pt2.import") -> list[ModuleType]:
    """Run the files `names`, relative to `folder`, once each per process; a file is imported under
    its stem.

    Raises:
        ConfigError: there is no such file inside the folder, or it would stand in for another
            module. What a file raises itself is raised as it is.
    """
    return [load_file(name, folder, f"{path}[{index}]") for index, name in enumerate(names)]


def load_file(name: str, folder: Path, path: str) -> ModuleType:
    """Run one file; see `load_files`."""
    root, file = folder.resolve(), (folder / name).resolve()
    if not file.is_file() or not file.is_relative_to(root):
        raise ConfigError(f"the archive holds no file {name!r}", path)
    known = sys.modules.get(file.stem)
    if known is not None:
        if getattr(known, "__file__", None) == str(file):
            return known
        if not hasattr(known, _ARCHIVE):
            raise ConfigError(
                f"{name!r} would hide the module {file.stem}; give the file another name", path
            )
    make_importable(root)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    setattr(module, _ARCHIVE, str(root))
    # first, as import does: the file may be imported by another one of the archive
    sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[file.stem]
        raise
    return module


def make_importable(folder: Path) -> None:
    """Files of the archive may import each other. TorchServe's workers have its folder on their
    path; other programs not.
    """
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()


def imported_from(folder: Path) -> dict[str, str]:
    """SHA-256 of the archive's files that have been imported so far, by their place in it: compiled
    code depends on them.

    Preheat's own, which an archive may hold too, are known by their version.
    """
    root = folder.resolve()
    own = {
        name: module
        for name, module in sys.modules.items()
        if name.partition(".")[0] not in _PREHEAT
    }
    files = {Path(file) for module in own.values() if (file := getattr(module, "__file__", None))}
    # torch.classes says that its file is "_classes.py", which is nowhere.
    inside = sorted(
        place
        for file in files
        if file.is_absolute() and (place := file.resolve()).is_relative_to(root)
    )
    return {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in inside
    }


@contextmanager
def left_out(name: str) -> Iterator[None]:
    """Importing the module `name` inside raises ImportError, unless it has been imported before."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # as the import system documents it
    try:
        yield
    finally:
        del sys.modules[name]
