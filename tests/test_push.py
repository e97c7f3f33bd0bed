"""`lora push`, against a server on this machine that answers as the hub's API does."""

from __future__ import annotations

import base64
import json
import platform
import re
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import pytest
from conftest import open_base, with_adapter
from huggingface_hub import close_session, constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_cli.adapters.file import read_adapter, save_adapter
from lora_cli.base.source import BaseSource

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = "# A card\n"
pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # of huggingface_hub, without xet


class Hub:
    """One repository: `files` and whether it is private, once it was made. status: of every answer, where set."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.private: bool | None = None
        self.status: int | None = None
        self.asked: list[str] = []
        self.large: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.asked.append(f"{self.command} {self.path.partition('?')[0]}")
                said = b"" if hub.status else json.dumps(hub.answer(hub.asked[-1], body)).encode()
                self.send_response(hub.status or 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            do_GET = do_POST = do_PUT = answer

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def answer(self, asked: str, body: bytes) -> Any:
        match asked.split():
            case ["POST", "/api/repos/create"]:
                if self.private is None:
                    self.private = json.loads(body)["visibility"] == "private"
                return {"url": f"{self.address}/me/it"}
            case ["GET", "/api/models/me/it"]:
                return {
                    "id": "me/it",
                    "private": self.private,
                    "siblings": [{"rfilename": name} for name in self.files],
                }
            case ["POST", "/api/models/me/it/preupload/main"]:
                named = [each["path"] for each in json.loads(body)["files"]]
                modes = {True: "lfs", False: "regular"}
                return {
                    "files": [
                        {"path": each, "uploadMode": modes[each.endswith(".safetensors")], "shouldIgnore": False}
                        for each in named
                    ]
                }
            case ["POST", "/me/it.git/info/lfs/objects/batch"]:
                objects = json.loads(body)["objects"]
                put = [{"upload": {"href": f"{self.address}/large/{each['oid']}"}} for each in objects]
                return {"objects": [each | {"actions": at} for each, at in zip(objects, put, strict=True)]}
            case ["PUT", path]:
                self.large[path.rpartition("/")[2]] = body
            case ["POST", "/api/models/me/it/commit/main"]:
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        self.files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        self.files[value["path"]] = self.large[value["oid"]]
                return {"commitUrl": f"{self.address}/me/it/commit/{COMMIT}", "commitOid": COMMIT}
        return {}

    def stop(self) -> None:
        if self.thread.is_alive():
            self.server.shutdown()
            self.thread.join()
            self.server.server_close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    fake = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", fake.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    yield fake
    fake.stop()
    close_session()


@pytest.fixture
def adapter(tiny_llama: Path, tmp_path: Path) -> Path:
    """An adapter of ours on a base of the hub, with a card, and two files that are nobody's business."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    base = BaseSource("owner/llama", tiny_llama, COMMIT)
    save_adapter(with_adapter(open_base(tiny_llama)), folder, base, quantization="none", double_quantization=True)
    for name in ("README.md", "rows.jsonl", ".secret"):
        (folder / name).write_text(CARD)
    return folder


def test_an_adapter_is_pushed_as_it_is_and_nothing_beside_it(hub: Hub, adapter: Path, lora):
    said = lora("push", adapter, "--to", "me/it")
    assert said.code == 0, said.text
    assert hub.private is True
    assert {name: (adapter / name).read_bytes() for name in hub.files} == hub.files
    assert set(hub.files) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert "left out, as lora did not write them: rows.jsonl" in said.text
    assert said.text.index("me/it (private)") < said.text.index("# A card")
    assert said.out == f"{hub.address}/me/it\n"
    shutil.copy(adapter / "README.md", adapter / "chat_template.jinja")
    assert lora("push", adapter, "--to", "me/it").code == 0, "again, with a change"
    assert "chat_template.jinja" in hub.files


