"Execute notebooks in place, the way nbdev_test does: from their own folder, as tests, without cells that need a GPU."

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HOME = Path(__file__).resolve().parents[1]
SKIPPED = ("#| cuda", "#| slow", "#| eval: false")


class Client(NotebookClient):
    async def async_execute_cell(self, cell, cell_index, **options):
        if any(line.strip() in SKIPPED for line in cell["source"].splitlines()):
            return cell
        return await super().async_execute_cell(cell, cell_index, **options)


def main(names: list[str]):
    os.environ["IN_TEST"] = "1"
    for path in [Path(name) for name in names] or sorted((HOME / "nbs").glob("*.ipynb")):
        print(path.name, flush=True)
        book = nbformat.read(path, as_version=4)
        Client(
            book,
            timeout=600,
            kernel_name="python3",
            extra_arguments=["--log-level=CRITICAL"],
            resources={"metadata": {"path": str(path.parent)}},
        ).execute()
        book.metadata.pop("widgets", None)
        nbformat.write(book, path)


if __name__ == "__main__":
    main(sys.argv[1:])
