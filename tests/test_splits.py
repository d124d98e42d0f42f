"What a notebook cannot hold of `difficulty` and `splits`: any size, any groups, chance, MBPP, and the phases run in batch."

import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codetrace.core.errors import BadInput
from codetrace.runs.execute import execute_phase
from codetrace.runs.manifest import NoInputRun
from codetrace.runs.parameters import phase_parameters, shorthand_parameters
from codetrace.tasks import near_duplicates
from codetrace.tasks.difficulty import DIFFICULTY_MEASURES, cyclomatic_complexity, nesting_depth
from codetrace.tasks.near_duplicates import find_near_duplicates, near_duplicate_groups
from codetrace.tasks.problem_splits import (
    SPLIT_SHARES,
    assign_splits,
    split_balance,
    split_problems,
    split_sizes,
    write_splits,
)
from codetrace.tasks.problems import Problem, load_problems

HERE = Path(__file__).parent
MBPP = HERE.parents[1] / "shared" / "data" / "mbpp.jsonl"
needs_mbpp = pytest.mark.skipif(not MBPP.is_file(), reason="the shared MBPP file is not here")


@given(n=st.integers(10, 5000))
def test_sizes_add_up(n):
    sizes = split_sizes(n)
    assert sum(sizes.values()) == n and list(sizes) == list(SPLIT_SHARES)
    assert all(abs(sizes[name] - n * share) < 1 and sizes[name] > 0 for name, share in SPLIT_SHARES.items())


@settings(max_examples=60, deadline=None)
@given(n=st.integers(10, 5000), kinds=st.integers(1, 400), seed=st.integers(0, 2**31))
def test_every_problem_is_in_one_split(n, kinds, seed):
    hardness = np.random.default_rng(seed).integers(0, kinds, n)
    splits = assign_splits(hardness, seed=seed)
    assert len(splits) == n and Counter(splits) == split_sizes(n)
    assert splits == assign_splits(hardness, seed=seed)


@settings(max_examples=100, deadline=None)
@given(n=st.integers(10, 600), seed=st.integers(0, 2**31), grouped=st.floats(0, 0.6), largest=st.integers(2, 12))
def test_groups_stay_together(n, seed, grouped, largest):
    rng = np.random.default_rng(seed)
    member = np.arange(n)
    start = 0
    while start < grouped * n:
        size = min(int(rng.integers(2, largest + 1)), n - start)
        member[start : start + size] = start
        start += size
    member = member[rng.permutation(n)]
    try:
        splits = assign_splits(rng.integers(1, 9, n), member, seed)
    except BadInput as error:
        assert "nothing is left for" in str(error) and Counter(member).most_common(1)[0][1] > 1 and n < 60
        return
    assert len(splits) == n and set(splits) == set(SPLIT_SHARES)
    assert all(len({splits[i] for i in np.flatnonzero(member == g)}) == 1 for g in set(member))
    over = max(Counter(member).values())
    assert all(abs(Counter(splits)[name] - size) <= over for name, size in split_sizes(n).items())


def test_ten_neighbours_in_difficulty_are_divided_as_the_whole():
    for seed in range(20):
        hardness = np.random.default_rng(seed).permutation(500)
        splits = np.array(assign_splits(hardness, seed=seed))[np.argsort(hardness)]
        for start in range(0, 500, 10):
            assert Counter(splits[start : start + 10]) == {"sae": 5, "hyperparams": 1, "validation": 4}


def test_chance_decides_where_a_problem_goes():
    "Over 1,000 seeds each of 40 problems is in `sae` half of the time, and a group of three as often as its share."
    member = np.array([0, 0, 0, *range(1, 38)])
    drawn = np.array([assign_splits(range(40), member, seed) for seed in range(1000)])
    share = (drawn == "sae").mean(axis=0)
    assert abs(share[3:].mean() - 0.5) < 0.02 and np.abs(share - 0.5).max() < 0.09
    assert np.abs((drawn == "validation").mean(axis=0) - 0.4).max() < 0.09


def made(number: int, text: str, code: str) -> Problem:
    name = code.split("def ")[1].split("(")[0]
    return Problem(str(number), text, code, (f"assert {name}(1)",), "", name, "made", "")


def test_what_is_a_near_duplicate():
    duplicates = find_near_duplicates(
        [
            made(0, "Sum the list.", "def a(x):\n    'Sum.'\n    return sum(x)  # sum"),
            made(1, "Add everything up, please.", "def b(x):\n    return sum(x)"),
            made(2, "Write a function to find the area of a cone.", "def area(x):\n    return 3 * x"),
            made(3, "Write a function to find the area of a cube!", "def area(x):\n    return x * x"),
            made(4, "Write a function to find the area of a cone.", "def other(x):\n    return 4 * x"),
            made(5, "Write a function to sort words by length.", "def by(x):\n    return sorted(x, key=len)"),
        ]
    )
    assert {(r.first, r.second): r.why for r in duplicates.itertuples()} == {
        (0, 1): "same reference",
        (2, 3): "description",
        (2, 4): "description",
        (3, 4): "description",
    }
    assert list(near_duplicate_groups(6, duplicates)) == [0, 0, 1, 1, 1, 2]


def test_a_name_that_everybody_uses_says_nothing():
    many = [
        made(i, f"Return the number {i} and nothing else of it.", f"def solve(x):\n    return {i}") for i in range(40)
    ]
    assert set(find_near_duplicates(many, 0.99)["why"]) <= {"description"}


