"""`lora export`: GGUF files, adapters for llama.cpp, Modelfiles; with a stand-in for llama.cpp's converter."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import jinja2
import numpy as np
import pytest
import torch
from chat_families import FAMILIES, family_tokenizer
from conftest import refusal
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from test_gguf import write_gguf as real_gguf
from transformers import AutoTokenizer

from lora_cli.adapters.opened import open_model
from lora_cli.data.chat.template import chat_template
from lora_cli.errors import CheckFailed, LoraError
from lora_cli.exporting import blocks, export, ollama
from lora_cli.exporting.converter import PINS, without_code
from lora_cli.merging.onto import kept_examples, losses_of


def write_gguf(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def values_of(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    return {
        each.name: (each.tensor_type.name, gguf.dequantize(each.data, each.tensor_type).reshape(each.shape[::-1]))
        for each in gguf.GGUFReader(path).tensors
    }


# ── blocks ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", export.BY_BLOCKS)
def test_matrices_are_in_blocks_and_the_error_said_is_theirs(kind, tmp_path):
    draw = np.random.default_rng(0)
    tensors = {
        "token_embd.weight": draw.standard_normal((8, 64)).astype(np.float16),
        "blk.0.attn_q.weight": draw.standard_normal((16, 64)).astype(np.float16),
        "blk.0.attn_norm.weight": draw.standard_normal(64).astype(np.float32),
    }
    source = write_gguf(tmp_path / "f16.gguf", tensors)
    error, _ = blocks.in_blocks(source, tmp_path / "out.gguf", kind)
    found = values_of(tmp_path / "out.gguf")
    assert {name: of for name, (of, _) in found.items()} == {
        "token_embd.weight": "Q8_0",
        "blk.0.attn_q.weight": kind.upper(),
        "blk.0.attn_norm.weight": "F32",
    }
    matrices = [name for name in tensors if tensors[name].ndim == 2]
    lost = sum(np.square(found[name][1] - tensors[name].astype(np.float64)).sum() for name in matrices)
    total = sum(np.square(tensors[name].astype(np.float64)).sum() for name in matrices)
    assert error == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    assert 0.005 < error < 0.15
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    assert fields["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]


@given(
    seed=st.integers(0, 10_000),
    levels=st.integers(1, 16),
    scale=st.sampled_from([1e-4, 0.013, 0.5, 3.0]),
    offset=st.sampled_from([0.0, -7.5, 0.02]),
)
def test_numbers_on_a_grid_of_four_bits_become_blocks_of_exactly_these_numbers(seed, levels, scale, offset):
    draw = np.random.default_rng(seed)
    d = (scale * draw.uniform(0.5, 2, (4, 2, 1))).astype(np.float16).astype(np.float32)
    m = (scale * (offset + draw.standard_normal((4, 2, 1)))).astype(np.float16).astype(np.float32)
    q = draw.integers(0, levels, (4, 2, blocks.BLOCK)).astype(np.float32)
    values = (d * q + m).reshape(4, -1)
    found = blocks._grid_blocks(values)
    assert found is not None
    again = gguf.dequantize(found, gguf.GGMLQuantizationType.Q4_1).reshape(values.shape)
    assert np.array_equal(again, values)


def test_numbers_off_the_grid_are_not_taken_for_numbers_on_it(tmp_path):
    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    assert blocks._grid_blocks(values) is None
    source = write_gguf(tmp_path / "f32.gguf", {"blk.0.attn_q.weight": values, "output.weight": values[:, :64]})
    _, on_grid = blocks.in_blocks(source, tmp_path / "out.gguf", "q4_1", on_grid=True)
    assert on_grid == 0
    assert {of for of, _ in values_of(tmp_path / "out.gguf").values()} == {"F16"}


def test_a_matrix_that_is_on_the_grid_at_its_start_alone_is_not_rounded_silently(tmp_path):
    draw = np.random.default_rng(0)
    values = draw.integers(0, 16, (1000, 64)).astype(np.float32) / 8
    values[-1] = draw.standard_normal(64)
    source = write_gguf(tmp_path / "f32.gguf", {"blk.0.attn_q.weight": values})
    with pytest.raises(CheckFailed, match=r"blk\.0\.attn_q\.weight is partly on the grid"):
        blocks.in_blocks(source, tmp_path / "out.gguf", "q4_1", on_grid=True)


def test_rows_that_are_not_whole_blocks_are_named_before_anything_is_written(tmp_path):
    source = write_gguf(tmp_path / "f16.gguf", {"blk.0.ffn_up.weight": np.ones((4, 40), np.float16)})
    with pytest.raises(LoraError, match=r"1 of 1 matrices .* blk\.0\.ffn_up\.weight \(40\)"):
        blocks.require_blocks(source, "q4_0")


# ── the command, with a stand-in for the converter ──────────────────────────────────────────────────────────────


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Writes every tensor as it is, as no real converter does; gives the files that it was shown."""
    shown: list[list[str]] = []

    def model(_: Path, folder: Path, kind: str, output: Path) -> None:
        shown.append(sorted(path.name for path in folder.iterdir()))
        stored = load_file(folder / "model.safetensors")
        wide = np.float32 if kind == "f32" else np.float16
        write_gguf(output, {k: v.astype(wide if v.ndim > 1 else np.float32) for k, v in stored.items()})

    def adapter(_: Path, folder: Path, base: Path, output: Path) -> None:
        assert (base / "config.json").is_file()
        config = json.loads((folder / "adapter_config.json").read_text())
        write_gguf(output, load_file(folder / "adapter_model.safetensors"))
        shown.append([str(config["lora_alpha"])])

    monkeypatch.setattr(export, "require_converter", Path)
    monkeypatch.setattr(export, "convert_model", model)
    monkeypatch.setattr(export, "convert_adapter", adapter)
    return shown


