"""Packages on a tiny module: exported, compiled, loaded, compared, and refused."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import old_folders
from masked_modules import EXAMPLES, pair
from preheat.cache.trust import Trust
from preheat.compilation.backends import aot
from preheat.compilation.backends.base import CompiledCode, Precompiled
from preheat.compilation.export import export
from preheat.compilation.router import Router
from preheat.compilation.signatures import DynamicDims, Inputs
from preheat.compilation.targets import build_router
from preheat.compilation.watch import CompileWatch, forbid_compiling
from preheat.config.model import ModelConfig
from preheat.config.pt2 import Pt2Config
from preheat.errors import AheadError, ConfigError
from preheat.worker.build_packages import build, rehearse
from preheat.worker.worker import AnyPrepared, load

CPU, OWNER = torch.device("cpu"), Trust("owner")
FINGERPRINT = "f" * 64
MOST_ROWS = 6


class Block(nn.Linear):
    """What repeats; with a forward of its own, since Dynamo skips those that live in torch.nn."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.relu(super().forward(input))


class Toy(nn.Module):
    """Called as a UNet is: positional and keyword tensors, a nested dict, constants, a tuple back;
    a bias of four numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.embed = Block(8, 512)
        self.down = nn.Linear(512, 4)
        self.register_buffer("shift", torch.ones(4), persistent=False)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        cond: dict[str, torch.Tensor] | None = None,
        mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> tuple[torch.Tensor]:
        assert cond is not None and mask is None and not return_dict
        shift = self.down(self.embed(text)) + self.shift + cond["size"] * timestep
        return (self.conv(sample) + shift[:, :, None, None],)


def inputs(rows: int, side: int = 8) -> Inputs:
    cond = {"size": torch.randn(rows, 4)}
    kwargs = {"text": torch.randn(rows, 8), "cond": cond, "mask": None, "return_dict": False}
    return (torch.randn(rows, 4, side, side), torch.tensor(0.5)), kwargs


def made(watch: CompileWatch | None, *, compile: bool = True, **pt2: Any) -> tuple[Toy, Router]:
    torch.manual_seed(0)
    module = Toy().eval()
    config = Pt2Config.model_validate(
        {"compile": {"enable": compile, "kwargs": {"backend": "eager"}}} | pt2
    )
    return module, build_router("toy", module, config, torch.float32, CPU)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the one package that serves a Toy with any number of rows up to MOST_ROWS,
    signed with nothing.
    """
    module, router = made(None)
    with torch.inference_mode(), router.observing(keep=True) as calls:
        for rows in (1, 2, MOST_ROWS):
            args, kwargs = inputs(rows)
            module(*args, **kwargs)
            module(*args, **kwargs)
    assert len(calls.examples) == 3, "one example a signature"
    (plan,) = aot.specs(list(calls.examples.values()))
    folder = tmp_path_factory.mktemp("archive") / aot.FOLDER
    folder.mkdir()
    aot.build(module, plan, folder / "toy.pt2", {})
    assert module.forward is router, "the router is put back"
    aot.write_index(
        folder, FINGERPRINT, [aot.describe(folder / "toy.pt2", "toy", ["64x64"], plan)], OWNER
    )
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(built, tmp_path / aot.FOLDER))


def attached(
    watch: CompileWatch,
    folder: Path,
    *,
    fingerprint: str = FINGERPRINT,
    trust: Trust = OWNER,
    **made_with: Any,
) -> tuple[Toy, Router]:
    module, router = made(watch, **({"export": {"aot_compile": True}} | made_with))
    aot.attach({"toy": router}, {"toy": module}, folder, fingerprint, trust, CPU)
    return module, router


def packages(router: Router) -> Sequence[CompiledCode]:
    """Those that serve the target, if any."""
    first = router.backends[0]
    return first.codes if isinstance(first, Precompiled) else ()


def warm(module: Toy, *rows: int) -> None:
    with torch.inference_mode():
        for number in rows:
            args, kwargs = inputs(number)
            module(*args, **kwargs)


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / aot.INDEX).read_text())
    change(document)
    (folder / aot.INDEX).write_text(json.dumps(document))


