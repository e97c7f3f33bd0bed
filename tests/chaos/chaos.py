"""Kills runs in every way, resumes them, and compares the result with the run that nobody disturbed.

    python tests/chaos/chaos.py [--kills 300] [--seed 0] [--workers 2] [--keep FOLDER]

A run of a tiny GPT-2 with everything on that could make a resumed run another run: NF4, 8-bit optimizer, dropout,
packing, accumulation, several epochs, evaluation, checkpoints. It is disturbed once to four times, resumed after each
time, and must end with the same bytes as the straight run: adapters, optimizer and random states, and all of
metrics.jsonl but what was measured with a clock. The clock writes checkpoints, too. Every end but that by SIGKILL has
to say what happened where it can be heard, and a damaged checkpoint has to be told. How a run is disturbed:

SIGKILL          at a random moment of its life, from the start of the process on
SIGKILL, write   at a random one of its writes: before it, after it, or with half of it on the disk
SIGTERM, SIGINT, SIGHUP  at a random moment
dead stderr      what it says goes into a pipe that nobody reads; SIGTERM at a random moment
full log         what it says goes onto a full disk; SIGTERM at a random moment
I/O error        a random one of its writes fails
full disk        its file system (a small tmpfs; without the right to mount one, a limit on the size of files) fills up
torn write       SIGKILL, and then the newest checkpoint has a file cut short or a bit flipped

Each life is a process of its own, forked from one that has imported the libraries, so that a life costs no import. Same
seed, same disturbances; where the moments fall depends on the machine. Exit code 1 if a single run is another.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # sums in one order, and no threads that a fork would lose

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ("seconds", "tokens_per_second", "peak_memory_bytes")
KINDS = ("SIGKILL", "SIGKILL, write", "SIGTERM", "SIGINT", "SIGHUP", "dead stderr", "full log")
KINDS += ("I/O error", "full disk", "torn write")
SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "SIGHUP": signal.SIGHUP}
DISK_BYTES = 24_000_000
ENOUGH_LIVES = 60  # for one run; more means that it makes no progress
LIFE_SECONDS = 120

RECIPE = {
    "base_model": str(ROOT / "tests" / "data" / "tiny-gpt2"),
    "quantization": "nf4",
    "adapter": {"rank": 64, "alpha": 64, "dropout": 0.1},
    "data": {"train": str(ROOT / "tests" / "data" / "smoke.jsonl"), "validation": 0.125, "max_seq_len": 96},
    "train": {
        "epochs": 100,
        "max_steps": 18,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3,
        "optimizer": "adamw_8bit",
        "lora_plus_ratio": 2,
        "eval_every": 4,
        "checkpoint_every": 3,
        "checkpoint_minutes": 0.002,
    },
}


@dataclass
class Life:
    """How one process ended: its exit code, or minus the signal; and what it said."""

    code: int
    said: str


@dataclass
class Tally:
    kills: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lives: int = 0
    runs: int = 0


# ── one life ────────────────────────────────────────────────────────────────────────────────────────────────────


def live(folder: Path, arguments: list[str], *, before: Callable[[], None] | None = None) -> int:
    """Fork a process that is `lora train …`; returns its number. before: what to do in it first."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        log = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["lora", "train", str(folder / "recipe.yaml"), *arguments]
        if before is not None:
            before()
        from lora_cli.__main__ import main

        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end_of(child: int, folder: Path, *, after: float | None = None, sent: int = 0) -> Life:
    """Wait for a life to end; send it a signal after so many seconds."""
    began = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return Life(os.waitstatus_to_exitcode(status), (folder / "said.txt").read_text(errors="replace"))
        lived = time.monotonic() - began
        if after is not None and lived > after:
            os.kill(child, sent)
            after = None
        if lived > LIFE_SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Life(1, "hangs")
        time.sleep(0.002)


def at_a_write(number: int, what: str) -> Callable[[], None]:
    """In this process, let its so manieth write fail (`error`), or kill it `before`, `after` or in the `middle`."""

    def arrange() -> None:
        from lora_cli.training import checkpoint

        count = [0]

        def disturbed(real: Callable[..., Any], half: Callable[..., None] | None = None) -> Callable[..., Any]:
            def write(*arguments: Any, **options: Any) -> Any:
                count[0] += 1
                if count[0] != number:
                    return real(*arguments, **options)
                if what == "error":
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                if what == "middle" and half is not None:
                    half(*arguments)
                elif what == "after":
                    real(*arguments, **options)
                os.kill(os.getpid(), signal.SIGKILL)

            return write

        def half_a_file(_tensors: Any, place: Path) -> None:
            place.write_bytes(os.urandom(1000))

        checkpoint.save_file = disturbed(checkpoint.save_file, half_a_file)
        os.fsync = disturbed(os.fsync)
        os.rename = disturbed(os.rename)
        os.replace = disturbed(os.replace)
        os.link = disturbed(os.link)

    return arrange


