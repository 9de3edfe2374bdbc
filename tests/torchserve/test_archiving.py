"""What lies in an archive, and what is kept out of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from preheat.errors import ArchiveError, ConfigError
from preheat.torchserve import archive as archiving
from preheat.torchserve.archive import ArchiveFormat, build_archive

YAML = "# a comment that stays\nminWorkers: 1\npipeline:\n  dtype: float32\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "fox.yaml"
    path.write_text(YAML)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that looks like a pipeline."""
    folder = tmp_path / "pipe, [line]"  # the archiver splits at commas and globs brackets
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"weights")
    return folder


HANDLER = Path(archiving.__file__).parents[2]
SOURCES = {
    path.relative_to(HANDLER).as_posix()
    for path in (HANDLER / "preheat_handler.py", *HANDLER.glob("preheat/**/*.py"))
}


def test_an_installed_preheat_has_every_file(tmp_path: Path) -> None:
    """As the build backend makes the wheel, offline and in a copy: it leaves files behind."""
    pytest.importorskip("setuptools", "77", reason="pyproject.toml asks for setuptools 77")
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(HANDLER, tmp_path / "handler", ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(HANDLER.parent / name, tmp_path)
    build = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    subprocess.run(
        [sys.executable, "-c", build], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert {name for name in names(wheel) if name.endswith(".py")} == SOURCES


def names(mar: Path) -> set[str]:
    with zipfile.ZipFile(mar) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize(
    ("archive_format", "method"),
    [("zip-store", zipfile.ZIP_STORED), ("default", zipfile.ZIP_DEFLATED)],
)
def test_a_mar_holds_the_entry_the_package_the_yaml_and_the_weights(
    config: Path, model: Path, tmp_path: Path, archive_format: str, method: int
) -> None:
    mar = build_archive(
        config, model, output=tmp_path / "out", archive_format=cast(ArchiveFormat, archive_format)
    )
    assert mar == tmp_path / "out" / "fox.mar"
    with zipfile.ZipFile(mar) as archive:
        manifest = json.loads(archive.read("MAR-INF/MANIFEST.json"))["model"]
        assert (manifest["modelName"], manifest["handler"], manifest["configFile"]) == (
            "fox",
            "preheat_handler.py",
            "fox.yaml",
        )
        assert archive.read("fox.yaml").decode() == YAML
        assert archive.read("model/unet/diffusion_pytorch_model.fp16.safetensors") == b"weights"
        assert {entry.compress_type for entry in archive.infolist()} - {zipfile.ZIP_STORED} <= {
            method
        }
    others = ("preheat/cli/", "preheat/preflight/", "preheat/torchserve/")
    ours = {file for file in SOURCES if not file.startswith(others)}
    assert ours | {"model/model_index.json"} <= names(mar)
    assert not any(name.startswith(others) for name in names(mar))
    assert not any("__pycache__" in name for name in names(mar))


def test_no_archive_is_a_folder_that_replaces_an_older_one(
    config: Path, model: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        folder = build_archive(config, model, output=tmp_path / "out", archive_format="no-archive")
        assert (folder / "model" / "model_index.json").is_file()
        assert not (folder / "left-over").exists()
        (folder / "left-over").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["fox"]


def test_a_folder_in_the_way_is_not_removed(config: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "fox").mkdir(parents=True)
    (tmp_path / "out" / "fox" / "thesis.txt").touch()
    with pytest.raises(ArchiveError, match="in the way"):
        build_archive(config, model, output=tmp_path / "out", archive_format="no-archive")
    assert (tmp_path / "out" / "fox" / "thesis.txt").exists()


def test_external_weights_stay_outside_and_the_yaml_names_them(
    config: Path, model: Path, tmp_path: Path
) -> None:
    mar = build_archive(config, model, output=tmp_path, external=True)
    assert not any(name.startswith("model/") for name in names(mar))
    assert read_yaml(mar) == {
        "minWorkers": 1,
        "pipeline": {"dtype": "float32", "path": str(model.resolve())},
    }


def test_a_hub_id_is_external_only(config: Path, tmp_path: Path) -> None:
    hub_id = "stabilityai/stable-diffusion-xl-base-1.0"
    assert (
        read_yaml(build_archive(config, hub_id, output=tmp_path, external=True))["pipeline"]["path"]
        == hub_id
    )
    with pytest.raises(ArchiveError, match="hub id"):
        build_archive(config, hub_id, output=tmp_path)


def test_weights_inside_override_a_path_in_the_yaml(
    config: Path, model: Path, tmp_path: Path
) -> None:
    config.write_text("pipeline: {path: /mnt/elsewhere}\n")
    assert read_yaml(build_archive(config, model, output=tmp_path))["pipeline"]["path"] == "."


@pytest.mark.parametrize(
    "name", ["model.bin", "model.CKPT", "model.pt", "model.pth", "model.pkl", "model.pickle"]
)
@pytest.mark.parametrize("external", [False, True])
def test_pickled_weights_are_refused_by_name(
    config: Path, model: Path, tmp_path: Path, name: str, external: bool
) -> None:
    (model / "unet" / name).touch()
    with pytest.raises(ArchiveError, match=f"{name}.*safetensors"):
        build_archive(config, model, output=tmp_path, external=external)


@pytest.mark.parametrize(
    ("missing", "words"), [("model_index.json", "model_index.json"), ("unet", "no safetensors")]
)
def test_a_folder_that_is_no_pipeline_is_refused(
    config: Path, model: Path, tmp_path: Path, missing: str, words: str
) -> None:
    if (model / missing).is_dir():
        (model / missing / "diffusion_pytorch_model.fp16.safetensors").unlink()
    else:
        (model / missing).unlink()
    with pytest.raises(ArchiveError, match=words):
        build_archive(config, model, output=tmp_path)


def test_a_yaml_that_cannot_be_used_is_refused_before_anything_is_copied(
    config: Path, model: Path, tmp_path: Path
) -> None:
    config.write_text("pt2: {shapes: {buckets: [[100, 100]]}}\n")
    with pytest.raises(ConfigError, match="buckets"):
        build_archive(config, model, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_stem_must_do_as_a_model_name(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "my fox.yaml"
    config.write_text(YAML)
    with pytest.raises(ArchiveError, match="model's name"):
        build_archive(config, model, output=tmp_path / "out")


def read_yaml(mar: Path) -> dict[str, Any]:
    with zipfile.ZipFile(mar) as archive:
        data: dict[str, Any] = yaml.safe_load(archive.read("fox.yaml"))
        return data


MODULE = "module: {path: ., inputs: {x: {shape: [batch, 4]}}}\n"


def transformers_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_a_modules_folder_and_imported_files_are_packed(config: Path, tmp_path: Path) -> None:
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "my_ops.py").write_text("# an op\n")
    config.write_text("pt2: {import: [ops/my_ops.py]}\n" + MODULE)
    mar = build_archive(config, transformers_folder(tmp_path / "bert"), output=tmp_path / "out")
    assert {"model/config.json", "model/model.safetensors", "ops/my_ops.py"} <= names(mar)
    (tmp_path / "ops" / "my_ops.py").unlink()
    with pytest.raises(ConfigError, match=r"my_ops\.py does not exist"):
        build_archive(config, tmp_path / "bert", output=tmp_path / "out")


def test_external_weights_of_a_module_are_named_in_its_section(
    config: Path, tmp_path: Path
) -> None:
    config.write_text(MODULE)
    folder = transformers_folder(tmp_path / "bert")
    archived = read_yaml(build_archive(config, folder, output=tmp_path / "out", external=True))
    assert archived["module"]["path"] == str(folder.resolve()) and "pipeline" not in archived


@pytest.mark.parametrize("package", ["made.py", "made/__init__.py"])
def test_a_factory_is_packed_without_a_model_folder(
    config: Path, tmp_path: Path, package: str
) -> None:
    (tmp_path / package).parent.mkdir(exist_ok=True)
    (tmp_path / package).write_text("def make(): ...\n")
    config.write_text("module: {factory: 'made:make', inputs: {x: {shape: [batch, 4]}}}\n")
    archived = names(build_archive(config, None, output=tmp_path / "out"))
    assert package in archived and not any(name.startswith("model/") for name in archived)
    with pytest.raises(ArchiveError, match="no model folder to package"):
        build_archive(config, tmp_path, output=tmp_path / "out")


def test_an_archive_says_its_version(config: Path, model: Path, tmp_path: Path) -> None:
    packed = build_archive(
        config, model, output=tmp_path, archive_format="no-archive", external=True, version="2.0-b"
    )
    manifest = json.loads((packed / archiving.MANIFEST).read_bytes())
    assert manifest["model"]["modelVersion"] == "2.0-b"
    with pytest.raises(ArchiveError, match=r"version '\.\./2' must be letters"):
        build_archive(config, model, output=tmp_path, version="../2")


def test_a_module_folder_must_be_one(config: Path, model: Path, tmp_path: Path) -> None:
    config.write_text(MODULE)
    with pytest.raises(ArchiveError, match=r"no config\.json"):
        build_archive(config, model, output=tmp_path / "out")
    with pytest.raises(ArchiveError, match="torch-model-archiver"):
        build_archive(config, None, output=tmp_path / "out")
