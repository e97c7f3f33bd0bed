"""Lines of the package that are neither blank nor comment nor docstring.

python benchmarks/code_size.py
"""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_lines(source: str) -> int:
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


if __name__ == "__main__":
    package = Path(__file__).parents[1] / "lora_cli"
    sizes = {str(path.relative_to(package)): code_lines(path.read_text()) for path in sorted(package.rglob("*.py"))}
    for name, size in sizes.items():
        if size:
            print(f"{size:5}  {name}")
    print(f"{sum(sizes.values()):5}  in all")
