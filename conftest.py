"""What all tests need before they are collected."""

import signal

import pytest

from prestage_tb.testplan import TestplanCheck

# A shell starts background jobs with Ctrl-C ignored, and children inherit that; tests of Ctrl-C
# need what a terminal gives.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Hold a run of all tests against the testplans, where the outcomes of all come together."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(TestplanCheck(config))
