"""Which pods: Calico's selector grammar, and Kubernetes' LabelSelector.

Calico's grammar, from low precedence to high; white space is free and strings have no escapes:

    or      = and { "||" and }
    and     = unary { "&&" unary }
    unary   = "!" unary | "(" or ")" | "all()" | "global()" | "has(" key ")" | key operation
    operation = ("==" | "!=" | "contains" | "starts with" | "ends with") string
              | ("in" | "not in") "{" [ string { "," string } ] "}"

`!=` and `not in` are true for a pod that has no such label; everything else about an absent label is false.
"""

import re
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

from pydantic import Field, model_validator

from api.object import Model

Labels = Mapping[str, str]

_DEEPEST = 64
_TOKEN = re.compile(
    r"\s*(?:(?P<word>[A-Za-z0-9_./-]+)|(?P<symbol>==|!=|&&|\|\||[!(){},])|(?P<string>'[^']*'|\"[^\"]*\")|(?P<end>$))"
)


class SelectorError(ValueError):
    """The text is no selector; the message names the column, counted from 1."""


class PodSelector(Protocol):
    """What both kinds of selector can do."""

    def matches(self, labels: Labels) -> bool: ...


_Predicate = Callable[[Labels], bool]


class Selector:
    """A parsed selector of Calico's grammar."""

    __slots__ = ("_predicate", "text")

    def __init__(self, text: str, predicate: _Predicate) -> None:
        self.text = text
        self._predicate = predicate

    def matches(self, labels: Labels) -> bool:
        return self._predicate(labels)

    def __repr__(self) -> str:
        return f"Selector({self.text!r})"


def parse(text: str) -> Selector:
    """Read a selector; the empty text selects everything, as `all()` does. Raises `SelectorError`."""
    return Selector(text, _Parser(text).parse())


class _Parser:
    def __init__(self, text: str) -> None:
        self._tokens = _tokens(text)
        self._position = 0
        self._depth = 0

    def parse(self) -> _Predicate:
        if self._peek() == ("end", ""):
            return _anything
        predicate = self._or()
        if self._peek()[0] != "end":
            raise self._expected("&&, || or the end")
        return predicate

    def _or(self) -> _Predicate:
        operands = [self._and()]
        while self._accept("||"):
            operands.append(self._and())
        return operands[0] if len(operands) == 1 else _any(operands)

    def _and(self) -> _Predicate:
        operands = [self._unary()]
        while self._accept("&&"):
            operands.append(self._unary())
        return operands[0] if len(operands) == 1 else _all(operands)

    def _unary(self) -> _Predicate:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._error(f"nested more than {_DEEPEST} deep")
        try:
            if self._accept("!"):
                return _not(self._unary())
            if self._accept("("):
                predicate = self._or()
                self._demand(")")
                return predicate
            return self._predicate()
        finally:
            self._depth -= 1

    def _predicate(self) -> _Predicate:
        kind, word = self._peek()
        if kind != "word":
            raise self._expected("a label, has(), all(), !, or (")
        self._position += 1
        if word in ("all", "global") and self._accept("("):
            self._demand(")")
            return _anything
        if word == "has" and self._accept("("):
            key = self._take("word", "a label")
            self._demand(")")
            return lambda labels: key in labels
        return self._operation(word)

    def _operation(self, key: str) -> _Predicate:
        if self._accept("=="):
            value = self._string()
            return lambda labels: labels.get(key) == value
        if self._accept("!="):
            value = self._string()
            return lambda labels: labels.get(key) != value
        if self._accept("in"):
            values = self._set()
            return lambda labels: labels.get(key) in values
        if self._accept("notin") or self._accept("not", "in"):
            values = self._set()
            return lambda labels: labels.get(key) not in values
        if self._accept("contains"):
            value = self._string()
            return lambda labels: value in labels[key] if key in labels else False
        if self._accept("startswith") or self._accept("starts", "with"):
            value = self._string()
            return lambda labels: labels[key].startswith(value) if key in labels else False
        if self._accept("endswith") or self._accept("ends", "with"):
            value = self._string()
            return lambda labels: labels[key].endswith(value) if key in labels else False
        raise self._expected("==, !=, in, not in, contains, starts with or ends with")

    def _string(self) -> str:
        return self._take("string", "a quoted string")[1:-1]

    def _set(self) -> frozenset[str | None]:
        self._demand("{")
        values: set[str | None] = set()
        if not self._accept("}"):
            values.add(self._string())
            while self._accept(","):
                values.add(self._string())
            self._demand("}")
        return frozenset(values)

    def _peek(self) -> tuple[str, str]:
        kind, text, _ = self._tokens[self._position]
        return kind, text

    def _accept(self, *texts: str) -> bool:
        ahead = self._tokens[self._position : self._position + len(texts)]
        if [text for kind, text, _ in ahead if kind != "string"] != list(texts):
            return False
        self._position += len(texts)
        return True

    def _demand(self, text: str) -> None:
        if not self._accept(text):
            raise self._expected(text)

    def _take(self, kind: str, what: str) -> str:
        found, text = self._peek()
        if found != kind:
            raise self._expected(what)
        self._position += 1
        return text

    def _expected(self, what: str) -> SelectorError:
        text = self._peek()[1]
        return self._error(f"expected {what}, found {text or 'the end'}")

    def _error(self, message: str) -> SelectorError:
        return SelectorError(f"column {self._tokens[self._position][2] + 1}: {message}")


