"The house: what is exported is what the notebooks say, names are unique, phases declare themselves once."

import ast
import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from working_tree import copy_working_tree

import codetrace
from codetrace.runs import input_checks, value_checks
from codetrace.runs.parameters import notebook_parameters
from codetrace.runs.phases import phase_function, phases

HOME = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((HOME / "nbs").rglob("*.ipynb"))
PAGES = {"index", "recipes", "chapters"}  # text only, no module
CHAPTERS = [path for path in NOTEBOOKS if path.stem not in PAGES]
MODULES = sorted(path for path in (HOME / "codetrace").rglob("*.py") if path.stem not in ("__init__", "_modidx"))


def code_cells(path: Path) -> list[str]:
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


def module_of(path: Path) -> str:
    return re.search(r"#\| default_exp ([\w.]+)", "\n".join(code_cells(path))).group(1)


def run(*words: str, cwd: Path = HOME) -> subprocess.CompletedProcess:
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    "The working tree as git would see it if everything were added, in a folder of its own."
    return copy_working_tree(tmp_path_factory.mktemp("house") / "clone")


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
    module = clone / "codetrace" / "core" / "errors.py"
    module.write_text(module.read_text().replace("did you mean", "did you perhaps mean"))
    (clone / "codetrace" / "core" / "stray.py").write_text("")
    drift = {"M codetrace/core/errors.py", "?? codetrace/core/stray.py"}
    assert drift == {line.strip() for line in changes(clone).splitlines()}


def test_the_notebooks_are_clean(clone):
    assert run("nbdev_clean", cwd=clone).returncode == 0
    assert changes(clone) == "", "run nbdev_clean"


def test_readme_index_and_quarto_are_made_from_the_notebooks(clone):
    assert run(sys.executable, "scripts/readme.py", cwd=clone).returncode == 0
    assert changes(clone) == "", "run `make export`"


def test_every_module_has_one_notebook_of_its_name():
    modules = {path.relative_to(HOME / "codetrace").with_suffix("").as_posix().replace("/", ".") for path in MODULES}
    assert sorted(map(module_of, CHAPTERS)) == sorted(modules)
    for path in CHAPTERS:
        *folders, name = path.relative_to(HOME / "nbs").with_suffix("").parts
        name = re.sub(r"^\d+_", "", name) if folders == ["phases"] else name
        assert ".".join([*folders, name]) == module_of(path), path


def test_every_module_says_what_it_does():
    for path in CHAPTERS:
        title, _, line, *_ = [*"".join(json.loads(path.read_text())["cells"][0]["source"]).splitlines(), "", ""]
        assert title.startswith("# ") and re.fullmatch(r"> [A-Z].+[^?]", line), f"{path}: {line}"


def test_no_two_modules_export_the_same_name():
    homes = {}
    for info in pkgutil.walk_packages(codetrace.__path__, "codetrace."):
        if not info.ispkg and not info.name.endswith("_modidx"):
            for name in importlib.import_module(info.name).__all__:
                homes.setdefault(name, []).append(info.name)
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}


def test_no_module_is_longer_than_600_lines():
    lengths = {path.relative_to(HOME).as_posix(): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: length for name, length in lengths.items() if length > 600} == {}


AXES = "active batch cells d_head d_model d_sae defined frequency head latents layer metric out points pos program rows shuffles slot sequence some task tokens vocab"


def test_every_name_in_a_module_is_defined():
    "A name that only a hidden cell imports is there in the notebook, and not in the module."
    allowed = [*AXES.split(), "get_ipython"]  # axes of jaxtyping stand in strings
    words = ["--isolated", "--select", "F821", "--config", f"builtins={allowed!r}", "--output-format", "concise"]
    done = run("ruff", "check", *words, "codetrace")
    assert done.returncode == 0, done.stdout


VAGUE_NAMES = {"found", "own", "about", "said", "at", "given", "more", "one", "other"}
NAMED_FOLDERS = ("codetrace", "tests", "bench", "scripts")


def local_names(source: str) -> list[tuple[int, str]]:
    "Names that are assigned, looped over or taken as parameters, with their lines; `self + other` may keep its word."
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append((node.lineno, node.id))
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        is_operator = is_function and re.fullmatch(r"__(?!init__|call__)\w+__", node.name)
        if (is_function or isinstance(node, ast.Lambda)) and not is_operator:
            arguments = [child for child in ast.walk(node.args) if isinstance(child, ast.arg)]
            names += [(argument.lineno, argument.arg) for argument in arguments]
    return names


@pytest.mark.parametrize("folder", NAMED_FOLDERS)
def test_a_name_says_what_it_holds(folder):
    vague = [
        f"{path.relative_to(HOME)}:{line}: {name}"
        for path in sorted((HOME / folder).rglob("*.py"))
        for line, name in local_names(path.read_text())
        if name in VAGUE_NAMES
    ]
    assert not vague, "give it a name that says what it holds: " + "; ".join(vague)


