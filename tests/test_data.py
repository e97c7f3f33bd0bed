"""Examples, masks, conversations and packing."""

from __future__ import annotations

import csv
import gzip
import json
from itertools import groupby

import numpy as np
import pyarrow
import pytest
import torch
from conftest import read_rows, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lora_cli.data.batches import collate, similar_length_batches
from lora_cli.data.example import Example
from lora_cli.data.files.readers import Row
from lora_cli.data.gate import Findings
from lora_cli.data.order import hold_out, pack, similar_lengths
from lora_cli.data.prepare import prepare
from lora_cli.data.row_encoder import RowEncoder
from lora_cli.errors import LoraError
from lora_cli.recipe import DataRecipe, load_recipe

CPU = torch.device("cpu")
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "Four of them."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Five,\n\nsince\tyesterday."},
]


def trained_text(ids, trained, tokenizer) -> list[str]:
    """The runs of trained tokens, decoded."""
    runs, run = [], []
    for token, on in [*zip(ids, trained, strict=True), (0, False)]:
        if on:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


def examples_of(rows, tokenizer) -> list[Example]:
    """Rows as `lora train` encodes them; whatever the gate would stop at is raised."""
    findings = Findings()
    reader = RowEncoder(DataRecipe.model_validate({"train": "rows.jsonl"}), tokenizer, rows)
    encoded = list(reader.encode(iter(rows), findings))
    findings.require_none()
    return [each.example for each in encoded]


def example_of(values, tokenizer) -> Example:
    return examples_of([Row("rows.jsonl", 1, values)], tokenizer)[0]


def spans_of(trained) -> list[tuple[int, int, float]]:
    """The runs of True."""
    runs = [list(run) for _, run in groupby(enumerate(trained), key=lambda pair: pair[1])]
    return [(run[0][0], run[-1][0] + 1, 1.0) for run in runs if run[0][1]]


def test_assistant_turns_are_trained_with_their_stop_token_and_nothing_else_is(tokenizer):
    example = example_of({"messages": TURNS}, tokenizer)
    spoken = ["Four of them.<|im_end|>", "Five,\n\nsince\tyesterday.<|im_end|>"]
    assert trained_text(example.ids, example.trained, tokenizer) == spoken
    rendered = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert tokenizer.decode(example.ids) == rendered


@settings(deadline=None, max_examples=80)
@given(st.lists(st.text(min_size=1, max_size=20).filter(str.strip), min_size=2, max_size=8))
def test_masks_of_any_conversation_decode_to_its_assistant_turns(tokenizer, contents):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    example = example_of({"messages": turns}, tokenizer)
    spoken = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    assert trained_text(example.ids, example.trained, tokenizer) == [f"{text}<|im_end|>" for text in spoken]


def test_default_system_prompt_of_a_template_is_not_trained(tokenizer):
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    example = example_of({"messages": TURNS[1:3]}, tokenizer)
    assert "You help." in tokenizer.decode(example.ids)
    assert trained_text(example.ids, example.trained, tokenizer) == ["Four of them.<|im_end|>"]


@pytest.mark.parametrize("prompt", ["2 + 2 =", "Say it: ", "Größe?\n", "ab"])
@pytest.mark.parametrize("completion", [" 4", "yes", "\nno", "cd ef"])
def test_completion_is_trained_with_the_end_token_after_the_prompt_as_it_stands_alone(tokenizer, prompt, completion):
    example = example_of({"prompt": prompt, "completion": completion}, tokenizer)
    alone = tokenizer(prompt)["input_ids"]
    assert example.ids[: len(alone)] == alone
    assert trained_text(example.ids, example.trained, tokenizer) == [completion + "<|endoftext|>"]
    assert example.trained.tolist() == [False] * len(alone) + [True] * (len(example.ids) - len(alone))


def test_text_is_trained_whole_and_ended(tokenizer):
    example = example_of({"text": "select name from table"}, tokenizer)
    assert tokenizer.decode(example.ids) == "select name from table<|endoftext|>"
    assert all(example.trained)
    assert example.targets == len(example.ids) - 1  # the first token has nothing before it


def test_bos_of_the_tokenizer_stands_once_in_front(tokenizer):
    from tokenizers.processors import TemplateProcessing

    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    with_bos = type(tokenizer)(tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<|im_start|>")
    for values in ({"text": "one two"}, {"prompt": "one", "completion": " two"}):
        example = example_of(values, with_bos)
        assert example.ids.count(1) == 1
        assert example.ids[0] == 1


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=120))
def test_packing_loses_and_doubles_nothing(lengths):
    rows = pack(lengths, 50)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 50 for row in rows)
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 50) + 1 or any(length > 25 for length in lengths)


def test_packing_wastes_little_on_short_examples():
    lengths = [int(x) for x in torch.randint(5, 120, (2000,), generator=torch.Generator().manual_seed(0))]
    rows = pack(lengths, 512)
    assert sum(lengths) / (len(rows) * 512) > 0.98


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(2, 12), st.integers(0, 2**12 - 1)), min_size=1, max_size=6))
def test_packed_and_padded_batches_aim_at_the_same_targets(shapes):
    examples = []
    for number, (length, bits) in enumerate(shapes):
        ids = [100 * number + at for at in range(length)]
        examples.append(Example(ids, spans_of(bool(bits >> at & 1) for at in range(length)), str(number), number))
    expected = [(e.ids[at - 1], e.ids[at]) for e in examples for at in range(1, len(e.ids)) if e.trained[at]]
    for packed in (True, False):
        batch = collate(examples, packed=packed, pad_id=-1, device=CPU)
        flat = batch.inputs["input_ids"].flatten()
        assert list(zip(flat[batch.positions].tolist(), batch.targets.tolist(), strict=True)) == expected
        assert batch.tokens == sum(len(example.ids) for example in examples)
        assert batch.weights is None  # all are 1
        assert len(batch.targets) == sum(example.targets for example in examples)


