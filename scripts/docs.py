"""The site: chapters as nbdev processes them, then the reference records, rendered by Quarto where it is installed, else by smalldocs.

`python scripts/docs.py` renders into _docs/; `--check` only says whether it would, and fails on any warning.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
PROJECT = HOME / "_proc" / "site"


def assemble() -> Path:
    "A docs project of its own: _quarto.yml, processed chapters, reference records."
    from nbdev.serve import proc_nbs

    processed = Path(proc_nbs(n_workers=2))
    shutil.rmtree(PROJECT, ignore_errors=True)
    (PROJECT / "nbs").mkdir(parents=True)
    shutil.copy(HOME / "_quarto.yml", PROJECT)
    for path in processed.glob("*.ipynb"):
        shutil.copy(path, PROJECT / "nbs")
    for name in re.findall(r"runs/reference/\S+\.ipynb", (HOME / "_quarto.yml").read_text(encoding="utf-8")):
        (PROJECT / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HOME / name, PROJECT / name)
    return PROJECT


def run(*words: str):
    subprocess.run(words, check=True, cwd=PROJECT)


def main(check: bool):
    assemble()
    if check:
        run("smalldocs", "check", ".")
    if shutil.which("quarto") and not check:
        run("quarto", "render")
    else:
        run("smalldocs", "render", ".", "--strict", "--quiet")
    if not check:
        shutil.rmtree(HOME / "_docs", ignore_errors=True)
        shutil.copytree(PROJECT / "_docs", HOME / "_docs")
        print(HOME / "_docs" / "index.html")


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
