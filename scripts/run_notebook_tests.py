"""nbdev's tests of all notebooks, two at a time, without drawing the figures that cells show.

Drawing takes a quarter of the time, and nobody sees the pictures; figures that phases save are drawn all the same, and `make test-slow` draws everything.
"""

import sys

import nbdev.test
from execnb.shell import CaptureShell


class ShellWithoutPictures(CaptureShell):
    "Gives figures as text."

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.display_formatter.formatters["image/png"].enabled = False


if __name__ == "__main__":
    nbdev.test.CaptureShell = ShellWithoutPictures
    sys.exit(nbdev.test.nbdev_test(n_workers=2, timing=True))
