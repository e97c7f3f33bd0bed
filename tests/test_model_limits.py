"""Models of strangers: a line in a small file asks for all time or memory, other weights, or somebody's code."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Said
from safetensors.torch import load_file, save_file

from lora_cli import limits
from lora_cli.base.source import find_base
from lora_cli.base.weight_files import fingerprint, read_header
from lora_cli.errors import LoraError

INDEX = "model.safetensors.index.json"
DEEP = "[" * 100_000 + "]" * 100_000


def config_of(gpt2: Path, **changed: Any) -> str:
    return json.dumps(json.loads((gpt2 / "config.json").read_text()) | changed)


def header(tensors: dict[str, Any] | str, data: bytes = b"") -> bytes:
    text = (tensors if isinstance(tensors, str) else json.dumps(tensors)).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture
def checked(lora: Callable[..., Said], recipe_file: Callable[..., Path]) -> Callable[..., Said]:
    """`lora check` of a model, which ends soon whatever it is."""

    def check(folder: Path, *options: str) -> Said:
        began = time.thread_time()
        said = lora("check", recipe_file(base_model=str(folder)), *options)
        assert time.thread_time() - began < 10
        return said

    return check


# ── config.json ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "changed",
    [
        {"n_layer": 10**9},
        {"num_hidden_layers": 10**9},
        {"num_labels": 10**8},
        {"num_local_experts": 10**9},
        {"n_positions": 10**12},
        {"vocab_size": 10**12},
        {"n_embd": 10**30},
        {"text_config": {"num_hidden_layers": 10**7}},
        {"encoder_layers": 10**8},
        {"num_mtp_modules": 10**8},
        {"mlp_only_layers": [10**12]},
        {"n_layer": 290, "num_experts": 900},
    ],
)
def test_a_count_that_no_checkpoint_can_have_is_refused_before_anything_is_built(
    checked: Any, model: Callable[..., Path], changed: dict[str, Any]
) -> None:
    said = checked(model({}, **changed))
    assert said.code == 2, said.text
    assert "config.json: config.json says" in said.error
    assert "limit" in said.error


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"n_layer": 3}, "12 tensors missing, 0 of another shape"),
        ({"n_layer": 299}, "tensors missing"),
        ({"vocab_size": 10**8}, "1 of another shape"),
        ({"n_positions": 99}, "1 of another shape"),
        ({"n_embd": 32}, "of another shape"),
    ],
)
def test_check_refuses_what_cannot_be_loaded_from_the_headers_alone(
    checked: Any, model: Callable[..., Path], lora: Any, recipe_file: Any, changed: dict[str, Any], says: str
) -> None:
    folder = model({}, **changed)
    assert says in checked(folder).error
    if changed.get("n_layer", 0) < 10 and changed.get("vocab_size", 0) < 10**6:
        assert says in lora("train", recipe_file(base_model=str(folder))).error


@pytest.mark.parametrize(
    "changed",
    [
        {"activation_function": "nope"},
        {"n_head": 5},
        {"n_head": -1},
        {"n_embd": -64},
        {"n_embd": 0},
        {"n_positions": -5},
        {"model_type": "vit", "architectures": [1]},
        {"model_type": "vit", "architectures": 7},
        {"quantization_config": {"quant_method": "unheard-of"}},
    ],
)
def test_values_that_no_model_can_have_are_refused_in_words(
    checked: Any, model: Callable[..., Path], changed: dict[str, Any]
) -> None:
    said = checked(model({}, **changed))
    assert said.code == 2, said.text
    assert "fix: " in said.error


@pytest.mark.parametrize("command", ["eval", "generate", "merge"])
def test_a_model_whose_code_fails_on_any_row_is_an_error_in_words(
    command: str, model: Callable[..., Path], run_recipe: Any, lora: Any, tmp_path: Path
) -> None:
    run_recipe()
    run, folder = str(tmp_path / "run"), str(model({}, n_head=-1))
    said = lora(
        *{
            "eval": ("eval", "--model", folder, "--data", "tests/data/smoke.jsonl"),
            "generate": ("generate", "hello", "--model", folder),
            "merge": ("merge", run, "--base", folder, "--output", str(tmp_path / "merged")),
        }[command]
    )
    assert said.code == 2, said.text
    what = "GPT2LMHeadModel cannot compute a row of text: "
    assert ("was trained on another base model" if command == "merge" else what) in said.error  # asked first there
    assert "fix: " in said.error
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "changed",
    [
        {"_attn_implementation": "kernels-community/flash-attn3"},
        {"attn_implementation": "kernels-community/flash-attn3"},
        {"_attn_implementation_internal": "somebody/code"},
        {"_experts_implementation": "somebody/code"},
        {"text_config": {"_attn_implementation": "somebody/code"}},
        {"transformers_weights": "other.safetensors"},
    ],
)
def test_a_configuration_that_names_code_or_weights_elsewhere_is_refused_and_the_fix_works(
    checked: Any, model: Callable[..., Path], changed: dict[str, Any]
) -> None:
    folder = model({}, **changed)
    said = checked(folder)
    assert said.code == 2, said.text
    assert "which is neither weights nor code of this folder" in said.error
    config = json.loads((folder / "config.json").read_text())
    assert f"fix: remove {next(iter(changed))}" in said.error
    del config[next(iter(changed))]
    (folder / "config.json").write_text(json.dumps(config))
    assert checked(folder).code == 0


def test_skeletons_are_built_with_the_attention_of_this_program(
    checked: Any, model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    seen: list[Any] = []
    original = AutoModelForCausalLM.from_config

    def spy(config: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("attn_implementation"))
        return original(config, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", spy)
    assert checked(model({})).code == 0
    assert seen
    assert all(seen)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [DEEP, '{"a": ' + DEEP + "}", "7", '{"a": 1e', "\ufeff{"])
def test_a_damaged_or_deep_json_file_is_refused_in_words(
    checked: Any, model: Callable[..., Path], name: str, content: str
) -> None:
    said = checked(model({name: content}))
    assert said.code == 2, said.text
    assert "a bug in lora" not in said.text


@pytest.mark.parametrize("ends", [10**30, -1, [0, 10**12], "x", 1.5])
def test_an_end_token_without_a_possible_number_is_refused(checked: Any, model: Callable[..., Path], ends: Any) -> None:
    folder = model({"generation_config.json": json.dumps({"eos_token_id": ends})})
    assert "eos_token_id is not a token's number" in checked(folder).error


# ── weights ─────────────────────────────────────────────────────────────────────────────────────────────────────

ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "tensors",
    [
        '{"a": ' + DEEP + "}",
        DEEP,
        {"a": ENTRY | {"data_offsets": [0.0, 4.0]}},
        {"a": ENTRY | {"data_offsets": [-4, 4]}},
        {"a": ENTRY | {"data_offsets": [4, 0]}},
        {"a": ENTRY | {"data_offsets": [0]}},
        {"a": ENTRY | {"shape": "1"}},
        {"a": ENTRY | {"shape": ["1"]}},
        {"a": ENTRY | {"shape": [2]}},
        {"a": ENTRY | {"shape": [10**12]}},
        {"a": ENTRY, "b": ENTRY},
        {"a": ENTRY, "__metadata__": {"format": 1}},
        {"a": ENTRY, "__metadata__": 7},
        {"a": 7},
        {"a": ENTRY | {"dtype": []}},
    ],
)
def test_a_header_that_no_library_reads_is_refused_by_check(
    checked: Any, model: Callable[..., Path], tensors: Any
) -> None:
    said = checked(model({"model.safetensors": header(tensors, b"\0" * 4)}))
    assert said.code == 2, said.text
    assert "damaged or incomplete safetensors file" in said.error


def test_a_checkpoint_without_tensors_is_refused(checked: Any, model: Callable[..., Path]) -> None:
    assert "there are no tensors" in checked(model({"model.safetensors": header({})})).error


def test_a_header_longer_than_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HEADER_BYTES", 100)
    (tmp_path / "x.safetensors").write_bytes(header({"a" * 200: ENTRY}, b"\0" * 4))
    with pytest.raises(LoraError, match="no safetensors header"):
        read_header(tmp_path / "x.safetensors")


@pytest.fixture
def sharded(tiny_gpt2: Path, tmp_path: Path) -> Path:
    """The tiny GPT-2 in two files and an index."""
    folder = Path(shutil.copytree(tiny_gpt2, tmp_path / "sharded"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, inside in parts.items() for name in inside}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_the_fingerprint_is_of_the_weights_that_are_loaded(checked: Any, sharded: Path, tiny_gpt2: Path) -> None:
    assert fingerprint(sharded) == fingerprint(tiny_gpt2)
    assert checked(sharded).code == 0
    tensors = load_file(tiny_gpt2 / "model.safetensors")
    other = {name: torch.randn(tensor.shape).to(tensor.dtype) for name, tensor in tensors.items()}
    save_file(other, sharded / "model.safetensors", {"format": "pt"})
    said = checked(sharded)
    assert "has both model.safetensors and an index that names other files" in said.error
    assert f"fix: remove the one that is left over: model.safetensors, or {INDEX} with its files" in said.error
    (sharded / INDEX).unlink()
    kept = fingerprint(sharded)
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(sharded, dtype="auto").state_dict()
    assert torch.equal(loaded["transformer.wpe.weight"], other["transformer.wpe.weight"])
    assert kept != fingerprint(tiny_gpt2)


def test_an_index_of_the_single_file_is_no_contradiction(checked: Any, tiny_gpt2: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_gpt2, tmp_path / "both"))
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    assert checked(folder).code == 0


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({}, "there are no tensors"),
        ({"a": "../../etc/passwd"}, "names a file outside its folder: ../../etc/passwd"),
        ({"a": "/etc/passwd"}, "names a file outside its folder"),
        ({"a": "sub/one.safetensors"}, "names a file outside its folder"),
        ({"a": ".."}, "names a file outside its folder"),
        ({"a": "C:one.safetensors"}, "names a file outside its folder"),
        ({"a": "one.safetensors"}, "disagree, first on a"),
        ({"a": 7}, "not readable"),
        ({"a": "missing.safetensors"}, "are missing, the first is missing.safetensors"),
        ([], "not readable"),
        (DEEP, "not readable"),
    ],
)
def test_an_index_is_believed_only_where_it_names_files_of_its_folder(
    checked: Any, sharded: Path, weight_map: Any, says: str
) -> None:
    text = json.dumps({"weight_map": weight_map}) if weight_map is not DEEP else f'{{"weight_map": {DEEP}}}'
    (sharded / INDEX).write_text(text)
    said = checked(sharded)
    assert said.code == 2
    assert says in said.error


def test_a_tensor_in_two_files_is_refused(checked: Any, sharded: Path) -> None:
    tensors = load_file(sharded / "one.safetensors") | load_file(sharded / "two.safetensors")
    save_file(tensors, sharded / "two.safetensors", {"format": "pt"})
    assert "is in two files" in checked(sharded).error


def test_links_out_of_the_folder_are_refused_but_to_the_hub_cache(
    checked: Any, tiny_gpt2: Path, tmp_path: Path
) -> None:
    away = Path(shutil.copytree(tiny_gpt2, tmp_path / "models--a--b" / "blobs"))
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in away.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert checked(snapshot).code == 0
    own = Path(shutil.copytree(tiny_gpt2, tmp_path / "own"))
    (own / "model.safetensors").unlink()
    (own / "model.safetensors").symlink_to(tiny_gpt2 / "model.safetensors")
    assert "is a link that leads out of this folder" in checked(own).error
    os.unlink(own / "model.safetensors")
    shutil.copy(tiny_gpt2 / "model.safetensors", own)
    assert checked(own).code == 0


def test_a_download_takes_no_code_and_no_pickle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import fnmatch

    import huggingface_hub

    from lora_cli.planning import skeleton

    asked: list[list[str]] = []

    def download(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.append(allow_patterns)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(LoraError):
        find_base("owner/name")
    with pytest.raises(LoraError):
        skeleton.look_at_model("owner/name")
    assert len(asked) == 3
    for patterns in asked:
        assert {
            name
            for name in ("tokenizer.json", "tokenizer.model", "tokenizer_x.py", "tokenizer.pkl", "tokenizer", "x.bin")
            if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        } == {"tokenizer.json", "tokenizer.model"}


# ── tokenizers ──────────────────────────────────────────────────────────────────────────────────────────────────


def grown(tiny: dict[str, Any], how: str) -> None:
    """Changes what tokenizer.json says."""
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    template = tiny["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {},
    }
    added = {"SpecialToken": {"id": "<x>", "type_id": 0}}
    if how == "normalizer":
        tiny["normalizer"] = {"type": "Sequence", "normalizers": [replace] * 4}
    elif how == "regex in normalizer":
        tiny["normalizer"] = replace | {"pattern": {"Regex": ""}}
    elif how == "a number beyond all tables":
        tiny["model"]["vocab"]["a"] = 4294967295
    elif how == "an added token beyond the vocabulary":
        template["single"].append(added)
        template["special_tokens"] = {"<x>": {"id": "<x>", "ids": [1_000_000_000], "tokens": ["<x>"]}}
    elif how == "very many added tokens":
        template["single"] += [added] * 100_000
        template["special_tokens"] = {"<x>": {"id": "<x>", "ids": [0], "tokens": ["<x>"]}}
    elif how == "an unknown special token":
        template["single"].append(added)
    elif how == "a long token":
        tiny["model"]["vocab"]["b" * 100_000] = 511
    elif how == "a regex that panics":
        tiny["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": r"(a|a)*$|(\w+\s?)+!"}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        }


@pytest.mark.parametrize(
    "how",
    [
        "normalizer",
        "regex in normalizer",
        "a number beyond all tables",
        "an added token beyond the vocabulary",
        "very many added tokens",
        "an unknown special token",
        "a long token",
        "a regex that panics",
    ],
)
def test_a_tokenizer_that_would_take_all_memory_or_panic_is_refused_in_words(
    checked: Any, model: Callable[..., Path], tiny_gpt2: Path, tmp_path: Path, how: str
) -> None:
    tiny = json.loads((tiny_gpt2 / "tokenizer.json").read_text())
    grown(tiny, how)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a" * 60 + " word" * 30, "completion": "a" * 100 + "."}) + "\n")
    said = checked(model({"tokenizer.json": json.dumps(tiny)}), "--set", f"data.train={rows}")
    assert said.code == 2, said.text
    assert "tokenizer" in said.error
    assert "fix: " in said.error
    assert "a bug in lora" not in said.text


def test_settings_of_length_in_tokenizer_json_change_no_row(
    checked: Any, model: Callable[..., Path], tiny_gpt2: Path
) -> None:
    tiny = json.loads((tiny_gpt2 / "tokenizer.json").read_text())
    number = {"strategy": {"Fixed": 1_000_000}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    tiny["padding"] = number | {"pad_type_id": 0, "pad_token": "x"}
    tiny["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    plain = json.loads(checked(tiny_gpt2, "--json").out)
    assert json.loads(checked(model({"tokenizer.json": json.dumps(tiny)}), "--json").out)["tokens"] == plain["tokens"]
