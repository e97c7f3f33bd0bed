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
from lora_cli.errors import LoraError
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
        except (RecursionError, MemoryError):
            raise LoraError(
                "the chat template is nested too deeply", where=name, fix="write it with fewer levels"
            ) from None
        except (jinja2.TemplateError, SyntaxError, ValueError, OverflowError) as error:
            line = getattr(error, "lineno", None)
            raise LoraError(
                f"the chat template is not valid Jinja: {error}", where=f"{name}:{line or 1}", fix="correct this line"
            ) from None

    @property
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
        self.filters["tojson"] = _to_json
        for each in (_GROWING | _SLOW_FILTERS | _LAZY_FILTERS) & self.filters.keys():
            self.filters[each] = self._metered(each, self.filters[each])
        self.filters |= {"trim": self._trimmed, "list": self._listed}
        for each in _COMPARING_TESTS:
            self.tests[each] = self._compared(self.tests[each])
        self.globals |= {"raise_exception": _refuse, "strftime_now": DATE.strftime, "namespace": _Namespace}
        del self.globals["lipsum"]

    # ── what a template does ──────────────────────────────────────────────────────────────────────────────────────────

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if type(left) is int and type(right) is int and operator == "%":
            return left % right
        if operator == "%" and isinstance(left, str | bytes):
            self._pay_for_format(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._require_few(max(left.bit_length(), 1) * abs(right), limits.TEMPLATE_BITS, "bits of a number")
        elif operator == "*":
            if isinstance(left, int) and isinstance(right, int):
                bits = left.bit_length() + right.bit_length()
                self._require_few(bits, limits.TEMPLATE_BITS, "bits of a number")
            both: list[tuple[Any, Any]] = [(left, right), (right, left)]
            for value, times in both:
                if hasattr(value, "__len__") and isinstance(times, int):
                    self.spend(len(value) * max(0, times) >> (5 if isinstance(value, str) else 0))
        return self.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if type(__obj) is BuiltinMethodType:
            name = __obj.__name__
            if name == "join" and args and isinstance(args[0], GeneratorType):
                args = (list(args[0]), *args[1:])
            if args and name in _GROWING:
                __self._pay_for_text(name, str(__obj.__self__), args, kwargs)
            elif name in ("count", "index", "update"):
                __self._pay_for((__obj.__self__, *args))
        else:
            for each in args:
                if type(each) is not str or len(each) > 32:
                    __self.made(each)
            for each in kwargs.values():
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

    def wrap_str_format(self, value: Any) -> Any:
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None

        def paid(*args: Any, **kwargs: Any) -> str:
            self._pay_for_format(value.__self__, (*args, kwargs))
            return formatted(*args, **kwargs)

        return paid

    # ── what is paid before it is done ──────────────────────────────────────────────────────────────────────────

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        first = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0  # the context comes before the value

        @functools.wraps(function)
        def filtered(*args: Any, **kwargs: Any) -> Any:
            given = args[first:]
            value, others = given[0], given[1:]
            if name in _LAZY_FILTERS:  # paid for item by item
                return self.made(function(*args, **kwargs))
            weight = self._weight(value)
            self.spend(weight)
            self._pay_for_text(name, value if isinstance(value, str) else "", others, kwargs)
            if name == "tojson":
                self.spend(weight * (4 + _indent(*others, **kwargs) * self._size(value)[1]))
            elif name == "join":
                return self._join(function, args, given, kwargs)
            elif name == "format":
                self._pay_for_format(str(value), kwargs or others)
            elif name in ("sum", "striptags"):  # both copy what they have so far at each item
                self.spend(weight * weight >> 5)
            elif name in _SLOW_FILTERS:
                self.spend(16 * weight)
            return self.made(function(*args, **kwargs))

        return filtered

    def _trimmed(self, value: Any, chars: str | None = None) -> str:
        """|trim, by far the most frequent filter."""
        if chars is not None:
            self._pay_for_text("strip", str(value), (chars,), {})
        return (value if type(value) is str else str(value)).strip(chars)

    def _listed(self, value: Any) -> list[Any]:
        if isinstance(value, str | range):
            self.spend(len(value))
        return self.made(list(value))

    def _compared(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def compared(*values: Any) -> Any:
            for each in values:
                if type(each) is not str or len(each) > 32:
                    self.seen(each)
            return function(*values)

        return compared

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
        longest = max([8, *map(len, texts), *(each for each in given if isinstance(each, int))])
        if name == "replace" and len(texts) > 1:
            self.spend(text.count(texts[0]) * len(texts[1]) >> 5)
        elif name == "join" and len(args) == 1 and hasattr(args[0], "__len__"):
            self.spend(len(args[0]) * (1 + len(text)) >> 5)
        elif name in ("strip", "lstrip", "rstrip") and texts:
            self.spend(len(text) * len(texts[0]) >> 10)
        elif name == "indent":
            self.spend((text.count("\n") + 1) * longest >> 5)
        elif name == "expandtabs":
            self.spend(text.count("\t") * longest >> 5)
        elif name == "wordwrap":
            self.spend(len(text) * longest >> 5)

    def _join(self, function: Callable[..., Any], args: Any, given: Any, kwargs: dict[str, Any]) -> str:
        """|join: of a generator too, which is gone through once."""
        values = list(given[0])
        between = [each for each in (*given[1:2], kwargs.get("d")) if isinstance(each, str)]
        self.spend(len(values) * (1 + (max(map(len, between), default=0) >> 5)))
        self._pay_for(tuple(values))
        return function(*args[: len(args) - len(given)], values, *given[1:], **kwargs)

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
_WIDENING |= {"tojson"}
_GROWING = _WIDENING | {"replace", "join", "format", "strip", "lstrip", "rstrip", "sum"}
_SLOW_FILTERS = {"sort", "dictsort", "groupby", "unique", "pprint", "urlize", "striptags", "xmlattr", "min", "max"}
_LAZY_FILTERS = {"map", "select", "reject", "selectattr", "rejectattr", "items"}
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


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    if separators is not None:
        separators = tuple(str(each)[:64] for each in separators)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _indent(ensure_ascii: bool = False, indent: Any = None, *_: Any, **__: Any) -> int:
    return indent if isinstance(indent, int) else len(indent) if isinstance(indent, str) else 0
