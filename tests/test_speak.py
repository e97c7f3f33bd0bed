"""`lora generate` and `lora chat`: the model is prompted as it was trained, and what was done is said."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, randomize_adapter
from safetensors.torch import load_file, save_file

from lora_cli.adapters.file import save_adapter
from lora_cli.adapters.named import find_named
from lora_cli.adapters.opened import open_model
from lora_cli.adapters.targets import find_targets
from lora_cli.base.source import find_base
from lora_cli.errors import LoraError

QUESTION = "question answer user"
CHAT_ROWS = [{"messages": [{"role": "user", "content": f"one {n}"}, {"role": "assistant", "content": f"two {n}"}]}
             for n in range(8)]  # fmt: skip


@pytest.fixture(scope="module")
def taught(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes an adapter with random B on the tiny model, with what training recorded of its prompting."""

    def make(prompting: str | None, seed: int = 0) -> Path:
        from lora_cli.adapters.attach import attach

        folder = tmp_path_factory.mktemp(f"adapter-{prompting}")
        opened = open_model(str(tiny_llama), None, dtype="fp32", device="cpu")
        attach(opened.model, find_targets(opened.model, "all-linear", rank=4, alpha=8))
        randomize_adapter(opened.model, seed, scale=0.5)
        base = find_base(str(tiny_llama))
        save_adapter(opened.model, folder, base, quantization="none", double_quantization=False, prompting=prompting)
        return folder

    return make