def test_a_run_is_merged_on_the_way_and_nothing_else_remains(lora, recipe_file, tmp_path, converter):
    assert lora("train", recipe_file()).code == 0
    said = lora("export", tmp_path / "run", "--to", "gguf", "--type", "f16", "--output", tmp_path / "out" / "m.gguf")
    assert said.code == 0, said.text
    assert "of the adapter's effect" in said.text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["m.gguf"]
    assert lora("merge", tmp_path / "run", "--output", tmp_path / "merged").code == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    found = values_of(tmp_path / "out" / "m.gguf")
    assert found.keys() == merged.keys()
    assert all(
        np.array_equal(found[name][1], value.astype(np.float16)) for name, value in merged.items() if value.ndim > 1
    )
    again = lora("export", tmp_path / "run", "--to", "gguf", "--output", tmp_path / "out" / "m.gguf")
    assert (again.code, "the output already exists" in again.text) == (2, True)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--to", "gguf", "--type", "q4_k_m"], "llama-quantize model-f16.gguf model.gguf Q4_K_M"),
        (["--to", "gguf", "--type", "q9"], "fix: write one of these"),
        (["--to", "gguf", "--onto", "original"], "--onto is for a merge on the way"),
        (["--to", "gguf", "--proof", "none"], "--proof is for a merge on the way"),
        (["--to", "gguf-adapter"], "this is a whole model, not an adapter"),
    ],
)
def test_what_cannot_be_exported_is_said_before_any_work(words, what, lora, tiny_llama, tmp_path, converter):
    said = lora("export", tiny_llama, *words, "--output", tmp_path / "out")
    assert said.code == 2
    assert what in said.text
    assert not (tmp_path / "out").exists()
    assert not converter


def test_a_converter_that_fails_leaves_nothing(lora, tiny_llama, tmp_path, converter, monkeypatch):
    def fails(*_: Any) -> None:
        raise LoraError("llama.cpp's converter cannot convert this: Architecture 'X' not supported!", fix="no")

    monkeypatch.setattr(export, "convert_model", fails)
    said = lora("export", tiny_llama, "--to", "ollama", "--output", tmp_path / "new" / "out")
    assert "Architecture 'X' not supported!" in said.text
    assert not (tmp_path / "new").exists()


