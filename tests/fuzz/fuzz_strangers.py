"""Files as strangers make them: whole, but odd. Models, tokenizers, templates, generation settings, column types,
links and pipes in run folders, and what `lora runs` reads."""

from __future__ import annotations

import datetime
import decimal
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from fuzz_damage import ODD, RECIPE, Planned, forget_metadata
from fuzz_process import Case, Result, wrong_json, wrong_run, wrong_weights

LARGE: list[Any] = [10**9, 10**12, 2**31, 2**63, 10**30, -5, 0, 1, 3, 1.5, True, "12", None, [1, 2], {"a": 1}]


def make_case(seed: int, number: int, folder: Path) -> Case:
    """The oddity with this number, made in a copy of what `prepare` made, and a command that meets it."""
    random = Random(f"{seed}/strangers/{number}")
    work = folder / "work"
    shutil.copytree(folder.parent / folder.name.replace("slot", "template"), work, symlinks=True)
    kind = random.choice(list(_KINDS))
    told, (_, words, output, requires) = _KINDS[kind](random, work)
    places = [work / each for each in output]
    interrupt = 6.0 if words[0] == "train" else None
    return Case(f"strangers/{number}", f"{kind}: {told}", words, folder, places, interrupt, requires)


# ── commands ────────────────────────────────────────────────────────────────────────────────────────────────────


def _with_model(random: Random, work: Path, *commands: str) -> Planned:
    """A command that opens the base model."""
    command = random.choice(commands or ("check", "check", "train", "eval", "generate", "merge", "init"))
    recipe = RECIPE | {
        "train": {"max_steps": 1},
        "output": "new",
        "quantization": random.choice(["none", "none", "nf4"]),
    }
    if random.random() < 0.4:
        recipe["data"] = {"train": "data/chat.jsonl", "max_seq_len": 256}
    (work / "recipe.yaml").write_text(json.dumps(recipe))
    file = work / "model"
    if command in ("check", "train"):
        done = (lambda _: wrong_run(work / "new")) if command == "train" else (lambda _: None)
        return file, [command, "recipe.yaml"], ["new"], done
    if command == "init":
        data = random.choice(["data/rows.jsonl", "data/chat.jsonl"])
        return file, ["init", "model", data, "--gpu", "12GB", "--output", "made.yaml"], ["made.yaml"], lambda _: None
    if command == "eval":
        words = ["eval", "--model", "model", "--data", "data/held.jsonl", "--json"]
        return file, words, [], lambda result: wrong_json(result.stdout)
    if command == "generate":
        words = ["generate", "one and one", "--model", "model", "--max-new-tokens", "4", "--json"]
        words += random.choice([[], [], ["--chat"], ["--temperature", "1"]])
        return file, words, [], lambda result: wrong_json(result.stdout)
    forget_metadata(work / "adapter" / "adapter_model.safetensors")
    words = ["merge", "adapter", "--output", "merged", "--json"]
    return file, words, ["merged"], lambda result: wrong_json(result.stdout) or wrong_weights(work / "merged")


def _edited(file: Path, change: Callable[[dict[str, Any]], str]) -> str:
    values = json.loads(file.read_text(encoding="utf-8"))
    told = change(values)
    file.write_text(json.dumps(values), encoding="utf-8")
    return told


