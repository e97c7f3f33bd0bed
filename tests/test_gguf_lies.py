"""GGUF files that lie: each is refused in words that name the file."""

from __future__ import annotations

import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers as hf
from conftest import refusal
from test_gguf import IDS, SMALL, write_gguf

from lora_cli.base.load import load_tokenizer
from lora_cli.base.source import find_base
from lora_cli.studies.tiny import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(hf.LlamaConfig(**IDS, **SMALL), tmp_path_factory.mktemp("gguf") / "tiny")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    return write_gguf(folder.parent / "whole.gguf", folder)


def test_lies_in_a_header_are_refused_in_words_that_name_the_file(whole: Path, tmp_path: Path):
    """Each of them made another model, another end token, or a message about a folder that was gone."""

    def said(change: Callable[[bytes], bytes], name: str = "lie.gguf") -> str:
        (tmp_path / name).write_bytes(change(whole.read_bytes()))
        problem = refusal(lambda: load_tokenizer(find_base(str(tmp_path / name))))
        assert problem.where == str(tmp_path / name)
        return f"{problem.what}; {problem.fix}"

    def renamed(old: str, new: str) -> Callable[[bytes], bytes]:
        assert len(old) == len(new)
        return lambda data: data.replace(old.encode(), new.encode(), 1)

    def number(key: str, value: bytes) -> Callable[[bytes], bytes]:
        def change(data: bytes) -> bytes:
            at = data.index(key.encode()) + len(key) + 4  # its name and its kind
            return data[:at] + value + data[at + len(value) :]

        return change

    norm, heads = "llama.attention.layer_norm_rms_epsilon", "llama.attention.head_count"
    assert "it does not say its attention.layer_norm_rms_epsilon" in said(renamed(norm, norm.replace("llama", "other")))
    assert "its attention.layer_norm_rms_epsilon is nan" in said(number(norm, struct.pack("<f", math.nan)))
    assert "its attention.head_count is 0, which cannot be" in said(number(heads, bytes(4)))
    assert "its rope.freq_base is -1.0" in said(number("llama.rope.freq_base", struct.pack("<f", -1)))
    end = "tokenizer.ggml.eos_token_id"
    assert f"its {end} is 512, and it has 512 tokens" in said(number(end, (512).to_bytes(4, "little")))
    assert "tokenizer cannot be read: it has no end token" in said(renamed(end, end.replace("eos", "eom")))
    at_the_start = (64).to_bytes(8, "little") + bytes(4 + 8)  # 64 numbers in F32, from byte 0 on
    at_the_start = (64).to_bytes(8, "little") + bytes(4 + 8)  # 64 numbers in F32, from byte 0 on
    assert "not where it has to be" in said(number("blk.1.attn_norm.weight", at_the_start))
    assert "not a model's file: it has no token_embd.weight" in said(renamed("token_embd", "other_embd"))
    four = (4).to_bytes(4, "little")
    assert "4 tensors of the model that it describes" in said(number("llama.attention.head_count_kv", four))


def test_what_is_named_as_a_model_may_be_a_part_a_pipe_or_have_another_name(whole: Path, folder: Path, tmp_path: Path):
    part = refusal(lambda: find_base(str(write_gguf(tmp_path / "m-00002-of-00003.gguf", folder, split=3))))
    assert "one part of a model" in part.what
    assert f"--merge {tmp_path}/m-00001-of-00003.gguf whole.gguf" in str(part.fix)
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "a pipe" in refusal(lambda: find_base(str(tmp_path / "pipe.gguf"))).what
    shutil.copy(whole, tmp_path / "sha256-0a1b")  # as Ollama keeps them
    assert find_base(str(tmp_path / "sha256-0a1b")).gguf is not None
