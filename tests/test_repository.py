"""The files around the code agree with each other: Makefile, CI, pre-commit, versions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import lora_cli

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PYTHONS = ["3.11", "3.12", "3.13"]


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def recipe(target: str) -> list[str]:
    """Command lines of one Makefile target."""
    body = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", read("Makefile"), re.MULTILINE)
    assert body, target
    return [line.strip() for line in body[1].splitlines()]


def requirements() -> list[Requirement]:
    """Everything pyproject.toml asks for, in any extra, except this project's own extras."""
    project = PYPROJECT["project"]
    texts = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    return [wanted for wanted in map(Requirement, texts) if wanted.name != project["name"]]


def pins(python: str) -> dict[str, Version]:
    """Version per package that constraints.txt gives to one Python."""
    lines = [line for line in read("constraints.txt").splitlines() if line and not line.startswith("#")]
    found: dict[str, Version] = {}
    for pin in map(Requirement, lines):
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            (exact,) = pin.specifier
            assert exact.operator == "=="
            assert canonicalize_name(pin.name) not in found, f"{pin.name} is pinned twice on {python}"
            found[canonicalize_name(pin.name)] = Version(exact.version)
    return found


def test_ci_runs_what_the_readme_tells_users():
    commands = [line for line in read(".ci/run").splitlines() if line and not line.startswith("#")]
    assert commands[:2] == ["set -euo pipefail", 'cd "$(dirname "${BASH_SOURCE[0]}")/.."']
    assert commands[2:] == ["make check", "make test", "make test-slow"]
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_the_workflow_runs_the_same_script():
    (job,) = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    pythons = job["strategy"]["matrix"]["python"]
    oldest = re.search(r"version_info < \((\d+), (\d+)\)", read("Makefile"))  # that constraints.txt fits
    assert oldest
    assert pythons[0] == f"{oldest[1]}.{oldest[2]}"


def test_pre_commit_runs_the_commands_of_make_check():
    (repo,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert repo["repo"] == "local"
    assert [hook["entry"] for hook in repo["hooks"]] == recipe("check")
    assert not any(hook["pass_filenames"] for hook in repo["hooks"])


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_has_a_tested_version_in_its_range(python: str):
    tested = pins(python)
    for wanted in requirements():
        version = tested.get(canonicalize_name(wanted.name))
        assert version is not None, f"constraints.txt has no {wanted.name} for Python {python}"
        assert version in wanted.specifier, f"{wanted.name}=={version} is outside {wanted.specifier}"


def test_the_pythons_are_those_we_declare():
    prefix = "Programming Language :: Python :: "
    declared = [line.removeprefix(prefix) for line in PYPROJECT["project"]["classifiers"] if prefix in line]
    assert [version for version in declared if "." in version] == PYTHONS
    assert PYPROJECT["project"]["requires-python"] == f">={PYTHONS[0]}"


def test_the_version_is_written_once():
    assert "version" not in PYPROJECT["project"]
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    source = read(PYPROJECT["tool"]["hatch"]["version"]["path"])
    assert re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE) == [lora_cli.__version__]
    assert str(Version(lora_cli.__version__)) == lora_cli.__version__


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What make looks at, beside a .venv whose python is the one running this test."""
    for name in ["Makefile", "pyproject.toml", "constraints.txt"]:
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    (tmp_path / ".venv/bin/python").chmod(0o755)
    (tmp_path / ".venv/.installed").write_text(f"{tmp_path}\n", encoding="utf-8")
    return tmp_path


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # A clean environment: under `make test`, MAKEFLAGS would otherwise reach this make too.
    environment = {"PATH": os.environ["PATH"]}
    return subprocess.run(["make", *words], cwd=folder, env=environment, capture_output=True, text=True, check=False)


class TestMake:
    def test_help_is_the_default_and_names_every_target(self, checkout: Path):
        shown = make(checkout).stdout
        for target in ["demo", "test", "check", "clean", "bench"]:
            assert f"make {target} " in shown

    def test_a_current_environment_is_used_as_it_is(self, checkout: Path):
        assert make(checkout, "-n", "check").stdout.splitlines() == recipe("check")

    @pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
    def test_changed_dependencies_are_installed_into_it(self, checkout: Path, changed: str):
        os.utime(checkout / ".venv/.installed", (0, 0))
        os.utime(checkout / ({"pyproject.toml", "constraints.txt"} - {changed}).pop(), (0, 0))
        planned = make(checkout, "-n", "check").stdout
        assert "pip install" in planned
        assert "rm -rf .venv" not in planned

    @pytest.mark.parametrize("damage", ["missing", "dead interpreter", "moved folder"])
    def test_a_broken_environment_is_rebuilt(self, checkout: Path, damage: str):
        if damage == "missing":
            shutil.rmtree(checkout / ".venv")
        elif damage == "dead interpreter":
            (checkout / ".venv/bin/python").write_text("#!/nowhere/python3\n", encoding="utf-8")
        else:
            (checkout / ".venv/.installed").write_text("/home/somebody/elsewhere\n", encoding="utf-8")
        planned = make(checkout, "-n", "check").stdout
        assert planned.index("rm -rf .venv") < planned.index("pip install") < planned.index("ruff check")

    def test_an_old_python_is_refused_with_a_way_out(self, checkout: Path):
        shutil.rmtree(checkout / ".venv")
        old = checkout / "old-python"
        old.write_text('#!/bin/sh\ncase "$1" in --version) echo Python 3.8.1;; *) exit 1;; esac\n', encoding="utf-8")
        old.chmod(0o755)
        result = make(checkout, "check", f"PYTHON={old}")
        assert result.returncode != 0
        assert "is Python 3.8.1, and the tested versions in constraints.txt need 3.11 or newer" in result.stderr
        assert "fix: make PYTHON=" in result.stderr
