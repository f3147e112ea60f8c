"""Selectors of Calico's grammar. What is accepted, refused and meant was compared with Calico's own parser."""

import itertools
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.labelvalues import LabelValues
from api.selector import SelectorError, parse

MANY = max(3_000, settings().max_examples)
"""Random selectors; --hypothesis-profile=soak makes it 100,000."""

WEB = {"app": "nginx", "tier": "web", "k8s.io/part-of": "shop", "empty": ""}

MATCHES = [
    ("", True),
    (" ", True),
    ("all()", True),
    ("all( )", True),
    ("global()", True),
    ("!all()", False),
    ("(all())", True),
    ("app == 'nginx'", True),
    ('app == "nginx"', True),
    ("app=='nginx'", True),
    ("app == 'apache'", False),
    ("absent == ''", False),
    ("empty == ''", True),
    ("app != 'nginx'", False),
    ("app!='apache'", True),
    ("app !='apache'", True),
    ("absent != 'x'", True),
    ("has(app)", True),
    ("has( app )", True),
    ("has(absent)", False),
    ("!has(absent)", True),
    ("! ! has(app)", True),
    ("!app == 'nginx'", False),
    ("!app != 'nginx'", True),
    ("!app in {'nginx'}", False),
    ("!app contains 'z'", True),
    ("!absent contains ''", True),
    ("has(k8s.io/part-of)", True),
    ("k8s.io/part-of == 'shop'", True),
    ("app in {'nginx', 'apache'}", True),
    ("app in{'nginx','apache'}", True),
    ("app in { 'apache' , 'nginx' , }", True),
    ("app in {'apache'}", False),
    ("app in {}", False),
    ("absent in {''}", False),
    ("app not in {'apache'}", True),
    ("app not in {'nginx'}", False),
    ("app not  in{'apache'}", True),
    ("app not\tin {'apache'}", True),
    ("app notin {'apache'}", True),
    ("app notin{'nginx'}", False),
    ("absent not in {'x'}", True),
    ("app not in {}", True),
    ("app contains 'gin'", True),
    ("app contains'gin'", True),
    ("app contains 'z'", False),
    ("app contains ''", True),
    ("absent contains ''", False),
    ("app starts with 'ng'", True),
    ("app starts  with'ng'", True),
    ("app startswith 'ng'", True),
    ("app starts with 'inx'", False),
    ("absent starts with ''", False),
    ("app ends with 'inx'", True),
    ("app endswith 'ng'", False),
    ("absent ends with ''", False),
    ("app == 'nginx' && tier == 'web'", True),
    ("app=='nginx'&&tier=='web'", True),
    ("app == 'nginx' && tier == 'db'", False),
    ("app == 'x' || tier == 'web'", True),
    # && binds closer than ||, and ! closer than both
    ("app == 'x' && tier == 'web' || has(app)", True),
    ("has(app) || app == 'x' && tier == 'db'", True),
    ("(has(app) || app == 'x') && tier == 'db'", False),
    ("!(app == 'x') && !has(absent)", True),
    ("!has(absent) && has(absent)", False),
    ("!(has(app) && has(absent))", True),
    # words of the grammar are labels too, where a label stands
    ("in == 'x'", False),
    ("!has(not)", True),
    ("all == 'x'", False),
    ("has == 'x'", False),
    ("contains contains 'x'", False),
    ("not not in {'x'}", True),
    ("starts starts with 'x'", False),
    # labels that Kubernetes knows not, and strings of anything but their own quotes
    ("-/_. == 'x'", False),
    ('app == "it\'s"', False),
    ("app != 'line\nbreak\\'", True),
    # beyond Calico: line breaks are white space
    ("app == 'nginx'\n&&\r\n\ttier == 'web'\n", True),
]


@pytest.mark.parametrize(("text", "matches"), MATCHES)
def test_a_selector_matches_labels(text: str, matches: bool) -> None:
    assert parse(text).matches(WEB) is matches


