"""The model's words: the true ones of base and adapter, of the right prompts, and without any trace in the training."""

from __future__ import annotations

import json
import os
import random
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import quiet_console, refusal, write_rows

from lora_cli.data.chat.template import ChatTemplate
from lora_cli.errors import Interrupted
from lora_cli.evaluation.generation import Completion
from lora_cli.recipe import load_recipe
from lora_cli.training import sampler
from lora_cli.training.report_page import report_page
from lora_cli.training.run_folder import read_samples
from lora_cli.training.train import train

SETTINGS: dict[str, Any] = {
    "adapter": {"dropout": 0.2},
    "data": {"validation": 0.25},
    "train": {"max_steps": 6, "eval_every": 3, "checkpoint_every": 2},
}
MEASURED = ("seconds", "tokens_per_second", "peak_memory_bytes")


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that learned nothing never ends an answer."""
    monkeypatch.setattr(sampler, "MOST_NEW_TOKENS", 12)


def with_samples(every: int | None = 2, samples: Any = 3, **settings: Any) -> dict[str, Any]:
    merged = {name: SETTINGS.get(name, {}) | settings.get(name, {}) for name in ("adapter", "data", "train")}
    merged["train"] |= {"sample_every": every, "samples": samples} if every else {}
    return settings | merged


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def assert_same_training(run: Path, other: Path) -> None:
    assert metrics(run) == metrics(other)
    last = sorted((run / "checkpoints").glob("step_*"))[-1].name
    names = [f"{place}/adapter_model.safetensors" for place in ("adapter", "adapter_last")]
    for name in names + [f"checkpoints/{last}/{each}.safetensors" for each in ("adapter", "optimizer", "state")]:
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    values = [json.loads((each / "checkpoints" / last / "state.json").read_text()) for each in (run, other)]
    for each in values:
        del each["seconds"], each["peak_memory_bytes"]
    assert values[0] == values[1]


# ── E6 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train": {"optimizer": "schedule_free_adamw"}},
        {"quantization": "nf4", "train": {"gradient_checkpointing": "full"}},
        {"base_model": "gpt2"},
    ],
    ids=["dropout", "schedule-free", "nf4-recomputed", "gpt2-bf16"],
)
def test_a_run_with_samples_is_byte_for_byte_one_without(run_recipe, tmp_path, monkeypatch, tiny_gpt2, settings):
    if settings.get("base_model"):
        settings = settings | {"base_model": str(tiny_gpt2), "dtype": "bf16"}
    own = sampler.complete

    def draws(*arguments: Any, **options: Any) -> Any:
        """As a model's own code may."""
        random.random(), np.random.rand(), torch.rand(1)
        return own(*arguments, **options)

    monkeypatch.setattr(sampler, "complete", draws)
    run, _ = run_recipe(**with_samples(2, **settings), output=str(tmp_path / "with"))
    other, _ = run_recipe(**with_samples(None, **settings), output=str(tmp_path / "without"))
    assert sorted({each.step for each in read_samples(run / "samples.jsonl")})[:4] == [0, 2, 4, 6]
    assert not (other / "samples.jsonl").exists()
    assert_same_training(run, other)


def test_the_time_of_samples_is_no_step_s(run_recipe, monkeypatch):
    import time

    own = sampler.complete
    monkeypatch.setattr(sampler, "complete", lambda *a, **o: (time.sleep(0.1), own(*a, **o))[1])
    _, report = run_recipe(**with_samples(1))
    assert report["seconds"] < 6 * 3 * 0.1


# ── whose words ─────────────────────────────────────────────────────────────────────────────────────────────────


def greedy(model: Any, ids: list[int], most: int = 12) -> list[int]:
    """What transformers itself answers, without a cache."""
    found = list(ids)
    with torch.no_grad():
        while len(found) < len(ids) + most and (len(found) == len(ids) or found[-1] != 0):
            found.append(int(model(input_ids=torch.tensor([found])).logits[0, -1].argmax()))
    return found[len(ids) :]


def test_the_words_are_those_that_transformers_and_peft_give(run_recipe, tiny_llama, tokenizer):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run, report = run_recipe(**with_samples(5, adapter={"target_modules": "all-linear"}, train={"learning_rate": 0.02}))
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    before = {each["prompt"]: greedy(base, tokenizer(each["prompt"])["input_ids"]) for each in report["samples"]}
    tuned = PeftModel.from_pretrained(base, run / "adapter")
    assert len(report["samples"]) == 3
    for each in report["samples"]:
        ids = tokenizer(each["prompt"])["input_ids"]
        for words, answer in ((each["base"], before[each["prompt"]]), (each["adapter"], greedy(tuned, ids))):
            cut = "" if answer[-1] == 0 else " …"
            assert words == tokenizer.decode(answer, skip_special_tokens=True) + cut
        assert each["base"] != each["adapter"]
        assert re.fullmatch(r"\d plus \d+ is \d+\.", each["wanted"])


