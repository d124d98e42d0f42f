"""Phases 2 and 3 on runs that lie on disk as phases 0.1, 1.0, 1.2 and 1.5 leave them, with a latent planted in the states."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from codetrace.core.errors import BadInput
from codetrace.planted.latents import draw_planted_study
from codetrace.runs import run as runs_run
from codetrace.runs.execute import execute_phase
from codetrace.runs.manifest import all_runs
from codetrace.runs.run import open_run
from codetrace.sae.dataset import labelled_samples, load_labelled_activations, read_task_splits

MODEL = "tiny:llama"  # three layers of 48 numbers


def generation(study, split: str, temperature: list[float], samples: int, names, keep) -> None:
    "A run of phase generation whose states are the study's."
    parameters = {
        "model": MODEL,
        "problems": "basics",
        "split": split,
        "temperature": temperature,
        "samples": samples,
        "num_problems": 0,
    }
    run = open_run("generation", parameters, "made up")
    rows = np.flatnonzero(keep)
    rng = np.random.default_rng(0)
    n = len(rows)
    table = pd.DataFrame({
        "task_id": names[study.task[rows]], "temperature": np.resize(temperature, n), "sample": np.arange(n), "prompt": "def f(x):\n", "completion": [f"    return x + {i}\n" for i in range(n)],
        "passed": study.label[rows], "verdict": np.where(study.label[rows], "passed", "failed_assertion"), "prompt_tokens": rng.integers(50, 90, n), "generated_tokens": rng.integers(5, 60, n),
        "mean_logprob": -rng.gamma(2, 0.1, n), "difficulty": rng.integers(1, 5, n),
    })  # fmt: skip
    table.to_parquet(run.folder / "samples.parquet", index=False)
    (run.folder / "activations").mkdir()
    for kind in ("last_prompt", "last_generated"):
        states = {
            f"resid_post.{layer}": torch.from_numpy(
                study.states_by_layer[layer][rows]
                if kind == "last_generated"
                else rng.permutation(study.states_by_layer[layer][rows])
            )
            for layer in range(3)
        }
        save_file(
            {name: x.contiguous() for name, x in states.items()},
            run.folder / "activations" / f"{kind}.safetensors",
            {"rows": str(n), "kind": kind},
        )
    run.finish("made up")


def inputs_of(manifest: dict) -> dict[str, str]:
    "Ids of the runs that a run read, by the parameter that names them."
    return {record["parameter"]: record["run_id"] for record in manifest["inputs"]}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "All that comes before phase 2."
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CODETRACE_RUNS", str(root))
        made = draw_planted_study(tasks=80, samples=3, layers=3, d_sae=48, planted_auroc=0.8, seed=3)
        names = np.array([f"task {i:02d}" for i in range(80)])
        by_split = {"sae": names[:40], "hyperparams": names[40:50], "validation": names[50:]}
        run = open_run("splits", {"problems": "basics"}, "made up")
        (run.folder / "split_metadata.json").write_text(
            json.dumps({"task_ids": {k: list(v) for k, v in by_split.items()}})
        )
        no_pairs = pd.DataFrame({"first": [], "second": [], "overlap": [], "why": []})
        no_pairs.to_parquet(run.folder / "near_duplicates.parquet", index=False)
        run.finish("made up")
        generation(made, "all", [0.0], 1, names, np.ones(240, bool))
        generation(made, "validation", [0.3, 0.6, 0.9, 1.2], 5, names, made.task >= 50)
        run = open_run("saes", {"model": MODEL}, "made up")
        index = {}
        for layer, sae in enumerate(made.saes):
            sae.metadata["model_name"] = MODEL
            sae.save(run.folder / f"layer_{layer}")
            index[str(layer)] = {"folder": f"layer_{layer}", **sae.metadata}
        run.write_json("saes.json", index)
        run.finish("made up")
        text = tmp_path_factory.mktemp("text")
        for i in range(40):
            (text / f"{i}.py").write_text(f"def f_{i}(x):\n    return [y + {i} for y in x]\n" * 60)
        yield made, str(text), root


@pytest.fixture(scope="module")
def search_and_validation(study):
    "Phase 2, then phase 3."
    _, text, root = study
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CODETRACE_RUNS", str(root))
        two = execute_phase(
            "2",
            {"input": "1.0", "text": text, "text_tokens": 512, "max_density": 1.0, "shuffles": 99, "num_cards": 2},
            show_progress=False,
        )
        three = execute_phase(
            "3",
            {"input": "1.0", "sampled": "1.2", "candidates": 3, "random_latents": 3, "resamples": 60},
            show_progress=False,
        )
    return two, three


def test_phase_2_finds_the_planted_latent(study, search_and_validation):
    made = study[0]
    two = search_and_validation[0]
    cards = json.loads((runs_run.Path(two["folder"]) / "cards.json").read_text())
    first = max(cards, key=lambda card: card["score"])
    assert (first["position"], first["layer"], first["latent"], first["predicts"]) == (
        "last_generated",
        made.layer,
        made.latent,
        "correct",
    )
    assert first["family_wise_p"] <= 0.05 and len(first["promoted_tokens"]) == 8 and first["top_examples"]
    assert inputs_of(two).keys() == {"input", "splits", "saes"} and "Beyond chance at 5%" in two["headline"]
    assert "labels of 40 of 40 tasks permuted as wholes" in two["headline"]
    assert {"scores.parquet", "null.parquet", "separation.png", "cards.png", "latents.tex", "latents.md"} <= two[
        "outputs"
    ].keys()


def test_phase_3_judges_it_beside_its_baselines(study, search_and_validation):
    made = study[0]
    three = search_and_validation[1]
    folder = runs_run.Path(three["folder"])
    table = pd.read_parquet(folder / "validation.parquet")
    name = f"latent {made.latent} of layer {made.layer} (correct)"
    row = table[(table["name"] == name) & (table["target"] == "correct") & (table["measure"] == "AUROC")].iloc[0]
    assert row["low"] <= 0.8 <= row["high"] and row["low"] > 0.55
    assert table["name"].nunique() == 18 and table["measure"].nunique() == 8
    assert (
        inputs_of(three).keys() == {"input", "splits", "saes", "latents", "sampled"}
        and inputs_of(three)["latents"] == search_and_validation[0]["run_id"]
    )
    assert {
        "choice.json",
        "verdict.json",
        "validation_correct.tex",
        "validation_incorrect.md",
        "roc.png",
        "ladder.png",
        "temperature.png",
        "difficulty.png",
    } <= three["outputs"].keys()
    assert "AUROC" in three["headline"] and "baselines" in three["headline"]
    assert " by t-statistic" not in three["headline"] and table["name"].str.contains(" by t-statistic ").any()


def test_what_is_chosen_does_not_depend_on_validation_labels(study, search_and_validation):
    "With the labels of the validation split turned round, the choice is the same to the last digit."
    from codetrace.models.activations import States
    from codetrace.sae.latent_search import top_latents
    from codetrace.sae.predictors import fit_predictors

    root = study[2]
    generated = next(m for m in all_runs(root) if m["phase"] == "generation" and m["parameters"]["split"] == "all")
    splits = read_task_splits(runs_run.Path(next(m for m in all_runs(root) if m["phase"] == "splits")["folder"]))
    saes = runs_run.Path(next(m for m in all_runs(root) if m["phase"] == "saes")["folder"])
    pool = pd.read_parquet(runs_run.Path(search_and_validation[0]["folder"]) / "scores.parquet")
    saved = States(generated["folder"])
    chosen = []
    for turn in (False, True):
        table = saved.table.copy()
        table["passed"] ^= turn & (table["task_id"].map(splits) == "validation")
        choosing = load_labelled_activations(saved, saes, labelled_samples(table, splits, ["sae", "hyperparams"]))
        some, _ = fit_predictors(
            choosing.subset(np.ones(len(choosing.rows), bool)),
            pd.concat([top_latents(pool, 2), top_latents(pool, 1, by="t")]),
            n_random=2,
        )
        chosen.append([(p.name, p.chosen_auroc, str(p.thresholds)) for p in some])
    assert chosen[0] == chosen[1]


def test_missing_inputs_say_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv("CODETRACE_RUNS", str(tmp_path))
    with pytest.raises(BadInput, match="codetrace run"):
        execute_phase("2", {"input": "1.0"}, show_progress=False)


def test_near_duplicate_tasks_are_one_unit(study, search_and_validation):
    "Pairs that the splits name become groups of the samples; a run without them is refused."
    from codetrace.sae.dataset import read_task_groups

    folder = runs_run.Path(next(m for m in all_runs(study[2]) if m["phase"] == "splits")["folder"])
    groups = read_task_groups(folder)
    assert len(set(groups.values())) == len(groups) == 80
    copy = folder.parents[1] / "splits_copy"
    copy.mkdir()
    (copy / "split_metadata.json").write_text((folder / "split_metadata.json").read_text())
    with pytest.raises(BadInput, match=r"run phase 0\.1 again"):
        read_task_groups(copy)
    pairs = pd.DataFrame({"first": ["task 00", "task 01"], "second": ["task 01", "task 07"]})
    pairs.to_parquet(copy / "near_duplicates.parquet", index=False)
    groups = read_task_groups(copy)
    assert len({groups[task] for task in ("task 00", "task 01", "task 07")}) == 1
    assert len(set(groups.values())) == 78
    saved = pd.read_parquet(
        next(runs_run.Path(m["folder"]) for m in all_runs(study[2]) if m["phase"] == "generation") / "samples.parquet"
    )
    rows = labelled_samples(saved, read_task_splits(folder), ["sae"], groups)
    assert set(rows.loc[rows["task_id"].isin(["task 00", "task 01", "task 07"]), "group"]) == {groups["task 00"]}


@pytest.mark.slow
def test_a_search_on_the_validation_split_serves_no_validation(study, search_and_validation, monkeypatch):
    "It is typed between search and validation, with notebooks that run: the candidates come from the other search."
    _, text, root = study
    monkeypatch.setenv("CODETRACE_RUNS", str(root))
    options = {"input": "1.0", "text": text, "text_tokens": 512, "max_density": 1.0, "shuffles": 99, "num_cards": 2}
    leaking = execute_phase("2", options | {"split": "validation"}, show_progress=False)
    judged = {"input": "1.0", "candidates": 2, "random_latents": 2, "resamples": 20}
    three = execute_phase("3", judged, show_progress=False)
    assert inputs_of(three)["latents"] == search_and_validation[0]["run_id"] != leaking["run_id"]
    with pytest.raises(BadInput, match="made with split='validation'"):
        execute_phase("3", judged | {"latents": leaking["run_id"]}, show_progress=False)