OPERATIONS = "==, !=, in, not in, contains, starts with or ends with"
UNARY = "a label, has(), all(), !, or ("
LABELS = "labels have letters, digits, _ . / and -, and strings stand in quotes"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("app == nginx", "column 8: expected a quoted string, found nginx: write 'nginx'"),
        ("app = 'nginx'", "column 5: unexpected character '=': write =="),
        ("app === 'nginx'", "column 7: unexpected character '=': write =="),
        ("app ~ 'nginx'", "column 5: unexpected character '~': write contains, starts with or ends with"),
        ("app == 'nginx", "column 8: the string has no end"),
        ("app=='\\''", "column 9: the string has no end"),
        ("app == “nginx”", "column 8: unexpected character '“': quote strings with ' or \""),
        ("app ==", "column 7: expected a quoted string, found the end"),
        ("app", f"column 4: expected {OPERATIONS}, found the end"),
        ("app == 'a' tier == 'b'", "column 12: expected &&, || or the end, found tier"),
        ("app == 'a' and tier == 'b'", "column 12: expected &&, || or the end, found and: write &&"),
        ("app == 'a' OR tier == 'b'", "column 12: expected &&, || or the end, found OR: write ||"),
        ("app == 'a', tier == 'b'", "column 11: expected &&, || or the end, found ,: write &&"),
        ("app == 'a' & tier == 'b'", "column 12: unexpected character '&': write &&"),
        ("app == 'a' | tier == 'b'", "column 12: unexpected character '|': write ||"),
        ("(app == 'a'", "column 12: expected ), found the end"),
        ("app == 'a')", "column 11: expected &&, || or the end, found )"),
        ("()", f"column 2: expected {UNARY}, found )"),
        ("has(app", "column 8: expected ), found the end"),
        ("has (app)", f"column 5: expected {OPERATIONS}, found (: write has( without a space"),
        ("all ()", f"column 5: expected {OPERATIONS}, found (: write all( without a space"),
        ("all(app)", "column 5: expected ), found app"),
        ("hasx(app)", f"column 5: expected {OPERATIONS}, found ("),
        ("ALL()", f"column 4: expected {OPERATIONS}, found ("),
        ("not has(app)", f"column 5: expected {OPERATIONS}, found has(: write ! for not"),
        ("app in 'a'", "column 8: expected {, found 'a'"),
        ("app in ('a')", "column 8: expected {, found ("),
        ("app in {a}", "column 9: expected a quoted string, found a: write 'a'"),
        ("app in {'a' 'b'}", "column 13: expected }, found 'b'"),
        ("app in {,}", "column 9: expected a quoted string, found ,"),
        ("app in {'a',,}", "column 13: expected a quoted string, found ,"),
        ("app in {'a'", "column 12: expected }, found the end"),
        ("app not 'a'", f"column 5: expected {OPERATIONS}, found not"),
        ("app not contains 'a'", f"column 5: expected {OPERATIONS}, found not"),
        ("app !in {'a'}", f"column 5: expected {OPERATIONS}, found !"),
        ("app IN {'a'}", f"column 5: expected {OPERATIONS}, found IN"),
        ("app notinx {'a'}", f"column 5: expected {OPERATIONS}, found notinx"),
        ("== 'a'", f"column 1: expected {UNARY}, found =="),
        ("&&", f"column 1: expected {UNARY}, found &&"),
        ("has('app')", "column 5: expected a label, found 'app'"),
        ("app == 'a' && ", f"column 15: expected {UNARY}, found the end"),
        ("a@b == 'c'", f"column 2: unexpected character '@': {LABELS}"),
        ("é == 'c'", f"column 1: unexpected character 'é': {LABELS}"),
        ("\xa0has(a)", f"column 1: unexpected character '\\xa0': {LABELS}"),
        ("has(a) \0", f"column 8: unexpected character '\\x00': {LABELS}"),
        ("!" * 100 + "has(a)", "column 65: nested more than 64 deep"),
        ("(" * 5000, "column 65: nested more than 64 deep"),
        (f"has({'a' * 513})", "column 5: the label has more than 512 characters"),
        (f"a == {'b' * 5000}", f"column 6: expected a quoted string, found {'b' * 40}…: write '{'b' * 40}…'"),
    ],
)
def test_what_is_no_selector_is_refused_with_the_column_and_what_to_write(text: str, message: str) -> None:
    with pytest.raises(SelectorError) as refusal:
        parse(text)
    assert str(refusal.value) == message