@pytest.mark.parametrize("optimizer", ["adamw", "schedule_free_adamw"])
def test_the_last_words_are_those_of_the_adapter_that_is_kept(run_recipe, lora, monkeypatch, optimizer):
    """The best is of a step without samples; `lora generate` says the same."""
    from lora_cli.training.validation import Validator

    def best_at_three(self: Any, state: Any) -> tuple[float, bool]:
        best = state.step == 3
        state.last_validation_loss = 1.0
        if best:
            state.best_validation_loss, state.best_step = 0.5, 3
            state.tensors["validation.best"] = state.tensors["validation.base"] - 1
        return 1.0, best

    monkeypatch.setattr(Validator, "score_step", best_at_three)
    run, report = run_recipe(**with_samples(2, train={"learning_rate": 0.02, "optimizer": optimizer}))
    steps = [each["step"] for each in report["samples"][0]["steps"]]
    assert steps == [2, 3, 4, 6]
    for each in report["samples"]:
        assert each["adapter"] == each["steps"][1]["text"]
        answer = json.loads(lora("generate", run, each["prompt"], "--max-new-tokens", 12, "--json").out)
        assert answer["completion"] + ("" if answer["stop"] else " …") == each["adapter"]


def test_with_a_chat_template_a_validation_row_prompts_as_generate_does(run_recipe, lora, tmp_path, tokenizer):
    rows = [
        {"messages": [{"role": "user", "content": f"Add {n} and 2."}, {"role": "assistant", "content": f"{n + 2}"}]}
        for n in range(20)
    ]
    data = {"train": str(write_rows(tmp_path / "chat.jsonl", rows)), "template": "chatml", "max_seq_len": 128}
    run, report = run_recipe(**with_samples(4, 2, data=data))
    assert len(report["samples"]) == 2
    for each in report["samples"]:
        number = re.fullmatch(r"Add (\d+) and 2\.", each["prompt"])
        assert number, "without what the template writes around it"
        assert each["wanted"] == str(int(number[1]) + 2)
        answer = json.loads(lora("generate", run, each["prompt"], "--max-new-tokens", 12, "--json").out)
        assert answer["prompting"] == "template"
        assert answer["completion"] + ("" if answer["stop"] else " …") == each["adapter"]


PROMPTS = {
    "prompts.txt": "Add 3 and 2.\n\n  Add 5 and 2.\n",
    "prompts.jsonl": '{"prompt": "Add 3 and 2.", "completion": "5"}\n'
    '{"messages": [{"role": "user", "content": "Add 5 and 2."}, {"role": "assistant", "content": "7"}]}\n',
    "prompts.csv": "prompt,completion\nAdd 3 and 2.,5\nAdd 5 and 2.,7\n",
}


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_of_prompts_goes_through_the_template_of_the_run(run_recipe, tmp_path, monkeypatch, name, streaming):
    (tmp_path / name).write_text(PROMPTS[name])
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(20)
    ]
    data = {"train": str(write_rows(tmp_path / "chat.jsonl", rows)), "template": "chatml", "max_seq_len": 128}
    seen: list[str] = []

    def complete(_model: Any, tokenizer: Any, prompts: Any, config: Any, **_: Any) -> list[Completion]:
        seen.append(tokenizer.decode(prompts[0]))
        return [Completion("yes", "<|im_end|>", 2)]

    monkeypatch.setattr(sampler, "complete", complete)
    data |= {"streaming": streaming, "validation": None}
    settings = with_samples(9, name, data=data, train={"eval_every": None})
    _, report = run_recipe(**settings)
    asked = [f"<|im_start|>user\nAdd {n} and 2.<|im_end|>\n<|im_start|>assistant\n" for n in (3, 5)]
    assert seen == asked * 2
    wanted = ["5", "7"] if name != "prompts.txt" else [None, None]
    assert [(each["prompt"], each["wanted"]) for each in report["samples"]] == [
        ("Add 3 and 2.", wanted[0]),
        ("Add 5 and 2.", wanted[1]),
    ]


