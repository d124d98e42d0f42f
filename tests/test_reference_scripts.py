"""What makes a run a reference record, and puts an adapter into the package."""

import base64
import io
import json
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from codetrace.core.errors import BadInput
from codetrace.core.files import file_sha256, read_json
from codetrace.core.records import Records, read_records
from codetrace.models import folders
from codetrace.models.folders import adapter_folder
from codetrace.runs.rerun import compare_outputs

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import pictures
import reference
import ship_adapter

PACKED = Path(folders.__file__).resolve().parents[1] / "data" / "execution"  # As it is shipped


def test_a_table_in_one_part_has_the_same_rows(tmp_path):
    with Records(tmp_path / "said", key="n", part_rows=4) as records:
        records.append([{"n": n, "share": n / 7, "said": [n], "rare": n if n == 3 else None} for n in range(30)])
    before = read_records(tmp_path / "said")
    names = [f"said/{path.name}" for path in (tmp_path / "said").iterdir() if not path.name.startswith(".")]
    outputs = reference.merge_tables(tmp_path, {name: {} for name in [*names, "kept.json"]})
    assert read_records(tmp_path / "said").equals(before)
    parts = [name for name in outputs if name.startswith("said/part-")]
    assert len(parts) == 1 < sum("/part-" in name for name in names) and "kept.json" in outputs
    assert outputs[parts[0]]["sha256"] == file_sha256(tmp_path / parts[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["said"]


def test_a_column_that_is_left_out_is_not_compared(tmp_path):
    manifests = []
    for run in ("record", "again"):
        (tmp_path / run).mkdir()
        pq.write_table(pa.table({"n": [1, 2], "text": ["a", "b"]}), tmp_path / run / "rows.parquet")
        manifests.append({"folder": tmp_path / run, "outputs": {"rows.parquet": {"sha256": run}}})
    record, again = manifests
    outputs, dropped = reference.drop_columns(tmp_path / "record", record["outputs"], ["*.npy", "rows.parquet:text"])
    record |= {"outputs": outputs, "left_out": dropped}
    assert dropped == ["rows.parquet:text"] and pq.read_table(tmp_path / "record" / "rows.parquet").column_names == [
        "n"
    ]
    assert outputs["rows.parquet"]["sha256"] == file_sha256(tmp_path / "record" / "rows.parquet")
    (compared,) = compare_outputs(record, again)
    assert (compared.verdict, compared.where) == ("close", "not kept, and not compared: text")
    pq.write_table(pa.table({"n": [1, 3], "text": ["a", "b"]}), tmp_path / "again" / "rows.parquet")
    assert [compared.verdict for compared in compare_outputs(record, again)] == ["different"]
    again["outputs"]["rows.parquet"]["sha256"] = "without the column"
    pq.write_table(pa.table({"n": [1, 2]}), tmp_path / "again" / "rows.parquet")
    assert [compared.verdict for compared in compare_outputs(record, again)] == ["close"]


def test_a_column_of_a_table_in_parts_is_left_out(tmp_path):
    manifests = []
    for run in ("record", "again"):
        with Records(tmp_path / run / "cells", key="n", part_rows=2) as records:
            records.append([{"n": n, "effect": n / 7, "kl": n * 0.3} for n in range(5)])
        outputs = {f"cells/{path.name}": {"sha256": run} for path in (tmp_path / run / "cells").glob("part*")}
        manifests.append({"folder": tmp_path / run, "outputs": outputs})
    record, again = manifests
    reference.check_columns(tmp_path / "record", record["outputs"], ["cells:kl"])
    with pytest.raises(SystemExit, match="cells has no column 'prob', but"):
        reference.check_columns(tmp_path / "record", record["outputs"], ["cells:prob"])
    outputs, dropped = reference.drop_columns(tmp_path / "record", record["outputs"], ["cells:kl"])
    record |= {"outputs": outputs, "left_out": dropped}
    kept = read_records(tmp_path / "record" / "cells")
    assert dropped == ["cells:kl"] and len(outputs) == 2, "one part, and the list of parts"
    assert kept.equals(read_records(tmp_path / "again" / "cells").drop(columns="kl"))
    (compared,) = compare_outputs(record, again)
    assert (compared.output, compared.verdict) == ("cells", "close")
    assert compared.where == "not kept, and not compared: kl"


def test_a_column_that_is_rounded_is_close(tmp_path):
    manifests = []
    values = [0.0, -1 / 7, 12345.678, 3e-9, None]
    for run in ("record", "again"):
        with Records(tmp_path / run / "cells", key="n", part_rows=2) as records:
            records.append([{"n": n, "effect": value, "kl": 0.3 * n} for n, value in enumerate(values)])
        outputs = {f"cells/{path.name}": {"sha256": run} for path in (tmp_path / run / "cells").glob("part*")}
        manifests.append({"folder": tmp_path / run, "outputs": outputs})
    record, again = manifests
    reference.check_columns(tmp_path / "record", record["outputs"], [], ["cells:effect"])
    with pytest.raises(SystemExit, match="no column 'prob'"):
        reference.check_columns(tmp_path / "record", record["outputs"], [], ["cells:prob"])
    record["outputs"], _ = reference.drop_columns(tmp_path / "record", record["outputs"], [], ["cells:effect"])
    kept, whole = (read_records(tmp_path / run / "cells") for run in ("record", "again"))
    assert kept["effect"][4:].isna().all() and kept["kl"].equals(whole["kl"])
    assert kept["effect"][:4].tolist() == pytest.approx(values[:4], rel=2**-11, abs=0) and kept["effect"][1] != -1 / 7
    (compared,) = compare_outputs(record, again)
    assert (compared.output, compared.verdict) == ("cells", "close")
    assert [c.verdict for c in compare_outputs(record, again, tolerance=1e-6)] == ["different"]


def test_a_column_of_a_plain_table_is_rounded(tmp_path):
    schema = pa.schema({"n": pa.int64(), "said": pa.float32(), "share": pa.float64()})
    pq.write_table(
        pa.table({"n": [1, 2, 3], "said": [0.1, 0.2, 0.3], "share": [1 / 3, None, 7.0]}, schema),
        tmp_path / "rows.parquet",
    )
    outputs, dropped = reference.drop_columns(
        tmp_path, {"rows.parquet": {}}, ["rows.parquet:n"], ["rows.parquet:share"]
    )
    kept = pq.read_table(tmp_path / "rows.parquet")
    assert dropped == ["rows.parquet:n"] and kept.schema.equals(schema.remove(0))
    assert kept["share"].to_pylist() == [round(1 / 3 * 2**12) / 2**12, None, 7.0]
    assert kept["said"].to_pylist() == pytest.approx([0.1, 0.2, 0.3])
    assert outputs["rows.parquet"]["sha256"] == file_sha256(tmp_path / "rows.parquet")


def test_results_name_files_without_their_folders(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"said": "the model /data/mine/m.gguf", "other": "/data/yours/m.gguf"}, indent=1))
    folders = reference.folders_of_files({"parameters": {"model": "/data/mine/m.gguf", "n": 3, "names": ["a"]}})
    packed = json.loads(reference.packed_json(path, folders))
    assert packed == {"said": "the model m.gguf", "other": "/data/yours/m.gguf"}


