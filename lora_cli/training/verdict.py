"""The end of a run in words: did the adapter learn, by how much, how sure is that, and what did it cost?

The report is what report.json holds. Beside the counters of a run (steps, first_loss, last_loss,
base_validation_loss, best_validation_loss, best_step, last_validation_loss, tokens, target_tokens, seconds,
tokens_per_second, peak_memory_bytes, adapted_layers, trained_parameters, learned, adapter) it has three measurements
of the adapter that is kept; each may be missing, or None where there was nothing to measure:

    validation      before, after: nats per target token of base and adapter on the validation examples
                    gain: before - after; low, high: ends of its 95 % interval, None for a single example
                    examples, targets: validation examples and their target tokens; all as `Gain` has them
    general_text    before, after, change (after - before), low, high, tokens, source: see `measure_forgetting`
    samples         of each prompt: prompt, wanted, the words of base and adapter; steps: step and text of each sample
    update_sizes    median, largest: ‖ΔW‖ / ‖W‖; largest_layer: its name; layers: the same for every layer, by name

Numbers that are not finite are None in the report, since JSON cannot express them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from lora_cli.data.order import FEW_STEPS
from lora_cli.errors import shortened
from lora_cli.files import human_bytes

_TINY_UPDATE = 0.001  # ‖ΔW‖ / ‖W‖ of the median layer
_FAR_BELOW = 0.5  # training loss, as a share of the validation loss at the same step
_SAMPLES, _SAMPLE = 3, 70  # prompts on the screen, and characters of a line
_RISEN = 0.02  # nats a token of validation loss above its best, and as a share of it
Outcome = Literal["learned", "not certain", "hardly trained", "nothing learned"]


@dataclass(frozen=True)
class Verdict:
    """headline: the outcome in a sentence. why: what it rests on. fix: what to try next, unless it learned."""

    outcome: Outcome
    headline: str
    why: str
    fix: str | None = None


def judge(report: Mapping[str, Any]) -> Verdict:
    """What a report says about its adapter.

    `nothing learned`: every B is still zero, or the validation loss is no lower than the base model's. `not certain`:
    it is lower, but the interval includes zero or there is none; or there is no validation data, and the training loss
    did not fall. `hardly trained`, before these: fewer than 20 steps, or a median update below 0.1 % while the last
    evaluation was the best. `learned`: it is certainly lower; or there is no validation data and the training loss
    fell, and the headline says so.
    """
    hardly = _hardly_trained(report)
    if not report.get("learned"):
        return Verdict(
            "nothing learned",
            "This run learned nothing: the adapter changes nothing.",
            "Every B of the adapter is still zero.",
            "raise train.learning_rate; with one step and a warm-up the rate may have been too small to count",
        )
    found = report.get("validation")
    if not found or not is_number(found.get("gain")):
        first, last = report.get("first_loss"), report.get("last_loss")
        moved, fell = "", False
        if is_number(first) and is_number(last):
            fell = last < first
            moved = f"Training loss {first:.4f} → {last:.4f} in {count(report.get('steps'))} steps. "
        if hardly:
            return Verdict("hardly trained", hardly[0], moved + "There was no validation data.", hardly[1])
        outcome: Outcome = "learned"
        headline = "The adapter learned its training data; whether it helps on anything else was not measured."
        why = "There was no validation data."
        if not fell:
            outcome, headline = "not certain", "The adapter changes the model, but nothing shows that it learned."
            why = "There was no validation data, and training losses of single steps differ by chance."
        return Verdict(outcome, headline, moved + why, "hold rows out for validation: data.validation: 0.05")
    if found["gain"] <= 0:
        change = f"loss {found['before']:.4f} → {found['after']:.4f}, {signed(-found['gain'], half_width(found))}"
        return Verdict(
            "nothing learned",
            "This run learned nothing that helps: on validation data the adapter is no better than its base model.",
            f"Validation {change} nats a token {_examples(found)}.",
            hardly[1]
            if hardly
            else "lower train.learning_rate or train.epochs, or validate on rows of the same kind as the training rows",
        )
    if hardly:
        return Verdict("hardly trained", hardly[0], f"{capital(gain_words(found))}.", hardly[1])
    if found.get("low") is None or found["low"] <= 0:
        sure = "a single example gives no interval" if found.get("low") is None else "its interval includes 0"
        return Verdict(
            "not certain",
            "The adapter looks better than its base model, but that is not certain.",
            f"{capital(gain_words(found))}; {sure}.",
            "use more validation examples, or train longer",
        )
    better = "The adapter learned: it is better than its base model."
    return Verdict("learned", better, f"{capital(gain_words(found))}.")


def _hardly_trained(report: Mapping[str, Any]) -> tuple[str, str] | None:
    """(headline, what to try), or None. A small update counts only if the loss was still falling at the end."""
    steps, median = report.get("steps"), (report.get("update_sizes") or {}).get("median")
    if is_number(steps) and steps < FEW_STEPS:
        had = f"The adapter is hardly trained: it had {count(steps)} optimizer step{'' if steps == 1 else 's'}."
        to_try = (
            "lower train.gradient_accumulation_steps, or raise train.epochs or max_steps; lora check says by how much"
        )
        if report.get("ended_early"):
            to_try = "raise train.patience or train.eval_every, or lower train.learning_rate"
        return had, to_try
    if is_number(median) and median < _TINY_UPDATE and report.get("best_step") == steps and is_number(steps):
        had = "The adapter is hardly trained: its update is tiny, and the last evaluation was the best."
        return had, "raise train.learning_rate or train.epochs"
    return None


def verdict_lines(report: Mapping[str, Any]) -> list[str]:
    """The last lines on the screen, most important first. Missing measurements have no line."""
    verdict = judge(report)
    lines = [verdict.headline, verdict.why]
    if verdict.fix:
        lines.append(f"to try: {verdict.fix}")
    measured = (overfitting_words, forgetting_words, update_words, best_words)
    lines += [line for words in measured if (line := words(report))]
    return [*lines, cost_words(report)]


# ── the words for each figure, for screen and page ──────────────────────────────────────────────────────────────


def gain_words(found: Mapping[str, Any]) -> str:
    """`perplexity 12.79 → 1.08, 2.47 ± 0.05 nats a token better on 100 validation examples`."""
    before, after = perplexity(found["before"]), perplexity(found["after"])
    half = half_width(found)
    places = decimals(half)
    gain = f"{found['gain']:.{places}f}" + ("" if half is None else f" ± {half:.{places}f}")
    return f"perplexity {before} → {after}, {gain} nats a token better {_examples(found)}"


def forgetting_words(report: Mapping[str, Any]) -> str | None:
    """`loss on general text 3.21 → 3.25 (+0.04 ± 0.01): …`, or None if it was not measured."""
    found = report.get("general_text")
    if not found or not is_number(found.get("change")):
        return None
    places = decimals(half_width(found))
    before, after = (f"{found[name]:.{places}f}" for name in ("before", "after"))
    text = f"loss on general text {before} → {after} ({signed(found['change'], half_width(found))})"
    if found.get("low") is None:
        return text
    if found["low"] > 0:
        return f"{text}: some was forgotten"
    return f"{text}: better than before" if found["high"] < 0 else f"{text}: nothing forgotten that can be seen"


def overfitting_words(report: Mapping[str, Any]) -> str | None:
    """`overfitting: after step 60 the validation loss rose from 0.3000 to 0.4100 …`, or None.

    Both signs are needed: a validation loss that has risen since its best, and a training loss far below it. Each alone
    is ordinary: a narrow task has a low training loss, and a validation loss wavers.
    """
    names = ("best_validation_loss", "last_validation_loss", "last_loss", "best_step")
    best, last, training, step = (report.get(name) for name in names)
    if not (is_number(best) and is_number(last) and is_number(training) and is_number(step)):
        return None
    if last - best < _RISEN * max(1, best) or training > _FAR_BELOW * last:
        return None
    general = report.get("general_text") or {}
    also = " and general text got worse" if is_number(general.get("low")) and general["low"] > 0 else ""
    return (
        f"overfitting: after step {step:,} the validation loss rose from {best:.4f} to {last:.4f}, the training loss "
        f"fell to {training:.4f}{also}; to try: fewer train.epochs, a lower adapter.rank, or more rows"
    )


def update_words(report: Mapping[str, Any]) -> str | None:
    """`update 1.9 % of the weight in the median layer, 4.1 % in the largest (…q_proj)`, or None."""
    found = report.get("update_sizes")
    if not found or not is_number(found.get("median")):
        return None
    text = f"update {percent(found['median'])} of the weight in the median layer"
    if not is_number(found.get("largest")):
        return text
    return f"{text}, {percent(found['largest'])} in the largest ({found['largest_layer']})"


def best_words(report: Mapping[str, Any]) -> str | None:
    """`best at step 60 of 114: that adapter is kept, …`, or None without validation."""
    best, steps = report.get("best_step"), report.get("steps")
    if not is_number(best):
        return None
    text = f"best at step {best:,} of {count(steps)}: that adapter is kept"
    last, lowest = report.get("last_validation_loss"), report.get("best_validation_loss")
    if best == steps or not is_number(last) or not is_number(lowest):
        return text
    return f"{text}, the last is {last - lowest:.4f} nats a token worse"


def sample_lines(report: Mapping[str, Any]) -> list[str]:
    """For the first prompts: the prompt, what was wanted, the words of base and adapter."""
    return [
        f"{name:9}{on_one_line(each[name], _SAMPLE)}"
        for each in (report.get("samples") or [])[:_SAMPLES]
        for name in ("prompt", "wanted", "base", "adapter")
        if each[name] is not None
    ]


def on_one_line(text: str, most: int) -> str:
    """What was said in at most so many characters; of empty text a dash."""
    return shortened(" ".join(text.split()) or "–", most)


def clipped_words(report: Mapping[str, Any]) -> str:
    """`12 of 114 steps (11 %)`: those whose gradient norm was above train.max_grad_norm; or `–`."""
    clipped, steps = report.get("clipped_steps"), report.get("steps")
    if not is_number(clipped) or not is_number(steps):
        return "–"
    return f"{count(clipped)} of {count(steps)} steps ({percent(clipped / steps if steps else 0)})"


def cost_words(report: Mapping[str, Any]) -> str:
    """`114 steps, 57,030 tokens in 3:07, 305 tokens/s, peak memory 2.28 GiB`."""
    steps, tokens, speed = (report.get(name) for name in ("steps", "tokens", "tokens_per_second"))
    taken = f"{count(tokens)} tokens in {duration(report.get('seconds'))}"
    parts = [f"{count(steps)} step{'' if steps == 1 else 's'}", taken]
    if is_number(speed):
        parts.append(f"{speed:,.0f} tokens/s")
    if is_number(report.get("peak_memory_bytes")):
        reserved = report.get("reserved_memory_bytes")
        more = f" ({human_bytes(reserved)} reserved)" if is_number(reserved) else ""
        parts.append(f"peak memory {human_bytes(report['peak_memory_bytes'])}{more}")
    return ", ".join(parts)


# ── what goes into the report ───────────────────────────────────────────────────────────────────────────────────


def summarize_update_sizes(ratios: Mapping[str, float]) -> dict[str, Any]:
    """report["update_sizes"] from ‖ΔW‖ / ‖W‖ by layer; ratios that are not finite become None."""
    finite = {name: ratio for name, ratio in ratios.items() if math.isfinite(ratio)}
    largest = max(finite, key=finite.__getitem__) if finite else None
    return {
        "median": statistics.median(finite.values()) if finite else None,
        "largest": None if largest is None else finite[largest],
        "largest_layer": largest,
        "layers": {name: finite.get(name) for name in ratios},
    }


# ── numbers as a person reads them ──────────────────────────────────────────────────────────────────────────────


def loss(value: Any) -> str:
    """`0.0769`, or `–` where there is no number; so do the others below."""
    return f"{value:.4f}" if is_number(value) else "–"


def memory(value: Any) -> str:
    return human_bytes(value) if is_number(value) else "–"


def perplexity(loss: Any) -> str:
    if not is_number(loss):
        return "–"
    return f"{math.exp(min(loss, 80)):.2f}" if loss < 14 else f"{math.exp(min(loss, 80)):.2g}"


def percent(ratio: Any) -> str:
    """`0.042 %`, `1.9 %`, `12 %`."""
    if not is_number(ratio):
        return "–"
    share = 100 * ratio
    return f"{share:.0f} %" if share >= 9.95 else f"{share:.1f} %" if share >= 0.95 else f"{share:.2g} %"


def count(value: Any) -> str:
    """`57,030`."""
    return f"{value:,.0f}" if is_number(value) else "–"


def duration(seconds: Any) -> str:
    """`0:07`, `3:07`, `2:03:07`."""
    if not is_number(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def half_width(found: Mapping[str, Any]) -> float | None:
    """Half of a measurement's interval, as shown behind ±."""
    low, high = found.get("low"), found.get("high")
    return (high - low) / 2 if is_number(low) and is_number(high) else None


def signed(value: Any, half: float | None) -> str:
    """`+0.04 ± 0.01`, with as many decimals as the interval makes meaningful."""
    if not is_number(value):
        return "–"
    text = plus_or_minus(value, decimals(half))
    return text if half is None else f"{text} ± {half:.{decimals(half)}f}"


def plus_or_minus(value: float, places: int) -> str:
    return f"{value:+.{places}f}".replace("-", "−")


def decimals(half: float | None) -> int:
    """Decimals that show the first digit of an uncertainty; at least two, at most four."""
    return 2 if not half else min(4, max(2, -math.floor(math.log10(half))))


def _examples(found: Mapping[str, Any]) -> str:
    return f"on {count(found.get('examples'))} validation example{'' if found.get('examples') == 1 else 's'}"


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a report can be shown and computed with."""
    return isinstance(value, int | float) and math.isfinite(value)
