"""The whole job on a real model, as `make demo` runs it: prepare, measure, train in 4-bit, measure again, merge.

    python scripts/demo.py

Everything is a `lora` command that you can type yourself, but for the model and data it makes and the SQL it scores.
Nothing outside build/ and runs/ is written. A second run starts afresh.
"""

from __future__ import annotations

import json
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from real_model import make_real_model
from rich.console import Console
from text_to_sql import execution_accuracy

ROOT = Path(__file__).parents[1]
MODEL, DATA = ROOT / "build" / "smollm2-135m-instruct", ROOT / "build" / "text-to-sql"
RECIPE, RUN = ROOT / "configs" / "demo-text-to-sql.yaml", ROOT / "runs" / "demo-text-to-sql"
MERGED = ROOT / "runs" / "demo-text-to-sql-merged"
LORA = [sys.executable, "-m", "lora_cli"]

console = Console(stderr=True)


def say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def heading(text: str) -> None:
    console.print(f"\n[bold]{text}[/]")


def lora(*arguments: str) -> str:
    """Run a `lora` command in sight of the person; returns what it printed on stdout."""
    shown = " ".join(str(Path(a).relative_to(ROOT)) if a.startswith(str(ROOT)) else shlex.quote(a) for a in arguments)
    say(f"$ lora {shown}")
    done = subprocess.run([*LORA, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def answers(rows: list[dict[str, str]], adapter: Path | None) -> list[str]:
    """What the 4-bit base model, with or without the adapter, writes for every question, greedily."""
    from lora_cli.adapters.opened import open_model
    from lora_cli.base.load import quiet_libraries
    from lora_cli.evaluation.generation import complete, generation_config

    quiet_libraries()
    opened = open_model(str(MODEL), adapter, quantization="nf4")
    config = generation_config(opened.model, opened.tokenizer, max_new_tokens=48)
    found: list[str] = []
    with console.status("answering") as status:
        for start in range(0, len(rows), 50):
            prompts = [row["prompt"] for row in rows[start : start + 50]]
            found += [each.text for each in complete(opened.model, opened.tokenizer, prompts, config)]
            status.update(f"answering: {len(found)} of {len(rows)}")
    return found


def show(rows: list[dict[str, str]], before: list[str], after: list[str], count: int = 3) -> None:
    for row, old, new in list(zip(rows, before, after, strict=True))[:count]:
        say(f"\n{row['prompt']}")
        for name, text in (("before", old), ("after", new), ("right", row["completion"])):
            say(f"  {name:7}{' '.join(text.split())[:100]}")


def main() -> None:
    started = time.monotonic()
    shutil.rmtree(RUN, ignore_errors=True)
    shutil.rmtree(MERGED, ignore_errors=True)
    heading("1  A real model and a data set")
    make_real_model(MODEL, ROOT / "build" / "downloads")
    subprocess.run([sys.executable, ROOT / "scripts" / "text_to_sql.py", "--output", DATA], check=True)
    rows = [json.loads(line) for line in (DATA / "validation.jsonl").read_text().splitlines()]
    ready = time.monotonic()

    heading("2  Before: SQL about databases that training never shows")
    before = answers(rows, None)
    accuracy_before = execution_accuracy(rows, before)
    say(f"execution accuracy {accuracy_before:.0%} of {len(rows)} questions")

    heading("3  Training in 4-bit")
    report = json.loads(lora("train", str(RECIPE), "--json"))

    heading("4  After")
    after = answers(rows, RUN)
    accuracy_after = execution_accuracy(rows, after)
    say(f"execution accuracy {accuracy_after:.0%} of {len(rows)} questions")
    scores = json.loads(lora("eval", str(RUN), "--json"))
    show(rows, before, after)

    heading("5  The merged model, an ordinary folder, answers")
    merged = json.loads(lora("merge", str(RUN), "--output", str(MERGED), "--json"))
    prompt = "Table dogs(id, name, breed, weight)\nQuestion: How many dogs have a weight above 20?\nSQL:"
    say(lora("generate", str(MERGED), prompt, "--max-new-tokens", "48").rstrip())

    heading("Result")
    perplexity = scores["base"]["perplexity"], scores["adapter"]["perplexity"]
    largest = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024
    for name, text in (
        (
            "validation perplexity",
            f"{perplexity[0]:.2f} → {perplexity[1]:.2f} ({1 - perplexity[1] / perplexity[0]:.0%} lower)",
        ),
        ("execution accuracy", f"{accuracy_before:.0%} → {accuracy_after:.0%} on held-out databases"),
        ("merged model", f"keeps {merged['kept']:.1%} of the adapter's effect (KL {merged['kl']:.1e} nats a token)"),
        ("training", f"{report['steps']} steps, {report['tokens_per_second']:,.0f} tokens/s"),
        (
            "peak memory",
            f"{_gib(report['peak_memory_bytes'])} in training, {_gib(largest)} in the largest process of all",
        ),
        (
            "wall time",
            f"{_minutes(time.monotonic() - started)}, of which {_minutes(ready - started)} for model and data",
        ),
    ):
        say(f"  {name:23}{text}")


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02d} min"


if __name__ == "__main__":
    main()
