"""README.md, the table of chapters in nbs/index.ipynb and the chapters of _quarto.yml, all from the notebooks.

`make export` runs it; nothing of these three is written by hand twice.
"""

import json
import os
import re
from pathlib import Path

import yaml

HOME = Path(__file__).resolve().parents[1]
NOTEBOOKS = HOME / "nbs"
FOLDERS = {  # In the order in which they import from each other
    "core": "Core",
    "plots": "Plots",
    "sandbox": "Sandbox",
    "models": "Models",
    "tasks": "Tasks",
    "patching": "Activation patching",
    "sae": "Sparse autoencoders",
    "steering": "Steering",
    "planted": "Planted mechanisms",
    "runs": "Runs",
    "phases": "Phases",
    "app": "The page",
}
TABLE = "## The chapters"


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def chapters() -> dict[str, list[Path]]:
    "Notebooks by the title of their part, the command line last."
    parts = {title: sorted((NOTEBOOKS / folder).glob("*.ipynb")) for folder, title in FOLDERS.items()}
    known = {NOTEBOOKS / "index.ipynb", *(path for part in parts.values() for path in part)}
    return parts | {"Command line": [path for path in sorted(NOTEBOOKS.rglob("*.ipynb")) if path not in known]}


def plain_line(path: Path) -> str:
    "What a notebook does: the line under its title."
    lines = "".join(read(path)["cells"][0]["source"]).splitlines()
    return next(line[1:].strip() for line in lines if line.startswith(">"))


def chapter_table() -> str:
    rows = ["| notebook | what it does |", "| --- | --- |"]
    for title, paths in chapters().items():
        rows.append(f"| **{title}** | |")
        for path in paths:
            name = path.relative_to(NOTEBOOKS).with_suffix("").as_posix()
            rows.append(f"| [{name}]({name}.ipynb) | {plain_line(path)} |")
    return "\n".join(rows)


def write_index() -> None:
    "Put the table of chapters into its cell of the index."
    path = NOTEBOOKS / "index.ipynb"
    notebook = read(path)
    cell = next(cell for cell in notebook["cells"] if "".join(cell["source"]).startswith(TABLE))
    rest = "".join(cell["source"]).rpartition("|\n")[2].strip()
    cell["source"] = f"{TABLE}\n\n{chapter_table()}\n\n{rest}".splitlines(True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def write_quarto() -> None:
    "Put the chapters into _quarto.yml; its other lines, and the records, stay."
    path = HOME / "_quarto.yml"
    text = path.read_text(encoding="utf-8")
    parts = yaml.safe_load(text)["book"]["chapters"]
    records = [part for part in parts if isinstance(part, dict) and part["part"] == "Records"]
    listed = [
        {"part": title, "chapters": [f"nbs/{path.relative_to(NOTEBOOKS).as_posix()}" for path in paths]}
        for title, paths in chapters().items()
    ]
    block = yaml.safe_dump({"chapters": ["index.ipynb", *listed, *records]}, sort_keys=False, width=200)
    block = re.sub(r"^", "  ", block, flags=re.M).rstrip() + "\n"
    head, _, tail = text.partition("  chapters:\n")
    after = tail[tail.index("\nformat:") :]
    path.write_text(head + block + after, encoding="utf-8")


def linked(markdown: str, page: Path = HOME) -> str:
    "Links of the index, which stands in nbs/, as a page in another folder writes them."
    there = os.path.relpath(NOTEBOOKS, page)
    markdown = re.sub(r"\]\(([\w/]+\.ipynb)\)", rf"]({there}/\1)", markdown)
    return markdown.replace("](../", "](")


def cell_markdown(cell: dict) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return linked(source)
    if re.search(r"^#\| *(hide|default_exp|exports?i?)\b", source, re.M):
        return ""
    code = "\n".join(line for line in source.splitlines() if not line.startswith("#|"))
    return f"```python\n{code}\n```\n\n{outputs(cell)}".strip()


def outputs(cell: dict) -> str:
    texts = ["".join(o.get("text") or o.get("data", {}).get("text/plain", "")) for o in cell["outputs"]]
    return "```\n" + "\n".join(t.rstrip() for t in texts) + "\n```" if any(texts) else ""


def readme() -> str:
    cells = read(NOTEBOOKS / "index.ipynb")["cells"]
    return "\n\n".join(text for text in map(cell_markdown, cells) if text) + "\n"


if __name__ == "__main__":
    write_index()
    write_quarto()
    (HOME / "README.md").write_text(readme(), encoding="utf-8")
