"""Examples, masks, conversations and packing."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_cli.data.examples import Example, detect_format, make_examples

from lora_cli.data.batches import collate, similar_length_batches
from lora_cli.data.chat import encode_chat
from lora_cli.data.packing import pack
from lora_cli.data.prepare import hold_out
from lora_cli.data.sources import Row, read_rows
from lora_cli.errors import LoraError

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


def example_of(values, tokenizer) -> Example:
    row = Row("rows.jsonl", 1, values)
    return make_examples([row], tokenizer, detect_format([row]))[0]


def test_assistant_turns_are_trained_with_their_stop_token_and_nothing_else_is(tokenizer):
    ids, trained = encode_chat(TURNS, tokenizer, "row")
    assert trained_text(ids, trained, tokenizer) == ["Four of them.<|im_end|>", "Five,\n\nsince\tyesterday.<|im_end|>"]
    rendered = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert tokenizer.decode(ids) == rendered


@settings(deadline=None, max_examples=80)
@given(st.lists(st.text(min_size=1, max_size=20).filter(str.strip), min_size=2, max_size=8))
def test_masks_of_any_conversation_decode_to_its_assistant_turns(tokenizer, contents):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    ids, trained = encode_chat(turns, tokenizer, "row")
    spoken = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    assert trained_text(ids, trained, tokenizer) == [f"{text}<|im_end|>" for text in spoken]


def test_default_system_prompt_of_a_template_is_not_trained(tokenizer):
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    ids, trained = encode_chat(TURNS[1:3], tokenizer, "row")
    assert "You help." in tokenizer.decode(ids)
    assert trained_text(ids, trained, tokenizer) == ["Four of them.<|im_end|>"]


@pytest.mark.parametrize("prompt", ["2 + 2 =", "Say it: ", "Größe?\n", "ab"])
@pytest.mark.parametrize("completion", [" 4", "yes", "\nno", "cd ef"])
def test_completion_is_trained_with_the_end_token_after_the_prompt_as_it_stands_alone(tokenizer, prompt, completion):
    example = example_of({"prompt": prompt, "completion": completion}, tokenizer)
    alone = tokenizer(prompt)["input_ids"]
    assert example.ids[: len(alone)] == alone
    assert trained_text(example.ids, example.trained, tokenizer) == [completion + "<|endoftext|>"]
    assert example.trained == [False] * len(alone) + [True] * (len(example.ids) - len(alone))


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
        examples.append(Example(str(number), ids, [bool(bits >> at & 1) for at in range(length)]))
    expected = [(e.ids[at - 1], e.ids[at]) for e in examples for at in range(1, len(e.ids)) if e.trained[at]]
    for packed in (True, False):
        batch = collate(examples, packed=packed, pad_id=-1, device=CPU)
        flat = batch.inputs["input_ids"].flatten()
        assert list(zip(flat[batch.positions].tolist(), batch.targets.tolist(), strict=True)) == expected
        assert batch.tokens == sum(len(example.ids) for example in examples)


def test_pad_equal_to_end_token_masks_by_position():
    examples = [Example("a", [5, 6, 0], [False, True, True]), Example("b", [7, 0], [False, True])]
    batch = collate(examples, packed=False, pad_id=0, device=CPU)
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.targets.tolist() == [6, 0, 0]  # both end tokens are trained, the padding is not


def test_batches_of_similar_length_hold_every_example_once():
    lengths = [3, 50, 7, 50, 1, 20, 20]
    batches = similar_length_batches(lengths, 100)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 100 for batch in batches)


def test_hold_out_is_seeded_and_disjoint(sums):
    rows = read_rows(sums)
    train, held = hold_out(rows, 0.25, seed=3)
    assert (len(train), len(held)) == (18, 6)
    assert {row.number for row in train} | {row.number for row in held} == set(range(1, 25))
    assert hold_out(rows, 0.25, seed=3) == (train, held)
    assert hold_out(rows, 0.25, seed=4)[1] != held


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    rows = [{"prompt": f'p{i} ä, "q"', "completion": f"line\n{i}"} for i in range(5)]
    path = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        write_rows(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        import pandas

        frame = pandas.DataFrame(rows)
        frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    assert [row.values for row in read_rows(path)] == rows
    assert read_rows(path)[4].where == f"{path}: row 5"


def test_text_file_is_one_document(tmp_path):
    (tmp_path / "book.txt").write_text("one\n\ntwo\n")
    (row,) = read_rows(tmp_path / "book.txt")
    assert row.values == {"text": "one\n\ntwo\n"}


def test_messages_survive_columns_that_only_some_turns_have(tmp_path, tokenizer):
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", "name": "bot"}]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
    ]
    read = read_rows(write_rows(tmp_path / "chat.jsonl", rows))
    examples = make_examples(read, tokenizer, detect_format(read))
    assert trained_text(examples[1].ids, examples[1].trained, tokenizer) == ["yes<|im_end|>"]


def test_turns_that_a_template_rewrites_later_are_refused(tokenizer):
    rewriting = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    rewriting.chat_template = (  # as Qwen 3 does with its thinking: only the last answer is rendered in full
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] if loop.last else m['content'][:2] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(LoraError, match="renders it differently in a longer conversation"):
        encode_chat(TURNS, rewriting, "data.jsonl: row 3")
