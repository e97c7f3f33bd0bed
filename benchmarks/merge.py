"""Memory and time of `lora merge` without its proof, over `cp` of the base, and beside PEFT's merge_and_unload.

    python benchmarks/merge.py BASE FOLDER
    python benchmarks/merge.py rounded FOLDER

BASE: a model folder; or `1b` or `3b`, Llama shapes of random weights in bf16, which are written into FOLDER in files
of 1 GB and removed again; or `70b`, whose files are sparse: of its merge the first 40 tensors are made and written to
nowhere. The adapter: rank 16 on all linear layers, random; on plain weights, and on NF4 ones.
rounded: what `lora merge --quantize nf4` loses of text-to-SQL (30 steps of 16 rows, rank 16 on all linear layers,
rate 1e-3, one seed) on SmolLM2 moved off its grid by 0.1, trained in bf16 and on NF4: its losses, and that of the
written folder in plain transformers, on the answers of the same held-out rows, about databases of their own.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

SHAPES = {  # layers, hidden, inner, heads
    "1b": (22, 2048, 5632, 32),
    "3b": (28, 3072, 8192, 24),
    "70b": (80, 8192, 28672, 64),
}
FIRST = 40  # tensors of 70b


def skeleton(config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def synthetic(kind: str, folder: Path, tokenizer: Path) -> Path:
    import torch
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaConfig

    layers, hidden, inner, heads = SHAPES[kind]
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    tensors = dict(skeleton(config).named_parameters())
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda each: 2 * each.numel(),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size="1GB",
    )
    for file, names in split.filename_to_tensors.items():
        if kind == "70b":
            sparse(folder / file, {name: tensors[name] for name in names})
        else:
            drawn = {name: torch.randn(tensors[name].shape, dtype=torch.bfloat16) * 0.02 for name in names}
            save_file(drawn, folder / file, {"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def sparse(file: Path, tensors: dict[str, Any]) -> None:
    from lora_cli.base.tensor_files import Entry, write_entries

    entries = [
        Entry(name, "BF16", tuple(each.shape), size := 2 * each.numel(), partial(_skip, size))
        for name, each in tensors.items()
    ]
    write_entries(file, entries, {"format": "pt"})
    with file.open("r+b") as stream:  # the last tensor is not there yet
        stream.truncate(8 + int.from_bytes(stream.read(8), "little") + sum(each.size_bytes for each in entries))


def _skip(size: int, out: Any) -> None:
    out.seek(size, 1)


def adapter(base: Path, folder: Path, quantization: str) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from lora_cli.adapters.metadata import AdapterMetadata

    model, tensors, rank = skeleton(AutoConfig.from_pretrained(base)), {}, 16
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings():
            outputs, inputs = layer.weight.shape
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, inputs) * 0.02
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(outputs, rank) * 0.02
    targets = sorted({name.split(".")[-3] for name in tensors})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": targets}
    how: dict[str, Any] = {"quantization": quantization, "compute_dtype": "bf16", "unquantized_modules": []}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", AdapterMetadata(**how).as_texts())
    (folder / "adapter_config.json").write_text(json.dumps(config))


def peak_kib() -> int:
    """Not ru_maxrss, which a process takes over from the one that started it."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def measured(how: str, base: Path, folder: Path) -> None:
    """Print the seconds, and the MiB above the peak that the interpreter with its libraries has."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from lora_cli.base.load import quiet_libraries
    from lora_cli.merging.merge import merge

    quiet_libraries()
    before, start = peak_kib(), time.perf_counter()
    if how == "peft":
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        peft.PeftModel.from_pretrained(model, folder / "plain").merge_and_unload().save_pretrained(folder / how)
    else:
        merge(folder / how, folder / f"{how} merged", base=str(base), proof="none")
    print(f"{how}: {time.perf_counter() - start:.1f} s, {(peak_kib() - before) / 1024:.0f} MiB above the libraries")


def first_tensors(base: Path, folder: Path) -> None:
    from lora_cli.base.load import quiet_libraries
    from lora_cli.merging import job, tensors
    from lora_cli.merging.merge import merge

    quiet_libraries()
    job.require_space = lambda *_: None
    before, start, made = peak_kib(), time.perf_counter(), 0

    def to_nowhere(_: Path, entries: Any, __: Any) -> None:
        nonlocal made
        for each in entries:
            with open("/dev/null", "wb") as out:
                each.write(out)
            made += 1
            if made in (1, 10, FIRST):
                seconds, peak = time.perf_counter() - start, (peak_kib() - before) / 1024
                print(f"tensor {made} after {seconds:.1f} s, {peak:.0f} MiB above the libraries", flush=True)
            if made == FIRST:
                raise KeyboardInterrupt

    tensors.write_entries = to_nowhere
    try:
        merge(folder / "plain", folder / "merged", base=str(base), proof="none")
    except KeyboardInterrupt:
        return


def trained(base: Path, folder: Path, quantization: str) -> Path:
    sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
    from text_to_sql import make_rows

    for name, count, held_out in (("train", 160, False), ("held-out", 60, True)):
        rows = make_rows(count, 1, held_out=held_out)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "base_model": str(base),
        "quantization": quantization,
        "adapter": {"rank": 16, "alpha": 32, "target_modules": "all-linear"},
        "data": {"train": str(folder / "train.jsonl"), "validation": str(folder / "held-out.jsonl"), "packing": False},
        "train": {"epochs": 3, "learning_rate": 1e-3, "micro_batch_size": 16, "gradient_accumulation_steps": 1},
        "output": str(folder / quantization),
    }
    path = folder / f"{quantization}.yaml"
    path.write_text(json.dumps(recipe))
    subprocess.run([sys.executable, "-m", "lora_cli", "train", str(path)], check=True, stdout=subprocess.DEVNULL)
    return folder / quantization


def rounded(run: Path, folder: Path) -> None:
    """Print what one merge says, its memory above the libraries, and the loss of its folder in plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    from lora_cli.base.load import quiet_libraries
    from lora_cli.merging.merge import merge
    from lora_cli.merging.onto import held_out

    quiet_libraries()
    before, start = peak_kib(), time.perf_counter()
    report = merge(run, folder, quantize="nf4", say=print)
    seconds, peak = time.perf_counter() - start, (peak_kib() - before) / 1024
    print(*report.lines(), f"{seconds:.0f} s, {peak:.0f} MiB above the libraries", sep="\n")
    rows, model = held_out(run), AutoModelForCausalLM.from_pretrained(folder)
    nats = 0.0
    for row in rows:
        ids, trained = torch.tensor([list(map(int, row.ids))]), torch.tensor(list(map(bool, row.trained)))[1:]
        with torch.no_grad():
            each = model(ids).logits[0, :-1].float().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        nats -= each[trained].sum().item()
    targets = sum(int(sum(map(bool, row.trained[1:]))) for row in rows)
    print(f"the folder in plain transformers, in {model.dtype}: {nats / targets:.4f}", flush=True)


