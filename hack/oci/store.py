"""An OCI image layout on disk, shared by every checkout: blobs by digest, and which recipe gave which layer."""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import platform
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from hack.oci.recipe import Image

_TYPE = "application/vnd.oci.image"
_KEPT = 14 * 24 * 3600
ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())

Descriptor = dict[str, Any]


class Store:
    """Blobs and layers below one directory. What nobody used for two weeks is removed by `prune`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._blobs = directory / "blobs" / "sha256"
        self._layers = directory / "layers"
        for path in (self._blobs, self._layers):
            path.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One builder at a time; the others wait and then find what it built."""
        with (self.directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def layer(self, key: str, write: Callable[[IO[bytes]], None]) -> Descriptor:
        """The layer of a recipe with this key; `write` makes it when it isn't there."""
        record = self._layers / key
        with contextlib.suppress(FileNotFoundError):
            descriptor: Descriptor = json.loads(record.read_text())
            if self._use(descriptor):
                os.utime(record)
                return descriptor
        with tempfile.NamedTemporaryFile(dir=self._blobs, prefix=".new-", delete=False) as file:
            try:
                write(file.file)
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                descriptor = _descriptor("layer.v1.tar", digest, file.tell())
                os.rename(file.name, self._blobs / digest)
            except BaseException:
                os.unlink(file.name)
                raise
        record.write_text(json.dumps(descriptor))
        return descriptor

    def image(self, image: Image, layers: Sequence[Descriptor]) -> Descriptor:
        """Write an image's configuration and manifest; returns the manifest's descriptor."""
        settings = {
            "Env": [f"{name}={value}" for name, value in sorted(image.base.environment.items())],
            "Cmd": list(image.command),
            "User": image.base.user,
            "WorkingDir": image.base.directory,
        }
        config = {
            "architecture": ARCHITECTURE,
            "os": "linux",
            "config": settings,
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{_TYPE}.manifest.v1+json",
            "config": self._put("config.v1+json", config),
            "layers": list(layers),
        }
        return self._put("manifest.v1+json", manifest)

    def manifest(self, descriptor: Descriptor) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads(self._path(descriptor).read_text())
        return manifest

    def export(self, images: Mapping[str, Descriptor], output: IO[bytes]) -> None:
        """Write images, by full name, as an OCI archive for `ctr images import`; a shared layer is in it once."""
        manifests = []
        blobs: dict[str, Descriptor] = {}
        for reference, descriptor in images.items():
            manifest = self.manifest(descriptor)
            blobs |= {blob["digest"]: blob for blob in (descriptor, manifest["config"], *manifest["layers"])}
            annotations = {
                "io.containerd.image.name": reference,
                "org.opencontainers.image.ref.name": reference.rpartition(":")[2],
            }
            where = {"architecture": ARCHITECTURE, "os": "linux"}
            manifests.append(descriptor | {"platform": where, "annotations": annotations})
        with tarfile.open(fileobj=output, mode="w|") as archive:
            _add(archive, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
            _add(archive, "index.json", json.dumps({"schemaVersion": 2, "manifests": manifests}).encode())
            for blob in blobs.values():
                info = tarfile.TarInfo(f"blobs/sha256/{blob['digest'].removeprefix('sha256:')}")
                info.size = blob["size"]
                with self._path(blob).open("rb") as content:
                    archive.addfile(info, content)

    def prune(self) -> None:
        """Remove what was not used for two weeks: every change of a source file makes a new layer."""
        old = time.time() - _KEPT
        for path in (*self._layers.iterdir(), *self._blobs.iterdir(), *self.directory.glob("rootfs-*")):
            if path.stat().st_mtime < old:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def _put(self, kind: str, content: Mapping[str, Any]) -> Descriptor:
        data = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
        descriptor = _descriptor(kind, hashlib.sha256(data).hexdigest(), len(data))
        if not self._use(descriptor):
            draft = self._path(descriptor).with_suffix(".new")
            draft.write_bytes(data)
            draft.rename(self._path(descriptor))
        return descriptor

    def _use(self, descriptor: Descriptor) -> bool:
        """Whether the blob is there; if so it counts as used now."""
        try:
            os.utime(self._path(descriptor))
        except FileNotFoundError:
            return False
        return True

    def _path(self, descriptor: Descriptor) -> Path:
        return self._blobs / str(descriptor["digest"]).removeprefix("sha256:")


def _descriptor(kind: str, digest: str, size: int) -> Descriptor:
    return {"mediaType": f"{_TYPE}.{kind}", "digest": f"sha256:{digest}", "size": size}


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))
