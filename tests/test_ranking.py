"""Phases 3.4 and 3.5 and `codetrace rank`: planted truth is found, nothing is found where nothing is, and every number follows from the stored scores."""

import json
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from codetrace.cli import app
from codetrace.core.errors import BadInput
from codetrace.core.metrics import auroc
from codetrace.models.activations import States
from codetrace.planted.latents import draw_planted_prompt_states, draw_planted_study
from codetrace.runs.execute import execute_phase
from codetrace.runs.run import open_run
from codetrace.sae.nested_probes import ProbeSettings, choose_latent, choose_probe, probe_candidates
from codetrace.sae.score_tables import auroc_null
from codetrace.sae.separation import encode_active_latents
from codetrace.tasks.answer_choice import ORACLE, RANDOM_CHOICE, choice_rates, choice_table

MODEL = "tiny:llama"  # three layers of 48 numbers
GRID = (ProbeSettings(8, 0.01), ProbeSettings(32, 0.01))


def choose(made):
    "Probe and latent of a made-up study, by nested folds on all of its rows."
    label = made.rows["label"].to_numpy()
    group = made.rows["group"].to_numpy()
    layers = [probe_candidates(made.states("last_prompt", i), i, label, group, GRID) for i in made.layers]
    latent = choose_latent(
        lambda i: encode_active_latents(made.sae(i), made.states("last_prompt", i)), made.layers, label, group
    )
    return choose_probe(layers, label, group, GRID), latent


def nested_areas(planted_auroc: float, seeds: range, tasks: int) -> pd.DataFrame:
    "The AUROC that was chosen by, and the nested one, of studies; and the p of the nested scores."
    rows = []
    for seed in seeds:
        made, _ = draw_planted_prompt_states(seed, tasks, planted_auroc)
        for name, choice in zip(("probe", "latent"), choose(made)):
            row = {"name": name, "chosen": choice.chosen["auroc"], "nested": auroc(made.rows["label"], choice.scores)}
            rows.append(row | {"p": auroc_null(made.rows, choice.scores, 99, seed)[0]})
    return pd.DataFrame(rows)


def test_a_few_studies_without_a_planted_latent_show_the_optimism_of_the_choice():
    areas = nested_areas(0.5, range(2), 50)
    of_latents = areas[areas["name"] == "latent"]
    assert of_latents["chosen"].min() > 0.62  # the best of 192 latents, where it was chosen
    assert areas["nested"].mean() < 0.58


@pytest.mark.slow
def test_nested_scores_are_at_chance_where_nothing_is_planted_and_above_it_where_something_is():
    "Sixty studies of each kind: labels that go with no state are called foretold in one of twenty, not more often."
    nothing = nested_areas(0.5, range(60), 80)
    by_name = nothing.groupby("name")
    assert (by_name["nested"].mean() < 0.52).all(), by_name["nested"].mean()
    assert ((nothing["p"] <= 0.05).groupby(nothing["name"]).mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 60)).all()
    something = nested_areas(0.85, range(20), 120)
    assert (something.groupby("name")["nested"].mean() > 0.68).all()
    assert ((something["p"] <= 0.05).groupby(something["name"]).mean() >= 0.9).all()


@pytest.mark.slow
def test_labels_shuffled_by_group_find_nothing_however_the_groups_are_built():
    "Near-duplicates share state and label: with groups as units p is uniform, though rows are not independent."
    rng = np.random.default_rng(0)
    p_values = []
    for _ in range(100):
        group = np.repeat(np.arange(30), 3)
        rows = pd.DataFrame({"task_id": np.arange(90), "group": group, "label": (rng.random(30) < 0.5)[group]})
        score = rng.normal(size=30)[group] + 0.1 * rng.normal(size=90)
        p_values.append(auroc_null(rows, score, 199, 1)[0])
    assert 0.0 <= np.mean(np.array(p_values) <= 0.05) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 100)


