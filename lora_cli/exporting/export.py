"""`lora export`: a run, an adapter or a model as the files that llama.cpp and Ollama open."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_cli.adapters.file import TENSORS, AdapterFile, peft_scaling, read_adapter
from lora_cli.adapters.low_rank import pairs_of, peft_tensors
from lora_cli.adapters.named import find_named, recorded_prompting
from lora_cli.adapters.peft_config import CONFIG
from lora_cli.base.load import load_tokenizer
from lora_cli.base.source import BaseSource, find_base
from lora_cli.base.tensor_files import write_tensors
from lora_cli.base.weight_files import stored_tensors
from lora_cli.data.chat.template import chat_template
from lora_cli.errors import CheckFailed, command, home_expanded, refuse_if
from lora_cli.exporting import blocks, ollama
from lora_cli.exporting.converter import convert_adapter, convert_model, require_converter, without_code
from lora_cli.exporting.rounded import measure_rounding, rounding_line
from lora_cli.files import flush, human_bytes, require_space, whole_output, working_beside
from lora_cli.merging.files import require_outside, require_outside_adapter, require_place, trained_stops
from lora_cli.merging.merge import merge
from lora_cli.quantization import RULES

BY_CONVERTER = ("f32", "f16", "bf16", "q8_0")
BY_BLOCKS = ("q4_0", "q4_1", "q5_0", "q5_1")
_BITS = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q4_0": 4.5, "q4_1": 5, "q5_0": 5.5, "q5_1": 6}


@dataclass(frozen=True)
class Exported:
    """bytes: of the GGUF file. error: ‖W - Q‖ / ‖W‖ of matrices in blocks made here, else None. rounding: what that
    costs, as `measure_rounding` gives it. template: of a Modelfile: written, raw, or left out."""

    output: str
    to: str
    type: str
    bytes: int
    error: float | None = None
    template: str | None = None
    notes: list[str] = field(default_factory=list)
    rounding: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def export(
    source: str,
    output: Path,
    to: str,
    *,
    kind: str | None = None,
    base: str | None = None,
    onto: str | None = None,
    proof: str | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Write a GGUF file of a model (`gguf`), of an adapter alone (`gguf-adapter`), or a folder for Ollama (`ollama`).

    source: as of `find_named`. kind: how weights are held; None for q8_0, and q4_1 of a QA-LoRA adapter. onto,
    proof: as of `merge`, of an adapter or a run. Everything is made beside `output` and moved into place at the end.
    Raises LoraError for what cannot be exported, CheckFailed where a file is not what it should be.
    """
    named = find_named(source, base)
    adapter = read_adapter(named.adapter) if named.adapter is not None else None
    exact = adapter is not None and adapter.metadata.method == "qa_lora"
    kind = kind or ("q4_1" if exact and to != "gguf-adapter" else "f32" if to == "gguf-adapter" else "q8_0")
    _require_options(to, kind, {"--onto": onto, "--proof": proof}, adapter, source)
    converters = require_converter()
    place = require_place(output)
    refuse_if(
        place.exists() and to != "ollama", "the output already exists", where=output, fix="choose another --output"
    )
    if named.adapter is not None:
        require_outside_adapter(place, named.adapter)
    with working_beside(place) as work:
        if adapter is not None and to == "gguf-adapter":
            name, revision = (base, None) if base is not None else adapter.own_base()
            words = adapter.tokenizer_for(name)
            found = find_base(name, revision, trust_remote_code=trust_remote_code, tokenizer=words)
            made = _adapter_file(converters, adapter, found, work)
            return _placed(made, place, Exported(str(output), to, kind, made.stat().st_size))
        notes: list[str] = []
        if named.adapter is None:
            model = find_base(str(named.model), trust_remote_code=trust_remote_code)
            refuse_if(model.gguf is not None, "this is a GGUF file already", where=source, fix="use it as it is")
            require_outside(place, model.folder)
        else:
            merged = work / (named.run or named.adapter).resolve().name
            more: dict[str, Any] = {key: one for key, one in {"onto": onto, "proof": proof}.items() if one}
            report = merge(
                Path(home_expanded(source)),
                merged,
                base=base,
                dtype="fp32" if exact or _of_file(adapter) else "keep",
                trust_remote_code=trust_remote_code,
                say=say,
                **more,
            )
            kept = f"keeps {report.kept:.2%} of the adapter's effect" if report.kept is not None else "not compared"
            say(f"merged onto the {report.onto} weights; {kept}")
            model, notes = find_base(str(merged), trust_remote_code=trust_remote_code), report.notes
        prompted = _prompted(model) if to == "ollama" else None
        _require_room(model, place, kind, exact)
        say(f"converting to {kind}")
        plain = model.folder if trust_remote_code else without_code(model.folder, work / f"{model.folder.name} plain")
        made, error = _model_file(converters, plain, work, kind, exact)
        result = Exported(str(output), to, kind, made.stat().st_size, error, notes=notes)
        if adapter is not None and kind in BY_BLOCKS and not exact:
            run, opens_code = Path(home_expanded(source)), trust_remote_code
            cost = measure_rounding(run, base, made, kind, proof=proof, trust_remote_code=opens_code, say=say)
            result = replace(result, rounding=cost)
        return _placed(made, place, result) if prompted is None else _ollama(made, place, result, *prompted)


