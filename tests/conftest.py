"Shapes and types that the annotations of modules with arrays promise are checked at every call that a test makes."

import os

import jaxtyping
import pytest

# not programs, sandbox and runs: their many small calls would take three times as long, and hold no arrays
CHECKED = [f"codetrace.{name}" for name in ("core.metrics", "core.stats", "models", "patching", "sae", "steering")]
if os.environ.get("CODETRACE_CHECK_TYPES", "1") != "0":  # `make test` does without, `make test-slow` does not
    jaxtyping.install_import_hook(CHECKED, "runtime_types.checked")


@pytest.fixture
def wrong_types_pass():
    "For tests of what is said to arguments of a wrong type: the library shall say it, not the check."
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
