"""Write the CustomResourceDefinitions in manifests/crds from the models: `hack/run python -m hack.generate_crds`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from api.capturenode import CaptureNode
from api.capturepolicy import CapturePolicy
from api.object import GROUP, VERSION, Model
from api.packetcapture import PacketCapture
from api.schema import structural

DIRECTORY = Path(__file__).parent.parent / "manifests" / "crds"


@dataclass(frozen=True)
class Definition:
    """What a CustomResourceDefinition says beside the schema."""

    model: type[Model]
    plural: str
    namespaced: bool
    short_names: list[str] = field(default_factory=list)
    status_subresource: bool = False
    columns: list[tuple[str, str, str]] = field(default_factory=list)
    """Name, type and JSONPath of each printer column."""

    def to_yaml(self) -> str:
        kind = self.model.__name__
        version: dict[str, Any] = {
            "name": VERSION,
            "served": True,
            "storage": True,
            "schema": {"openAPIV3Schema": self._schema(kind)},
            "additionalPrinterColumns": [
                {"name": name, "type": type_, "jsonPath": path} for name, type_, path in self.columns
            ],
        }
        if self.status_subresource:
            version["subresources"] = {"status": {}}
        names: dict[str, Any] = {"kind": kind, "listKind": f"{kind}List", "plural": self.plural}
        names["singular"] = kind.lower()
        if self.short_names:
            names["shortNames"] = self.short_names
        definition = {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": f"{self.plural}.{GROUP}", "labels": {"app.kubernetes.io/name": "kubepcap"}},
            "spec": {
                "group": GROUP,
                "scope": "Namespaced" if self.namespaced else "Cluster",
                "names": names,
                "versions": [version],
            },
        }
        header = "# Generated from api/ by `hack/run python -m hack.generate_crds`.\n"
        return header + yaml.safe_dump(definition, sort_keys=False, width=120)

    def _schema(self, kind: str) -> dict[str, Any]:
        schema = structural(self.model)
        schema["properties"] = {
            "apiVersion": {"type": "string", "description": f"{GROUP}/{VERSION}"},
            "kind": {"type": "string", "description": kind},
        } | schema["properties"]
        return schema


DEFINITIONS = [
    Definition(
        PacketCapture,
        plural="packetcaptures",
        namespaced=True,
        short_names=["pcap", "pcaps"],
        status_subresource=True,
        columns=[
            ("Phase", "string", ".status.phase"),
            ("Pods", "integer", ".status.pods"),
            ("Packets", "integer", ".status.packets"),
            ("Size", "integer", ".status.bytes"),
            ("Dropped", "integer", ".status.dropped"),
            ("Age", "date", ".metadata.creationTimestamp"),
        ],
    ),
    Definition(
        CapturePolicy,
        plural="capturepolicies",
        namespaced=False,
        columns=[
            ("Description", "string", ".spec.description"),
            ("Longest", "string", ".spec.limits.maxDuration"),
            ("Age", "date", ".metadata.creationTimestamp"),
        ],
    ),
    Definition(
        CaptureNode,
        plural="capturenodes",
        namespaced=False,
        columns=[
            ("Heartbeat", "date", ".status.heartbeatTime"),
            ("Free", "integer", ".status.disk.free"),
            ("Used", "integer", ".status.disk.used"),
            ("Version", "string", ".status.version"),
        ],
    ),
]


def main() -> None:
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for definition in DEFINITIONS:
        (DIRECTORY / f"{definition.plural}.yaml").write_text(definition.to_yaml())


if __name__ == "__main__":
    main()
