"""Options of the whole test run; they have to be known before pytest reads the folders below."""

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("soak", max_examples=100_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--keep", action="store_true", help="leave the end-to-end cluster up, and use it if it is")
