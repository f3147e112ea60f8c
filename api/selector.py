"""Which pods: Calico's selector grammar, and Kubernetes' LabelSelector.

Calico's grammar, from low precedence to high. White space is free, but not before the parenthesis of a function; and
strings have no escapes:

    or        = and { "||" and }
    and       = unary { "&&" unary }
    unary     = "!" unary | "(" or ")" | function | key operation
    function  = "all(" ")" | "global(" ")" | "has(" key ")"
    operation = ("==" | "!=" | "contains" | "starts with" | "ends with") string
              | ("in" | "not in") "{" [ string { "," string } [ "," ] ] "}"

`!=` and `not in` are true for a pod that has no such label; everything else about an absent label is false.
`startswith`, `endswith` and `notin` may be written too. The empty text and `global()` select what `all()` does.

What Calico accepts is accepted and means the same, and nothing else is, with two exceptions: line breaks are white
space here, since YAML's block scalars end in one, and there is a limit to nesting.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Final, Literal, NamedTuple, Protocol, get_args

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from api.labels import key_problems, value_problems
from api.labelvalues import ANY, LabelValues
from api.object import Model

Labels = Mapping[str, str]

_DEEPEST: Final = 64
_MOST_REQUIREMENTS: Final = 64
_MOST_VALUES: Final = 256
_LONGEST_KEY: Final = 512  # Calico's limit; Kubernetes' own is 317

_TOKEN: Final = re.compile(
    r"[ \t\r\n]*(?:"
    r"(?P<function>(?:all|global|has)\()|(?P<word>[A-Za-z0-9_./-]+)|(?P<symbol>==|!=|&&|\|\||[!(){},])"
    r"|(?P<string>'[^']*'|\"[^\"]*\")|(?P<end>\Z))"
)
_WHITE_SPACE: Final = " \t\r\n"
_FUNCTIONS: Final = ("all", "global", "has")
_OPERATIONS: Final = "==, !=, in, not in, contains, starts with or ends with"
_CONNECTIVES: Final = {"and": "write &&", "or": "write ||", ",": "write &&"}
_REMEDIES: Final = {
    "=": "write ==",
    "&": "write &&",
    "|": "write ||",
    "~": "write contains, starts with or ends with",
    **dict.fromkeys("“”‘’`", "quote strings with ' or \""),
}
_ANY_CHARACTER: Final = "labels have letters, digits, _ . / and -, and strings stand in quotes"
_LONGEST_SHOWN: Final = 40

_TextOperator = Literal["contains", "starts with", "ends with"]
_TEXT_OPERATORS: Final[tuple[_TextOperator, ...]] = get_args(_TextOperator)


class SelectorError(ValueError):
    """The text is no selector; the message names the column, counted from 1, and says what to write."""


class PodSelector(Protocol):
    """What both kinds of selector can do."""

    def matches(self, labels: Labels) -> bool: ...

    def values_of(self, key: str) -> LabelValues:
        """The values that this label can have on a pod that is matched; perhaps more, never fewer."""
        ...


class Selector(ABC):
    """A selector of Calico's grammar in its canonical form, which is its text and its identity.

    In that form every negation stands at the test of a label, and operands and values are sorted and unique. `parse`
    reads it back. Selectors that differ may still mean the same.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    @abstractmethod
    def matches(self, labels: Labels) -> bool:
        """Whether a pod with these labels is selected."""

    @abstractmethod
    def values_of(self, key: str) -> LabelValues:
        """The values that this label can have on a pod that is matched; perhaps more, never fewer."""

    def to_label_selector(self) -> "LabelSelector | None":
        """The LabelSelector that says the same, as far as there is one: requirements that all must hold."""
        return _label_selector(self.operands if isinstance(self, AllOf) else (self,))

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Selector({self._text!r})"

    def __eq__(self, other: object) -> bool:
        return self._text == other._text if isinstance(other, Selector) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._text)


class LabelTest(Selector):
    """A label is absent or has one of these values: `has`, `==`, `!=`, `in` and `not in`, and their negations."""

    __slots__ = ("key", "values")

    def __init__(self, key: str, values: LabelValues) -> None:
        super().__init__(_label_text(key, values))
        self.key = key
        self.values = values

    def matches(self, labels: Labels) -> bool:
        return labels.get(self.key) in self.values

    def values_of(self, key: str) -> LabelValues:
        return self.values if key == self.key else ANY


