"""What is in a merged folder: the base's own files and tensors, so that every program reads the same model."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import open_base, save_tiny, with_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lora_cli.adapters.file import save_adapter
from lora_cli.adapters.layer import LoRALinear
from lora_cli.adapters.opened import open_model
from lora_cli.adapters.trained import trained_modules
from lora_cli.base.load import load_model
from lora_cli.base.source import find_base
from lora_cli.errors import CheckFailed, LoraError
from lora_cli.exporting import export
from lora_cli.merging import job as merging
from lora_cli.merging.merge import merge

TOKENS = torch.tensor([[5, 9, 2, 77, 301, 40, 8, 8, 19, 250]])
IDS = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
WIDE = IDS | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def adapter_for(
    base: Path,
    folder: Path,
    *,
    quantization: str = "none",
    dtype: torch.dtype = torch.float32,
    scale: float = 0.1,
    prompting: str | None = None,
    template: str | None = None,
    **targets: Any,
) -> Path:
    model = with_adapter(open_base(base, quantization, dtype), **({"target_modules": "all-linear"} | targets))
    with torch.no_grad():
        for layer in trained_modules(model).values():
            layer.lora_B.mul_(scale / 0.1)
    folder.mkdir()
    save_adapter(
        model,
        folder,
        find_base(str(base)),
        quantization=quantization,
        double_quantization=True,
        chat_template=template,
        prompting=prompting,
    )
    return folder


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


def reopened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def base_and_adapter(adapter: Path) -> Tensor:
    return logits(open_model(None, adapter, dtype="fp32", device="cpu").model)


def edited(base: Path, folder: Path, **config: Any) -> Path:
    """A copy of a base whose config.json has other values; None removes a key."""
    shutil.copytree(base, folder)
    values = json.loads((folder / "config.json").read_text()) | config
    values = {key: value for key, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def with_tensors(base: Path, folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    shutil.copytree(base, folder)
    tensors = edit(load_file(folder / "model.safetensors"))
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def dtypes(folder: Path) -> dict[str, str]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            found |= {key: stored.get_slice(key).get_dtype() for key in stored.keys()}  # noqa: SIM118
    return found


# config.json, as programs that know no transformers 5 read it

ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"rope_theta": 500000.0}),
    "llama 3": (
        "LlamaConfig",
        {
            "rope_theta": 500000.0,
            "rope_scaling": {
                **{"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0},
                **{"original_max_position_embeddings": 64, "rope_type": "llama3"},
            },
        },
    ),
    "mistral": ("MistralConfig", {"rope_theta": 1000000.0, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {"rope_theta": 1000000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    "qwen3": ("Qwen3Config", {"rope_theta": 1000000, "head_dim": 16}),
    "phi3": ("Phi3Config", {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
    "gemma2": ("Gemma2Config", {"rope_theta": 20000.0, "head_dim": 16, "num_key_value_heads": 2}),
    "gpt-neox": ("GPTNeoXConfig", {"rotary_emb_base": 20000, "rotary_pct": 0.5}),
    "stablelm": ("StableLmConfig", {"rope_theta": 30000, "partial_rotary_factor": 0.25}),
    "granite": ("GraniteConfig", {"rope_theta": 5000000.0, "attention_multiplier": 0.3}),
    "starcoder2": ("Starcoder2Config", {"rope_theta": 99999.43, "norm_epsilon": 1e-05}),
}


@pytest.mark.parametrize("dtype", ["keep", "bf16"])
@pytest.mark.parametrize("name", ROPES)
def test_config_json_keeps_every_key_and_value(name, dtype, tmp_path, tokenizer):
    """As transformers 4 writes it: its keys for rotary settings have no place in transformers 5's classes."""
    import transformers

    kind, own = ROPES[name]
    config = getattr(transformers, kind)(**WIDE, **({"num_key_value_heads": 4} | own if "neox" not in name else own))
    base = save_tiny(config, tmp_path / "base", tokenizer=tokenizer)
    old = {"rope_parameters": None, "dtype": None, "torch_dtype": "float32", "transformers_version": "4.46.0"}
    old |= {"unknown_key": {"kept": [1, 2.50, None, "é"]}}
    base = edited(base, tmp_path / "old", **(old | own))
    adapter = adapter_for(base, tmp_path / "adapter", target_modules="attention")
    report = merge(adapter, tmp_path / "merged", dtype=dtype)
    assert report.kept > 0.9
    before, after = (json.loads((each / "config.json").read_text()) for each in (base, tmp_path / "merged"))
    assert list(after) == list(before)
    changed = {} if dtype == "keep" else {"torch_dtype": "bfloat16"}
    assert {key: after[key] for key in before if after[key] != before[key]} == changed
    for key in own:
        assert after.get(key) == before.get(key), key
    if dtype == "keep":
        assert (base / "config.json").read_bytes() == (tmp_path / "merged" / "config.json").read_bytes()
        assert_close(logits(reopened(tmp_path / "merged")), base_and_adapter(adapter), rtol=0, atol=1e-5)


