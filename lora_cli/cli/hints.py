"""Examples for --help, and what to use in place of commands and options that do not exist here."""

from __future__ import annotations

from collections.abc import Container

EXAMPLES = {
    "init": (
        "lora init HuggingFaceTB/SmolLM2-135M-Instruct faq.csv",
        "lora init Qwen/Qwen3-4B 'data/*.jsonl' --gpu 12GB",
        "lora init Qwen/Qwen3-4B faq.csv --drop no_target,placeholder",
        "lora init Qwen/Qwen3-4B calls.jsonl --template chatml",
    ),
    "train": (
        "lora train recipe.yaml",
        "lora train recipe.yaml --set output=runs/again",
        "lora train recipe.yaml --resume",
    ),
    "check": (
        "lora check recipe.yaml",
        "lora check recipe.yaml --show 10 --html preview.html",
        "lora check recipe.yaml --row faq.csv:8",
        "lora check recipe.yaml --for vllm",
    ),
    "eval": (
        "lora eval runs/my-run",
        "lora eval runs/my-run --data data/other.jsonl --json",
        "lora eval --adapter runs/one --adapter runs/two",
    ),
    "merge": (
        "lora merge runs/my-run --output merged",
        "lora merge runs/my-run --output merged --onto original",
        "lora merge runs/my-run --output merged-4bit --quantize nf4",
    ),
    "calibrate": (
        "lora calibrate Qwen/Qwen3-0.6B --output for-int4",
        "lora calibrate Qwen/Qwen3-0.6B --text manuals.txt --group-size 64 --output for-int4",
    ),
    "generate": (
        "lora generate runs/my-run 'How long is the warranty?'",
        "lora generate merged 'Once upon' --raw --temperature 0.7",
        "lora generate --model Qwen/Qwen3-4B --adapters requests.jsonl --json",
    ),
    "chat": ("lora chat runs/my-run", "lora chat merged --system 'Answer in one sentence.'"),
    "runs": ("lora runs", "lora runs runs/my-run", "lora runs --per-hour 0.40"),
    "inspect": ("lora inspect runs/my-run", "lora inspect runs/my-run --base Qwen/Qwen3-4B --picture adapter.png"),
    "resize": ("lora resize runs/my-run --rank 8 --output small", "lora resize adapter --energy 0.95 --output small"),
    "combine": (
        "lora combine runs/faq:0.7 runs/sql:0.3 --output both",
        "lora combine runs/faq runs/sql --method ties --rank 16 --output both",
    ),
    "convert": (
        "lora convert runs/my-run --to mlx --output for-mlx",
        "lora convert adapters --to peft --output for-peft",
    ),
    "diff": (
        "lora diff Qwen/Qwen3-4B my-full-finetune --rank 32 --output adapter",
        "lora diff Qwen/Qwen3-4B my-full-finetune --energy 0.9 --rank 128 --output adapter",
    ),
    "analyze": ("lora analyze runs/my-run", "lora analyze runs/rank-8 runs/rank-64 --output analysis"),
    "selftest": ("lora selftest", "lora selftest --model Qwen/Qwen3-0.6B --json"),
    "sweep": (
        "lora sweep recipe.yaml --vary adapter.rank=1,4,16,64 --output runs/ranks",
        "lora sweep recipe.yaml --vary 'adapter.projections=[q],[v],[q,v]' --same-parameters --output runs/matrices",
        "lora sweep recipe.yaml --vary train.learning_rate=1e-4,3e-4,1e-3 --seeds 3 --output runs/rates",
        "lora sweep recipe.yaml --vary adapter.rank=1,2,4,8,16,32 --budget 8 --output runs/ranks",
    ),
    "export": (
        "lora export runs/my-run --to gguf --output my-run.gguf",
        "lora export runs/my-run --to ollama --type q4_1 --output my-model",
        "lora export runs/my-run --to gguf-adapter --output adapter.gguf",
    ),
    "push": ("lora push runs/my-run --to my-name/my-run --dry-run", "lora push merged --to my-name/my-model --public"),
}
_TRAIN = "lora train RECIPE; lora init MODEL DATA writes one"
_COMMANDS = {  # of other programs, and of people's expectation: what to use here
    **dict.fromkeys(("finetune", "fine-tune", "sft", "fit", "run", "start", "launch", "lora", "qlora"), _TRAIN),
    "resume": "lora train RECIPE --resume",
    **dict.fromkeys(("plan", "preprocess", "prepare", "validate", "dry-run"), "lora check RECIPE"),
    **dict.fromkeys(("new", "create", "config", "quickstart"), "lora init MODEL DATA, which writes a recipe"),
    **dict.fromkeys(("evaluate", "test", "score", "benchmark"), "lora eval RUN"),
    **dict.fromkeys(("merge-lora", "merge-sharded-fsdp-weights", "fuse", "save"), "lora merge RUN --output FOLDER"),
    **dict.fromkeys(("repl", "talk", "console"), "lora chat RUN"),
    **dict.fromkeys(("inference", "predict", "infer", "complete", "ask"), "lora generate RUN PROMPT"),
    **dict.fromkeys(("list", "ls", "ps", "status", "history", "compare"), "lora runs"),
    **dict.fromkeys(("self-test", "doctor", "verify", "env", "info", "collect-env"), "lora selftest"),
    **dict.fromkeys(("tune", "search", "grid", "hpo", "ablate"), "lora sweep RECIPE --vary KEY=VALUES --output FOLDER"),
    "schema": "lora init --schema",
    "version": "lora --version",
    **dict.fromkeys(("gguf", "quantize", "ollama"), "lora export RUN --to gguf --output FILE"),
    **dict.fromkeys(
        ("serve", "api", "webui", "deploy"),
        "there is no server here; lora merge RUN --output FOLDER writes a folder that vLLM and others serve",
    ),
    "extract": "lora diff BASE TUNED --rank 32 --output FOLDER",
    **dict.fromkeys(("upload", "publish", "push-to-hub"), "lora push RUN --to OWNER/NAME"),
    **dict.fromkeys(("download", "pull"), "hf download OWNER/NAME, of huggingface_hub; lora train loads models itself"),
    **dict.fromkeys(("dpo", "grpo", "ppo", "orpo", "kto", "rm", "reward", "pretrain"), f"not offered; {_TRAIN}"),
}
_OPTIONS = {  # of other programs: those that mean the same here, where a command has them
    **dict.fromkeys(("--max-tokens", "--max-length", "--num-predict", "-n"), "--max-new-tokens"),
    **dict.fromkeys(("--model-name-or-path", "--base-model", "--model-path"), "--base"),
    **dict.fromkeys(("--out", "--output-dir", "--save-path", "-o"), "--output"),
    **dict.fromkeys(("--dataset", "--data-path", "--test-file"), "--data"),
    **dict.fromkeys(("--temp", "-t"), "--temperature"),
    "--system-prompt": "--system",
    "--resume-from-checkpoint": "--resume",
}


