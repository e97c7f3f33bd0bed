"""The verdict in words, the picture of the loss, and the page: true, complete, and unharmed by odd numbers."""

from __future__ import annotations

import io
import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from lora_cli.training.loss_picture import MOST_POINTS, _extremes, loss_picture, smoothed
from lora_cli.training.report_page import MOST_LAYERS, report_page, write_report_page
from lora_cli.training.verdict import (
    duration,
    forgetting_words,
    judge,
    overfitting_words,
    percent,
    perplexity,
    signed,
    summarize_update_sizes,
    verdict_lines,
)


@pytest.fixture
def quick_reports() -> None:
    """Here they are made in full."""


METRICS: list[dict[str, Any]] = [
    {"step": step, "loss": 2.4 / step, "tokens": 500, "seconds": 1.6} | ({"validation_loss": 0.5} if step == 60 else {})
    for step in range(1, 115)
]


def report(**changes: Any) -> dict[str, Any]:
    """Of the demo, with round numbers."""
    return {
        "steps": 114,
        "first_loss": 2.4354,
        "last_loss": 0.0115,
        "base_validation_loss": 2.5489,
        "best_validation_loss": 0.0769,
        "best_step": 60,
        "last_validation_loss": 0.0899,
        "tokens": 57030,
        "target_tokens": 16931,
        "seconds": 187.0,
        "tokens_per_second": 305.0,
        "peak_memory_bytes": 2.28 * 2**30,
        "adapted_layers": 210,
        "trained_parameters": 4884480,
        "learned": True,
        "adapter": "runs/demo/adapter",
        "validation": {"before": 2.5489, "after": 0.0769, "gain": 2.472, "low": 2.422, "high": 2.522, "examples": 100},
        "general_text": {
            **{"before": 3.21, "after": 3.25, "change": 0.04, "low": 0.03, "high": 0.05},
            **{"tokens": 3942, "source": "built-in English prose"},
        },
        "update_sizes": summarize_update_sizes({f"layers.{n}.q_proj": (n + 1) / 1000 for n in range(41)}),
    } | changes


def validation(gain: float, low: float | None, high: float | None, examples: int = 100) -> dict[str, Any]:
    found = {"before": 2.5, "after": 2.5 - gain, "gain": gain, "low": low, "high": high, "examples": examples}
    return report(validation=found)


def update(median: float, **changes: Any) -> dict[str, Any]:
    return report(update_sizes=summarize_update_sizes({"a": median}), **changes)


# ── the verdict ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_lines_say_what_was_measured():
    assert verdict_lines(report()) == [
        "The adapter learned: it is better than its base model.",
        "Perplexity 12.79 → 1.08, 2.47 ± 0.05 nats a token better on 100 validation examples.",
        "loss on general text 3.21 → 3.25 (+0.04 ± 0.01): some was forgotten",
        "update 2.1 % of the weight in the median layer, 4.1 % in the largest (layers.40.q_proj)",
        "best at step 60 of 114: that adapter is kept, the last is 0.0130 nats a token worse",
        "114 steps, 57,030 tokens in 3:07, 305 tokens/s, peak memory 2.28 GiB",
    ]


@pytest.mark.parametrize(
    ("changed", "outcome", "word"),
    [
        (report(learned=False), "nothing learned", "Every B of the adapter is still zero"),
        (validation(-0.2, -0.3, -0.1), "nothing learned", "+0.20 ± 0.10 nats a token"),
        (validation(0.0, 0.0, 0.0), "nothing learned", "2.5000 → 2.5000"),
        (validation(-0.01, -0.1, 0.08), "nothing learned", "no better than its base model"),
        (validation(0.01, -0.1, 0.12), "not certain", "its interval includes 0"),
        (validation(0.01, None, None, 1), "not certain", "on 1 validation example; a single example gives no interval"),
        (validation(0.2, 0.1, 0.3), "learned", "0.20 ± 0.10 nats a token better"),
        (
            report(validation=None),
            "learned",
            "Training loss 2.4354 → 0.0115 in 114 steps. There was no validation data",
        ),
        (report(steps=19, learned=False), "nothing learned", "Every B of the adapter is still zero"),
        (report(steps=19, validation=validation(-0.2, -0.3, -0.1)["validation"]), "nothing learned", "no better"),
        (report(steps=1, validation=None, last_loss=2.4354), "hardly trained", "it had 1 optimizer step."),
        (report(steps=19), "hardly trained", "it had 19 optimizer steps. Perplexity 12.79 → 1.08"),
        (report(steps=20, best_step=20), "learned", "better than its base model"),
        (update(0.00099, best_step=114), "hardly trained", "its update is tiny, and the last evaluation was the best"),
        (update(0.00101, best_step=114), "learned", "better than its base model"),
        (update(0.00099, best_step=60), "learned", "better than its base model"),
        (report(validation=None, last_loss=2.5), "not certain", "nothing shows that it learned"),
        (report(validation=None, last_loss=None), "not certain", "nothing shows that it learned"),
        (validation(math.nan, None, None), "learned", "was not measured"),
    ],
)
def test_it_learned_or_not_and_why(changed, outcome, word):
    verdict = judge(changed)
    assert verdict.outcome == outcome
    assert word in f"{verdict.headline} {verdict.why}"
    assert (verdict.fix is None) == (outcome == "learned" and changed["validation"] is not None and "±" in verdict.why)


