"""What a notebook cannot hold of `core.files` and `core.records`: kills, damaged files, full and read-only disks, and rows of every kind."""

import hashlib
import io
import json
import logging
import math
import os
import random
import resource
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codetrace.core import records as core_records
from codetrace.core.errors import BadInput
from codetrace.core.files import StorageError, atomic_write, file_sha256
from codetrace.core.records import DamagedRecords, DuplicateRow, Records, RecordsInUse, read_records

KEY = ("task_id", "sample")
N = 230
PART = 10


def row(i: int) -> dict:
    "Row `i` of the table that every test here writes; no column depends on when it was computed."
    value = {"task_id": f"T/{i // 5}", "sample": i % 5, "text": "é" * (i % 7), "score": i / 3 if i % 4 else math.nan}
    value |= {"ok": i % 2 == 0, "tokens": None if i % 9 == 0 else i, "metadata": {"depth": i % 3, "lines": [i, [i]]}}
    return value | ({"error": "timeout"} if i % 11 == 0 else {})


def key(i: int) -> tuple:
    return (f"T/{i // 5}", i % 5)


def _say_nothing(i: int):
    "For a writer that nobody listens to."


def write(folder: Path, n: int = N, part_rows: int = PART, say=_say_nothing) -> Records:
    "What a phase does: compute the rows that are missing."
    with Records(folder, KEY, part_rows=part_rows, checkpoint_rows=2 * part_rows) as records:
        done = records.done()
        for i in range(n):
            if key(i) not in done:
                records.append([row(i)])
                say(i)
    return records


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return write(tmp_path_factory.mktemp("whole") / "records").table()


def assert_whole(folder: Path, uninterrupted):
    pd.testing.assert_frame_equal(read_records(folder), uninterrupted, check_exact=True)
    assert not list(folder.glob("*.tmp")) and not list(folder.glob(".*.tmp"))
    assert len(list(folder.glob("checkpoint-*.json"))) <= 3


def in_child(function) -> int:
    "Run `function` in a forked process; its exit status, negative for a signal, 1 for an exception."
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


# --- kills ---------------------------------------------------------------------------------------------------------


def _kill_after(lines: int, folder: Path) -> tuple[int, bool]:
    "Fork a writer, kill it once it has said that many rows; the rows it said, and whether it was still writing."
    listener, speaker = os.pipe()
    if (writer := os.fork()) == 0:
        os.close(listener)
        write(folder, say=lambda i: os.write(speaker, b"."))
        os._exit(0)
    os.close(speaker)
    with open(listener, "rb", buffering=0) as rows:
        announced = sum(len(rows.read(1)) for _ in range(lines))
        os.kill(writer, signal.SIGKILL)
        announced += len(rows.readall())
    return announced, os.waitpid(writer, 0)[1] != 0


@pytest.mark.slow  # the quick test kills before every call that changes the disk
def test_killed_at_random_moments(tmp_path, uninterrupted):
    "Twenty writers are killed with SIGKILL; each costs at most the rows of a part, and the table ends up the same."
    rng = random.Random(0)
    kills = 0
    tables = [tmp_path / "0"]
    while kills < 20:
        folder = tables[-1]
        before = len(read_records(folder)) if any(folder.glob("part-*")) else 0
        announced, killed = _kill_after(rng.randrange(1, 22), folder)
        kills += killed
        after = len(read_records(folder)) if any(folder.glob("part-*")) else 0  # refuses doubled keys
        assert before + announced - PART < after <= before + announced + 1
        if after == N:
            assert_whole(folder, uninterrupted)
            tables.append(tmp_path / str(len(tables)))
    write(tables[-1])
    assert_whole(tables[-1], uninterrupted)


