"""`preheat doctor`: each fault is planted, found, and gone once its remedy is applied."""

from __future__ import annotations

import importlib
import json
import sys
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from typer.testing import CliRunner

from preheat.cache.trust import KEY_FILE_VARIABLE, Trust
from preheat.cli import app
from preheat.compilation.backends import aot
from preheat.compilation.watch import CompileWatch
from preheat.config.model import ModelConfig
from preheat.models import tiny
from preheat.preflight import checks, look
from preheat.preflight.facts import Context, Machine, Model
from preheat.preflight.findings import CHECKS, Finding, diagnose
from preheat.torchserve.server import ROOT, read_properties

GIB = 2**30
MACHINE = Machine(
    torch="2.13.0",
    cuda=False,
    packages=frozenset({"openvino", "peft", "scipy"}),
    bfloat16=True,
    memory_bytes=64 * GIB,
)
WITH_GPU = MACHINE.model_copy(update={"cuda": True, "gpus": (80 * GIB,), "nvrtc": True})
SERVER = read_properties(ROOT / "archive" / "config.properties")
PIPELINE: dict[str, Any] = {
    "startupTimeout": 1800,
    "maxRetryTimeoutInSec": 7200,
    "pt2": {"compile": {"enable": True, "backend": "inductor"}},
    "pipeline": {"limits": {"max_cost": 10_000_000}},
}


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: base[key] for key in base}
    for key, value in over.items():
        inside = isinstance(value, Mapping) and isinstance(both.get(key), Mapping)
        both[key] = merged(both[key], value) if inside else value
    return both


def context(keys: Mapping[str, Any], **facts: Any) -> Context:
    """Of a good YAML with these keys over it, on a good machine."""
    config = ModelConfig.parse(merged(PIPELINE, keys))
    known: dict[str, Any] = {"machine": MACHINE, "server": SERVER, "model": Model()} | facts
    return Context(config=config, free_bytes=known.pop("free_bytes", lambda _: 100 * GIB), **known)


def only(found: list[Finding], check: str) -> Finding:
    assert [finding.check for finding in found] == [check]
    return found[0]


@dataclass(frozen=True)
class Fault:
    """What is wrong, the check that says so, and what its remedy changes."""

    check: str
    says: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    mended_keys: Mapping[str, Any] = field(default_factory=dict)
    mended_facts: Mapping[str, Any] = field(default_factory=dict)
    remedy: str = ""
    blocks: bool = True


def on(**changes: Any) -> Machine:
    return MACHINE.model_copy(update=changes)


