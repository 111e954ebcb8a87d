"""No network, few threads, and upstream deprecations of what we call are failures."""

import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that wait asleep: beside another busy process, spinning ones make tiny models many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import pytest
import torch
import transformers

# The same inputs in every run, however slow the machine is.
hypothesis.settings.register_profile("project", derandomize=True, deadline=None)
hypothesis.settings.load_profile("project")
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
transformers.utils.logging.disable_progress_bar()


# What transformers calls itself although it deprecates it (assisted decoding).
UPSTREAM = ("Passing `generation_config` together with generation-related arguments",)


def pytest_report_header():
    return f"transformers {transformers.__version__}, torch {torch.__version__}"


LEVEL = logging.getLogger("learnpruner").level


class FailOnDeprecation(logging.Handler):
    """transformers announces removals in its log; what it announces of our calls breaks in a later release."""

    def emit(self, record):
        message = record.getMessage()
        if "deprecated" in message.lower() and not message.startswith(UPSTREAM):
            raise AssertionError(f"transformers deprecates something the project uses: {message}")


@pytest.fixture(autouse=True, scope="session")
def _no_deprecations():
    handler = FailOnDeprecation()
    transformers.utils.logging.add_handler(handler)
    yield
    transformers.utils.logging.remove_handler(handler)


@pytest.fixture(autouse=True)
def _log_level():
    """A command may quiet the package's log, in the process that it runs in; a fixture of a module, before any test."""
    logging.getLogger("learnpruner").setLevel(LEVEL)
    yield
    logging.getLogger("learnpruner").setLevel(LEVEL)