def test_an_adapter_keeps_every_layers_scaling(lora, tiny_llama, tmp_path, converter):
    """llama.cpp scales by alpha / rank alone. The judge: PEFT's deltas of an adapter with rsLoRA and several ranks."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    settings: dict[str, Any] = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True}
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **settings
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), config)
    model.save_pretrained(tmp_path / "adapter")
    out = tmp_path / "adapter.gguf"
    said = lora("export", tmp_path / "adapter", "--to", "gguf-adapter", "--base", tiny_llama, "--output", out)
    assert said.code == 0, said.text
    ((alpha,),) = converter
    found = values_of(out)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, peft.tuners.lora.Linear)}
    assert len(layers) * 2 == len(found)
    for name, layer in layers.items():
        A, B = (torch.from_numpy(found[f"{name}.lora_{each}.weight"][1].copy()) for each in "AB")
        torch.testing.assert_close(float(alpha) / len(A) * B @ A, layer.get_delta_weight("default"))


def test_no_code_of_a_model_reaches_the_converter(tmp_path, tiny_llama):
    model = tmp_path / "model"
    model.mkdir()
    for path in Path(tiny_llama).iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / "tokenizer_evil.py").write_text("raise SystemExit('ran')")
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["tokenizer_evil.Evil", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "link.json").symlink_to("/etc/hostname")
    with pytest.raises(LoraError):
        without_code(model, tmp_path / "refused")
    (model / "link.json").unlink()
    seen = without_code(model, tmp_path / "seen")
    assert not list(seen.glob("*.py"))
    assert json.loads((seen / "tokenizer_config.json").read_text()) == {"tokenizer_class": "Evil"}
    assert (seen / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_without_the_extra_the_fix_names_what_to_install(lora, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = lora("export", tiny_llama, "--to", "gguf", "--output", tmp_path / "out.gguf")
    assert said.code == 2
    assert all(pin in said.text for pin in PINS)


# ── Modelfiles ──────────────────────────────────────────────────────────────────────────────────────────────────


def in_jinja(go: str) -> str:
    """The same template in the language that Go's was translated from, by rules of its own."""
    rules = [
        (r'\{\{ if ne \(index \.Messages 0\)\.Role "system" \}\}', '{% if messages[0].role != "system" %}'),
        (r"\{\{ range \.Messages \}\}", "{% for m in messages %}"),
        (r'\{\{ if eq \.Role "(\w+)" \}\}', r'{% if m.role == "\1" %}'),
        (r'\{\{ else if eq \.Role "(\w+)" \}\}', r'{% elif m.role == "\1" %}'),
        (r"\{\{ \.Content \}\}", "{{ m.content }}"),
    ]
    for rule, text in rules:
        go = re.sub(rule, text, go)
    opened = []

    def end(found: re.Match[str]) -> str:
        if found[0].startswith(("{% if", "{% for")):
            opened.append("endif" if found[0].startswith("{% if") else "endfor")
        return "{% " + opened.pop() + " %}" if found[0] == "{{ end }}" else found[0]

    return re.sub(r"\{% (?:if|for)[^%]*%\}|\{\{ end \}\}", end, go)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_template_in_gos_language_writes_what_the_models_own_writes(name):
    family = FAMILIES[name]
    tokenizer = family_tokenizer(family)
    template = chat_template(tokenizer, None, "the model")
    found = ollama.around(template, "")
    if name in ("chatml", "zephyr", "llama3"):
        assert found is not None
    if found is None:
        return
    render = jinja2.Environment(keep_trailing_newline=True).from_string(in_jinja(found.in_go())).render
    for turns in (
        [{"role": "user", "content": "Hi\n there"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "{{ .Content }}"}],
        [{"role": role, "content": f"{role} {at}"} for at, role in enumerate(["user", "assistant"] * 3 + ["user"])],
    ):
        assert render(messages=turns) == template.render(turns, "here", generation_prompt=True)