def test_the_bases_own_files_are_copied_byte_for_byte(tiny_llama, tmp_path):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    extra = {
        "tokenizer.model": b"\x0a\x00sentencepiece",
        "LICENSE": b"Apache\r\n",
        "vocab.txt": b"a\nb",
        "preprocessor_config.json": b'{"size": 224 }\n',
        "additional_chat_templates/tools.jinja": b"{{ tools }}",
        "special_tokens_map.json": b'{"eos_token":"<|endoftext|>"}',
        "README.md": b"---\nlicense: apache-2.0\n---\n# Base\n",
    }
    for name, content in extra.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(content)
    settings = json.loads((base / "tokenizer_config.json").read_text()) | {"tokenizer_class": "LlamaTokenizerFast"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings, indent=7))
    merge(adapter_for(base, tmp_path / "adapter", prompting="raw"), tmp_path / "merged")
    for path in (each for each in base.rglob("*") if each.is_file() and each.name != "model.safetensors"):
        name = path.relative_to(base).as_posix()
        target = tmp_path / "merged" / ("README.base.md" if name == "README.md" else name)
        assert target.read_bytes() == path.read_bytes(), name
    assert "lora merge" in (tmp_path / "merged" / "README.md").read_text()
    names = {path.name for path in (tmp_path / "merged").iterdir()} - {path.name for path in base.iterdir()}
    assert names == {"merge.json", "README.base.md"}
    assert str(tmp_path) not in (tmp_path / "merged" / "README.md").read_text()


def test_pickles_code_and_other_forms_of_the_weights_are_left_out_and_said(tiny_llama, tmp_path):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    left_out = ["pytorch_model.bin", "training_args.bin", "model.gguf", "consolidated.safetensors", "original/x.pth"]
    for name in [*left_out, "modeling_own.py", ".git/config", "pytorch_model.bin.index.json"]:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(b"{}")
    adapter = adapter_for(base, tmp_path / "adapter")
    said: list[str] = []
    report = merge(adapter, tmp_path / "merged", say=said.append)
    names = {path.relative_to(tmp_path / "merged").as_posix() for path in (tmp_path / "merged").rglob("*")}
    assert not names & {*left_out, "modeling_own.py", ".git", "original", "pytorch_model.bin.index.json"}
    assert any("pickled files can run code" in note for note in said)
    assert any("modeling_own.py" in note and "--trust-remote-code" in note for note in said)
    assert report.notes == said
    merge(adapter, tmp_path / "with code", trust_remote_code=True)
    assert (tmp_path / "with code" / "modeling_own.py").exists()


