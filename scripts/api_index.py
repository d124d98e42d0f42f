"""A page of the site with every public name, what it is, and a link to where it is written; made anew each time, kept nowhere."""

import ast
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
PAGE = "nbs/api.ipynb"


def exported(path: Path) -> tuple[str, dict[str, ast.stmt]]:
    "The notebook that a module is made from, and its public names with what defines each."
    source = path.read_text(encoding="utf-8")
    notebook = re.search(r"File to edit: \S*?(nbs/\S+\.ipynb)", source)
    tree = ast.parse(source)
    defined: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    names = ast.literal_eval(defined["__all__"].value) if "__all__" in defined else []
    return notebook[1] if notebook else "", {name: defined[name] for name in names if name in defined}


def in_words(node: ast.stmt) -> str:
    "The first line of a docstring; of a constant, what it is."
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return (ast.get_docstring(node) or "").partition("\n")[0]
    value = ast.unparse(node.value) if getattr(node, "value", None) is not None else ""
    return f"`{value}`" if len(value) <= 60 and "`" not in value else "a table of values"


def rows_of(path: Path, pages: Sequence[str]) -> Iterator[str]:
    "The names of a module as rows of a table."
    notebook, names = exported(path)
    if notebook not in pages:
        return
    page = os.path.relpath(notebook, Path(PAGE).parent)
    for name, node in sorted(names.items(), key=lambda item: item[0].lower()):
        anchor = f"#{name.lower()}" if isinstance(node, ast.FunctionDef | ast.ClassDef) else ""
        words = in_words(node).replace("|", "\\|")
        yield f"| [{name}]({page}{anchor}) | {words} |"


def api_page(
    pages: Sequence[str],  # Notebooks of the site
    folders: Mapping[str, str],  # Packages by folder, in the order of the site
) -> dict:  # A notebook
    "Every public name, package by package and module by module."
    texts = ["# API index\n\n> Every public name, with a link to where it is written, tried and tested.\n"]
    for folder, title in folders.items():
        parts = [f"## {title}"]
        for path in sorted((HOME / "codetrace" / folder).glob("[!_]*.py")):
            if rows := list(rows_of(path, pages)):
                heading = f"### codetrace.{folder}.{path.stem}"
                parts.append("\n".join([heading, "", "| name | what it does |", "| --- | --- |", *rows]))
        texts.append("\n\n".join(parts))
    cells = [{"cell_type": "markdown", "id": f"api{i}", "metadata": {}, "source": text} for i, text in enumerate(texts)]
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    return {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}


def write_api_page(project: Path, pages: Sequence[str], folders: Mapping[str, str]) -> None:
    "Put the page into an assembled project."
    (project / PAGE).parent.mkdir(parents=True, exist_ok=True)
    (project / PAGE).write_text(json.dumps(api_page(pages, folders)), encoding="utf-8")
