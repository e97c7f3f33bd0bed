"""Damaged files: an adapter, a run that was interrupted, data of every kind, a base model; one file at a time."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from fuzz_process import Case, Result, run_alone, wrong_json, wrong_run, wrong_weights

ROOT = Path(__file__).parents[2]
STOPPED_AFTER = 5  # steps of 8, with checkpoints every 2
RECIPE = {
    "base_model": "model",
    "quantization": "none",
    "device": "cpu",
    "adapter": {"rank": 4, "dropout": 0.1},
    "data": {"train": "data/rows.jsonl", "validation": "data/held.jsonl", "max_seq_len": 64},
    "train": {"max_steps": 8, "epochs": 9, "micro_batch_size": 2, "gradient_accumulation_steps": 1}
    | {"learning_rate": 1e-2, "eval_every": 2, "checkpoint_every": 2, "keep_checkpoints": 3},
    "output": "run",
}
ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    1e308,
    10**30,
    2**63,
    0.5,
    "",
    "x",
    "x" * 5000,
    "\x1b[31m",
    [],
    {},
    [None],
    {"a": [1]},
]
ODD += [
    float("nan"),
    float("inf"),
    "../../x",
    "/",
    "\ud83d",
    [[[]]],
    {"": ""},
    "(.|.)*(.|.)*(.|.)*[!#]",
    ["("],
    7,
    1,
    "fp8",
    "1",
]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "X9", 3, None, ""]


def prepare(folder: Path, workers: int) -> None:
    """For each worker, at the place where it will use them: model, data, a whole run, and one that was interrupted."""
    for slot in range(workers):
        work = folder / f"slot{slot}" / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        shutil.copytree(ROOT / "tests/data/tiny-gpt2", work / "model")
        _write_data(work / "data")
        (work / "recipe.yaml").write_text(json.dumps(RECIPE))
        run_alone(["train", "recipe.yaml"], work, folder, interrupt_after=STOPPED_AFTER, code=130)
        run_alone(["train", "recipe.yaml", "--set", "output=whole"], work, folder)
        shutil.copytree(work / "whole/adapter", work / "adapter")
        shutil.move(work, folder / f"template{slot}")


def interrupt_after(step: int) -> None:
    """Press Ctrl+C as soon as this step is logged."""
    from lora_cli.training.writer import RunWriter

    append = RunWriter.append

    def appending(writer: Any, file: Path, lines: list[dict[str, Any]]) -> None:
        append(writer, file, lines)
        if file.name == "metrics.jsonl" and lines[-1]["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)

    RunWriter.append = appending


def make_case(seed: int, number: int, folder: Path) -> Case:
    """The damage with this number, done to a copy in `folder`, and a command that opens what was damaged."""
    random = Random(f"{seed}/damage/{number}")
    template = folder.parent / folder.name.replace("slot", "template")
    work = folder / "work"
    shutil.copytree(template, work, symlinks=True)
    shutil.rmtree(work / "whole")
    kind = random.choices(["adapter", "run", "data", "model"], [30, 35, 20, 15])[0]
    file, words, output, requires = _KINDS[kind](random, work, template)
    told = damage(random, file, work)
    told = f"{kind}: {file.relative_to(work)}: {told}"
    interrupt = 6.0 if words[0] == "train" else None
    places = [work / each for each in output]
    return Case(f"damage/{number}", told, words, folder, places, interrupt, requires)


Planned = tuple[Path, list[str], list[str], Callable[[Result], "str | None"]]


def _adapter(random: Random, work: Path, _template: Path) -> Planned:
    file = random.choice([work / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json")])
    if random.random() < 0.5:  # as other programs write it: nothing says which base it belongs to
        forget_metadata(work / "adapter" / "adapter_model.safetensors")
    return file, *_using(random, "adapter", work)


def _using(random: Random, adapter: str, work: Path) -> tuple[list[str], list[str], Any]:
    """A command that opens an adapter folder or a run folder, what it writes to, and what success requires."""
    command = random.choice(["generate", "eval", "merge"])
    if command == "generate":
        words = ["generate", "one and one", "--adapter", adapter, "--max-new-tokens", "4", "--json"]
        return words, [], lambda result: wrong_json(result.stdout)
    if command == "eval":
        given = ["run"] if adapter == "run" else ["--adapter", adapter, "--data", "data/held.jsonl"]
        return ["eval", *given, "--json"], [], lambda result: wrong_json(result.stdout)
    words = ["merge", adapter, "--output", "merged", "--json", "--dtype", random.choice(["bf16", "fp32"])]
    return words, ["merged"], lambda result: wrong_json(result.stdout) or wrong_weights(work / "merged")


def _run(random: Random, work: Path, template: Path) -> Planned:
    file = random.choice(_files(work / "run"))
    if random.random() < 0.3:
        return file, *_using(random, "run", work)
    recipe = random.choice(["recipe.yaml", "run/recipe.yaml"])

    def requires(_result: Result) -> str | None:
        for name in ("adapter", "adapter_last"):
            made, meant = (each / name / "adapter_model.safetensors" for each in (work / "run", template / "whole"))
            if not made.is_file() or made.read_bytes() != meant.read_bytes():
                return f"{name} is not that of the uninterrupted run"
        return wrong_run(work / "run")

    return file, ["train", recipe, "--resume"], ["run"], requires


def _data(random: Random, work: Path, _template: Path) -> Planned:
    file = random.choice([each for each in _files(work / "data") if each.name != "held.jsonl"])
    command = random.choice(["check", "train", "eval", "stream"])
    name = f"data/{file.name}"
    if command == "eval":
        return (
            file,
            ["eval", "--model", "model", "--data", name, "--json"],
            [],
            lambda result: wrong_json(result.stdout),
        )
    values = RECIPE | {"data": {"train": name, "max_seq_len": 64}, "train": {"max_steps": 1}, "output": "new"}
    values["data"]["too_long"] = random.choice(["error", "truncate"])
    if command == "stream":
        values["data"]["streaming"] = True
    (work / "recipe.yaml").write_text(json.dumps(values))
    words = ["check" if command == "check" else "train", "recipe.yaml"]
    return file, words, ["new"], lambda _result: wrong_run(work / "new") if words[0] == "train" else None


def _model(random: Random, work: Path, _template: Path) -> Planned:
    file = random.choice(_files(work / "model"))
    command = random.choice(["check", "train", "eval", "generate", "merge"])
    values = RECIPE | {
        "train": {"max_steps": 1},
        "output": "new",
        "quantization": random.choice(["none", "none", "nf4"]),
    }
    (work / "recipe.yaml").write_text(json.dumps(values))
    if command in ("check", "train"):
        return (
            file,
            [command, "recipe.yaml"],
            ["new"],
            lambda _: wrong_run(work / "new") if command == "train" else None,
        )
    if command == "eval":
        words = ["eval", "--model", "model", "--data", "data/held.jsonl", "--json"]
        return file, words, [], lambda result: wrong_json(result.stdout)
    if command == "generate":
        words = ["generate", "one and one", "--model", "model", "--max-new-tokens", "4", "--json"]
        return file, words, [], lambda result: wrong_json(result.stdout)
    forget_metadata(work / "adapter" / "adapter_model.safetensors")
    words = ["merge", "adapter", "--output", "merged", "--json"]
    return file, words, ["merged"], lambda result: wrong_json(result.stdout) or wrong_weights(work / "merged")


_KINDS: dict[str, Callable[[Random, Path, Path], Planned]] = {
    "adapter": _adapter,
    "run": _run,
    "data": _data,
    "model": _model,
}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _write_data(folder: Path) -> None:
    """The same rows in every kind of file that can be read."""
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    lines = (ROOT / "tests/data/smoke.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines[:24]]
    text = "".join(lines[:24])
    (folder / "rows.jsonl").write_text(text)
    (folder / "held.jsonl").write_text("".join(lines[40:46]))
    (folder / "rows.json").write_text(json.dumps(rows))
    for name, separator in (("rows.csv", ","), ("rows.tsv", "\t")):
        quoted = [separator.join(f'"{row[key]}"' for key in ("prompt", "completion")) for row in rows]
        (folder / name).write_text("\n".join([separator.join(("prompt", "completion")), *quoted]) + "\n")
    (folder / "text.txt").write_text(" ".join(row["completion"] for row in rows[:6]))
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    with pyarrow.CompressedOutputStream(str(folder / "rows.csv.zst"), "zstd") as stream:
        stream.write((folder / "rows.csv").read_bytes())
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, folder / "rows.parquet")
    for name, make in (("file.arrow", pyarrow.ipc.new_file), ("stream.arrow", pyarrow.ipc.new_stream)):
        with pyarrow.OSFile(str(folder / name), "wb") as sink, make(sink, table.schema) as writer:
            writer.write_table(table)
    chats = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in rows
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))


# ── damage ──────────────────────────────────────────────────────────────────────────────────────────────────────


def damage(random: Random, file: Path, work: Path) -> str:
    """Damages one file; returns how."""
    ways: list[Callable[..., str]] = [_bytes, _bytes, _place]
    if file.suffix in (".json", ".jsonl", ".yaml"):
        ways += [_json, _json, _json, _json]
    if file.suffix == ".safetensors":
        ways += [_header, _header, _numbers]
    way = random.choice(ways)
    return way(random, file, work)


def _bytes(random: Random, file: Path, _work: Path) -> str:
    data = bytearray(file.read_bytes())
    at, length = random.randrange(len(data) + 1), random.choice([1, 8, 100, 4096])
    how = random.choice(
        ["cut", "empty", "bits", "bits", "zeros", "noise", "inserted", "appended", "doubled", "all noise"]
    )
    if how == "cut":
        del data[at:]
    elif how == "empty":
        data.clear()
    elif how == "bits":
        for _ in range(random.choice([1, 1, 3, 30])):
            if data:
                data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    elif how == "zeros":
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif how == "noise":
        data[at : at + length] = random.randbytes(len(data[at : at + length]))
    elif how == "inserted":
        data[at:at] = random.randbytes(length)
    elif how == "appended":
        data += random.choice([b"\x00", b"x", b"\n", bytes(4096)])
    elif how == "doubled":
        data *= 2
    else:
        data = bytearray(random.randbytes(random.choice([1, 100, 10_000])))
    file.write_bytes(data)
    return f"{how} at {at}"


def _place(random: Random, file: Path, work: Path) -> str:
    """Something else where the file was."""
    how = random.choice(["gone", "folder", "loop", "device", "pipe", "another file", "another file", "another file"])
    others = [each for each in _files(work) if each != file and (each.suffix == file.suffix or random.random() < 0.2)]
    other = random.choice(others) if others else None
    data = other.read_bytes() if other is not None else b""
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how == "loop":
        file.symlink_to(file.name)
    elif how == "device":
        file.symlink_to("/dev/zero")
    elif how == "pipe":
        os.mkfifo(file)
    elif how == "another file":
        file.write_bytes(data)
        return f"replaced by {other.relative_to(work) if other else 'nothing'}"
    return how


def _json(random: Random, file: Path, _work: Path) -> str:
    """A wrong value, key or form in JSON, JSON lines or YAML."""
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines() if file.suffix == ".jsonl" else [text]
    if not lines:
        return "nothing to do"
    at = random.randrange(len(lines))
    how = random.choice(
        ["value", "value", "value", "value", "removed", "added", "twice", "deep", "latin", "bom", "list"]
    )
    if how == "deep":
        lines[at] = random.choice(["[" * 100_000, '{"a":' * 50_000, "[" * 900 + "]" * 900])
    elif how == "latin":
        file.write_bytes(text.encode() + b"\xe9\xff")
        return how
    elif how == "bom":
        file.write_bytes(b"\xef\xbb\xbf" + text.encode())
        return how
    else:
        import yaml

        value = yaml.safe_load(lines[at]) if file.suffix == ".yaml" else json.loads(lines[at])
        if how == "list":
            value = [value]
        else:
            how += f" {_change(random, value, how)}"
        lines[at] = json.dumps(value)  # which is YAML too
        if how.startswith("twice"):
            lines[at] = lines[at].replace("{", '{"step": 1, "format": 1, ', 1)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return how


def _change(random: Random, value: Any, how: str) -> str:
    """Changes one thing somewhere in nested values; returns where."""
    path = []
    while isinstance(value, (dict, list)) and value:
        key = random.choice(list(value)) if isinstance(value, dict) else random.randrange(len(value))
        path.append(str(key))
        if not isinstance(value[key], (dict, list)) or not value[key] or random.random() < 0.3:
            if how == "removed":
                del value[key]
            elif how == "added" and isinstance(value, dict):
                value["more"] = random.choice(ODD)
            else:
                value[key] = random.choice(ODD)
            break
        value = value[key]
    return ".".join(path)[:60]


def _header(random: Random, file: Path, _work: Path) -> str:
    """A safetensors file whose header says something else."""
    header, data = _split(file)
    names = [name for name in header if name != "__metadata__"]
    name = random.choice(names)
    entry = header[name]
    how = random.choice(
        ["length", "dtype", "shape", "offsets", "name", "removed", "metadata", "copied", "entry", "transposed"]
    )
    if how == "length":
        length = random.choice([0, 1, 2**63, 2**64 - 1, 10**8, 10**9, len(json.dumps(header)) + 1])
        file.write_bytes(struct.pack("<Q", length) + json.dumps(header).encode() + data)
        return f"header length {length}"
    if how == "dtype":
        entry["dtype"] = random.choice(DTYPES)
    elif how == "shape":
        entry["shape"] = random.choice(
            [[], [0], [1], [2**40, 2**40], [-1, 4], [s + 1 for s in entry["shape"]], "x", [1.5], None]
        )
    elif how == "offsets":
        first, last = entry["data_offsets"]
        entry["data_offsets"] = random.choice(
            [[0, 0], [last, first], [first + 4, last + 4], [0, 2**63], [-4, 0], [first], "x"]
        )
    elif how == "name":
        header[random.choice(["x", "", "a" * 9999, name + ".x", name.replace("0", "9"), "\x1b[31m"])] = header.pop(name)
    elif how == "removed":
        del header[name]
    elif how == "metadata":
        text = {"base_fingerprint": "x", "base_model": "gone/", "quantization": "fp3", "double_quantization": "2"}
        header["__metadata__"] = random.choice(
            [None, 1, [], {"a": 1}, {"a": None}, {random.choice(list(text)): ""}, text, "x"]
        )
    elif how == "copied":
        header["copy"] = entry
    elif how == "entry":
        header[name] = random.choice(ODD)
    else:
        entry["shape"] = entry["shape"][::-1]
    _join(file, header, data)
    return f"{how} of {name[-30:]}"


def _numbers(random: Random, file: Path, _work: Path) -> str:
    """Numbers that no training gives, in a file that is whole."""
    header, data = _split(file)
    name = random.choice([name for name in header if name != "__metadata__"])
    first, last = header[name]["data_offsets"]
    size = 4 if header[name]["dtype"] == "F32" else 2
    pattern = random.choice([b"\xff\xff\xff\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", b"\x00\x00\xc0\xff"])[
        4 - size :
    ]
    everywhere = random.random() < 0.3
    count = (last - first) // size if everywhere else 1
    at = first if everywhere or last == first else first + random.randrange((last - first) // size) * size
    changed = bytearray(data)
    changed[at : at + count * size] = pattern * count
    _join(file, header, bytes(changed))
    return f"numbers {pattern.hex()} in {name[-40:]}"


def _split(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _join(file: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def forget_metadata(file: Path) -> None:
    header, data = _split(file)
    header.pop("__metadata__", None)
    _join(file, header, data)
