"The site and the appendix: nothing is loaded from elsewhere, the search works from a disk, a notebook becomes a PDF."

import base64
import importlib
import importlib.util
import io
import json
import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
import smalldocs
import yaml
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

HOME = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HOME / "scripts"))
offline = importlib.import_module("offline")
pdf = importlib.import_module("pdf")
docs = importlib.import_module("docs")
api_index = importlib.import_module("api_index")
drawings = importlib.import_module("drawings")
pictures = importlib.import_module("pictures")
CDN = "https://cdn.jsdelivr.net/npm/katex@0.16.11/dist"


def site_of_one_page(folder: Path, head: str = "") -> Path:
    "What smalldocs leaves of a page with mathematics."
    page = folder / "nbs" / "core" / "stats.html"
    page.parent.mkdir(parents=True)
    scripts = f'<script src="{CDN}/katex.min.js"></script><script src="{CDN}/contrib/auto-render.min.js"></script>'
    page.write_text(
        f'<link rel="stylesheet" href="{CDN}/katex.min.css">{scripts}{head}<a href="https://arxiv.org">x</a>'
    )
    (folder / "site_libs").mkdir()
    shutil.copy(Path(smalldocs.__file__).parent / "assets" / "smalldocs.js", folder / "site_libs" / "smalldocs.js")
    (folder / "search.json").write_text(json.dumps([{"title": "stats\u2028", "href": "nbs/core/stats.html"}]))
    return folder


def test_mathematics_and_search_need_no_other_host(tmp_path):
    site = site_of_one_page(tmp_path)
    sheet = site / "site_libs" / "theme.css"
    sheet.write_text("@import url(https://fonts.googleapis.com/css2?family=A:wght@300;400&display=swap);body{margin:0}")
    offline.make_offline(site)
    assert sheet.read_text() == "body{margin:0}"
    page = (site / "nbs" / "core" / "stats.html").read_text()
    assert "jsdelivr" not in page and "https://arxiv.org" in page
    for name in ("katex.min.js", "auto-render.min.js", "katex.min.css"):
        assert f"../../site_libs/katex/{name}" in page and (site / "site_libs" / "katex" / name).is_file()
    style = (site / "site_libs" / "katex" / "katex.min.css").read_text()
    fonts = {part.partition(")")[0] for part in style.split("url(")[1:] if ".woff2" in part.partition(")")[0]}
    assert len(fonts) == 14 and all((site / "site_libs" / "katex" / font).is_file() for font in fonts)
    assert "siteSearchIndex" in (site / "site_libs" / "smalldocs.js").read_text()
    text = (site / "search.js").read_text()
    index = json.loads(text.partition("= ")[2].rstrip(";\n"))
    assert index[0]["title"] == "stats\u2028" and "\u2028" not in text


def test_what_is_loaded_from_elsewhere_is_refused(tmp_path):
    site = site_of_one_page(tmp_path, '<script src="https://example.org/track.js"></script>')
    with pytest.raises(SystemExit, match=r"example\.org"):
        offline.make_offline(site)


def test_a_book_is_read_as_quarto_and_as_smalldocs_have_it():
    book = {"title": "t", "description": "d", "chapters": ["index.ipynb", {"part": "Core", "chapters": ["a.ipynb"]}]}
    contents = ["index.ipynb", {"section": "Core", "contents": ["a.ipynb"]}]
    website = {"title": "t", "description": "d", "sidebar": {"contents": contents}}
    parts = [("", ["index.ipynb"]), ("Core", ["a.ipynb"])]
    assert pdf.book_of({"book": book})[1] == parts == pdf.book_of({"website": website})[1]


# What quarto's schema (src/resources/schema/project.yml and book-schema of quarto-dev/quarto-cli) lets these hold
PROJECT_KEYS = {"title", "type", "render", "execute-dir", "output-dir", "lib-dir", "resources", "preview"}
PROJECT_KEYS |= {"pre-render", "post-render", "detect"}
CHAPTER_KEYS = {"part", "chapters"}


