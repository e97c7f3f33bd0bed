"""Keys of every --json document and of a run's files only grow: programs read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_cli import boundary
from lora_cli.cli import app
from lora_cli.exporting.export import Exported
from lora_cli.studies import selftest

SCORE = {"loss", "perplexity", "bits_per_byte", "target_tokens"}
REPORT = {
    *("steps", "first_loss", "last_loss", "base_validation_loss", "best_validation_loss", "best_step"),
    *("last_validation_loss", "tokens", "target_tokens", "seconds", "tokens_per_second", "peak_memory_bytes"),
    *(
        "ended_early",
        "skipped_steps",
        "clipped_steps",
        "rewound_from_steps",
        "adapted_layers",
        "trained_parameters",
        "validation",
        "general_text",
    ),
    *("update_sizes", "learned", "adapter", "verdict", "samples"),
}
FROZEN = {
    "train": REPORT,
    "report.json": REPORT,
    "report.json validation": {"before", "after", "gain", "low", "high", "examples", "targets"},
    "report.json general_text": {"before", "after", "change", "low", "high", "tokens", "source"},
    "report.json update_sizes": {"median", "largest", "largest_layer", "layers"},
    "report.json samples": {"prompt", "wanted", "base", "adapter", "steps"},
    "report.json samples steps": {"step", "text"},
    "samples.jsonl": {"step", "number", "prompt", "wanted", "text", "stop", "new_tokens", "error"},
    "status.json": {"started", "pid", "host", "updated", "state", "why", "step", "total_steps", "wall_seconds"}
    | {"processes"},
    "metrics.jsonl": {
        "step",
        "loss",
        "learning_rate",
        "grad_norm",
        "target_tokens",
        "tokens",
        "seconds",
        "tokens_per_second",
    }
    | {"peak_memory_bytes"},
    "check": {"ok", "examples", "validation_examples", "tokens", "target_tokens", "lengths", "formats", "template"}
    | {"steps", "layers", "trained_parameters", "fingerprint", "findings", "rows"}
    | {"sources"},
    "check rows": {"source", "row", "tokens"},
    "check rows tokens": {"id", "text", "trained"},
    "check lengths": {"p50", "p90", "p95", "p99", "longest"},
    "eval": {"base", "adapter", "gain", "low", "high"},
    "eval base": SCORE,
    "eval adapter": SCORE,
    "compared": {"base", "adapters", "pairs"},
    "compared pairs": {"of", "to", "gain", "low", "high"},
    "answers": {"prompt", "adapter", "completion", "prompting", "stop", "new_tokens", "system"},
    "merge": {"output", "onto", "dtype", "layers", "tokens_compared", "kl", "adapter_effect", "top1_agreement", "kept"}
    | {"largest_difference", "block_by_block", "bases_compared", "kl_trained", "quantized"},
    "generate": {"prompt", "completion", "prompting", "stop", "new_tokens", "system"},
    "runs": {"name", "folder", "state", "step", "total_steps", "why", "loss", "validation_loss", "tokens", "hours"}
    | {"cost", "last_activity", "result"},
    "init": {"recipe", "output", "memory", "notes"},
    "inspect": {"adapter", "base_model", "base", "totals", "layers"},
    "inspect totals": {"layers", "parameters", "norm", "directions", "dead_directions", "inert_layers", "rank"}
    | {"effective_rank", "directions_90", "ratio", "weights_not_found"},
    "inspect layers": {"name", "shape", "rank", "scaling", "singular_values", "norm", "weight_norm", "ratio"}
    | {"effective_rank", "directions_90", "dead_directions", "inert"},
    "resize": {"output", "error", "norm", "layers"},
    "resize layers": {"name", "was", "rank", "norm", "lost"},
    "combine": {"output", "method", "parts", "notes", "error", "norm", "layers"},
    "combine parts": {"name", "weight"},
    "combine layers": {"name", "was", "rank", "norm", "lost"},
    "convert": {"output", "to", "notes"},
    "diff": {"output", "notes", "not_held", "error", "norm", "layers"},
    "diff layers": {"name", "was", "rank", "norm", "lost"},
    "sweep": {"recipe", "output", "seeds", "same_parameters", "points", "best", "recommended", "recommendation"}
    | {"budget"},
    "sweep budget": {"hours", "hours_used", "rungs"},
    "sweep budget rungs": {"part", "points", "kept"},
    "sweep points": {"name", "settings", "state", "why", "folders", "trained_parameters", "seconds", "seed_losses"}
    | {"loss", "gain", "behind", "rungs"},
    "sweep points rungs": {"step", "loss", "behind"},
    "sweep points gain": {"before", "after", "gain", "low", "high", "examples", "targets"},
    "analyze": {"adapters", "base", "amplification", "similarity", "weights_not_found", "notes", "output"},
    "analyze similarity": {"adapters", "layers", "grids"},
    "analyze similarity layers": {"layer"}
    | {f"{of}_{what}" for of in ("A", "update", "random") for what in ("first", "first_in_all", "all")},
    "amplified": {"layer", "rank", "update_norm", "weight_norm", "by_update", "by_weight", "by_random"}
    | {"amplification"},
    "selftest": {"versions", "system", "device", "model", "ok", "equalities"},
    "selftest equalities": {"name", "says", "bound", "suspects", "seconds", "difference", "holds", "why"},
    "push": {"repository", "private", "files", "left_out", "card", "url"},
    "export": {"output", "to", "type", "bytes", "error", "template", "notes", "rounding"},
    "calibrate": {"output", "layers", "left", "group_size"},
}


def lora(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    capsys.readouterr()
    assert boundary.run(app, [*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def parts(documents: dict[str, Any]) -> dict[str, Any]:
    """Documents and what lies inside them, by the names of FROZEN; of a list the first."""
    found = {}
    for name in FROZEN:
        head = next(key for key in documents if name == key or name.startswith(f"{key} "))
        value = documents[head]
        for part in name.removeprefix(head).split():
            value = value[0][part] if isinstance(value, list) else value[part]
        found[name] = value[0] if isinstance(value, list) else value
    return found


def test_keys_of_documents_and_files_only_grow(recipe_file, tiny_llama, sums, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(selftest, "EQUALITIES", selftest.EQUALITIES[:1])
    recipe = recipe_file(data={"validation": 0.25}, train={"max_steps": 4, "eval_every": 2, "sample_every": 4})
    run, asked, swept = tmp_path / "run", tmp_path / "asked.jsonl", tmp_path / "swept"
    asked.write_text(json.dumps({"prompt": "one", "adapter": str(run)}))
    documents = {
        "check": lora(capsys, "check", recipe),
        "train": lora(capsys, "train", recipe),
        "eval": lora(capsys, "eval", run),
        "merge": lora(capsys, "merge", run, "--output", tmp_path / "merged"),
        "generate": lora(capsys, "generate", run, "one", "--max-new-tokens", "2"),
        "runs": lora(capsys, "runs", tmp_path),
        "init": lora(capsys, "init", tiny_llama, sums, "--output", tmp_path / "new.yaml"),
        "inspect": lora(capsys, "inspect", run, "--base", tiny_llama),
        "resize": lora(capsys, "resize", run, "--rank", "2", "--output", tmp_path / "small"),
        "combine": lora(capsys, "combine", run, f"{run}:-0.5", "--output", tmp_path / "sum"),
        "diff": lora(capsys, "diff", tiny_llama, tmp_path / "merged", "--rank", "1", "--output", tmp_path / "diff"),
        "calibrate": lora(capsys, "calibrate", tiny_llama, "--output", tmp_path / "moved"),
        "convert": lora(capsys, "convert", run, "--to", "mlx", "--output", tmp_path / "mlx"),
        "sweep": lora(capsys, "sweep", recipe, "--vary", "adapter.rank=1", "--output", swept, "--budget", "1"),
        "compared": lora(capsys, "eval", "--adapter", run, "--adapter", tmp_path / "small"),
        "answers": lora(capsys, "generate", "--adapters", asked, "--max-new-tokens", "2"),
        "analyze": (analyzed := lora(capsys, "analyze", run, tmp_path / "small", "--base", tiny_llama)),
        "amplified": next(iter(analyzed["amplification"].values())),
        "selftest": lora(capsys, "selftest"),
        "push": lora(capsys, "push", run, "--to", "me/it", "--base", "me/llama", "--dry-run"),
        "export": Exported("a.gguf", "gguf", "q8_0", 1).as_dict(),  # the converter is no part of this environment
        "report.json": json.loads((run / "report.json").read_text()),
        "status.json": json.loads((run / "status.json").read_text()),
        "samples.jsonl": json.loads((run / "samples.jsonl").read_text().splitlines()[0]),
        "metrics.jsonl": json.loads((run / "metrics.jsonl").read_text().splitlines()[0]),
    }
    gone = {name: sorted(FROZEN[name] - set(value)) for name, value in parts(documents).items()}
    assert not {name: keys for name, keys in gone.items() if keys}
    evaluated = documents["eval"]
    gain = evaluated["base"]["loss"] - evaluated["adapter"]["loss"]
    assert evaluated["gain"] == pytest.approx(gain, abs=1e-9)
    assert evaluated["low"] < evaluated["gain"] < evaluated["high"]
    validation = documents["report.json"]["validation"]  # the same examples and the same adapter
    assert evaluated["gain"] == pytest.approx(validation["gain"], abs=1e-5)
    assert evaluated["low"] == pytest.approx(validation["low"], abs=1e-5)