# ── models ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _model(random: Random, work: Path) -> tuple[str, Planned]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    more: dict[str, list[Any]] = {
        "model_type": [*random.sample(list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), 3), "vit", "t5", "bert", "none", 7],
        "architectures": [["LlamaForCausalLM"], [1], "x", [], None, ["BertModel"], [["a"]]],
        "quantization_config": [
            {"quant_method": "gptq", "bits": 4},
            {"quant_method": "awq"},
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            {"quant_method": "fp8"},
            {"quant_method": 3},
            {},
            "x",
            [],
        ],
        "auto_map": [{"AutoConfig": "x.Y"}, {"AutoModelForCausalLM": "evil.Model"}, "x", []],
        "_attn_implementation": ["kernels-community/flash-attn3", "flex_attention", "x", 1],
        "attn_implementation": ["kernels-community/flash-attn3", "paged|sdpa"],
        "_attn_implementation_internal": ["someone/kernel"],
        "text_config": [{}, {"vocab_size": 3}, None, "x", {"model_type": "llama"}],
        "num_labels": LARGE,
        "rope_scaling": [{"type": "yarn"}, {"rope_type": "x", "factor": -1}, "x", []],
        "dtype": [{}, "float8", "float16", "int8", 1, "torch.bfloat16"],
        "activation_function": ["nope", "silu", 1, None],
        "tie_word_embeddings": [False, "no", 2],
        "use_cache": ["x"],
        "id2label": [{"a": "b"}, {str(at): "x" for at in range(5000)}],
    }

    def change(values: dict[str, Any]) -> str:
        changed = []
        for _ in range(random.choice([1, 1, 1, 2, 4])):
            if random.random() < 0.55:
                key = random.choice(list(more))
                values[key] = random.choice(more[key])
            else:
                key = random.choice([each for each in values if each != "model_type"])
                values[key] = random.choice([*LARGE, *ODD])
            changed.append(f"{key}={json.dumps(values[key])[:40]}")
        return ", ".join(changed)

    told = _edited(work / "model/config.json", change)
    if random.random() < 0.1:
        index = {
            "weight_map": random.choice([{}, {"a": "../../x"}, {"transformer.wte.weight": "model.safetensors"}, 3])
        }
        (work / "model/model.safetensors.index.json").write_text(json.dumps(index))
        told += f", with an index {index}"[:80]
    return told, _with_model(random, work)


# ── tokenizers ──────────────────────────────────────────────────────────────────────────────────────────────────

_REGEXES = [
    r"(a|a)*$|(\w+\s?)+!",
    r"(\w+\s?)*$",
    "(",
    "",
    r"(?=a)",
    "a{60000}",
    r"\X+",
    "[" * 500,
    "(?:" * 300 + "a" + ")" * 300,
]


def _tokenizer(random: Random, work: Path) -> tuple[str, Planned]:
    def replace(times: int) -> dict[str, Any]:
        each = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * random.choice([0, 2, 1000])}
        return {"type": "Sequence", "normalizers": [each] * times}

    def change(values: dict[str, Any]) -> str:
        vocab = values["model"]["vocab"]
        how = random.choice(
            ["ids", "pattern", "normalizer", "special", "processor", "merges", "added", "decoder", "odd"]
        )
        if how == "ids":
            for token in random.sample(list(vocab), random.choice([1, 3])):
                vocab[token] = random.choice([2**32 - 1, 10**9, 5, 511, 512, 0, 600])
        elif how == "pattern":
            split = {
                "type": "Split",
                "pattern": {"Regex": random.choice(_REGEXES)},
                "behavior": "Isolated",
                "invert": False,
            }
            values["pre_tokenizer"] = random.choice(
                [split, {"type": "Sequence", "pretokenizers": [split, values["pre_tokenizer"]]}, {"type": "Whitespace"}]
            )
        elif how == "normalizer":
            values["normalizer"] = random.choice(
                [
                    replace(1),
                    replace(4),
                    {"type": "Lowercase"},
                    {"type": "NFKC"},
                    {"type": "Strip"},
                    {"type": "Prepend", "prepend": "▁"},
                ]
            )
        elif how == "special":
            entry = random.choice(values["added_tokens"])
            entry[random.choice(list(entry))] = random.choice([*ODD, 10**9, "<|im_end|>", " ", "a"])
        elif how == "processor":
            single = values["post_processor"]["single"]
            token = random.choice(["<|im_start|>", "nowhere"])
            single.insert(random.randrange(2), {"SpecialToken": {"id": token, "type_id": 0}})
            ids = random.choice([[1], [10**9], [], [1, 1], [600]])
            if random.random() < 0.8:
                values["post_processor"]["special_tokens"] = {
                    token: {"id": token, "ids": ids, "tokens": [token] * len(ids)}
                }
        elif how == "merges":
            merges = values["model"]["merges"]
            merges[random.randrange(len(merges))] = random.choice([["x"], "a b", ["q", "ß"], [], 3])
        elif how == "added":
            content = random.choice([" ", "e", "the", "", "\x1b[31m", "a" * 5000, "\u202ex", "[/b]", "\n"])
            values["added_tokens"].append(
                {"id": random.choice([512, 10**6, 4, -1]), "content": content, "special": random.random() < 0.5}
                | {key: False for key in ("single_word", "lstrip", "rstrip", "normalized")}
            )
        elif how == "decoder":
            values["decoder"] = random.choice(
                [None, {"type": "Fuse"}, {"type": "WordPiece", "prefix": "##"}, {"type": "Nope"}]
            )
        else:
            part = random.choice([each for each in values if each != "model"])
            values[part] = random.choice(ODD)
            how = part
        return how

    if random.random() < 0.7:
        told = _edited(work / "model/tokenizer.json", change)
    else:
        settings: dict[str, list[Any]] = {
            "eos_token": ["<|im_end|>", "nowhere", "\x1b]0;x\x07", None, {"content": "a"}, 3, ""],
            "pad_token": ["nowhere", None, 7],
            "bos_token": ["<|im_start|>", "nowhere", 3],
            "add_bos_token": [True, "x"],
            "tokenizer_class": ["GPT2Tokenizer", "LlamaTokenizer", "Nope", 3, "PreTrainedTokenizerFast", "T5Tokenizer"],
            "model_max_length": [-1, 1, "x", 1e308],
            "chat_template": [
                [{"name": "../../x", "template": "x"}],
                [{"name": "default", "template": "{{ x }}"}],
                7,
                {"a": "b"},
                "",
            ],
            "auto_map": [{"AutoTokenizer": ["x.Y", None]}, "x"],
            "extra_special_tokens": [{"image": "<img>"}, ["<x>"], 3],
            "backend": ["x", "mistral-common", None],
            "padding_side": ["left", "x"],
            "added_tokens_decoder": [{"0": {"content": "x"}}, {"999999999": {"content": "z"}}, "x"],
        }
        key = random.choice(list(settings))
        value = random.choice(settings[key])
        told = _edited(
            work / "model/tokenizer_config.json", lambda values: values.update({key: value}) or f"{key}={value!r}"[:80]
        )
    return told, _with_model(random, work)


