"What the records of the code model's study say, computed again from their tables with other libraries."

import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score
from statsmodels.stats.proportion import proportion_confint

from codetrace.runs.manifest import reference_runs


@pytest.fixture(scope="module")
def foretold() -> tuple[dict, pd.DataFrame, pd.DataFrame]:
    "The run before a token is written: its manifest, its scores and its table of AUROC."
    manifest = reference_runs("pregeneration")[-1]
    scores = pd.read_parquet(f"{manifest['folder']}/scores.parquet")
    return manifest, scores, pd.read_parquet(f"{manifest['folder']}/areas.parquet")


@pytest.fixture(scope="module")
def answers(foretold) -> tuple[dict, pd.DataFrame]:
    "The answers that were foretold."
    run_id = next(read["run_id"] for read in foretold[0]["inputs"] if read["parameter"] == "input")
    (manifest,) = [run for run in reference_runs("generation") if run["run_id"] == run_id]
    return manifest, pd.read_parquet(f"{manifest['folder']}/samples.parquet")


def test_pass_at_1_is_the_share_of_answers_that_pass(answers):
    manifest, samples = answers
    greedy = next(row for row in manifest["summary"] if row["answers"] == "greedy")
    n_passed = int((samples["verdict"] == "passed").sum())
    assert len(samples) == samples["task_id"].nunique() == greedy["problems"] == 974
    assert greedy["value"] == pytest.approx(n_passed / len(samples), abs=5e-4)
    wilson = proportion_confint(n_passed, len(samples), method="wilson")
    assert (greedy["low"], greedy["high"]) == pytest.approx(wilson, abs=2e-3)


def test_the_labels_that_are_foretold_are_the_verdicts(foretold, answers):
    _, scores, _ = foretold
    passed = answers[1].set_index("task_id")["verdict"].eq("passed")
    assert (scores.set_index("task_id")["label"] == passed.reindex(scores["task_id"])).all()
    groups = scores.groupby("group")["set"].nunique()
    assert groups.max() == 1, "near-duplicates on both sides of the split"
    assert scores["set"].value_counts().to_dict() == {"fitting": 584, "validation": 390}


def test_areas_are_those_of_sklearn(foretold):
    _, scores, areas = foretold
    judged = scores[scores["set"] == "validation"]
    shown = areas[areas["measure"] == "AUROC"].set_index("name")
    assert {"probe", "prompt length", "difficulty of the reference", "all baselines together"} <= set(shown.index)
    for name, row in shown.iterrows():
        assert row["value"] == pytest.approx(roc_auc_score(judged["label"], judged[name]), abs=1e-9), name
        assert row["low"] < row["value"] < row["high"]


def test_the_probe_beats_its_baselines_and_chance_by_a_count_of_our_own(foretold):
    "A bootstrap over tasks and a permutation of labels, written anew."
    manifest, scores, areas = foretold
    judged = scores[scores["set"] == "validation"].reset_index(drop=True)
    label = judged["label"].to_numpy()
    generator = np.random.default_rng(1)
    ranks = rankdata(judged["probe"])
    n_right = label.sum()

    def area(labels: np.ndarray) -> float:
        "From the sum of ranks (Mann and Whitney)."
        return (ranks[labels].sum() - n_right * (n_right + 1) / 2) / (n_right * (len(labels) - n_right))

    assert max(area(generator.permutation(label)) for _ in range(500)) < area(label)
    gaps = []
    for _ in range(300):
        rows = judged.iloc[generator.integers(0, len(judged), len(judged))]
        probe, baselines = (roc_auc_score(rows["label"], rows[name]) for name in ("probe", "all baselines together"))
        gaps.append(probe - baselines)
    differences = pd.read_parquet(f"{manifest['folder']}/differences.parquet").set_index(
        ["name", "measure", "baseline"]
    )
    told = differences.loc[("probe", "AUROC", "all baselines together")]
    assert told["value"] == pytest.approx(np.mean(gaps), abs=0.01)
    assert told["low"] < np.quantile(gaps, 0.025) + 0.01 and np.quantile(gaps, 0.025) > 0  # simultaneous: wider
    assert f"AUROC {areas.loc[areas['name'] == 'probe', 'value'].iloc[0]:.2f}" in manifest["headline"]
