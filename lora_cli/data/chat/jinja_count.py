"""The count of a template's steps, and where it counts: what jinja2 parsed gets counts put into it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import chain
from types import GeneratorType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from lora_cli import limits
from lora_cli.limits import LimitReached

_STEPS_BETWEEN_LOOKS = 20_000  # at the clock
_OPERATIONS_A_STEP = 16
_MANY_TERMS = 16  # of one expression; up to here its value is at most so many times what is kept
SIMPLE = {bool, int, float, range, type(None), jinja2.Undefined}
_CONTAINERS = (dict, list, tuple, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))
_FIX = "use another chat template (such as data.template: plain), or shorten the row"


class _Counts(NodeTransformer):
    """Puts counts into a parsed template: around values that are kept, and into all that is gone through repeatedly.

    Ordinary templates are to be as fast as without. So an operation is not paid for where its result can be no larger
    than a few of the values that are there; what is kept under a name, put into a list or handed on is paid for, and
    so is each round of a loop, by what its body does.
    """

    _long = False  # within an expression of many terms

    def _repeated(self, node: Any) -> nodes.Node:
        does = sum(1 for each in node.body for _ in each.find_all(nodes.Expr)) // _OPERATIONS_A_STEP
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_spent(1 + does), lineno=node.lineno))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(nodes.Not(_spent(1)), node.test)
        return node

    visit_For = visit_Macro = visit_CallBlock = visit_Block = _repeated

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.node, nodes.Const | nodes.Call | nodes.Compare | nodes.Test | nodes.Not):
            node.node = _counted("made", node.node)
        return node

    def visit_With(self, node: nodes.With) -> nodes.Node:
        self.generic_visit(node)
        node.values = [_counted("made", each) for each in node.values]
        return node

    def _summed(self, node: Any) -> nodes.Node:
        before = self._long
        terms = len(getattr(node, "nodes", ())) + sum(1 for _ in node.find_all((nodes.Add, nodes.Concat)))
        self._long = before or terms > _MANY_TERMS
        self.generic_visit(node)
        long, self._long = self._long, before
        if long and isinstance(node, nodes.Concat):  # before all of them are put together
            node.nodes = [_counted("made", each) for each in node.nodes]
        return _counted("made", node) if long else node

    visit_Add = visit_Concat = _summed

    def _collected(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        stored = getattr(node, "ctx", "load") != "load"
        plain = all(isinstance(each, nodes.Literal) for each in node.find_all(nodes.Expr))
        return node if stored or plain else _counted("made", node)

    visit_List = visit_Tuple = visit_Dict = _collected

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        sides: list[Any] = [node, *node.ops]
        if not any(isinstance(each.expr, nodes.Literal) for each in sides):  # else one is short, so the comparison is
            for each in sides:
                each.expr = _counted("seen", each.expr)
        return node


def _counted(how: str, node: Any) -> nodes.Expr:
    return nodes.Filter(node, f"\0{how}", [], [], None, None, lineno=node.lineno)


def _spent(steps: int) -> nodes.Expr:
    """No template can write this node, which is compiled to the environment's attribute as it is written here."""
    return nodes.EnvironmentAttribute(f"spend({steps})")


class CountedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox whose templates count their steps. name: of the template, for messages.

    The count is begun before each rendering; compiling spends from it too (constants are folded).
    """

    def __init__(self, name: str, **options: Any):
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, **options)
        self.template_name = name
        self.concat = self.joined  # type: ignore[assignment]
        self.filters |= {"\0made": self.made, "\0seen": self.seen}
        self.begin({})

    def _generate(self, source: Any, *args: Any, **kwargs: Any) -> Any:
        return super()._generate(_Counts().visit(source), *args, **kwargs)

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
        if isinstance(value, range):
            return 1 + len(value), 1
        if not isinstance(value, _CONTAINERS):
            return 1, 0
        known = self._known.get(id(value))
        if known is not None:
            return known[:2]
        weight, depth = 1, 0
        for each in chain(value, value.values()) if isinstance(value, dict) else value:
            more, deeper = self._size(each)
            weight, depth = weight + more, max(depth, deeper)
            if weight > limits.TEMPLATE_MOST_STEPS:
                raise self._too_much("makes a value that is too large")
        self.spend(len(value))
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

    def joined(self, pieces: Iterable[str]) -> str:
        """All that a template, a macro or a block puts out."""
        parts = list(pieces)
        self.spend(len(parts) + (sum(map(len, parts)) >> 5))
        return "".join(parts)
