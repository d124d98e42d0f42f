"""The thesis appendix as a PDF, without quarto or LaTeX: pandoc turns each page of the site's project into typst, and typst sets the book.

`pip install -c constraints.txt -e '.[pdf]'` brings both (pypandoc_binary, typst). `python scripts/pdf.py FOLDER` reads a project that scripts/docs.py has assembled.
"""

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import yaml
from matplotlib import rcParams
from pictures import pictures_of
from PIL import Image

from codetrace.plots.style import figure_style

BOOK = """#set page(paper: "a4", margin: (x: 22mm, y: 24mm), numbering: "1")
#set text(font: ("Libertinus Serif", "New Computer Modern"), size: 10pt, lang: "en")
#set par(justify: true)
#show raw: set text(font: "DejaVu Sans Mono", size: 7pt)
#show raw.where(block: true): it => block(fill: luma(246), inset: 5pt, width: 100%, breakable: true, it)
#show table: set text(size: 7.5pt)
#show table: set par(justify: false)
#show figure: set block(breakable: true)
#show link: set text(fill: rgb("#0b4a8f"))
#set table(stroke: none)
#set image(width: auto)
#show heading.where(level: 1): it => { pagebreak(weak: true); v(20mm); it; v(4mm) }
#let horizontalrule = line(length: 100%, stroke: 0.4pt)
#align(center + horizon)[#text(size: 30pt)[TITLE]

#text(size: 13pt)[DESCRIPTION]

#v(1cm) CHAPTERS chapters and RECORDS records, as they were executed]
#pagebreak()
#outline(depth: 2, indent: 1em)
"""

TABLE = "TABLETOBESET"
UNWRAPPED = "--wrap=none"  # where a line goes on with =, it would become a heading
LINK_WITHIN = re.compile(  # To a page or a section of the site
    r'#link\((?:"(?!https?:)[^"]*"|<[^>]*>|label\("[^"]*"\))\)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]'
)


class NoTypesetter(Exception):
    "pandoc or typst is not installed."


def require_typesetter() -> None:
    "Say what to install where pandoc or typst is missing."
    missing = [name for name in ("pypandoc", "typst") if importlib.util.find_spec(name) is None]
    if missing:
        raise NoTypesetter(f"no PDF: {', '.join(missing)} missing; pip install -c constraints.txt -e '.[pdf]'")


def book_of(config: dict) -> tuple[dict, list[tuple[str, list[str]]]]:
    "Title and description, and the parts with their files, of a book or of the website that smalldocs makes of it."
    book = config.get("book") or config["website"]
    entries = book["chapters"] if "chapters" in book else book["sidebar"]["contents"]
    parts = []
    for entry in entries:
        is_page = isinstance(entry, str)
        parts.append(("", [entry]) if is_page else (entry.get("part") or entry["section"], chapters_of(entry)))
    return book, parts


def chapters_of(part: dict) -> list[str]:
    "The files of a part."
    return part.get("chapters") or part["contents"]


def readable_notebook(path: Path) -> dict:
    "A notebook as pandoc reads it: results have numbers, which cleaning takes out, directives are no code, and figures are drawn in lines."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    drawn = path.with_suffix(".drawings.json")
    if drawn.is_file():
        show_drawings(notebook["cells"], json.loads(drawn.read_text(encoding="utf-8")))
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            if output["output_type"] == "execute_result":
                output["execution_count"] = 0
        if cell["cell_type"] == "code":
            draw_in_lines(cell, path.parent)
            lines = "".join(cell["source"]).splitlines(True)
            cell["source"] = [line for line in lines if not line.startswith("#|")]
    if path.parts[-5:-3] == ("runs", "reference"):
        notebook["cells"] = without_method(notebook["cells"], chapter=path.parts[-3])
    return notebook


def without_method(cells: list[dict], chapter: str) -> list[dict]:
    "A record without the code that the site folds: its method is a chapter of the same book."
    kept = []
    for cell in cells:
        if "".join(cell["source"]).startswith("## Method and code"):
            sentence = f"What was executed is the chapter {chapter} of this book; the record's notebook holds it with all of its outputs."
            return [*kept, {"cell_type": "markdown", "metadata": {}, "source": f"## Method and code\n\n{sentence}"}]
        kept.append(cell | {"source": []} if cell["cell_type"] == "code" else cell)
    return kept


def show_drawings(cells: list[dict], drawings: dict[str, list[str]]) -> None:
    "Put SVGs, by cell, in the place of the pictures of a chapter."
    for cell in cells:
        for data, drawing in zip(pictures_of(cell), drawings.get(cell.get("id", ""), [])):
            show_drawing(data, drawing)


def show_drawing(data: dict, drawing: str) -> None:
    "Put an SVG in the place of a picture."
    del data["image/png"]
    data["image/svg+xml"] = drawing