def test_a_link_out_of_the_bases_folder_is_not_published(tiny_llama, tmp_path):
    base = shutil.copytree(tiny_llama, tmp_path / "the base")
    (tmp_path / "id_rsa").write_text("private")
    (base / "vocab.txt").symlink_to(tmp_path / "id_rsa")
    adapter = adapter_for(base, tmp_path / "adapter")
    with pytest.raises(LoraError, match=r"vocab.txt is a link that leads out of this folder") as error:
        merge(adapter, tmp_path / "merged")
    command = shlex.split(str(error.value.fix).split(": ")[1].split(", and")[0])
    assert command[:2] == ["cp", "-rL"]
    shutil.copytree(command[2], command[3])  # follows links, as cp -rL does
    merge(adapter, tmp_path / "merged", base=command[3])


def test_a_snapshot_of_the_hubs_cache_is_all_links_and_merges(tiny_llama, tmp_path):
    cache = tmp_path / "hub" / "models--someone--tiny"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for path in tiny_llama.iterdir():
        shutil.copyfile(path, cache / "blobs" / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    merge(adapter_for(snapshot, tmp_path / "adapter"), tmp_path / "merged")
    assert not any(path.is_symlink() for path in (tmp_path / "merged").iterdir())
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (tiny_llama / "tokenizer.json").read_bytes()


# Tensors


def test_names_and_dtypes_of_the_base_are_kept_tensor_by_tensor(tiny_llama, tmp_path):
    def mixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {k: t if "norm" in k else t.bfloat16() for k, t in tensors.items()}
        tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].half()
        tensors["model.layers.2.mtp.weight"] = torch.randn(3, 5)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
        return tensors | {"step": torch.tensor(7)}

    base = with_tensors(tiny_llama, tmp_path / "base", mixed)
    before = load_file(base / "model.safetensors")
    report = merge(adapter_for(base, tmp_path / "adapter", target_modules=["q_proj", "up_proj"]), tmp_path / "merged")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert {name: each.dtype for name, each in after.items()} == {name: each.dtype for name, each in before.items()}
    for name, tensor in before.items():
        touched = name.endswith(("q_proj.weight", "up_proj.weight"))
        assert torch.equal(after[name], tensor) != touched, name
    note = next(note for note in report.notes if "carried over" in note)
    assert note.startswith("3 tensors that the model's class does not use")


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_names_without_the_prefix_of_the_class_are_kept(prefix, tiny_gpt2, tmp_path):
    """GPT-2 on the hub has `h.0.attn…`; transformers would save `transformer.h.0.attn…`."""
    base = with_tensors(
        tiny_gpt2,
        tmp_path / "base",
        lambda tensors: {prefix + key.removeprefix("transformer."): each for key, each in tensors.items()},
    )
    adapter = adapter_for(base, tmp_path / "adapter")
    merge(adapter, tmp_path / "merged", dtype="fp32")
    assert set(dtypes(tmp_path / "merged")) == set(dtypes(base))
    assert_close(logits(reopened(tmp_path / "merged")), base_and_adapter(adapter), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2"])  # the second has tied embeddings
def test_weights_are_in_files_of_the_size_that_was_asked_for_as_transformers_writes_them(
    kind, tmp_path, request, tokenizer
):
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(kind), dtype=torch.float32)
    model.save_pretrained(tmp_path / "base", max_shard_size="150KB")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = adapter_for(tmp_path / "base", tmp_path / "adapter", quantization="nf4")
    merge(adapter, tmp_path / "one")
    merge(adapter, tmp_path / "many", dtype="bf16", max_shard_size="40kb")
    assert [each.name for each in (tmp_path / "one").glob("model*")] == ["model.safetensors"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "many").save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    ours, theirs = ({each.name for each in (tmp_path / name).glob("model*")} for name in ("many", "theirs"))
    assert ours == theirs
    assert len(ours) > 3
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    sizes = {}
    for name in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / "many" / name)
        assert set(tensors) == {each for each, file in index["weight_map"].items() if file == name}
        sizes[name] = sum(each.nbytes for each in tensors.values())
        assert sizes[name] <= 40_000 or len(tensors) == 1
    assert max(sizes.values()) > 40_000  # the embeddings, in a file of their own
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    assert set(dtypes(tmp_path / "many").values()) == {"BF16"}
    assert_close(logits(reopened(tmp_path / "one")), base_and_adapter(adapter), rtol=0, atol=1e-5)
    assert_close(logits(reopened(tmp_path / "many")), base_and_adapter(adapter), rtol=0, atol=0.1)