def test_an_irregular_template_is_left_out():
    tokenizer = family_tokenizer(next(iter(FAMILIES.values())))
    text = "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}"
    tokenizer.chat_template = text
    assert ollama.around(chat_template(tokenizer, None, "the model"), "") is None


def test_how_the_merge_on_the_way_is_proved_can_be_chosen_and_is_said(lora, recipe_file, tmp_path, converter):
    assert lora("train", recipe_file()).code == 0
    said = lora("export", tmp_path / "run", "--to", "gguf", "--proof", "replay", "--output", tmp_path / "m.gguf")
    assert (said.code, "weights; not compared" in said.text) == (0, True)


@pytest.fixture
def learned(run_recipe, converter, monkeypatch, request) -> Path:
    """A run that learned much, and a converter that writes real files."""
    monkeypatch.setattr(export, "convert_model", lambda _, folder, kind, output: real_gguf(output, folder, "F16"))
    adapter = {"rank": 8, "alpha": 32, "target_modules": "all-linear"}
    train = {"max_steps": 40, "learning_rate": 0.01}
    return run_recipe(data={"validation": getattr(request, "param", None)}, adapter=adapter, train=train)[0]


@pytest.mark.parametrize("learned", [None, 0.25], indirect=True, ids=["training rows", "held-out rows"])
def test_what_four_bits_keep_of_a_run_is_measured_on_the_file_itself(learned, lora, tmp_path):
    output = tmp_path / "q.gguf"
    words = ["export", learned, "--to", "gguf", "--type", "q4_1", "--output", output]
    said = lora(*words, "--json")
    assert said.code == 0, said.text
    found = json.loads(said.out)["rounding"]
    rows = kept_examples(learned, "train" if found["rows"] == "training" else "validation")
    assert len(rows) == found["examples"]
    with_adapter = open_model(None, learned, device="cpu", dtype="fp32").model
    in_file = open_model(str(output), None, device="cpu", dtype="fp32", quantization="none").model
    for name, model in (("adapter", with_adapter), ("exported", in_file)):
        losses, targets = losses_of(model, rows)
        assert found["losses"][name] == pytest.approx((losses.sum() / targets.sum()).item(), rel=1e-5)
    losses = found["losses"]
    share = (losses["base"] - losses["exported"]) / (losses["base"] - losses["adapter"])
    assert found["kept"]["share"] == pytest.approx(share, rel=1e-6)
    assert 0.5 < share < 1.2
    output.unlink()
    unmeasured = lora(*words, "--proof", "none")
    assert (unmeasured.code, "of what was learned" in unmeasured.text) == (0, False)
    assert "what rounding to q4_1 costs was not measured: --proof none opens no model" in unmeasured.text


def test_a_file_that_lost_what_was_learned_is_not_written(learned, lora, tmp_path, tiny_llama, monkeypatch):
    """The converter gives the base's weights, as rounding to a grid that an update never leaves does."""
    monkeypatch.setattr(export, "convert_model", lambda _, folder, kind, output: real_gguf(output, tiny_llama, "F16"))
    output = tmp_path / "out" / "q.gguf"
    said = lora("export", learned, "--to", "gguf", "--type", "q5_1", "--output", output)
    assert said.code == 3, said.text
    assert "of what was learned is left" in said.text
    assert "use --type q8_0" in said.text
    assert not output.parent.exists()


def test_what_rounding_costs_is_said_to_be_unmeasured_where_it_is(lora, recipe_file, tmp_path, converter):
    """The stand-in's file is no model."""
    assert lora("train", recipe_file()).code == 0
    words = ["export", tmp_path / "run", "--to", "gguf", "--type", "q4_0", "--output", tmp_path / "q.gguf"]
    said = lora(*words)
    assert said.code == 0, said.text
    assert "was not measured: the file cannot be opened here" in said.text
    (tmp_path / "q.gguf").unlink()
    shutil.rmtree(tmp_path / "run" / "prepared")
    assert "was not measured: no prepared rows of its run are here" in lora(*words).text


