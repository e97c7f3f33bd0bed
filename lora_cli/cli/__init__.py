"""The command line: parse, call, print. Heavy libraries are imported inside the commands, so --help is instant."""

from lora_cli.cli.entry import app, main