@pytest.mark.parametrize("size", ["0GB", "-1GB", "5", "many", "nanGB", "infGB", ""])
def test_a_size_of_files_that_is_none_is_refused(size, tiny_llama, tmp_path):
    adapter = adapter_for(tiny_llama, tmp_path / "adapter")
    with pytest.raises(LoraError, match="is not a size of files"):
        merge(adapter, tmp_path / "merged", max_shard_size=size)


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("stored", ["nf4", "int8"])
def test_a_base_that_is_stored_quantized_becomes_dense_under_its_own_names(stored, kind, tmp_path, request, tokenizer):
    from transformers import BitsAndBytesConfig

    plain = request.getfixturevalue(kind)
    how = (
        BitsAndBytesConfig(load_in_8bit=True)
        if stored == "int8"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    )
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=how, dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    assert "quantization_config" in json.loads((tmp_path / "base" / "config.json").read_text())
    adapter = adapter_for(tmp_path / "base", tmp_path / "adapter", quantization=stored, target_modules="attention")
    merge(adapter, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    assert set(dtypes(tmp_path / "merged")) == set(dtypes(plain))
    assert set(dtypes(tmp_path / "merged").values()) == {"F32"}
    assert_close(logits(reopened(tmp_path / "merged")), base_and_adapter(adapter), rtol=0, atol=1e-4)
    with pytest.raises(LoraError, match="no original weights") as error:
        merge(adapter, tmp_path / "original", onto="original")
    assert "--base" in str(error.value.fix)


def test_a_peft_adapter_on_a_base_stored_in_4_bits_merges(tiny_llama, tmp_path, tokenizer):
    import peft
    from transformers import BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=how, dtype=torch.float32).save_pretrained(
        tmp_path / "base"
    )
    tokenizer.save_pretrained(tmp_path / "base")
    model = load_model(
        find_base(str(tmp_path / "base")), quantization="nf4", dtype=torch.float32, device=torch.device("cpu")
    )
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    theirs: Any = peft.get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    merge(tmp_path / "theirs", tmp_path / "merged", base=str(tmp_path / "base"))
    assert_close(logits(reopened(tmp_path / "merged")), logits(theirs), rtol=0, atol=1e-4)


