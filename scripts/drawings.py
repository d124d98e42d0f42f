"A record's figures as lines: every SVG of a run in one packed file, for single ones take five times the room."

import io
import lzma
import tarfile
from pathlib import Path

from codetrace.core.files import atomic_write

PACKED = "drawings.tar.xz"


def pack_drawings(folder: Path) -> None:
    "Keep the SVG files of a run as one; equal files give equal bytes."
    drawings = sorted(folder.glob("*.svg"))
    if not drawings:
        return
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for drawing in drawings:
            entry = tarfile.TarInfo(drawing.name)
            entry.size = drawing.stat().st_size
            archive.addfile(entry, io.BytesIO(drawing.read_bytes()))
    atomic_write(folder / PACKED, lzma.compress(written.getvalue(), preset=9 | lzma.PRESET_EXTREME))


def unpack_drawings(folder: Path, target: Path) -> None:
    "Write what a record's folder keeps into another, nothing where it keeps none."
    if (folder / PACKED).is_file():
        with tarfile.open(folder / PACKED) as archive:
            archive.extractall(target, filter="data")
