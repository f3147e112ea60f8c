"""What a label's key and value may be, in Kubernetes' own words (k8s.io/apimachinery, `IsLabelKey`, `IsLabelValue`)."""

import re
from typing import Final

_LONGEST_NAME: Final = 63
_LONGEST_PREFIX: Final = 253

_NAME: Final = "([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]"
_VALUE: Final = f"({_NAME})?"
_DOMAIN: Final = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"

_CHARACTERS: Final = (
    "consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character"
)
_NAME_RULE: Final = (
    f"must {_CHARACTERS} (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '{_NAME}')"
)
_VALUE_RULE: Final = (
    f"a valid label must be an empty string or {_CHARACTERS} "
    f"(e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is '{_VALUE}')"
)
_DOMAIN_RULE: Final = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and "
    f"end with an alphanumeric character (e.g. 'example.com', regex used for validation is '{_DOMAIN}')"
)


def key_problems(key: str) -> list[str]:
    """What is wrong with the key of a label: a name, and before it perhaps a domain and a slash."""
    if key.count("/") > 1:
        return [
            f"a valid label key {_NAME_RULE} with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')"
        ]
    prefix, slash, name = key.rpartition("/")
    problems = [f"prefix part {problem}" for problem in _prefix_problems(prefix)] if slash else []
    if not name:
        problems.append("name part must be non-empty")
    elif _bytes(name) > _LONGEST_NAME:
        problems.append(f"name part must be no more than {_LONGEST_NAME} bytes")
    if not re.fullmatch(_NAME, name):
        problems.append(f"name part {_NAME_RULE}")
    return problems


def value_problems(value: str) -> list[str]:
    """What is wrong with the value of a label."""
    problems = []
    if _bytes(value) > _LONGEST_NAME:
        problems.append(f"must be no more than {_LONGEST_NAME} bytes")
    if not re.fullmatch(_VALUE, value):
        problems.append(_VALUE_RULE)
    return problems


def _prefix_problems(prefix: str) -> list[str]:
    if not prefix:
        return ["must be non-empty"]
    problems = []
    if _bytes(prefix) > _LONGEST_PREFIX:
        problems.append(f"must be no more than {_LONGEST_PREFIX} bytes")
    if not re.fullmatch(_DOMAIN, prefix):
        problems.append(_DOMAIN_RULE)
    return problems


def _bytes(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))