@pytest.mark.skipif(
    torch.__version__.startswith("2.8."),
    reason="the loader of torch 2.8 unpacks to /tmp, whatever TMPDIR says",
)
def test_packages_are_unpacked_where_a_later_start_sweeps(
    watch: CompileWatch, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = set(tmp_path.iterdir())
    aot.unpacked_folder.cache_clear()
    _, router = attached(watch, folder)
    (unpacked,) = set(tmp_path.iterdir()) - before
    aot.unpacked_folder.cache_clear()
    assert (
        packages(router)
        and unpacked.name.startswith("preheat-aot-")
        and any(unpacked.rglob("*.so"))
    )
    assert os.environ["TMPDIR"] == str(tmp_path)


def test_every_batch_size_equals_eager_and_nothing_is_compiled(
    watch: CompileWatch, folder: Path
) -> None:
    module, router = attached(watch, folder)
    eager, _ = made(watch, compile=False)
    warm(module, MOST_ROWS, 1)
    forbid_compiling()
    router.freeze()
    router.start_run()
    for rows in range(1, MOST_ROWS + 1):
        args, kwargs = inputs(rows)
        with torch.inference_mode():
            torch.testing.assert_close(module(*args, **kwargs), eager(*args, **kwargs))
    assert router.run.engines == {"aot"} and router.run.unwarmed == 0
    assert watch.num_events == 0
    warm(module, MOST_ROWS + 1)
    assert router.run.unwarmed == 1 and router.run.engines == {"aot", "eager"}


def test_the_weights_are_the_modules_own(watch: CompileWatch, folder: Path) -> None:
    module, router = attached(watch, folder)
    (package,) = packages(router)
    assert isinstance(package, aot.Package)
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    assert {name: tensor.data_ptr() for name, tensor in package.constants.items()} == {
        name: tensor.data_ptr() for name, tensor in own.items()
    }
    warm(module, 2)
    args, kwargs = inputs(2)
    with torch.inference_mode():
        before = module(*args, **kwargs)[0]
        # the bias of four numbers and the buffer too: nothing is written into the code
        for tensor in own.values():
            tensor.detach().mul_(2)
        after, expected = module(*args, **kwargs)[0], Toy.forward(module, *args, **kwargs)[0]
    torch.testing.assert_close(after, expected)
    assert (after - before).abs().max() > 0.1


def test_a_package_holds_no_weights(built: Path) -> None:
    weights = b"".join(tensor.numpy().tobytes() for tensor in made(None)[0].state_dict().values())
    content = (built / "toy.pt2").read_bytes()
    assert weights[:64] not in content and (built / aot.INDEX).stat().st_size < 4000


def other_fingerprint(folder: Path) -> None:
    edit_index(folder, lambda index: index.update(fingerprint="0" * 64, torch="1.0"))


def truncated(folder: Path) -> None:
    (folder / "toy.pt2").write_bytes((folder / "toy.pt2").read_bytes()[:-1])


def altered(folder: Path) -> None:
    content = bytearray((folder / "toy.pt2").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "toy.pt2").write_bytes(content)


def writable_by_others(folder: Path) -> None:
    (folder / "toy.pt2").chmod(0o666)


def linked(folder: Path) -> None:
    (folder / "toy.pt2").rename(folder / "real.pt2")
    (folder / "toy.pt2").symlink_to(folder / "real.pt2")


def leaving(folder: Path) -> None:
    edit_index(folder, lambda index: index["packages"][0].update(file="../aot/toy.pt2"))


def no_json(folder: Path) -> None:
    (folder / aot.INDEX).write_text("{")


def odd_json(folder: Path) -> None:
    (folder / aot.INDEX).write_text("[]")


def other_format(folder: Path) -> None:
    edit_index(folder, lambda index: index.update(format=0))


def no_library(folder: Path) -> None:
    """A genuine index over something that is no package."""
    (folder / "toy.pt2").write_bytes(b"PK nonsense")
    digest = hashlib.sha256(b"PK nonsense").hexdigest()
    edit_index(folder, lambda index: index["packages"][0].update(sha256=digest))


SPOILT: list[tuple[Callable[[Path], None], str]] = [
    (other_fingerprint, "fingerprint 000000000000 (torch 1.0)"),
    (truncated, "altered or truncated"),
    (altered, "altered or truncated"),
    (writable_by_others, "written by others"),
    (linked, "symbolic link"),
    (leaving, "leaves the folder"),
    (no_json, "JSONDecodeError"),
    (odd_json, "TypeError"),
    (other_format, "format 0"),
    (no_library, "toy.pt2"),
    (shutil.rmtree, "--aot"),
]


@pytest.mark.parametrize(("spoil", "words"), SPOILT, ids=[spoil.__name__ for spoil, _ in SPOILT])
@pytest.mark.parametrize("compile", [True, False], ids=["compiled", "eager"])
def test_what_cannot_be_used_falls_to_the_next_engine_and_says_why(
    watch: CompileWatch,
    folder: Path,
    spoil: Callable[[Path], None],
    words: str,
    compile: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spoil(folder)
    with caplog.at_level(logging.ERROR):
        module, router = attached(watch, folder, compile=compile)
    assert words in str(router.reason) and words in caplog.text
    warm(module, 2)
    if compile:
        (route,) = router.routes.values()
        assert route.engine == "compiled" and words in str(route.reason)
    else:
        assert router.idle
        router.freeze()
        router.start_run()
        warm(module, 2)
        assert router.run.fallbacks == 1 and router.run.engines == {"eager"}


def test_with_one_package_missing_there_is_something_to_compile_and_to_share(
    watch: CompileWatch, folder: Path
) -> None:
    _, router = attached(watch, folder)
    assert packages(router) and not router.compiles
    edit_index(
        folder, lambda index: index["packages"].append(index["packages"][0] | {"file": "gone.pt2"})
    )
    _, router = attached(watch, folder)
    assert packages(router) and "gone.pt2" in str(router.reason) and router.compiles


KEY, OTHER_KEY = b"k" * 16, b"o" * 16


@pytest.mark.parametrize(
    ("signed_with", "words"), [(KEY, None), (OTHER_KEY, "signature is wrong"), (None, "not signed")]
)
def test_an_index_counts_under_its_signature_alone(
    watch: CompileWatch, folder: Path, signed_with: bytes | None, words: str | None
) -> None:
    if signed_with:
        Trust("signed", signed_with).sign_file(folder / aot.INDEX, aot.CONTEXT)
    _, router = attached(watch, folder, trust=Trust("signed", KEY))
    assert len(packages(router)) == (words is None)
    assert (router.reason is None) if words is None else (words in str(router.reason))


def test_a_signed_index_that_is_changed_afterwards_is_refused(
    watch: CompileWatch, folder: Path
) -> None:
    Trust("signed", KEY).sign_file(folder / aot.INDEX, aot.CONTEXT)
    edit_index(folder, lambda index: index["packages"][0].update(sha256="0" * 64))
    _, router = attached(watch, folder, trust=Trust("signed", KEY))
    assert not packages(router) and "signature is wrong" in str(router.reason)


@pytest.mark.parametrize("compile", [True, False], ids=["compiled", "eager"])
def test_a_package_that_computes_something_else_is_found_out_before_it_serves(
    watch: CompileWatch, folder: Path, compile: bool, caplog: pytest.LogCaptureFixture
) -> None:
    module, router = attached(watch, folder, compile=compile)
    with torch.no_grad():  # one weight, a percent off, behind the package's back
        (package,) = packages(router)
        assert isinstance(package, aot.Package)
        package.constants["conv.weight"] = module.conv.weight.detach() * 1.01
        package.use_constants()
    with caplog.at_level(logging.ERROR):
        warm(module, 2, 3, 1)
    routes = list(router.routes.values())
    assert {route.engine for route in routes} == {"compiled" if compile else "eager"}
    assert all("differs from eager by 0.00" in str(route.reason) for route in routes)
    assert caplog.text.count("is not used") == 1
    forbid_compiling()
    router.freeze()
    router.start_run()
    warm(module, 2)
    assert "aot" not in router.run.engines


@pytest.mark.parametrize("scope", ["full", "regional"])
def test_torch_compile_is_called_only_when_something_falls_to_it(
    watch: CompileWatch, folder: Path, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It imports all of Inductor: more than half of what a start on packages would take."""
    calls: list[str] = []
    real = torch.compile

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append("torch.compile")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", counted)
    monkeypatch.setattr(Toy, "_repeated_blocks", ["Block"], raising=False)
    monkeypatch.setattr(
        Toy,
        "compile_repeated_blocks",
        lambda toy, **kwargs: toy.embed.compile(**kwargs),
        raising=False,
    )
    module, router = attached(watch, folder, scope=scope, export={"aot_compile": True})
    warm(module, 2, 1)
    assert (
        not calls
        and watch.num_events == 0
        and {route.engine for route in router.routes.values()} == {"aot"}
    )
    with torch.inference_mode():
        args, kwargs = inputs(2, side=16)
        result, expected = module(*args, **kwargs), Toy.forward(module, *args, **kwargs)
    torch.testing.assert_close(result, expected)
    assert watch.num_events > 0 and list(router.routes.values())[-1].engine == "compiled"


def test_a_shape_without_a_package_is_compiled_alone(watch: CompileWatch, folder: Path) -> None:
    module, router = attached(watch, folder)
    warm(module, 2)
    with torch.inference_mode():
        args, kwargs = inputs(2, side=16)
        module(*args, **kwargs)
    engines = [(route.engine, route.reason) for route in router.routes.values()]
    assert engines == [("aot", None), ("compiled", "aot: no package for this signature")]


def test_calls_that_differ_in_more_than_the_batch_get_packages_of_their_own() -> None:
    assert len(aot.specs([inputs(2), inputs(4), inputs(2, side=16)])) == 2
    (args, kwargs), (other_args, other_kwargs) = inputs(2), inputs(4)
    independent = aot.specs(
        [(args, kwargs), (other_args, {**other_kwargs, "text": kwargs["text"]}), inputs(3)]
    )
    assert [plan.dims.ranges for plan in independent] == [{}, {}, {}]


@pytest.mark.parametrize("strategy", ["dynamic", "exact"])
def test_a_strategy_without_a_list_of_shapes_is_refused(strategy: str) -> None:
    with pytest.raises(ConfigError, match=r"pt2\.export\.aot_compile"):
        ModelConfig.parse(
            {"pt2": {"export": {"aot_compile": True}, "shapes": {"strategy": strategy}}}
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_target_of_a_half_precision_sdxl_is_exported_as_it_is_called(
    dtype: str, tmp_path: Path
) -> None:
    """Its VAE says `force_upcast`: the calls that are kept have the dtype that the module has
    afterwards too.
    """
    old_folders.sdxl(tmp_path / "model")
    names = ("unet", "vae.decoder", "vae.encoder")
    config = {
        "batchSize": 2,
        "pt2": {
            "compile": {"enable": True},
            "targets": names,
            "shapes": {"buckets": [[64, 64]], "batch_sizes": [1, 2]},
        },
        "pipeline": {
            "dtype": dtype,
            "guidance": "on",
            "tasks": ["text-to-image", "image-to-image"],
        },
    }
    prepared: AnyPrepared = load(ModelConfig.parse(config), tmp_path, CPU)
    every = rehearse(prepared)
    for wanted in every:
        export(prepared.targets[wanted.target], wanted.plan.inputs, wanted.plan.dims)
    assert sorted(wanted.target for wanted in every) == sorted(names), (
        "one package each: batches are sliced"
    )


def test_the_graph_of_a_masked_unet_serves_sizes_that_it_has_not_met() -> None:
    """They are an argument; what packages and OpenVINO models are made of has it too."""
    example, module = EXAMPLES["sdxl, 2 levels"], pair("sdxl, 2 levels")[1]
    router = Router("unet", module.forward)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(module, "forward", router)
        with router.observing(keep=True) as calls:
            example.together(module, example.picture())
    ((args, kwargs),) = calls.examples.values()
    exported = export(module, (args, kwargs), DynamicDims()).module()
    for sizes in (example.sizes, [(15, 19), (7, 3), (9, 13), (1, 5)]):
        call = {**kwargs, "sizes": torch.tensor(sizes)}
        with torch.no_grad():
            (result,), (expected,) = exported(*args, **call), module(*args, **call)
        assert (result - expected).abs().max() < 1e-5


def test_a_package_that_no_worker_could_use_fails_the_build_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_folders.sdxl(tmp_path / "model")
    shapes = {"buckets": [[64, 64]], "batch_sizes": [1]}
    config = {
        "pt2": {"compile": {"enable": True}, "shapes": shapes},
        "pipeline": {"tasks": ["text-to-image"]},
    }
    prepared: AnyPrepared = load(ModelConfig.parse(config), tmp_path, CPU)
    monkeypatch.setattr(
        aot, "build", lambda module, plan, path, kwargs: path.write_bytes(b"no package")
    )
    with pytest.raises(
        AheadError, match=r"^no package can be made of unet in 64x64: RuntimeError: [^\n]+$"
    ):
        build(prepared, tmp_path / "aot")
    assert not (tmp_path / "aot" / aot.INDEX).exists()


def test_what_was_built_is_tried_with_the_modules_own_weights(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = made(None)
    plan = aot.PackageSpec(inputs(MOST_ROWS), aot.Entry.parse(index_of(built)["packages"][0]).dims)
    entry = aot.describe(built / "toy.pt2", "toy", ["64x64"], plan)
    aot.check(module, plan, built / "toy.pt2", entry, CPU)
    monkeypatch.setattr(Toy, "forward", lambda *args, **kwargs: (torch.ones(MOST_ROWS, 4, 8, 8),))
    with pytest.raises(RuntimeError, match="differs from eager"):
        aot.check(module, plan, built / "toy.pt2", entry, CPU)


def index_of(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / aot.INDEX).read_text())
    return document
