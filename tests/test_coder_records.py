"What the records of the code model's study say, computed again from their tables with other libraries."

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, rankdata
from sklearn.metrics import average_precision_score, f1_score, matthews_corrcoef, roc_auc_score
from statsmodels.stats.multitest import multipletests
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
    scores = foretold[1]
    of_mbpp = scores[scores["set"] != "transfer"]
    passed = answers[1].set_index("task_id")["verdict"].eq("passed")
    assert (of_mbpp.set_index("task_id")["label"] == passed.reindex(of_mbpp["task_id"])).all()
    groups = scores.groupby("group")["set"].nunique()
    assert groups.max() == 1, "near-duplicates on both sides of the split"
    assert scores["set"].value_counts().to_dict() == {"fitting": 584, "validation": 390, "transfer": 164}


@pytest.mark.parametrize("judged_on", ["validation", "transfer"])
def test_areas_are_those_of_sklearn(foretold, judged_on):
    _, scores, areas = foretold
    judged = scores[scores["set"] == judged_on]
    shown = areas[(areas["measure"] == "AUROC") & (areas["set"] == judged_on)].set_index("name")
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
        ["set", "name", "measure", "baseline"]
    )
    told = differences.loc[("validation", "probe", "AUROC", "all baselines together")]
    assert told["value"] == pytest.approx(np.mean(gaps), abs=0.01)
    assert told["low"] < np.quantile(gaps, 0.025) + 0.01 and np.quantile(gaps, 0.025) > 0  # simultaneous: wider
    assert f"AUROC {areas.loc[areas['name'] == 'probe', 'value'].iloc[0]:.2f}" in manifest["headline"]


@pytest.fixture(scope="module")
def validated(answers) -> tuple[dict, pd.DataFrame]:
    "The judgement of latents on held-out tasks: its manifest, and the scores of each answer."
    manifest = reference_runs("validation")[-1]
    assert answers[0]["run_id"] in [read["run_id"] for read in manifest["inputs"]]
    return manifest, pd.read_parquet(f"{manifest['folder']}/scores.parquet")


def test_the_labels_that_latents_are_judged_by_are_the_verdicts(validated, foretold, answers):
    _, scores = validated
    passed = answers[1].set_index("task_id")["verdict"].eq("passed")
    assert (scores.set_index("task_id")["label"] == passed.reindex(scores["task_id"])).all()
    held_out = foretold[1][foretold[1]["set"] == "validation"]
    assert set(scores["task_id"]) == set(held_out["task_id"]), "both were judged on the same tasks"


def test_measures_of_latents_and_baselines_are_those_of_sklearn(validated):
    manifest, scores = validated
    told = pd.read_parquet(f"{manifest['folder']}/validation.parquet")
    told = told[told["target"] == "correct"].pivot(index="name", columns="measure", values="value")
    label = scores["label"].to_numpy()
    choices = json.loads((Path(manifest["folder"]) / "choice.json").read_text())
    assert len(choices) == len(told) and sum(choice["baseline"] for choice in choices) >= 9
    for choice in choices:
        name = choice["name"]
        score = scores[choice["name"]]
        if "random latents" in name:  # the mean of twenty of them
            continue
        assert told.loc[name, "AUROC"] == pytest.approx(roc_auc_score(label, score), abs=1e-6), name
        assert told.loc[name, "AUPRC"] == pytest.approx(average_precision_score(label, score), abs=1e-6), name
        thresholds = choice["thresholds"]["correct"]
        if len(thresholds) == 1:
            predicted = score >= float(thresholds[0])
            assert told.loc[name, "F1"] == pytest.approx(f1_score(label, predicted), abs=1e-6), name
            assert told.loc[name, "MCC"] == pytest.approx(matthews_corrcoef(label, predicted), abs=1e-6), name


def test_the_latent_is_told_from_chance_and_loses_to_the_probe(validated):
    "A permutation of labels, and a bootstrap over groups of near-duplicates, written anew."
    manifest, scores = validated
    latent = next(name for name in scores if name.startswith("latent") and name.endswith("(correct)"))
    label = scores["label"].to_numpy()
    generator = np.random.default_rng(2)
    shuffled = [roc_auc_score(generator.permutation(label), scores[latent]) for _ in range(300)]
    assert max(shuffled) < roc_auc_score(label, scores[latent])
    groups = list(scores.groupby("group").indices.values())
    latent_scores, probe_scores = (scores[name].to_numpy() for name in (latent, "logistic probe"))
    gaps = []
    for _ in range(200):
        drawn = np.concatenate([groups[i] for i in generator.integers(0, len(groups), len(groups))])
        areas = [roc_auc_score(label[drawn], compared[drawn]) for compared in (latent_scores, probe_scores)]
        gaps.append(areas[0] - areas[1])
    differences = pd.read_parquet(f"{manifest['folder']}/differences.parquet")
    is_told = (differences["name"] == latent) & (differences["baseline"] == "logistic probe")
    told = differences[is_told & (differences["measure"] == "AUROC") & (differences["target"] == "correct")].iloc[0]
    assert told["value"] == pytest.approx(np.mean(gaps), abs=0.02)
    assert told["high"] < 0 and np.quantile(gaps, 0.975) < 0
    assert f"difference {told['value']:.2f}" in manifest["headline"]


