"""Random recipes and damaged files: each ends in a valid result, or in an error of what, where and how to mend it.

    python tests/fuzz/fuzz.py [recipes|damage|strangers] [--count N] [--first N] [--seed S] [--only N]

recipes   10,000 mutations of valid recipes, by value, by text and by --set, to `lora check` and `lora train`
damage    2,000 damaged adapters, run folders, data files and base models, to the commands that open them
strangers 3,000 files that are whole but odd: models, tokenizers, templates, generation settings, column types, links
          and pipes in run folders, status files

A case fails when it ends in a traceback, a signal or exit code 1, takes more than 10 seconds of processor time or
waits as long for nothing, gives an error that is not of the form what / where / fix, calls something done that is not
valid, or writes outside the output folder; a run that resumes from damage must also give the bytes of the run that was
never damaged. A run that is valid and would take hours is interrupted after a few seconds, as by Ctrl+C.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import fuzz_damage
import fuzz_recipes
import fuzz_strangers
from fuzz_process import Result, import_everything, listing, run_all

ROOT = Path(__file__).parents[2]
COUNTS = {"recipes": 10_000, "damage": 2_000, "strangers": 3_000}
MAKE_CASE = {"recipes": fuzz_recipes.make_case, "damage": fuzz_damage.make_case, "strangers": fuzz_strangers.make_case}
prepare_once = cache(fuzz_damage.prepare)
WATCHED = ("tests/data", "configs")  # of the repository; no case may change them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", nargs="?", choices=list(COUNTS), help="default: all")
    parser.add_argument(
        "--count", type=int, help="how many cases; default: 10,000 recipes, 2,000 damaged files, 3,000 odd ones"
    )
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to go on with a run that ended")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="just the case of this number, and all that it says")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lora-fuzz-"))
    try:
        failed = [run(name, folder, arguments) for name in ([arguments.section] if arguments.section else COUNTS)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(int(any(failed)))


def run(section: str, folder: Path, arguments: Any) -> bool:
    """Whether any case of a section failed."""
    warm_up_once(folder)
    if section != "recipes":
        prepare_once(folder, arguments.workers)
    make_case = MAKE_CASE[section]
    count = arguments.count or COUNTS[section]
    first = arguments.first
    numbers = range(first, first + count) if arguments.only is None else [arguments.only]
    results: list[Result] = []
    before = {place: listing(ROOT / place) for place in WATCHED} | {"hf": listing(folder / "hf")}
    started = time.monotonic()

    def done(result: Result) -> None:
        results.append(result)
        if result.problem is not None:
            print(f"\n{describe(result, arguments.seed)}", flush=True)
        elif len(results) % 500 == 0:
            print(f"{len(results):,} of {count:,}", file=sys.stderr, flush=True)

    run_all([partial(make_case, arguments.seed, number) for number in numbers], folder, done, arguments.workers)
    after = {place: listing(ROOT / place) for place in WATCHED} | {"hf": listing(folder / "hf")}
    changed = [place for place in before if before[place] != after[place]]
    if arguments.only is not None:
        for result in results:
            print(result.case.words, result.stdout, result.stderr, sep="\n")
    summarize(section, results, time.monotonic() - started)
    if changed:
        print(f"failed: {', '.join(changed)} was written to")
    return bool(changed) or any(result.problem for result in results)


@cache
def warm_up_once(folder: Path) -> None:
    recipe = str(ROOT / "configs/smoke-tiny-gpt2.yaml")
    steps = ["--set", "train.max_steps=1"]
    run = str(folder / "warm3")
    commands = [
        ["check", recipe, "--set", f"output={folder / 'warm1'}"],
        ["train", recipe, "--set", f"output={folder / 'warm2'}", *steps],
        ["train", recipe, "--set", f"output={run}", *steps, "--set", "quantization=none"],
        ["eval", run],
        ["merge", run, "--output", str(folder / "merged")],
        ["generate", "one and one", "--run", run, "--max-new-tokens", "2"],
    ]
    import_everything(folder, commands)


def describe(result: Result, seed: int) -> str:
    section, number = result.case.name.split("/")
    said = "\n".join(f"    {line[:200]}" for line in result.stderr.strip().splitlines()[-40 if result.hung else -12 :])
    return (
        f"failed: {result.case.name}: {result.problem}\n  done to it: {result.case.told}\n"
        f"  ran: lora {result.case.words[0]}\n{said}\n"
        f"  again: python tests/fuzz/fuzz.py {section} --seed {seed} --only {number}"
    )


def summarize(section: str, results: list[Result], seconds: float) -> None:
    commands = list(dict.fromkeys(result.case.words[0] for result in results))
    outcomes = Counter((result.outcome, result.case.words[0]) for result in results)
    print(f"\n{section}: {len(results):,} cases in {seconds / 60:.1f} min")
    print(f"  {'':20}{'all':>8}" + "".join(f"{command:>10}" for command in commands))
    for outcome in ("done", "refused", "stopped by a check", "interrupted", "failed"):
        each = [outcomes[outcome, command] for command in commands]
        print(f"  {outcome:20}{sum(each):8,}" + "".join(f"{number:10,}" for number in each))
    print("  slowest:")
    for result in sorted(results, key=lambda each: -each.seconds)[:5]:
        ran = f"lora {result.case.words[0]}, {result.outcome}"
        print(f"    {result.seconds:5.1f} s  {result.case.name}: {ran}; {result.case.told[:100]}")


if __name__ == "__main__":
    main()
