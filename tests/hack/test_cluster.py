import json
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from hack.clusters.cluster import LANS, Cluster, free_lan, valid_name
from hack.clusters.failure import Failure


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KUBEPCAP_CACHE", str(tmp_path))
    return tmp_path


def test_the_same_name_gets_the_same_network_while_it_is_free() -> None:
    lan = free_lan("one", taken=[])
    assert free_lan("one", taken=[]) == lan
    assert lan.subnet_of(LANS)


def test_a_network_that_overlaps_a_route_of_the_host_is_not_taken() -> None:
    first = free_lan("one", taken=[])
    second = free_lan("one", taken=[first])
    assert second != first
    assert free_lan("one", taken=[IPv4Network((int(first.network_address) + 64, 26))]) == second


def test_when_every_network_is_taken_it_says_what_to_do() -> None:
    with pytest.raises(Failure, match="take a cluster down"):
        free_lan("one", taken=[LANS])


def test_two_clusters_share_neither_network_nor_any_name_on_the_host() -> None:
    one, two = Cluster.allocate("one"), Cluster.allocate("two")
    for attribute in ("lan", "cgroup", "host_interface", "state", "api_url"):
        assert getattr(one, attribute) != getattr(two, attribute)


@pytest.mark.parametrize("name", ["a", "kubepcap", "x" * 40, "e2e-test"])
def test_the_interface_of_the_host_has_a_name_that_linux_takes(name: str) -> None:
    assert len(Cluster(name=name, lan=LANS).host_interface) <= 15


def test_a_cluster_is_loaded_as_it_was_allocated() -> None:
    allocated = Cluster.allocate("one")
    assert Cluster.load("one") == allocated


def test_a_cluster_that_was_never_started_says_how_to_start_it() -> None:
    with pytest.raises(Failure, match="hack/cluster --name nobody up"):
        Cluster.load("nobody")


def test_every_machine_has_an_address_of_its_own_and_every_node_its_share_of_the_pods() -> None:
    cluster = Cluster(name="one", lan=IPv4Network("10.200.7.0/24"), nodes=("a", "b", "c"))
    addresses = [cluster.host_address, *(cluster.address(machine) for machine in cluster.machines)]
    assert len(set(addresses)) == len(addresses)
    assert {str(address) for address in addresses} <= {str(address) for address in cluster.lan.hosts()}
    assert [str(cluster.pods(node)) for node in cluster.nodes] == ["10.244.1.0/24", "10.244.2.0/24", "10.244.3.0/24"]


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a_b", "a/b", "..", "x" * 41, "a\n"])
def test_a_name_that_could_not_be_part_of_a_path_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="at most 40 lower-case letters"):
        valid_name(name)


def test_the_end_of_the_log_is_part_of_a_failure(tmp_path: Path) -> None:
    log = tmp_path / "etcd.log"
    log.write_text("\n".join(f"line {i}" for i in range(100)))
    said = str(Failure("etcd ended", log=log))
    assert "line 99" in said
    assert "line 5\n" not in said
    assert said.endswith(str(log))


def test_a_plan_is_plain_json(cache: Path) -> None:
    Cluster.allocate("one")
    assert json.loads((cache / "clusters" / "one" / "cluster.json").read_text())["nodes"] == ["node-a", "node-b"]