def test_a_number_that_the_dtype_cannot_hold_is_refused_anywhere(tiny_llama, tmp_path):
    """In the embeddings, which no adapter touches."""

    def large(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["model.embed_tokens.weight"][400] = 70_000.0
        return tensors

    base = with_tensors(tiny_llama, tmp_path / "base", large)
    adapter = adapter_for(base, tmp_path / "adapter")
    with pytest.raises(CheckFailed, match=r"model.embed_tokens.weight holds 7e\+04") as error:
        merge(adapter, tmp_path / "merged", dtype="fp16")
    assert not (tmp_path / "merged").exists()
    assert "--dtype bf16" in str(error.value.fix)
    merge(adapter, tmp_path / "merged", dtype="bf16")  # the fix


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:fan_in_fan_out is set to True")
def test_an_adapter_on_a_head_that_is_shared_is_refused(tiny_gpt2, tmp_path):
    import peft

    plain = AutoModelForCausalLM.from_pretrained(tiny_gpt2, dtype=torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    peft.get_peft_model(plain, config).save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    with pytest.raises(LoraError, match="shares with its embeddings"):
        merge(tmp_path / "theirs", tmp_path / "merged", base=str(tiny_gpt2))
    assert not (tmp_path / "merged").exists()


# Generation and templates


def test_the_trained_stop_token_is_added_to_the_ends(tiny_llama, tmp_path):
    """The template ends a turn in <|im_end|>, but the base's settings know <|endoftext|> alone: it would not stop."""
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    settings = json.loads((base / "generation_config.json").read_text()) | {"eos_token_id": 0, "top_p": 0.7}
    assert settings["_from_model_config"]  # with it transformers 4 could take the ends from config.json instead
    (base / "generation_config.json").write_text(json.dumps(settings))
    stop = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("<|im_end|>")
    report = merge(adapter_for(base, tmp_path / "adapter", prompting="template"), tmp_path / "merged")
    written = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    del settings["_from_model_config"]
    assert written == settings | {"eos_token_id": [0, stop]}
    assert report.stop_tokens == ["<|im_end|>"]
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["prompting"] == "template"
    # again, on what was merged: nothing is missing any more
    again = merge(adapter_for(tmp_path / "merged", tmp_path / "second", prompting="template"), tmp_path / "twice")
    assert again.stop_tokens == []
    assert (tmp_path / "twice" / "generation_config.json").read_bytes() == (
        tmp_path / "merged" / "generation_config.json"
    ).read_bytes()


def test_an_adapter_trained_raw_stops_as_its_base_does(tiny_llama, tmp_path):
    report = merge(adapter_for(tiny_llama, tmp_path / "adapter", prompting="raw"), tmp_path / "merged")
    assert report.stop_tokens == []
    for name in ("generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "merged" / name).read_bytes() == (tiny_llama / name).read_bytes()


def test_ends_of_a_base_without_generation_settings_come_from_config_json(tiny_llama, tmp_path):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    (base / "generation_config.json").unlink()
    stop = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("<|im_end|>")
    merge(adapter_for(base, tmp_path / "adapter", prompting="template"), tmp_path / "merged")
    written = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [0, stop]


def test_a_template_of_the_adapter_replaces_the_bases_alone(tiny_llama, tmp_path):
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>{% endfor %}\n"
    adapter = adapter_for(tiny_llama, tmp_path / "adapter", template=template, prompting="template")
    merge(adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == template
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == template
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (tiny_llama / name).read_bytes()


def test_named_templates_of_a_base_write_nothing_elsewhere(tiny_llama, tmp_path):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["chat_template"] = [
        {"name": "default", "template": "{{ messages }}"},
        {"name": "../../x", "template": "{{ messages }}"},
    ]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    adapter = adapter_for(base, tmp_path / "adapter")
    before = {path.name for path in tmp_path.iterdir()}
    merge(adapter, tmp_path / "a" / "merged")
    assert {path.name for path in tmp_path.iterdir()} == before | {"a"}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["merged"]
    assert (tmp_path / "a" / "merged" / "tokenizer_config.json").read_bytes() == (
        base / "tokenizer_config.json"
    ).read_bytes()


# The proof


def in_bf16(base: Path, folder: Path) -> Path:
    return with_tensors(base, folder, lambda tensors: {key: each.bfloat16() for key, each in tensors.items()})


def test_an_adapter_too_small_for_its_dtype_fails_and_the_fix_keeps_it(tiny_llama, tmp_path):
    """bf16 rounds most of so small an update away; compared in bf16 it could not be seen."""
    base = in_bf16(tiny_llama, tmp_path / "base")
    adapter = adapter_for(base, tmp_path / "adapter", scale=1e-4)
    with pytest.raises(CheckFailed, match=r"keeps \d+% of what the adapter changes: bf16 cannot hold") as error:
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert "--dtype fp32" in str(error.value.fix)
    report = merge(adapter, tmp_path / "merged", dtype="fp32")
    assert report.kept > 0.999
    assert report.compared_in == "fp32"
    assert set(dtypes(tmp_path / "merged").values()) == {"F32"}


def test_a_strong_adapter_is_kept_in_bf16_and_the_share_is_said(tiny_llama, tmp_path):
    base = in_bf16(tiny_llama, tmp_path / "base")
    report = merge(adapter_for(base, tmp_path / "adapter"), tmp_path / "merged")
    assert 0.99 < report.kept < 1
    assert set(dtypes(tmp_path / "merged").values()) == {"BF16"}
    assert report.dtype == "bf16"
    (line,) = [line for line in report.lines() if "keeps" in line]
    assert line.startswith(f"keeps {report.kept:.2%} of the adapter's effect: compared with base + adapter in fp32")
    stored = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert (stored["kept"], stored["compared_in"]) == (report.kept, "fp32")


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_without_memory_for_fp32_it_compares_in_16_bits_and_says_so(quantization, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "fits_in_fp32", lambda *_, **__: False)
    monkeypatch.setattr(merging, "compute_in_place", lambda *_: None)  # as where a weight is not stored by itself
    base = in_bf16(tiny_llama, tmp_path / "base")
    adapter = adapter_for(base, tmp_path / "adapter", quantization=quantization, dtype=torch.bfloat16)
    said: list[str] = []
    report = merge(adapter, tmp_path / "merged", say=said.append)
    assert report.compared_in == "16 bits"
    assert any("compared in 16 bits" in note for note in said)
    assert report.kept > 0.9
    monkeypatch.undo()
    other = merge(adapter, tmp_path / "other")
    assert other.compared_in == "fp32"
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "other"))
    assert all(torch.equal(one[key], two[key]) for key in two)


def test_a_merge_at_another_strength_is_refused(tiny_llama, tmp_path, monkeypatch):
    adapter = adapter_for(tiny_llama, tmp_path / "adapter", target_modules="attention", scale=0.003)
    delta = LoRALinear.delta_weight
    monkeypatch.setattr(LoRALinear, "delta_weight", lambda self, rows: 1.5 * delta(self, rows))
    with pytest.raises(CheckFailed, match="report this"):
        merge(adapter, tmp_path / "merged")


def test_an_adapter_that_changes_nothing_merges_to_the_base(tiny_llama, tmp_path):
    report = merge(adapter_for(tiny_llama, tmp_path / "adapter", scale=0.0), tmp_path / "merged")
    assert (report.kept, report.adapter_effect) == (1.0, 0.0)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_llama, tmp_path / "merged"))
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert "the adapter changes nothing" in report.lines()[1]


