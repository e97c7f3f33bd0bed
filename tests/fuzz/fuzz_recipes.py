"""Random recipes: valid ones with anything at all done to them, as values, as text and on the command line."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml
from fuzz_process import Case, Result, wrong_run

ROOT = Path(__file__).parents[2]
CHECKED = 0.65  # share of recipes that go to `lora check`, which takes half the time; the rest to `lora train`

TEXTS = ["", " ", "\n", "a", "null", "~", "true", "1", "1e-4", "-1", "nan", ".inf", "Größe", "数学🙂", "e\u0301\u202e"]
TEXTS += [
    "\x00",
    "\x07\x1b[31m",
    "\ufeff",
    "\ud83d",
    "x" * 5000,
    "../../x",
    "%s",
    "{0}",
    "$HOME",
    "$NOT_SET",
    "$$",
    "~",
]
TEXTS += [
    "a\nb",
    "a\tb",
    "---",
    "...",
    "[]",
    "{}",
    "'",
    '"',
    "\\",
    "C:\\x",
    "file:///x",
    "*",
    "**",
    "[",
    "a,b",
    "=",
    "<<",
]
NUMBERS: list[Any] = [
    0,
    -1,
    1,
    2,
    3,
    7,
    64,
    1000,
    10**6,
    10**9,
    2**31,
    2**32,
    2**63,
    2**64,
    10**30,
    10**400,
    -(10**400),
]
NUMBERS += [0.5, -0.0, 1e-8, 1e-60, 1e-320, 1e39, 1e308, math.nan, math.inf, -math.inf, 0.999999, 1.5, 1e5]
ODD: list[Any] = [None, True, False, [], {}, [[]], [None], {"": ""}, {"a": {"b": [1, None]}}, ["a", 1], [[["deep"]]]]
REGEXES = [
    r"(a+)+$",
    r"(.*)*x",
    r"(.|.)*(.|.)*(.|.)*y",
    r"([a-z.]+)*\d+!",
    r"(\w+\.?)+#",
    r"(x+x+)+y",
    r".*(.*(.*(.*)z)z)z",
]
REGEXES += ["(", "[", "*", "a{99999999999}", "(?P<n>", r"(?<=.*)a", r"\1", ".*", "", ".", "c_attn|c_proj", r".*\.c_fc"]
REGEXES += [
    "(?i)C_ATTN",
    "((((((((((" * 20,
    "(" * 5000 + ")" * 5000,
    "c_attn" + "?" * 50,
    "(?#",
    r"\p{L}",
    r"h\.[0-9]+\..*",
]
REGEXES += [
    "(?:a{1,9999}){1,9999}",
    "(.{1,9999}){1,9999}z",
    "[[:alpha:]]",
    "\\",
    "attn.c_attn",
    "lm_head",
    "wte",
    "ln_f",
]
# Values that a person may well write, for each setting; the rest of the schema's settings get odd ones alone.
USUAL: dict[str, list[Any]] = {
    "revision": [None, "main"],
    "trust_remote_code": [False, True],
    "quantization": ["none", "none", "none", "nf4", "int8"],
    "dtype": ["auto", "bf16", "fp16", "fp32"],
    "device": ["auto", "cpu", "cuda", "mps", "xpu"],
    "trackers": [[], ["tensorboard"], ["wandb"]],
    "adapter.rank": [1, 2, 8, 64],
    "adapter.alpha": [1, 16, 1e-3],
    "adapter.rank_stabilized": [True, False],
    "adapter.dropout": [0.0, 0.1, 0.9],
    "adapter.target_modules": ["attention", "all-linear", ["c_attn"], ["c_attn", "c_proj"], r".*\.c_fc", ["q_proj"]],
    "adapter.projections": [["q"], ["q", "v"], ["q", "k", "v", "o"], ["o"]],
    "adapter.exclude_modules": [[], ["c_proj"], [r".*\.0\..*"], ["c_attn", "c_proj"]],
    "adapter.layers": [None, [0], [-1], [0, 1], [5]],
    "adapter.rank_pattern": [{}, {"c_attn": 4}, {"c_proj": 2}, {r".*\.0\..*": 3}],
    "adapter.alpha_pattern": [{}, {"c_attn": 4}],
    "adapter.init": ["kaiming", "gaussian"],
    "data.train": ["data/rows.jsonl", "data/chat.jsonl", "data/text.txt", "data/rows.csv", "data", "data/*.jsonl"],
    "data.validation": [None, 0.1, 0.5, "data/held.jsonl", {"path": "data/held.jsonl"}],
    "data.group_by": [None, "prompt", "gone"],
    "data.format": ["auto", "text", "completion", "instruction", "chat"],
    "data.columns": [{}, {"prompt": "completion"}, {"text": "prompt"}, {"weight": "prompt"}],
    "data.template": [None, "chatml", "plain", "gemma"],
    "data.train_on": [None, "assistant", "completion", "all", "last_assistant"],
    "data.max_seq_len": [16, 64, 128, 256],
    "data.packing": [True, False],
    "data.too_long": ["error", "drop", "truncate", "split"],
    "data.allow": [[], ["too_long"], ["overlap", "no_stop_token"]],
    "data.streaming": [False, True],
    "data.cache": [None, "cache"],
    "train.epochs": [1, 0.1, 2],
    "train.max_steps": [1, 2],
    "train.micro_batch_size": [1, 4, "auto"],
    "train.batch_size": [None, 4],
    "train.tokens_per_micro_batch": [None, 128, 512],
    "train.gradient_accumulation_steps": [1, 2],
    "train.learning_rate": [1e-2, 1e-3, "1e-3"],
    "train.lora_plus_ratio": [1, 16],
    "train.schedule": ["cosine", "linear", "constant"],
    "train.warmup_ratio": [0, 0.5],
    "train.min_learning_rate_ratio": [0, 0.1],
    "train.optimizer": ["adamw", "schedule_free_adamw", "adamw_8bit"],
    "train.weight_decay": [0, 0.1],
    "train.beta1": [0.9, 0.0],
    "train.beta2": [0.99, 0.0],
    "train.max_grad_norm": [0.3, 1],
    "train.z_loss": [0, 1e-4],
    "train.gradient_checkpointing": ["none", "full", "selective", True],
    "train.activation_memory": [None, 0.001],
    "train.compile": [False],
    "train.liger_kernel": [False],
    "train.seed": [0, 1, 2**32 - 1],
    "train.eval_every": [None, 1],
    "train.checkpoint_every": [None, 1],
    "train.keep_checkpoints": [1, 2],
}
PLACES = ["base_model", "output", "data.train", "data.validation", "data.cache", "data.template"]
PATHS = [
    "",
    ".",
    "..",
    "/",
    "data",
    "data/rows.jsonl",
    "gone/deeper",
    "gone.jsonl",
    "/dev/zero",
    "/dev/stdin",
    "/dev/null",
]
PATHS += [
    "fifo.jsonl",
    "fifo",
    "loop",
    "loop.jsonl",
    "model",
    "model/config.json",
    "model/inside",
    "full",
    "recipe.yaml",
]
PATHS += [
    "zero.jsonl",
    "x" * 300,
    "a/" * 2000,
    "run\n2",
    "\x00",
    "données/été",
    "data/../data/rows.jsonl",
    "empty",
    "~nobody/x",
]
PATHS += [
    "-",
    "--resume",
    "run ",
    "data/rows.jsonl/inside",
    "binary.jsonl",
    "/proc/self/mem",
    "/proc/1/environ",
    "owner/name",
]


def make_case(seed: int, number: int, folder: Path) -> Case:
    """The recipe with this number, written into `folder`, and the command for it."""
    random = Random(f"{seed}/recipes/{number}")
    work = folder / "work"
    _lay_out(work)
    values, told = _valid(random), []
    for _ in range(random.choice([0, 1, 1, 1, 1, 2])):
        told.append(_VALUE_CHANGES[random.randrange(len(_VALUE_CHANGES))](random, values))
    try:
        text = yaml.safe_dump(values, allow_unicode=True, sort_keys=False).encode("utf-8", "surrogatepass")
    except yaml.YAMLError:  # what YAML cannot write is still JSON
        text = json.dumps(values).encode()
    for _ in range(random.choice([0, 0, 0, 0, 1, 2])):
        change = random.choice(_TEXT_CHANGES)
        told.append(change.__name__)
        text = change(random, text)
    path = work / "recipe.yaml"
    path.write_bytes(text)
    if random.random() < 0.02:
        name = random.choice(PATHS)
        told.append(f"recipe at {name[:30]!r}")
        path = work / name if "\x00" not in name else path
    words = ["check" if random.random() < CHECKED else "train", str(path)]
    for _ in range(random.choice([0] * 8 + [1, 2])):
        override = _override(random)
        told.append(f"--set {override[:60]!r}")
        words += ["--set", override]

    def requires(result: Result) -> str | None:
        if words[0] == "check":
            return None
        (output, *_) = json.loads((folder.parent / f"said{folder.name.removeprefix('slot')}.loaded").read_text())
        return wrong_run(Path(output))

    interrupt = 4.0 if words[0] == "train" else None
    return Case(
        f"recipes/{number}", "; ".join(told) or "as it is", words, folder, interrupt=interrupt, requires=requires
    )


def _lay_out(work: Path) -> None:
    """What paths of a recipe can point to: data of several kinds, a model, and places that are none."""
    data = work / "data"
    data.mkdir(parents=True)
    rows = (ROOT / "tests/data/smoke.jsonl").read_text().splitlines(keepends=True)
    (data / "rows.jsonl").write_text("".join(rows[:24]))
    (data / "held.jsonl").write_text("".join(rows[40:48]))
    (data / "text.txt").write_text("one and one is two. " * 5)
    values = [json.loads(row) for row in rows[:12]]
    (data / "rows.csv").write_text(
        "prompt,completion\n" + "".join(f'"{v["prompt"]}",{v["completion"]}\n' for v in values)
    )
    chats = [
        {"messages": [{"role": "user", "content": v["prompt"]}, {"role": "assistant", "content": v["completion"]}]}
        for v in values
    ]
    (data / "chat.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (work / "empty").mkdir()
    (work / "full").mkdir()
    (work / "full" / "notes").write_text("mine")
    (work / "binary.jsonl").write_bytes(bytes(range(256)))
    for name in ("fifo", "fifo.jsonl"):
        os.mkfifo(work / name)
    for name, target in (("loop", "loop"), ("loop.jsonl", "loop.jsonl"), ("zero.jsonl", "/dev/zero")):
        (work / name).symlink_to(target)
    shutil.copytree(ROOT / "tests/data/tiny-gpt2", work / "model")


def _valid(random: Random) -> dict[str, Any]:
    """One of configs/, on the tiny model and for a step or two, with some other settings that may even fit together."""
    path = random.choice(sorted((ROOT / "configs").glob("*.yaml")))
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    values |= {"base_model": "model", "quantization": "none", "output": "run"}
    values["data"] |= {"train": "data/rows.jsonl", "max_seq_len": 64}
    if isinstance(values["data"].get("validation"), str):
        values["data"]["validation"] = "data/held.jsonl"
    values["train"] |= {"max_steps": 2, "micro_batch_size": 2, "gradient_accumulation_steps": 1, "optimizer": "adamw"}
    for key in random.sample(list(USUAL), random.choice([0, 0, 1, 2, 4])):
        _put(values, key, random.choice(USUAL[key]))
    return values


# ── changes of values ───────────────────────────────────────────────────────────────────────────────────────────


def _put(values: Any, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values = values[section]
    values[name] = value


def _sections(values: dict[str, Any]) -> list[dict[str, Any]]:
    return [values, *(each for each in values.values() if isinstance(each, dict))]


def _any(random: Random) -> Any:
    return random.choice(random.choice([TEXTS, NUMBERS, ODD, REGEXES, PATHS]))


def _odd_value(random: Random, values: dict[str, Any]) -> str:
    key, value = random.choice(list(USUAL)), _any(random)
    _put(values, key, value)
    return f"{key}={_short(value)}"


def _odd_number(random: Random, values: dict[str, Any]) -> str:
    numeric = [key for key, usual in USUAL.items() if any(type(each) in (int, float) for each in usual)]
    key, value = random.choice(numeric), random.choice(NUMBERS)
    _put(values, key, value)
    return f"{key}={_short(value)}"


def _odd_item(random: Random, values: dict[str, Any]) -> str:
    key, value = (
        random.choice([key for key, usual in USUAL.items() if any(type(u) in (list, dict) for u in usual)]),
        _any(random),
    )
    item: Any = [value, value] if random.random() < 0.3 else [value]
    if key.endswith("pattern") or key.endswith("columns"):
        name = random.choice([*TEXTS, *REGEXES, "prompt", "text"])
        item = {name: value}
    _put(values, key, item)
    return f"{key}={_short(item)}"


def _odd_path(random: Random, values: dict[str, Any]) -> str:
    key, value = random.choice(PLACES), random.choice(PATHS)
    _put(
        values,
        key,
        random.choice([value, value, {"path": value}, [value, "data/rows.jsonl"]]) if "data.t" in key else value,
    )
    return f"{key}={_short(value)}"


def _odd_pattern(random: Random, values: dict[str, Any]) -> str:
    pattern = random.choice(REGEXES)
    if random.random() < 0.4:  # repeated and nested by chance
        pattern = f"({pattern[:40]}){random.choice(['*', '+', '{3,}', '?'])}{random.choice(['', '$', 'x', '.*'])}"
    key = random.choice(["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
    value = {"target_modules": random.choice([pattern, [pattern]]), "exclude_modules": [pattern]}.get(key, {pattern: 2})
    _put(values, f"adapter.{key}", value)
    return f"adapter.{key}={_short(value)}"


def _contradiction(random: Random, values: dict[str, Any]) -> str:
    keys = random.sample(list(USUAL), random.choice([3, 6, 12]))
    for key in keys:
        _put(values, key, random.choice(USUAL[key]))
    return f"drew {', '.join(keys)}"


def _remove(random: Random, values: dict[str, Any]) -> str:
    section = random.choice([each for each in _sections(values) if each] or [values])
    key = random.choice(list(section) or [""])
    section.pop(key, None)
    return f"removed {_short(key)}"


def _typo(random: Random, values: dict[str, Any]) -> str:
    section = random.choice([each for each in _sections(values) if each] or [values])
    key = str(random.choice(list(section) or ["x"]))
    at = random.randrange(len(key) + 1)
    typo = random.choice([key[:at] + key[at + 1 :], key[:at] + "e" + key[at:], key.upper(), key + " ", _any(random)])
    if isinstance(typo, list | dict):
        typo = "x"
    section[typo] = section.pop(key, None)
    return f"{_short(key)} called {_short(typo)}"


def _move(random: Random, values: dict[str, Any]) -> str:
    giver, taker = random.choice(_sections(values)), random.choice(_sections(values))
    key = random.choice(list(giver) or ["x"])
    value = giver.pop(key, None)
    if value is not taker:
        taker[key] = value
    return f"moved {_short(key)}"


def _swap(random: Random, values: dict[str, Any]) -> str:
    one, other = random.choice(list(values) or ["a"]), random.choice(list(values) or ["b"])
    values[one], values[other] = values.get(other), values.get(one)
    return f"swapped {one} and {other}"


def _nothing(random: Random, values: dict[str, Any]) -> str:
    section = random.choice(_sections(values))
    for key in section:
        section[key] = None
    return "null everywhere in a section"


def _hours(random: Random, values: dict[str, Any]) -> str:
    key = random.choice(
        ["train.epochs", "train.max_steps", "train.gradient_accumulation_steps", "train.micro_batch_size"]
    )
    values["train"] = (
        {k: v for k, v in values["train"].items() if k != "max_steps"} if isinstance(values.get("train"), dict) else {}
    )
    value = random.choice([500, 10**4, 10**7, 10**12])
    _put(values, key, value)
    return f"{key}={value}"


_VALUE_CHANGES: list[Callable[[Random, dict[str, Any]], str]] = [
    *(_odd_value, _odd_value, _odd_number, _odd_number, _odd_item, _odd_path, _odd_pattern, _contradiction),
    *(_remove, _typo, _move, _swap, _nothing),
]


# ── changes of the text ─────────────────────────────────────────────────────────────────────────────────────────


def truncate(random: Random, text: bytes) -> bytes:
    return text[: random.randrange(len(text) + 1)]


def flip_bits(random: Random, text: bytes) -> bytes:
    changed = bytearray(text)
    for _ in range(random.choice([1, 1, 4, 20])):
        if changed:
            changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def insert(random: Random, text: bytes) -> bytes:
    at = random.randrange(len(text) + 1)
    return text[:at] + random.choice(_INSERTED) + text[at:]


def insert_line(random: Random, text: bytes) -> bytes:
    lines = text.split(b"\n")
    lines.insert(random.randrange(len(lines) + 1), b" " * random.choice([0, 0, 2, 3, 4]) + random.choice(_LINES))
    return b"\n".join(lines)


def repeat_line(random: Random, text: bytes) -> bytes:
    lines = text.split(b"\n")
    lines.insert(random.randrange(len(lines) + 1), random.choice(lines))
    return b"\n".join(lines)


def replace_value(random: Random, text: bytes) -> bytes:
    lines = text.split(b"\n")
    at = random.randrange(len(lines))
    key, colon, _ = lines[at].partition(b":")
    lines[at] = key + colon + b" " + random.choice(_SCALARS)
    return b"\n".join(lines)


def encode_otherwise(random: Random, text: bytes) -> bytes:
    as_text = text.decode("utf-8", "replace")
    return random.choice(
        [
            b"\xef\xbb\xbf" + text,
            text.replace(b"\n", b"\r\n"),
            text.replace(b"\n", b"\r"),
            as_text.encode("utf-16"),
            as_text.encode("utf-32"),
            text.replace(b"  ", b"\t"),
            as_text.encode("utf-7"),
        ]
    )


def make_another(random: Random, _text: bytes) -> bytes:
    return random.choice(_WHOLE)


_SCALARS = [
    b"&a x",
    b"*a",
    b"!!python/object:os.system x",
    b"!!python/object/apply:os.system ['touch pwned']",
    b"!!binary aGk=",
]
_SCALARS += [
    b"!!set {a}",
    b"!!omap [a: 1]",
    b"!!timestamp 2024-13-45",
    b"2024-01-01",
    b"1:30:00",
    b"0x10",
    b"0o17",
    b"010",
    b"1_000",
]
_SCALARS += [
    b".inf",
    b"-.inf",
    b".nan",
    b"1e400",
    b"1e4",
    b"yes",
    b"no",
    b"~",
    b"''",
    b"|",
    b">-",
    b"!foo bar",
    b"!!int x",
    b"!!float ''",
]
_SCALARS += [
    b"9" * 5000,
    b"-",
    b"- - - -",
    b"{a: 1, a: 2}",
    b"[1, [2, [3]]]",
    b"? x",
    b"!!str 1",
    b"!!bool maybe",
    b"!!null x",
    b"0b1_",
]
_SCALARS += [
    b"[" * 2000,
    b"{a: " * 2000,
    b"[" * 500 + b"]" * 500,
    b"&a [*a]",
    b"&a {<<: *a}",
    b"'",
    b'"\\x',
    b"%",
    b"@x",
    b"`x`",
    b"0." + b"1" * 5000,
]
_SCALARS += [
    b"!!int 0b",
    b"0x",
    b"!!int ''",
    b"0:0",
    b"190:20:30.15",
    b"+",
    b"!!float 1:2",
    b"!!timestamp ''",
    b"9999-99-99",
    b"0000-00-00",
]
_INSERTED = [
    b"\x00",
    b"\x07",
    b"\x1b[31m",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xc2\x85",
    b"\xe2\x80\xa8",
    b"\t",
    b"\r",
    b":",
    b": ",
    b"- ",
    b"#",
]
_INSERTED += [
    b"{",
    b"}",
    b"[",
    b"]",
    b"&a ",
    b"*a ",
    b"!",
    b"'",
    b'"',
    b"|\n",
    b"\n---\n",
    b"\n...\n",
    b"%YAML 9.9\n---\n",
    b"? ",
    b"<<: ",
    b"x" * 100_000,
]
_LINES = [
    b"<<: *a",
    b"<<: {seed: 1}",
    b"<<: [1]",
    b"<<: x",
    b"? [a, b]",
    b"? {a: b}",
    b": x",
    b"---",
    b"...",
    b"%TAG ! x",
    b"&a",
    b"*a: b",
]
_LINES += [
    b"seed: 1",
    b"output: other",
    b"lerning_rate: 1",
    b"true: 1",
    b"1: 2",
    b"null: 3",
    b"'': x",
    b"2024-01-01: x",
    b"a: &a [*a]",
    b"\t",
    b"- x",
]
_LINES += [
    b"x: " + b"y" * 1_000_000,
    b"k" * 2000 + b": 1",
    b"? " + b"k" * 2000,
    b"a: {<<: [{b: 1}, {b: 2}]}",
    b"train: {seed: 1}",
    b"data: *data",
]
_LAUGHS = b"a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 12)
)
_WHOLE = [
    b"",
    b" ",
    b"#",
    b"x",
    b"[]",
    b"- a",
    b"null",
    b"1",
    b"{}",
    b"---",
    b"--- x\n--- y\n",
    b"\x00",
    bytes(range(256)),
    b"%",
    b"&a *a",
    b"&a {a: *a}",
]
_WHOLE += [
    _LAUGHS + b"base_model: *a11\n",
    b"adapter: {target_modules: *a11}\n".join([_LAUGHS, b"output: x\n"]),
    b"[" * 100_000,
    b"{a: " * 20_000,
]
_WHOLE += [
    b"a:\n" + b"".join(b" " * n + b"a:\n" for n in range(1, 900)),
    b"? " * 3000,
    b"- " * 3000,
    b"\n" * 500_000,
    b"a: 1\n" * 20_000,
    b"!!python/name:os.system",
]
_WHOLE += [
    b"".join(b"k%d: v\n" % n for n in range(20_000)),
    b"a: " + b"'" * 99_999,
    b"#" * 900_000,
    b"<<: &a {<<: *a}",
    b"? &a [*a]\n: x",
    b"x" * 2_000_000,
]
_TEXT_CHANGES = [
    truncate,
    flip_bits,
    flip_bits,
    insert,
    insert,
    insert_line,
    insert_line,
    repeat_line,
    replace_value,
    replace_value,
]
_TEXT_CHANGES += [encode_otherwise, make_another]


def _override(random: Random) -> str:
    key = random.choice(
        [*USUAL, *PLACES, "", "train", "train.", ".seed", "train.seed.x", "data.train.path", "x.y.z", "a" * 500]
    )
    usual = [json.dumps(each) for each in USUAL.get(key, [])]
    value = random.choice(
        [*usual, *(each.decode("utf-8", "surrogateescape") for each in _SCALARS), *map(str, NUMBERS[:12]), *TEXTS]
    )
    text = random.choice([f"{key}={value}"] * 8 + [key, f"={value}", f"{key}:{value}", f" {key} = {value}"])
    return text.replace("\x00", "") or "="  # no argument of a process can hold a NUL


def _short(value: Any) -> str:
    try:
        return repr(value)[:60]
    except ValueError:  # a number of thousands of digits
        return "a huge number"