def _kill_at(step: int, folder: Path):
    "Write, and die just before the `step`-th call that changes the disk."
    count = 0

    def dying(call):
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapped

    core_records.os.fsync = dying(os.fsync)
    core_records.os.replace = dying(os.replace)
    core_records.Path.unlink = dying(Path.unlink)
    write(folder, 25)


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_every_call_that_changes_the_disk(tmp_path, stride):
    "Not only at random moments: before each fsync, rename and removal in turn, on a table that is resumed each time."
    whole = write(tmp_path / "whole", 25).table()
    for step in range(1, 100, stride):
        folder = tmp_path / str(step)
        first = in_child(lambda step=step, folder=folder: _kill_at(step, folder))
        second = in_child(lambda step=step, folder=folder: _kill_at(step // 2 + 1, folder))  # while it recovers
        assert {first, second} <= {0, -signal.SIGKILL}
        assert write(folder, 25).damaged == []
        assert_whole(folder, whole)
        if first == 0:
            break  # it has fewer steps
    assert 20 < step < 99


@pytest.mark.parametrize("moment", ["replace", "done"])
def test_interrupted_between_the_rename_and_the_note(tmp_path, monkeypatch, moment):
    "Ctrl-C after a part reached the disk and before the table knows: its rows are not written twice."
    records = Records(tmp_path, KEY, part_rows=PART)
    real = atomic_write

    def interrupted(path, data):
        real(path, data)
        if path.suffix == ".parquet":
            raise KeyboardInterrupt

    records.append(row(i) for i in range(PART - 1))
    monkeypatch.setattr(core_records, "atomic_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        records.append([row(PART - 1)])
    monkeypatch.setattr(core_records, "atomic_write", real)
    if moment == "done":  # more rows arrive, the part is cut elsewhere
        records.part_rows = 4
    records.append(row(i) for i in range(PART, 2 * PART))
    records.close()
    assert len(read_records(tmp_path)) == 2 * PART


# --- damage --------------------------------------------------------------------------------------------------------


def _truncate(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: Path):
    path.write_bytes(b"")


def _flip(path: Path, share: float = 0.5):
    data = bytearray(path.read_bytes())
    data[int(share * (len(data) - 1))] ^= 1
    path.write_bytes(data)


DAMAGE = {"truncated": _truncate, "emptied": _empty, "deleted": Path.unlink, "flipped": _flip}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("part", [0, 7, 22])
def test_a_damaged_part_is_named_and_only_it_is_computed_again(tmp_path, uninterrupted, caplog, how, part):
    write(tmp_path)
    name = sorted(p.name for p in tmp_path.glob("part-*"))[part]
    DAMAGE[how](tmp_path / name)
    with pytest.raises(DamagedRecords, match=name):
        read_records(tmp_path)
    computed = []
    with caplog.at_level(logging.WARNING):
        records = write(tmp_path, say=computed.append)
    assert records.damaged == [name] and name in caplog.text
    assert computed == list(range(part * PART, part * PART + PART))
    assert (tmp_path / f"{name}.damaged").exists() == (how != "deleted")
    assert_whole(tmp_path, uninterrupted)
    assert write(tmp_path).damaged == []  # said once


def test_every_flipped_byte_is_noticed(tmp_path):
    "Also in a part that no checkpoint lists yet: its name carries its hash."
    write(tmp_path, 10)
    for path in tmp_path.glob("checkpoint-*"):
        path.unlink()
    (part,) = tmp_path.glob("part-*")
    data = part.read_bytes()
    for position in range(0, len(data), 7):
        part.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(DamagedRecords):
            read_records(tmp_path)
    part.write_bytes(data)
    assert len(read_records(tmp_path)) == 10


@pytest.mark.parametrize("how", [*DAMAGE, "digit"])
def test_a_damaged_checkpoint_costs_nothing(tmp_path, uninterrupted, how):
    write(tmp_path)
    newest = max(tmp_path.glob("checkpoint-*"))
    if how == "digit":  # still JSON, but not what was written
        newest.write_text(newest.read_text().replace('"rows": 10', '"rows": 11', 1))
    else:
        DAMAGE[how](newest)
    computed = []
    assert write(tmp_path, say=computed.append).damaged == [] and not computed
    assert_whole(tmp_path, uninterrupted)


def test_all_damaged_at_once(tmp_path, uninterrupted):
    write(tmp_path)
    for path in tmp_path.iterdir():
        if path.is_file() and path.name[0] != ".":
            _flip(path, 0.3)
    computed = []
    assert len(write(tmp_path, say=computed.append).damaged) == N // PART
    assert computed == list(range(N))
    assert_whole(tmp_path, uninterrupted)


def _write_list(path: Path, **changes):
    "A list of parts with another content and a right digest."
    body = json.loads(path.read_text()) | changes
    body.pop("digest")
    path.write_text(json.dumps(body | {"digest": core_records._checkpoint_digest(body)}))


def _remove(paths):
    for path in paths:
        path.unlink()


def _newest(folder: Path, kind: str, n: int = 1) -> list[Path]:
    return sorted(folder.glob(f"{kind}-*"))[-n:]


def _checkpoints_and_a_part_gone(folder: Path):
    _remove([*folder.glob("checkpoint-*"), min(folder.glob("part-*"))])


def _newest_checkpoint_and_last_part_gone(folder: Path):
    _remove([*_newest(folder, "checkpoint"), *_newest(folder, "part")])


def _two_newest_checkpoints_and_last_parts_gone(folder: Path):
    _remove([*_newest(folder, "checkpoint", 2), *_newest(folder, "part", 2)])


def _all_lists_gone(folder: Path):
    _remove(list(folder.glob("*.json")))


def _all_lists_and_last_part_gone(folder: Path):
    _remove([*folder.glob("*.json"), *_newest(folder, "part")])


def _list_is_deep(folder: Path):
    (folder / "parts.json").write_text("[" * 100_000)


def _list_is_empty(folder: Path):
    (folder / "parts.json").write_text("[]")


def _list_is_null(folder: Path):
    (folder / "parts.json").write_text("null")


def _list_names_another_folder(folder: Path):
    _write_list(folder / "parts.json", parts=[{"name": "../../etc/passwd", "sha256": "0" * 64, "rows": 1}])


def _list_has_a_part_without_name(folder: Path):
    _write_list(folder / "parts.json", parts=[{}])


def _part_is_a_link_to_itself(folder: Path):
    part = min(folder.glob("part-*"))
    part.unlink()
    part.symlink_to(part)


def _part_with_content(folder: Path, data: bytes):
    (folder / f"part-00097-{hashlib.sha256(data).hexdigest()[:16]}.parquet").write_bytes(data)


def _part_is_no_parquet(folder: Path):
    _part_with_content(folder, b"this is no Parquet")


def _part_is_another_table(folder: Path):
    data = io.BytesIO()
    pd.DataFrame({"z": [1]}).to_parquet(data)
    _part_with_content(folder, data.getvalue())


NOT_WHOLE = [
    _checkpoints_and_a_part_gone,
    _newest_checkpoint_and_last_part_gone,
    _two_newest_checkpoints_and_last_parts_gone,
    _all_lists_gone,
    _all_lists_and_last_part_gone,
    _list_is_deep,
    _list_is_empty,
    _list_is_null,
    _list_names_another_folder,
    _list_has_a_part_without_name,
    _part_is_a_link_to_itself,
    _part_is_no_parquet,
    _part_is_another_table,
]


@pytest.mark.parametrize("how", NOT_WHOLE)
def test_a_table_that_cannot_be_proved_whole_is_an_error(tmp_path, uninterrupted, how):
    "Reading says so in one line; opening finds what is missing, and the same command computes it again."
    write(tmp_path)
    how(tmp_path)
    with pytest.raises(DamagedRecords) as error:
        read_records(tmp_path)
    assert "repeat the command" in str(error.value) and "\n" not in str(error.value)
    write(tmp_path)
    assert_whole(tmp_path, uninterrupted)


@pytest.mark.parametrize("content", ["[]", "null", "3", '"x"', "[" * 100_000, '{"digest": 3}', "NaN", "9" * 5000])
def test_an_odd_checkpoint_costs_nothing(tmp_path, uninterrupted, content):
    write(tmp_path)
    for path in tmp_path.glob("checkpoint-*"):
        path.write_text(content)
    assert_whole(tmp_path, uninterrupted)
    assert write(tmp_path).damaged == []


def test_text_that_is_no_unicode_is_made_visible_once(tmp_path):
    with Records(tmp_path, "k") as records:
        records.append([{"k": 0, "text": "\ud800\x00", "list": ["\udfff"]}])
    (stored,) = read_records(tmp_path, as_rows=True)
    assert stored == {"k": 0, "text": "\\ud800\x00", "list": ["\udfff"]}
    with Records(tmp_path / "again", "k") as records:
        records.append([stored])
    assert read_records(tmp_path / "again", as_rows=True) == [stored]


def test_a_copied_part_is_refused(tmp_path):
    write(tmp_path, 20)
    first = min(tmp_path.glob("part-*"))
    (tmp_path / first.name.replace("part-00000", "part-00009")).write_bytes(first.read_bytes())
    with pytest.raises(DuplicateRow, match="part-00009"):
        Records(tmp_path, KEY)
    with pytest.raises(DuplicateRow, match="occurs twice"):
        read_records(tmp_path)


# --- layout --------------------------------------------------------------------------------------------------------


def test_parts_and_checkpoints(tmp_path):
    with Records(tmp_path, KEY) as records:
        for start in range(0, 420, 64):
            records.append(row(i) for i in range(start, min(start + 64, 420)))
    rows = [p["rows"] for p in core_records._read_checkpoint(tmp_path)["parts"]]
    assert rows == [50] * 8 + [20]
    listed = [json.loads(p.read_text())["rows"] for p in sorted(tmp_path.glob("checkpoint-*"))]
    assert listed == [300, 400, 420]
    for part in core_records._read_checkpoint(tmp_path)["parts"]:
        assert file_sha256(tmp_path / part["name"]) == part["sha256"]


def test_a_refused_batch_leaves_nothing(tmp_path):
    with Records(tmp_path, KEY, part_rows=PART) as records:
        records.append([row(0)])
        for bad, error in [(row(0), DuplicateRow), (row(1), DuplicateRow), ({"sample": 1}, BadInput), ({}, BadInput)]:
            with pytest.raises(error):
                records.append([row(1), bad])
        assert records.done() == {key(0)} and len(records) == 1
        records.append([row(1)])
    assert read_records(tmp_path, as_rows=True)[1]["tokens"] == 1


def test_rows_are_kept_when_the_caller_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), Records(tmp_path, KEY) as records:
        records.append([row(0)])
        1 / 0
    assert len(read_records(tmp_path)) == 1


# --- other writers -------------------------------------------------------------------------------------------------


def test_a_second_writer_is_told_who_writes(tmp_path):
    with Records(tmp_path, KEY) as records:
        records.append([row(0)])
        code = f"from codetrace.core.records import Records; Records({str(tmp_path)!r}, {KEY!r})"
        second_writer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (
            second_writer.returncode == 1
            and f"RecordsInUse: {tmp_path}: process {os.getpid()} on " in second_writer.stderr
        )
        with pytest.raises(RecordsInUse):
            Records(tmp_path, KEY)
        assert len(records) == 1
    with Records(tmp_path, KEY) as records:
        assert len(records) == 1


def test_reading_while_it_is_written(tmp_path):
    with Records(tmp_path, KEY, part_rows=PART) as records:
        for i in range(35):
            records.append([row(i)])
        assert len(read_records(tmp_path)) == 30
        assert len(records.table()) == len(records.rows()) == 35


# --- disks that refuse ---------------------------------------------------------------------------------------------


def one_line(error) -> str:
    text = str(error.value)
    assert isinstance(error.value, StorageError) and "\n" not in text
    return text


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 96 KB, where this user may mount one."
    where = tmp_path / "disk"
    where.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", where], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root; the file size limit below tests the same path")
    yield where
    subprocess.run(["umount", "-l", where], check=True)


def test_full_disk(small_disk, uninterrupted):
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(40_000))
    with pytest.raises(StorageError) as error:
        write(small_disk / "records")
    assert "the disk is full; free some space" in one_line(error)
    assert str(small_disk / "records") in one_line(error)
    kept = len(read_records(small_disk / "records"))
    assert 0 < kept < N and not list((small_disk / "records").glob(".*.tmp"))
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=2m", small_disk], check=True)
    computed = []
    write(small_disk / "records", say=computed.append)
    assert len(computed) == N - kept
    assert_whole(small_disk / "records", uninterrupted)