def test_few_steps_are_what_to_change_also_where_nothing_was_learned():
    few = judge(report(steps=2, validation=validation(-0.2, -0.3, -0.1)["validation"]))
    assert "gradient_accumulation_steps" in str(few.fix)
    assert "gradient_accumulation_steps" not in str(judge(validation(-0.2, -0.3, -0.1)).fix)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, False),  # risen by 0.013
        ({"last_validation_loss": 0.1}, True),
        ({"last_validation_loss": 0.1, "last_loss": 0.06}, False),  # the training loss is not far below it
        ({"best_validation_loss": 2.0, "last_validation_loss": 2.03, "last_loss": 0.5}, False),  # 1.5 % more
        ({"best_validation_loss": 2.0, "last_validation_loss": 2.05, "last_loss": 0.5}, True),
        ({"best_validation_loss": 0.08, "last_validation_loss": 0.08, "best_step": 114}, False),
    ],
)
def test_overfitting_is_named_where_validation_rose_and_training_is_far_below(changes, named):
    said = overfitting_words(report(**changes))
    assert (said is not None) == named
    assert (said in verdict_lines(report(**changes))) == named
    if said:
        assert "and general text got worse" in said
        assert "got worse" not in str(overfitting_words(report(**changes, general_text=None)))
        assert "Overfitting: after step 60 the validation loss rose" in page(report(**changes)).words


def test_a_run_that_is_hardly_trained_is_not_green():
    assert "verdict hardly-trained" in report_page(report(steps=2), title="t", recipe="", environment={}, warnings=[])
    style = report_page(report(), title="t", recipe="", environment={}, warnings=[])
    assert ".hardly-trained { --side: var(--unsure); }" in style


@pytest.mark.parametrize(
    ("low", "high", "words"), [(0.01, 0.03, "some was forgotten"), (-0.1, -0.02, "better"), (-0.1, 0.1, "nothing")]
)
def test_forgetting_is_called_so_only_if_it_is_certain(low, high, words):
    found = {"before": 3.2, "after": 3.2 + (low + high) / 2, "change": (low + high) / 2, "low": low, "high": high}
    assert words in str(forgetting_words({"general_text": found}))


def test_update_sizes_are_summed_up_without_those_that_are_not_finite():
    found = summarize_update_sizes({"a": 0.5, "b": math.inf, "c": 0.1, "d": 0.2})
    assert found == {
        **{"median": 0.2, "largest": 0.5, "largest_layer": "a"},
        "layers": {"a": 0.5, "b": None, "c": 0.1, "d": 0.2},
    }
    assert summarize_update_sizes({"a": math.nan})["median"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (signed(0.04, 0.013), "+0.04 ± 0.01"),
        (signed(-0.0051, 0.0066), "−0.005 ± 0.007"),
        (signed(1.5, 12.0), "+1.50 ± 12.00"),
        (signed(-0.25, None), "−0.25"),
        (percent(0.00042), "0.042 %"),
        (percent(0.0199), "2.0 %"),
        (percent(0.0996), "10 %"),
        (percent(1.4), "140 %"),
        (duration(7.4), "0:07"),
        (duration(187), "3:07"),
        (duration(7387), "2:03:07"),
        (perplexity(math.log(12.79)), "12.79"),
        (perplexity(900.0), "5.5e+34"),
    ],
)
def test_numbers_have_the_digits_that_mean_something(shown, expected):
    assert shown == expected


# ── the picture ─────────────────────────────────────────────────────────────────────────────────────────────────


def pixels(png: bytes | None) -> np.ndarray:
    assert png is not None
    return matplotlib.image.imread(io.BytesIO(png), format="png")


def test_the_picture_is_one_and_shows_the_validation():
    picture = pixels(loss_picture(METRICS, report()))
    assert picture.shape == (675, 1350, 4)
    without = pixels(loss_picture([{"step": m["step"], "loss": m["loss"]} for m in METRICS], {}))
    assert (picture != without).any()


def test_smoothing_is_the_mean_of_the_neighbours():
    losses = np.random.default_rng(0).random(200)
    means, width = smoothed(losses)
    assert width == 11
    expected = [losses[max(0, at - 5) : at + 6].mean() for at in range(200)]
    np.testing.assert_allclose(means, expected, rtol=1e-12)
    np.testing.assert_allclose(smoothed(losses[:10])[0], losses[:10], rtol=1e-12)
    assert smoothed(np.ones(100_000))[1] == 301