class TextTest(Selector):
    """A part of a label's value, or its negation, which is true without the label."""

    __slots__ = ("key", "negated", "operator", "value")

    def __init__(self, key: str, operator: _TextOperator, value: str, *, negated: bool) -> None:
        super().__init__(f"{'!' if negated else ''}{key} {operator} {_quoted(value)}")
        self.key = key
        self.operator = operator
        self.value = value
        self.negated = negated

    def matches(self, labels: Labels) -> bool:
        found = labels.get(self.key)
        return (found is not None and self._holds(found)) is not self.negated

    def values_of(self, key: str) -> LabelValues:
        return LabelValues.other_than(None) if key == self.key and not self.negated else ANY

    def _holds(self, found: str) -> bool:
        match self.operator:
            case "contains":
                return self.value in found
            case "starts with":
                return found.startswith(self.value)
            case "ends with":
                return found.endswith(self.value)


class AllOf(Selector):
    """All of the operands; without any, `all()`."""

    __slots__ = ("operands",)

    def __init__(self, operands: Sequence[Selector]) -> None:
        texts = (f"({operand})" if isinstance(operand, AnyOf) else str(operand) for operand in operands)
        super().__init__(" && ".join(texts) or "all()")
        self.operands = tuple(operands)

    def matches(self, labels: Labels) -> bool:
        return all(operand.matches(labels) for operand in self.operands)

    def values_of(self, key: str) -> LabelValues:
        return LabelValues.all_of(operand.values_of(key) for operand in self.operands)


class AnyOf(Selector):
    """At least one of the operands; without any, `!all()`."""

    __slots__ = ("operands",)

    def __init__(self, operands: Sequence[Selector]) -> None:
        super().__init__(" || ".join(map(str, operands)) or "!all()")
        self.operands = tuple(operands)

    def matches(self, labels: Labels) -> bool:
        return any(operand.matches(labels) for operand in self.operands)

    def values_of(self, key: str) -> LabelValues:
        return LabelValues.any_of(operand.values_of(key) for operand in self.operands)


_EVERYTHING: Final = AllOf(())
_NOTHING: Final = AnyOf(())


def _joined(kind: type[AllOf] | type[AnyOf], operands: Sequence[Selector]) -> Selector:
    """All or any of the operands, in canonical form."""
    if len(operands) == 1:
        return operands[0]
    parts: dict[str, Selector] = {}
    for operand in operands:
        for part in operand.operands if isinstance(operand, kind) else (operand,):
            parts[str(part)] = part
    absorbing = _NOTHING if kind is AllOf else _EVERYTHING
    if str(absorbing) in parts:
        return absorbing
    ordered = [parts[text] for text in sorted(parts)]
    return ordered[0] if len(ordered) == 1 else kind(ordered)


def _label_test(key: str, values: LabelValues) -> Selector:
    if values == ANY:
        return _EVERYTHING
    return _NOTHING if values == ~ANY else LabelTest(key, values)


def _label_text(key: str, values: LabelValues) -> str:
    if None in values.listed:
        if len(values.listed) > 1:
            raise ValueError("a label's absence stands beside no values in the grammar")
        return f"has({key})" if values.are_excluded else f"!has({key})"
    listed = [_quoted(value) for value in _present(values)]
    if len(listed) == 1:
        return f"{key} {'!=' if values.are_excluded else '=='} {listed[0]}"
    return f"{key} {'not in' if values.are_excluded else 'in'} {{{', '.join(listed)}}}"


def _present(values: LabelValues) -> list[str]:
    return sorted(value for value in values.listed if value is not None)


def _quoted(value: str) -> str:
    """The grammar has no escapes, and no value read by it holds both kinds of quotes."""
    return f"'{value}'" if '"' in value else f'"{value}"'


def parse(text: str) -> Selector:
    """Read a selector. Raises `SelectorError`."""
    return _Parser(text).parse()


class _Token(NamedTuple):
    kind: str
    text: str
    start: int


