"""Packages made by AOTInductor when the archive is built: planned from real calls, exported,
compiled, and loaded without Dynamo.

One package serves one target in one bucket at every batch size that was seen. It holds code and no
weights: it is given the loaded module's own. A package is run only if the index that names it may
be trusted, was made for this fingerprint, and holds its digest; what it computes is compared with
eager before it serves (`closeness.mismatch`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from preheat.cache.scratch import own_folder
from preheat.cache.trust import Trust
from preheat.compilation.backends.base import EngineName, Precompiled
from preheat.compilation.closeness import mismatch
from preheat.compilation.export import call_key, export, own_forward, tensors
from preheat.compilation.router import Router
from preheat.compilation.signatures import DynamicDims, Inputs, tensor_shapes
from preheat.compilation.watch import eagerly
from preheat.errors import Untrusted

logger = logging.getLogger(__name__)

FOLDER = "aot"
INDEX = "index.json"
FORMAT = 1
CONTEXT = "aot-index"


@dataclass(frozen=True, slots=True)
class Entry:
    """A package as the index describes it."""

    file: str
    sha256: str
    num_bytes: int
    target: str
    buckets: tuple[str, ...]
    key: str
    """The signature that it serves, dynamic sizes made equal; see `signatures.signature`."""
    ranges: Mapping[str, Mapping[int, tuple[int, int]]]

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Entry:
        ranges = {
            path: {int(dim): (least, most) for dim, (least, most) in spans.items()}
            for path, spans in data["ranges"].items()
        }
        return cls(**{**data, "buckets": tuple(data["buckets"]), "ranges": ranges})

    @property
    def dims(self) -> DynamicDims:
        return DynamicDims(self.ranges, least=1)


@dataclass(frozen=True, slots=True)
class PackageSpec:
    """A package to be made: calls that one graph can serve, represented by the largest of them."""

    inputs: Inputs
    dims: DynamicDims

    @property
    def key(self) -> str:
        return call_key(*self.inputs, self.dims)


class Package:
    """A loaded package with the weights of the module that it stands for."""

    engine: EngineName = "aot"
    is_compared = True

    def __init__(
        self, entry: Entry, content: bytes, module: nn.Module, device: torch.device
    ) -> None:
        self.name, self.dims, self._key = entry.file, entry.dims, entry.key
        self._loader = _load(content, device)
        self._returns = pytree.treespec_loads(self._loader.get_call_spec()[1])
        # not copied, so kept alive here
        self._constants = _constants(module, self._loader.get_constant_fqns())
        self.use_constants()

    def use_constants(self) -> None:
        """Compute with the tensors in `_constants` from now on."""
        # active ones, all of them, user-managed
        self._loader.load_constants(self._constants, False, True, True)

    def matches(self, inputs: Inputs) -> bool:
        return call_key(*inputs, self.dims) == self._key

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # The flattened tensors in the order of the export: the signature that was matched holds it.
        outputs = self._loader.boxed_run(list(tensors(args, kwargs)))
        return pytree.tree_unflatten(outputs, self._returns)


def _load(content: bytes, device: torch.device) -> Any:
    """What `torch._inductor.aoti_load_package` gives, less what that costs: it imports the compiler
    and runs g++ to learn which instructions the CPU has, a second that the fingerprint has made
    needless, and none of it works without a compiler.
    """
    index = -1 if device.index is None else device.index
    with (
        _unpacking_in(_unpacked()) as folder,
        tempfile.NamedTemporaryFile(suffix=".pt2", dir=folder) as file,
    ):
        file.write(content)
        file.flush()
        # One runner, on one thread: otherwise each call waits on the GPU for the call before it.
        return torch._C._aoti.AOTIModelPackageLoader(file.name, "model", True, 1, index)


@cache
def _unpacked() -> Path:
    """Where this process's packages lie unpacked; CUDA kernels are read from there at their first
    launch.
    """
    return own_folder("aot")


@contextmanager
def _unpacking_in(folder: Path) -> Iterator[Path]:
    """The loader unpacks to TMPDIR and removes it when it is destroyed, which a worker that is
    killed never comes to.
    """
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(folder)
    try:
        yield folder
    finally:
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before


def attach(
    routers: Mapping[str, Router],
    modules: Mapping[str, nn.Module],
    folder: Path,
    fingerprint: str,
    trust: Trust,
    device: torch.device,
) -> None:
    """Load the packages in `folder` into the routers of their targets. What cannot be used is
    logged, and the router told why.
    """
    try:
        entries = _read_index(folder, fingerprint, trust)
    except (OSError, Untrusted, ValueError, LookupError, TypeError) as error:
        for router in routers.values():
            router.prefer(Precompiled("aot", reason=f"aot: {_described(error)}"))
        logger.error("aot: no package is used: %s", _described(error))
        return
    for name, router in routers.items():
        packages, reason = [], None
        for entry in (entry for entry in entries if entry.target == name):
            try:
                packages.append(Package(entry, _read(folder, entry, trust), modules[name], device))
            except (OSError, Untrusted, RuntimeError, LookupError) as error:
                reason = f"aot: {entry.file}: {_described(error)}"
                logger.error("aot: %s is not used: %s", entry.file, _described(error))
        if packages or reason:
            dims = DynamicDims(packages[0].dims.ranges) if packages else None
            router.prefer(Precompiled("aot", packages, reason, dims))
        logger.info("aot: %d package(s) for %s", len(packages), name)


def specs(examples: Sequence[Inputs]) -> list[PackageSpec]:
    """The packages that serve these calls of one target: one for all that differ in the batch
    alone.
    """
    families: dict[str, list[Inputs]] = {}
    for inputs in examples:
        families.setdefault(_kind(*inputs), []).append(inputs)
    found = []
    for family in families.values():
        shapes = [tensor_shapes(*inputs) for inputs in family]
        dims = DynamicDims(DynamicDims.varying(shapes).ranges, least=1)
        largest = max(family, key=lambda inputs: sum(leaf.numel() for leaf in tensors(*inputs)))
        if _one_dimension(dims, shapes):
            found.append(PackageSpec(largest, dims))
        else:  # sizes that vary independently are beyond one `Dim`: a package each
            found += [PackageSpec(inputs, DynamicDims()) for inputs in family]
    return found


def build(
    module: nn.Module, made: PackageSpec, path: Path, compile_kwargs: Mapping[str, Any]
) -> None:
    """Export and compile one package of `module` to `path`."""
    # the compiler, which a worker on packages never imports
    from torch._inductor import config as inductor_config

    exported = export(module, made.inputs, made.dims)
    # torch 2.8 leaves what it notes there, and with it another key for every later compile.
    noted = inductor_config.patch({"aot_inductor.metadata": {}})
    with torch.no_grad(), eagerly(), noted:
        torch._inductor.aoti_compile_and_package(
            exported, package_path=str(path), inductor_configs=_options(compile_kwargs)
        )


def check(
    module: nn.Module, made: PackageSpec, path: Path, entry: Entry, device: torch.device
) -> None:
    """Load a package that was just built, and run it on the call that it was made for.

    Raises:
        LookupError, RuntimeError: a worker could not use it.
    """
    package = Package(entry, path.read_bytes(), module, device)
    args, kwargs = made.inputs
    with torch.inference_mode():
        result = package(*args, **kwargs)
        with eagerly(), own_forward(module):
            why = mismatch(result, module(*args, **kwargs), package.name)
    if why is not None:
        raise RuntimeError(why)


def describe(path: Path, target: str, buckets: Sequence[str], made: PackageSpec) -> Entry:
    """The index entry of a package that was just made."""
    content = path.read_bytes()
    return Entry(
        file=path.name,
        sha256=hashlib.sha256(content).hexdigest(),
        num_bytes=len(content),
        target=target,
        buckets=tuple(buckets),
        key=made.key,
        ranges=made.dims.ranges,
    )


def write_index(folder: Path, fingerprint: str, entries: Sequence[Entry], trust: Trust) -> None:
    """Name the packages in `folder`, and sign: the index holds their digests, so its signature
    covers them.
    """
    document = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "torch": torch.__version__,
        "packages": [asdict(entry) for entry in entries],
    }
    (folder / INDEX).write_text(json.dumps(document, indent=1), encoding="utf-8")
    trust.sign_file(folder / INDEX, CONTEXT)
    folder.chmod(0o755)  # whatever the umask: others' write permission would make it refused
    for file in folder.iterdir():
        file.chmod(0o644)


def _read_index(folder: Path, fingerprint: str, trust: Trust) -> list[Entry]:
    """What `folder` offers a worker with this fingerprint.

    Raises:
        Untrusted: the index may not be believed, or was made for something else.
        OSError, ValueError, LookupError, TypeError: there is none that can be read.
    """
    document = json.loads(trust.read_file(folder / INDEX, CONTEXT))
    if document["format"] != FORMAT:
        raise Untrusted(f"the index has format {document['format']}, this version reads {FORMAT}")
    if document["fingerprint"] != fingerprint:
        raise Untrusted(
            f"built for fingerprint {document['fingerprint'][:12]} (torch {document['torch']}), "
            f"this worker has {fingerprint[:12]} (torch {torch.__version__}): another machine, "
            "version or config"
        )
    return [Entry.parse(entry) for entry in document["packages"]]


def _read(folder: Path, entry: Entry, trust: Trust) -> bytes:
    """The bytes that the index means, and no others: what is loaded is what was checked."""
    if Path(entry.file).name != entry.file:
        raise Untrusted(f"{entry.file!r} leaves the folder")
    with trust.open(folder / entry.file) as file:
        content = file.read()
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise Untrusted("it is not the file that the index names: altered or truncated")
    return content


def _described(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"no file {Path(str(error.filename)).name}; was the archive built with --aot?"
    return (
        str(error) if isinstance(error, Untrusted) else f"{type(error).__name__}: {error}".strip()
    )


def _kind(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """What calls must have in common to share a package: everything but the batch size."""
    first = {
        path: {0: (0, shape[0])} for path, shape in tensor_shapes(args, kwargs).items() if shape
    }
    return call_key(args, kwargs, DynamicDims(first, least=0))


def _one_dimension(dims: DynamicDims, shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> bool:
    """Whether all that varies is one and the same number."""
    sizes = {
        tuple(each[path][dim] for each in shapes)
        for path, spans in dims.ranges.items()
        for dim in spans
    }
    return len(sizes) <= 1


def _options(compile_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's settings for a package: those of `pt2.compile`, and the weights left out of it."""
    options: dict[str, Any] = dict(
        torch._inductor.list_mode_options(compile_kwargs.get("mode") or "default")
    )
    options |= dict(compile_kwargs.get("options") or {})
    options.pop("triton.cudagraphs", None)  # AOTInductor records none
    return options | {
        # the environment can ask for it too (TORCHINDUCTOR_FREEZING), and no package holds weights
        "freezing": False,
        "aot_inductor.package_constants_in_so": False,
        # else weights of eight numbers or fewer are written into the code
        "always_keep_tensor_constants": True,
        "cpp.dynamic_threads": True,  # the worker's number of threads, not the builder's
    }


def _constants(module: nn.Module, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The module's own weights and buffers under the package's names, not copied.

    Raises:
        LookupError: the package wants a constant that the module has not.
    """
    every: Callable[..., Any] = module.named_parameters
    own = dict(every(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    missing = [name for name in names if name not in own]
    if missing:
        raise LookupError(f"it wants constants that the module has not: {', '.join(missing[:3])}")
    return {name: own[name].detach() for name in names}