def test_a_table_that_is_left_out_is_one_output_with_the_hash_of_its_parts(tmp_path):
    written = []
    for seed in (0, 0, 1):
        folder = tmp_path / str(len(written))
        with Records(folder / "said", key="n", part_rows=2) as records:
            records.append([{"n": n, "seed": seed} for n in range(7)])
        names = [f"said/{path.name}" for path in (folder / "said").iterdir() if path.suffix]
        written.append({"folder": folder, "outputs": {name: reference.facts_of(folder / name) for name in names}})
    record, equal, another = written
    assert sum("/part-" in name for name in record["outputs"]) == 4
    outputs, left_out = reference.without_parts_left_out(record["outputs"], [*record["outputs"], "loss.png"])
    assert left_out == ["loss.png", "said"] == sorted([*outputs, "loss.png"])
    record |= {"outputs": outputs, "left_out": left_out}
    assert [compared.verdict for compared in compare_outputs(record, equal)] == ["equal"]
    assert [compared.verdict for compared in compare_outputs(record, another)] == ["not kept"]
    some_kept = [name for name in equal["outputs"] if "part-00000" not in name]
    assert reference.without_parts_left_out(equal["outputs"], some_kept) == (equal["outputs"], sorted(some_kept))


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("rows.parquet:txt", r"rows\.parquet has no column 'txt', but n, text"),
        ("row.parquet:text", r"there is no table 'row\.parquet', but rows\.parquet"),
        ("parts/part-0.parquet:n", r"there is no table 'parts/part-0\.parquet'"),
    ],
)
def test_a_column_that_is_not_there_is_refused_before_anything_changes(pattern, reason, tmp_path):
    pq.write_table(pa.table({"n": [1, 2], "text": ["a", "b"]}), tmp_path / "rows.parquet")
    outputs = {name: {} for name in ("rows.parquet", "parts/part-0.parquet", "kept.json")}
    reference.check_columns(tmp_path, outputs, ["*.npy", "rows.parquet:text"])
    with pytest.raises(SystemExit, match=reason):
        reference.check_columns(tmp_path, outputs, ["rows.parquet:n", pattern])


