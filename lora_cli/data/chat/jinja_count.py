"""The count of a template's steps, and the code that counts: what jinja2 would compile to, with a count in it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import chain
from types import GeneratorType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, operators
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lora_cli import limits
from lora_cli.limits import LimitReached

_STEPS_BETWEEN_LOOKS = 20_000  # at the clock
_OPERATIONS_A_STEP = 16
_MANY_TERMS = 16  # of one expression; up to here its value is at most so many times what is kept
SIMPLE = {bool, int, float, range, type(None), jinja2.Undefined}
_CONTAINERS = (list, tuple, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))
_FIX = "use another chat template (such as data.template: plain), or shorten the row"


class CountingGenerator(CodeGenerator):
    """Code that counts: what is written here calls spend, seen, made, add or joined of CountedEnvironment.

    Ordinary templates are to be as fast as without. So an operation is not paid for where its result can be no larger
    than a few of the values that are there; what is kept under a name, put into a list or handed on is paid for, and
    so is each round of a loop, by what its body does.
    """

    _long = False  # within an expression of many terms

    def visit_ExprStmt(self, node: nodes.ExprStmt, frame: Any) -> None:
        if isinstance(node.node, nodes.Const):  # put there by with_counts; templates have no statement of this kind
            self.writeline(f"environment.spend({node.node.value})")
        else:
            super().visit_ExprStmt(node, frame)

    def visit_Add(self, node: nodes.Add, frame: Any) -> None:
        terms: list[Any] = []
        top: Any = node
        while isinstance(top, nodes.Add):  # a + b + c at once
            terms.append(top.right)
            top = top.left
        self._summed(node, super().visit_Add, "add", [top, *reversed(terms)], frame)

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self._summed(node, super().visit_Concat, "joined", node.nodes, frame)

    def _summed(self, node: Any, visit: Any, name: str, terms: list[Any], frame: Any) -> None:
        before = self._long
        self._long = before or len(terms) + sum(1 for _ in node.find_all((nodes.Add, nodes.Concat))) > _MANY_TERMS
        if self._long:
            self.write(f"environment.{name}((")
            for each in terms:
                self.visit(each, frame)
                self.write(", ")
            self.write("))")
        else:
            visit(node, frame)
        self._long = before

    def visit_List(self, node: nodes.List, frame: Any) -> None:
        self._made(super().visit_List, node, frame, node.items)

    def visit_Tuple(self, node: nodes.Tuple, frame: Any) -> None:
        self._made(super().visit_Tuple, node, frame, node.items if node.ctx == "load" else [])

    def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:
        self._made(super().visit_Dict, node, frame, [part for each in node.items for part in (each.key, each.value)])

    def _made(self, visit: Any, node: Any, frame: Any, items: list[Any]) -> None:
        plain = all(isinstance(each, nodes.Const) for each in items)
        self.write("(" if plain else "environment.made(")
        visit(node, frame)
        self.write(")")

    def visit_Compare(self, node: nodes.Compare, frame: Any) -> None:
        sides = [node.expr, *(each.expr for each in node.ops)]
        plain = any(_literal(each) for each in sides)  # one side is short, so the comparison is
        self.write("(")
        for operator, side in zip(["", *(operators[each.op] for each in node.ops)], sides, strict=True):
            self.write(f" {operator} {'(' if plain else 'environment.seen('}")
            self.visit(side, frame)
            self.write(")")
        self.write(")")


def _literal(node: nodes.Expr) -> bool:
    items = getattr(node, "items", None)
    return isinstance(node, nodes.Const) or (items is not None and all(isinstance(each, nodes.Const) for each in items))


def with_counts(template: nodes.Template) -> nodes.Template:
    """A count at the start of all that can be gone through more than once, and of every value that gets a name."""
    for node in list(template.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block))):
        body: list[Any] = node.body  # type: ignore[attr-defined]
        does = sum(1 for each in body for _ in each.find_all(nodes.Expr)) // _OPERATIONS_A_STEP
        body.insert(0, nodes.ExprStmt(nodes.Const(1 + does), lineno=node.lineno))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(nodes.Test(nodes.Const(None), "\0tick", [], [], None, None), node.test)
    for node in list(template.find_all(nodes.Assign)):
        if not isinstance(node.node, nodes.Const | nodes.Call | nodes.Compare | nodes.Test | nodes.Not):
            node.node = _made(node.node)
    for node in list(template.find_all(nodes.With)):
        node.values = [_made(each) for each in node.values]
    return template


def _made(node: Any) -> nodes.Expr:
    return nodes.Filter(node, "\0made", [], [], None, None, lineno=node.lineno)


class CountedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox whose templates count their steps. name: of the template, for messages.

    The count is begun before each rendering; compiling spends from it too (constants are folded).
    """

    code_generator_class = CountingGenerator

    def __init__(self, name: str, **options: Any):
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, **options)
        self.template_name = name
        self.concat = self.joined  # type: ignore[assignment]
        self.filters["\0made"] = self.made
        self.tests["\0tick"] = lambda _: self.spend(1) is None
        self.begin({})

    def _generate(self, source: Any, *args: Any, **kwargs: Any) -> Any:
        return super()._generate(with_counts(source), *args, **kwargs)

    def begin(self, variables: dict[str, Any]) -> None:
        self._given: dict[str, Any] | None = variables
        self._known: dict[int, tuple[int, int, Any]] = {}  # id → weight, depth, and the object, kept so that ids hold
        self._left = self._steps = limits.TEMPLATE_STEPS
        self._look = limits.TEMPLATE_STEPS - _STEPS_BETWEEN_LOOKS
        self._ends = time.monotonic() + limits.TEMPLATE_SECONDS

    def end(self) -> None:
        self.taken = self._steps - self._left
        self._given, self._known = None, {}

    def spend(self, steps: int) -> None:
        """Raises LimitReached if no steps are left."""
        self._left -= steps
        if self._left < self._look:
            self._look_up()

    def _look_up(self) -> None:
        if self._left < 0 and self._given:  # of a long row, more: ordinary ones do not pay for being weighed
            given, self._given, left = self._given, None, self._left
            self._left = self._look = limits.TEMPLATE_MOST_STEPS
            more = limits.TEMPLATE_STEPS_PER_STEP_OF_INPUT * self._weight(given)
            self._steps = min(limits.TEMPLATE_STEPS + more, limits.TEMPLATE_MOST_STEPS)
            self._left = left + self._steps - limits.TEMPLATE_STEPS
        self._look = self._left - _STEPS_BETWEEN_LOOKS
        if self._left < 0:
            raise self._too_much(f"takes more than {self._steps:,} steps, or makes as much text")
        if time.monotonic() > self._ends:
            raise self._too_much(f"takes more than {limits.TEMPLATE_SECONDS:.0f} s")

    def _too_much(self, what: str) -> LimitReached:
        return LimitReached(f"the chat template {what}", where=self.template_name, fix=_FIX)

    def _weight(self, value: Any) -> int:
        """Steps that it takes to go through a value once, with all that is in it."""
        return self._size(value)[0]

    def _size(self, value: Any) -> tuple[int, int]:
        """Weight, and levels. What is in a value twice counts twice, as it will when it is written out."""
        if isinstance(value, str):
            return 1 + (len(value) >> 5), 0
        if isinstance(value, int):
            return 1 + (value.bit_length() >> 8), 0
        inside: Any = value
        if isinstance(inside, range):
            return 1 + len(inside), 1
        if isinstance(value, dict):
            inside = chain(value, value.values())
        elif isinstance(value, _CONTAINERS):
            inside = value
        else:
            return 1, 0
        known = self._known.get(id(value))
        if known is not None:
            return known[:2]
        weight, depth, count = 1, 0, 0
        for each in inside:
            more, deeper = self._size(each)
            weight, depth, count = weight + more, max(depth, deeper), count + 1
            if weight > limits.TEMPLATE_MOST_STEPS:
                raise self._too_much("makes a value that is too large")
        self.spend(count)
        self._known[id(value)] = weight, depth + 1, value
        return weight, depth + 1

    # ── what the compiled code calls ────────────────────────────────────────────────────────────────────────────

    def seen(self, value: Any) -> Any:
        """The value, paid for as one that is gone through."""
        self.spend(1 + (len(value) >> 5) if type(value) is str else self._weight(value))
        return value

    def made(self, value: Any) -> Any:
        """The value, paid for as one that was made of others and will be used again."""
        if type(value) is str:
            self.spend(1 + (len(value) >> 5))
        elif type(value) not in SIMPLE:
            if isinstance(value, list | tuple | dict):
                self.spend(1 + (len(value) >> 5))  # others are pointed to, not copied
            if self._weight(value) > max(self._left, 0):  # written out, it will be so much
                self._look_up()
                if self._weight(value) > self._left:
                    raise self._too_much("makes a value that is too large")
            if isinstance(value, GeneratorType):
                return self._counted(value)
        return value

    def _counted(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self.spend(1)
            yield value

    def add(self, terms: tuple[Any, ...]) -> Any:
        """a + b + …, from the left."""
        if set(map(type, terms)) == {str}:
            self.spend(1 + (sum(map(len, terms)) >> 5))
            return "".join(terms)
        total = terms[0]
        for each in terms[1:]:
            if isinstance(each, str | list | tuple):
                self.spend(1 + ((len(each) + (len(total) if hasattr(total, "__len__") else 0)) >> 5))
            total = total + each
        return self.made(total)

    def joined(self, pieces: Any) -> str:
        """a ~ b, and all that a template or macro puts out."""
        parts = list(pieces)
        try:
            self.spend(len(parts) + (sum(map(len, parts)) >> 5))
            return "".join(parts)
        except TypeError:
            for each in parts:
                self.seen(each)
            return "".join(map(str, parts))