def test_of_text_the_beginning_of_an_example_is_the_prompt(run_recipe, tmp_path):
    rows = [{"text": f"The {n}th of the ferries has not come yet, and the river is quiet."} for n in range(20)]
    _, report = run_recipe(**with_samples(9, 2, data={"train": str(write_rows(tmp_path / "text.jsonl", rows))}))
    for each in report["samples"]:
        assert (each["prompt"] + each["wanted"]) in [row["text"] for row in rows]
        assert each["prompt"]


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────


REFUSED = {
    '{"question": "why?"}\n': ("the row has neither prompt nor messages", "row 1"),
    '{"messages": [{"role": "user", "content": "why?"}]}\n': (
        "messages are for a model that is prompted through a chat template",
        "row 1",
    ),
    '{"prompt": "' + "why? " * 400 + '"}\n': ("but the model sees 256 at most", "row 1"),
    '{"prompt": "why?"}\n' * 51: ("51 prompts, but samples are made of 50 at most", "prompts.jsonl"),
}


@pytest.mark.parametrize("content", REFUSED, ids=["no prompt", "no template", "too long", "too many"])
def test_a_file_that_gives_no_prompts_is_refused_before_the_model_is_loaded(recipe_file, lora, tmp_path, content):
    (tmp_path / "prompts.jsonl").write_text(content)
    recipe = recipe_file(**with_samples(2, "prompts.jsonl"))
    what, where = REFUSED[content]
    problem = refusal(lambda: train(load_recipe(recipe), quiet_console()))
    assert what in problem.what
    assert where in str(problem.where)
    assert what in lora("check", recipe).error
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "why?"}\n')
    assert lora("check", recipe).code == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"data": {"validation": None}, "train": {"sample_every": 1}}, "name a file of prompts in train.samples"),
        ({"train": {"samples": 2}}, "set train.sample_every"),
        ({"train": {"sample_every": 1, "shard_base": True}}, "remove sample_every, or shard_base"),
        ({"train": {"sample_every": 1, "samples": 51}}, "samples"),
    ],
)
def test_settings_that_do_not_fit_are_refused(recipe_file, settings, says):
    path = recipe_file(**{"data": {"validation": 0.25}, **settings})
    assert says in str(refusal(lambda: load_recipe(path)).render())


def test_a_missing_file_is_named(recipe_file):
    recipe = load_recipe(recipe_file(**with_samples(1, "nowhere.txt")))
    assert "nowhere.txt" in str(refusal(lambda: train(recipe, quiet_console())).render())


