"""What passes between an agent and the worker, and between two capturers that meet."""

import contextlib
import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest

from agent.capturer.protocol import FileStatus, Message, Reply, Report, State, Stop, encode
from agent.capturer.supervisor import Settings, Supervisor, open_captures
from tests.agent.world import HOST, Capturer, Pod, eventually


class TestChanges:
    def test_each_names_only_files_that_are_not_as_told_before(self, pod: Pod, capturer: Capturer) -> None:
        target = pod.target(max_file_bytes=50_000, snap_length=1000, max_files=100)
        capturer.start(target)
        for _ in range(20):
            pod.receive(200, size=500)
            capturer.report(flush=True)
        status = capturer.stop(target)
        told: list[FileStatus] = [
            file for change in capturer.changes for interface in change.interfaces for file in interface.files
        ]
        assert len(set(told)) == len(told)
        assert len(status.interfaces[0].files) > 30
        known = {file.name: file for file in told}
        assert [known[file.name] for file in status.interfaces[0].files] == list(status.interfaces[0].files)

    def test_a_reply_names_all_files(self, pod: Pod, capturer: Capturer) -> None:
        target = pod.target(max_file_bytes=50_000, max_files=100)
        capturer.start(target)
        pod.receive(1000, size=500)
        (status,) = capturer.report(flush=True)
        assert [file.name for file in status.interfaces[0].files] == [file.name for file in capturer.files(target)]


def test_replies_tell_one_worker_from_the_next(pod: Pod, capturer: Capturer) -> None:
    first = capturer.ask(Report(request=1001)).worker
    assert first > 0
    assert capturer.ask(Report(request=1002)).worker == first
    os.kill(capturer.worker_pid(), signal.SIGKILL)
    capturer.read_to_end()
    capturer.connect()
    assert capturer.ask(Report(request=1003)).worker > first


def test_each_target_is_told_in_a_message_of_its_own(pod: Pod, capturer: Capturer) -> None:
    """All files of all targets might be too much for one."""
    targets = [pod.target(capture_uid=str(uuid.uuid4()), ring_bytes=1 << 19) for _ in range(3)]
    for target in targets:
        capturer.start(target)
    capturer._channel.sendall(encode(Report(request=1001)))
    replies: list[Reply] = []
    while not replies or replies[-1].more:
        message = capturer.read()
        if isinstance(message, Reply):
            replies.append(message)
    assert [(reply.request, reply.more) for reply in replies] == [(1001, True)] * 3 + [(1001, False)]
    assert [[status.target for status in reply.targets] for reply in replies] == [[target] for target in targets] + [[]]


def test_a_worker_whose_supervisor_ended_before_it_began_ends_too(tmp_path: Path) -> None:
    captures = open_captures(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        descriptors = (listener.fileno(), captures)
        command = [sys.executable, "-m", "agent.capturer.worker", "--supervisor", "1", "--host-namespace", str(HOST)]
        command += ["--listener", str(descriptors[0]), "--captures", str(descriptors[1])]
        done = subprocess.run(command, pass_fds=descriptors, capture_output=True, text=True, check=False, timeout=20)
    os.close(captures)
    assert done.returncode == 1
    assert "the supervisor ended before the worker began" in done.stderr


def test_a_worker_that_cannot_be_started_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = 0

    def start(*_: object, **__: object) -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 3:
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(subprocess, "Popen", start)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD})
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            Supervisor(listener, captures=0, settings=Settings.parse({})).run()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    assert attempts == 3


def test_many_stops_at_once_hold_up_nobody(pod: Pod, capturer: Capturer) -> None:
    """Trap 10: closing a ring takes tens of milliseconds, so each is closed in its own thread."""
    targets = [pod.target(capture_uid=str(uuid.uuid4()), ring_bytes=1 << 19) for _ in range(100)]
    for target in targets:
        assert capturer.start(target).state is State.CAPTURING
    pod.receive(10)
    requests: list[Message] = [Stop(request=2000 + number, id=target.id) for number, target in enumerate(targets)]
    requests.append(Report(request=3000, ids=()))
    capturer._channel.sendall(b"".join(map(encode, requests)))
    order: list[int] = []
    packets: dict[str, int] = {}
    while len(order) < 101:
        message = capturer.read()
        if isinstance(message, Reply):
            order.append(message.request)
            for status in message.targets:
                packets[status.target.id] = status.interfaces[0].packets
    assert order[-1] != 3000, "asked last, and answered while stops are under way"
    assert packets == {target.id: 10 for target in targets}


class TestTwoCapturers:
    @pytest.fixture
    def second(self, capturer: Capturer, tmp_path: Path) -> subprocess.Popen[str]:
        """Another one on the same directory."""
        environment = os.environ | {
            "CAPTURER_SOCKET": str(tmp_path / "second.sock"),
            "DATA_DIRECTORY": str(capturer.directory),
            "HOST_NETWORK_NAMESPACE": str(HOST),
        }
        command = [sys.executable, "-m", "agent.capturer"]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def test_the_second_says_so_and_waits_for_the_first(
        self, tmp_path: Path, second: subprocess.Popen[str], capturer: Capturer
    ) -> None:
        assert second.stderr is not None
        with second.stderr as lines:
            assert "another capturer uses the directory" in lines.readline()
            assert not (tmp_path / "second.sock").exists()
            os.kill(capturer.process.pid, signal.SIGTERM)
            eventually((tmp_path / "second.sock").exists)
            second.terminate()
            assert second.wait(20) == 0

    def test_the_second_can_be_told_to_end_while_it_waits(self, second: subprocess.Popen[str]) -> None:
        assert second.stderr is not None
        with second.stderr as lines:
            lines.readline()
            second.terminate()
            assert second.wait(20) == 0

    def test_a_worker_that_outlives_its_supervisor_holds_the_directory(self, pod: Pod, tmp_path: Path) -> None:
        capturer = Capturer(tmp_path)
        capturer.start(pod.target())
        worker = capturer.worker_pid()
        os.kill(worker, signal.SIGSTOP)
        capturer.process.kill()
        capturer.process.wait()
        captures = open_captures(tmp_path)
        with pytest.raises(BlockingIOError):
            fcntl.flock(captures, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.kill(worker, signal.SIGCONT)

        def is_free() -> bool:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(captures, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            return False

        eventually(is_free)
        os.close(captures)
        capturer.read_to_end()