def test_layers_that_were_quantized_otherwise_in_training_are_said(tiny_llama, tmp_path):
    adapter = adapter_for(tiny_llama, tmp_path / "adapter", quantization="nf4")
    with safe_open(adapter / "adapter_model.safetensors", "pt") as stored:
        metadata = stored.metadata()
    assert metadata["unquantized_modules"] == "[]"
    tensors = load_file(adapter / "adapter_model.safetensors")
    other = metadata | {"unquantized_modules": '["model.layers.0.mlp.up_proj"]'}
    save_file(tensors, adapter / "adapter_model.safetensors", other)
    report = merge(adapter, tmp_path / "merged")
    assert any("quantized in another way" in note and "layers.0.mlp.up_proj" in note for note in report.notes)
    old = {key: value for key, value in metadata.items() if key != "unquantized_modules"}
    save_file(tensors, adapter / "adapter_model.safetensors", old)
    assert any("made before" in note for note in merge(adapter, tmp_path / "again").notes)


# The output


def test_outputs_that_cannot_take_place_are_refused_before_the_work(tiny_llama, tmp_path, monkeypatch):
    adapter = adapter_for(tiny_llama, tmp_path / "adapter")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mount").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "mount")
    monkeypatch.setattr(merging, "open_model", lambda *_, **__: pytest.fail("the work has begun"))
    cases = {
        ".": "the current folder",
        "..": "already exists",
        str(tmp_path / "link"): "is a link",
        str(tmp_path / "link" / "."): "is a link",
        str(tmp_path / "dangling"): "is a link",
        str(tmp_path / "file"): "already exists",
        str(tmp_path / "file" / "below"): "is a file, not a folder",
        str(tmp_path / "mount"): "mount point",
        str(tmp_path / "adapter"): "already exists",
    }
    for output, says in cases.items():
        with pytest.raises(LoraError, match=says) as error:
            merge(adapter, Path(output))
        assert error.value.exit_code == 2
    assert not list(work.iterdir())
    assert not list((tmp_path / "empty").iterdir())


