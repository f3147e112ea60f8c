"""Settings from the environment: of the agent, and of the capturer beside it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent.__main__ import settings
from agent.capturer.supervisor import Settings, SettingsError
from kube import serve

ROOT = Path(__file__).parents[2]


def test_the_nodes_name_is_needed_and_the_rest_has_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POD_NAME", "agent-1")
    monkeypatch.delenv("NODE_NAME", raising=False)
    with pytest.raises(serve.SettingsError, match="NODE_NAME"):
        settings()
    monkeypatch.setenv("NODE_NAME", "node-1")
    assert settings().socket == Settings.parse({}).socket
    assert settings().directory == Settings.parse({}).directory


def test_a_number_out_of_range_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POD_NAME", "agent-1")
    monkeypatch.setenv("NODE_NAME", "node-1")
    monkeypatch.setenv("MAX_RING_BYTES", "1")
    with pytest.raises(serve.SettingsError, match="MAX_RING_BYTES must be a number from 524288"):
        settings()


def test_direct_writes_are_asked_for_in_one_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POD_NAME", "agent-1")
    monkeypatch.setenv("NODE_NAME", "node-1")
    assert settings().direct is False
    monkeypatch.setenv("DIRECT_IO", "true")
    assert settings().direct is True
    monkeypatch.setenv("DIRECT_IO", "yes")
    with pytest.raises(serve.SettingsError, match="DIRECT_IO must be true or false, not 'yes'"):
        settings()


def test_the_agents_uid_must_be_a_number() -> None:
    with pytest.raises(SettingsError, match="AGENT_UID must be a number, not 'me'"):
        Settings.parse({"AGENT_UID": "me"})


@pytest.mark.parametrize(
    ("setting", "said"), [({"AGENT_UID": "me"}, "AGENT_UID"), ({"DATA_DIRECTORY": "/nowhere"}, "/nowhere/captures")]
)
def test_a_capturer_with_a_bad_setting_says_so_in_one_line(setting: dict[str, str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "agent.capturer"],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | setting,
        timeout=20,
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