def result_lines(made: Exported) -> list[str]:
    error = f", rounding changes weights by {made.error:.2%} of their size" if made.error is not None else ""
    lines = [f"{made.output}: {made.type}, {human_bytes(made.bytes)}{error}"]
    if made.rounding is not None:
        lines.append(rounding_line(made.type, made.rounding))
    if made.template == "left out":
        lines.append(
            "the chat template cannot be written in Ollama's language: Ollama looks for one that resembles it; compare "
            "with `ollama show --template`"
        )
    return lines


def _of_file(adapter: AdapterFile | None) -> bool:
    """Whether its base's weights are those of a GGUF file: in bf16 they would not fall onto the file's grid again."""
    held = adapter.metadata.quantization if adapter is not None else None
    return held is not None and RULES[held].of_file


def _require_options(
    to: str, kind: str, of_merging: dict[str, str | None], adapter: AdapterFile | None, source: str
) -> None:
    """Raises LoraError for options that contradict each other, or a type that other programs make."""
    refuse_if(
        kind not in (*BY_CONVERTER, *BY_BLOCKS),
        f"{kind} is not a type that is written here; known are {', '.join((*BY_CONVERTER, *BY_BLOCKS))}",
        fix="export f16, then make it with llama.cpp: llama-quantize model-f16.gguf model.gguf " + kind.upper()
        if re.fullmatch(r"(i?q|tq)\d_\w+", kind)
        else "write one of these",
    )
    for option in (name for name, given in of_merging.items() if given is not None):
        merges = adapter is not None and to != "gguf-adapter"
        refuse_if(not merges, f"{option} is for a merge on the way", where=source, fix=f"leave out {option}")
    if to == "gguf-adapter":
        refuse_if(adapter is None, "this is a whole model, not an adapter", where=source, fix="use --to gguf")
        refuse_if(kind != "f32", "an adapter's file is written in f32", fix="leave out --type")
    exact = adapter is not None and adapter.metadata.method == "qa_lora" and to != "gguf-adapter"
    refuse_if(
        exact and kind not in ("q4_1", "f32"),
        f"{kind} would round away what QA-LoRA trained; q4_1 holds it exactly",
        where=source,
        fix="leave out --type",
    )


def _require_room(model: BaseSource, place: Path, kind: str, exact: bool) -> None:
    numbers = sum(each.size_bytes for each in stored_tensors(model.folder).values())  # 16 bits of most
    needed = numbers * _BITS[kind] / 16
    if kind in BY_BLOCKS:
        needed += numbers * (2 if exact else 1)
    require_space(place.parent, round(needed), "the exported file, and what it is made of,")


