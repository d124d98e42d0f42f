"""nbdev's tests of all notebooks, one after the other, without drawing the figures that cells show.

Drawing takes a quarter of the time, and nobody sees the pictures; figures that phases save are drawn all the same, and `make test-slow` draws everything.
"""

import gc
import sys

import nbdev.test
from execnb.shell import CaptureShell

from codetrace.runs.warm_kernels import import_library


class ShellWithoutPictures(CaptureShell):
    "Gives figures as text."

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.display_formatter.formatters["image/png"].enabled = False


if __name__ == "__main__":
    nbdev.test.CaptureShell = ShellWithoutPictures
    import_library()
    gc.freeze()  # garbage is not looked for among what libraries have made
    gc.set_threshold(20_000)
    sys.exit(nbdev.test.nbdev_test(n_workers=1, timing=True))
