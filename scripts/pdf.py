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

BOOK = """#set page(paper: "a4", margin: (x: 22mm, y: 24mm), numbering: "1")
#set text(font: ("Libertinus Serif", "New Computer Modern"), size: 10pt, lang: "en")
#set par(justify: true)
#show raw: set text(font: "DejaVu Sans Mono", size: 7pt)
#show raw.where(block: true): it => block(fill: luma(246), inset: 5pt, width: 100%, breakable: true, it)
#show table: set text(size: 7.5pt)
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


def readable_notebook(path: Path) -> str:
    "A notebook as pandoc reads it: results have numbers, which cleaning takes out, and directives are no code."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            if output["output_type"] == "execute_result":
                output["execution_count"] = 0
        if cell["cell_type"] == "code":
            lines = "".join(cell["source"]).splitlines(True)
            cell["source"] = [line for line in lines if not line.startswith("#|")]
    return json.dumps(notebook)


def chapter_typst(project: Path, name: str, media: Path) -> str:
    "A notebook as typst, its figures beside it, its headings one level below the part's."
    pypandoc = importlib.import_module("pypandoc")
    folder = media / re.sub(r"\W+", "-", name)
    options = [f"--extract-media={folder}", "--shift-heading-level-by=1", f"--resource-path={(project / name).parent}"]
    text = pypandoc.convert_text(readable_notebook(project / name), "typst", format="ipynb", extra_args=options)
    text = re.sub(r"<[\w:.-]+>\n", "\n", text)  # labels of headings, which two chapters may share
    text = re.sub(r'#link\("(?!https?:)[^"]*"\)(\[(?:[^\[\]]|\[[^\[\]]*\])*\])', r"\1", text)  # pages of the site
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