def by_transformers(adapter: Path, prompt: str, tokens: int) -> str:
    """What the model says by greedy decoding with PEFT and transformers alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True))


def templated(base: Path, *turns: tuple[str, str]) -> str:
    from transformers import AutoTokenizer

    messages = [{"role": role, "content": content} for role, content in turns]
    return str(
        AutoTokenizer.from_pretrained(base).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    )


@pytest.mark.parametrize(
    ("recorded", "options", "through"),
    [
        ("template", (), True),
        ("template", ("--raw",), False),
        ("raw", (), False),
        ("raw", ("--template",), True),
        (None, (), False),
        (None, ("--template",), True),
        (None, ("--chat",), True),  # of earlier releases
    ],
)
def test_generate_prompts_as_training_did_and_the_user_overrides(recorded, options, through, taught, tiny_llama, lora):
    adapter = taught(recorded)
    said = lora("generate", adapter, QUESTION, "--max-new-tokens", 12, "--dtype", "fp32", "--json", *options)
    assert said.code == 0, said.text
    document = json.loads(said.out)
    prompt = templated(tiny_llama, ("user", QUESTION)) if through else QUESTION
    assert document["completion"] == by_transformers(adapter, prompt, 12) != ""
    assert document["prompting"] == ("template" if through else "raw")
    if not options:
        assert ("through the chat template" in said.text) == through
        assert "as in training" in said.text if recorded else "nothing says" in said.text


@pytest.mark.parametrize("form", ["run", "adapter", "merged"])
def test_a_run_its_adapter_and_the_merged_model_are_prompted_as_the_run_was_trained(form, recipe_file, lora, tmp_path):
    rows = tmp_path / "chats.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in CHAT_ROWS))
    assert lora("train", recipe_file(data={"train": str(rows)})).code == 0
    if form == "merged":
        assert lora("merge", tmp_path / "run", "--output", tmp_path / "merged").code == 0
    source = {"run": tmp_path / "run", "adapter": tmp_path / "run" / "adapter", "merged": tmp_path / "merged"}[form]
    document = json.loads(lora("generate", source, "one 3", "--max-new-tokens", 4, "--json").out)
    assert document["prompting"] == "template"


@pytest.mark.parametrize(
    ("data", "prompting"),
    [({"format": "chat"}, "template"), ({"template": "chatml"}, "template"), ({"format": "completion"}, "raw"),
     ({}, "raw")],
)  # fmt: skip
def test_an_adapter_made_before_that_was_recorded_goes_by_its_runs_recipe(
    data, prompting, taught, recipe_file, lora, tmp_path
):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(taught(None), run / "adapter")
    shutil.copy(recipe_file(data=data), run / "recipe.yaml")
    document = json.loads(lora("generate", run, QUESTION, "--max-new-tokens", 2, "--json").out)
    assert document["prompting"] == prompting


def with_end_first(tiny_llama: Path, folder: Path) -> Path:
    base = shutil.copytree(tiny_llama, folder)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"][:] = 0  # every logit is 0: greedy takes the first token, which is the end
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return base


def test_an_empty_completion_says_so_and_why(tiny_llama, tmp_path, lora):
    base = with_end_first(tiny_llama, tmp_path / "base")
    for options in ((), ("--json",)):
        said = lora("generate", base, QUESTION, *options)
        assert "the completion is empty: the model ended it at once, with <|endoftext|>" in said.text, said.text
        assert "add --template" in said.text  # it has one, and nothing says how it was trained
    (base / "merge.json").write_text(json.dumps({"prompting": "template"}))
    assert "leave out --raw" in lora("generate", base, QUESTION, "--raw").text


def test_a_completion_that_is_cut_says_so(tiny_llama, lora):
    said = lora("generate", tiny_llama, QUESTION, "--max-new-tokens", 3, "--raw")
    assert "note: cut after 3 tokens: --max-new-tokens allows more" in said.text
    assert json.loads(lora("generate", tiny_llama, QUESTION, "--max-new-tokens", 3, "--json").out)["stop"] is None


def test_a_completion_that_the_models_last_position_cuts_says_that(tiny_llama, lora):
    prompt = "question " * 48
    said = lora("generate", tiny_llama, prompt, "--max-new-tokens", 250, "--raw", "--json")
    document = json.loads(said.out)
    from transformers import AutoTokenizer

    left = 256 - len(AutoTokenizer.from_pretrained(tiny_llama)(prompt).input_ids)
    assert (document["stop"], document["new_tokens"]) == (None, left)
    assert f"cut after {left} tokens, as the model sees no more" in said.text


def test_a_merged_model_in_the_hubs_cache_is_recognized_through_its_links(tiny_llama, tmp_path, lora):
    blobs, folder = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0"
    shutil.copytree(tiny_llama, blobs)
    (blobs / "merge.json").write_text(json.dumps({"prompting": "template"}))
    folder.mkdir(parents=True)
    for file in blobs.iterdir():
        (folder / file.name).symlink_to(file)
    document = json.loads(lora("generate", folder, QUESTION, "--max-new-tokens", 2, "--json").out)
    assert document["prompting"] == "template"


def test_what_is_named_is_recognized_by_what_it_holds(taught, tiny_llama, tmp_path):
    adapter = taught(None)
    assert find_named(str(adapter)).adapter == adapter
    assert find_named(str(adapter), "other").model == "other"
    assert find_named(str(tiny_llama)).model == str(tiny_llama)
    assert find_named("someone/model").model == "someone/model"
    (tmp_path / "file").write_text("")
    for wrong, said in (
        (tmp_path, "neither a run nor an adapter nor a model"),
        (tmp_path / "file", "this is not a folder"),
        ("how are you?", "names no run, adapter or model"),
    ):
        with pytest.raises(LoraError, match=said):
            find_named(str(wrong))
    with pytest.raises(LoraError, match="--base is for an adapter"):
        find_named(str(tiny_llama), "other")


# ── the chat ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def talk(lora: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `lora chat` on lines that are typed one after another; an exception among them is raised."""

    def run(source: Path, *typed: Any, options: tuple[Any, ...] = ()) -> Any:
        lines: Iterator[Any] = iter(typed)

        def read(prompt: str = "") -> str:
            line = next(lines, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        return lora("chat", source, "--max-new-tokens", 6, "--dtype", "fp32", *options)

    return run


def test_a_conversation_is_what_the_template_makes_of_all_turns(taught, tiny_llama, talk, tmp_path):
    adapter, saved = taught("template"), tmp_path / "chat.jsonl"
    said = talk(adapter, "one", "two", f"/save {saved}", "/reset", "one", options=("--system", "answer"))
    assert said.code == 0, said.text
    turns = json.loads(saved.read_text())["messages"]
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    for at in (2, 4):
        prompt = templated(tiny_llama, *((turn["role"], turn["content"]) for turn in turns[:at]))
        assert turns[at]["content"] == by_transformers(adapter, prompt, 6)
    first, second, again = said.out.splitlines()[:3]
    assert (first, second, again) == (turns[2]["content"], turns[4]["content"], turns[2]["content"])
    assert saved.stat().st_mode & 0o077 == 0
    assert "this file exists" in talk(adapter, "one", f"/save {saved}").text


def test_base_and_adapter_answer_the_same_message(taught, tiny_llama, talk):
    adapter = taught("template")
    said = talk(adapter, "one", "/base", "/again", f"/adapter {adapter.name}", "/again", "/adapter")
    answers = [line for line in said.out.splitlines() if line]
    alone = talk(tiny_llama, "one").out.splitlines()[0]
    assert answers[0] == answers[2] != answers[1] == alone
    assert f"* {adapter}\n  none" in said.text
    assert "this model has no adapter" in talk(tiny_llama, "/base").text


def test_another_adapter_answers_in_the_same_conversation_and_is_read_once(taught, tiny_llama, talk, monkeypatch):
    from lora_cli.adapters import named

    one, other = taught("template"), taught("raw", seed=1)
    read, opened = [], named.read_adapter
    monkeypatch.setattr(named, "read_adapter", lambda folder: read.append(folder) or opened(folder))
    said = talk(
        one, "one", f"/adapter {other}", "/again", f"/adapter {one}", "/again", f"/adapter {other}", "/adapter no"
    )
    assert said.out.splitlines()[0] == said.out.splitlines()[2] == talk(one, "one").out.splitlines()[0]
    assert said.out.splitlines()[1] == by_transformers(other, "one", 6)
    assert "no: no such adapter folder" in said.text
    assert read == [other]
    assert talk(tiny_llama, f"/adapter {one}", "one").out.splitlines()[0] == said.out.splitlines()[0]


def test_an_adapter_that_is_named_again_has_its_effect_once(taught, tiny_llama, talk, monkeypatch, tmp_path):
    shutil.copytree(taught("template"), tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "there" / "one")
    monkeypatch.chdir(tmp_path)
    said = talk(tiny_llama, "/adapter one", "one", "/adapter there/one", "/adapter one", "/again", "/adapter")
    assert said.out.splitlines()[0] == said.out.splitlines()[1]
    assert said.text.count("* one") == 1
    assert said.text.count("  there/one") == 1


def test_ctrl_c_ends_the_answer_and_not_the_conversation(taught, talk, monkeypatch, tmp_path):
    from lora_cli.evaluation import chat

    pieces: list[str] = []
    printed = chat.print_piece

    def interrupted(text: str) -> None:
        printed(text)
        pieces.append(text) if text.strip() else None
        if text.strip() and len(pieces) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat, "print_piece", interrupted)
    saved = tmp_path / "chat.jsonl"
    said = talk(taught("template"), KeyboardInterrupt(), "one", "two", f"/save {saved}")
    assert said.code == 0, said.text
    assert "(stopped" in said.text
    assert "Ctrl+D ends" in said.text
    turns = json.loads(saved.read_text())["messages"]
    assert [turn["content"] for turn in turns[::2]] == ["one", "two"]
    assert turns[1]["content"] == pieces[0]  # what had come by then
    assert turns[3]["content"]


