"""The command line of hack/images."""

import argparse
import sys
from pathlib import Path

from hack.clusters.failure import Failure
from hack.oci.build import builder, store
from hack.oci.dockerfile import dockerfile
from hack.oci.recipe import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="hack/images", description="The project's OCI images, made without a daemon from hack/images.toml."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="build what is stale into the cache and print digests and sizes")
    export = commands.add_parser("export", help="write images as an OCI archive, for `ctr images import` or skopeo")
    export.add_argument("file", type=Path)
    for command in (build, export):
        command.add_argument("names", nargs="*", metavar="NAME", help="all images when none is named")
    commands.add_parser("dockerfile", help="print the Dockerfile that builds the same images")
    arguments = parser.parse_args()
    try:
        run(arguments)
    except Failure as failure:
        sys.exit(f"hack/images: {failure}")


def run(arguments: argparse.Namespace) -> None:
    if arguments.command == "dockerfile":
        print(dockerfile(Recipe.load()), end="")
        return
    images = builder().build(arguments.names)
    if arguments.command == "export":
        with arguments.file.open("wb") as output:
            store().export(images, output)
        return
    for reference, descriptor in images.items():
        layers = store().manifest(descriptor)["layers"]
        sizes = " + ".join(f"{layer['size'] / 1e6:.1f}" for layer in layers)
        print(f"{reference:<32} {descriptor['digest'][:19]}  {sizes} MB")


if __name__ == "__main__":
    main()