@needs_mbpp
def test_no_near_duplicate_of_mbpp_is_missed():
    "MinHash may miss a pair; counted exactly over all 474,000 pairs, it misses none."
    problems = load_problems(str(MBPP))
    pairs = find_near_duplicates(problems)
    texts = [near_duplicates._word_pairs(p.text) for p in problems]
    near = {
        (a, b)
        for a, b in combinations(range(len(problems)), 2)
        if near_duplicates._jaccard_overlap(texts[a], texts[b]) >= 0.75
    }
    assert len(near) > 100 and near <= set(zip(pairs["first"], pairs["second"]))
    member = near_duplicate_groups(len(problems), pairs)
    ids = {p.task_id: i for i, p in enumerate(problems)}
    assert member[ids["872"]] == member[ids["216"]] and member[ids["82"]] == member[ids["312"]]
    assert 150 < sum(Counter(member)[g] > 1 for g in member) < 250 and max(Counter(member).values()) < 15


@needs_mbpp
def test_mbpp_is_divided_evenly():
    table, _ = split_problems(load_problems(str(MBPP)))
    assert table["split"].value_counts().to_dict() == {"sae": 487, "validation": 390, "hyperparams": 97}
    even = split_balance(table)
    assert ((even["low"] <= even["target"]) & (even["target"] <= even["high"])).mean() > 0.9
    assert (table.groupby("group")["split"].nunique() == 1).all()


@pytest.mark.parametrize("name", ["basics", "humaneval"])
def test_files_hold_whole_problems(name, tmp_path):
    everything = load_problems(name)
    table, pairs = split_problems(everything)
    paths = write_splits(table, tmp_path, name)
    assert [p.name for p in paths] == [
        f"sae_{name}.parquet",
        f"hyperparams_{name}.parquet",
        f"validation_{name}.parquet",
    ]
    read = [load_problems(str(path)) for path in paths]
    assert sorted(p.task_id for part in read for p in part) == sorted(p.task_id for p in everything)
    by_id = {p.task_id: p for p in everything}
    assert all(p == by_id[p.task_id] for part in read for p in part)
    assert {"cyclomatic_complexity", "lines", "nesting", "asserts", "tokens", "group", "split"} <= set(
        pd.read_parquet(paths[0]).columns
    )
    assert name != "basics" or len(pairs) == 0


def test_long_chains_of_elif_are_read():
    chain = "def f(x):\n    if x == 0:\n        return 0\n" + "".join(
        f"    elif x == {i}:\n        return {i}\n" for i in range(1, 60)
    )
    assert nesting_depth(chain) == 1 and cyclomatic_complexity(chain) == 61


@pytest.mark.parametrize("measure", DIFFICULTY_MEASURES)
def test_any_measure_can_stratify(measure):
    table, _ = split_problems(load_problems("humaneval", 60), by=measure)
    assert table["split"].value_counts().to_dict() == split_sizes(60)


def test_mistakes_are_said():
    with pytest.raises(BadInput, match="did you mean 'lines'"):
        split_problems(load_problems(limit=20), by="line")
    with pytest.raises(BadInput, match="similarity must be above 0"):
        split_problems(load_problems(limit=20), similarity=75)
    with pytest.raises(BadInput, match="at least 10 are needed"):
        split_problems(load_problems(limit=9))


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CODETRACE_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("IN_TEST", raising=False)
    return tmp_path / "runs"


@pytest.mark.slow
def test_phases_in_batch(root):
    "Phase 0, then 0.1 that checks against it; the other problem set finds no run to check against."
    done = execute_phase("0", {"problems": "basics", "num_problems": 40}, show_progress=False)
    assert done["phase"] == "difficulty" and "40 of 40 references pass" in done["headline"]
    assert {"difficulty_basics.parquet", "difficulty.png", "summary.json"} <= set(done["outputs"])
    parameters = {"problems": "basics", "num_problems": 40, "input": "0"}
    done = execute_phase("0.1", parameters, show_progress=False)
    folder = Path(done["folder"])
    assert done["status"] == "complete" and done["inputs"][0]["phase"] == "difficulty"
    metadata = json.loads((folder / "split_metadata.json").read_text())
    assert (
        metadata["split_sizes"] == {"sae": 20, "hyperparams": 4, "validation": 16} and metadata["total_problems"] == 40
    )
    read = {part: [p.task_id for p in load_problems(str(folder / f"{part}_basics.parquet"))] for part in SPLIT_SHARES}
    assert read == metadata["task_ids"] and done["problems"]["n"] == 40
    with pytest.raises(NoInputRun, match="codetrace run 0 --problems humaneval"):
        execute_phase("splits", {"problems": "humaneval", "input": "difficulty"}, show_progress=False)


@pytest.mark.slow
@needs_mbpp
@pytest.mark.parametrize("name", ["basics", "humaneval", str(MBPP)])
def test_phases_on_whole_sets(name, root):
    n = len(load_problems(name))
    done = execute_phase("0", {"problems": name}, show_progress=False)
    assert f"{n} of {n} references pass" in done["headline"]
    done = execute_phase("0.1", {"problems": name, "input": "difficulty"}, show_progress=False)
    assert sum(json.loads((Path(done["folder"]) / "split_metadata.json").read_text())["split_sizes"].values()) == n


def test_phases_go_by_number_too():
    from typer.testing import CliRunner

    from codetrace.cli import app

    output = {name: CliRunner().invoke(app, ["phases", name]).stdout for name in ("0", "difficulty", "0.1", "splits")}
    assert (
        output["0"] == output["difficulty"] != output["0.1"] == output["splits"] and "stratify_by" in output["splits"]
    )
    declared = phase_parameters("splits")
    assert shorthand_parameters(declared, problems="humaneval", n=20) == {"problems": "humaneval", "num_problems": 20}
