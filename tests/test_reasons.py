"""Where several reasons hold, the one that helps is given; and what a fix names works when it is followed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows

from lora_cli import boundary
from lora_cli.cli import app


@pytest.fixture
def lora(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command line in this process; returns exit code and what was said on stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> tuple[int, str]:
        capsys.readouterr()
        code = boundary.run(app, [str(each) for each in arguments])
        return code, capsys.readouterr().err

    return run


UNKNOWN_ROLE = {"messages": [{"role": "narrator", "content": "a"}, {"role": "assistant", "content": "b"}]}
REFUSED = {
    "an unknown role": (UNKNOWN_ROLE, {}, 2, "narrator"),
    "no target token": ({"prompt": "a", "completion": ""}, {}, 3, "no target token"),
    "empty rows": ({"text": ""}, {}, 3, "empty"),
    "a type": ({"text": 7}, {}, 2, "text"),
    "too long": ({"text": "a b c d " * 40}, {"max_seq_len": 16}, 3, "max_seq_len"),
    "a template that raises": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"template": "raises.jinja"},
        2,
        "not for you",
    ),
    "left out": ({"text": "a", "train": False}, {}, 2, "no row is left to train on"),
    "dropped": ({"text": "a b c d " * 40}, {"max_seq_len": 16, "too_long": "drop"}, 2, "no row is left to train on"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("good", [0, 1])
@pytest.mark.parametrize("verb", ["check", "train"])
def test_why_rows_are_refused_is_said_before_what_follows_from_it(lora, recipe_file, tmp_path, case, good, verb):
    """With a fraction for validation, and none or one row of 20 left, the fraction is not the reason."""
    row, settings, code, reason = REFUSED[case]
    (tmp_path / "raises.jinja").write_text("{{ raise_exception('not for you') }}")
    if case in ("left out", "dropped"):
        good = 0
    kind = {key: "fine" for key in row if key in ("text", "prompt", "completion")}
    fine = kind or {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "fine"}]}
    data = write_rows(tmp_path / "rows.jsonl", [fine] * good + [row] * (20 - good))
    recipe = recipe_file(data={"train": str(data), "validation": 0.125, **settings})
    ended, said = lora(verb, recipe)
    assert ended == code, said
    assert reason in said
    assert "0.125" not in said
    assert "fix: " in said


@pytest.mark.parametrize(("rows", "fraction"), [(10, 0.01), (3, 0.9), (2, 0.2)])
def test_the_fraction_that_is_suggested_works(lora, recipe_file, tmp_path, rows, fraction):
    data = write_rows(tmp_path / "rows.jsonl", [{"text": f"row {at} of them"} for at in range(rows)])
    recipe = recipe_file(data={"train": str(data), "validation": fraction})
    code, said = lora("check", recipe)
    assert code == 2
    suggested = re.search(r"write (data\.validation): ([\d.]+)", said)
    assert suggested
    code, said = lora("check", recipe, "--set", f"{suggested[1]}={suggested[2]}")
    assert code == 0, said


# ── suggested commands ──────────────────────────────────────────────────────────────────────────────────────────


def suggested(said: str) -> list[str]:
    """The words of the `lora` command that a fix names, as a shell would split them."""
    found = re.search(r"(lora (?:train|check) .*?)(?:; or |$)", said, re.MULTILINE)
    assert found, said
    return shlex.split(found[1])[1:]


AWKWARD = ["plain", "two words", "x; touch pwned", "$(touch pwned)", "it's", "-n"]


ENDS = [{"max_steps": 2, "epochs": 10}, {"max_steps": 400, "epochs": 0.2}, {"max_steps": None, "epochs": 0.2}]


@pytest.mark.parametrize(
    ("name", "settings"), [*((name, ENDS[0]) for name in AWKWARD), *(("plain", end) for end in ENDS[1:])]
)
def test_a_finished_run_is_trained_longer_by_the_command_that_the_error_names(
    lora, recipe_file, tmp_path, name, settings
):
    run = tmp_path / name.replace("$", "$$")
    recipe = recipe_file(output=str(run), train=settings)
    run = tmp_path / name
    assert lora("train", recipe)[0] == 0
    steps = json.loads((run / "report.json").read_text())["steps"]
    code, said = lora("train", recipe)
    assert code == 2
    assert "already holds a finished run" in said
    again = suggested(said)
    code, said = lora("train", run / "recipe.yaml", "--resume")
    assert code == 2
    assert suggested(said) == again
    code, said = lora(*again)
    assert code == 0, said
    assert json.loads((run / "report.json").read_text())["steps"] > steps
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", AWKWARD)
def test_a_run_that_was_stopped_goes_on_by_the_command_that_the_error_names(lora, recipe_file, tmp_path, name):
    recipe = recipe_file(output=str(tmp_path / name.replace("$", "$$")), train={"max_steps": 3})
    code, said = lora("train", recipe, "--max-hours", "1e-9")
    assert code == 130
    assert not (tmp_path / name / "report.json").exists()
    stopped = suggested(said)
    code, said = lora("train", recipe)
    assert code == 2
    assert "already holds a run" in said
    assert suggested(said) == stopped
    code, said = lora("generate", "hi", "--run", tmp_path / name)
    assert code == 2
    assert suggested(said) == stopped
    assert lora(*stopped)[0] == 0
    assert (tmp_path / name / "report.json").exists()


@pytest.mark.parametrize("name", ["r;touch pwned.yaml", "a b.yaml", "-r.yaml", "a\n#b.yaml"])
def test_what_init_says_to_run_next_can_be_pasted(tiny_gpt2, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [{"text": f"this is row {at} of them"} for at in range(40)])
    assert boundary.run(app, ["init", str(tiny_gpt2), "rows.jsonl", f"--output=./{name}", "--gpu", "12GB"]) == 0
    said = capsys.readouterr().out
    line = next(each for each in said.splitlines() if each.startswith("next: "))
    words = shlex.split(line.removeprefix("next: ").partition("  ")[0])
    assert words[:2] == ["lora", "check"]
    if "\n" not in name:
        assert words[2] == name
    assert boundary.run(app, ["check", name if name[0] != "-" else f"./{name}"]) == 0
    assert len(list(tmp_path.glob("*.yaml"))) == 1


def test_packages_are_named_with_the_pins_that_were_tested(recipe_file, monkeypatch):
    from conftest import ROOT

    from lora_cli.errors import LoraError
    from lora_cli.training import trackers

    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    for name in ("tensorboard", "wandb", "mlflow", "trackio"):
        with pytest.raises(LoraError) as refused:
            trackers.require_trackers([name])
        assert f"pip install {name}=={pins[name]}" in str(refused.value.fix)


# ── recipes ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("home", ["~nosuchuser/run", "~nosuchuser", "${NOSUCH_USER}/run"])
def test_a_home_folder_that_is_not_known_is_refused_and_no_folder_of_that_name_is_made(
    lora, recipe_file, tmp_path, home, monkeypatch
):
    monkeypatch.setenv("NOSUCH_USER", "~nosuchuser")
    for verb in ("train", "check"):
        code, said = lora(verb, recipe_file(), "--set", f"output={home}")
        assert code == 2
        assert "there is no user nosuchuser here" in said
        assert not list(tmp_path.glob("~*"))
    code, said = lora("merge", tmp_path, "--output", "~nosuchuser/merged")
    assert code == 2
    assert "there is no user nosuchuser here" in said
    wanted = re.search(r"write (\./~\w+)", said)
    assert wanted
    assert lora("train", recipe_file(), "--set", f"output={wanted[1]}")[0] == 0
    assert (tmp_path / "~nosuchuser" / "report.json").exists()


def test_home_that_is_not_known_at_all(monkeypatch):
    from lora_cli.errors import LoraError, home_expanded

    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as without HOME and without an entry in passwd
    with pytest.raises(LoraError, match="HOME is not set"):
        home_expanded("~/run")
    assert home_expanded("./~/run") == "./~/run"


VALUES = ["x y", -1, 1e99, True, None, [], {}, [{}], {"a": {"b": 1}}, "", 0.5]


@pytest.mark.parametrize("key", [".".join(key) for key in __import__("lora_cli.recipe").recipe.all_keys()])
def test_what_an_error_says_to_write_for_a_setting_is_accepted(tmp_path, key):
    """For wrong values of every kind: with the fix followed, there is no problem of that setting left."""
    import yaml

    from lora_cli.errors import LoraError, RecipeErrors
    from lora_cli.recipe import load_recipe

    section, _, leaf = key.rpartition(".")

    def problems(values: dict[str, Any]) -> list[LoraError]:
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
        try:
            load_recipe(tmp_path / "r.yaml")
        except RecipeErrors as errors:
            return errors.problems
        except LoraError as error:
            return [error]
        return []

    followed = 0
    for value in [*VALUES, ...]:  # ...: the setting is missing
        recipe: dict[str, Any] = {"base_model": "a/b", "data": {"train": "x.jsonl"}, "output": "run"}
        place = recipe.setdefault(section, {}) if section else recipe
        if value is ...:
            place.pop(leaf, None)
        else:
            place[leaf] = value
        for problem in problems(recipe):
            found = re.search(rf"(?:write|add), for example, {leaf}: (.*)$", problem.fix or "")
            removal = re.search(rf"remove (?:{leaf}\b|it$)", problem.fix or "")
            if not problem.what.startswith(f"{key} is ") or not (found or removal):
                continue
            followed += 1
            if found:
                place[leaf] = yaml.safe_load(found[1])
            else:
                place.pop(leaf)
            assert not [each for each in problems(recipe) if each.what.startswith(f"{key} is ")]
            break
    assert followed


@pytest.mark.parametrize(
    "row",
    [
        {"Question": "How many?", "Answer": "Four."},
        {"task": "Add.", "context": "2 and 2", "answer": "Four.", "question": "How many?"},
        {"text": "a", "prompt": "b", "completion": "c"},
    ],
)
def test_the_fix_for_a_file_to_evaluate_on_works_without_a_recipe(lora, tiny_llama, tmp_path, row):
    data = write_rows(tmp_path / "rows.jsonl", [row] * 3)
    code, said = lora("eval", "--model", tiny_llama, "--data", data)
    assert code == 2, said
    assert "fits no format" in said or "fit no format" in said or "fit more than one format" in said
    fix = said.partition("fix: ")[2]
    assert "data." not in fix
    renamed = dict(re.findall(r"(\w+) to (\w+)", fix)) or {"text": None}
    row = {renamed.get(name, name): value for name, value in row.items() if renamed.get(name, name)}
    assert lora("eval", "--model", tiny_llama, "--data", write_rows(tmp_path / "renamed.jsonl", [row] * 3))[0] == 0