# ── templates ───────────────────────────────────────────────────────────────────────────────────────────────────

_LINE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_TEMPLATES = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ 'a' * 10**9 }}",
    "{{ ['a'] * 10**9 }}",
    "{{ (9**9**9) }}",
    "{{ 'x' | center(10**9) }}",
    "{{ messages | tojson(indent=10**8) }}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% if true %}" * 3000 + "{% endif %}" * 3000,
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "1+" * 20000 + "1 }}",
    "{{ raise_exception('no \x1b[31m system [/b] turns :train:') }}",
    "{{ messages[7].content }}",
    "{{ nothing.at.all }}",
    "{{ messages[0]['content'] | nofilter }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__.os.system('id') }}",
    "{% include 'x' %}",
    "{% import '../../x' as y %}",
    "{{ strftime_now('%Y' * 1000) }}",
    "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
    "{% for m in messages %}{{ m['content'][::-1] }}{% endfor %}",
    "{{ range(10) | random }}" + _LINE,
    "{% generation %}x{% endgeneration %}",
    "",
    "   ",
    "{%",
    "constant",
    _LINE.replace("<|im_end|>", ""),
    _LINE.replace("<|im_start|>", "\u202e"),
    "{% for m in messages[-1:] %}{{ m.content }}<|im_end|>{% endfor %}",
    "{{ messages | length }}" + _LINE,
    _LINE + "{{ undefined_thing() }}",
    "{% for m in messages %}{{ m.content.split('e') | join('e' * 1000) }}{% endfor %}",
    "{% for m in messages %}{{ m.content | replace('e', 'e' * 100000) }}{% endfor %}",
]


def _template(random: Random, work: Path) -> tuple[str, Planned]:
    text = random.choice(_TEMPLATES)
    if random.random() < 0.4:
        text = random.choice([_LINE + text, text + _LINE + _PROMPT, _LINE + _PROMPT + text])
    told = text[:60]
    (work / "model/chat_template.jinja").write_bytes(
        text.encode() if random.random() < 0.95 else text.encode() + b"\xff\xfe"
    )
    command = random.choice(["check", "check", "train", "generate", "init", "merge"])
    planned = _with_model(random, work, command)
    if command in ("check", "train"):
        recipe = json.loads((work / "recipe.yaml").read_text())
        recipe["data"] = {"train": "data/chat.jsonl", "max_seq_len": 256}
        (work / "recipe.yaml").write_text(json.dumps(recipe))
    elif command == "generate":
        planned[1].append("--chat") if "--chat" not in planned[1] else None
    return told, planned


# ── generation settings ─────────────────────────────────────────────────────────────────────────────────────────


