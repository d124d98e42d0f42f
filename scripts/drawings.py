"""Figures as lines, for the PDF: a record keeps its own, packed; those of a chapter are drawn by executing it.

Single SVG files take five times the room of a packed one.
"""

import io
import lzma
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from pictures import is_same_picture, pictures_of
from tqdm.auto import tqdm

from codetrace.core.files import atomic_write, file_sha256, read_json, write_json

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


FORMATS = "from matplotlib_inline.backend_inline import set_matplotlib_formats\nset_matplotlib_formats('png', 'svg')"
QUIET = {"IN_TEST": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}


def same_drawings(shown: dict, executed: dict) -> Iterator[tuple[str, list[str]]]:
    "Of each cell with pictures: its id, and their drawings where all of them are what the chapter shows."
    executed_by_id = {cell["id"]: pictures_of(cell) for cell in executed["cells"]}
    for cell in shown["cells"]:
        pictures, drawn = pictures_of(cell), executed_by_id[cell["id"]]
        if pictures and len(pictures) == len(drawn):
            if all(is_same_picture(old["image/png"], new["image/png"]) for old, new in zip(pictures, drawn)):
                yield cell["id"], [new["image/svg+xml"] for new in drawn]


def draw_chapter(path: Path, cache: Path) -> dict[str, list[str]]:
    "SVGs of a chapter's figures, by cell; what was drawn before is kept."
    kept = cache / f"{path.stem}-{file_sha256(path)[:16]}.json"
    if not kept.exists():
        shown, executed = (nbformat.read(path, as_version=4) for _ in range(2))
        executed.cells.insert(0, nbformat.v4.new_code_cell(FORMATS))
        where = {"metadata": {"path": str(path.parent)}}
        client = NotebookClient(executed, timeout=900, resources=where, extra_arguments=["--log-level=CRITICAL"])
        client.execute(env=os.environ | QUIET)
        cache.mkdir(parents=True, exist_ok=True)
        write_json(kept, dict(same_drawings(shown, executed)))
    return read_json(kept)


def draw_chapters(paths: Sequence[Path], cache: Path) -> dict[Path, dict[str, list[str]]]:
    "Drawings of every chapter that shows pictures."
    with_pictures = [path for path in paths if '"image/png"' in path.read_text(encoding="utf-8")]
    drawings = {}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        drawn = {pool.submit(draw_chapter, path, cache): path for path in with_pictures}
        for done in tqdm(as_completed(drawn), "drawing the figures of chapters", len(drawn)):
            path = drawn[done]
            try:
                drawings[path] = done.result()
                n_cells = sum(bool(pictures_of(cell)) for cell in read_json(path)["cells"])
                if n_cells > len(drawings[path]):
                    print(
                        f"{path.name}: {len(drawings[path])} of {n_cells} figures as lines; its code draws the others anew (make execute NB={path})"
                    )
            except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
                reason = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip().splitlines()[-1]
                print(f"{path.name}: its figures stay pictures, for it fails: {reason}")
    return drawings