def test_a_record_names_files_without_their_folders():
    output = {"data": {"text/plain": ["read /data/mine/m.gguf and ~/x/p.jsonl"]}}
    inputs = {"id": "record-inputs", "source": ["* model=/data/mine/m.gguf"]}
    code = {"id": "code", "source": ["model = '/data/mine/m.gguf'"], "outputs": [output]}
    typed = code | {"metadata": {"tags": ["injected-parameters"]}, "outputs": []}
    manifest = {"parameters": {"model": "/data/mine/m.gguf", "dreval": [f"{Path.home()}/x/p.jsonl"], "count": 3}}
    shown = reference.without_folders({"cells": [inputs, code, typed]}, manifest)["cells"]
    assert shown[0]["source"] == "* model=m.gguf" and shown[1]["source"] == ["model = '/data/mine/m.gguf'"]
    assert shown[1]["outputs"][0]["data"]["text/plain"] == "read m.gguf and p.jsonl"
    assert shown[2]["source"] == "model = 'm.gguf'"


def test_a_picture_keeps_a_colour_of_few_pixels():
    picture = Image.new("RGB", (120, 90), "white")
    draw = ImageDraw.Draw(picture)
    for i in range(60):  # more shades of grey than the palette has room for
        draw.line([(0, i), (119, i)], fill=(4 * i, 4 * i, 4 * i))
    draw.point([(5, 70), (6, 70)], fill=(214, 39, 40))
    written = io.BytesIO()
    picture.save(written, "PNG")
    small = pictures.in_few_colours(base64.b64encode(written.getvalue()).decode(), 64)
    red, green, blue = Image.open(io.BytesIO(base64.b64decode(small))).convert("RGB").getpixel((5, 70))
    assert red > 150 and max(green, blue) < 100


def test_pictures_of_a_notebook_get_smaller_and_show_the_same(tmp_path):
    written = io.BytesIO()
    shades = Image.linear_gradient("L").convert("RGB")
    ImageDraw.Draw(shades).line([(0, 9), (255, 60)], fill=(214, 39, 40))
    shades.save(written, "PNG")
    png = base64.b64encode(written.getvalue()).decode() + "\n"
    output = {"output_type": "display_data", "data": {"image/png": png, "text/plain": "ü"}, "metadata": {}}
    notebook = tmp_path / "chapter.ipynb"
    notebook.write_text(json.dumps({"cells": [{"outputs": [output], "source": "figure"}]}, ensure_ascii=False))
    pictures.main([str(notebook)])
    (cell,) = read_json(notebook)["cells"]
    small = cell["outputs"][0]["data"]["image/png"]
    assert cell | {"outputs": [output]} == {"outputs": [output], "source": "figure"}
    assert cell["outputs"][0]["data"]["text/plain"] == "ü"
    assert len(small) < len(png) / 2 and pictures.is_same_picture(png, small)
    assert not pictures.is_same_picture(png, pictures.in_few_colours(png, 2)), "so few colours are too few"