BUCKETS = [[64 * (index + 1), 512] for index in range(30)]
MEASURED = {
    "buckets": [
        {"bucket": "512x512", "batch_size": 1, "warm_seconds": 900.0, "seconds_per_step": 0.5}
    ]
}
FAULTS = {
    "a timeout too short": Fault(
        "startup",
        "startupTimeout: 60 s, and a cold start compiles for about 60 s",
        {"startupTimeout": 60},
        mended_keys={"startupTimeout": 200, "maxRetryTimeoutInSec": 800},
        remedy="startupTimeout: 200\nmaxRetryTimeoutInSec: 800",
    ),
    "a timeout shorter than what was measured": Fault(
        "startup",
        "about 900 s (measured)",
        {"startupTimeout": 1000, "pipeline": {"limits": {"max_cost": 1000}}},
        {"state": MEASURED},
        mended_keys={"startupTimeout": 1800},
        remedy="startupTimeout: 1800",
    ),
    "limits that do not fit responseTimeout": Fault(
        "answer_time",
        "pipeline.limits: 1 legal requests can take 191 s (measured)",
        {"pipeline": {"limits": {"max_cost": 100_000_000}}},
        {"state": MEASURED},
        mended_keys={"pipeline": {"limits": {"max_cost": 41943040}}},
        remedy="max_cost: 41943040",
    ),
    "responses too large": Fault(
        "response_size",
        "300000000 is over the server's max_response_size, 6553500",
        facts={"server": {**SERVER, "max_response_size": "6553500"}},
        mended_keys={"pipeline": {"limits": {"max_response_bytes": 6553500}}},
        remedy="max_response_bytes: 6553500",
    ),
    "requests too large": Fault(
        "response_size",
        "10000000 as base64 is over the server's max_request_size",
        facts={"server": {**SERVER, "max_request_size": "6553500"}},
        mended_keys={"pipeline": {"limits": {"max_image_bytes": 4915125}}},
        remedy="max_image_bytes: 4915125",
        blocks=False,
    ),
    "no compiler": Fault(
        "compiler",
        "no compiler: 'g++' is not on PATH",
        facts={"model": Model(missing="no compiler: 'g++' is not on PATH")},
        mended_facts={"model": Model()},
        remedy="apt-get install g++",
    ),
    "a missing extra": Fault(
        "extras",
        "pt2.compile.backend: openvino needs the package openvino",
        {"pt2": {"compile": {"backend": "openvino"}}},
        {"machine": on(packages=frozenset())},
        mended_facts={"machine": MACHINE},
        remedy="pip install 'preheat[openvino]'",
    ),
    "a missing extra for LoRA": Fault(
        "extras",
        "pipeline.fused_lora needs the package peft",
        {"pipeline": {"fused_lora": "/loras/one"}},
        {"machine": on(packages=frozenset())},
        mended_facts={"machine": MACHINE},
        remedy="pip install 'preheat[lora]'",
    ),
    "a full disk": Fault(
        "disk",
        "the compile cache, /tmp: 10 MiB are free, and about 100 are wanted",
        facts={"free_bytes": lambda _: 10 * 2**20, "environ": {"TMPDIR": "/tmp"}},
        mended_facts={"free_bytes": lambda _: 10 * GIB},
        remedy="TORCHINDUCTOR_CACHE_DIR",
    ),
    "a full disk for traces": Fault(
        "disk",
        "pt2.debug.trace_dir, /traces: 300 MiB are free",
        {"pt2": {"debug": {"trace_dir": "/traces"}}},
        {"free_bytes": lambda _: 300 * 2**20},
        mended_keys={"pt2": {"debug": {"trace_bytes": 100_000_000}}},
        remedy="pt2: {debug: {trace_dir: ...}}",
    ),
    "a GPU id without CUDA": Fault(
        "device",
        "deviceIds: GPU 1 cannot be used here: torch 2.13.0 is built without CUDA",
        {"deviceIds": [1], "deviceType": "gpu"},
        mended_keys={"deviceIds": [], "deviceType": "cpu"},
        remedy="deviceType: cpu",
    ),
    "prompts longer than the tokenizer": Fault(
        "long_prompts",
        "2 of 3 prompts are longer than the text encoders read, by up to 40 tokens",
        facts={"model": Model(dropped=(0, 3, 40))},
        mended_keys={"pipeline": {"limits": {"long_prompts": "reject"}}},
        remedy="long_prompts: reject",
        blocks=False,
    ),
    "too many buckets for the memory": Fault(
        "memory",
        "pt2.shapes.buckets: weights and code of 30 buckets take about",
        {"startupTimeout": 9000, "maxRetryTimeoutInSec": 20000}
        | {"pt2": {"shapes": {"buckets": BUCKETS}}},
        {"machine": on(memory_bytes=3 * GIB), "weight_bytes": GIB},
        mended_keys={"pt2": {"shapes": {"buckets": BUCKETS[:24]}}},
        remedy="keep 24 of the buckets",
    ),
    "openvino's copies of the weights": Fault(
        "memory",
        "of 30 buckets",
        {"pt2": {"compile": {"backend": "openvino"}, "shapes": {"buckets": BUCKETS}}},
        {"machine": on(memory_bytes=16 * GIB), "weight_bytes": GIB},
        mended_keys={"pt2": {"shapes": {"buckets": BUCKETS[:15]}}},
        remedy="keep 15 of the buckets",
    ),
    "cuDNN attention without libnvrtc": Fault(
        "attention",
        "libnvrtc cannot be loaded",
        {"pt2": {"attention": "cudnn"}},
        {"machine": WITH_GPU.model_copy(update={"nvrtc": False})},
        mended_facts={"machine": WITH_GPU},
        remedy="nvidia-cuda-nvrtc",
    ),
    "cuDNN attention on a CPU": Fault(
        "attention",
        "has no GPU",
        {"pt2": {"attention": "cudnn"}},
        mended_keys={"pt2": {"attention": "default"}},
        remedy="attention: default",
    ),
    "bfloat16 that is emulated": Fault(
        "slow_dtype",
        "no instructions for bfloat16",
        {"pipeline": {"dtype": "bfloat16"}},
        {"machine": on(bfloat16=False)},
        mended_keys={"pipeline": {"dtype": "float32"}},
        remedy="dtype: float32",
        blocks=False,
    ),
    "what the YAML warns of": Fault(
        "yaml",
        "batch_sizes: a batch of 4 requests",
        {"batchSize": 4},
        mended_keys={"pt2": {"shapes": {"batch_sizes": [1, 4]}}},
        blocks=False,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_its_remedy_mends_it(name: str) -> None:
    fault = FAULTS[name]
    found = only(diagnose(context(fault.keys, **fault.facts)), fault.check)
    assert fault.says in found.what and fault.remedy in found.remedy
    assert found.why and found.blocks == fault.blocks
    mended = context(merged(fault.keys, fault.mended_keys), **{**fault.facts, **fault.mended_facts})
    assert diagnose(mended) == []


def test_a_cache_that_others_can_write_or_that_is_not_there(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    looked = context({"pt2": {"cache": {"shared": str(cache)}}})
    missing = only(diagnose(looked), "cache_folder")
    assert f"mkdir -p -m 755 {cache}" in missing.remedy
    cache.mkdir()
    cache.chmod(0o777)
    found = only(diagnose(looked), "cache_folder")
    assert "can be written by others" in found.what and f"chmod go-w {cache}" in found.remedy
    cache.chmod(0o755)
    assert diagnose(looked) == []


def test_signing_mends_a_cache_that_others_can_write_and_wants_a_key(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    signed = context({"pt2": {"cache": {"shared": str(tmp_path), "trust": "signed"}}})
    found = only(diagnose(signed), "cache_folder")
    assert "signed needs a key" in found.what and KEY_FILE_VARIABLE in found.remedy
    key = tmp_path / "key"
    key.write_text("0123456789abcdef" * 2)
    key.chmod(0o600)
    assert diagnose(replace(signed, environ={KEY_FILE_VARIABLE: str(key)})) == []


def test_a_key_file_that_others_read(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("0123456789abcdef" * 2)
    key.chmod(0o644)
    looked = context({}, environ={KEY_FILE_VARIABLE: str(key)})
    found = only(diagnose(looked), "key_file")
    assert f"chmod 600 {key}" in found.remedy
    key.chmod(0o600)
    assert diagnose(looked) == []


# --- what only loading shows ----------------------------------------------------------------------

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 4), 0
        self.register_buffer("counted", torch.zeros(()))

    def forward(self, x):
{body}

def make():
    torch.manual_seed(0)
    return Net()
"""
BRANCH = """
        if x.sum() > 0:
            x = x + 1
        return self.layer(x)"""
WITHOUT_BRANCH = """
        return self.layer(torch.where(x.sum() > 0, x + 1, x))"""
COUNTER = """
        self.calls += 1
        return self.layer(x) * self.calls"""
BUFFER = """
        self.counted += 1
        return self.layer(x) * self.counted"""


@pytest.fixture
def nets(tmp_path: Path) -> Iterator[Any]:
    """Writes a module of this forward, and says what `look` sees of it."""
    names, path = [], list(sys.path)

    def see(body: str, **pt2: Any) -> Context:
        name = f"net_{uuid.uuid4().hex}"
        names.append(name)
        (tmp_path / f"{name}.py").write_text(NET.format(body=body.strip("\n")))
        importlib.invalidate_caches()
        data = {
            "startupTimeout": 600,
            "maxRetryTimeoutInSec": 2400,
            "pt2": {"compile": {"enable": True}} | pt2,
            "module": {
                "factory": f"{name}:make",
                "inputs": {"x": {"shape": ["batch", "n", 4], "buckets": {"n": [2, 4]}}},
                "outputs": {"output": {"crop": {1: "n"}}},
            },
        }
        config = ModelConfig.parse(data)
        seen = look.examine(config, tmp_path)
        return Context(config, MACHINE, seen, server=SERVER, free_bytes=lambda _: 100 * GIB)

    yield see
    sys.path[:] = path
    for name in names:
        sys.modules.pop(name, None)


def test_a_graph_break_in_user_code_with_its_line(watch: CompileWatch, nets: Any) -> None:
    found = only(diagnose(nets(BRANCH)), "graph_breaks")
    assert ".py:12 (if x.sum() > 0:): a branch that depends on" in found.what
    assert not found.blocks and "torch.where" in found.remedy
    assert diagnose(nets(WITHOUT_BRANCH)) == []


def test_a_guard_that_traffic_breaks(watch: CompileWatch, nets: Any) -> None:
    found = diagnose(nets(COUNTER))
    assert {finding.check for finding in found} == {"guards"}, found
    assert "calls" in found[0].what and "buffer" in found[0].remedy and not found[0].blocks
    assert all(finding.blocks for finding in diagnose(nets(COUNTER, on_failure="fail")))
    assert diagnose(nets(BUFFER)) == []


def test_a_stale_package(watch: CompileWatch, nets: Any, tmp_path: Path) -> None:
    folder = tmp_path / aot.FOLDER
    folder.mkdir()
    aot.write_index(folder, "0" * 64, [], Trust("owner"))
    found = diagnose(nets(WITHOUT_BRANCH, export={"aot_compile": True}))
    assert "built for fingerprint 000000000000" in only(found, "packages").what
    assert "aot_compile: false" in found[0].remedy
    assert diagnose(nets(WITHOUT_BRANCH, export={"aot_compile": False})) == []


def test_masks_for_a_module_that_they_do_not_know(watch: CompileWatch, tmp_path: Path) -> None:
    folder = tiny.build("sd15", tmp_path / "model")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    config = dict(unet.config) | {
        "class_embed_type": None,
        "resnet_time_scale_shift": "scale_shift",
    }
    config["mid_block_type"] = "UNetMidBlock2DSimpleCrossAttn"
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    shapes = {"buckets": [[128, 128]], "fit": "mask"}
    masked = {"path": str(folder), "limits": {"max_cost": 1000}, "tasks": ["text-to-image"]}
    keys = {"pt2": {"shapes": shapes}, "pipeline": masked}
    seen = look.examine(context(keys).config, tmp_path)
    found = only(diagnose(context(keys, model=seen)), "load")
    assert (
        found.what.startswith("pt2.shapes.fit: mask cannot be had") and "fit: pad" in found.remedy
    )
    mended = merged(keys, {"pt2": {"compile": {"enable": False}, "shapes": {"fit": "pad"}}})
    assert diagnose(context(mended, model=look.examine(context(mended).config, tmp_path))) == []


# --- the command ----------------------------------------------------------------------------------


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app.app, ["doctor", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


SHIPPED = sorted((ROOT / "model-config").glob("*.yaml"))


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda path: path.stem)
def test_nothing_is_found_in_the_shipped_yamls(shipped: Path) -> None:
    """On their machines; that a model loads is asked of one, below."""
    config = ModelConfig.load(shipped)
    for machine in (MACHINE, WITH_GPU):
        looked = Context(config, machine, Model(), 2**20, SERVER, {}, None, lambda _: 100 * GIB)
        assert diagnose(looked) == []


def test_the_whole_command_on_a_shipped_yaml(here: Path) -> None:
    (here / "prompts.txt").write_text("a fox\n" + "fox " * 200 + "\n")
    shipped = ROOT / "model-config" / "tiny-sdxl.yaml"
    done = run(shipped, "tiny:sdxl", "--json", "--prompts", here / "prompts.txt")
    report = json.loads(done.stdout)
    assert done.exit_code == 0 and report["checks"] == len(CHECKS) and report["model"]
    (found,) = report["findings"]
    assert found["check"] == "long_prompts" and "1 of 2 prompts" in found["what"]


def test_a_yaml_that_does_not_load_blocks(here: Path) -> None:
    data = {"pt2": {"compile": {"enable": True}, "shapes": {"fit": "mask"}}}
    data |= {"module": {"factory": "net:make"}}
    (here / "net.py").touch()
    (here / "wrong.yaml").write_text(yaml.safe_dump(data))
    done = run(here / "wrong.yaml")
    assert done.exit_code == 1 and "pt2.shapes.fit: mask is for pipelines" in done.stdout
    assert "mend  pt2: {shapes: {fit: pad}}" in done.stdout


def test_exit_2_where_it_could_not_look(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "good.yaml").write_text(yaml.safe_dump(PIPELINE))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    done = run(here / "good.yaml")
    assert done.exit_code == 2 and "could not look" in done.stderr
    (here / "state.json").write_text("{}")
    assert run(here / "good.yaml", "--state", here / "state.json").exit_code == 2


def test_a_check_is_a_function_with_a_reason_to_be() -> None:
    assert len(CHECKS) == 18 and all(check.__doc__ for check in CHECKS.values())
    assert checks.GRAPH_SECONDS["inductor-gpu"] > checks.GRAPH_SECONDS["inductor-cpu"]


def test_the_machine_is_this_one() -> None:
    seen = look.machine()
    assert seen.torch == torch.__version__ and seen.memory_bytes > 2**28
    assert "scipy" in seen.packages