def test_a_vague_name_is_seen():
    source = "for at in rows:\n    found, x = at\ndef total(one, *more, said=0):\n    return [own for own in one]\n"
    assert {name for _, name in local_names(source)} - {"x"} == {"at", "found", "one", "more", "said", "own"}
    assert local_names("class Sum:\n    def __add__(self, other):\n        return other\n") == []


def test_what_the_package_offers_is_there():
    assert len(codetrace.__all__) == 10
    assert all(getattr(codetrace, name).__doc__ for name in codetrace.__all__)
    with pytest.raises(AttributeError):
        codetrace.nothing


def test_the_import_contract_holds():
    done = run("lint-imports")
    assert done.returncode == 0, done.stdout


def test_the_import_contract_can_fail(clone):
    module = clone / "codetrace" / "core" / "errors.py"
    module.write_text("import codetrace.runs.signals\n" + module.read_text())
    done = run("lint-imports", "--no-cache", cwd=clone)
    assert done.returncode != 0 and "codetrace.core is not allowed to import codetrace.runs" in done.stdout


def test_the_canary_fails():
    "nbdev_test exits 0 when it finds nothing to run: here is a notebook that it must find, and that must fail."
    done = run("nbdev_test", "--path", "tests/canary.ipynb", "--n_workers", "1")
    assert done.returncode != 0 and "the canary sings" in done.stderr + done.stdout


def test_phases_never_write_the_library():
    assert not [path.name for path in CHAPTERS if any("nbdev_export(" in cell for cell in code_cells(path))]


@pytest.mark.parametrize("name", phases())
def test_a_phase_declares_what_there_is(name):
    phase = phases()[name]
    declared = notebook_parameters(phase.notebook)
    assert declared, "no parameters"
    assert [p.name for p in declared.values() if not p.help] == [], "say what each parameter means"
    for number in phase.numbers.values():
        assert set(number.settings) | set(number.inputs) <= set(declared)
        assert set(number.distinguishing_settings) <= set(number.settings)
        assert set(number.inputs) <= {read.parameter for read in phase.reads}
    assert {read.parameter for read in phase.reads} <= set(declared)
    assert {read.through for read in phase.reads} - {""} <= {read.parameter for read in phase.reads}
    assert not phase.claims or callable(phase_function(phase, phase.claims))
    assert not phase.limitations or callable(phase_function(phase, phase.limitations))
    assert any(re.search(r"\brun\.finish\(\s*\w", cell) for cell in code_cells(phase.notebook)), "no headline"
    assert set(phase.rules) | set(phase.made_up_reads) <= set(declared)
    assert set(phase.checks) <= set(value_checks.__all__) and set(phase.input_checks) <= set(input_checks.__all__)
    source = phase.notebook.read_text()
    assert [figure for figure in phase.figures if figure.removesuffix(".png") not in source] == []


def test_every_run_that_a_phase_reads_is_declared():
    "A cell never looks for a run: none calls what finds one."
    finders = {"resolve_run", "newest_run", "find_run", "all_runs"}
    for name, phase in phases().items():
        cells = [cell for cell in code_cells(phase.notebook) if not re.search(r"^#\| *(hide|export)", cell, re.M)]
        trees = [ast.parse(re.sub(r"^[%!].*$", "pass", cell, flags=re.M)) for cell in cells]
        called = {
            node.func.id
            for tree in trees
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not called & finders, f"{name} looks for a run: {called & finders}"


def test_syntax_trees_are_made_in_one_place():
    "Python 3.11 has threads that parse at the same time disturb each other; processes of the sandbox are their own."
    modules = [path for path in (HOME / "codetrace").rglob("*.py") if path.parent.name != "sandbox"]
    parsing = [str(path.relative_to(HOME)) for path in modules if re.search(r"\bast\.parse\(", path.read_text())]
    assert parsing == ["codetrace/core/python_source.py"]


def test_heavy_packages_are_imported_late():
    heavy = "torch transformers peft sklearn nnsight pandas pyarrow matplotlib papermill scipy statsmodels nbformat pydantic"
    probe = f"import sys, codetrace, codetrace.cli; print([m for m in {heavy.split()} if m in sys.modules])"
    assert run(sys.executable, "-c", probe).stdout.strip() == "[]"


def test_settings_are_the_one_place_for_metadata():
    from configparser import ConfigParser
    from importlib import metadata

    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(HOME / "settings.ini")
    assert codetrace.__version__ == settings["DEFAULT"]["version"] == metadata.version("codetrace")
    pins = (HOME / "constraints.txt").read_text()
    for name in "torch transformers nnsight numpy pandas pyarrow papermill matplotlib nbdev".split():
        assert re.search(rf"^{name}==", pins, re.M), f"{name} has broken before: pin it"


def test_known_type_errors_only_become_fewer():
    "Whoever mends some of them runs `make types`, and lowers this number."
    known = json.loads((HOME / "tests" / "types-baseline.json").read_text())["files"]
    assert sum(map(len, known.values())) <= 262