def _generation(random: Random, work: Path) -> tuple[str, Planned]:
    settings: dict[str, list[Any]] = {
        "num_beams": [4, 0, -1, "x"],
        "penalty_alpha": [0.6],
        "stop_strings": ["e", ["a"], 3],
        "eos_token_id": [10**30, -1, [0, 2], [], "x", None, [[0]], 511, 512, True, 1.5],
        "pad_token_id": [-1, 10**9, "x"],
        "bos_token_id": [10**9, "x"],
        "max_time": [0.0001, -1],
        "max_length": [1, 0, -1, 20],
        "max_new_tokens": [1, 0, "x"],
        "no_repeat_ngram_size": [1, 2],
        "bad_words_ids": [[[1]], [[]], "x"],
        "forced_eos_token_id": [0, 10**9],
        "suppress_tokens": [list(range(512)), "x"],
        "do_sample": [True, "x"],
        "temperature": [0.0, -1.0, 1e-300, "x"],
        "watermarking_config": [{"bias": 1.0}, 3],
        "cache_implementation": ["static", "quantized", "x"],
        "prompt_lookup_num_tokens": [3],
        "assistant_model": ["x"],
        "num_return_sequences": [3],
        "guidance_scale": [2.0],
        "trust_remote_code": [True],
        "custom_generate": ["someone/code"],
        "compile_config": [{"mode": "x"}],
        "use_cache": [False, "x"],
        "return_dict_in_generate": [True],
        "typical_p": [0.0, 2.0],
    }

    def change(values: dict[str, Any]) -> str:
        for key in random.sample(list(settings), random.choice([1, 1, 2, 5])):
            values[key] = random.choice(
                [*settings[key], random.choice(ODD)] if random.random() < 0.2 else settings[key]
            )
        return json.dumps({key: values[key] for key in settings if key in values})[:100]

    told = _edited(work / "model/generation_config.json", change)
    return told, _with_model(random, work, "generate", "generate", "generate", "merge", "train")


