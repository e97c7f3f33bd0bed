"""A merged folder is the same model to transformers 4, which reads config.json and tokenizer files by older rules."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny
from environments import transformers_4
from test_merged_folder import ROPES, TOKENS, WIDE, adapter_for, base_and_adapter, edited
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lora_cli.merging.merge import merge

TEXT = "select name from table where 3 is a list"
READ = """
import json, sys, torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
from transformers import AutoModelForCausalLM, AutoTokenizer
tokens, text, *folders = sys.argv[1:]
told = {}
for folder in folders:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor(json.loads(tokens)), use_cache=False).logits
    tokenizer = AutoTokenizer.from_pretrained(folder)
    told[folder] = {
        "logits": logits.tolist(),
        "missing": sorted(info["missing_keys"]),
        "ids": tokenizer(text)["input_ids"],
        "template": tokenizer.chat_template,
        "ends": model.generation_config.eos_token_id,
    }
print(json.dumps(told))
"""


def read_by_transformers_4(*folders: Path) -> dict[str, Any]:
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [transformers_4(), "-c", READ, json.dumps(TOKENS.tolist()), TEXT, *folders],
        capture_output=True,
        text=True,
        check=False,
        env=own | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the first time an environment of 1 GB is made
def test_the_merged_folder_is_the_same_model_to_transformers_4(tmp_path, tokenizer):
    import transformers

    adapters: dict[Path, Path] = {}
    for number, (name, (kind, own)) in enumerate(ROPES.items()):
        config = getattr(transformers, kind)(
            **WIDE, **({"num_key_value_heads": 4} | own if "neox" not in name else own)
        )
        made = save_tiny(config, tmp_path / f"made-{number}", tokenizer=tokenizer)
        old = {"rope_parameters": None, "dtype": None, "torch_dtype": "float32", "transformers_version": "4.46.0"}
        base = edited(made, tmp_path / f"base-{number}", **(old | own))
        # as transformers 4 writes it; 5 names a class that 4 does not have
        settings = json.loads((base / "tokenizer_config.json").read_text()) | {
            "tokenizer_class": "PreTrainedTokenizerFast"
        }
        (base / "tokenizer_config.json").write_text(json.dumps(settings))
        adapters[tmp_path / f"merged-{number}"] = adapter_for(
            base, tmp_path / f"adapter-{number}", target_modules="attention", prompting="template"
        )
    held = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "base-0", quantization_config=held, dtype=torch.float32)
    stored.save_pretrained(tmp_path / "base-4bit")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "base-4bit" / name).write_bytes((tmp_path / "base-0" / name).read_bytes())
    # this configuration is transformers 5's own, so the base itself must be one that 4 reads
    values = json.loads((tmp_path / "base-4bit" / "config.json").read_text())
    values |= {"rope_theta": 500000.0, "rope_parameters": None, "torch_dtype": "float32"}
    (tmp_path / "base-4bit" / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    adapters[tmp_path / "merged-4bit"] = adapter_for(
        tmp_path / "base-4bit", tmp_path / "adapter-4bit", quantization="nf4", prompting="template"
    )
    expected = {}
    for place, adapter in adapters.items():
        merge(adapter, place)
        expected[place] = base_and_adapter(adapter)
    stop = AutoTokenizer.from_pretrained(tmp_path / "merged-0").convert_tokens_to_ids("<|im_end|>")
    for folder, told in read_by_transformers_4(*adapters).items():
        place = Path(folder)
        assert told["missing"] == []
        assert_close(torch.tensor(told["logits"]), expected[place], rtol=0, atol=2e-5)
        assert told["ids"] == AutoTokenizer.from_pretrained(place)(TEXT)["input_ids"]
        assert told["template"] == AutoTokenizer.from_pretrained(place).chat_template
        assert told["ends"] == [0, stop]