def _model_file(converters: Path, model: Path, work: Path, kind: str, exact: bool) -> tuple[Path, float | None]:
    made = work / "model.gguf"
    if kind in BY_CONVERTER:
        convert_model(converters, model, kind, made)
        blocks.require_finite(made)
        return made, None
    wide = work / "wide.gguf"
    convert_model(converters, model, "f32" if exact else "f16", wide)
    blocks.require_finite(wide)
    blocks.require_blocks(wide, kind)
    error, on_grid = blocks.in_blocks(wide, made, kind, on_grid=exact)
    if exact and not on_grid:
        raise CheckFailed("no matrix of the merged model lies on the 4-bit grid that QA-LoRA trained on")
    return made, error


def _adapter_file(converters: Path, adapter: AdapterFile, base: BaseSource, work: Path) -> Path:
    """llama.cpp scales every layer by alpha / rank of its A and reads no other scaling: the rest of it goes into B."""
    import gguf

    pairs = pairs_of(adapter, fix="merge it on the way: --to gguf")
    alpha = float(max(adapter.alphas.values())) or 1.0
    scaled = {name: (A, B * (adapter.alphas[name] / alpha)) for name, (A, B) in pairs.items()}
    ranks = {name: len(A) for name, (A, _) in scaled.items()}
    plain = work / "adapter"
    plain.mkdir()
    write_tensors(plain / TENSORS, peft_tensors(scaled), {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM"} | peft_scaling(ranks, alpha)
    (plain / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    made = work / "adapter.gguf"
    convert_adapter(converters, plain, without_code(base.folder, work / base.folder.name), made)
    written = gguf.GGUFReader(made).tensors
    if len(written) < 2 * len(ranks):
        what = f"the converter wrote {len(written) // 2} of {len(ranks)} layers"
        raise CheckFailed(what, where=str(adapter.folder), fix="merge it on the way: --to gguf")
    return made


def _placed(made: Path, place: Path, result: Exported) -> Exported:
    flush(made)
    made.replace(place)
    flush(place.parent)
    return result


def _prompted(model: BaseSource) -> tuple[Any, bool, list[str]]:
    """The tokenizer, whether the model was prompted without a template in training, and what ends its answers.

    Raises LoraError for a stop token that a Modelfile cannot hold.
    """
    tokenizer: Any = load_tokenizer(model)
    prompting, _ = recorded_prompting(find_named(str(model.folder)), None, model.folder)
    ids = [each for each in trained_stops(tokenizer, prompting) if each is not None]  # there may be no end token
    stops = [str(each) for each in tokenizer.convert_ids_to_tokens(ids)]
    ollama.require_stops(stops)
    return tokenizer, prompting == "raw" or not tokenizer.chat_template, stops


def _ollama(made: Path, place: Path, result: Exported, tokenizer: Any, raw: bool, stops: list[str]) -> Exported:
    template = None
    if not raw:
        writes_bos = bool(tokenizer.bos_token) and _adds_bos(made)
        template = ollama.around(chat_template(tokenizer, None, "the model"), tokenizer.bos_token if writes_bos else "")
    with whole_output(place) as folder:
        made.replace(folder / "model.gguf")
        text = ollama.modelfile("model.gguf", template, raw=raw, stops=stops)
        (folder / "Modelfile").write_text(text, encoding="utf-8", newline="\n")
    kept = "raw" if raw else "left out" if template is None else "written"
    return replace(result, template=kept)


def _adds_bos(made: Path) -> bool:
    import gguf

    field_ = gguf.GGUFReader(made).fields.get("tokenizer.ggml.add_bos_token")
    return bool(field_.contents()) if field_ is not None else True


def next_line(made: Exported) -> str:
    if made.to == "ollama":
        return command("ollama", "create", "my-model", "-f", f"{made.output}/Modelfile")
    other = ("--lora", made.output) if made.to == "gguf-adapter" else ()
    return command("llama-cli", "-m", "base.gguf" if other else made.output, *other)
