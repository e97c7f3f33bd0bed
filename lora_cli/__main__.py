"""The program's entry, also as `python -m lora_cli`, so that launchers which start modules can start it."""

import sys
from contextlib import suppress


def main() -> None:
    try:
        from lora_cli.cli import main as command_line  # this takes long enough for Ctrl+C to come
    except KeyboardInterrupt:
        with suppress(OSError):
            sys.stderr.write("stopped\n")
        sys.exit(130)
    command_line()


if __name__ == "__main__":
    main()
