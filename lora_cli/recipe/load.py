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
from lora_cli.errors import LoraError, RecipeErrors, home_expanded, reason_of, refuse_if
from lora_cli.recipe.contradictions import contradictions
from lora_cli.recipe.keys import holder_of, path_places
from lora_cli.recipe.problems import validate
from lora_cli.recipe.retired import drop_retired
from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.yaml import NO_VALUE, KeyPath, Places, parse_value, place_of, read_recipe_yaml
from lora_cli.streams import print_note

_DEEPEST = 255  # parts of a path; the standard library makes missing folders by recursion


def load_recipe(path: Path, overrides: list[str] | None = None, *, text: str | None = None) -> Recipe:
    """The recipe in `path` with `--set key.path=value` overrides applied, all paths in it made absolute.

    text: what to read in place of the file. Raises RecipeErrors with every problem: syntax, unknown or mistyped keys,
    wrong values; contradictions once all values are valid.
    """
    values, places, problems = read_recipe_yaml(path, text)
    overridden: set[KeyPath] = set()
    for override in overrides or []:
        try:
            key = _apply_override(values, override)
        except LoraError as error:
            problems.append(error)
        else:
            places[key] = f"--set {'.'.join(key)}"
            overridden.add(key)
    problems += drop_retired(values, places)
    for section, name, key in path_places(values):
        base = Path.cwd() if _is_within(key, overridden) else path.resolve().parent
        try:
            section[name] = _resolved(section[name], base, is_model=key == ("base_model",))
        except LoraError as problem:
            problems.append(LoraError(f"{'.'.join(key)}: {problem.what}", where=places.of(key), fix=problem.fix))
    recipe = validate(values, places)
    if isinstance(recipe, Recipe):
        recipe = _without_idle(recipe, values, overridden, places)
        for rule, what, fix in contradictions(recipe, values):
            problems.append(LoraError(f"{rule.key}: {what}", where=places.of(rule.path), fix=fix))
    else:
        problems += recipe
    if problems or not isinstance(recipe, Recipe):
        raise problems[0] if len(problems) == 1 else RecipeErrors(sorted(problems, key=place_of))
    return recipe


def _is_within(key: KeyPath, overridden: set[KeyPath]) -> bool:
    """Whether a --set gave this setting, or a section or list that it is in."""
    return any(key[: len(known)] == known for known in overridden)


# ── overrides and paths ─────────────────────────────────────────────────────────────────────────────────────────


_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\}|\$)")  # $NAME, ${NAME}; $$ is a dollar sign


# In names of variables whose value is not for the recipe, report and manifests that people share
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS(?:WORD|WD|PHRASE)?(?:_|$)|CREDENTIAL|AUTH(?!OR)|COOKIE", re.IGNORECASE)


def _apply_override(values: dict[str, Any], override: str) -> KeyPath:
    name, equals, text = override.partition("=")
    key = tuple(name.strip().split("."))
    if not equals or not all(key) or len(key) > limits.RECIPE_LEVELS:
        what = f"--set {override} is not of the form key.path=value"
        raise LoraError(what, fix="for example --set train.learning_rate=1e-4")
    try:
        value = parse_value(text, f"--set {name.strip()}")
    except (yaml.YAMLError, *NO_VALUE):
        raise LoraError(f"--set {override}: the value is not valid YAML", fix="quote it") from None
    at = values
    for part in key[:-1]:
        if at.get(part) is None:
            at[part] = {}
        at = at[part]
        what = f"--set {override}: {part} is not a section"
        refuse_if(not isinstance(at, dict), what, fix="name a key inside a section, such as train.seed")
    at[key[-1]] = value
    return key


def _without_idle(recipe: Recipe, values: dict[str, Any], overridden: set[KeyPath], places: Places) -> Recipe:
    """The recipe without those values of the file that a --set makes idle; a line on stderr names each of them."""
    for rule, what, _ in contradictions(recipe, values):
        by = tuple(rule.idle_by.split(".")) if rule.idle_by else ()
        if by and _is_within(by, overridden) and not _is_within(rule.path, overridden):
            print_note(f"note: {places.of(rule.path)}: {rule.key} is not used: {what}")
            del holder_of(rule.path, values)[rule.path[-1]]
            overridden.add(rule.path)  # what depended on this one goes with it
            return _without_idle(Recipe.model_validate(values), values, overridden, places)
    return recipe


def _resolved(value: str, base: Path, *, is_model: bool) -> str:
    """The path that `value` means, seen from `base`; of a model's name the name. Raises LoraError without a place."""
    names = [found[1] or found[2] for found in _VARIABLE.finditer(value) if found[0] != "$$"]
    for each in names:
        what, secret = f"the environment variable {each}", bool(_SECRET.search(each))
        fix = "use another variable, or write $$ for a dollar sign"
        refuse_if(secret, f"{what} may hold a secret, and paths are written into files", fix=fix)
        refuse_if(each not in os.environ, f"{what} is not set", fix=f"export {each}=…, or write $$ for a dollar sign")
    expanded = home_expanded(_VARIABLE.sub(lambda found: os.environ.get(found[1] or found[2] or "", "$"), value))
    path = base / expanded
    try:
        if len(path.parts) > _DEEPEST:
            raise ValueError(f"more than {_DEEPEST} folders inside each other")
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # too long for the file system, with a NUL character in it, …
        what = f"this path cannot be used here: {reason_of(error)}"
        raise LoraError(what, fix="write a shorter path of plain characters") from None
    if not is_model:
        return os.path.normpath(path)
    if not path.exists() and Path(expanded).is_dir():
        what = f"{value} is a folder seen from here, but relative paths start at the recipe's folder"
        raise LoraError(what, fix=f"write {os.path.relpath(expanded, base)}, or an absolute path")
    is_path = path.exists() or expanded.startswith((".", "/", "~")) or expanded != value
    return os.path.normpath(path) if is_path else expanded
