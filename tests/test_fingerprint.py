"""What a machine is to compiled code: its instruction sets, not its kernel's news."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from preheat import fingerprint

OLD = "fpu cmov sse2 pni ssse3 sse4_2 avx2 fma bmi1 bmi2 f16c avx512f avx512_vnni amx_tile abm hle rtm pti"
NEW = "avx512f rdpid fpu ibrs ibpb stibp ssbd md_clear its_no cmov avx512_vnni sse2 pni ssse3 sse4_2 avx2 fma bmi1 bmi2 f16c amx_tile abm"


def machine(monkeypatch: pytest.MonkeyPatch, folder: Path, flags: str, name: str = "flags") -> str:
    (folder / "cpuinfo").write_text(f"processor\t: 0\n{name}\t\t: {flags}\nbugs\t\t: spectre_v1\n")
    monkeypatch.setattr(fingerprint, "Path", lambda _: folder / "cpuinfo")
    return fingerprint.fingerprint(torch.device("cpu"), {}, {})


def test_mitigations_and_tsx_come_and_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert machine(monkeypatch, tmp_path, OLD) == machine(monkeypatch, tmp_path, NEW)


@pytest.mark.parametrize(
    "flag", ["sse4_2", "avx2", "fma", "bmi2", "f16c", "avx512f", "avx512_vnni", "amx_tile", "abm", "pni", "cmov"]
)
def test_an_instruction_set_less_is_another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flag: str) -> None:
    fewer = " ".join(each for each in OLD.split() if each != flag)
    assert machine(monkeypatch, tmp_path, OLD) != machine(monkeypatch, tmp_path, fewer)


def test_so_it_is_on_arm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old, new = "fp asimd evtstrm sve sve2 bf16 i8mm", "fp asimd cpuid sve sve2 bf16 i8mm ssbs bti paca"
    assert machine(monkeypatch, tmp_path, old, "Features") == machine(monkeypatch, tmp_path, new, "Features")
    without = old.replace(" sve2", "")
    assert machine(monkeypatch, tmp_path, old, "Features") != machine(monkeypatch, tmp_path, without, "Features")


PLACE = """
from pathlib import Path
from preheat.cache import SharedCache
from preheat.trust import Trust

print(SharedCache(Path("/nowhere"), Trust("owner")).share("key").path)
"""


def test_every_process_finds_the_same_place_in_the_share() -> None:
    environments = ({**os.environ, "PYTHONHASHSEED": seed} for seed in ("1", "2"))
    places = {subprocess.check_output([sys.executable, "-c", PLACE], env=environment) for environment in environments}
    assert len(places) == 1
