"""Before a run: `lora init` and `lora check`."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from lora_cli.cli.common import (
    Json,
    Overrides,
    Program,
    RecipeFile,
    RemoteCode,
    console,
    heavy,
    home,
    status,
    trusted_recipe,
)
from lora_cli.errors import LoraError, command, refuse_if
from lora_cli.streams import print_json, print_note, print_result


def init(
    model: Annotated[str | None, typer.Argument(help="Hub id or folder of the base model.")] = None,
    data: Annotated[list[str] | None, typer.Argument(help="Data: files, folders of files, or globs in quotes.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="What columns mean, such as question=Frage,answer=Antwort.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System prompt, put before every conversation that has none.")
    ] = None,
    template: Annotated[str | None, typer.Option(help="Chat template, where the model's own will not do.")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Leave out rows with these problems: data.drop.")] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Memory of the GPU to train on, such as 12GB. Default: what is in this machine.")
    ] = None,
    output: Annotated[Path, typer.Option(callback=home, help="The recipe to write.")] = Path("recipe.yaml"),
    cards: Annotated[bool, typer.Option("--list", help="List the recipes that come with lora, by card.")] = False,
    card: Annotated[
        str | None, typer.Option(help="Copy the recipe for a card, such as 12GB, instead of making one.")
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a recipe, for editors.")] = False,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Write a first recipe for a model and data.

    Looks at both, and explains each setting in the recipe. Reads no weights.
    """
    alone = [name for name, given in (("--schema", schema), ("--list", cards), ("--card", card is not None)) if given]
    if alone:
        more = any(each is not None for each in (model, gpu, columns, system, template, drop)) or len(alone) > 1
        refuse_if(
            more,
            f"{alone[0]} is used without a model, data or other such options",
            fix=f"remove {alone[0]}, or all else",
        )
        _without_model(card, output, cards=cards, as_json=as_json)
        return
    usage = "lora init MODEL DATA… [--gpu 12GB]; for a recipe that comes with lora: lora init --list; "
    usage += "for editors: lora init --schema > recipe.schema.json"
    refuse_if(model is None or not data, "which model, and which data?", fix=usage)
    meanings = _meanings(columns) if columns is not None else None
    dropped = _dropped(drop or [])
    planning = heavy("lora_cli.planning.first_recipe", output)
    with status("looking at model and data"):
        written = planning.write_first_recipe(
            model,
            data,
            output,
            gpu=gpu,
            columns=meanings,
            system=system,
            template=template,
            drop=dropped,
            trust_remote_code=trust_remote_code,
        )
    if as_json:
        print_json(written.as_dict())
        return
    for note in written.notes:
        print_note(f"note: {note}")
    needed = f"about {written.memory.total / 2**30:.1f} GiB, estimated"
    print_result(f"{output} is written, for {written.device.name}: {needed}")
    print_result(f"next: {command('lora', 'check', output)}     shows what is trained on")
    print_result(f"      {command('lora', 'train', output)}")


def _without_model(card: str | None, output: Path, *, cards: bool, as_json: bool) -> None:
    """What `init` does without looking at a model: a recipe by card, the list of them, or the schema."""
    from lora_cli.planning import cards as packaged

    if card is not None:
        packaged.copy_recipe(card, output)
        if as_json:
            print_json({"recipe": str(output)})
            return
        print_result(f"{output} is written; data.train in it is to name your data")
        print_result(f"next: {command('lora', 'check', output)}     shows what is trained on")
    elif cards and as_json:
        print_json({"cards": packaged.cards()})
    elif cards:
        for name, text in packaged.cards().items():
            print_result(f"lora init --card {name:5} {text.partition(': ')[2]}")
    else:
        from lora_cli.recipe import json_schema

        sys.stdout.write(json_schema() + "\n")


