"""Random policies and captures out of the small world of `tests.api.reference`, as JSON."""

from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import strategies as st

from tests.api import reference
from tests.api.reference import KEYS, MENTIONED, PORTS, Json, Tree

NOW = 1_900_000_000
"""Seconds since 1970, as all times of `CASES` are."""

_keys = st.sampled_from(KEYS)
_values = st.sampled_from(MENTIONED)
_some_values = st.lists(_values, min_size=1, max_size=2, unique=True)
_tests: st.SearchStrategy[Tree] = st.one_of(
    st.tuples(st.sampled_from(["==", "!=", "contains", "starts with", "ends with"]), _keys, _values),
    st.builds(
        lambda operation, key, values: (operation, key, *values),
        st.sampled_from(["in", "not in"]),
        _keys,
        st.lists(_values, max_size=2, unique=True),
    ),
    st.tuples(st.just("has"), _keys),
    st.just(("all",)),
)
_trees: st.SearchStrategy[Tree] = st.recursive(
    _tests,
    lambda inner: st.one_of(st.tuples(st.sampled_from(["and", "or"]), inner, inner), st.tuples(st.just("not"), inner)),
    max_leaves=5,
)
_label_selectors = st.fixed_dictionaries(
    {
        "matchLabels": st.dictionaries(_keys, _values, max_size=2),
        "matchExpressions": st.lists(
            st.one_of(
                st.builds(
                    lambda key, operator, values: {"key": key, "operator": operator, "values": values},
                    _keys,
                    st.sampled_from(["In", "NotIn"]),
                    _some_values,
                ),
                st.builds(
                    lambda key, operator: {"key": key, "operator": operator},
                    _keys,
                    st.sampled_from(["Exists", "DoesNotExist"]),
                ),
            ),
            max_size=2,
        ),
    }
)

_ports = st.one_of(
    st.sampled_from(PORTS),
    st.builds(
        lambda one, other: f"{min(one, other)}:{max(one, other)}", st.sampled_from(PORTS), st.sampled_from(PORTS)
    ),
)
_filters = st.one_of(
    st.fixed_dictionaries(
        {"ports": st.lists(_ports, min_size=1, max_size=3)},
        optional={"protocol": st.sampled_from(["TCP", "UDP", "SCTP", 6, 17, 132])},
    ),
    st.fixed_dictionaries({}, optional={"protocol": st.sampled_from([*reference.NUMBERS, *reference.PROTOCOLS])}),
    st.sampled_from(
        [
            {"protocol": protocol, "icmp": {"type": kind}}
            for protocol, kinds in reference.MESSAGES.items()
            for kind in kinds
        ]
    ),
)
_interfaces = st.lists(st.sampled_from(["eth0", "net1", "lo"]), max_size=2, unique=True)
_seconds = st.sampled_from([0, 1, 60, 3600, 86400])


def _some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Json]:
    """An object with some of these fields."""
    return st.fixed_dictionaries({}, optional=fields)


def _these(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Json]:
    """An object with all of these fields."""
    return st.fixed_dictionaries(fields)


_key_lists = st.lists(_keys, min_size=1, max_size=2, unique=True)
_forbidden = st.lists(_these(key=_keys, values=_some_values), min_size=1, max_size=2)
_selector_rules = st.one_of(
    _these(requiredKeys=_key_lists, allowEmpty=st.booleans()),
    _these(forbidden=_forbidden, allowEmpty=st.booleans()),
    _some(allowEmpty=st.booleans(), requiredKeys=_key_lists, forbidden=_forbidden),
)
_port_lists = st.lists(_ports, min_size=1, max_size=3)
_protocols = st.lists(st.sampled_from(list(reference.NUMBERS)), max_size=4)
_filter_rules = st.one_of(
    _some(required=st.booleans(), protocols=_protocols),
    _these(allowedPorts=_port_lists),
    _these(deniedPorts=_port_lists),
    _some(protocols=_protocols, allowedPorts=_port_lists, deniedPorts=_port_lists),
)
_time_limits = _some(maxDuration=_seconds, requireEndTime=st.booleans(), maxStartDelay=_seconds, maxTTL=_seconds)
_times = _some(
    startTime=st.builds(lambda ahead: NOW + ahead, _seconds),
    endTime=st.builds(lambda ahead: NOW + 86400 + ahead, _seconds.filter(bool)),
    ttlSecondsAfterFinished=_seconds,
)
_size_limits = _some(
    maxFileSize=st.sampled_from([1_000_000, 10_000_000]),
    maxFiles=st.sampled_from([1, 2, 100]),
    maxSnapLength=st.sampled_from([64, 65535, 262144]),
)
_sizes = _some(
    suspend=st.booleans(),
    snapLength=st.sampled_from([64, 128, 65535]),
    rotation=_some(maxFileSize=st.sampled_from([1_000_000, 10_000_000, 200_000_000]), maxFiles=st.integers(1, 20)),
)
_pinned: st.SearchStrategy[Tree] = st.just(("==", "a", "x"))
_nothing: st.SearchStrategy[Json] = st.just({})

CASES: st.SearchStrategy[tuple[Json, Json, Tree | Json]] = st.one_of(
    st.tuples(_these(selectors=_selector_rules), _nothing, st.one_of(_tests, _trees, _label_selectors)),
    st.tuples(_these(filters=_filter_rules), _these(filters=st.lists(_filters, min_size=1, max_size=2)), _pinned),
    st.tuples(_these(limits=_time_limits), _times, _pinned),
    st.tuples(_these(limits=_size_limits), _sizes, _pinned),
    st.tuples(
        _some(namespaceSelector=_label_selectors, interfaces=_some(allowed=_interfaces)),
        _some(interfaces=_interfaces),
        _pinned,
    ),
    st.tuples(
        _some(selectors=_selector_rules, filters=_filter_rules, limits=_time_limits),
        _some(filters=st.lists(_filters, max_size=1), interfaces=_interfaces),
        st.one_of(_trees, _label_selectors),
    ),
)
"""A policy, a spec without its selector, and that: mostly about rules of one kind, so that none hides another."""

NAMESPACE_LABELS = st.dictionaries(_keys, _values)


def manifests(case: tuple[Json, Json, Tree | Json]) -> tuple[Json, Json]:
    """The specs of a case's policy and capture as manifests have them."""
    policy, spec, selector = case
    limits: Json = policy.get("limits", {})
    spans = {key: f"{limits[key]}s" for key in ("maxDuration", "maxStartDelay", "maxTTL") if key in limits}
    times = {key: _moment(spec[key]) for key in ("startTime", "endTime") if key in spec}
    selected = {"podSelector": selector} if isinstance(selector, dict) else {"selector": reference.text(selector)}
    return policy | {"limits": limits | spans}, spec | times | selected


def denied(case: tuple[Json, Json, Tree | Json], *, namespace: dict[str, str]) -> bool:
    """What the second implementation says of a case."""
    policy, spec, selector = case
    if isinstance(selector, dict):
        return reference.denies(policy, spec | {"podSelector": selector}, tree=None, namespace=namespace, now=NOW)
    return reference.denies(policy, spec, tree=selector, namespace=namespace, now=NOW)


def _moment(seconds: int) -> str:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)).isoformat()