def test_cut_and_empty_answers_are_marked_and_errors_do_not_end_the_conversation(tiny_llama, talk, tmp_path):
    said = talk(tiny_llama, "one", "x " * 400, "/nonsense", "/save", "two", f"/save {tmp_path / 'saved'}")
    assert said.code == 0
    assert "(cut after 6 tokens" in said.text
    saved = json.loads((tmp_path / "saved").read_text())["messages"]
    assert [turn["content"] for turn in saved[::2]] == ["one", "two"]  # the one that failed is taken back
    talk(tiny_llama, '"""a', "", 'b"""', f"/save {tmp_path / 'lines'}")
    assert json.loads((tmp_path / "lines").read_text())["messages"][0]["content"] == "a\n\nb"
    assert "the model sees 256 at most" in said.text
    assert "there is no command /nonsense" in said.text
    empty = talk(with_end_first(tiny_llama, tmp_path / "base"), "one")
    assert "(the completion is empty: the model ended it at once" in empty.text


def test_without_a_template_each_message_is_completed_by_itself_and_that_is_said(taught, talk):
    adapter = taught("raw")
    said = talk(adapter, "one", "two")
    assert said.out.splitlines() == [by_transformers(adapter, text, 6) for text in ("one", "two")]
    assert "nothing is remembered" in said.text


def test_in_a_terminal_lines_are_edited_and_ctrl_c_and_ctrl_d_do_what_people_expect(tiny_llama):
    """A real terminal: arrow keys edit the line, Ctrl+C while typing drops it, Ctrl+D ends with exit code 0."""
    ours, theirs = pty.openpty()
    begin = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # it may be ignored here
    begin += "runpy.run_module('lora_cli', run_name='__main__', alter_sys=True)"
    words = [sys.executable, "-c", begin, "chat", str(tiny_llama), "--max-new-tokens", "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "INPUTRC": "/dev/null"}
    # A new session takes the first terminal that it opens as its own: Ctrl+C is then sent to it.
    terminal = f'exec "$@" < {os.ttyname(theirs)} > {os.ttyname(theirs)} 2>&1'
    child = subprocess.Popen(["sh", "-c", terminal, "sh", *words], env=environment, start_new_session=True)
    seen = ""

    def wait_for(text: str, *, key: bytes = b"") -> None:
        """key: pressed until the text comes. Python loses a Ctrl+C just before it waits for the next key."""
        nonlocal seen
        end = time.monotonic() + 90
        while text not in seen:
            assert time.monotonic() < end, f"{text!r} did not come: {seen!r}"
            os.write(ours, key)
            if select.select([ours], [], [], 2 if key else 1)[0]:
                seen += os.read(ours, 4096).decode(errors="replace")
        seen = seen[seen.index(text) + len(text) :]

    try:
        wait_for("> ")
        os.write(ours, b"ne\x1b[D\x1b[Do\r")  # left, left: becomes "one"
        wait_for("(cut after 4 tokens")
        wait_for("> ")
        os.write(ours, b"\x1b[A")  # up: the last line again, as it was edited
        wait_for("one")
        time.sleep(0.5)
        wait_for("Ctrl+D ends the conversation", key=b"\x03")
        wait_for("> ")
        os.write(ours, b"\x04")
        assert child.wait(60) == 0
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
        os.close(ours)
        os.close(theirs)
