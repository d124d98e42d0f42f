"""nbdev's tests of all notebooks, as tests of pytest: a process for each phase, and one for each folder of the library.

Each process is forked from the one that has the library imported. Figures that cells show are not drawn: that takes a quarter of the time, and nobody sees the pictures; those that phases save are, and `make test-slow` draws everything.
"""

import os
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from execnb.shell import CaptureShell
from nbdev.config import get_config
from nbdev.doclinks import nbglob

from codetrace.core.environment import KERNELS_VARIABLE
from codetrace.runs.warm_kernels import fork_process, warm_kernels

HOME = Path(__file__).resolve().parents[1]
RUN_GROUP = (
    f"import sys; sys.path.insert(0, {str(HOME / 'scripts')!r}); import test_notebooks; test_notebooks.run_group()"
)


class ShellWithoutPictures(CaptureShell):
    "Gives figures as text."

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.display_formatter.formatters["image/png"].enabled = False


def run_group():
    "Test the notebooks that the command line names, in this process."
    import gc

    import nbdev.test

    gc.freeze()  # garbage is not looked for among what libraries have made
    gc.set_threshold(20_000)
    nbdev.test.CaptureShell = ShellWithoutPictures
    flags = get_config().tst_flags.split()
    passed = [nbdev.test.test_nb(Path(name), skip_flags=flags, basepath=HOME / "nbs")[0] for name in sys.argv[1:]]
    sys.exit(0 if all(passed) else 1)


def notebook_groups() -> dict[str, list[str]]:
    "Names of notebooks: each phase alone, others by folder."
    groups = defaultdict(list)
    for name in sorted(str(Path(path).resolve().relative_to(HOME)) for path in nbglob(HOME / "nbs")):
        folder = str(Path(name).parent)
        groups[name if folder == "nbs/phases" else folder].append(name)
    return groups


GROUPS = notebook_groups()


@pytest.fixture(scope="session")
def server():
    "The process that has the library imported: the one that waits already, or a new one."
    with warm_kernels() as path:
        yield path


@pytest.mark.parametrize("group", GROUPS)
def test_notebooks_run(group, server, tmp_path):
    log = tmp_path / "log"
    with open(log, "w") as output, open(os.devnull) as nothing:
        files = (nothing.fileno(), output.fileno(), output.fileno())
        variables = os.environ | {KERNELS_VARIABLE: server}
        process = fork_process(RUN_GROUP, GROUPS[group], variables, HOME, files)
        assert process is not None, "no process was forked: was the library changed meanwhile?"
        status = process.wait()
    assert status == 0, log.read_text()[-6000:]
