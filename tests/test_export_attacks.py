"""What strangers put into a model folder: no code of theirs runs, and no number is lost without a word."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_export import values_of, write_gguf

from lora_cli.errors import CheckFailed
from lora_cli.exporting import blocks
from lora_cli.exporting.converter import without_code


def folder(tmp_path, **files):
    model = tmp_path / "model"
    model.mkdir()
    for name, text in files.items():
        (model / f"{name}.json").write_bytes(text)
    return without_code(model, tmp_path / "seen")


def test_an_escaped_key_hides_no_code(tmp_path):
    seen = folder(tmp_path, tokenizer_config=b'{"a": 1, "auto\\u005fmap": {"AutoTokenizer": ["./x--evil.T", null]}}')
    assert json.loads((seen / "tokenizer_config.json").read_text()) == {"a": 1}


def test_other_files_stay_and_unreadable_ones_are_left_out(tmp_path):
    seen = folder(tmp_path, vocab=b'{"auto_map": 7}', notes=b'["auto_map"]', latin=b'{"a": "\xe9"}', deep=b"[" * 10**5)
    assert sorted(p.name for p in seen.iterdir()) == ["notes.json", "vocab.json"]
    assert json.loads((seen / "vocab.json").read_text()) == {"auto_map": 7}


def test_what_the_converter_keeps_in_f32_stays_and_overflow_is_said(tmp_path):
    draw = np.random.default_rng(0)
    gate = draw.standard_normal((4, 40)).astype(np.float32)
    good = {"blk.0.ffn_gate_inp.weight": gate, "blk.0.attn_q.weight": draw.standard_normal((16, 64)).astype(np.float16)}
    source = write_gguf(tmp_path / "f16.gguf", good)
    blocks.require_blocks(source, "q4_0")
    blocks.require_finite(source)
    blocks.in_blocks(source, tmp_path / "out.gguf", "q4_0")
    assert values_of(tmp_path / "out.gguf")["blk.0.ffn_gate_inp.weight"][0] == "F32"
    good["blk.0.attn_q.weight"][0, 0] = np.inf
    with pytest.raises(CheckFailed, match="attn_q"):
        blocks.require_finite(write_gguf(tmp_path / "bad.gguf", good))
