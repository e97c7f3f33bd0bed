"""`base_model: FILE.gguf`: the file's blocks bit for bit, in Hugging Face's order, and the whole road on them."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from conftest import quiet_console, refusal
from safetensors.torch import load_file

from lora_cli import ending
from lora_cli.adapters.opened import open_model
from lora_cli.base import gguf as own
from lora_cli.base.gguf_header import read_header
from lora_cli.base.linear import dense_weight, held_bytes, is_linear
from lora_cli.base.load import load_model, load_tokenizer
from lora_cli.base.source import find_base
from lora_cli.base.storage.int4 import Int4Linear, with_offsets
from lora_cli.base.storage.q8_0 import Q8Linear
from lora_cli.errors import LoraError
from lora_cli.exporting.blocks import _grid_blocks
from lora_cli.merging import job as merging
from lora_cli.merging.merge import merge
from lora_cli.planning.check import check
from lora_cli.planning.memory import estimate_memory, shape_of
from lora_cli.planning.skeleton import look_at_model
from lora_cli.recipe import load_recipe
from lora_cli.studies.tiny import CHAT_TEMPLATE, save_tiny
from lora_cli.training import loop
from lora_cli.training.train import train

CPU = torch.device("cpu")
IDS: dict[str, Any] = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False}
TYPES = gguf.GGMLQuantizationType
ROWS = torch.tensor([[5, 9, 200, 31, 7, 77, 402, 11]])


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k (`LlamaModel.permute` of its converter)."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, folder: Path, kind: str = "Q4_1", **changes: Any) -> Path:
    """The model of a folder, as llama.cpp's converter lays it out. changes: of fields, by their names without dots."""
    model: Any = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config, tokenizer = model.config, hf.AutoTokenizer.from_pretrained(folder)
    arch = config.model_type
    writer = gguf.GGUFWriter(path, changes.get("architecture", arch))
    writer.add_block_count(changes.get("blocks", config.num_hidden_layers))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(changes.get("rotated", head))
    writer.add_key_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if "scaling" in changes:
        writer.add_rope_scaling_type(gguf.RopeScalingType(changes["scaling"]))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda each: each[1])]
    special = {each["content"] for each in state["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, value in model.state_dict().items():
        stem, _, last = name.rpartition(".")
        data = value.numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            data = permuted(data, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        of = TYPES.F32 if data.ndim == 1 else TYPES.Q8_0 if "layers" not in name else TYPES[kind]
        of = TYPES[changes["types"].get(stem.split(".")[-1], of.name)] if "types" in changes else of
        writer.add_tensor(f"{names.get_name(stem)}.{last}", gguf.quantize(data, of), raw_dtype=of)
    if "rope" in changes:
        writer.add_tensor("rope_freqs.weight", np.array(changes["rope"], np.float32))
    if "split" in changes:
        writer.add_uint16("split.count", changes["split"])
    if "softcap" in changes:
        writer.add_final_logit_softcapping(30.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(hf.LlamaConfig(**IDS, **SMALL), tmp_path_factory.mktemp("gguf") / "tiny")


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, Path]:
    made = {kind: write_gguf(folder.parent / f"{kind}.gguf", folder, kind) for kind in ("Q4_0", "Q4_1", "Q8_0", "F16")}
    mixed = {"down_proj": "Q8_0", "up_proj": "F16", "v_proj": "Q4_1"}
    return made | {"mixed": write_gguf(folder.parent / "mixed.gguf", folder, "Q4_0", types=mixed)}


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_blocks_are_kept_bit_for_bit_in_the_order_of_the_original_model(kind: str, files: Any, folder: Path):
    """Quantizing is by rows, so those of the original model in that order give the same blocks."""
    source = find_base(str(files[kind]))
    model = load_model(source, quantization="int4", dtype=torch.bfloat16, device=CPU)
    original: Any = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = {name: each for name, each in model.named_modules() if isinstance(each, Int4Linear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        raw = gguf.quantize(original.get_submodule(name).weight.detach().numpy(), TYPES[kind])
        blocks = raw.reshape(layer.out_features, -1, 20 if kind == "Q4_1" else 18)
        d, m, q = blocks[..., :2].copy().view(np.float16)[..., 0], layer.m.numpy(), blocks[..., -16:]
        assert np.array_equal(layer.d.numpy(), d)
        assert np.array_equal(m, blocks[..., 2:4].copy().view(np.float16)[..., 0] if kind == "Q4_1" else -8 * d)
        assert np.array_equal(layer.weight.numpy(), q.reshape(layer.out_features, -1))
        weight = torch.from_numpy(gguf.dequantize(raw, TYPES[kind]))
        assert torch.equal(with_offsets(weight, layer.d, layer.m, layer.m), weight)  # also where d is below 0
    theirs = hf.AutoModelForCausalLM.from_pretrained(folder.parent, gguf_file=files[kind].name, dtype=torch.float32)
    for how in ("int4", "none"):
        ours = load_model(source, quantization=how, dtype=torch.float32, device=CPU)
        assert torch.equal(ours(input_ids=ROWS).logits, theirs(input_ids=ROWS).logits)


@pytest.mark.parametrize("name", ["Q8_0", "mixed", "Q4_1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_as_the_file_holds_it_each_layer_computes_with_what_gguf_reads(name: str, dtype: Any, files: Any):
    """Bit for bit; as many bytes as the estimate says; forward and backward are those of the dense weight."""
    source = find_base(str(files[name]))
    model = load_model(source, quantization="gguf", dtype=dtype, device=CPU)
    read = {each.name: each for each in gguf.GGUFReader(files[name]).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    of = {name: layer for name, layer in model.named_modules() if is_linear(layer) and name != "lm_head"}
    kinds = Counter(type(layer).__name__ for layer in of.values())
    assert kinds == {"Q8_0": {"Q8Linear": 14}, "Q4_1": {"Int4Linear": 14}}.get(
        name, {"Int4Linear": 10, "Q8Linear": 2, "Linear": 2}
    )
    for path, layer in of.items():
        own = read[f"{names.get_name(path)}.weight"]
        weight = gguf.dequantize(own.data, own.tensor_type)
        if heads := {"q_proj": 4, "k_proj": 2}.get(path.split(".")[-1]):
            weight = weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        expected = torch.from_numpy(weight.copy())
        expected = expected.to(dtype) if isinstance(layer, torch.nn.Linear) else expected
        assert torch.equal(dense_weight(layer), expected), path
        if isinstance(layer, Q8Linear):
            raw = gguf.quantize(dense_weight(layer).numpy(), TYPES.Q8_0).reshape(layer.out_features, -1, 34)
            assert np.array_equal(layer.weight.numpy(), raw[..., 2:].reshape(layer.weight.shape).view(np.int8))
            assert layer.weight.nbytes + layer.d.nbytes == raw.size
    layer = model.model.layers[1].mlp.down_proj
    x, y = (torch.randn(3, 96, dtype=dtype, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    for each, computed in ((x, layer), (y, lambda given: given @ dense_weight(layer).to(dtype).T)):
        computed(each.requires_grad_(True)).square().sum().backward()
    assert torch.equal(layer(x), torch.nn.functional.linear(x, dense_weight(layer).to(dtype)))
    torch.testing.assert_close(x.grad, y.grad)
    shape = shape_of(look_at_model(str(files[name])), {}, dtype, quantization="gguf", device="cpu")
    nothing = {"tokens": 0, "target_tokens": 0, "gradient_checkpointing": "none"}
    estimated = estimate_memory(shape, quantization="gguf", value_bytes=dtype.itemsize, **nothing).weights
    held = held_bytes(model, frozen_alone=True)
    assert estimated - shape.largest_layer * dtype.itemsize == pytest.approx(held, abs=2)


@pytest.mark.parametrize("name", ["Q8_0", "mixed"])
def test_trained_on_its_blocks_resumed_and_merged_by_each_road(
    name: str, files: Any, run_recipe: Any, tmp_path: Path, monkeypatch: Any
):
    settings: dict[str, Any] = {"base_model": str(files[name]), "quantization": "gguf", "dtype": "fp32"}
    settings |= {"adapter": {"target_modules": ["q_proj", "down_proj", "up_proj"], "rank": 4}}
    settings["train"] = {"max_steps": 4, "learning_rate": 3e-2, "checkpoint_every": 2}
    straight, _ = run_recipe(**settings, output=str(tmp_path / "straight"))
    with monkeypatch.context() as patch:
        real = loop.Run._optimize
        patch.setattr(loop.Run, "_optimize", lambda self, step: real(self, step) if step < 4 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_recipe(**settings)
    run, _ = run_recipe(**settings, resume=True)
    weights = [(each / "adapter" / "adapter_model.safetensors").read_bytes() for each in (run, straight)]
    assert weights[0] == weights[1]
    opened = open_model(None, run, dtype="fp32", device="cpu")
    metadata = opened.adapter.metadata
    assert (opened.quantization, metadata.quantization, metadata.group_size) == ("gguf", "gguf", None)
    assert len(metadata.unquantized_modules) == (2 if name == "mixed" else 0)
    streamed = merge(run, tmp_path / "merged", dtype="fp32")
    assert streamed.streamed
    assert streamed.kl < 1e-9
    assert streamed.kept > 0.9999
    monkeypatch.setattr(merging, "fits_in_fp32", lambda *_, **__: False)
    by_block = merge(run, tmp_path / "by-block", dtype="fp32")
    assert by_block.block_by_block
    assert by_block.kl < 1e-9
    monkeypatch.setattr(merging, "fits_in_fp32", lambda *_, **__: True)
    monkeypatch.setattr(merging, "why_whole", lambda *_: "said here")
    assert not merge(run, tmp_path / "in-memory", dtype="fp32").streamed
    one, *others = (load_file(tmp_path / each / "model.safetensors") for each in ("merged", "by-block", "in-memory"))
    for key, weight in one.items():
        assert all(torch.equal(weight, each[key]) for each in others), key
    read = {each.name: each for each in gguf.GGUFReader(files[name]).tensors}
    key, own = "model.layers.0.mlp.gate_proj.weight", read["blk.0.ffn_gate.weight"]  # not adapted
    assert np.array_equal(gguf.dequantize(own.data, own.tensor_type), one[key].numpy())
    assert np.array_equal(gguf.quantize(one[key].numpy(), own.tensor_type), own.data) or name == "mixed"
    merged: Any = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (merged(input_ids=ROWS).logits - opened.model(input_ids=ROWS).logits).abs().max() < 1e-5


LLAMA_3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 8192}


def factors(config: Any) -> list[float]:
    """As llama.cpp's converter computes them (`LlamaModel.generate_extra_tensors`)."""
    found, (low, high) = [], (8192 / 1.0, 8192 / 4.0)
    for at in range(0, config.head_dim, 2):
        length = 2 * math.pi * 1e4 ** (at / config.head_dim)
        smooth = (8192 / length - 1) / 3
        found.append(1 if length < high else 8 if length > low else 1 / ((1 - smooth) / 8 + smooth))
    return found


@pytest.mark.parametrize(
    "config",
    [
        hf.Qwen2Config(**IDS, **SMALL, rope_theta=1e6),
        hf.Qwen3Config(**IDS, **SMALL | {"tie_word_embeddings": True}, head_dim=32),
        hf.LlamaConfig(**IDS, **SMALL | {"max_position_embeddings": 2**17}, head_dim=32, rope_parameters=LLAMA_3),
    ],
)
def test_other_architectures_compute_what_the_original_computes_on_the_same_blocks(config, tmp_path):
    """The judge is the original's own configuration, with its weights quantized here."""
    folder = save_tiny(config, tmp_path / "tiny")
    original: Any = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, value in original.named_parameters():
            value.add_(torch.randn_like(value), alpha=0.1)  # norms and biases that do something
            assert value.abs().max() > 0, name
    original.save_pretrained(folder)
    more = {"rope": factors(config)} if config.model_type == "llama" else {}
    path = write_gguf(tmp_path / "x.gguf", folder, "Q4_1", **more)
    with torch.no_grad():
        for name, value in original.named_parameters():
            if value.ndim == 2:
                of = TYPES.Q4_1 if "layers" in name else TYPES.Q8_0
                value.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(value.numpy(), of), of)))
    ours = load_model(find_base(str(path)), quantization="int4", dtype=torch.float32, device=CPU)
    assert sum(isinstance(each, Int4Linear) for each in ours.modules()) == 14
    assert torch.equal(ours(input_ids=ROWS).logits, original(input_ids=ROWS).logits)


def test_the_tokenizer_is_the_files_or_that_of_a_folder(files: Any, folder: Path, recipe_file: Any, tmp_path: Path):
    texts = ["select count from table", "In 1984, 12.5 %", "🙂 naïve\n\n  x", CHAT_TEMPLATE[:40]]
    theirs: Any = hf.AutoTokenizer.from_pretrained(folder)
    made: Any = load_tokenizer(find_base(str(files["Q4_1"])))
    assert [made(text).input_ids for text in texts] == [theirs(text).input_ids for text in texts]
    assert made.chat_template == CHAT_TEMPLATE
    source = find_base(str(files["Q4_1"]))
    assert "not compared with llama.cpp's" in source.notes[0]
    assert source.folder.parent in ending._temporary  # it goes with the process, however that ends
    other = tmp_path / "other"
    theirs.add_tokens(["count from"])
    theirs.save_pretrained(other)
    settings: dict[str, Any] = {"base_model": str(files["Q4_1"]), "quantization": "int4", "tokenizer": str(other)}
    recipe = load_recipe(recipe_file(**settings, train={"max_steps": 1}))
    train(recipe, quiet_console())
    opened = open_model(None, Path(recipe.output), dtype="fp32", device="cpu")
    assert opened.tokenizer(texts[0]).input_ids == theirs(texts[0]).input_ids  # as the adapter file says
    assert opened.notes == []
    said = refusal(lambda: find_base(str(folder), tokenizer=str(other)))
    assert said.fix == "remove tokenizer"


@pytest.mark.parametrize("method", ["qa_lora", "lora"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_trained_opened_and_merged(kind: str, method: str, files: Any, run_recipe: Any, tmp_path: Path):
    adapter = {"method": method, "target_modules": "all-linear", "rank": 4}
    steps = {"max_steps": 2, "learning_rate": 1e-2}
    settings: dict[str, Any] = {"base_model": str(files[kind]), "quantization": "int4", "dtype": "fp32"}
    run, _ = run_recipe(**settings, adapter=adapter, train=steps)
    opened = open_model(None, run, dtype="fp32", device="cpu")
    report = merge(run, tmp_path / "merged", dtype="fp32")
    assert report.kl is not None
    assert report.kl < 1e-6
    merged: Any = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    difference = (merged(input_ids=ROWS).logits - opened.model(input_ids=ROWS).logits).abs().max()
    assert difference < (1e-2 if method == "qa_lora" else 1e-5)  # m is fp16
    tokens: Any = hf.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokens("select count").input_ids == opened.tokenizer("select count").input_ids
    if method == "qa_lora":  # what is exported is in blocks with the same q and d, whatever their sign
        for name, weight in load_file(tmp_path / "merged" / "model.safetensors").items():
            if "_proj" in name:
                blocks = _grid_blocks(weight.numpy())
                assert blocks is not None
                assert np.array_equal(gguf.dequantize(blocks, TYPES.Q4_1), weight.numpy())
    assert str(refusal(lambda: merge(run, tmp_path / "o", onto="original")).fix).startswith("leave out --onto")


def test_a_dense_base_from_a_file_is_merged_in_its_own_types(files: Any, run_recipe: Any, tmp_path: Path):
    run, _ = run_recipe(base_model=str(files["F16"]), quantization="none", dtype="fp32", train={"max_steps": 2})
    merge(run, tmp_path / "merged")
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.float16
    assert tensors["model.norm.weight"].dtype == torch.float32


def test_what_a_file_does_not_give_is_refused_with_what_to_write(files: Any, folder: Path, recipe_file: Any, tmp_path):
    def said(name: str = "Q4_1", **settings: Any) -> LoraError:
        path = files.get(name) or write_gguf(tmp_path / f"{name}.gguf", folder, **settings.pop("changes"))
        recipe = load_recipe(recipe_file(base_model=str(path), **settings))
        problem = refusal(lambda: check(recipe))
        assert refusal(lambda: train(recipe, quiet_console())).what == problem.what
        return problem

    assert str(said(quantization="nf4").fix).startswith("write quantization: int4")
    assert said(quantization="int4", group_size=64).fix == "write group_size: 32"
    mixed = said("mixed", quantization="int4")
    assert "8 in Q4_0, 2 in Q4_1, 2 in F16, 2 in Q8_0" in mixed.what
    assert str(mixed.fix).startswith("write quantization: gguf, which keeps its blocks as they are (qa_lora needs Q4_1")
    assert said("Q8_0", quantization="int8").fix == "write quantization: gguf, which keeps its blocks as they are"
    assert said("F16", quantization="gguf").fix == own._NO_BLOCKS
    others = said("others", quantization="gguf", changes={"types": {"down_proj": "Q5_0"}})
    assert "12 in Q4_1, 2 in Q5_0" in others.what
    assert others.fix == own._NO_BLOCKS
    with pytest.raises(LoraError, match="qa_lora changes the offsets of groups, which only quantization: int4 has"):
        said("Q8_0", quantization="gguf", adapter={"method": "qa_lora"})
    elsewhere = refusal(
        lambda: load_model(find_base(str(folder)), quantization="gguf", dtype=torch.float32, device=CPU)
    )
    assert elsewhere.what == f"quantization: gguf keeps the blocks of a GGUF file, and {folder} is not one"
    assert elsewhere.fix == "write quantization: nf4 or int8 or int4 or none"
    assert "architecture 'mamba'" in said("mamba", changes={"architecture": "mamba"}).what
    assert "positions are scaled (linear)" in said("scaled", changes={"scaling": "linear"}).what
    assert "another way than those of Llama 3" in said("rope", changes={"rope": [1, 1, 1, 2, 2, 2, 2, 3]}).what
    assert "its rope.dimension_count is 8" in said("rotated", changes={"rotated": 8}).what
    assert "says llama.final_logit_softcapping" in said("softcap", changes={"softcap": True}).what
    many = said("many", changes={"blocks": 10**7})
    assert "10,000,000; 300 is the limit" in many.what
    check(load_recipe(recipe_file(base_model=str(tmp_path / "others.gguf"), quantization="none")))  # the fix, followed


def test_damaged_files_are_refused_in_words(files: Any, tmp_path: Path):
    whole = files["Q4_1"].read_bytes()
    header = gguf.GGUFReader(files["Q4_1"]).data_offset
    path = tmp_path / "x.gguf"

    def opened(data: bytes) -> str:
        path.write_bytes(data)
        try:
            read_header(path)
        except (ValueError, KeyError, OverflowError, LoraError) as error:
            return str(error)
        return ""

    draw = random.Random(0)
    for at in [*range(60), *(draw.randrange(header) for _ in range(60))]:
        assert opened(whole[:at]), at
    for count in (whole[8:16], whole[16:24]):  # tensors, values
        assert opened(whole.replace(count, (2**62).to_bytes(8, "little"), 1))
    for _ in range(200):
        at = draw.randrange(header)
        opened(whole[:at] + bytes([draw.randrange(256)]) + whole[at + 1 :])
    for data, what in (
        (whole[:-1], "the file ends too soon"),
        (whole[:2000], "ends before its header does"),
        (b"GGML" + whole[4:], "does not begin as GGUF"),
    ):
        path.write_bytes(data)
        said = refusal(lambda: find_base(str(path)))
        assert what in said.what
        assert "download the file again" in str(said.fix)
