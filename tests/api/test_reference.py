"""Random policies and captures: what is allowed, a straightforward second implementation allows too."""

from datetime import UTC, datetime

from hypothesis import event, given, settings

from api.capturepolicy import CapturePolicy
from api.packetcapture import PacketCaptureSpec
from api.verdict import Circumstances, refused
from tests.api.reference import Json, Tree
from tests.api.strategies import CASES, NAMESPACE_LABELS, NOW, denied, manifests

MANY = max(2_000, settings().max_examples)
"""Random policies and captures; --hypothesis-profile=soak makes it 100,000."""

CAUTION = (
    # What a selector's labels are is seen one by one.
    "the selector must list the values of label",
    "the selector could match pods with",
    # The protocol, and the ports, are to be named, even where the others say as much.
    "each filter must name",
    "filters are required",
)
"""Refusals that the second implementation need not share."""


@settings(max_examples=MANY, deadline=None)
@given(CASES, NAMESPACE_LABELS)
def test_what_is_allowed_the_second_implementation_allows_too(
    case: tuple[Json, Json, Tree | Json], namespace: dict[str, str]
) -> None:
    policy, spec = manifests(case)
    refusal = refused(
        PacketCaptureSpec.model_validate(spec),
        CapturePolicy.model_validate({"metadata": {"name": "p"}, "spec": policy}),
        Circumstances(now=datetime.fromtimestamp(NOW, UTC), namespace_labels=namespace),
    )
    is_denied = denied(case, namespace=namespace)
    event(f"{'refused' if refusal else 'allowed'}, the reference {'denies' if is_denied else 'allows'}")
    if refusal is None:
        assert not is_denied
    elif not is_denied:
        assert refusal.startswith(CAUTION)