def test_the_same_table_goes_on_after_space_is_made(small_disk):
    records = Records(small_disk / "records", KEY, part_rows=PART)
    ballast = small_disk / "ballast"
    with open(ballast, "wb", buffering=0) as f, pytest.raises(OSError):
        while True:
            f.write(bytes(4096))
    with pytest.raises(StorageError):
        records.append(row(i) for i in range(PART))
    ballast.unlink()
    records.append(row(i) for i in range(PART, 15))
    records.close()
    assert len(read_records(small_disk / "records")) == 15


def test_read_only_disk(small_disk):
    write(small_disk / "records", 20)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for folder in (small_disk / "records", small_disk / "new"):
        with pytest.raises(StorageError) as error:
            Records(folder, KEY)
        assert "the file system is read-only; choose a folder" in one_line(error)
    assert len(read_records(small_disk / "records")) == 20  # reading needs no writing


def test_file_size_limit(tmp_path):
    "A limit that any user can set stands in for the full disk; nothing half-written is left."

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        with pytest.raises(StorageError) as error:
            atomic_write(tmp_path / "file", bytes(101))
        assert "raise the limit" in one_line(error)

    assert in_child(limited) == 0
    assert list(tmp_path.iterdir()) == []


def test_missing_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)

    def unprivileged():
        if os.getuid() == 0:
            for folder in [tmp_path, *tmp_path.parents][:3]:
                folder.chmod(0o755)
            os.setuid(65534)
        with pytest.raises(StorageError) as error:
            Records(tmp_path / "locked" / "records", KEY)
        assert "permission is missing; choose a folder" in one_line(error)

    assert in_child(unprivileged) == 0


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "runs").write_text("")
    for folder in (tmp_path / "runs", tmp_path / "runs" / "records"):
        with pytest.raises(StorageError) as error:
            Records(folder, KEY)
        assert "a file stands where a folder is needed" in one_line(error)