class _Parser:
    """Reads by recursive descent; negations are carried down to the tests."""

    def __init__(self, text: str) -> None:
        self._tokens = _tokens(text)
        self._position = 0
        self._depth = 0

    def parse(self) -> Selector:
        if self._next.kind == "end":
            return _EVERYTHING
        selector = self._or(negated=False)
        if self._next.kind != "end":
            raise self._expected("&&, || or the end", _CONNECTIVES.get(self._next.text.lower(), ""))
        return selector

    def _or(self, *, negated: bool) -> Selector:
        operands = [self._and(negated=negated)]
        while self._accept("||"):
            operands.append(self._and(negated=negated))
        return _joined(AllOf if negated else AnyOf, operands)

    def _and(self, *, negated: bool) -> Selector:
        operands = [self._unary(negated=negated)]
        while self._accept("&&"):
            operands.append(self._unary(negated=negated))
        return _joined(AnyOf if negated else AllOf, operands)

    def _unary(self, *, negated: bool) -> Selector:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._error(f"nested more than {_DEEPEST} deep")
        try:
            if self._accept("!"):
                return self._unary(negated=not negated)
            if self._accept("("):
                selector = self._or(negated=negated)
                self._demand(")")
                return selector
            return self._function(negated=negated) if self._next.kind == "function" else self._test(negated=negated)
        finally:
            self._depth -= 1

    def _function(self, *, negated: bool) -> Selector:
        if self._accept("has("):
            test = LabelTest(self._key(), LabelValues.only(None) if negated else LabelValues.other_than(None))
            self._demand(")")
            return test
        self._position += 1
        self._demand(")")
        return _NOTHING if negated else _EVERYTHING

    def _test(self, *, negated: bool) -> Selector:
        if self._next.kind != "word":
            raise self._expected("a label, has(), all(), !, or (")
        key = self._key()
        operator = self._text_operator()
        if operator is not None:
            return TextTest(key, operator, self._string(), negated=negated)
        values = self._values()
        return _label_test(key, ~values if negated else values)

    def _text_operator(self) -> _TextOperator | None:
        for operator in _TEXT_OPERATORS:
            if self._accept(*operator.split()) or self._accept(operator.replace(" ", "")):
                return operator
        return None

    def _values(self) -> LabelValues:
        """What an operation says of the label's value, from the operator on."""
        if self._accept("=="):
            return LabelValues.only(self._string())
        if self._accept("!="):
            return LabelValues.other_than(self._string())
        if self._accept("in"):
            return LabelValues.only(*self._set())
        if self._accept("notin") or self._accept("not", "in"):
            return LabelValues.other_than(*self._set())
        word = self._tokens[self._position - 1].text
        if self._next.text == "(" and word in _FUNCTIONS:
            hint = f"write {word}( without a space"
        else:
            hint = "write ! for not" if word == "not" else ""
        raise self._expected(_OPERATIONS, hint)

    def _key(self) -> str:
        token = self._take("word", "a label")
        if len(token.text) > _LONGEST_KEY:
            raise SelectorError(f"column {token.start + 1}: the label has more than {_LONGEST_KEY} characters")
        return token.text

    def _string(self) -> str:
        hint = f"write '{_shown(self._next.text)}'" if self._next.kind == "word" else ""
        return self._take("string", "a quoted string", hint).text[1:-1]

    def _set(self) -> list[str]:
        self._demand("{")
        values = []
        while not self._accept("}"):
            values.append(self._string())
            if not self._accept(","):
                self._demand("}")
                break
        return values

    @property
    def _next(self) -> _Token:
        return self._tokens[self._position]

    def _accept(self, *texts: str) -> bool:
        ahead = self._tokens[self._position : self._position + len(texts)]
        if [token.text for token in ahead if token.kind != "string"] != list(texts):
            return False
        self._position += len(texts)
        return True

    def _demand(self, text: str) -> None:
        if not self._accept(text):
            raise self._expected(text)

    def _take(self, kind: str, what: str, hint: str = "") -> _Token:
        token = self._next
        if token.kind != kind:
            raise self._expected(what, hint)
        self._position += 1
        return token

    def _expected(self, what: str, hint: str = "") -> SelectorError:
        found = _shown(self._next.text) or "the end"
        return self._error(f"expected {what}, found {found}" + (f": {hint}" if hint else ""))

    def _error(self, message: str) -> SelectorError:
        return SelectorError(f"column {self._next.start + 1}: {message}")


def _tokens(text: str) -> list[_Token]:
    tokens = []
    position = 0
    while True:
        match = _TOKEN.match(text, position)
        if match is None:
            raise _unreadable(text, position)
        kind = match.lastgroup or "end"
        tokens.append(_Token(kind, match[kind], match.start(kind)))
        if kind == "end":
            return tokens
        position = match.end()


def _unreadable(text: str, position: int) -> SelectorError:
    while text[position] in _WHITE_SPACE:
        position += 1
    character = text[position]
    if character in "'\"":
        problem = "the string has no end"
    else:
        problem = f"unexpected character {character!r}: {_REMEDIES.get(character, _ANY_CHARACTER)}"
    return SelectorError(f"column {position + 1}: {problem}")


