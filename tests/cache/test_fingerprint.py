"""The fingerprint says what compiled code depends on, in the same words in every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import old_folders
import preheat
from preheat.cache.fingerprint import fingerprint, settled

CPU = torch.device("cpu")
PRINT = """
import json, sys
from pathlib import Path
import torch
from preheat.cache.fingerprint import fingerprint
from preheat.cache.shared import SharedCache
from preheat.cache.trust import Trust
from preheat.config.diffusion import PipelineConfig
from preheat.models.diffusion.pipeline import DiffusionPipeline
cpu = torch.device("cpu")
structure = DiffusionPipeline.load(sys.argv[1], PipelineConfig(), cpu).structure()
place = SharedCache(Path("/nowhere"), Trust("owner")).share("key").path
print(json.dumps({"fingerprint": fingerprint(cpu, {}, structure), "place": str(place)}))
"""


def printed(folder: Path, seed: int) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", PRINT, str(folder)],
        env={
            **os.environ,
            "PYTHONHASHSEED": str(seed),
            "PYTHONPATH": str(Path(preheat.__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    said: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return said


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What two processes say that iterate over sets in other orders, each with an older folder of
    its own: diffusers lists the keys that its config.json lack in the order of a set of strings.
    """
    folders = [old_folders.sdxl(tmp_path_factory.mktemp("old") / name) for name in ("one", "other")]
    return [printed(folder, seed) for seed, folder in enumerate(folders, start=1)]


def test_an_older_folder_has_one_fingerprint_in_all_processes_wherever_it_lies(
    said: list[dict[str, str]],
) -> None:
    assert len({each["fingerprint"] for each in said}) == 1


def test_every_process_finds_the_same_place_in_the_share(said: list[dict[str, str]]) -> None:
    assert len({each["place"] for each in said}) == 1


def test_another_version_of_preheat_has_another_fingerprint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = fingerprint(CPU, {}, {})
    monkeypatch.setattr(preheat, "__version__", "another")
    assert fingerprint(CPU, {}, {}) != before


class Activated(nn.Linear):
    """Says its activation as Python prints functions: with its address."""

    def extra_repr(self) -> str:
        return f"act={nn.functional.gelu!r}, hook={(lambda: 0)!r}"


def test_no_address_no_place_and_no_order_of_a_set_is_in_it() -> None:
    told = settled(
        {
            "module": repr(Activated(1, 1)),
            "names": {"b", "a"},
            "_name_or_path": "/here",
            "text": {"_commit_hash": "1"},
        }
    )
    assert " at 0x" not in str(told) and "lambda" in str(told)
    assert told["names"] == ["a", "b"] and "/here" not in str(told) and told["text"] == {}
    assert settled({1: torch.float16, "x": (1, None, 2.5, True)}) == {
        "1": "torch.float16",
        "x": [1, None, 2.5, True],
    }


OLD = (
    "fpu cmov sse2 pni ssse3 sse4_2 avx2 fma bmi1 bmi2 f16c avx512f avx512_vnni amx_tile abm hle "
    "rtm pti"
)
NEW = (
    "avx512f rdpid fpu ibrs ibpb stibp ssbd md_clear its_no cmov avx512_vnni sse2 pni ssse3 sse4_2 "
    "avx2 fma bmi1 bmi2 f16c amx_tile abm"
)


def machine(monkeypatch: pytest.MonkeyPatch, folder: Path, flags: str, name: str = "flags") -> str:
    (folder / "cpuinfo").write_text(f"processor\t: 0\n{name}\t\t: {flags}\nbugs\t\t: spectre_v1\n")
    monkeypatch.setattr("preheat.cache.fingerprint.Path", lambda _: folder / "cpuinfo")
    return fingerprint(torch.device("cpu"), {}, {})


def test_mitigations_and_tsx_come_and_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert machine(monkeypatch, tmp_path, OLD) == machine(monkeypatch, tmp_path, NEW)


@pytest.mark.parametrize(
    "flag",
    [
        "sse4_2",
        "avx2",
        "fma",
        "bmi2",
        "f16c",
        "avx512f",
        "avx512_vnni",
        "amx_tile",
        "abm",
        "pni",
        "cmov",
    ],
)
def test_an_instruction_set_less_is_another_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flag: str
) -> None:
    fewer = " ".join(each for each in OLD.split() if each != flag)
    assert machine(monkeypatch, tmp_path, OLD) != machine(monkeypatch, tmp_path, fewer)


def test_so_it_is_on_arm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old, new = (
        "fp asimd evtstrm sve sve2 bf16 i8mm",
        "fp asimd cpuid sve sve2 bf16 i8mm ssbs bti paca",
    )
    assert machine(monkeypatch, tmp_path, old, "Features") == machine(
        monkeypatch, tmp_path, new, "Features"
    )
    without = old.replace(" sve2", "")
    assert machine(monkeypatch, tmp_path, old, "Features") != machine(
        monkeypatch, tmp_path, without, "Features"
    )