# --- types ---------------------------------------------------------------------------------------------------------

text = st.text(st.characters(exclude_categories=["Cs"]))
inner = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
nested = st.recursive(inner, lambda v: st.lists(v, max_size=3) | st.dictionaries(text, v, max_size=3), max_leaves=6)
KINDS = {
    "bool": st.booleans(),
    "int": st.integers(-(2**63), 2**63 - 1),
    "float": st.floats(),
    "number": st.integers(-(2**53), 2**53) | st.floats(),
    "str": text,
    "bytes": st.binary(),
    "dict": st.dictionaries(text, nested, max_size=3),
    "list": st.lists(nested, max_size=3),
    "null": st.none(),
}


@st.composite
def tables(draw):
    "Rows whose columns have one kind each and are None or missing here and there."
    keys = draw(st.lists(st.tuples(text, st.integers(0, 5)), unique=True, min_size=1, max_size=12))
    columns = draw(st.dictionaries(text.filter(lambda n: n not in KEY), st.sampled_from(list(KINDS)), max_size=5))
    rows = []
    for task, sample in keys:
        values = {name: draw(st.none() | KINDS[kind]) for name, kind in columns.items() if draw(st.booleans())}
        rows.append({"task_id": task, "sample": sample} | values)
    return rows


def same(a, b) -> bool:
    "Equal in value and type, where NaN equals NaN; a whole number in a column of floats may have become a float."
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return a == b and (type(a) is type(b) or {type(a), type(b)} == {int, float})