def _shown(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def _sound_key(key: str) -> str:
    return _sound(key, key_problems(key))


def _sound_value(value: str) -> str:
    return _sound(value, value_problems(value))


def _sound_labels(labels: dict[str, str]) -> dict[str, str]:
    for key, value in labels.items():
        _sound_key(key)
        _sound_value(value)
    return labels


def _sound(text: str, problems: Sequence[str]) -> str:
    if problems:
        raise ValueError(f"Invalid value: {json.dumps(text, ensure_ascii=False)}: {'; '.join(problems)}")
    return text


LabelKey = Annotated[str, AfterValidator(_sound_key)]
LabelValue = Annotated[str, AfterValidator(_sound_value)]


def _at_most(most: int) -> BeforeValidator:
    def check(value: object) -> object:
        if isinstance(value, list) and len(value) > most:
            raise ValueError(f"Too many: {len(value)}: must have at most {most} items")
        return value

    return BeforeValidator(check)


_Operator = Literal["In", "NotIn", "Exists", "DoesNotExist"]


class LabelSelectorRequirement(Model):
    """`metav1.LabelSelectorRequirement`."""

    key: LabelKey
    """The label."""
    operator: _Operator
    """How its value relates to `values`."""
    values: Annotated[
        list[LabelValue],
        Field(max_length=_MOST_VALUES, validate_default=True),
        _at_most(_MOST_VALUES),
    ] = Field(default_factory=list)
    """The values of In and NotIn; none for Exists and DoesNotExist."""

    @field_validator("values")
    @classmethod
    def _values_fit(cls, values: list[str], info: ValidationInfo) -> list[str]:
        operator = info.data.get("operator")
        if operator in ("In", "NotIn") and not values:
            raise ValueError("Required value: must be specified when `operator` is 'In' or 'NotIn'")
        if operator in ("Exists", "DoesNotExist") and values:
            raise ValueError("Forbidden: may not be specified when `operator` is 'Exists' or 'DoesNotExist'")
        return values

    @property
    def possible(self) -> LabelValues:
        """The values that the label has on pods for which this holds."""
        match self.operator:
            case "In":
                return LabelValues.only(*self.values)
            case "NotIn":
                return LabelValues.other_than(*self.values)
            case "Exists":
                return LabelValues.other_than(None)
            case "DoesNotExist":
                return LabelValues.only(None)

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

    match_labels: Annotated[dict[str, str], AfterValidator(_sound_labels)] = Field(default_factory=dict)
    """Labels that a pod must have, with these values."""
    match_expressions: Annotated[
        list[LabelSelectorRequirement], Field(max_length=_MOST_REQUIREMENTS), _at_most(_MOST_REQUIREMENTS)
    ] = Field(default_factory=list)
    """Further requirements."""

    def matches(self, labels: Labels) -> bool:
        return all(labels.get(key) == value for key, value in self.match_labels.items()) and all(
            requirement.matches(labels) for requirement in self.match_expressions
        )

    def values_of(self, key: str) -> LabelValues:
        """The values that this label can have on a pod that is matched."""
        required = [requirement.possible for requirement in self.match_expressions if requirement.key == key]
        if key in self.match_labels:
            required.append(LabelValues.only(self.match_labels[key]))
        return LabelValues.all_of(required)

    def to_selector(self) -> Selector:
        """The selector of Calico's grammar that says the same: there always is one."""
        return _joined(
            AllOf,
            [
                *(LabelTest(key, LabelValues.only(value)) for key, value in self.match_labels.items()),
                *(LabelTest(requirement.key, requirement.possible) for requirement in self.match_expressions),
            ],
        )


def _label_selector(tests: Sequence[Selector]) -> LabelSelector | None:
    """The requirements of these tests; None where a LabelSelector can't say one of them."""
    equal: dict[str, str] = {}
    further: list[LabelSelectorRequirement] = []
    for test in tests:
        if not isinstance(test, LabelTest) or not _sound_in_kubernetes(test):
            return None
        key, listed = test.key, _present(test.values)
        if len(listed) == 1 and not test.values.are_excluded and key not in equal:
            equal[key] = listed[0]
        else:
            if len(listed) > _MOST_VALUES or len(further) == _MOST_REQUIREMENTS:
                return None
            further.append(LabelSelectorRequirement(key=key, operator=_operator(test.values), values=listed))
    return LabelSelector(match_labels=equal, match_expressions=further)


def _operator(values: LabelValues) -> _Operator:
    if None in values.listed:
        return "Exists" if values.are_excluded else "DoesNotExist"
    return "NotIn" if values.are_excluded else "In"


def _sound_in_kubernetes(test: LabelTest) -> bool:
    return not key_problems(test.key) and not any(value_problems(value) for value in _present(test.values))
