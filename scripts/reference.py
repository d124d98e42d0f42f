"""Make a run a reference record: a copy under runs/reference/ that git keeps.

python scripts/reference.py RUN [--leave-out PATTERN ...] [--to FOLDER]

Pictures are left out, for the record shows them, in 32 colours; and what the patterns name (large weights, the rows of a training).
All of it stays listed in the manifest with its hash, under `left_out`; `codetrace rerun` makes it again. A record that
is a reference already is thinned where it is.
"""

import argparse
import base64
import fnmatch
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from codetrace.core.files import atomic_write, file_sha256, read_json, write_json
from codetrace.runs.manifest import resolve_run, stored_manifest
from codetrace.runs.record_layout import lay_out_record, record_title

HOME = Path(__file__).resolve().parents[1]
PICTURES = ("*.png", "*.svg")


def without_example_outputs(notebook: dict) -> dict:
    "A record whose chapter's examples, which say nothing about the run, show nothing."
    ids = [cell["id"] for cell in notebook["cells"]]
    tagged = [
        i for i, cell in enumerate(notebook["cells"]) if "injected-parameters" in cell["metadata"].get("tags", [])
    ]
    if "record-code" in ids and tagged:
        for cell in notebook["cells"][ids.index("record-code") : tagged[0]]:
            if cell["cell_type"] == "code":
                cell["outputs"] = []
    return notebook


def with_its_title(notebook: dict, manifest: dict) -> dict:
    "A record whose title is what records are called today."
    opening = notebook["cells"][0]
    if opening["id"] == "record-title":
        lines = "".join(opening["source"]).split("\n")
        opening["source"] = "\n".join([f"# {record_title(manifest)}", *lines[1:]])
    return notebook


_COLOURS = 32


def in_few_colours(png: str) -> str:
    "A picture, as notebooks hold it, with a palette; itself where that is no smaller."
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    if picture.mode == "P" and len(picture.getcolors() or ()) <= _COLOURS:
        return png
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture.convert("RGBA"))
    written = io.BytesIO()
    white.convert("RGB").quantize(_COLOURS).save(written, "PNG", optimize=True)
    small = base64.b64encode(written.getvalue()).decode()
    return small if len(small) < len(png) else png


def with_small_pictures(notebook: dict) -> dict:
    "A record whose pictures take a quarter of the room."
    outputs = [output.get("data", {}) for cell in notebook["cells"] for output in cell.get("outputs", [])]
    for data in outputs:
        if "image/png" in data:
            data["image/png"] = in_few_colours("".join(data["image/png"]))
    return notebook


def thin(folder: Path, patterns: Sequence[str]) -> list[str]:
    "Remove outputs that match a pattern, and lay the record out; names of all that is left out by now."
    manifest = stored_manifest(folder)
    matching = {name for name in manifest["outputs"] if any(fnmatch.fnmatch(name, p) for p in patterns)}
    left_out = sorted(matching | set(manifest.get("left_out", [])))
    for name in left_out:
        (folder / name).unlink(missing_ok=True)
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()
    changes = {"left_out": left_out} if left_out else {}
    record = folder / "notebook.ipynb"
    if record.is_file():
        lay_out_record(folder, manifest)
        write_json(record, with_small_pictures(with_its_title(without_example_outputs(read_json(record)), manifest)))
        changes["notebook"] = {"sha256": file_sha256(record)}
    atomic_write(folder / "run.json", in_few_lines(read_json(folder / "run.json") | changes))
    return left_out


def in_few_lines(manifest: dict) -> str:
    "A manifest as JSON, a line for each of its facts."
    lines = [f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in manifest.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run id or folder of a complete run")
    parser.add_argument("--leave-out", nargs="*", default=[], metavar="PATTERN", help="outputs that are not kept")
    parser.add_argument("--to", type=Path, default=HOME / "runs" / "reference", help="default: %(default)s")
    options = parser.parse_args()
    manifest = resolve_run(options.run)
    source = Path(manifest["folder"])
    target = options.to.resolve() / manifest["phase"] / manifest["run_id"]
    if source.resolve() != target:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*"))
        write_json(target / "run.json", {key: value for key, value in manifest.items() if key != "folder"})
    thin(target, [*PICTURES, *options.leave_out])
    print(target)


if __name__ == "__main__":
    main()