@settings(max_examples=30, deadline=None)
@given(rows=tables(), data=st.data())
def test_what_goes_in_comes_out(tmp_path_factory, rows, data):
    "Whatever the order, the size of the parts and the number of restarts, the rows and the DataFrame are the same."
    whole_folder = tmp_path_factory.mktemp("types") / "whole"
    parts_folder = tmp_path_factory.mktemp("types") / "parts"
    with Records(whole_folder, KEY) as records:
        records.append(rows)
    columns = sorted({name for r in rows for name in r})
    in_order = sorted(rows, key=lambda r: (r["task_id"].encode(), r["sample"]))
    for written, stored in zip(in_order, records.rows(), strict=True):
        assert sorted(stored) == columns and list(stored)[:2] == list(KEY)
        assert all(same(written.get(name), stored[name]) for name in columns)
    for chunk in np.array_split(data.draw(st.permutations(rows)), data.draw(st.integers(1, 3))):
        with Records(parts_folder, KEY, part_rows=data.draw(st.integers(1, 4)), checkpoint_rows=3) as again:
            again.append(chunk)
    assert all(same(a, b) for a, b in zip(records.rows(), read_records(parts_folder, as_rows=True), strict=True))
    pd.testing.assert_frame_equal(records.table(), read_records(parts_folder), check_exact=True)


def test_numpy_goes_in_as_plain_values(tmp_path):
    values = {"i": np.int64(3), "f": np.float32(0.5), "b": np.bool_(True), "s": np.str_("x"), "a": np.arange(3)}
    with Records(tmp_path, "k") as records:
        records.append([{"k": np.int32(0)} | values])
    (stored,) = records.rows()
    assert stored == {"k": 0, "i": 3, "f": 0.5, "b": True, "s": "x", "a": [0, 1, 2]}
    assert [type(v) for v in stored.values()] == [int, list, bool, float, int, str]


def test_later_changes_of_a_row_do_not_reach_the_table(tmp_path):
    mutable = {"k": 0, "metadata": {"depth": 1}}
    with Records(tmp_path, "k") as records:
        records.append([mutable])
        mutable["metadata"]["depth"] = 2
    assert records.rows()[0]["metadata"] == {"depth": 1}


def test_import_is_light():
    code = "import sys, codetrace.core.records; print(sorted({'pandas', 'pyarrow', 'numpy', 'filelock', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_checkpoints_of_the_first_format_still_count():
    "The digest of such a checkpoint was made of the keys in the order in which they were written."
    body = {"format": 1, "key": ["k"], "rows": 0, "parts": []}
    assert core_records._checkpoint_digest(body) == hashlib.sha256(json.dumps(body).encode()).hexdigest()
