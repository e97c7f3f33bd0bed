"""`python -m lora_cli` is `lora`, so that launchers which start modules can start it."""

from lora_cli.cli import main

if __name__ == "__main__":
    main()
