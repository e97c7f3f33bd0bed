"""What a chat template compiles to: the code that jinja2 makes, with a count in it (see jinja.py)."""

from __future__ import annotations

from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, operators

_OPERATIONS_A_STEP = 16
_MANY_TERMS = 16  # of one expression; up to here its value is at most so many times what is kept


class CountingGenerator(CodeGenerator):
    """Code that counts: what is written here calls spend, seen, made, add or joined of the environment.

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