@pytest.mark.parametrize("packed", [True, False])
def test_each_target_carries_the_weight_of_its_span(packed):
    examples = [Example([5, 6, 7, 8], [(0, 2, 0.5), (3, 4, 2.0)]), Example([9, 10], [(1, 2, 1.0)])]
    batch = collate(examples, packed=packed, pad_id=0, device=CPU)
    assert (batch.targets.tolist(), batch.weights.tolist()) == ([6, 8, 10], [0.5, 2.0, 1.0])
    assert [example.target_weight for example in examples] == [2.5, 1.0]
    assert [example.targets for example in examples] == [2, 1]


def test_pad_equal_to_end_token_masks_by_position():
    examples = [Example([5, 6, 0], [(1, 3, 1.0)], "a", 1), Example([7, 0], [(1, 2, 1.0)], "b", 1)]
    batch = collate(examples, packed=False, pad_id=0, device=CPU)
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.targets.tolist() == [6, 0, 0]  # both end tokens are trained, the padding is not


def test_batches_of_similar_length_hold_every_example_once():
    lengths = [3, 50, 7, 50, 1, 20, 20]
    batches = similar_length_batches(lengths, 100)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 100 for batch in batches)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(2, 50), max_size=60), st.integers(0, 3))
def test_groups_of_similar_length_hold_every_example_once(lengths, seed):
    groups = similar_lengths(np.array(lengths, np.int64), 60, seed, pool=16)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(len(group) * max(lengths[index] for index in group) <= 60 for group in groups)


def test_hold_out_is_seeded_and_disjoint(sums, recipe_file, tokenizer):
    def split(seed: int) -> tuple[list[int], list[int]]:
        data = prepare(load_recipe(recipe_file(data={"validation": 0.25}, train={"seed": seed})), tokenizer, keep=True)
        return [example.row for example in data.train], [example.row for example in data.validation]

    train, held = split(3)
    assert (len(train), len(held)) == (18, 6)
    assert {*train} | {*held} == set(range(1, 25))
    assert split(3) == (train, held)
    assert split(4)[1] != held
    assert held == [int(at) + 1 for at in hold_out(np.arange(24), 0.25, seed=3)]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=60).filter(lambda rows: len(set(rows)) > 1), st.integers(0, 9))
def test_rows_of_one_group_are_held_out_together(groups, seed):
    try:
        held = hold_out(np.array(groups, np.uint64), 0.3, seed)
    except LoraError:
        return  # no split of these groups leaves rows on both sides
    kept = np.setdiff1d(np.arange(len(groups)), held)
    assert len(held) >= round(0.3 * len(groups))
    assert {groups[at] for at in held}.isdisjoint(groups[at] for at in kept)


@pytest.mark.parametrize(
    "kind", ["jsonl", "json", "csv", "tsv", "parquet", "arrow", "jsonl.gz", "json.zst", "csv.gz", "tsv.zst"]
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    rows = [{"prompt": f'p{i} ä, "q"', "completion": f"line\n{i}"} for i in range(5)]
    kind, _, packing = kind.partition(".")
    path = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        write_rows(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as stream:
            table = csv.DictWriter(stream, list(rows[0]), delimiter={"csv": ",", "tsv": "\t"}[kind])
            table.writeheader()
            table.writerows(rows)
    elif kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with (
            pyarrow.OSFile(str(path), "wb") as sink,
            pyarrow.ipc.new_file(sink, pyarrow.Table.from_pylist(rows).schema) as w,
        ):
            w.write_table(pyarrow.Table.from_pylist(rows))
    if packing:
        content, path = path.read_bytes(), path.with_name(f"{path.name}.{packing}")
        path.write_bytes(gzip.compress(content) if packing == "gz" else pyarrow.compress(content, "zstd", asbytes=True))
    assert [row.values for row in read_rows(path)] == rows
    line = " (line 10)" if kind in ("csv", "tsv") else ""  # each row before takes two, as the header takes one
    assert read_rows(path)[4].where == f"{path}: row 5{line}"


def test_text_file_is_one_document(tmp_path):
    (tmp_path / "book.txt").write_text("one\n\ntwo\n")
    (row,) = read_rows(tmp_path / "book.txt")
    assert row.values == {"text": "one\n\ntwo\n"}


def test_messages_survive_columns_that_only_some_turns_have(tmp_path, tokenizer):
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", "name": "bot"}]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
    ]
    examples = examples_of(read_rows(write_rows(tmp_path / "chat.jsonl", rows)), tokenizer)
    assert trained_text(examples[1].ids, examples[1].trained, tokenizer) == ["yes<|im_end|>"]


def test_turns_that_a_template_rewrites_later_are_refused(tokenizer):
    rewriting = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    rewriting.chat_template = (  # as Qwen 3 does with its thinking: only the last answer is rendered in full
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'][:2] if m['role'] == 'assistant' and not loop.last else m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(LoraError, match="renders it differently in a longer conversation"):
        example_of({"messages": TURNS}, rewriting)