def _meanings(text: str) -> dict[str, str | None]:
    """What --columns says: field → column; as a line of CSV, so that names with commas can be quoted."""
    from lora_cli.recipe.schema import FIELDS, OTHER_FIELDS

    fields = {*FIELDS, *OTHER_FIELDS}
    parts = [part.partition("=") for part in next(csv.reader([text], skipinitialspace=True), [])]
    found: dict[str, str | None] = {field.strip(): column.strip() for field, _, column in parts}
    if not found or len(found) < len(parts) or not all(found.values()) or not fields.issuperset(found):
        what = f"--columns {text} does not say what columns mean"
        details = [f"fields: {', '.join(sorted(fields))}"]
        fix = "write field=column, such as --columns question=Frage,answer=Antwort"
        raise LoraError(what, details=details, fix=fix)
    return found


def _dropped(given: list[str]) -> list[str]:
    """What --drop says, once or several times, with commas."""
    from lora_cli.recipe.schema import Droppable

    kinds = list(dict.fromkeys(kind.strip() for each in given for kind in each.split(",")))
    if unknown := [kind for kind in kinds if kind not in get_args(Droppable)]:
        raise LoraError(f"--drop: unknown problem {unknown[0]!r}", fix=f"one of {', '.join(get_args(Droppable))}")
    return kinds


def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    show: Annotated[int, typer.Option(min=0, help="How many examples to show, token by token.")] = 3,
    row: Annotated[
        str | None, typer.Option(help="Show this row alone, such as 8 or faq.csv:8: values, findings, tokens.")
    ] = None,
    html: Annotated[Path | None, typer.Option(callback=home, help="Also write the preview to an HTML file.")] = None,
    prepare: Annotated[bool, typer.Option("--prepare", help="Keep the prepared tokens for `lora train`.")] = False,
    try_model: Annotated[
        bool, typer.Option("--model", help="Also load the model and try it as training would.")
    ] = False,
    compare_quantization: Annotated[
        bool,
        typer.Option(
            "--compare-quantization",
            help="Also load the base in nf4, int8, int4 and as it is, and compare their losses on 64 examples.",
        ),
    ] = False,
    program: Program = None,
    as_json: Json = False,
) -> None:
    """Check recipe and data, and show what would be trained on.

    Everything short of training. Reads no weights unless --model or --compare-quantization is given.
    """
    more = html is not None or prepare or try_model or compare_quantization or program is not None
    refuse_if(row is not None and more, "--row shows one row and does nothing else", fix="remove the other options")
    loaded = trusted_recipe(recipe, overrides or [])
    checking = heavy("lora_cli.planning.check", Path(loaded.output))
    with status("preparing the data"):
        checked = checking.check(loaded, keep=prepare or (compare_quantization and not loaded.data.streaming))
    if row is not None:
        _one_row(checked, row, as_json=as_json)
        return
    if html is not None:
        checking.write_page(checked, html, show)
    if not as_json:
        checking.print_checked(checked, console(stderr=False), show, known=not compare_quantization)
    document = checked.as_dict(show)
    try:
        checked.require_ok()
        if program is not None:
            said = heavy("lora_cli.adapters.programs").require_taken(checked.looked(), program)
            document["program"] = said
            if not as_json:
                print_result(said)
        if try_model:
            from lora_cli.training.opening import try_model as tried

            document["model"] = tried(loaded, checked, None if as_json else console(stderr=False))
        if compare_quantization:
            costs = checking.compare(checked, print_note)
            document["quantization"] = costs.model_dump()
            if not as_json:
                for line in heavy("lora_cli.evaluation.quantization_cost").cost_lines(costs, loaded.quantization):
                    print_result(line)
    except LoraError as error:
        error.result = document | (error.result or {})
        raise
    if as_json:
        print_json(document)


def _one_row(checked: Any, wanted: str, *, as_json: bool) -> None:
    looking, tokenizer = heavy("lora_cli.planning.one_row"), checked.tokenizer
    one = looking.look_at_row(checked.recipe, tokenizer, checked.feed.summary.findings, wanted)
    if as_json:
        print_json(one.as_dict(tokenizer))
    else:
        looking.print_row(one, tokenizer, console(stderr=False))
