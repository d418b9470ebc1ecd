"""What is installed, and what the WebUI's installer does, is what the project says."""

from __future__ import annotations

import configparser
import importlib.util
import os
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

import lib_loramerge

ROOT = Path(__file__).resolve().parent.parent
BUILT_FROM = ["pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "lib_loramerge"]
SHARED = ["preset.txt", "style.css", "javascript", "localizations"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the checkout, so that no build folder is left in it."""
    source, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM + SHARED:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(path, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    result = subprocess.run([*command, "-w", out, source], capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    [path] = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of an installed copy, and a function that runs Python with that copy and no other."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)

    def run(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONIOENCODING": "utf-8"}
        result = subprocess.run(
            [sys.executable, *arguments],
            cwd=site,
            env=environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    return site, run


def test_the_wheel_holds_every_module_and_data_file_of_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "lib_loramerge").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected <= names


def test_the_wheel_holds_the_shared_files_inside_the_package_and_nothing_beside_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for name in SHARED:
            path = ROOT / name
            for file in [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]:
                relative = file.relative_to(ROOT).as_posix()
                assert archive.read(f"lib_loramerge/{relative}") == file.read_bytes()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lib_loramerge", "sd_webui_lora_merge"}


def test_the_wheel_is_named_by_the_packages_version_and_has_the_command(wheel):
    assert wheel.name == f"sd_webui_lora_merge-{lib_loramerge.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        [entry_points] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        commands = configparser.ConfigParser()
        commands.read_string(archive.read(entry_points).decode("utf-8"))
    assert dict(commands["console_scripts"]) == {"loramerge": "lib_loramerge.cli:run_and_exit"}


def test_an_installed_copy_reads_the_preset_file_that_came_with_it(installed):
    site, run = installed
    code = "from lib_loramerge.blocks import bundled_preset_path; print(bundled_preset_path())"
    path = Path(run("-c", code))
    assert path.resolve() == (site / "lib_loramerge" / "preset.txt").resolve()
    assert path.read_bytes() == (ROOT / "preset.txt").read_bytes()


def test_an_installed_copy_lists_its_presets(installed):
    _, run = installed
    assert "MIDD" in run("-m", "lib_loramerge", "presets")


def test_a_checkout_reads_its_top_level_preset_file():
    from lib_loramerge.blocks import bundled_preset_path

    assert bundled_preset_path().resolve() == (ROOT / "preset.txt").resolve()


class FakeLaunch(types.ModuleType):
    """The part of a WebUI's `launch` that an installer uses; it remembers what pip was asked for."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__("launch")
        self.error = error
        self.asked: list[str] = []

    def run_pip(self, command: str, desc: str | None = None, live: bool = False) -> None:
        self.asked.append(command)
        if self.error:
            raise self.error


@pytest.fixture
def run_installer(monkeypatch, capsys):
    """Runs install.py with some packages absent; gives what pip was asked for and what was printed."""

    def run(*absent: str, error: Exception | None = None) -> tuple[list[str], list[str]]:
        launch = FakeLaunch(error)
        monkeypatch.setitem(sys.modules, "launch", launch)
        spec = importlib.util.spec_from_file_location("loramerge_install", ROOT / "install.py")
        install = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(install)
        find = importlib.util.find_spec
        gone = lambda name, package=None: None if name in absent else find(name, package)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", gone)
        install.main()
        monkeypatch.undo()
        return launch.asked, capsys.readouterr().out.splitlines()

    return run


def test_the_installer_installs_and_says_nothing_when_nothing_is_missing(run_installer):
    assert run_installer() == ([], [])


def test_the_installer_adds_a_missing_safetensors_and_leaves_all_other_packages_alone(run_installer):
    asked, _ = run_installer("safetensors")
    assert asked == ["install --no-deps safetensors"]


@pytest.mark.parametrize("absent", [["torch"], ["numpy"], ["torch", "safetensors"]])
def test_the_installer_never_installs_what_the_webui_chooses_but_says_what_to_do(run_installer, absent):
    asked, printed = run_installer(*absent)
    assert asked == []
    assert len(printed) == 1
    assert all(name in printed[0] for name in absent)
    assert "start the WebUI" in printed[0]


def test_an_installer_whose_pip_fails_says_so_and_does_not_stop_the_webui(run_installer):
    _, printed = run_installer("safetensors", error=RuntimeError("no network"))
    assert "no network" in printed[0]
    assert "start the WebUI" in printed[-1]


def test_the_installer_runs_as_the_webui_runs_it(tmp_path):
    # A process of its own, in the WebUI's folder, by absolute path.
    result = subprocess.run(
        [sys.executable, ROOT / "install.py"], cwd=tmp_path, capture_output=True, text=True, encoding="utf-8"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