def _tokens(text: str) -> list[tuple[str, str, int]]:
    tokens = []
    position = 0
    while True:
        match = _TOKEN.match(text, position)
        if match is None:
            start = position + len(text[position:]) - len(text[position:].lstrip())
            quoted = text[start] in "'\""
            problem = "the string has no end" if quoted else f"unexpected character {text[start]!r}"
            raise SelectorError(f"column {start + 1}: {problem}")
        kind = match.lastgroup or "end"
        tokens.append((kind, match[kind], match.start(kind)))
        if kind == "end":
            return tokens
        position = match.end()


def _anything(_: Labels) -> bool:
    return True


def _not(operand: _Predicate) -> _Predicate:
    return lambda labels: not operand(labels)


def _any(operands: list[_Predicate]) -> _Predicate:
    return lambda labels: any(operand(labels) for operand in operands)


def _all(operands: list[_Predicate]) -> _Predicate:
    return lambda labels: all(operand(labels) for operand in operands)


class LabelSelectorRequirement(Model):
    """`metav1.LabelSelectorRequirement`."""

    key: str
    """The label."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    """How its value relates to `values`."""
    values: list[str] = Field(default_factory=list)
    """The values of In and NotIn; none for Exists and DoesNotExist."""

    @model_validator(mode="after")
    def _values_fit(self) -> "LabelSelectorRequirement":
        if self.operator in ("In", "NotIn") and not self.values:
            raise ValueError(f"operator {self.operator} needs at least one of values")
        if self.operator in ("Exists", "DoesNotExist") and self.values:
            raise ValueError(f"operator {self.operator} takes no values")
        return self

    def matches(self, labels: Labels) -> bool:
        match self.operator:
            case "In":
                return labels.get(self.key) in self.values
            case "NotIn":
                return labels.get(self.key) not in self.values
            case "Exists":
                return self.key in labels
            case "DoesNotExist":
                return self.key not in labels


class LabelSelector(Model):
    """`metav1.LabelSelector`: all of the requirements must hold."""

    match_labels: dict[str, str] = Field(default_factory=dict)
    """Labels that a pod must have, with these values."""
    match_expressions: list[LabelSelectorRequirement] = Field(default_factory=list)
    """Further requirements."""

    def matches(self, labels: Labels) -> bool:
        return all(labels.get(key) == value for key, value in self.match_labels.items()) and all(
            requirement.matches(labels) for requirement in self.match_expressions
        )