# ── columns ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _columns(random: Random, work: Path) -> tuple[str, Planned]:
    """A table whose columns have other types, names or shapes than rows of text."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = 6
    text = pa.array(["one and one"] * rows)
    day, now = datetime.date(2024, 2, 29), datetime.datetime(2024, 2, 29, 12)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    odd_columns: dict[str, Callable[[], Any]] = {
        "date32": lambda: pa.array([random.choice([0, 2**31 - 1, -(2**31)])] * rows, pa.int32()).cast(pa.date32()),
        "date": lambda: pa.array([day] * rows),
        "timestamp": lambda: pa.array([random.choice([0, 2**62, -(2**62)])] * rows, pa.timestamp("us")),
        "zone": lambda: pa.array([now] * rows, pa.timestamp("s", tz=random.choice(["UTC", "Mars/Base"]))),
        "time64": lambda: pa.array([random.choice([0, 86_399_999_999])] * rows, pa.time64("us")),
        "duration": lambda: pa.array([2**62] * rows, pa.duration("s")),
        "interval": lambda: pa.array([(1, 2, 3)] * rows, pa.month_day_nano_interval()),
        "decimal": lambda: pa.array([decimal.Decimal("1.50")] * rows, pa.decimal128(38, 10)),
        "binary": lambda: pa.array([b"\xff\x00"] * rows),
        "large": lambda: pa.array(["x"] * rows, pa.large_string()),
        "view": lambda: pa.array(["x"] * rows, pa.string_view()),
        "dictionary": lambda: pa.array(["one and one"] * rows).dictionary_encode(),
        "null": lambda: pa.nulls(rows),
        "list": lambda: pa.array([["a", "b"]] * rows),
        "map": lambda: pa.array([[("a", 1)]] * rows, pa.map_(pa.string(), pa.int64())),
        "struct": lambda: pa.array([{"a": {"b": [1]}}] * rows),
        "turns": lambda: pa.array([turns] * rows),
        "bool": lambda: pa.array([True] * rows),
        "float": lambda: pa.array([random.choice([float("nan"), 1e308, 1.0])] * rows),
        "half": lambda: pa.array([1.0] * rows).cast(pa.float16()),
        "uint64": lambda: pa.array([2**64 - 1] * rows, pa.uint64()),
        "text": lambda: text,
    }
    names = [
        "prompt",
        "completion",
        "messages",
        "text",
        "weight",
        "train",
        "images",
        "id",
        "[/b]",
        "\x1b[31m",
        ":train:",
        "",
        "a" * 3000,
    ]
    names += [
        "Prompt",
        " completion",
        "instruction",
        "output",
        "tools",
        "system",
        "label",
        "conversations",
        "\u202eabc",
    ]
    chosen = ["prompt", "completion"] if random.random() < 0.6 else [random.choice(names)]
    kinds = ["text"] * len(chosen)
    for _ in range(random.choice([1, 1, 2, 4])):
        if random.random() < 0.5:
            chosen.append(random.choice(names))
            kinds.append(random.choice(list(odd_columns)))
        else:
            kinds[random.randrange(len(kinds))] = random.choice(list(odd_columns))
    table = pa.Table.from_arrays([odd_columns[kind]() for kind in kinds], names=chosen)
    if random.random() < 0.15:
        table = table.slice(0, 0)
    file = work / "data" / random.choice(["odd.parquet", "odd.arrow"])
    try:
        if file.suffix == ".parquet":
            parquet.write_table(table, file)
        else:
            with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
    except (pa.ArrowException, ValueError, NotImplementedError):  # a table that this format cannot hold
        file = work / "data/rows.parquet"
    settings: dict[str, Any] = {"train": f"data/{file.name}", "max_seq_len": 64}
    if random.random() < 0.2:
        settings["streaming"] = True
    recipe = RECIPE | {"data": settings, "train": {"max_steps": 1}, "output": "new"}
    (work / "recipe.yaml").write_text(json.dumps(recipe))
    command = random.choice(["check", "check", "train", "init"])
    told = ", ".join(f"{name[:20]!r}: {kind}" for name, kind in zip(chosen, kinds, strict=True))
    if command == "init":
        words = ["init", "model", f"data/{file.name}", "--gpu", "12GB", "--output", "made.yaml"]
        return told, (file, words, ["made.yaml"], lambda _: None)
    return told, (
        file,
        [command, "recipe.yaml"],
        ["new"],
        lambda _: wrong_run(work / "new") if command == "train" else None,
    )


# ── links, pipes, other people's files where a run folder has its own ───────────────────────────────────────────

_OURS = [
    ".lock",
    "prepared",
    "checkpoints",
    "adapter",
    "adapter_last",
    "status.json",
    "report.json",
    "report.html",
    "metrics.jsonl",
]
_OURS += [
    "recipe.yaml",
    "environment.json",
    "compiled",
    "loss.png",
    "checkpoints/step_000004",
    "checkpoints/step_000004/best",
]
_OURS += [
    ".adapter.tmp-1",
    ".adapter.old-1",
    "checkpoints/.x.tmp-1",
    "checkpoints/.keep.old-9",
    "prepared/corpus",
    "README.md",
    ".name",
]


def _links(random: Random, work: Path) -> tuple[str, Planned]:
    """Nothing outside the output may change, and nothing of the user's in it: `precious` is compared byte for byte."""
    precious = work / "precious"
    (precious / "keep").mkdir(parents=True)
    for at in range(3):
        (precious / f"{at}.txt").write_text("precious")
        (precious / "keep" / f"{at}.json").write_text("{}")
    place = work / random.choice(["run", "run", "new", "whole"])
    place.mkdir(exist_ok=True)
    told = []
    mine: list[Path] = []
    for name in random.sample(_OURS, random.choice([1, 1, 2, 3])):
        at = place / name
        if any(parent.is_symlink() or (parent.exists() and not parent.is_dir()) for parent in at.parents):
            continue  # what was put there before is all that there is
        at.parent.mkdir(parents=True, exist_ok=True)
        how = random.choice(["link", "link", "folder link", "hard link", "pipe", "folder", "file", "loop", "dangling"])
        if at.is_symlink() or at.is_file():
            at.unlink()
        elif at.is_dir():
            shutil.rmtree(at)
        if how == "link":
            at.symlink_to(random.choice([precious / "0.txt", Path("../precious/1.txt")]))
        elif how == "folder link":
            at.symlink_to(random.choice([precious, precious / "keep"]))
        elif how == "hard link":
            os.link(precious / "2.txt", at)
        elif how == "pipe":
            os.mkfifo(at)
        elif how == "folder":
            at.mkdir()
            (at / "mine.txt").write_text("mine")
            if at.name in ("prepared", "compiled", "corpus", "README.md", "report.html", "checkpoints"):
                mine.append(at / "mine.txt")  # other folders of these names are ours to replace
        elif how == "file":
            at.write_text("mine")
        elif how == "loop":
            at.symlink_to(at.name)
        else:
            at.symlink_to(precious / "none")
        told.append(f"{place.name}/{name}: {how}")
    command = random.choice(["resume", "resume", "train", "check", "runs", "eval", "merge"])
    name = place.name

    def kept(_result: Result) -> str | None:
        gone = [str(path.relative_to(work)) for path in mine if not path.is_file() or path.read_text() != "mine"]
        return f"the user's own {gone[0]} is gone" if gone else None

    if command in ("train", "check"):
        (work / "recipe.yaml").write_text(json.dumps(RECIPE | {"output": name, "train": {"max_steps": 1}}))
        words = [command, "recipe.yaml", *(["--prepare"] if command == "check" else [])]
        return ", ".join(told), (place, words, [name], kept)
    if command == "resume":
        (work / "recipe.yaml").write_text(json.dumps(RECIPE | {"output": name}))
        return ", ".join(told), (place, ["train", "recipe.yaml", "--resume"], [name], kept)
    if command == "runs":
        return ", ".join(told), (place, ["runs", ".", "--json"], [], lambda result: wrong_json(result.stdout))
    if command == "eval":
        return ", ".join(told), (place, ["eval", name, "--json"], [], lambda result: wrong_json(result.stdout))
    words = ["merge", name, "--output", "merged", "--json"]
    return ", ".join(told), (place, words, ["merged"], lambda result: wrong_json(result.stdout))


