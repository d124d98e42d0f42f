"""Make a run a reference record: a copy under runs/reference/ that git keeps.

python scripts/reference.py RUN [--leave-out PATTERN ...] [--round TABLE:column ...] [--to FOLDER]

Pictures are left out, for the record shows them, in 64 colours, and for the PDF one packed file holds them as lines. What the patterns name (large
weights, the rows of a training; `samples.parquet:token_ids` is a column of a table) is left out, too. What is left out stays listed in the manifest
under `left_out`, a file with its hash; `codetrace rerun` makes it again, and compares what is kept.
A column that is rounded keeps 11 bits of each number, one part in 2,048 (what a figure can show), in a third of the room; it is listed under `rounded`.
A table in many small parts is kept as one part with the same rows, any other table compressed as far as it can be, JSON on one line. A record
that is a reference already is thinned where it is.
"""

import argparse
import fnmatch
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from drawings import pack_drawings
from pictures import in_few_colours, pictures_of

from codetrace.core.files import atomic_write, file_sha256, read_json, small_parquet_options, write_json
from codetrace.core.records import Records, read_records
from codetrace.runs.manifest import resolve_run, stored_manifest
from codetrace.runs.record_layout import lay_out_record, record_opening, with_live_links
from codetrace.runs.rerun import table_sha256

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


def with_its_opening(notebook: dict, manifest: dict) -> dict:
    "A record that opens as records do today."
    opening = notebook["cells"][0]
    if opening["id"] == "record-title":
        opening["source"] = record_opening(manifest)
    return notebook


def folders_of_files(manifest: dict) -> set[str]:
    "The folders, of one machine, of the files that a record's parameters name."
    values = [value for parameter in manifest["parameters"].values() for value in np.atleast_1d(parameter)]
    folders = {f"{Path(value).parent}/" for value in values if isinstance(value, str) and Path(value).is_absolute()}
    return folders | {folder.replace(str(Path.home()), "~", 1) for folder in folders}


def without_folders(notebook: dict, manifest: dict) -> dict:
    "A record that calls the files that its parameters name by their names, without the folders of one machine."
    for folder in folders_of_files(manifest):
        for cell in notebook["cells"]:
            if cell["id"].startswith("record-") or "injected-parameters" in cell.get("metadata", {}).get("tags", []):
                cell["source"] = "".join(cell["source"]).replace(folder, "")
            for data in (output.get("data", {}) for output in cell.get("outputs", [])):
                for kind in data.keys() & {"text/plain", "text/html", "text/markdown"}:
                    data[kind] = "".join(data[kind]).replace(folder, "")
    return notebook


_RUN = re.compile(r"Run `(\d{8}T\d+Z-[0-9a-f]{8})`")
_PICTURE = re.compile(r"!\[[^\]]*\]\(([\w.-]+)\)\n*")


def with_links_to_figures(text: str, folder: Path) -> str:
    "A report in Markdown without pictures that are not kept; it leads to the records that show them."

    def link(match: re.Match) -> str:
        shown = next(folder.parents[1].glob(f"*/{match[1]}/notebook.ipynb"), None)
        return f"Run [`{match[1]}`]({os.path.relpath(shown, folder)})" if shown else match[0]

    return _RUN.sub(link, _PICTURE.sub(lambda match: match[0] if (folder / match[1]).is_file() else "", text))


def with_links_that_lead(notebook: dict, folder: Path) -> dict:
    "A record whose links lead from where it is kept."
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = with_live_links("".join(cell["source"]), folder)
        for data in (output.get("data", {}) for output in cell.get("outputs", [])):
            if "text/markdown" in data:
                shown = with_live_links("".join(data["text/markdown"]), folder)
                data["text/markdown"] = with_links_to_figures(shown, folder)
    return notebook


_COLOURS = 64


def with_small_pictures(notebook: dict) -> dict:
    "A record whose pictures take a quarter of the room."
    for data in (data for cell in notebook["cells"] for data in pictures_of(cell)):
        data["image/png"] = in_few_colours("".join(data["image/png"]), _COLOURS)
    return notebook


_KEPT_BITS = 11


def rounded_number(value: float) -> float:
    "A number with its first bits."
    mantissa, exponent = np.frexp(value)
    return float(np.ldexp(np.round(mantissa * 2**_KEPT_BITS) / 2**_KEPT_BITS, exponent))