# ── interruptions ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("at", [2, 5, 11, 12])
def test_a_signal_ends_the_answers_at_once_and_they_come_first_afterwards(run_recipe, tmp_path, monkeypatch, at):
    """Of the base, of step 2, of step 6 and of the adapter that is kept, which is of step 3."""
    from lora_cli.training.validation import Validator

    own_score, own = Validator.score_step, sampler.complete

    def best_at_three(self: Any, state: Any) -> tuple[float, bool]:
        if state.step != 3:
            state.last_validation_loss = 9.0
            return 9.0, False
        return own_score(self, state)

    monkeypatch.setattr(Validator, "score_step", best_at_three)
    settings = with_samples(2, train={"sample_every": 2, "learning_rate": 0.02})
    straight, report = run_recipe(**settings, output=str(tmp_path / "straight"))
    calls = []

    def signalled(*arguments: Any, emit: Any, **options: Any) -> Any:
        def after_a_token(text: str) -> None:
            calls[-1].append(text)
            if len(calls) == at and len(calls[-1]) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            emit(text)

        calls.append([])
        return own(*arguments, emit=after_a_token, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sampler, "complete", signalled)
        with pytest.raises(Interrupted) as caught:
            run_recipe(**settings, output=str(tmp_path / "run"))
    assert caught.value.exit_code == 130
    assert len(calls[-1]) == 2, "after the token"
    run = tmp_path / "run"
    whole = (straight / "samples.jsonl").read_text().splitlines()
    if (run / "samples.jsonl").exists():
        assert (run / "samples.jsonl").read_text().splitlines() == whole[: (at - 1) // 3 * 3]
    recipe = load_recipe(tmp_path / "recipe.yaml")
    again = train(recipe, quiet_console(), resume=True)
    assert_same_training(run, straight)
    assert (run / "samples.jsonl").read_text().splitlines() == whole
    assert again["samples"] == report["samples"]


def test_a_killed_run_has_each_sample_once(run_recipe, tmp_path, monkeypatch):
    from lora_cli.training import loop

    settings = with_samples(1)
    straight, _ = run_recipe(**settings, output=str(tmp_path / "straight"))
    own = loop.Run._optimize

    class PowerCut(BaseException):
        pass

    def optimize(self: Any, step: int) -> Any:
        if step == 6:  # the newest checkpoint is of step 4, and step 5 has samples
            raise PowerCut
        return own(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_optimize", optimize)
        with pytest.raises(PowerCut):
            run_recipe(**settings, output=str(tmp_path / "run"))
    lines = (tmp_path / "run" / "samples.jsonl").read_text()
    (tmp_path / "run" / "samples.jsonl").write_text(lines.replace('"step": 2', '"step": x') + "half a li")
    run_recipe(**settings, output=str(tmp_path / "run"), resume=True)
    assert_same_training(tmp_path / "run", straight)
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == (straight / "samples.jsonl").read_bytes()


def test_other_prompts_are_asked_of_the_base_when_a_run_goes_on_with_them(run_recipe, recipe_file, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    run, _ = run_recipe(**with_samples(3, "prompts.txt"))
    (tmp_path / "prompts.txt").write_text("one\nthree\n")
    recipe = load_recipe(recipe_file(**with_samples(3, "prompts.txt")), ["train.max_steps=8"])
    report = train(recipe, quiet_console(), resume=True, allow=["train.max_steps"])
    assert [each["prompt"] for each in report["samples"]] == ["one", "three"]
    assert all(each["base"] is not None and each["adapter"] is not None for each in report["samples"])
    assert [each.step for each in read_samples(run / "samples.jsonl") if each.prompt == "three"].count(0) == 1


def test_a_model_that_cannot_answer_ends_no_run(run_recipe, tmp_path, monkeypatch):
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no cache\nfor this model")

    monkeypatch.setattr(sampler, "complete", fails)
    _, report = run_recipe(**with_samples(2))
    assert report["samples"][0]["base"] == "(none: no cache)"
    assert report["learned"]


# ── where they are shown ────────────────────────────────────────────────────────────────────────────────────────

EVIL = "<script>alert(1)</script>\x1b]0;owned\x07\u202e[red]![x](http://x)"


def test_words_of_strangers_do_nothing_on_screen_page_and_tracker(recipe_file, lora, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(sampler, "complete", lambda *_, **__: [Completion(EVIL, None, 12)])
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": EVIL, "completion": EVIL}))
    said = lora("train", recipe_file(**with_samples(3, "prompts.jsonl"), trackers=["tensorboard"]))
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", said.text)
    assert "\\x1b]0;owned" in said.text
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 6, "prompt, wanted, base, adapter, two steps"
    assert "\\x1b" in page
    events = EventAccumulator(str(tmp_path / "run" / "lora"))
    events.Reload()
    texts = events.Tensors("sample 1/text_summary")
    assert [each.step for each in texts] == [0, 3, 6]
    text = texts[0].tensor_proto.string_val[0].decode()
    assert all(line.startswith("    ") for line in text.split("\n"))
    assert text.count("<script>alert(1)") == 2
    assert "samples" not in (tmp_path / "run" / "adapter" / "README.md").read_text()


def test_words_on_screen_are_short_and_those_of_the_page_whole(run_recipe, recipe_file, lora, tmp_path):
    recipe = recipe_file(**with_samples(2))
    said = lora("train", recipe).text.splitlines()
    for name in ("prompt", "wanted", "base", "adapter"):
        assert sum(line.startswith(f"{name:9}") for line in said) >= 3
    assert all(len(line) <= 80 for line in said if line.startswith(("sample", "base  ", "prompt", "wanted")))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    page = report_page(report, title="run", recipe="", environment={}, warnings=[])
    assert "The model's words" in page
    assert page.count("during training") == 3
    assert "What is" in page


def test_without_samples_there_is_nothing_of_them(run_recipe):
    run, report = run_recipe()
    assert report["samples"] is None
    assert "words" not in report_page(report, title="run").split("</style>")[1]
    assert not list(run.rglob("samples.jsonl"))


def test_a_template_that_is_not_the_model_s_own_is_that_of_the_prompts(tokenizer):
    """Whatever training writes into a template is in the one that prompts."""
    from lora_cli.evaluation import samples

    text = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[>]"
    summary: Any = type("Summary", (), {"template": "own", "own_template": text})
    template = samples._template(summary, tokenizer)
    assert isinstance(template, ChatTemplate)
    assert samples._frame(template) == ("[user]", "[>]")