def test_who_knows_the_truth_is_the_oracle_and_who_knows_nothing_takes_any_answer():
    rng = np.random.default_rng(3)
    task = np.repeat(np.arange(120), 5)
    answers = pd.DataFrame({"task_id": task, "group": task // 2, "temperature": np.tile([0.3, 0.9], 300)})
    answers["passed"] = rng.random(600) < rng.beta(1, 2, 120)[task]
    answers["truth"] = answers["passed"] * 1.0
    answers["noise"] = rng.normal(size=600)
    table = choice_table(choice_rates(answers, ["truth", "noise"]), 500).set_index(["k", "name"])
    for k in table.index.get_level_values("k").unique():
        assert table.loc[(k, "truth"), "value"] == pytest.approx(table.loc[(k, ORACLE), "value"], abs=1e-12)
        assert table.loc[(k, "noise"), "gain_low"] <= 0 <= table.loc[(k, "noise"), "gain_high"]


def by_hand(passed: list[bool], scores: list[float], k: int) -> float:
    "The mean over every set of k of whether the best-scored one is right, equal scores sharing."
    best = []
    for members in combinations(range(len(passed)), k):
        top = max(scores[i] for i in members)
        tied = [passed[i] for i in members if scores[i] == top]
        best.append(sum(tied) / len(tied))
    return sum(best) / len(best)


def write_generation(study, tasks: np.ndarray, kind: str, **parameters) -> None:
    "A run of phase generation whose states are the study's."
    run = open_run(
        "generation",
        {"model": MODEL, "problems": "basics", "prompt": "pva", "num_problems": 0, **parameters},
        "made up",
    )
    rows = np.flatnonzero(np.isin(study.task, tasks))
    n = len(rows)
    rng = np.random.default_rng(0)
    label = study.label[rows]
    table = pd.DataFrame({
        "task_id": (study.task[rows] + 1).astype(str), "temperature": np.resize(parameters["temperature"], n), "sample": np.arange(n),
        "prompt": [f"task {t}:\n" for t in study.task[rows]], "completion": [f"    return x + {i}\n" for i in range(n)], "code": [f"def f(x):\n    return x + {i}\n" for i in range(n)],
        "passed": label, "verdict": np.where(label, "passed", "failed_assertion"), "prompt_tokens": rng.integers(50, 90, n), "generated_tokens": rng.integers(5, 60, n),
        "mean_logprob": -rng.gamma(2, 0.1, n), "difficulty": rng.integers(1, 5, n),
    })  # fmt: skip
    table.to_parquet(run.folder / "samples.parquet", index=False)
    (run.folder / "activations").mkdir()
    for stored in ("last_prompt", "last_generated"):
        states = {f"resid_post.{i}": torch.from_numpy(study.states_by_layer[i][rows]).contiguous() for i in range(3)}
        if stored != kind:
            states = {
                name: x[torch.randperm(n, generator=torch.Generator().manual_seed(1))].contiguous()
                for name, x in states.items()
            }
        save_file(states, run.folder / "activations" / f"{stored}.safetensors", {"rows": str(n), "kind": stored})
    run.finish("made up")


def write_splits_and_saes(study) -> None:
    "Runs of phases splits and saes."
    names = [str(i + 1) for i in range(120)]
    run = open_run("splits", {"problems": "basics"}, "made up")
    by_split = {"sae": names[:50], "hyperparams": names[50:60], "validation": names[60:]}
    (run.folder / "split_metadata.json").write_text(json.dumps({"task_ids": by_split}))
    pd.DataFrame({"first": ["1"], "second": ["2"]}).to_parquet(run.folder / "near_duplicates.parquet", index=False)
    run.finish("made up")
    run = open_run("saes", {"model": MODEL}, "made up")
    index = {}
    for layer, sae in enumerate(study.saes):
        sae.metadata["model_name"] = MODEL
        sae.save(run.folder / f"layer_{layer}")
        index[str(layer)] = {"folder": f"layer_{layer}", **sae.metadata}
    run.write_json("saes.json", index)
    run.finish("made up")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "All that phases 3.4 and 3.5 read, and their runs."
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CODETRACE_RUNS", str(root))
        one_each = draw_planted_study(tasks=120, samples=1, d_sae=48, planted_auroc=0.85, seed=3)
        several = draw_planted_study(tasks=120, samples=4, d_sae=48, planted_auroc=0.85, seed=3)
        write_splits_and_saes(one_each)
        write_generation(one_each, np.arange(120), "last_prompt", split="all", temperature=[0.0], samples=1)
        write_generation(
            several,
            np.arange(60, 120),
            "last_generated",
            split="validation",
            temperature=[0.3, 0.6, 0.9, 1.2],
            samples=5,
        )
        before = execute_phase("3.4", {"components": [8], "shuffles": 99, "resamples": 100}, show_progress=False)
        sized = {"components": [8], "shuffles": 99, "resamples": 100}
        ranking = execute_phase("3.5", sized, show_progress=False)
        yield one_each, before, ranking, root


@pytest.mark.slow
def test_phase_3_4_finds_what_is_planted_and_its_numbers_follow_from_the_scores(runs):
    made, before, _, _ = runs
    folder = Path(before["folder"])
    choice = json.loads((folder / "choice.json").read_text())
    assert (choice["latent"]["layer"], choice["latent"]["latent"]) == (made.layer, made.latent)
    scores = pd.read_parquet(folder / "scores.parquet")
    judged = scores[scores["set"] == "validation"]
    assert set(judged["task_id"]) == {str(i) for i in range(61, 121)}
    areas = pd.read_parquet(folder / "areas.parquet").query("measure == 'AUROC'").set_index("name")
    right = judged[judged["label"]]
    wrong = judged[~judged["label"]]
    assert {"verbalised confidence", "entropy of the first token", "all baselines together"} < set(areas.index)
    for name, area in areas["value"].items():
        pairs = right[name].to_numpy()[:, None] - wrong[name].to_numpy()[None]
        assert area == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean(), abs=1e-9)
    assert areas.loc["latent", "low"] > 0.5 and " foretells " in before["headline"]
    assert {"layers.png", "predictors.png", "prompts_validation.parquet", "auroc.tex"} <= before["outputs"].keys()


@pytest.mark.slow
def test_phase_3_5_counts_every_set_of_answers(runs):
    ranking = runs[2]
    folder = Path(ranking["folder"])
    scores = pd.read_parquet(folder / "scores.parquet")
    table = pd.read_parquet(folder / "choices.parquet").set_index(["k", "name"])["value"]
    assert set(scores["task_id"]) == {str(i) for i in range(61, 121)}
    for k, name in table.index:
        values = []
        for _, of_task in scores.groupby("task_id"):
            rates = []
            for _, answers in of_task.groupby("temperature"):
                passed = answers["passed"].tolist()
                known = {RANDOM_CHOICE: [0.0] * len(passed), ORACLE: [float(x) for x in passed]}
                rates.append(
                    by_hand(passed, known.get(name) or answers[name].tolist(), k) if k <= len(passed) else np.nan
                )
            values.append(np.nanmean(rates))
        assert table[k, name] == pytest.approx(np.mean(values), abs=1e-9)
    assert {"choice.png", "rankers.json", "temperatures.parquet"} <= ranking["outputs"].keys()


@pytest.mark.slow
def test_rank_orders_a_file_and_says_what_that_is_worth(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("CODETRACE_RUNS", str(runs[3]))
    path = tmp_path / "answers.jsonl"
    rows = [
        {"task_id": str(1 + i // 3), "completion": f"\ndef f(x):\n    return x + {i * 7}", "note": i} for i in range(6)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    for by in ("probe", "latent", "log-probability", "length", "own verdict"):
        done = CliRunner().invoke(app, ["rank", str(path), "--problems", "basics", "--by", by, "--quiet"])
        assert done.exit_code == 0, (by, done.output, done.exception)
        assert "validation problems the best of 3" in done.output or "the best of" in done.stderr
        ordered = [json.loads(line) for line in path.with_suffix(".ranked.jsonl").read_text().splitlines()]
        assert sorted(row["note"] for row in ordered) == list(range(6))
        assert [row["rank"] for row in ordered] == [1, 2, 3, 1, 2, 3] and {row["ranker"] for row in ordered} == {by}
        assert all(a["score"] >= b["score"] for a, b in pairwise(ordered) if a["task_id"] == b["task_id"])
        assert not list(tmp_path.glob(".ranking-*"))
    path.write_text(path.read_text() + '\n{"task_id": "nobody", "code": ""}')
    refused = CliRunner().invoke(app, ["rank", str(path), "--problems", "basics"])
    assert isinstance(refused.exception, BadInput) and "line 7" in str(refused.exception)
    unranked_model = CliRunner().invoke(app, ["rank", str(path), "--problems", "basics", "--model", "smollm2"])
    assert "no ranker is fitted for model 'smollm2' (there are some for tiny:llama)" in str(unranked_model.exception)
    assert "\n" not in str(unranked_model.exception)


@pytest.mark.slow
def test_labels_of_validation_reach_no_ranker(runs):
    "The rankers that were written down are those of the fitting rows alone, whatever the labels that judge."
    from codetrace.sae.answer_rankers import fit_rankers, load_rankers
    from codetrace.sae.dataset import LabelledActivations, labelled_samples, read_task_groups, read_task_splits

    ranking = runs[2]
    folders = {read["parameter"]: Path(read["folder"]) for read in ranking["inputs"]}
    splits = read_task_splits(folders["splits"])
    groups = read_task_groups(folders["splits"])
    saved = States(folders["input"])
    table = saved.table.assign(passed=saved.table["passed"] ^ (saved.table["task_id"].map(splits) == "validation"))
    rows = labelled_samples(table, splits, ["sae", "hyperparams"], groups)
    numbers = rows["row"].to_numpy()
    fitting = LabelledActivations(
        rows, ("last_generated",), (0, 1, 2), lambda kind, layer: saved.states(kind, layer, numbers), lambda layer: None
    )
    again = fit_rankers(fitting, [], [ProbeSettings(8, c) for c in (1e-3, 1e-2, 1e-1)])[0]
    stored = load_rankers(Path(ranking["folder"]))[0]["probe"]
    assert again.details == stored.details and np.allclose(again.probe.direction, stored.probe.direction)