def help_of(name: str) -> str:
    """The end of a command's --help. \\b: lines as they are."""
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in EXAMPLES[name])))


def hint(command: str, unknown: str | None, options: Container[str]) -> str | None:
    """What to use for an unknown command, or an unknown option of `command`, which has `options`.

    unknown None: the command lacks something. Returns a fix; None where there is nothing better to say.
    """
    if unknown is None:
        return f"for example {EXAMPLES[command][0]}" if command in EXAMPLES else None
    if not unknown.startswith("-"):
        known = _COMMANDS.get(unknown.lower().replace("_", "-"))
        return f"use {known}" if known and known.startswith("lora") else known
    name = unknown.replace("_", "-")
    if _OPTIONS.get(name, "") in options:
        return f"did you mean {_OPTIONS[name]}?"
    if "--set" not in options:
        return None
    if name in ("--config", "--recipe", "--file", "-c", "-f"):
        return f"name the recipe without an option: lora {command} recipe.yaml"
    return _in_recipe(name.lstrip("-").replace("-", "_"))


def _in_recipe(name: str) -> str | None:
    """The setting that an option of another program is, and how to give it on the command line."""
    from lora_cli.recipe.keys import all_keys
    from lora_cli.recipe.peers import hint as of_peers

    own = next((".".join(key) for key in all_keys() if key[-1] == name), None)
    if own:
        return f"write {own} in the recipe, or --set {own}=… here"
    said = of_peers(name)
    return said if said is None or said.startswith("remove") else f"{said} (in the recipe, or here with --set)"
