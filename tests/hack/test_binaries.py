from pathlib import Path

import pytest

from hack.clusters import binaries
from hack.clusters.binaries import CONFORMANCE, COREDNS, KUBERNETES, MODULES, PAUSE, Module


def program(directory: Path, name: str, said: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    path.write_text(f"#!/bin/sh\necho '{said}'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in which everything is built already, and a machine that has no program of Kubernetes by itself."""
    monkeypatch.setenv("KUBEPCAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    for module in MODULES:
        for name in module.programs:
            program(tmp_path / "cache" / "bin" / f"{module.name}-{module.digest()}", name, "built")
    return tmp_path / "cache" / "bin"


def test_a_program_in_the_pinned_version_is_taken_from_the_assets_before_the_path(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = f"Kubernetes {KUBERNETES.version('k8s.io/kubernetes')}"
    assets = program(tmp_path / "assets", "kube-apiserver", version)
    path = program(tmp_path / "path", "kube-apiserver", version)
    monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
    assert binaries.find("kube-apiserver") == path
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(assets.parent))
    assert binaries.find("kube-apiserver") == assets


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("kube-apiserver", "Kubernetes v1.30.0"),
        ("kubelet", "Kubernetes v1.36.30"),
        ("kubectl", "Client Version: v1.29.1"),
        ("etcd", "etcd Version: 3.4.0"),
        ("kube-proxy", "it says nothing of a version"),
        ("coredns", "CoreDNS-1.0"),
    ],
)
def test_a_program_in_another_version_is_passed_over(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    path = program(tmp_path / "path", name, said)
    monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
    assert binaries.find(name).is_relative_to(cached)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("kubectl", "Client Version: v1.36.3\nKustomize Version: v5.8.1"),
        ("kubelet", "Kubernetes v1.36.3"),
        ("etcd", "etcd Version: 1.36.3\nGit SHA: not built with a SHA\nGo Version: go1.26"),
    ],
)
def test_the_version_is_read_from_what_each_program_prints(tmp_path: Path, name: str, said: str) -> None:
    assert binaries.said_version(program(tmp_path, name, said)) == "1.36.3"


def test_a_program_that_cannot_run_has_no_version(tmp_path: Path) -> None:
    path = program(tmp_path, "kubelet", "")
    path.write_text("no program")
    path.chmod(0o755)
    assert binaries.said_version(path) is None


def test_another_pin_is_another_place_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binaries, "HACK", tmp_path)
    (tmp_path / "coredns" / "part").mkdir(parents=True)
    module = Module("coredns", {"coredns": "."})
    digests = set()
    for version in ("1.14.6", "1.14.7"):
        (tmp_path / "coredns" / "go.mod").write_text(f"module x\n\ngo 1.26\n\nrequire example.org/x v{version}\n")
        assert module.version("example.org/x") == f"v{version}"
        digests.add(module.digest())
    (tmp_path / "coredns" / "part" / "main.go").write_text("package main\n")
    digests.add(module.digest())
    assert len(digests) == 3


def test_kubernetes_is_told_the_version_that_it_is_built_from() -> None:
    version = KUBERNETES.version("k8s.io/kubernetes")
    assert f"gitVersion={version}" in KUBERNETES.linker_flags()
    assert {module.go_version >= (1, 26) for module in (KUBERNETES, COREDNS, PAUSE)} == {True}


@pytest.mark.parametrize("module", ["k8s.io/apiserver", "k8s.io/sample-apiserver"])
def test_the_server_that_ours_is_compared_with_is_of_the_clusters_version(module: str) -> None:
    assert CONFORMANCE.version(module).split(".")[1:] == KUBERNETES.version("k8s.io/kubernetes").split(".")[1:]
