"""Base models from a hub: a server on this machine answers as the Hugging Face hub does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pytest
from huggingface_hub import close_session, constants

from lora_cli.base.source import find_base
from lora_cli.errors import LoraError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Answer = tuple[int, dict[str, str], bytes]


class FakeHub:
    """Answers requests for one repository, `owner/name`. refuse: an answer for each path that starts so."""

    def __init__(self, files: dict[str, bytes]):
        self.files = files
        self.refuse: dict[str, tuple[int, str]] = {}
        self.cut: str | None = None  # the file whose bytes stop coming half-way
        self.sent: list[str] = []  # files whose bytes were asked for
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                path = urlsplit(self.path).path
                status, headers, content = hub.answer(path)
                if body and "/resolve/" in path and status == 200:
                    hub.sent.append(path.rsplit("/", 1)[-1])
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    cut = hub.cut is not None and path.endswith(hub.cut)
                    self.wfile.write(content[: len(content) // 2] if cut else content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def answer(self, path: str) -> Answer:
        for start, (status, code) in self.refuse.items():
            if path.startswith(start):
                return status, {"X-Error-Code": code, "X-Error-Message": code}, b""
        if path in (
            "/api/models/owner/name",
            "/api/models/owner/name/revision/v1",
            "/api/models/owner/name/revision/main",
        ):
            return self.json(
                {"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]}
            )
        if path == f"/api/models/owner/name/tree/{COMMIT}":
            return self.json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in self.files.items()
                ]
            )
        content = self.files.get(path.removeprefix(f"/owner/name/resolve/{COMMIT}/"))
        if content is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        return 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}, content

    @staticmethod
    def json(value: Any) -> Answer:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()

    def stop(self) -> None:
        if self.thread.is_alive():
            self.server.shutdown()
            self.thread.join()
            self.server.server_close()


@pytest.fixture
def hub(tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with the tiny GPT-2, and with files beside it that must not be downloaded; an empty cache."""
    files = {path.name: path.read_bytes() for path in tiny_gpt2.iterdir()}
    unwanted = [
        "pytorch_model.bin",
        "tokenizer.bin",
        "model.gguf",
        "own.py",
        "onnx/model.safetensors",
        "original/params.json",
        "logo.png",
    ]
    fake = FakeHub(files | {name: b"no" for name in unwanted})
    monkeypatch.setattr(constants, "ENDPOINT", fake.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", fake.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()  # it would remember a proxy
    yield fake
    fake.stop()
    close_session()


def message(find: Callable[[], Any]) -> str:
    with pytest.raises(LoraError) as caught:
        find()
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n  fix: " in text
    return text


def test_a_model_is_downloaded_once_without_pickles_and_code(hub: FakeHub, tiny_gpt2: Path):
    base = find_base("owner/name")
    assert (base.name, base.revision) == ("owner/name", COMMIT)
    wanted = sorted(path.name for path in tiny_gpt2.iterdir())
    assert sorted(path.name for path in base.folder.iterdir()) == wanted == sorted(hub.sent)
    assert (base.folder / "model.safetensors").read_bytes() == (tiny_gpt2 / "model.safetensors").read_bytes()
    assert base.fingerprint == find_base(str(tiny_gpt2)).fingerprint
    assert find_base("owner/name", "v1") == base
    assert len(hub.sent) == len(wanted), "downloaded again"


def test_code_comes_when_it_may_run(hub: FakeHub):
    folder = find_base("owner/name", trust_remote_code=True).folder
    assert (folder / "own.py").exists()
    assert not (folder / "pytorch_model.bin").exists()


def test_offline_the_cache_is_enough(hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    base = find_base("owner/name", "v1")
    hub.refuse["/"] = (500, "Down")
    assert find_base("owner/name", "v1") == base
    hub.stop()
    assert find_base("owner/name", "v1") == base
    assert find_base("owner/name", COMMIT) == base
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_base("owner/name", "v1") == base
    assert "is not in the local cache" in message(lambda: find_base("owner/name", "v2"))


def test_no_such_model(hub: FakeHub):
    text = message(lambda: find_base("owner/nmae"))
    assert text.startswith("error: the hub has no model owner/nmae that you may read\n  fix: check the spelling; ")
    hub.refuse["/api/models/owner/private"] = (401, "")
    assert "the hub has no model owner/private that you may read" in message(lambda: find_base("owner/private"))


@pytest.mark.parametrize("path", ["/api/models/owner/name", "/owner/name/resolve"])
def test_a_gated_model(hub: FakeHub, path: str):
    """The hub refuses the listing, or, as it does for most gated models, the files alone."""
    hub.refuse[path] = (403, "GatedRepo")
    text = message(lambda: find_base("owner/name"))
    assert text.startswith(
        "error: owner/name is gated: its owner wants you to accept terms first\n  fix: accept them on"
    )


def test_no_such_revision(hub: FakeHub):
    hub.refuse["/api/models/owner/name/revision/v2"] = (404, "RevisionNotFound")
    assert message(lambda: find_base("owner/name", "v2")).startswith("error: owner/name has no revision v2\n  fix: ")


def test_a_hub_that_cannot_be_reached(hub: FakeHub):
    hub.stop()
    text = message(lambda: find_base("owner/name"))
    assert text.startswith("error: owner/name is not in the local cache and cannot be downloaded: ")
    assert "Connection refused" in text
    assert "fix: connect to the network and try again" in text


def test_a_hub_that_is_down(hub: FakeHub):
    hub.refuse["/"] = (503, "Down")
    assert "cannot be downloaded: Server error '503 Service Unavailable'" in message(lambda: find_base("owner/name"))


def test_a_download_that_breaks_off_is_not_taken_for_a_model(
    hub: FakeHub, tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch
):
    hub.cut = "model.safetensors"
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the attempts of huggingface_hub
    assert "cannot be downloaded: peer closed connection" in message(lambda: find_base("owner/name"))
    hub.cut = None
    base = find_base("owner/name")
    assert (base.folder / "model.safetensors").read_bytes() == (tiny_gpt2 / "model.safetensors").read_bytes()


def test_a_full_disk_is_not_called_a_network_problem(hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    assert "no space left on the disk" in message(lambda: find_base("owner/name"))


@pytest.mark.parametrize("name", ["bad name!", "owner/name.", "a--b", "-x"])
def test_what_is_no_hub_id(hub: FakeHub, name: str):
    assert message(lambda: find_base(name)).startswith(f"error: {name} is neither a folder here nor a hub id")


@pytest.mark.parametrize("name", ["./gone", "/gone", "~/gone", "a/b/c"])
def test_what_looks_like_a_path_is_not_asked_for(hub: FakeHub, name: str):
    hub.stop()
    assert message(lambda: find_base(name)).startswith(f"error: {name}: no such model folder")


def test_a_model_without_safetensors(hub: FakeHub):
    del hub.files["model.safetensors"]
    assert "the model folder holds no safetensors weights" in message(lambda: find_base("owner/name"))