# ── disks ───────────────────────────────────────────────────────────────────────────────────────────────────────


class SmallDisk:
    """A file system of a few MB to run in, if it may be mounted."""

    def __init__(self, place: Path):
        self.place = place
        place.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
        try:
            self.mounted = subprocess.run(["mount", *options], capture_output=True, check=False).returncode == 0
        except OSError:
            self.mounted = False

    def fill(self, left: int) -> None:
        free = shutil.disk_usage(self.place).free
        with suppress(OSError), (self.place / "ballast").open("wb") as stream:  # the run may be faster: then it is full
            stream.write(bytes(max(0, free - left)))

    def empty(self) -> None:
        (self.place / "ballast").unlink(missing_ok=True)

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.place)], check=False)


def small_files(most: int) -> Callable[[], None]:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    return limit


def unheard() -> None:
    """Let stdout and stderr lead into a pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    for descriptor in (1, 2):
        os.dup2(writer, descriptor)


def on_a_full_disk() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(full, descriptor)


# ── one run ─────────────────────────────────────────────────────────────────────────────────────────────────────


def disturb(kind: str, folder: Path, rng: random.Random, seconds: float, disk: SmallDisk, resumed: list[str]) -> Life:
    moment = rng.uniform(0, 1.05 * seconds)
    if kind in ("dead stderr", "full log"):
        child = live(folder, resumed, before=unheard if kind == "dead stderr" else on_a_full_disk)
        return end_of(child, folder, after=moment, sent=signal.SIGTERM)
    if kind in ("SIGKILL", *SIGNALS, "torn write"):
        sent = SIGNALS.get(kind, signal.SIGKILL)
        life = end_of(live(folder, resumed), folder, after=moment, sent=sent)
        if kind == "torn write" and life.code == -signal.SIGKILL:
            tear(folder / "run", rng)
        return life
    if kind == "full disk":
        left = rng.randrange(20_000, 900_000)
        if disk.mounted:
            child = live(folder, resumed)
            time.sleep(moment)
            disk.fill(left)
            life = end_of(child, folder)
            disk.empty()
            return life
        return end_of(live(folder, resumed, before=small_files(left)), folder)
    what = "error" if kind == "I/O error" else rng.choice(["before", "middle", "after"])
    return end_of(live(folder, resumed, before=at_a_write(rng.randrange(1, 90), what)), folder)


def tear(run: Path, rng: random.Random) -> None:
    """Cut a file of the newest checkpoint short, or flip a bit of it. Its hard links stay whole, as copies would."""
    checkpoints = sorted((run / "checkpoints").glob("step_*"))
    files = [path for path in sorted(checkpoints[-1].rglob("*")) if path.is_file()] if checkpoints else []
    if not files:
        return
    torn = rng.choice(files)
    content = bytearray(torn.read_bytes())
    torn.unlink()
    if rng.random() < 0.5 or not content:
        torn.write_bytes(content[: rng.randrange(len(content) + 1) // 2] if content else b"x")
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        torn.write_bytes(content)


def silent(kind: str, life: Life) -> str | None:
    """What is wrong with the way a life ended; None if nothing is."""
    if "Traceback" in life.said or life.said == "hangs":
        return f"{kind}: {life.said[-2000:]}"
    allowed = {
        "SIGTERM": {143: "SIGTERM", -signal.SIGTERM: ""},  # before the program listens, the system ends it
        "SIGINT": {130: "SIGINT"},
        "SIGHUP": {129: "SIGHUP", -signal.SIGHUP: ""},
        "dead stderr": {143: "", -signal.SIGTERM: ""},  # nobody hears it: that it ends so has to be enough
        "full log": {143: "", -signal.SIGTERM: ""},
        "I/O error": {2: "the disk failed"},
        "full disk": {2: "no space left"},
    }.get(kind, {-signal.SIGKILL: ""})
    if life.code == 0 or (life.code in allowed and allowed[life.code] in life.said):
        return None
    if kind in SIGNALS and life.code == 128 + SIGNALS[kind] and "stopped" in life.said:
        return None
    if kind == "full disk" and life.code == 2 and "no disk space" in life.said:
        return None
    return f"{kind}: exit code {life.code}, and said: {life.said[-2000:]}"


def one_run(
    folder: Path, straight: Path, rng: random.Random, kinds: Iterator[str], wanted: int, seconds: float, tally: Tally
) -> None:
    """Disturb a run `wanted` times, let it end, and compare it."""
    folder.mkdir()
    disk = SmallDisk(folder / "disk")
    run = (disk.place if disk.mounted else folder) / "run"
    (folder / "run").symlink_to(run)
    write_recipe(folder, run)
    tally.runs += 1
    told: list[str] = []
    try:
        done = torn = 0
        for _ in range(ENOUGH_LIVES):
            resumed = ["--resume"] if (run / "recipe.yaml").exists() else []
            kind = next(kinds) if done < wanted else ""
            tally.lives += 1
            life = disturb(kind, folder, rng, seconds, disk, resumed) if kind else end_of(live(folder, resumed), folder)
            told.append(f"[{kind or 'undisturbed'}] {life.code}\n{life.said}")
            if kind and life.code != 0:
                done += 1
                tally.kills[kind] += 1
                torn += kind == "torn write"
            if (problem := silent(kind, life) if kind else None) is not None:
                tally.wrong.append(problem)
            if life.code == 0 or not kind or life.said == "hangs":
                break
        differs = difference(run, straight)
        if differs:
            tally.wrong.append(f"{folder.name}: {differs}\n" + "\n".join(told))
        damaged = len(list((run / "checkpoints").glob("damaged_*")))
        if damaged and "set aside" not in "\n".join(told):
            tally.wrong.append(f"{folder.name}: a damaged checkpoint was not told")
    finally:
        disk.close()


def difference(run: Path, straight: Path) -> str | None:
    """The first thing in which two runs are not the same."""

    def metrics(each: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]

    try:
        if metrics(run) != metrics(straight):
            return "other lines in metrics.jsonl"
        last = sorted((straight / "checkpoints").glob("step_*"))[-1].name
        names = [f"{place}/adapter_model.safetensors" for place in ("adapter", "adapter_last")]
        names += [f"checkpoints/{last}/{name}.safetensors" for name in ("adapter", "optimizer", "state")]
        return next(
            (f"other bytes in {n}" for n in names if (run / n).read_bytes() != (straight / n).read_bytes()), None
        )
    except OSError as error:
        return f"not complete: {error}"


def write_recipe(folder: Path, run: Path) -> None:
    (folder / "recipe.yaml").write_text(json.dumps({**RECIPE, "output": str(run)}), encoding="utf-8")


# ── all of them ─────────────────────────────────────────────────────────────────────────────────────────────────


def work(folder: Path, straight: Path, kills: int, seed: int, seconds: float) -> Tally:
    """Runs of one worker, until so many kills have landed."""
    rng, tally = random.Random(seed), Tally()
    kinds = itertools.cycle(rng.sample(KINDS, len(KINDS)))
    while sum(tally.kills.values()) < kills and len(tally.wrong) < 5:
        wanted = min(rng.randrange(1, 5), kills - sum(tally.kills.values()))
        place = folder / f"{seed}-{tally.runs}"
        one_run(place, straight, rng, kinds, wanted, seconds, tally)
        if not tally.wrong:
            shutil.rmtree(place, ignore_errors=True)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="folder to work in and to leave, to look at what went wrong")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)

    import lora_cli.training.train  # noqa: F401  (what every life would import)
    from lora_cli.base.load import quiet_libraries

    quiet_libraries()
    straight = folder / "straight"
    straight.mkdir()
    write_recipe(straight, straight / "run")
    began = time.monotonic()
    life = end_of(live(straight, []), straight)
    seconds = time.monotonic() - began
    if life.code:
        raise SystemExit(f"the straight run failed:\n{life.said}")
    shares = [
        options.kills // options.workers + (at < options.kills % options.workers) for at in range(options.workers)
    ]
    children = []
    for at, share in enumerate(shares):
        child = os.fork()
        if not child:
            tally = work(folder, straight / "run", share, options.seed * 1000 + at, seconds)
            result = {"kills": tally.kills, "wrong": tally.wrong, "lives": tally.lives, "runs": tally.runs}
            (folder / f"tally-{at}.json").write_text(json.dumps(result))
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    results = [json.loads((folder / f"tally-{at}.json").read_text()) for at in range(options.workers)]
    kills = sum((Counter(each["kills"]) for each in results), Counter())
    wrong = [problem for each in results for problem in each["wrong"]]
    for kind in KINDS:
        print(f"{kind:16}{kills[kind]:5}")
    runs, lives = sum(each["runs"] for each in results), sum(each["lives"] for each in results)
    minutes = (time.monotonic() - began) / 60
    print(f"{sum(kills.values())} kills in {runs} runs of {lives} lives, {minutes:.1f} min")
    print(f"{len(wrong)} went wrong" if wrong else "all ended as the run that nobody disturbed, none in silence")
    for problem in wrong:
        print(f"\n{problem}")
    if options.keep is None:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
