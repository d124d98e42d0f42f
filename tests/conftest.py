"Order of the tests; and shapes and types that annotations of modules with arrays promise, checked at every call that a test makes."

import gc
import os

import jaxtyping
import matplotlib
import pytest
from xdist.scheduler import LoadScopeScheduling

matplotlib.use("agg")  # also where a notebook's way of drawing was chosen before

# not programs, sandbox and runs: their many small calls would take three times as long, and hold no arrays
CHECKED = [f"codetrace.{name}" for name in ("core.metrics", "core.stats", "models", "patching", "sae", "steering")]
if os.environ.get("CODETRACE_CHECK_TYPES", "1") != "0":  # `make test` does without, `make test-slow` does not
    jaxtyping.install_import_hook(CHECKED, "runtime_types.checked")


# files whose tests take longest, by what was measured
LONG = ["runs", "sandbox", "steering", "generation", "binding", "tracing", "launch", "latents", "store", "notebooks"]


def pytest_collection_modifyitems(items: list[pytest.Item]):
    "Long files first, in their own order: no worker is left with one when the others have nothing to do."
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: (places.get(item.path.stem, len(places)), -item.path.stat().st_size))


class FilesTogether(LoadScopeScheduling):
    "A file, and what its tests share, stays with one worker; notebooks go one by one. (Groups of xdist 3.8 are lost with pytest 9.)"

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return nodeid if file.endswith("test_notebooks.py") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log) -> FilesTogether:
    return FilesTogether(config, log)


def pytest_collection_finish():
    "What imports have made stays: looking for garbage among it would take a tenth of the time."
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


@pytest.fixture
def wrong_types_pass():
    "For tests of what is said to arguments of a wrong type: the library shall say it, not the check."
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
