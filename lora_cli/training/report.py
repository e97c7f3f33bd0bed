"""The end of a run: report.json, report.html with loss.png, and the last lines on the screen."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator

from lora_cli.adapters.card import CARD, USE, model_card, public_name
from lora_cli.adapters.file import CHAT_TEMPLATE, TENSORS, put_saved
from lora_cli.adapters.trained import is_neutral, trained_parameters
from lora_cli.adapters.update_size import update_sizes
from lora_cli.data.gate import Weights
from lora_cli.data.report import counted
from lora_cli.errors import CheckFailed, DiskError, command
from lora_cli.evaluation.forgetting import measure_forgetting
from lora_cli.evaluation.gain import paired_gain
from lora_cli.files import replacing, write_json
from lora_cli.foreign import is_real_folder, read_text
from lora_cli.training.processes import sum_over_processes
from lora_cli.training.report_page import write_report_page
from lora_cli.training.run_folder import RunFolder, read_metrics
from lora_cli.training.session import Session
from lora_cli.training.state import State
from lora_cli.training.verdict import (
    best_words,
    clipped_words,
    forgetting_words,
    judge,
    sample_lines,
    summarize_update_sizes,
    update_words,
    verdict_lines,
)

_OF_THE_STATE = {
    *("first_loss", "last_loss", "base_validation_loss", "best_validation_loss", "best_step", "last_validation_loss"),
    *("tokens", "target_tokens", "peak_memory_bytes"),
}


def make_report(session: Session, state: State, folder: RunFolder, accelerator: Accelerator) -> dict[str, Any]:
    """What the run achieved; for the keys see `verdict`. Afterwards the model holds the adapter that is kept."""
    if state.best_step not in (None, state.step) and (folder.adapter / TENSORS).exists():
        put_saved(session.model, folder.adapter)
    gain = None
    if "validation.best" in state.tensors:
        gain = paired_gain(*(state.tensors[f"validation.{name}"] for name in ("base", "best", "targets")))
    weights, sizes = session.feed.summary.weights, update_sizes(session.layers)
    early = {"evaluations_since_best": state.evaluations_since_best, "planned_steps": session.total_steps}
    report = {
        "steps": state.step,
        **state.model_dump(include=_OF_THE_STATE),
        "seconds": round(state.seconds, 3),
        "tokens_per_second": round(state.tokens / state.seconds, 1),
        "reserved_memory_bytes": state.reserved_memory_bytes or None,
        "skipped_steps": state.skipped,
        "clipped_steps": state.clipped,
        "ended_early": early if state.step < session.total_steps else None,
        "rewound_from_steps": [step for step, _ in state.rewound],
        "weights": weights and vars(weights),
        "dropped": session.feed.summary.findings.dropped(),
        "adapted_layers": len(session.layers),
        "trained_parameters": sum(parameter.numel() for parameter in trained_parameters(session.model)),
        "validation": None if gain is None else vars(gain),
        "general_text": _forgetting(session, accelerator),
        "update_sizes": summarize_update_sizes({name: size.ratio for name, size in sizes.items()}),
        "learned": not is_neutral(session.model),
        "adapter": str(folder.adapter),
    }
    return report | {"verdict": judge(report).outcome}


def write_report(folder: RunFolder, report: dict[str, Any], say: Callable[[str], None]) -> None:
    """The page first, because report.json marks a run as finished. A page that cannot be drawn is only reported."""
    try:
        write_report_page(
            folder.path,
            report,
            read_metrics(folder.metrics),
            recipe=read_text(folder.recipe),
            environment=folder.stored_environment(),
            warnings=_warnings(report),
        )
    except DiskError:
        raise
    except Exception as error:  # whatever a drawing library raises
        say(f"report.html could not be made: {type(error).__name__}: {error}")
    write_json(folder.report, report)


def write_card(session: Session, report: dict[str, Any], folder: RunFolder) -> None:
    """README.md of adapter/, from the report: what was measured, without paths, rows or times."""
    if not is_real_folder(folder.adapter):
        return
    recipe, verdict = session.recipe, judge(report)
    said = [verdict.headline, verdict.why, forgetting_words(report), update_words(report), best_words(report)]
    template = session.feed.summary.prompting == "template"
    settings = {
        "quantization of the base": recipe.quantization,
        "rank, alpha, dropout": f"{recipe.adapter.rank}, {recipe.adapter.alpha:g}, {recipe.adapter.dropout:g}",
        "adapted layers, trained parameters": f"{report['adapted_layers']}, {report['trained_parameters']:,}",
        "steps, tokens, target tokens": ", ".join(f"{report[k]:,}" for k in ("steps", "tokens", "target_tokens")),
        "longest example": f"{recipe.data.max_seq_len:,} tokens",
        "optimizer, peak rate, schedule": ", ".join(
            (recipe.train.optimizer, f"{recipe.train.learning_rate:g}", recipe.train.schedule)
        ),
        "prompts": "through the chat template" if template else "as they are, without a chat template",
    }
    if system := session.feed.summary.system:
        settings["system prompt"] = json.dumps(system, ensure_ascii=False).replace("|", "\\|")
    use = USE.format(base=public_name(session.source))
    if (folder.adapter / CHAT_TEMPLATE).exists():
        use += f"# training went through the {CHAT_TEMPLATE} of this folder: set tokenizer.chat_template to its text\n"
    kept = [each for each in said if each]
    card = model_card(session.source, library="peft", relation="adapter", said=kept, settings=settings, use=use)
    with replacing(folder.adapter / CARD) as temporary:
        temporary.write_text(card, encoding="utf-8")


def require_learned(report: dict[str, Any], folder: RunFolder) -> None:
    """Raises CheckFailed if the run learned nothing."""
    verdict = judge(report)
    if verdict.outcome == "nothing learned":
        error = CheckFailed(
            verdict.headline.rstrip("."),
            where=str(folder.path),
            details=[verdict.why, f"the whole report: {folder.page}"],
            fix=verdict.fix,
        )
        error.result = report
        raise error


def say_result(report: dict[str, Any], folder: RunFolder, say: Callable[[str], None]) -> None:
    for line in [*verdict_lines(report), *_warnings(report), *sample_lines(report)]:
        say(line)
    say(f"adapter in {report['adapter']}, report in {folder.page}")
    if report["verdict"] != "nothing learned":
        say(f"next: {command('lora', 'chat', folder.path)}")
        say(f"      {command('lora', 'merge', folder.path, '--output', f'{folder.path}-merged')}")


def _forgetting(session: Session, accelerator: Accelerator) -> dict[str, Any] | None:
    if session.general_text is None:
        return None
    return measure_forgetting(
        session.model,
        session.general_text,
        session.collate,
        share=(accelerator.process_index, accelerator.num_processes),
        summed=lambda own: sum_over_processes(accelerator, own).cpu(),
    )


def _warnings(report: dict[str, Any]) -> list[str]:
    told = []
    if early := report["ended_early"]:
        told.append(
            f"ended early, after step {report['steps']} of {early['planned_steps']}: "
            f"{counted(early['evaluations_since_best'], 'evaluation')} in a row without a better loss (train.patience)"
        )
    if skipped := report["skipped_steps"]:
        told.append(f"updates skipped, because loss or gradient was NaN or infinite: steps {_listed(skipped)}")
    if 2 * report["clipped_steps"] > report["steps"]:
        clipped = f"gradients were clipped in {clipped_words(report)}, to train.max_grad_norm"
        told.append(f"{clipped}; if the loss jumps, lower train.learning_rate")
    if rewound := report["rewound_from_steps"]:
        told.append(f"went back to a checkpoint from steps {_listed(rewound)}, skipping their data")
    for each in report.get("dropped") or []:
        told.append(f"left out of the data: {each['count']:,} {each['title']}: {each['where']}")
    if report.get("weights"):
        told.append(Weights(**report["weights"]).said())
    return told


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps[:10])) + (f" and {len(steps) - 10} more" if len(steps) > 10 else "")