# ── status files ────────────────────────────────────────────────────────────────────────────────────────────────


def _status(random: Random, work: Path) -> tuple[str, Planned]:
    """One run folder with odd files among good ones: `lora runs` shows the others as they are."""
    shutil.copytree(work / "whole", work / "runs/good")
    shutil.copytree(work / "run", work / "runs/stopped")
    shutil.copytree(work / "whole", work / "runs/odd")
    odd: list[Any] = [
        *ODD,
        *LARGE,
        10**400,
        "0001-01-01T00:00:00+23:59",
        "\ud800",
        "9999-12-31T23:59:59-23:59",
        {"a": {}},
    ]
    file = (
        work
        / "runs/odd"
        / random.choice(["status.json", "report.json", "environment.json", "metrics.jsonl", "recipe.yaml"])
    )
    text = file.read_text(encoding="utf-8")
    how = random.choice(["value", "value", "value", "removed", "list", "deep", "noise", "nan", "duplicate"])
    if file.suffix == ".yaml" or how == "noise":
        file.write_bytes(random.randbytes(200))
        how = "noise"
    elif how == "deep":
        file.write_text("[" * 100_000)
    elif how == "list":
        file.write_text("[1, 2]")
    elif how == "nan":
        file.write_text(text.replace(": 1", ": NaN").replace(": 2", ": 1e999"))
    elif how == "duplicate":
        file.write_text(text * 2)
    else:
        lines = text.splitlines() if file.suffix == ".jsonl" else [text]
        at = random.randrange(len(lines))
        values = json.loads(lines[at])
        for key in random.sample(list(values), min(len(values), random.choice([1, 3, 9]))):
            if how == "removed":
                del values[key]
            else:
                values[key] = random.choice(odd)
            how = f"{how} {key}"
        lines[at] = json.dumps(values)
        file.write_text("\n".join(lines) + "\n")

    def others_are_there(result: Result) -> str | None:
        if problem := wrong_json(result.stdout):
            return problem
        for name, state in (("good", "done"), ("stopped", "interrupted")):
            found = [run for run in json.loads(result.stdout) if Path(str(run.get("folder", ""))).name == name]
            if len(found) != 1 or found[0]["state"] != state:
                return f"the run {name!r} is shown as {found}"[:300]
        return None

    words = random.choice([["runs", "runs", "--json"], ["runs", "runs"], ["runs", "runs/odd"]])
    told = f"{file.name}: {how}"
    return told[:200], (file, words, [], others_are_there if "--json" in words else lambda _: None)


_KINDS: dict[str, Callable[[Random, Path], tuple[str, Planned]]] = {
    "model": _model,
    "tokenizer": _tokenizer,
    "template": _template,
    "generation": _generation,
    "columns": _columns,
    "links": _links,
    "status": _status,
}