def test_thinning_keeps_spikes_and_ends():
    losses = np.ones(100_000)
    losses[[0, 54_321, 99_999]] = 9, 50, -3
    steps, kept = _extremes(np.arange(100_000), losses)
    assert len(steps) <= MOST_POINTS
    assert (np.diff(steps) > 0).all()
    assert dict(zip(steps.tolist(), kept.tolist(), strict=True)).items() >= {0: 9, 54_321: 50, 99_999: -3}.items()


@pytest.mark.parametrize(
    "metrics",
    [
        METRICS[:1],
        METRICS[:2],
        [{"step": n, "loss": math.nan if n % 2 else 1.0, "validation_loss": math.inf} for n in range(1, 9)],
        [{"step": n} | ({"loss": None} if n < 4 else {"loss": 0.0}) for n in range(1, 9)],
        [{"loss": 1.0}, {"step": 2, "loss": "x"}, {}, {"step": 3, "loss": 1.0}],
        [{"step": n, "loss": 1e30 if n == 5 else 2.0} for n in range(1, 50)],
        [{"step": n, "loss": 2 + math.sin(n), "validation_loss": 2.0} for n in range(1, 100_001)],
    ],
    ids=["one", "two", "nan", "missing", "torn", "exploding", "100,000"],
)
def test_no_line_of_metrics_is_too_odd_to_draw(metrics):
    assert pixels(loss_picture(metrics, report())).std() > 0


def test_lines_are_drawn_by_step_whatever_their_order():
    assert loss_picture(METRICS[::-1], report()) == loss_picture(METRICS, report())


@pytest.mark.parametrize("metrics", [[], [{"step": 1, "loss": math.nan}]])
def test_without_a_loss_there_is_no_picture(metrics):
    assert loss_picture(metrics, report()) is None


# ── the page ────────────────────────────────────────────────────────────────────────────────────────────────────


class Text(HTMLParser):
    """What a person reads, and every address that a browser would load."""

    def __init__(self, page: str):
        super().__init__()
        self.said: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "action")]

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.said).split())


def page(changed: dict[str, Any], **more: Any) -> Text:
    given = {"title": "demo", "recipe": "base_model: gpt2\n", "environment": {"torch": "2.13.0"}} | more
    return Text(report_page(changed, **given))


def test_the_page_says_all_of_it():
    words = page(report(), warnings=["12 rows were cut"]).words
    for expected in [
        "The adapter learned: it is better than its base model.",
        "12.79 → 1.08",
        "+2.47 ± 0.05",
        "95 % interval: +2.42 to +2.52",
        "Some was forgotten",
        "95 % interval: +0.03 to +0.05",
        "layers.40.q_proj",
        "57,030, of which 16,931 are target tokens",
        "base_model: gpt2",
        "torch 2.13.0",
        "12 rows were cut",
        "2.28 GiB",
    ]:
        assert expected in words, expected


def test_the_page_needs_nothing_else(tmp_path):
    write_report_page(tmp_path, report(), METRICS, recipe="a: 1", environment={})
    written = (tmp_path / "report.html").read_text(encoding="utf-8")
    text = Text(written)
    assert not text.tags & {"script", "link", "iframe", "object"}
    assert len(text.addresses) == 2  # for a light and a dark background
    assert all(address.startswith("data:image/png;base64,") for address in text.addresses)
    assert not re.search(r"https?://|@import|url\(", written)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "report.html"]


@pytest.mark.parametrize(
    ("bad", "shown"),
    [
        ("<script>alert('&')</script>", "<script>alert('&')</script>"),
        ("a\u202egnp.exe\x1b[31m", "a\\u202egnp.exe\\x1b[31m"),  # turned around, an .exe looks like a picture
    ],
)
def test_everything_is_escaped(bad, shown):
    changed = report(
        adapter=bad,
        general_text=report()["general_text"] | {"source": bad},
        update_sizes=summarize_update_sizes({bad: 0.1}),
    )
    found = page(changed, title=bad, recipe=bad, environment={bad: bad}, warnings=[bad])
    assert "script" not in found.tags
    assert found.words.count(shown) == 9
    assert "\u202e" not in found.words


def test_many_layers_are_shown_when_asked_for():
    found = page(report())
    assert "all 41 layers, in the model's order" in found.words
    assert found.words.count("q_proj") == MOST_LAYERS + 41
    few = page(report(update_sizes=summarize_update_sizes({"a": 0.1, "b": 0.2})))
    assert "in the model's order" not in few.words


@pytest.mark.parametrize("odd", [None, math.nan, math.inf, "missing"])
@pytest.mark.parametrize("key", sorted(set(report()) - {"learned"}))
def test_no_missing_value_is_too_odd_for_page_or_screen(key, odd):
    changed = {name: value for name, value in report().items() if name != key}
    if odd != "missing":
        inner = report()[key]
        changed[key] = {name: odd for name in inner} if isinstance(inner, dict) and odd is not None else odd
        if key == "update_sizes" and odd is not None:
            changed[key]["layers"] = {"a": odd, "b": 0.1}
    assert "Cost" in page(changed).words
    assert verdict_lines(changed)