def draw_in_lines(cell: dict, folder: Path) -> None:
    "Put a run's figure as SVG, which the run keeps beside its notebook, in the place of the picture of it."
    saved = re.findall(r'"([\w-]+)\.png"', "".join(cell["source"]))
    pictures = pictures_of(cell)
    drawings = [folder / f"{name}.svg" for name in saved]
    if len(pictures) == len(drawings):
        for data, drawing in zip(pictures, drawings):
            if drawing.is_file():
                show_drawing(data, drawing.read_text(encoding="utf-8"))


def take_tables(notebook: dict) -> list[str]:
    "Put a name in the place of every table that a cell shows, and give the tables: pandoc would print them as text."
    tables = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            html = "".join(output.get("data", {}).get("text/html", ""))
            shown = re.findall(r"<table.*?</table>", html, re.DOTALL)
            if len(shown) == 1 and "<h" not in shown[0]:  # else it is a page
                output["data"] = {"text/plain": f"{TABLE}{len(tables):03}"}
                tables.append(re.sub(r' style="[^"]*"', "", shown[0]))
    return tables


def with_tables(text: str, tables: list[str]) -> str:
    "A chapter with its tables as typst sets them."
    if not tables:
        return text
    pypandoc = importlib.import_module("pypandoc")
    pages = f"<p>{TABLE}</p>".join(tables)
    set_tables = re.split(rf"\n{TABLE}\n", pypandoc.convert_text(pages, "typst", format="html", extra_args=[UNWRAPPED]))
    for number, table in enumerate(set_tables):
        table = table.replace(r"\_", r"\_\u{200b}")  # long names may be broken
        table = re.sub(r"\[(?=(?:=+|[-+/]) )", r"[\\", table)  # a cell that begins so is no heading, list or term
        text = text.replace(f"```\n{TABLE}{number:03}\n```", table.strip())
    return text


def as_drawn(picture: re.Match) -> str:
    "A picture as large as it was drawn, so that the texts of all figures are of one size."
    with figure_style(), Image.open(picture[1]) as image:
        points = image.width * 72 / rcParams["figure.dpi"]
    return f'image("{picture[1]}", width: calc.min({points:.0f}pt, 166mm))'


def chapter_typst(project: Path, name: str, media: Path) -> str:
    "A notebook as typst, its figures beside it, its headings one level below the part's."
    pypandoc = importlib.import_module("pypandoc")
    folder = media / re.sub(r"\W+", "-", name)
    options = [
        UNWRAPPED,
        f"--extract-media={folder}",
        "--shift-heading-level-by=1",
        f"--resource-path={(project / name).parent}",
    ]
    notebook = readable_notebook(project / name)
    tables = take_tables(notebook)
    text = pypandoc.convert_text(json.dumps(notebook), "typst", format="ipynb", extra_args=options)
    text = with_tables(text, tables)
    text = re.sub(r"<[\w:.-]+>\n", "\n", text)  # labels of headings, which two chapters may share
    text = LINK_WITHIN.sub(r"\1", text)
    text = re.sub(r"```python\n+```\n", "", text)  # of cells without code
    text = re.sub(r'image\("([^"]*\.png)"\)', as_drawn, text)
    return text.replace(str(media.parent) + "/", "")


def write_pdf(project: Path, target: Path) -> list[str]:
    "Set the whole book; gives the chapters that pandoc refused, which the book names in their place."
    typst = importlib.import_module("typst")
    config = yaml.safe_load((project / "_quarto.yml").read_text(encoding="utf-8"))
    settings, parts = book_of(config)
    records = sum(len(files) for title, files in parts if title == "Records")
    count = sum(len(files) for _, files in parts) - records
    book = BOOK.replace("TITLE", settings["title"]).replace("DESCRIPTION", settings["description"])
    pieces = [book.replace("CHAPTERS", str(count)).replace("RECORDS", str(records))]
    refused = []
    for title, files in parts:
        pieces += [f"= {title}"] if title else []
        for name in files:
            try:
                pieces.append(chapter_typst(project, name, project / "media"))
            except RuntimeError as error:
                refused.append(f"{name}: {' '.join(str(error).split())[:200]}")
                pieces.append(f"== {Path(name).stem}\n\nThis chapter is only on the site.")
    source = project / "book.typ"
    source.write_text("\n\n".join(pieces), encoding="utf-8")
    target.parent.mkdir(parents=True, exist_ok=True)
    typst.compile(str(source), output=str(target), root=str(project))
    return refused


if __name__ == "__main__":
    try:
        require_typesetter()
    except NoTypesetter as error:
        sys.exit(str(error))
    for line in write_pdf(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()):
        print(f"not in the PDF: {line}", file=sys.stderr)