def main() -> None:
    if len(sys.argv) == 4 and sys.argv[1] == "rounded":
        rounded(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    if sys.argv[1] == "rounded":
        from off_grid import move_off_grid

        folder = Path(sys.argv[2])
        folder.mkdir(parents=True)
        move_off_grid(Path("build/smollm2-135m-instruct"), folder / "base", spread=0.1)
        for quantization in ("none", "nf4"):
            run = trained(folder / "base", folder, quantization)
            print(f"\ntrained on {quantization}", flush=True)
            subprocess.run(
                [sys.executable, __file__, "rounded", str(run), str(folder / f"{quantization}-4")], check=True
            )
        return
    if len(sys.argv) == 4:
        how, base, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
        first_tensors(base, folder) if how == "first" else measured(how, base, folder)
        return
    kind, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True)
    base = Path(kind)
    if kind in SHAPES:
        base = synthetic(kind, folder / "base", Path("build/smollm2-135m-instruct"))
    adapter(base, folder / "plain", "none")
    if kind == "70b":
        subprocess.run([sys.executable, __file__, "first", str(base), str(folder)], check=True)
    else:
        adapter(base, folder / "nf4", "nf4")
        for how in ("plain", "nf4", "peft"):
            subprocess.run([sys.executable, __file__, how, str(base), str(folder)], check=True)
            shutil.rmtree(folder / ("peft" if how == "peft" else f"{how} merged"))
        start = time.perf_counter()
        shutil.copytree(base, folder / "copy")
        print(f"cp of the base: {time.perf_counter() - start:.1f} s")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