@pytest.mark.parametrize("length", [317, 512])
def test_a_label_may_be_as_long_as_calico_has_it(length: int) -> None:
    assert parse(f"{'a' * length} == 'b'").matches({"a" * length: "b"})


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("", "all()"),
        ("global()", "all()"),
        ("a=='b'", 'a == "b"'),
        ("a == '\"'", "a == '\"'"),
        ("!a == 'b'", 'a != "b"'),
        ("!!has(a)", "has(a)"),
        ("!a startswith 'b'", '!a starts with "b"'),
        ("a in {'b'}", 'a == "b"'),
        ("a notin {'c','b','c',}", 'a not in {"b", "c"}'),
        ("a in {}", "!all()"),
        ("a not in {}", "all()"),
        ("has(b) && (has(a) && has(c)) && has(a)", "has(a) && has(b) && has(c)"),
        ("has(b) || has(a) && all()", "has(a) || has(b)"),
        ("has(b) || has(a) && !all()", "has(b)"),
        ("has(b) || all()", "all()"),
        ("has(c) && (has(b) || has(a))", "(has(a) || has(b)) && has(c)"),
        ("(has(c) && has(b)) || has(a)", "has(a) || has(b) && has(c)"),
        ("!(has(c) && (has(b) || a != 'x'))", '!has(b) && a == "x" || !has(c)'),
    ],
)
def test_a_selector_is_written_in_one_form(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical
    assert parse(canonical) == parse(text)
    assert hash(parse(canonical)) == hash(parse(text))


def test_selectors_that_differ_are_not_equal() -> None:
    different = [parse(text) for text in ("", "!all()", "has(a)", "!has(a)", "a == 'b'", "a != 'b'", "a contains 'b'")]
    for one, other in itertools.combinations(different, 2):
        assert one != other
    assert parse("has(a)") != "has(a)"


KEYS = ["a", "b", "in", "not", "has", "c.d/e_f-g"]
VALUES = ["", "x", "xy", "yx", "yxy"]

Labels = Mapping[str, str]


@dataclass(frozen=True)
class Meaning:
    """A selector as a reader of the grammar understands it: how it may be spelled, and what it says of a pod."""

    spell: Callable[[random.Random], str]
    says: Callable[[Labels], bool]


def quoted(value: str, dice: random.Random) -> str:
    quote = dice.choice("'\"")
    return f"{quote}{value}{quote}"


def space(dice: random.Random, least: int = 0) -> str:
    return "".join(dice.choices(" \t\n", k=dice.choice((least, least, least + 1, least + 3))))


def comparison(dice: random.Random) -> Meaning:
    key, value, negated = dice.choice(KEYS), dice.choice(VALUES), dice.random() < 0.5
    return Meaning(
        lambda dice: f"{key}{space(dice)}{'!=' if negated else '=='}{space(dice)}{quoted(value, dice)}",
        lambda labels: (key in labels and labels[key] == value) is not negated,
    )


def membership(dice: random.Random) -> Meaning:
    key, several, negated = dice.choice(KEYS), dice.choices(VALUES, k=dice.randrange(4)), dice.random() < 0.5

    def spell(dice: random.Random) -> str:
        comma = f"{space(dice)},{space(dice)}"
        listed = comma.join(quoted(value, dice) for value in dice.sample(several, len(several)))
        end = comma if listed and dice.random() < 0.2 else space(dice)
        operator = dice.choice(("notin", f"not{dice.choice((' ', '  '))}in")) if negated else "in"
        return f"{key}{space(dice, 1)}{operator}{space(dice)}{{{space(dice)}{listed}{end}}}"

    return Meaning(spell, lambda labels: (key in labels and labels[key] in several) is not negated)


def part_of_text(dice: random.Random) -> Meaning:
    key, value = dice.choice(KEYS), dice.choice(VALUES)
    parts: list[tuple[tuple[str, ...], Callable[[str], bool]]] = [
        (("contains",), lambda found: found.find(value) >= 0),
        (("starts", "with"), lambda found: found[: len(value)] == value),
        (("ends", "with"), lambda found: found[::-1][: len(value)] == value[::-1]),
    ]
    words, holds = dice.choice(parts)

    def spell(dice: random.Random) -> str:
        operator = dice.choice(("", space(dice, 1))).join(words)
        return f"{key}{space(dice, 1)}{operator}{space(dice)}{quoted(value, dice)}"

    return Meaning(spell, lambda labels: key in labels and holds(labels[key]))


def presence(dice: random.Random) -> Meaning:
    key = dice.choice(KEYS)
    return Meaning(lambda dice: f"has({space(dice)}{key}{space(dice)})", lambda labels: key in labels)


def everything(_dice: random.Random) -> Meaning:
    return Meaning(lambda dice: f"{dice.choice(('all', 'global'))}({space(dice)})", lambda _: True)


def negation(operand: Meaning) -> Meaning:
    return Meaning(
        lambda dice: f"!{space(dice)}({space(dice)}{operand.spell(dice)}{space(dice)})",
        lambda labels: not operand.says(labels),
    )


def connection(operands: list[Meaning], word: str, says: Callable[[Iterator[bool]], bool]) -> Meaning:
    def spell(dice: random.Random) -> str:
        spelled = [f"({operand.spell(dice)})" for operand in dice.sample(operands, len(operands))]
        return f"{space(dice)}{word}{space(dice)}".join(spelled)

    return Meaning(spell, lambda labels: says(operand.says(labels) for operand in operands))


def any_meaning(dice: random.Random, depth: int = 0) -> Meaning:
    shape = dice.random() if depth < 4 else 0
    if shape < 0.5:
        return dice.choice((comparison, comparison, membership, membership, part_of_text, presence, everything))(dice)
    if shape < 0.65:
        return negation(any_meaning(dice, depth + 1))
    operands = [any_meaning(dice, depth + 1) for _ in range(dice.choice((2, 2, 3)))]
    return connection(operands, "&&", all) if shape < 0.82 else connection(operands, "||", any)


def any_labels(dice: random.Random) -> dict[str, str]:
    return {key: dice.choice(VALUES) for key in KEYS if dice.random() < 0.5}


def test_random_selectors_say_of_random_pods_what_the_grammar_says() -> None:
    for seed in range(MANY):
        dice = random.Random(seed)  # noqa: S311 - the same selectors every time
        meaning = any_meaning(dice)
        text = meaning.spell(dice)
        selector = parse(text)
        canonical = parse(str(selector))
        assert canonical == selector == parse(meaning.spell(dice)), (seed, text)
        for pod in (any_labels(dice) for _ in range(4)):
            says = meaning.says(pod)
            assert selector.matches(pod) is says, (seed, text, pod)
            assert canonical.matches(pod) is says, (seed, text, pod)
            assert not says or all(pod.get(key) in selector.values_of(key) for key in KEYS), (seed, text, pod)


@pytest.mark.parametrize(
    ("text", "possible"),
    [
        ("a == 'x' && has(b)", LabelValues.only("x")),
        ("a == 'x' || a in {'y'}", LabelValues.only("x", "y")),
        ("!(a != 'x' || has(b))", LabelValues.only("x")),
        ("a contains 'x'", LabelValues.other_than(None)),
        ("!a contains 'x'", LabelValues.other_than()),
        ("has(b)", LabelValues.other_than()),
        ("!all()", LabelValues.only()),
    ],
)
def test_a_selector_tells_which_values_a_label_can_have(text: str, possible: LabelValues) -> None:
    assert parse(text).values_of("a") == possible


SOUP = [*"()!,{}&|='\" \t\n", "&&", "||", "==", "!=", "'x'", '"y"', "has(a)", "all()", "in {'x'}", "not in", *KEYS]


@given(st.text(max_size=200) | st.lists(st.sampled_from(SOUP), max_size=20).map("".join))
def test_any_text_is_a_selector_or_refused(text: str) -> None:
    found: str | None = None
    try:
        selector = parse(text)
    except SelectorError as refusal:
        found = str(refusal)
    if found is None:
        assert parse(str(selector)) == selector
    else:
        column = int(found.removeprefix("column ").partition(":")[0])
        assert 1 <= column <= len(text) + 1
        assert len(found) <= 250


LARGE = 1 << 16

SHAPES: dict[str, Callable[[int], str]] = {
    "operands": lambda size: " || ".join(f"a == '{number}'" for number in range(size // 14)),
    "a set": lambda size: f"a in {{{','.join(repr(str(number)) for number in range(size // 8))}}}",
    "groups": lambda size: " && ".join(f"(has(a{number}) || has(b))" for number in range(size // 26)),
    "deep groups": lambda size: "(" * 60 + " && ".join(["has(a)"] * (size // 10)) + ")" * 60,
    "deep negations": lambda size: "!(" * 30 + " && ".join(f"has({number})" for number in range(size // 13)) + ")" * 30,
    "spaces": lambda size: " " * size + "?",
    "a long label": lambda size: "a" * size,
    "a long string": lambda size: f"a contains '{'b' * size}'",
    "no end of a string": lambda size: "'" + "b" * size,
    "open parentheses": lambda size: "(" * size,
    "negations": lambda size: "!" * size,
    "has(": lambda size: "has(" * (size // 4),
    "braces": lambda size: "a in " + "{" * size,
    "commas": lambda size: "a in {" + "'b'," * (size // 4),
}


@contextmanager
def counted_calls() -> Iterator[list[int]]:
    """Calls of functions, also of those in C, in the block."""
    count = [0]

    def note(_frame: FrameType, event: str, _argument: Any) -> None:
        count[0] += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield count
    finally:
        sys.setprofile(before)


def calls_to_read(text: str) -> int:
    with counted_calls() as count:
        try:
            parse(text)
        except SelectorError as refusal:
            str(refusal)
    return count[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_work_to_read_a_selector_grows_as_its_length(shape: str) -> None:
    small, large = (calls_to_read(SHAPES[shape](size)) for size in (LARGE // 16, LARGE))
    assert large <= 17 * small + 100


def test_a_pod_is_judged_in_a_few_steps() -> None:
    selector = parse("app in {'a', 'b', 'c'} && tier != 'db' && !has(x) && (zone starts with 'eu' || zone == 'us')")
    with counted_calls() as count:
        assert selector.matches({"app": "b", "tier": "web", "zone": "eu-1"})
    assert count[0] <= 40


def test_a_long_list_of_values_is_not_searched_one_by_one() -> None:
    selector = parse(SHAPES["a set"](LARGE))
    with counted_calls() as count:
        assert selector.matches({"a": "8000"})
    assert count[0] <= 10
