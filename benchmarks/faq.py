"""What `lora init` makes of a small sheet of questions and answers: 100 rows, asked again in other words.

    python benchmarks/faq.py write FOLDER            # faq.csv, and asked.jsonl with other wordings of its questions
    lora init MODEL FOLDER/faq.csv --output FOLDER/faq.yaml && lora train FOLDER/faq.yaml
    python benchmarks/faq.py score RUN FOLDER        # answers that hold what was asked for

50 facts about 10 made-up products, each asked in two wordings in the sheet and in a third one in asked.jsonl.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

PRODUCTS = ("Brio", "Piccolo", "Corto", "Lungo", "Alba", "Nero", "Vela", "Duna", "Riva", "Sole")
FACTS = {  # what is known → value for the product of a number, two wordings for the sheet, a third to ask, the answer
    "warranty": (
        lambda n: f"{2 + n % 4} years",
        ("How long is the warranty on the {}?", "For how many years is the {} under warranty?"),
        "What warranty does the {} come with?",
        "The {} has a warranty of {}. Please keep the receipt.",
    ),
    "tank": (
        lambda n: f"{8 + 3 * n} decilitres",
        ("How much water does the {} hold?", "How large is the tank of the {}?"),
        "What is the capacity of the water tank in the {}?",
        "The tank of the {} holds {} of water.",
    ),
    "pressure": (
        lambda n: f"{9 + 7 * n % 10} bar",
        ("What pressure does the {} brew at?", "How many bar does the {} have?"),
        "At which pressure does the {} work?",
        "The {} brews at {}, measured at the pump.",
    ),
    "price": (
        lambda n: f"{199 + 37 * n} euros",
        ("What does the {} cost?", "How much is the {}?"),
        "What is the price of the {}?",
        "The {} costs {}, with shipping.",
    ),
    "colour": (
        lambda n: ("red", "black", "white", "green", "silver")[n * 3 % 5],
        ("Which colour does the {} come in?", "What colour is the {}?"),
        "In what colour can I buy the {}?",
        "The {} is sold in {} only.",
    ),
}


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows, asked = [], []
    for value, wordings, other, answer in FACTS.values():
        for number, product in enumerate(PRODUCTS):
            text = answer.format(product, value(number))
            rows += [(wording.format(product), text) for wording in wordings]
            asked.append({"prompt": other.format(product), "answer": value(number)})
    with (folder / "faq.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("Question", "Answer"), *rows])
    (folder / "asked.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked), encoding="utf-8")


def answered(run: Path, asked: list[dict[str, Any]], *, base: bool = True) -> list[int]:
    """How many greedy answers, through the template, hold what was asked for: the adapter's, then those of its base."""
    from lora_cli.adapters.named import find_named
    from lora_cli.evaluation.generate import Speaker
    from lora_cli.evaluation.generation import complete

    named = find_named(str(run))
    speaker = Speaker(named, through_template=True, default="template", seed=0, sampling={"max_new_tokens": 32})
    model, tokenizer = speaker.opened.model, speaker.opened.tokenizer
    asking = [[{"role": "user", "content": each["prompt"]}] for each in asked]
    prompts = [speaker.prompting.ids(turns, "asked.jsonl") for turns in asking]

    def right() -> int:
        answers = complete(model, tokenizer, prompts, speaker.config)
        wrong = [(each, got.text) for each, got in zip(asked, answers, strict=True) if each["answer"] not in got.text]
        for each, text in wrong[:3]:
            print(f"  {each['prompt']} {text!r}, not {each['answer']}")
        return len(asked) - len(wrong)

    found = [right()]
    if base:
        speaker.use(None)
        found.append(right())
    return found


def score(run: Path, folder: Path) -> None:
    asked = [json.loads(line) for line in (folder / "asked.jsonl").read_text(encoding="utf-8").splitlines()]
    adapter, base = answered(run, asked)
    print(f"adapter: {adapter} of {len(asked)} answers hold what was asked for")
    print(f"base: {base} of {len(asked)}")


if __name__ == "__main__":
    what, *places = sys.argv[1:]
    {"write": write, "score": score}[what](*map(Path, places))