def merge_parts(table: Path, without: Sequence[str] = (), rounded: Sequence[str] = ()) -> None:
    "Replace the parts of a table by one with the same rows, without some columns, and with others rounded."
    rows = [{name: row[name] for name in row if name not in without} for row in read_records(table, as_rows=True)]
    for row in rows:
        row |= {name: rounded_number(row[name]) for name in rounded if row[name] is not None}
    key = json.loads(pq.read_schema(next(table.glob("part-*.parquet"))).metadata[b"key"])
    merged = table.with_name(f".{table.name}")
    shutil.rmtree(merged, ignore_errors=True)
    with Records(merged, key, part_rows=len(rows) + 1, checkpoint_rows=len(rows) + 1) as records:
        records.append(rows)
    before, after = read_records(table).drop(columns=[*without, *rounded]), read_records(merged)
    if not after.drop(columns=list(rounded)).equals(before):
        raise SystemExit(f"{table}: merged, its rows are others")
    for path in merged.glob("checkpoint-*.json"):
        path.unlink()  # the list of parts is proof enough
    for path in (merged / ".lock", *table.iterdir()):
        path.unlink(missing_ok=True)
    for path in merged.iterdir():
        path.rename(table / path.name)
    merged.rmdir()


def facts_of(path: Path) -> dict:
    "What a manifest says of an output."
    return {"sha256": file_sha256(path), "bytes": path.stat().st_size}


def tables_in_parts(folder: Path, outputs: dict) -> dict[str, Path]:
    "Folders of tables in parts, by name."
    tables = {(folder / name).parent for name in outputs if "/part-" in name}
    return {str(table.relative_to(folder)): table for table in sorted(tables) if list(table.glob("part-*.parquet"))}


def merge_tables(folder: Path, outputs: dict, patterns: Sequence[str] = (), rounded: Sequence[str] = ()) -> dict:
    "Facts about a record's outputs with each table in one part, written anew, without columns that patterns name, others rounded."
    for name, table in tables_in_parts(folder, outputs).items():
        of_table = [[column for home, column in named_columns(names) if home == name] for names in (patterns, rounded)]
        merge_parts(table, *of_table)
        outputs = {output: facts for output, facts in outputs.items() if not output.startswith(f"{name}/")}
        for path in sorted(table.iterdir()):
            outputs[f"{name}/{path.name}"] = facts_of(path)
    return outputs


def with_rounded_column(table: pa.Table, column: str) -> pa.Table:
    "A table with the numbers of one column rounded."
    values = [None if value is None else rounded_number(value) for value in table[column].to_pylist()]
    place = table.schema.get_field_index(column)
    return table.set_column(place, table.schema.field(column), pa.array(values, table.schema.field(column).type))


def drop_columns(
    folder: Path, outputs: dict, patterns: Sequence[str], rounded: Sequence[str] = ()
) -> tuple[dict, list[str]]:
    "Facts about a record's outputs, each table in one part, without the columns that patterns with a colon name, others rounded; and names of those without."
    outputs = merge_tables(folder, outputs, patterns, rounded)
    changes = [
        (name, lambda table, column=column: table.drop_columns(column)) for name, column in named_columns(patterns)
    ]
    changes += [(name, partial(with_rounded_column, column=column)) for name, column in named_columns(rounded)]
    for name, change in changes:
        if (folder / name).is_file():
            written = io.BytesIO()
            pq.write_table(change(pq.read_table(folder / name)), written)
            atomic_write(folder / name, written.getvalue())
            outputs[name] = facts_of(folder / name)
    return outputs, [f"{name}:{column}" for name, column in named_columns(patterns)]


def named_columns(patterns: Sequence[str]) -> list[list[str]]:
    "The tables and columns that patterns with a colon name."
    return [pattern.split(":", 1) for pattern in patterns if ":" in pattern]


def check_columns(folder: Path, outputs: dict, patterns: Sequence[str], rounded: Sequence[str] = ()) -> None:
    "Refuse patterns that name no column of a table of a record, before anything is changed."
    in_parts = {name: next(table.glob("part-*")) for name, table in tables_in_parts(folder, outputs).items()}
    tables = {name: folder / name for name in outputs if name.endswith(".parquet") and "/" not in name} | in_parts
    for name, column in named_columns([*patterns, *rounded]):
        if name not in tables:
            raise SystemExit(f"{name}:{column}: there is no table {name!r}, but {', '.join(sorted(tables)) or 'none'}")
        columns = pq.read_schema(tables[name]).names
        if column not in columns:
            raise SystemExit(f"{name} has no column {column!r}, but {', '.join(columns)}")


