import pytest

from apiserver.__main__ import Settings
from kube.serve import SettingsError

NUMBERS = ("PORT", "HEALTH_PORT", "DRAIN_SECONDS", "GRACE_SECONDS", "DOWNLOADS_PER_USER", "MAX_CONNECTIONS")


def test_without_an_environment_the_settings_are_those_of_the_manifests(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POD_NAMESPACE", *NUMBERS):
        monkeypatch.delenv(name, raising=False)

    settings = Settings.read()

    assert (settings.namespace, settings.port, settings.health_port) == ("kubepcap", 8443, 8080)
    assert settings.drain + settings.grace < 90  # terminationGracePeriodSeconds


@pytest.mark.parametrize("name", NUMBERS)
def test_a_setting_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "many")

    with pytest.raises(SettingsError, match=f"{name} must be a number"):
        Settings.read()
