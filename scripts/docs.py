"""The site and the thesis appendix: chapters as nbdev processes them, then the reference records.

Quarto renders them where it is installed, else smalldocs does, which makes the same book as a website that asks nothing of other hosts; pandoc and typst
set it as a PDF where they are installed. For the PDF, chapters that show figures are executed once, and their drawings kept in _proc/drawings.
`python scripts/docs.py` renders into _docs/; `--check` only says whether smalldocs and typst would, and fails on any warning.
"""

import multiprocessing
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from api_index import PAGE as API_PAGE
from api_index import write_api_page
from drawings import draw_chapters, unpack_drawings
from offline import make_offline
from pdf import NoTypesetter, require_typesetter, write_pdf
from readme import FOLDERS, linked

from codetrace.core.files import write_json
from codetrace.runs.record_layout import with_live_links

HOME = Path(__file__).resolve().parents[1]
PROJECT = HOME / "_proc" / "site"


TABLES = """
table.dataframe { border: 0; font-variant-numeric: tabular-nums }
table.dataframe :is(th, td) { font-size: 0.8rem; padding: 0.15em 0.45em; border: 0; border-bottom: 1px solid #ddd; text-align: right }
table.dataframe tbody th { font-weight: normal; color: #666 }
"""  # Of pandas, whose own style a site does not have


def style_tables(site: Path) -> None:
    "Give tables of numbers the room and the lines that a notebook gives them."
    sheet = site / "site_libs" / "smalldocs.css"
    sheet.write_text(sheet.read_text(encoding="utf-8") + TABLES, encoding="utf-8")


def chapters(entries: list) -> list[str]:
    "All files of a book, in order."
    return [f for e in entries for f in ([e] if isinstance(e, str) else chapters(e["chapters"]))]


def as_website(config: dict) -> dict:
    "The configuration of the same pages as a website: parts become sections of the sidebar."
    book = config["book"]
    side = [e if isinstance(e, str) else {"section": e["part"], "contents": e["chapters"]} for e in book["chapters"]]
    website = {"title": book["title"], "description": book["description"], "sidebar": {"contents": side}}
    return config | {"project": config["project"] | {"type": "website"}, "website": website, "book": None}


def process_notebooks(folder: Path) -> Path:
    "What `nbdev_proc_nbs` writes, in this process: its workers spend twice as long on imports as on notebooks."
    from nbdev.doclinks import nbglob
    from nbdev.processors import FilterDefaults
    from nbdev.serve_drv import main as process

    for source in map(Path, nbglob(HOME / "nbs")):
        target = folder / source.relative_to(HOME / "nbs")
        target.parent.mkdir(parents=True, exist_ok=True)
        process((source, target, FilterDefaults))
    return folder


def assemble(quarto: bool) -> Path:
    "A docs project of its own: configuration, processed chapters, reference records."
    config = yaml.safe_load((HOME / "_quarto.yml").read_text(encoding="utf-8"))
    with multiprocessing.get_context("fork").Pool(
        1
    ) as pool:  # each shell that ends in order collects garbage: a minute
        processed = pool.apply(process_notebooks, [HOME / "_proc"])
    shutil.rmtree(PROJECT, ignore_errors=True)
    config["book"]["chapters"][0] = "index.ipynb"  # in place of the root's index.qmd: nbdev has processed that notebook
    for name in chapters(config["book"]["chapters"]):
        (PROJECT / name).parent.mkdir(parents=True, exist_ok=True)
        source = HOME / name if name.startswith("runs/") else processed / name.removeprefix("nbs/")
        text = re.sub(r'"output-file: [^"]*",?\n', "", source.read_text(encoding="utf-8"))  # nbdev names pages its way
        if name == "index.ipynb":  # stands beside nbs/, not in it
            text = linked(text)
        if name.startswith("runs/"):
            text = with_live_links(text, (HOME / name).parent)
            unpack_drawings((HOME / name).parent, (PROJECT / name).parent)
        (PROJECT / name).write_text(text, encoding="utf-8")
    shutil.copy(HOME / "nbs" / "finding.png", PROJECT / "nbs" / "finding.png")
    write_api_page(PROJECT, chapters(config["book"]["chapters"]), FOLDERS)
    entries = config["book"]["chapters"]
    entries.insert(entries.index("nbs/chapters.ipynb") + 1, API_PAGE)
    config = config if quarto else {k: v for k, v in as_website(config).items() if v is not None}
    (PROJECT / "_quarto.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return PROJECT


DRAWINGS = HOME / "_proc" / "drawings"


def keep_drawings():
    "Put beside each chapter of the project its figures as lines, which the PDF shows."
    chapters = [HOME / path.relative_to(PROJECT) for path in sorted((PROJECT / "nbs").rglob("*.ipynb"))]
    for source, drawings in draw_chapters(list(filter(Path.is_file, chapters)), DRAWINGS).items():
        write_json((PROJECT / source.relative_to(HOME)).with_suffix(".drawings.json"), drawings)


def run(*words: str):
    subprocess.run(words, check=True, cwd=PROJECT)


def make_pdf(target: Path):
    "The same pages as a PDF, or what to install for that."
    try:
        require_typesetter()
    except NoTypesetter as error:
        print(error)
        return
    for line in write_pdf(PROJECT, target):
        print(f"not in the PDF: {line}", file=sys.stderr)
    print(target)


def main(check: bool):
    quarto = bool(shutil.which("quarto")) and not check
    assemble(quarto)
    if quarto:
        run("quarto", "render")
    else:
        run("smalldocs", "render", ".", "--strict", "--quiet")
        style_tables(PROJECT / "_docs")
        make_offline(PROJECT / "_docs")
    if not check:
        keep_drawings()
        shutil.rmtree(HOME / "_docs", ignore_errors=True)
        shutil.copytree(PROJECT / "_docs", HOME / "_docs")
        print(HOME / "_docs" / "index.html")
    make_pdf((PROJECT if check else HOME) / "_docs" / "codetrace.pdf")


if __name__ == "__main__":
    try:
        main("--check" in sys.argv[1:])
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
