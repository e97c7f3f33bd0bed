"""Reading recipe files: overrides and paths.

Every problem of a file is found before any is reported, each with its line and column.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from lora_cli import limits
from lora_cli.errors import LoraError, RecipeErrors, home_expanded
from lora_cli.recipe.problems import validate
from lora_cli.recipe.retired import drop_retired
from lora_cli.recipe.schema import Recipe, path_places
from lora_cli.recipe.yaml import NO_VALUE, KeyPath, Positions, parse_value, place_of, read_recipe_yaml, where_of

_DEEPEST = 255  # parts of a path; the standard library makes missing folders by recursion


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in `path` with `--set key.path=value` overrides applied, all paths in it made absolute.

    Raises RecipeErrors with every problem: syntax, unknown or mistyped keys, wrong values, contradictions.
    """
    values, positions, problems = read_recipe_yaml(path)
    overridden: set[KeyPath] = set()
    for override in overrides or []:
        try:
            key = _apply_override(values, override)
        except LoraError as error:
            problems.append(error)
        else:
            positions[key] = f"--set {'.'.join(key)}"
            overridden.add(key)
    problems += drop_retired(values, positions, str(path))
    for section, name, key in path_places(values):
        base = Path.cwd() if any(key[: len(known)] == known for known in overridden) else path.resolve().parent
        problems += _resolve_path(section, name, key, base, positions, str(path))
    recipe, found = validate(values, positions, str(path))
    problems += found
    if problems or recipe is None:
        raise problems[0] if len(problems) == 1 else RecipeErrors(sorted(problems, key=place_of))
    return recipe


# ── overrides and paths ─────────────────────────────────────────────────────────────────────────────────────────


_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\}|\$)")  # $NAME, ${NAME}; $$ is a dollar sign


# In names of variables whose value is not for the recipe, report and manifests that people share
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS(?:WORD|WD|PHRASE)?(?:_|$)|CREDENTIAL|AUTH(?!OR)|COOKIE", re.IGNORECASE)


def _apply_override(values: dict[str, Any], override: str) -> KeyPath:
    name, equals, text = override.partition("=")
    key = tuple(name.strip().split("."))
    if not equals or not all(key) or len(key) > limits.RECIPE_LEVELS:
        raise LoraError(
            f"--set {override} is not of the form key.path=value", fix="for example --set train.learning_rate=1e-4"
        )
    try:
        value = parse_value(text, f"--set {name.strip()}")
    except (yaml.YAMLError, *NO_VALUE):
        raise LoraError(f"--set {override}: the value is not valid YAML", fix="quote it") from None
    at = values
    for part in key[:-1]:
        if at.get(part) is None:
            at[part] = {}
        at = at[part]
        if not isinstance(at, dict):
            raise LoraError(
                f"--set {override}: {part} is not a section", fix="name a key inside a section, such as train.seed"
            )
    at[key[-1]] = value
    return key


def _resolve_path(
    section: Any, name: Any, key: KeyPath, base: Path, positions: Positions, file: str
) -> list[LoraError]:
    value = section[name]
    variables = [found[1] or found[2] for found in _VARIABLE.finditer(value)]
    secret = next((each for each in variables if each and _SECRET.search(each)), None)
    if secret:
        what = f"{'.'.join(key)}: the environment variable {secret} may hold a secret, and paths are written into files"
        fix = "use another variable, or write $$ for a dollar sign"
        return [LoraError(what, where=where_of(key, positions, file), fix=fix)]
    unset = [variable for variable in variables if variable and variable not in os.environ]
    if unset:
        what = f"{'.'.join(key)}: the environment variable {unset[0]} is not set"
        fix = f"export {unset[0]}=…, or write $$ for a dollar sign"
        return [LoraError(what, where=where_of(key, positions, file), fix=fix)]
    expanded = _VARIABLE.sub(lambda found: os.environ.get(found[1] or found[2] or "", "$"), value)
    try:
        expanded = home_expanded(expanded)
    except LoraError as problem:
        what = f"{'.'.join(key)}: {problem.what}"
        return [LoraError(what, where=where_of(key, positions, file), fix=problem.fix)]
    path = base / expanded
    try:
        if len(path.parts) > _DEEPEST:
            raise ValueError(f"more than {_DEEPEST} folders inside each other")
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # too long for the file system, with a NUL character in it, …
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        what = f"{'.'.join(key)} is not a path that can be used here: {reason}"
        fix = "write a shorter path of plain characters"
        return [LoraError(what, where=where_of(key, positions, file), fix=fix)]
    if key == ("base_model",) and not path.exists() and Path(expanded).is_dir():
        fix = f"write {os.path.relpath(expanded, base)}, or an absolute path"
        what = f"base_model: {value} is a folder seen from here, but relative paths start at the recipe's folder"
        return [LoraError(what, where=positions.get(key, file), fix=fix)]
    is_path = key != ("base_model",) or path.exists() or expanded.startswith((".", "/", "~")) or expanded != value
    section[name] = os.path.normpath(path) if is_path else expanded
    return []