def test_a_report_leads_to_the_records_that_show_its_figures(tmp_path):
    report, shown = tmp_path / "report" / "r", tmp_path / "saes" / "20261130T172542072Z-675d0bbd" / "notebook.ipynb"
    for folder in (report, shown.parent):
        folder.mkdir(parents=True)
    shown.write_text("{}")
    (report / "kept.png").write_bytes(b"")
    text = "Run `20261130T172542072Z-675d0bbd`, 9 s\n\n![What?](gone.png)\n\n![What?](kept.png)\n\nRun `20261130T172542072Z-00000000`"
    assert reference.with_links_to_figures(text, report) == (
        "Run [`20261130T172542072Z-675d0bbd`](../../saes/20261130T172542072Z-675d0bbd/notebook.ipynb), 9 s\n\n"
        "![What?](kept.png)\n\nRun `20261130T172542072Z-00000000`"
    )


def test_json_on_one_line_is_the_same(tmp_path):
    values = {"a": [1, None, "ü"], "b": {"c": 0.1}}
    (tmp_path / "cards.json").write_text(json.dumps(values, indent=2))
    outputs = reference.pack_files(
        tmp_path, {"cards.json": {}, "gone.json": {"sha256": "x"}}, ".json", reference.packed_json
    )
    assert read_json(tmp_path / "cards.json") == values and (tmp_path / "cards.json").read_text().count("\n") == 1
    assert outputs["cards.json"]["sha256"] == file_sha256(tmp_path / "cards.json") and outputs["gone.json"] == {
        "sha256": "x"
    }


def test_an_adapter_in_eight_bits_is_nearly_the_same(tmp_path):
    source = adapter_folder("binding")
    ship_adapter.in_eight_bits(source, tmp_path / "small")
    whole, small = (load_file(folder / "adapter_model.safetensors") for folder in (source, tmp_path / "small"))
    alphas = [read_json(folder / "adapter_config.json")["lora_alpha"] for folder in (source, tmp_path / "small")]
    assert {weight.dtype for weight in small.values()} == {torch.float8_e4m3fn}
    for name_a in (name for name in whole if "lora_A" in name):
        name_b = name_a.replace("lora_A", "lora_B")
        exact, rounded = (
            alpha * state[name_b].float() @ state[name_a].float() for alpha, state in zip(alphas, (whole, small))
        )
        assert float((rounded - exact).norm()) == pytest.approx(0, abs=0.06 * float(exact.norm()))


def test_packed_weights_are_the_same_when_unpacked(tmp_path, monkeypatch):
    monkeypatch.setenv("CODETRACE_CACHE", str(tmp_path / "cache"))
    shutil.copytree(adapter_folder("execution"), tmp_path / "mine")
    weights = (tmp_path / "mine" / "adapter_model.safetensors").read_bytes()
    ship_adapter.pack_weights(tmp_path / "mine")
    packed = tmp_path / "mine" / "adapter_model.safetensors.xz"
    assert packed.stat().st_size < 0.8 * len(weights) and not packed.with_suffix("").exists()
    unpacked = folders._unpacked_adapter(tmp_path / "mine")
    assert unpacked.parent == tmp_path / "cache" and (unpacked / packed.stem).read_bytes() == weights
    assert folders.check_adapter_folder(unpacked) == "smollm2"


def test_damaged_packed_weights_say_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CODETRACE_CACHE", str(tmp_path / "cache"))
    shutil.copytree(PACKED, tmp_path / "mine")
    packed = tmp_path / "mine" / "adapter_model.safetensors.xz"
    whole = packed.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"not xz" + whole):
        packed.write_bytes(damaged)
        with pytest.raises(BadInput, match=r"adapter_model\.safetensors\.xz is damaged"):
            folders._unpacked_adapter(tmp_path / "mine")
    packed.write_bytes(whole)
    assert (folders._unpacked_adapter(tmp_path / "mine") / packed.stem).is_file()


def test_a_python_without_lzma_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CODETRACE_CACHE", str(tmp_path / "cache"))
    shutil.copytree(PACKED, tmp_path / "mine")
    monkeypatch.setitem(sys.modules, "lzma", None)
    with pytest.raises(BadInput, match=r"cannot be unpacked, for this Python was built without lzma: install liblzma"):
        folders._unpacked_adapter(tmp_path / "mine")