def test_a_dry_run_shows_the_same_and_uses_no_network(hub: Hub, adapter: Path, lora, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    said = lora("push", adapter, "--to", "me/it", "--public", "--dry-run")
    assert said.code == 0
    assert hub.asked == []
    assert "public: everybody can read it" in said.out
    assert said.out.endswith("# A card\n\ndry run: nothing was uploaded\n")
    document = json.loads(lora("push", adapter, "--to", "me/it", "--dry-run", "--json").out)
    assert set(document) == {"repository", "private", "files", "left_out", "card", "url"}
    assert document["files"]["README.md"] == len(CARD)
    assert document["url"] is None


def test_public_is_public(hub: Hub, adapter: Path, lora):
    assert lora("push", adapter, "--to", "me/it", "--public").code == 0
    assert hub.private is False
    before = dict(hub.files)
    said = lora("push", adapter, "--to", "me/it")
    assert "exists and is public: everybody could read" in said.error
    assert hub.files == before


@pytest.fixture
def run(run_recipe) -> Path:
    return run_recipe(data={"validation": 0.25}, train={"learning_rate": 0.01, "max_steps": 4, "eval_every": 2})[0]


def test_nothing_of_the_machine_leaves_it(hub: Hub, run: Path, lora, tiny_llama: Path, tmp_path: Path):
    """A run, and what was merged of it, on a base that is a folder here; its tokenizer is said as for a GGUF base."""
    weights = run / "adapter" / "adapter_model.safetensors"
    with safe_open(weights, "pt") as stored:
        texts = stored.metadata() | {"tokenizer": str(tmp_path / "words")}
    save_file(load_file(weights), weights, texts)
    assert "base is a folder of this machine" in lora("push", run, "--to", "me/it").error
    assert hub.asked == []
    assert lora("push", run, "--to", "me/it", "--base", "owner/llama").code == 0
    pushed = tmp_path / "pushed"
    pushed.mkdir()
    for name, content in hub.files.items():
        (pushed / name).write_bytes(content)
    assert_no_place(hub, tmp_path, tiny_llama)
    assert "\nbase_model: owner/llama\n" in (pushed / "README.md").read_text()
    assert 'from_pretrained("owner/llama")' in (pushed / "README.md").read_text()
    there, here = read_adapter(pushed), read_adapter(run / "adapter")
    assert there.own_base() == ("owner/llama", None)
    assert there.metadata == here.metadata.model_copy(update={"base_model": "owner/llama", "tokenizer": None})
    tensors, own = (load_file(each / "adapter_model.safetensors") for each in (pushed, run / "adapter"))
    assert all(tensors[name].equal(value) for name, value in own.items())
    with safe_open(pushed / "adapter_model.safetensors", "pt") as stored:
        assert stored.metadata()["format"] == "pt"

    hub.files.clear()
    config = json.loads((tiny_llama / "config.json").read_text()) | {"_name_or_path": str(tiny_llama)}
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    (base / "config.json").write_text(json.dumps(config))
    (base / "train.txt").write_text("a row")
    assert lora("merge", run, "--base", base, "--output", tmp_path / "merged").code == 0
    said = lora("push", tmp_path / "merged", "--to", "me/it")
    assert said.code == 0, said.text
    assert {"config.json", "model.safetensors", "tokenizer.json", "merge.json", "README.md"} < set(hub.files)
    assert "train.txt" not in hub.files
    assert json.loads(hub.files["config.json"]) == config | {"_name_or_path": tiny_llama.name}
    assert_no_place(hub, tmp_path, tiny_llama)


def assert_no_place(hub: Hub, *places: Path) -> None:
    for name, content in hub.files.items():
        end = 8 + int.from_bytes(content[:8], "little") if name.endswith(".safetensors") else None
        for private in (*map(str, places), str(Path.home()), platform.node(), "Think."):
            assert not re.search(rf"(?<!\w){re.escape(private)}(?!\w)".encode(), content[:end]), (name, private)


def test_an_adapter_of_peft_names_its_base_as_the_hub_does(hub: Hub, tiny_llama: Path, tmp_path: Path, lora):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    assert str(tiny_llama) in (tmp_path / "adapter" / "README.md").read_text()
    assert lora("push", tmp_path / "adapter", "--to", "me/it", "--base", "owner/llama").code == 0
    assert_no_place(hub, tiny_llama)
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "owner/llama"


@pytest.mark.parametrize(
    ("status", "said", "fix"),
    [
        (401, "the hub does not know this token", "hf auth login"),
        (403, "this token may not write to it", "hf auth whoami"),
        (404, "this token may not write to it", "a name of yours"),
        (400, "the hub refused it", "try again later"),
    ],
)
def test_a_hub_that_says_no(hub: Hub, adapter: Path, lora, status: int, said: str, fix: str):
    hub.status = status
    answer = lora("push", adapter, "--to", "me/it")
    assert answer.code == 2
    assert said in answer.error
    assert fix in answer.error


def test_no_hub_no_token_offline(hub: Hub, adapter: Path, lora, monkeypatch):
    hub.stop()
    assert "me/it: the upload failed: " in lora("push", adapter, "--to", "me/it").error
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in lora("push", adapter, "--to", "me/it").error
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "there is no token of the hub" in lora("push", adapter, "--to", "me/it").error


@pytest.mark.parametrize("name", ["it", "me/it/too", "me/it.git", "me it/x", "me/.."])
def test_a_name_that_the_hub_does_not_take(adapter: Path, lora, name: str):
    said = lora("push", adapter, "--to", name, "--dry-run")
    assert f"--to {name} is not a name of the hub" in said.error
    assert "fix: write --to owner/name" in said.error


def test_what_cannot_be_pushed(adapter: Path, tiny_llama: Path, tmp_path: Path, lora, hub: Hub):
    def refused(source: Path) -> str:
        return lora("push", source, "--to", "me/it").error

    assert "no such folder" in refused(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    assert "neither a run nor an adapter nor a model" in refused(tmp_path / "empty")
    assert f"hf upload me/it {tiny_llama} . --private" in refused(tiny_llama)
    (adapter / "README.md").rename(tmp_path / "page")
    assert "this folder has no README.md" in refused(adapter)
    (adapter / "README.md").symlink_to(tmp_path / "page")
    assert "README.md: this is a link" in refused(adapter)
    (adapter / "README.md").unlink()
    (adapter / "README.md").write_text(CARD)
    hub.files["model-00002-of-00002.safetensors"] = b""
    assert "already holds other weights, which would be mixed with these: model-00002" in refused(adapter)
    content = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(content[:-4])
    assert "damaged or incomplete" in refused(adapter)


def test_an_unfinished_run_is_not_pushed(run: Path, lora):
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"state": "interrupted", "step": 3}))
    for source in (run, run / "adapter"):
        said = lora("push", source, "--to", "me/it")
        assert "this run is not finished: interrupted at step 3/4" in said.error
        assert "--resume" in said.error