def packed_table(path: Path) -> bytes:
    "A table compressed as far as it can be."
    table, packed = pq.read_table(path), io.BytesIO()
    pq.write_table(table, packed, compression_level=19, **small_parquet_options(table.schema))
    return packed.getvalue()


def packed_json(path: Path, folders: Collection[str] = ()) -> bytes:
    "A JSON file on one line, without these folders."
    text = json.dumps(read_json(path), ensure_ascii=False, separators=(",", ":"))
    for folder in folders:
        text = text.replace(folder, "")
    return f"{text}\n".encode()


def pack_files(folder: Path, outputs: dict, suffix: str, packed: Callable[[Path], bytes]) -> dict:
    "Facts about a record's outputs with its files of one kind packed, where that makes them smaller."
    outputs = dict(outputs)
    for name in sorted(name for name in outputs if name.endswith(suffix) and "/" not in name):
        path = folder / name
        if path.is_file() and len(data := packed(path)) < path.stat().st_size:
            atomic_write(path, data)
            outputs[name] = facts_of(path)
    return outputs


def in_little_room(notebook: dict) -> str:
    "A record as JSON on one line, without the hour at which each cell began and ended."
    for cell in notebook["cells"]:
        for name in ("execution", "papermill"):
            cell["metadata"].pop(name, None)
    return json.dumps(notebook, ensure_ascii=False, separators=(",", ":")) + "\n"


def without_parts_left_out(outputs: dict, left_out: Sequence[str]) -> tuple[dict, list[str]]:
    "Facts about outputs, and names of what is left out, where a table that is left out with all its parts is one output."
    outputs, names = dict(outputs), set(left_out)
    parts = [name for name in outputs if "/part-" in name]
    for table in sorted({name.rsplit("/", 1)[0] for name in parts}):
        of_table = [name for name in parts if name.startswith(f"{table}/part-")]
        if names.issuperset(of_table):
            facts = [outputs[name] for name in of_table]
            sha256 = table_sha256(part["sha256"] for part in facts)
            gone = {name for name in names if name.startswith(f"{table}/")}  # and lists of its parts
            outputs = {name: fact for name, fact in outputs.items() if name not in gone}
            outputs[table] = {"sha256": sha256, "bytes": sum(part["bytes"] for part in facts)}
            names = (names - gone) | {table}
    return outputs, sorted(names)


def thin(folder: Path, patterns: Sequence[str], rounded: Sequence[str] = ()) -> list[str]:
    "Remove outputs that match a pattern, and lay the record out; names of all that is left out by now."
    manifest = stored_manifest(folder)
    matching = {name for name in manifest["outputs"] if any(fnmatch.fnmatch(name, p) for p in patterns)}
    left_out = sorted(matching | set(manifest.get("left_out", [])))
    pack_drawings(folder)
    for name in left_out:
        if not (folder / name).is_dir():
            (folder / name).unlink(missing_ok=True)
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()
    outputs, dropped = drop_columns(folder, manifest["outputs"], patterns, rounded)
    outputs, left_out = without_parts_left_out(outputs, [*left_out, *dropped])
    changes: dict[str, object] = {"left_out": left_out} if left_out else {}
    if all_rounded := sorted({*manifest.get("rounded", []), *rounded}):
        changes["rounded"] = all_rounded
    outputs = pack_files(folder, outputs, ".parquet", packed_table)
    changes["outputs"] = pack_files(folder, outputs, ".json", partial(packed_json, folders=folders_of_files(manifest)))
    record = folder / "notebook.ipynb"
    if record.is_file():
        lay_out_record(folder, manifest)
        shown = without_folders(with_its_opening(without_example_outputs(read_json(record)), manifest), manifest)
        atomic_write(record, in_little_room(with_small_pictures(with_links_that_lead(shown, folder))))
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
    parser.add_argument(
        "--round", nargs="*", default=[], metavar="TABLE:COLUMN", help="columns whose numbers keep 11 bits"
    )
    parser.add_argument("--to", type=Path, default=HOME / "runs" / "reference", help="default: %(default)s")
    options = parser.parse_args()
    manifest = resolve_run(options.run)
    source = Path(manifest["folder"])
    patterns = [pattern for pattern in options.leave_out if pattern not in manifest.get("left_out", [])]
    check_columns(source, manifest["outputs"], patterns, options.round)
    target = options.to.resolve() / manifest["phase"] / manifest["run_id"]
    if source.resolve() != target:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*"))
        write_json(target / "run.json", {key: value for key, value in manifest.items() if key != "folder"})
    thin(target, [*PICTURES, *patterns], options.round)
    print(target)


if __name__ == "__main__":
    main()
