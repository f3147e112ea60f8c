import io
import os
import tarfile
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from hack.oci.layer import pack


def packed(root: Path, *paths: str) -> bytes:
    output = io.BytesIO()
    pack(root, paths or ["."], output)
    return output.getvalue()


def members(archive: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {member.name: member for member in tar}


def test_the_same_files_give_the_same_bytes_whenever_and_in_whatever_order_they_were_made(tmp_path: Path) -> None:
    for place, names in (("one", ["b", "a"]), ("two", ["a", "b"])):
        for name in names:
            path = tmp_path / place / name / "file"
            path.parent.mkdir(parents=True)
            path.write_text(name)
            os.utime(path, (len(place) * 1000, len(names[0]) * 77))
    assert packed(tmp_path / "one") == packed(tmp_path / "two")


def test_only_what_is_named_is_in_the_layer(tmp_path: Path) -> None:
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    assert set(members(packed(tmp_path, "in"))) == {"in", "in/file"}


def test_links_stay_links_and_devices_and_sockets_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "hard").hardlink_to(tmp_path / "file")
    (tmp_path / "soft").symlink_to("/nowhere")
    os.mkfifo(tmp_path / "fifo")
    found = members(packed(tmp_path))
    assert "fifo" not in found
    assert (found["soft"].type, found["soft"].linkname) == (tarfile.SYMTYPE, "/nowhere")
    assert (found["hard"].type, found["hard"].linkname) == (tarfile.LNKTYPE, "file")


def test_a_link_to_a_directory_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").touch()
    (tmp_path / "link").symlink_to("real")
    assert "link/file" not in members(packed(tmp_path))


@given(content=st.binary(max_size=2000), mode=st.sampled_from([0o644, 0o755, 0o600, 0o4755]))
def test_a_file_keeps_its_content_and_mode(content: bytes, mode: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "file"
        path.write_bytes(content)
        path.chmod(mode)
        archive = packed(Path(place), "file")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        member = tar.getmember("file")
        held = tar.extractfile(member)
        assert held is not None
        assert held.read() == content
    assert (member.mode, member.mtime) == (mode, 0)
