"""`lora merge`: add each adapter's update to its base weight and write an ordinary Hugging Face folder.

What the update is added to matters. An adapter trained on a 4-bit base corrects that base, rounding errors included:
added to the dequantized weights (`onto="trained"`) the result is the model that was trained; added to the original
weights (`onto="original"`) it is another model, perhaps better, never measured in training. `onto="auto"` measures both
on the run's held-out rows. The difference from base + adapter is measured on real or random tokens, and said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from lora_cli.adapters.trained import trained_modules
from lora_cli.files import whole_output
from lora_cli.merging import files
from lora_cli.merging.job import Merge
from lora_cli.merging.report import MergeReport, require_same
from lora_cli.merging.tensors import SHARD_SIZE, parse_shard_size, replay_weights


def merge(
    source: Path,
    output: Path,
    *,
    base: str | None = None,
    dtype: str = "keep",
    onto: str = "auto",
    trust_remote_code: bool = False,
    proof: str = "full",
    max_shard_size: str = SHARD_SIZE,
    quantize: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> MergeReport:
    """Merge the adapter of a run folder or adapter folder into its base and write the model to `output`.

    dtype: of the written weights: bf16, fp16, fp32, or keep for that of each tensor of the base. proof: `full` makes
    every written tensor again and compares the opened models, `replay` opens none, `none` does neither.
    max_shard_size: of a weight file, such as 5GB. quantize: the kind that linear layers are rounded to at the end, with
    the loss that this costs on held-out rows. say: prints what is slow or left out. Weights are read and written a
    tensor at a time, where the adapter and the architecture allow it. Works on the CPU. Raises CheckFailed, leaving
    `output` as it was, if the written model does not compute what base + adapter compute.
    """
    place, shard_bytes = files.require_place(output), parse_shard_size(max_shard_size)
    job = Merge(source, base, dtype, onto, trust_remote_code, proof, say, quantize)
    files.require_outside(place, job.source.folder)
    files.require_outside_adapter(place, job.folder)
    examples = job.to_compare(source) if onto == "auto" else []
    changes, before, opened, first = job.streamed(), None, None, job.onto
    if proof == "full":
        before, opened = job.compare_before(source, examples)
        changes = changes if job.onto == first else job.streamed()
    streamed = changes is not None
    if changes is None:
        changes = job.changes_of(opened if opened is not None else job.open_whole(job.onto))
    del opened  # its memory is needed for the merged model
    layers = len(trained_modules(changes[0]))
    with whole_output(place) as temporary:
        plain = temporary if job.rounding is None else temporary / ".plain"  # no file of the base has a dot
        plain.mkdir(exist_ok=True)
        added = job.write(plain, shard_bytes, *changes)
        replayed = 0
        if proof != "none":
            replayed = replay_weights(job.source, plain, changes[2], dtype=job.dtype, dense=job.dense)
        del changes
        report = MergeReport(
            output=str(output),
            onto=job.onto,
            dtype=job.written_dtype,
            layers=layers,
            tokens_compared=0 if before is None else before.tokens.shape[1],
            stop_tokens=added,
            notes=job.notes,
            proof=proof,
            replayed=replayed,
            streamed=streamed,
            block_by_block=job.block_by_block,
            **({} if before is None else before.compared_with(job.logits_of_merged(plain, before.tokens))),
        )
        require_same(report, job.folder)
        if job.rounding is not None:
            reopened = partial(job.reopened, temporary)
            facts = job.rounding.finish(plain, temporary, job.dense, shard_bytes, reopened, job.block_by_block)
            report = replace(report, quantized=facts)
        job.write_notes(temporary, report)
    return report
