"""Jinja as chat templates expect it, with every step counted: a template comes from a stranger.

jinja2's sandbox keeps a template from running code and from changing data, not from running for ever or from making
endless text. Here the code that it compiles to counts: each round of a loop, each call of a macro, filter or method,
each operation on text, weighted by the size of what it works on, before it is done. jinja_count.py has the count, and
limits.py says how many steps there are. (What templates may
use: transformers' documentation, "Writing a chat template".)
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import threading
from collections.abc import Callable
from types import BuiltinMethodType, GeneratorType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2.utils import Namespace

from lora_cli import limits
from lora_cli.data.chat.jinja_count import SIMPLE, CountedEnvironment
from lora_cli.errors import LoraError, reason_of
from lora_cli.limits import LimitReached

# Some templates print today's date. A run that is prepared again, or resumed on another day, must see the same tokens.
DATE = datetime.datetime(2024, 7, 26)


class BoundedTemplate:
    """A compiled template. name: for messages. Raises LoraError for one that is not valid Jinja, or too large."""

    def __init__(self, text: str, name: str):
        self._lock = threading.Lock()  # of the count, which is the environment's
        self._environment, self._text = _Environment(name), text
        if len(text) > limits.TEMPLATE_CHARACTERS:
            what = f"the chat template has {len(text):,} characters; {limits.TEMPLATE_CHARACTERS:,} is the limit"
            raise LimitReached(what, where=name, fix="use the model's own template, or a shorter one")
        try:
            self._compiled = self._environment.from_string(text)
        except LoraError:
            raise
        except Exception as error:
            where, fix = f"{name}:{getattr(error, 'lineno', None) or 1}", "correct this line"
            if isinstance(error, RecursionError | MemoryError):
                where, fix = name, "write it with fewer levels"
            what = f"the chat template is not valid Jinja: {reason_of(error)}"
            raise LoraError(what, where=where, fix=fix) from None

    @functools.cached_property
    def reads(self) -> set[str]:
        """Names that the template looks up and does not make itself."""
        names = jinja2.meta.find_undeclared_variables(self._environment.parse(self._text))
        return names - set(self._environment.globals)

    @property
    def steps(self) -> int:
        """How many the last rendering took."""
        return self._environment.taken

    def render(self, **variables: Any) -> str:
        """Raises LimitReached, and whatever the template raises."""
        with self._lock:
            self._environment.begin(variables)
            try:
                return self._compiled.render(variables)
            finally:
                self._environment.end()


class _GenerationMarks(jinja2.ext.Extension):
    """{% generation %}…{% endgeneration %} renders its body; where turns are is found in another way."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(CountedEnvironment):
    """The filters, tests, methods and names that a chat template may use, each paid for by what it works on."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def __init__(self, name: str):
        super().__init__(name, extensions=[_GenerationMarks, jinja2.ext.loopcontrols])
        own, tests = self.filters, self.tests
        own |= {name: self._metered(name, own[name]) for name in (_GROWING | _SLOW_FILTERS) & own.keys()}
        own |= {name: self._kept(own[name]) for name in _LAZY_FILTERS}
        own |= {"trim": self._trimmed, "tojson": self._as_json}
        tests |= {name: self._compared(tests[name]) for name in _COMPARING_TESTS}
        self.globals |= {"raise_exception": _refuse, "strftime_now": DATE.strftime, "namespace": _Namespace}
        del self.globals["lipsum"]

    # ── what a template does ──────────────────────────────────────────────────────────────────────────────────────────

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str | bytes):
            self._pay_for_format(left, right)
        elif isinstance(left, int) and isinstance(right, int):
            bits, more = left.bit_length(), right.bit_length()
            bits = max(bits, 1) * abs(right) if operator == "**" else bits + more
            self._require_few(bits, limits.TEMPLATE_BITS, "bits of a number")
        elif operator == "*":
            both: list[tuple[Any, Any]] = [(left, right), (right, left)]
            for value, times in both:
                if hasattr(value, "__len__") and isinstance(times, int):
                    self.spend(len(value) * max(0, times) >> (5 if isinstance(value, str) else 0))
        return self.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # of str.format, which the sandbox wraps
        if type(method) is BuiltinMethodType:
            name, owner, args = method.__name__, method.__self__, _without_generators(args)
            if name in ("format", "format_map"):
                __self._pay_for_format(owner, (*args, kwargs))
            elif args and name in _GROWING:
                __self._pay_for_text(name, str(owner), args, kwargs)
            elif name in ("count", "index", "update"):
                __self._pay_for((owner, *args))
        else:
            for each in (*args, *kwargs.values()):
                __self.made(each)
        result = super().call(__context, __obj, *args, **kwargs)
        return result if type(result) in SIMPLE else __self.made(result)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As the sandbox does it, which takes longest for what is asked most: a key of a turn, a method of a text."""
        if type(obj) is dict and attribute not in _OF_DICTS:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if type(obj) is str and attribute in _PLAIN_METHODS:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _REFUSED_METHODS and super().is_safe_attribute(obj, attr, value)

    # ── what is paid before it is done ──────────────────────────────────────────────────────────────────────────

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        first = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0  # the context comes before the value

        @functools.wraps(function)
        def filtered(*args: Any, **kwargs: Any) -> Any:
            args = _without_generators(args)
            value, others = args[first], args[first + 1 :]
            weight = self._weight(value)
            self.spend(weight)
            if name == "join":
                self._pay_for_text(name, str(others[0] if others else kwargs.get("d", "")), (value,), {})
            else:
                text = value if isinstance(value, str) else str(value) if name == "replace" else ""
                self._pay_for_text(name, text, others, kwargs)
            if name == "format":
                self._pay_for_format(value, kwargs or others)
            elif name in ("sum", "striptags"):  # both copy what they have so far at each item
                self.spend(weight * weight >> 5)
            elif name in _SLOW_FILTERS:
                self.spend(16 * weight)
            return self.made(function(*args, **kwargs))

        return filtered

    def _kept(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose result is paid for: of a generator item by item."""
        return functools.wraps(function)(lambda *args, **kwargs: self.made(function(*args, **kwargs)))

    def _trimmed(self, value: Any, chars: str | None = None) -> str:
        """|trim, by far the most frequent filter."""
        if chars is not None:
            self._pay_for_text("strip", str(value), (chars,), {})
        return (value if type(value) is str else str(value)).strip(chars)

    def _as_json(
        self, item: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        weight, depth = self._size(item)
        width = len(indent) if isinstance(indent, str) else abs(indent or 0)
        self._require_few(width, limits.TEMPLATE_WIDTH, "for tojson")
        self.spend(weight * (5 + width * depth))
        if separators is not None:
            separators = tuple(str(each)[:64] for each in separators)
        options: Any = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators}
        return self.made(json.dumps(item, sort_keys=sort_keys, **options))

    def _compared(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *values: function(*map(self.seen, values))

    def _pay_for(self, arguments: tuple[Any, ...]) -> None:
        self.spend(sum(map(self._weight, arguments)))

    def _pay_for_text(self, name: str, text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """For a method of a text, or a filter that does the same. Raises LimitReached before it can make too much."""
        given = (*args, *kwargs.values())
        self.spend(1 + (len(text) >> 5))
        self._pay_for(given)
        if name in _WIDENING:
            for each in given:
                if isinstance(each, int | float):
                    self._require_few(abs(each), limits.TEMPLATE_WIDTH, f"for {name}")
                    self.spend(int(abs(each)) >> 5)
        texts = [each for each in given if isinstance(each, str)]
        if name == "join" and len(args) == 1 and hasattr(args[0], "__len__"):
            self.spend(len(args[0]) * (1 + len(text)) >> 5)
        elif name in _TIMES:
            widths = [int(each) for each in given if isinstance(each, int) and name in _WIDENING]
            longest = max([8, *map(len, texts), *widths])
            self.spend(_TIMES[name](text, texts[0] if texts else "") * longest >> 5)

    def _pay_for_format(self, text: Any, arguments: Any) -> None:
        """'%10d' % n, and '{:10}'.format(n): widths in the text, and arguments that are inserted many times."""
        text = str(text)
        numbers = re.findall(r"[0-9]+", text)
        self._require_few(max(map(len, numbers), default=0), 4, "digits of a width")
        if "*" in text or re.search(r"\{[^{}]*\{", text):
            raise self._too_much("sets a width by an argument")
        places = text.count("%") + text.count("{")
        self.spend(1 + (len(text) >> 5) + places * (self._weight(arguments) + sum(map(int, numbers)) // 32))

    def _require_few(self, count: float, most: int, what: str) -> None:
        if not count <= most:
            raise self._too_much(f"asks for more than {most:,} {what}")


# Filters and methods of texts whose result can be longer than what they are given
_WIDENING = {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap", "batch", "slice", "round"}
_GROWING = _WIDENING | {"replace", "join", "format", "strip", "lstrip", "rstrip", "sum"}
_SLOW_FILTERS = {"sort", "dictsort", "groupby", "unique", "pprint", "urlize", "striptags", "xmlattr", "min", "max"}
_TIMES: dict[str, Callable[[str, str], int]] = {  # how often an argument is written, or gone through
    "replace": lambda text, old: text.count(old),
    "indent": lambda text, _: text.count("\n") + 1,
    "expandtabs": lambda text, _: text.count("\t"),
    "wordwrap": lambda text, _: len(text),
    **dict.fromkeys(("strip", "lstrip", "rstrip"), lambda text, _: len(text) >> 5),
}
_LAZY_FILTERS = {"list", "map", "select", "reject", "selectattr", "rejectattr", "items"}
_COMPARING_TESTS = ["in", "==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", "ge", ">=", "<", "lt"]
_COMPARING_TESTS += ["lessthan", "<=", "le", "lower", "upper", "divisibleby"]
_OF_DICTS = frozenset(dir(dict))
_PLAIN_METHODS = {"startswith", "endswith", "split", "strip", "lstrip", "rstrip", "replace", "lower", "upper", "title"}
_REFUSED_METHODS = {"translate", "maketrans", "to_bytes", "from_bytes", "encode", "decode"}


class _Namespace(Namespace):
    """A namespace can hold itself, or another that holds it twice: it is not written out."""

    def __repr__(self) -> str:
        return "<Namespace>"


class Refused(jinja2.TemplateError):
    """What a template says with `raise_exception`."""


def _refuse(message: str) -> None:
    raise Refused(message)


def _without_generators(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """With lists in their place, whose length is known."""
    return tuple(list(each) if isinstance(each, GeneratorType) else each for each in values)
