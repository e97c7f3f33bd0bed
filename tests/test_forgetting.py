"""Forgetting: the loss on general text without and with the adapter is the one of a plain loop over windows."""

from __future__ import annotations

from functools import partial
from importlib import resources

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from lora_cli.adapters.trained import adapters_disabled, trained_modules
from lora_cli.base.load import load_tokenizer
from lora_cli.base.source import find_base
from lora_cli.data.batches import collate
from lora_cli.errors import LoraError
from lora_cli.evaluation.forgetting import MOST_TOKENS, general_text, measure_forgetting


@pytest.fixture
def quick_reports() -> None:
    """Here they are made in full."""


CPU = torch.device("cpu")
LAY_OUT = partial(collate, packed=True, pad_id=0, device=CPU)


@pytest.fixture
def page(tmp_path):
    """A text of the user's own: 40 different lines."""
    path = tmp_path / "own.txt"
    path.write_text("\n".join(f"Line {n} says that {n} times {n} is {n * n}." for n in range(40)), encoding="utf-8")
    return path


def plain_losses(model, windows) -> tuple[float, int]:
    """Nats and targets of all windows, one at a time, by the model's own logits."""
    nats, targets = 0.0, 0
    for window in windows:
        ids = torch.tensor(window.ids)
        with torch.no_grad():
            logp = model(ids[None]).logits[0].log_softmax(-1)
        nats -= logp[:-1].gather(1, ids[1:, None]).sum().item()
        targets += len(ids) - 1
    return nats, targets


def test_it_is_the_loss_of_a_plain_loop_without_and_with_the_adapter(adapted, tokenizer, page):
    text = general_text(tokenizer, adapted.config, page)
    assert text is not None
    found = measure_forgetting(adapted, text, LAY_OUT)
    with adapters_disabled(adapted):
        before, targets = plain_losses(adapted, text.windows)
    after, _ = plain_losses(adapted, text.windows)
    assert found["before"] == pytest.approx(before / targets, abs=1e-5)
    assert found["after"] == pytest.approx(after / targets, abs=1e-5)
    assert found["change"] == pytest.approx((after - before) / targets, abs=1e-5)
    assert abs(found["change"]) > 1e-3  # or the test would see nothing
    assert found["low"] < found["change"] < found["high"]
    assert (found["tokens"], found["source"]) == (targets, str(page))
    assert all(layer.active for layer in trained_modules(adapted).values())


def test_processes_together_find_what_one_finds(adapted, tokenizer, page):
    """Their tensors are kept in a first round and added, as a sum over processes would."""
    text = general_text(tokenizer, adapted.config, page)
    assert text is not None
    parts: list[list[torch.Tensor]] = [[], [], []]
    for process, kept in enumerate(parts):

        def keep(part: torch.Tensor, kept: list[torch.Tensor] = kept) -> torch.Tensor:
            kept.append(part)
            return torch.ones_like(part)  # whatever: this round's result is not looked at

        measure_forgetting(adapted, text, LAY_OUT, share=(process, 3), summed=keep)
    totals = iter([torch.stack(same).sum(0) for same in zip(*parts, strict=True)])
    together = measure_forgetting(adapted, text, LAY_OUT, share=(0, 3), summed=lambda _: next(totals))
    assert together == measure_forgetting(adapted, text, LAY_OUT)


def test_the_text_that_comes_along_is_what_it_says(adapted, tokenizer):
    prose = (resources.files("lora_cli.evaluation") / "general.txt").read_text(encoding="utf-8")
    paragraphs = [each for each in prose.split("\n\n") if each.strip()]
    assert len(paragraphs) == 40
    assert 3000 <= len(prose.split()) <= 3500
    assert all(50 <= len(each.split()) <= 110 for each in paragraphs)
    text = general_text(tokenizer, adapted.config)
    assert text is not None
    ids = [id for window in text.windows for id in window.ids]
    assert len(ids) == MOST_TOKENS == 4096
    assert prose.startswith(tokenizer.decode(ids[:500]))
    assert {len(window.ids) for window in text.windows} == {256}  # all that the tiny model sees
    assert all(window.targets == len(window.ids) - 1 for window in text.windows)


def test_windows_begin_with_bos_where_the_tokenizer_wants_it(adapted, tiny_llama, page):
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(find_base(str(tiny_llama)))
    plain = general_text(tokenizer, adapted.config, page)
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.eos_token} $A", special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)]
    )
    text = general_text(tokenizer, adapted.config, page)
    assert plain is not None
    assert text is not None
    assert {window.ids[0] for window in text.windows} == {tokenizer.bos_token_id}
    assert max(len(window.ids) for window in text.windows) == 256
    assert [id for w in text.windows for id in w.ids[1:]] == [id for w in plain.windows for id in w.ids]


def test_a_tokenizer_that_cannot_spell_the_text_measures_nothing(adapted, page):
    words = Tokenizer(WordLevel({"[UNK]": 0, "the": 1, "is": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    assert general_text(tokenizer, adapted.config) is None
    with pytest.raises(LoraError, match="cannot spell this text"):
        general_text(tokenizer, adapted.config, page)


def test_ids_that_the_model_has_no_embedding_for_are_noticed(adapted, tokenizer, monkeypatch):
    monkeypatch.setattr(adapted.config, "vocab_size", 100)
    assert general_text(tokenizer, adapted.config) is None


@pytest.mark.parametrize(
    ("content", "message"), [(b"too short", "too few"), (b"", "too few"), ("süß ".encode("latin-1") * 99, "not UTF-8")]
)
def test_a_file_of_no_use_is_refused_with_its_name(adapted, tokenizer, tmp_path, content, message):
    path = tmp_path / "own.txt"
    path.write_bytes(content)
    with pytest.raises(LoraError, match=message) as caught:
        general_text(tokenizer, adapted.config, path)
    assert caught.value.where == str(path)
    assert caught.value.fix


@pytest.mark.parametrize("name", ["missing.txt", ""])
def test_a_file_that_cannot_be_read_is_refused(adapted, tokenizer, tmp_path, name):
    with pytest.raises(LoraError, match="cannot be read"):
        general_text(tokenizer, adapted.config, tmp_path / name)


def test_one_window_gives_no_interval(adapted, tokenizer, tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("One sentence after the other says that it is one. " * 5)
    text = general_text(tokenizer, adapted.config, path)
    assert text is not None
    assert len(text.windows) == 1
    found = measure_forgetting(adapted, text, LAY_OUT)
    assert (found["low"], found["high"]) == (None, None)