def test_an_output_inside_the_base_is_refused(tiny_llama, tmp_path):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    adapter = adapter_for(base, tmp_path / "adapter")
    with pytest.raises(LoraError, match="inside the base model's folder"):
        merge(adapter, base / "merged")
    assert not (base / "merged").exists()


def test_a_merge_onto_a_base_that_the_adapter_does_not_name_says_both_names(tiny_llama, tmp_path):
    import peft

    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    peft.get_peft_model(plain, config).save_pretrained(tmp_path / "theirs")
    settings = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "someone/else-7b"
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(settings))
    report = merge(tmp_path / "theirs", tmp_path / "merged", base=str(tiny_llama))
    assert f"the adapter names someone/else-7b as its base, and is used on {tiny_llama}, as asked" in report.notes


def test_an_empty_folder_and_a_new_one_below_it_are_fine(tiny_llama, tmp_path, monkeypatch):
    adapter = adapter_for(tiny_llama, tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    merge(adapter, Path("empty"))
    merge(adapter, Path("a/b/../c"))
    assert (tmp_path / "empty" / "config.json").exists()
    assert (tmp_path / "a" / "c" / "config.json").exists()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_what_is_written_follows_the_umask(mask, tiny_llama, tmp_path):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    (base / "tokenizer.json").chmod(0o600)
    (base / "config.json").chmod(0o755)
    before = os.umask(mask)
    try:
        adapter = adapter_for(base, tmp_path / "adapter")
        merge(adapter, tmp_path / "merged")
    finally:
        os.umask(before)
    for path in [*adapter.iterdir(), *(tmp_path / "merged").iterdir()]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path


# Where the comparison's tokens come from


def test_no_recipe_beside_an_adapter_is_read_and_no_data_opened(run_recipe, tmp_path, sums, monkeypatch):
    run, _ = run_recipe(data={"validation": 0.25}, train={"max_steps": 2})
    sums.unlink()
    from lora_cli.data.files import sources

    monkeypatch.setattr(sources, "open_source", lambda *_: pytest.fail("data were opened"))
    assert merge(run, tmp_path / "from run").tokens == "of the run's own data"
    assert merge(run / "adapter", tmp_path / "from adapter").tokens == "drawn at random"
    (run / "recipe.yaml").write_text("base_model: [broken")
    assert merge(run / "adapter", tmp_path / "again").kept > 0.99
    assert merge(run, tmp_path / "once more").tokens == "of the run's own data"


def test_what_training_recorded_of_its_prompts_is_in_merge_json(run_recipe, tmp_path):
    run, _ = run_recipe(train={"max_steps": 1})
    merge(run, tmp_path / "merged")
    stored = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert (stored["prompting"], stored["quantization"], stored["method"]) == ("raw", "none", "lora")
    assert AutoConfig.from_pretrained(tmp_path / "merged").model_type == "llama"


@pytest.mark.parametrize("targets", [["up_proj"], "all-linear"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_layers_that_the_checkpoint_stores_as_one_are_stored_as_one_again(
    quantization, targets, tiny_llama, tmp_path, monkeypatch
):
    """transformers splits the fused projections of some checkpoints on loading (Molmo2, for example)."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

    rules = [
        WeightRenaming(r"\.attn_out\.", ".o_proj."),
        WeightConverter(
            source_patterns="mlp.gate_up.weight",
            target_patterns=["mlp.gate_proj.weight", "mlp.up_proj.weight"],
            operations=[Chunk(dim=0)],
        ),
    ]
    own = conversion_mapping.get_checkpoint_conversion_mapping
    monkeypatch.setattr(
        conversion_mapping, "get_checkpoint_conversion_mapping", lambda kind: rules if kind == "llama" else own(kind)
    )

    def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for block in (0, 1):
            mlp = f"model.layers.{block}.mlp"
            pair = [tensors.pop(f"{mlp}.{part}_proj.weight") for part in ("gate", "up")]
            tensors[f"{mlp}.gate_up.weight"] = torch.cat(pair)
        return {key.replace(".o_proj.", ".attn_out."): each for key, each in tensors.items()}

    base = with_tensors(tiny_llama, tmp_path / "base", fused)
    adapter = adapter_for(base, tmp_path / "adapter", quantization=quantization, target_modules=targets)
    assert merge(adapter, tmp_path / "merged").kept > 0.99
    assert dtypes(tmp_path / "merged") == dtypes(base)
    assert_close(logits(reopened(tmp_path / "merged")), base_and_adapter(adapter), rtol=0, atol=1e-5)


def test_every_file_of_a_run_follows_the_umask(run_recipe):
    """safetensors from 0.8.1 on makes files that only their owner can read."""
    before = os.umask(0o022)
    try:
        run, _ = run_recipe(data={"validation": 0.25}, train={"max_steps": 2, "checkpoint_every": 1})
    finally:
        os.umask(before)
    written = [path for path in run.rglob("*") if path.is_file()]
    assert any(path.name == "optimizer.safetensors" for path in written)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in written} == {p.name: 0o644 for p in written}


@pytest.mark.parametrize(
    ("file", "settings"), [("generation_config.json", {"assistant_model": "x"}), ("config.json", {"embd_pdrop": 1e308})]
)
def test_settings_of_the_base_that_transformers_refuses_are_an_error_in_words(tiny_gpt2, tmp_path, file, settings):
    """They are carried over as they are; that the result does not open was a traceback."""
    base = tmp_path / "base"
    shutil.copytree(tiny_gpt2, base)
    adapter = adapter_for(base, tmp_path / "adapter")
    own = (base / file).read_text()
    (base / file).write_text(json.dumps(json.loads(own) | settings))
    with pytest.raises(LoraError, match=r"does not open in transformers") as refused:
        merge(adapter, tmp_path / "merged")
    assert file in (refused.value.fix or "")
    assert not (tmp_path / "merged").exists()
    (base / file).write_text(own)  # the fix
    merge(adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    "words",
    [
        *(["merge"], ["resize", "--rank", "2"], ["combine"], ["convert", "--to", "mlx"], ["analyze"]),
        ["export", "--to", "gguf-adapter"],
    ],
    ids=lambda words: words[0],
)
def test_an_output_inside_the_run_or_the_adapter_is_refused(tiny_llama, tmp_path, lora, monkeypatch, words):
    monkeypatch.setattr(export, "require_converter", lambda: None)  # of an extra
    run = tmp_path / "run"
    run.mkdir()
    adapter_for(tiny_llama, run / "adapter")
    (run / "recipe.yaml").write_text("base_model: x\n", encoding="utf-8")
    (run / "environment.json").write_text("{}", encoding="utf-8")
    for source in (run, run / "adapter"):
        for place in (run / "new", run / "adapter" / "new"):
            said = lora(*words[:1], source, *words[1:], "--output", place)
            assert (said.code, "the output is inside the run's folder" in said.error) == (2, True), said.text
            assert not place.exists()
    (run / "environment.json").unlink()  # a folder of a person's own, with a recipe in it
    said = lora(*words[:1], run / "adapter", *words[1:], "--output", run / "adapter" / "new")
    assert "the output is inside the adapter's folder" in said.error