def read_as_ollama_does(text: str) -> list[tuple[str, str]]:
    """Commands and values: parser/parser.go, for the commands that are written here."""
    found, name, value = [], "", None
    for each in text + "\n":
        if value is None:  # in a name, a comment, or between commands
            name = "" if each == "\n" else name + each
            if name.count(" ") == (2 if name.startswith("PARAMETER ") else 1) and not name.startswith("#"):
                value = ""
            continue
        held = value.strip()
        quotes = '"""' if held.startswith('"""') else '"' if held.startswith('"') else ""
        closed = len(held) >= 2 * len(quotes) and held.endswith(quotes)
        if each == "\n" and closed:
            found.append((name.strip(), held[len(quotes) : len(held) - len(quotes)]))
            name, value = "", None
        elif each in " \t\r\n" or each.isprintable():
            value += each
    return found


def test_what_is_written_is_what_ollama_reads():
    """It takes what lies between quotes as it is, but for characters that cannot be printed, which it drops."""
    stops = ["<|end|>", 'say "x"', "a\nb", "{x}", '"']
    text = ollama.modelfile("m.gguf", None, raw=False, stops=stops)
    assert read_as_ollama_does(text) == [("FROM", "./m.gguf"), *(("PARAMETER stop", each) for each in stops)]
    for lost in ("\u3000", "a\x00", "\u200b<|end|>", 'three """ quotes'):
        assert "--to gguf" in str(refusal(lambda lost=lost: ollama.require_stops([*stops, lost])).fix)
    ollama.require_stops(stops)


@pytest.mark.parametrize("around", [("{", "}"), ("\u3000", "\u200d🙂\U000e0067"), ('"""\n', '"'), ("{{ x }}", "\x0b")])
def test_marks_of_go_and_characters_that_ollama_drops_reach_the_model(around):
    before, after = around
    tokenizer = family_tokenizer(next(iter(FAMILIES.values())))
    turn = f"{{{{ {before!r} }}}}{{{{ m.role }}}}:{{{{ m.content }}}}{{{{ {after!r} }}}}"
    end = f"{{% if add_generation_prompt %}}{{{{ {before!r} }}}}assistant:{{% endif %}}"
    tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}{end}"
    template = chat_template(tokenizer, None, "the model")
    found = ollama.around(template, "")
    assert found is not None
    ((_, _), (name, go)) = read_as_ollama_does(ollama.modelfile("m.gguf", found, raw=False, stops=[]))
    assert (name, go) == ("TEMPLATE", found.in_go())
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    written = jinja2.Environment(keep_trailing_newline=True).from_string(in_jinja(go)).render(messages=turns)
    assert written == template.render(turns, "here", generation_prompt=True)


def test_a_stop_token_that_would_be_lost_stops_before_the_conversion(lora, tiny_llama, tmp_path, converter):
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"eos_token": "<\u3000>"})
    tokenizer.save_pretrained(model)
    (model / "chat_template.jinja").unlink()
    said = lora("export", model, "--to", "ollama", "--output", tmp_path / "out")
    assert (said.code, "cannot hold the stop token '<\\u3000>'" in said.text) == (2, True), said.text
    assert not converter


def test_a_folder_for_ollama_prompts_as_trained_and_stops(lora, recipe_file, tmp_path, converter):
    assert lora("train", recipe_file()).code == 0  # prompts and completions, without a template
    said = lora("export", tmp_path / "run", "--to", "ollama", "--type", "f16", "--output", tmp_path / "out")
    assert said.code == 0, said.text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "model.gguf"]
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER stop "')
    assert f"ollama create my-model -f {tmp_path / 'out'}/Modelfile" in said.text
