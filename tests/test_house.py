"The house rules: what is exported is what the notebooks say, in the order they say it."

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((HOME / "nbs").glob("*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if path.stem != "index"]


def code_cells(path: Path) -> list[str]:
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


def module_of(path: Path) -> str:
    return re.search(r"#\| default_exp (\w+)", "\n".join(code_cells(path))).group(1)


def run(*words: str, cwd: Path = HOME) -> subprocess.CompletedProcess:
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    "The working tree as git would see it if everything were added, in a folder of its own."
    folder = tmp_path_factory.mktemp("house") / "clone"
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard").stdout.split("\n")
    for name in filter(None, names):
        if (HOME / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(HOME / name, folder / name, follow_symlinks=False)
    for words in [("init", "-q"), ("add", "-A"), ("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "t")]:
        assert run("git", *words, cwd=folder).returncode == 0
    return folder


@pytest.fixture
def clone(copy) -> Path:
    "The same, as it was."
    run("git", "checkout", "-q", ".", cwd=copy)
    run("git", "clean", "-fdq", cwd=copy)
    return copy


def changes(folder: Path) -> str:
    return run("git", "status", "--porcelain", cwd=folder).stdout


def test_the_library_is_what_the_notebooks_export(clone):
    assert run("nbdev_export", cwd=clone).returncode == 0
    assert changes(clone) == "", "run `make export`, or edit the notebook instead of the module"


def test_drift_is_seen(clone):
    module = clone / "codetrace" / "errors.py"
    module.write_text(module.read_text().replace("did you mean", "did you perhaps mean"))
    (clone / "codetrace" / "stray.py").write_text("")
    assert {"M codetrace/errors.py", "?? codetrace/stray.py"} == {line.strip() for line in changes(clone).splitlines()}


def test_the_notebooks_are_clean(clone):
    assert run("nbdev_clean", cwd=clone).returncode == 0
    assert changes(clone) == "", "run nbdev_clean"


def test_the_readme_is_the_index(clone):
    assert run(sys.executable, "scripts/readme.py", cwd=clone).returncode == 0
    assert changes(clone) == "", "run `make export`"


def test_every_module_has_one_notebook():
    modules = [module_of(path) for path in CHAPTERS]
    assert sorted(modules) == sorted({p.stem for p in (HOME / "codetrace").glob("*.py")} - {"__init__", "_modidx"})
    assert all(path.stem.split("_", 1)[1] == module for path, module in zip(CHAPTERS, modules))


def imported(source: str) -> set[str]:
    "Names of codetrace modules that a cell imports."
    found = set()
    for node in ast.walk(ast.parse(re.sub(r"^[%!].*$", "pass", source, flags=re.M))):
        if isinstance(node, ast.ImportFrom) and node.module == "codetrace":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("codetrace."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("codetrace.")}
    return found


def out_of_order(books: dict[str, list[str]]) -> list[str]:
    "Imports of a module whose notebook does not come earlier; `books` maps modules, in order, to their cells."
    order = list(books)
    return [
        f"{module} imports {name}"
        for at, module in enumerate(order)
        for cell in books[module]
        for name in imported(cell) - {"__version__"}
        if name not in order or (order.index(name) >= at and name != module)
    ]


def test_a_notebook_imports_only_from_lower_numbers():
    assert out_of_order({module_of(path): code_cells(path) for path in CHAPTERS}) == []


def test_the_import_check_can_fail():
    books = {"a": ["from codetrace.b import f"], "b": ["from codetrace import a, c"]}
    assert out_of_order(books) == ["a imports b", "b imports c"]


def test_the_canary_fails():
    "nbdev_test exits 0 when it finds nothing to run: here is a notebook that it must find, and that must fail."
    done = run("nbdev_test", "--path", "tests/canary.ipynb", "--n_workers", "1")
    assert done.returncode != 0 and "the canary sings" in done.stderr + done.stdout


def test_phases_never_write_the_library():
    assert not [path.name for path in CHAPTERS if any("nbdev_export(" in cell for cell in code_cells(path))]


def test_parameters_are_literals_with_comments():
    from codetrace.runs.phases import notebook_parameters, phase_notebooks

    for phase, path in phase_notebooks().items():
        declared = notebook_parameters(path)
        assert declared, phase
        assert [p.name for p in declared.values() if not p.help] == [], f"{phase}: say what each parameter means"
        tagged = [c for c in json.loads(path.read_text())["cells"] if "parameters" in c["metadata"].get("tags", [])]
        assert len(tagged) == 1


def test_heavy_packages_are_imported_late():
    heavy = "torch transformers peft sklearn nnsight pandas pyarrow matplotlib papermill scipy statsmodels nbformat"
    probe = f"import sys, codetrace.cli; print([m for m in {heavy.split()} if m in sys.modules])"
    assert run(sys.executable, "-c", probe).stdout.strip() == "[]"


def test_settings_are_the_one_place_for_metadata():
    from configparser import ConfigParser
    from importlib import metadata

    import codetrace

    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(HOME / "settings.ini")
    assert codetrace.__version__ == settings["DEFAULT"]["version"] == metadata.version("codetrace")
    pins = (HOME / "constraints.txt").read_text()
    for name in "torch transformers nnsight numpy pandas pyarrow papermill matplotlib nbdev".split():
        assert re.search(rf"^{name}==", pins, re.M), f"{name} has broken before: pin it"