def test_quarto_finds_all_pages_from_the_root():
    config = yaml.safe_load((HOME / "_quarto.yml").read_text(encoding="utf-8"))
    assert set(config) == {"project", "book", "format"}
    assert config["project"]["type"] == "book" and set(config["project"]) <= PROJECT_KEYS
    entries = config["book"]["chapters"]
    assert entries[0] == "index.qmd"  # a book begins with a page of this name beside its configuration
    for entry in entries:
        assert isinstance(entry, str) or (
            set(entry) == CHAPTER_KEYS and all(isinstance(e, str) for e in entry["chapters"])
        )
    missing = [name for name in docs.chapters(entries) if not (HOME / name).is_file()]
    included = re.findall(r"{{< include (\S+) >}}", (HOME / "index.qmd").read_text(encoding="utf-8"))
    assert not missing and included == ["README.md"] and (HOME / "README.md").is_file()


def test_pandoc_gets_a_notebook_that_it_can_read():
    notebook = pdf.readable_notebook(HOME / "nbs" / "index.ipynb")
    results = [o for c in notebook["cells"] for o in c.get("outputs", []) if o["output_type"] == "execute_result"]
    assert results and all(output["execution_count"] == 0 for output in results)


def test_tables_of_a_chapter_are_named_and_pages_are_left():
    shown = ["<div><style>th {}</style><table><tr><td>= 7</td></tr></table></div>", "<table></table><table></table>"]
    outputs = [{"output_type": "display_data", "data": {"text/html": html, "text/plain": "7"}} for html in shown]
    notebook = {"cells": [{"cell_type": "code", "source": "t", "outputs": outputs}, {"cell_type": "markdown"}]}
    assert pdf.take_tables(notebook) == ["<table><tr><td>= 7</td></tr></table>"]
    assert outputs[0]["data"] == {"text/plain": f"{pdf.TABLE}000"} and outputs[1]["data"]["text/plain"] == "7"


def test_a_run_shows_its_figures_in_lines_where_it_keeps_them(tmp_path):
    (tmp_path / "loss.svg").write_text("<svg/>")
    picture = {"image/png": "abc", "text/plain": "<Figure>"}
    cells = [
        {"source": f'save_figure(figure, run.folder / "{name}.png")', "outputs": [{"data": dict(picture)}]}
        for name in ("loss", "peaks")
    ]
    for cell in cells:
        pdf.draw_in_lines(cell, tmp_path)
    assert cells[0]["outputs"][0]["data"] == {"image/svg+xml": "<svg/>", "text/plain": "<Figure>"}
    assert cells[1]["outputs"][0]["data"] == picture


def picture_of(colour: str) -> str:
    "A figure of one colour, as a notebook holds it."
    figure, written = Figure(figsize=(1, 1), dpi=100), io.BytesIO()
    figure.add_axes((0, 0, 1, 1), facecolor=colour)
    figure.savefig(written, format="png", bbox_inches="tight")
    return base64.b64encode(written.getvalue()).decode()


def test_packed_drawings_are_the_same_when_unpacked(tmp_path):
    record, site = tmp_path / "record", tmp_path / "site"
    record.mkdir()
    site.mkdir()
    drawings.pack_drawings(record)
    drawings.unpack_drawings(record, site)
    assert not list(record.iterdir()) and not list(site.iterdir())
    files = {name: f"<svg>{name * 900}</svg>".encode() for name in ("loss.svg", "peaks.svg")}
    for name, data in files.items():
        (record / name).write_bytes(data)
    (record / "loss.png").write_bytes(b"no drawing")
    drawings.pack_drawings(record)
    packed = (record / drawings.PACKED).read_bytes()
    drawings.pack_drawings(record)
    assert (record / drawings.PACKED).read_bytes() == packed and len(packed) < sum(map(len, files.values())) / 5
    drawings.unpack_drawings(record, site)
    assert {path.name: path.read_bytes() for path in site.iterdir()} == files


def test_a_thin_line_that_moved_makes_another_picture():
    drawn = []
    for row, shade in ((30, 0), (30, 30), (31, 0)):
        image = Image.new("RGB", (200, 120), "white")
        ImageDraw.Draw(image).line([(0, row), (199, row)], fill=(shade, shade, shade))
        written = io.BytesIO()
        image.save(written, "PNG")
        drawn.append(base64.b64encode(written.getvalue()).decode())
    line, same_line, moved_line = drawn
    assert pictures.is_same_picture(line, same_line) and not pictures.is_same_picture(line, moved_line)


