import pytest

from apiserver.files.agents import AgentPod, agent_on
from kube.client import Json


def pod(
    name: str,
    *,
    node: str = "n1",
    address: str = "10.0.0.1",
    ready: bool = True,
    created: str = "2026-12-01T10:00:00Z",
    deleted: bool = False,
    phase: str = "Running",
) -> Json:
    metadata = {"name": name, "creationTimestamp": created} | ({"deletionTimestamp": created} if deleted else {})
    return {
        "metadata": metadata,
        "spec": {"nodeName": node},
        "status": {
            "phase": phase,
            "podIP": address,
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }


@pytest.mark.parametrize(
    ("pods", "address"),
    [
        pytest.param([], None, id="none"),
        pytest.param([pod("a", node="n2")], None, id="on another node only"),
        pytest.param([pod("a", address="")], None, id="without an address yet"),
        pytest.param([pod("a", address="10.0.0.1")], "10.0.0.1", id="one"),
        pytest.param([pod("a", ready=False)], "10.0.0.1", id="one that is not ready is still asked"),
        pytest.param([pod("a", deleted=True)], "10.0.0.1", id="one that is leaving is still asked"),
        pytest.param([pod("old", deleted=True), pod("new", address="10.0.0.2", ready=False)], "10.0.0.2", id="update"),
        pytest.param(
            [pod("failed", phase="Failed", created="2026-12-02T10:00:00Z"), pod("new", address="10.0.0.2")],
            "10.0.0.2",
            id="evicted",
        ),
        pytest.param(
            [pod("a", ready=False, created="2026-12-02T10:00:00Z"), pod("b", address="10.0.0.2")],
            "10.0.0.2",
            id="the ready one",
        ),
        pytest.param(
            [pod("a"), pod("b", address="10.0.0.2", created="2026-12-02T10:00:00Z")], "10.0.0.2", id="the newest"
        ),
    ],
)
def test_the_agent_of_a_node_is_the_pod_most_likely_to_answer(pods: list[Json], address: str | None) -> None:
    agent = agent_on("n1", [AgentPod.parse(one) for one in pods])

    assert (agent.address if agent else None) == address


def test_a_pod_that_has_just_been_made_can_be_read() -> None:
    assert AgentPod.parse({"metadata": {"name": "a"}}).address == ""