def test_pass_at_1_on_humaneval_is_the_share_of_answers_that_pass(foretold):
    run_id = next(read["run_id"] for read in foretold[0]["inputs"] if read["parameter"] == "transfer")
    (manifest,) = [run for run in reference_runs("generation") if run["run_id"] == run_id]
    verdicts = pd.read_parquet(f"{manifest['folder']}/samples.parquet")["verdict"]
    greedy = next(row for row in manifest["summary"] if row["answers"] == "greedy")
    assert len(verdicts) == greedy["problems"] == 164
    n_passed = int((verdicts == "passed").sum())
    assert greedy["value"] == pytest.approx(n_passed / 164, abs=5e-4)
    wilson = proportion_confint(n_passed, 164, method="wilson")
    assert (greedy["low"], greedy["high"]) == pytest.approx(wilson, abs=2e-3)
    scores = foretold[1][foretold[1]["set"] == "transfer"]
    assert int(scores["label"].sum()) == n_passed


def test_saes_explain_what_the_headline_says_and_random_ones_do_not():
    manifest = reference_runs("saes")[-1]
    quality = pd.read_parquet(f"{manifest['folder']}/quality.parquet")
    learnt, random = (quality[quality["sae"] == name].set_index("layer") for name in ("seed 0", "random"))
    assert list(learnt.index) == [6, 12, 18, 22] and (learnt["explained_variance"] > 0.79).all()
    assert (learnt["dead"] < 0.1).all() and (learnt["explained_variance"] > 3 * random["explained_variance"]).all()
    for layer, row in learnt.iterrows():
        told = f"layer {layer}: explained variance {row['explained_variance']:.2f} (random {random.loc[layer, 'explained_variance']:.2f})"
        assert told in manifest["headline"]


@pytest.fixture(scope="module")
def searched(validated) -> tuple[dict, pd.DataFrame, pd.DataFrame, list[dict]]:
    "The search for latents that the judged ones come from: its manifest, all scores, the null, and its cards."
    run_id = next(read["run_id"] for read in validated[0]["inputs"] if read["parameter"] == "latents")
    (manifest,) = [run for run in reference_runs("latents") if run["run_id"] == run_id]
    scores, null = (pd.read_parquet(f"{manifest['folder']}/{name}.parquet") for name in ("scores", "null"))
    return manifest, scores, null, json.loads((Path(manifest["folder"]) / "cards.json").read_text())


def test_latents_of_the_cards_are_beyond_the_largest_that_permuted_labels_give(searched):
    manifest, scores, null, cards = searched
    assert np.allclose(scores["separation"], scores["correct"] - scores["incorrect"])
    largest = null[null["p"] == "family_wise_p"].copy()
    largest["draw"] = largest.groupby("position").cumcount()
    by_position = largest.pivot(index="draw", columns="position", values="largest")
    n = len(by_position)
    assert n == 1000 and by_position.notna().all(axis=None)
    all_positions = by_position.max(axis="columns")
    beyond = 0
    for card in cards:
        alone = (1 + (by_position[card["position"]] >= card["score"]).sum()) / (1 + n)
        together = (1 + (all_positions >= card["score"]).sum()) / (1 + n)
        assert card["family_wise_p"] == pytest.approx(alone) and card["family_wise_p_all_positions"] == pytest.approx(
            together
        )
        beyond += together <= 0.05
    assert f"{beyond} of the {len(cards)} best" in manifest["headline"]
    best = scores.loc[scores["adjusted_separation"].abs().idxmax()]
    assert (
        f"{best['adjusted_separation']:.2f} (latent {best['latent']} of layer {best['layer']}" in manifest["headline"]
    )
    assert best["latent"] == cards[0]["latent"] and f"{len(scores):,} latents tried" in manifest["headline"]


def test_the_pushes_that_were_chosen_are_the_best_that_were_tried():
    manifest = reference_runs("tuning")[-1]
    tried = pd.read_parquet(f"{manifest['folder']}/tried.parquet")
    assert (tried["right"] + tried["wrong"] == tried["n"]).all() and (tried["n"] == 48).all()
    assert np.allclose(tried["net"], (tried["corrected"] - tried["corrupted"]) / tried["n"])
    assert np.allclose(tried["pass@1"], (tried["right"] + tried["corrected"] - tried["corrupted"]) / tried["n"])
    for row in tried.itertuples():
        changed = int(row.corrected + row.corrupted)
        assert row.p == pytest.approx(binomtest(int(row.corrected), changed).pvalue if changed else 1.0), row
    best, worst = tried["net"].max(), tried["net"].min()
    assert f"net {best:+.2f}" in manifest["headline"] and f"net {worst:+.2f}" in manifest["headline"]


def test_heads_that_change_under_a_push_are_counted_at_the_rate_that_is_told():
    manifest = reference_runs("attention")[-1]
    changed = pd.read_parquet(f"{manifest['folder']}/changed.parquet")
    kept = changed.dropna(subset="p")
    _, q, *_ = multipletests(kept["p"], method="fdr_bh")
    assert np.allclose(q, kept["q"])
    random = pd.read_parquet(f"{manifest['folder']}/random.parquet")
    assert len(random) >= 119
    assert f"{(kept['q'] <= 0.05).sum()} of {len(changed)} heads and parts" in manifest["headline"]
    assert f"{random['n_changed'].min()} to {random['n_changed'].max()}" in manifest["headline"]
    largest = changed["change"].abs().max()
    by_kind = [kind["largest_change"] for _, kind in random.groupby("kind")]
    claim, _ = json.loads((Path(manifest["folder"]) / "claims.json").read_text())
    assert claim["p"] == pytest.approx(
        max((1 + (kind >= largest).sum()) / (1 + len(kind)) for kind in by_kind), abs=5e-3
    )