def test_figures_of_a_chapter_are_drawn_where_they_are_what_it_shows(tmp_path):
    shown, changed = (picture_of(colour) for colour in ("black", "red"))
    cells = []
    for number, picture in enumerate((shown, changed, None)):
        code = "from matplotlib.figure import Figure\nfigure = Figure((1, 1), 100)\nfigure.add_axes((0, 0, 1, 1), facecolor='black')\nfigure"
        cell = nbformat.v4.new_code_cell(code if picture else "1 + 1", id=f"cell-{number}")
        if picture:
            cell.outputs = [nbformat.v4.new_output("execute_result", {"image/png": picture}, execution_count=1)]
        cells.append(cell)
    path = tmp_path / "chapter.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    cells[1].source = "1 / 0"
    failing = tmp_path / "failing.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), failing)
    drawn = drawings.draw_chapters([path, failing], tmp_path / "cache")
    assert list(drawn) == [path] and list(drawn[path]) == ["cell-0"] and "<svg" in drawn[path]["cell-0"][0]
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_text(json.dumps({"cell-0": ["<svg>kept</svg>"]}))
    assert drawings.draw_chapter(path, tmp_path / "cache") == {"cell-0": ["<svg>kept</svg>"]}
    path.with_suffix(".drawings.json").write_text(kept.read_text())
    read = pdf.readable_notebook(path)["cells"]
    assert read[0]["outputs"][0]["data"] == {"image/svg+xml": "<svg>kept</svg>"}
    assert read[1]["outputs"][0]["data"] == {"image/png": changed}


def test_a_link_within_the_site_is_plain_text_in_the_book():
    text = '#link("a.html")[the #emph[page]], #link(<below>)[a part], #link(label("b?"))[b], #link("https://c.org")[c]'
    assert pdf.LINK_WITHIN.sub(r"\1", text) == 'the #emph[page], a part, b, #link("https://c.org")[c]'


def test_a_record_in_the_book_ends_where_its_method_begins():
    texts = ["# Title", "## Results", "#| code-fold: true\nplot()", "## Method and code\n\nmore", "import os"]
    kinds = ["markdown", "markdown", "code", "markdown", "code"]
    cells = [{"cell_type": kind, "source": text, "metadata": {}} for kind, text in zip(kinds, texts)]
    kept = pdf.without_method(cells, "tracing")
    assert [cell["source"] for cell in kept[:3]] == ["# Title", "## Results", []]
    assert len(kept) == 4 and "the chapter tracing of this book" in kept[3]["source"]


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("pypandoc", "typst")),
    reason="no pandoc or typst: pip install -c constraints.txt -e '.[pdf]'",
)
def test_chapters_and_a_record_become_a_pdf(tmp_path):
    record = next((HOME / "runs" / "reference" / "tracing").glob("*/notebook.ipynb"))
    names = ["nbs/core/stats.ipynb", "nbs/models/loading.ipynb", record.relative_to(HOME).as_posix()]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HOME / name, tmp_path / name)
    chapters = [{"part": "Core", "chapters": names[:2]}, {"part": "Records", "chapters": names[2:]}]
    book = {"title": "codetrace", "description": "all of it", "chapters": chapters}
    (tmp_path / "_quarto.yml").write_text(yaml.safe_dump({"book": book}))
    assert pdf.write_pdf(tmp_path, tmp_path / "book.pdf") == []
    book_text = (tmp_path / "book.typ").read_text()
    assert "table.header(" in book_text and "166mm" in book_text
    data = (tmp_path / "book.pdf").read_bytes()
    assert data.startswith(b"%PDF") and data.count(b"/Type /Page\n") + data.count(b"/Type/Page") > 0


def test_every_public_name_stands_in_the_index_with_a_link_to_its_chapter():
    page = api_index.api_page(["nbs/core/stats.ipynb", "nbs/core/errors.ipynb"], {"core": "Core", "plots": "Plots"})
    core, plots = [cell["source"] for cell in page["cells"][1:]]
    for name in ("stats", "errors"):
        module = importlib.import_module(f"codetrace.core.{name}")
        rows = core.partition(f"### codetrace.core.{name}\n")[2].partition("###")[0]
        for public in module.__all__:
            anchor = f"#{public.lower()}" if callable(getattr(module, public)) else ""
            assert f"| [{public}](core/{name}.ipynb{anchor}) | " in rows, public
        assert rows.count("\n| [") == len(module.__all__)
    assert importlib.import_module("codetrace.core.stats").bootstrap_interval.__doc__.partition("\n")[0] in core
    assert plots == "## Plots"  # whose chapters are not on this site
