"What the records of the code model's study say, computed again from their tables with other libraries."

import json
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, bootstrap, rankdata
from sklearn.metrics import average_precision_score, f1_score, matthews_corrcoef, roc_auc_score
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from codetrace.runs.manifest import reference_runs
from codetrace.tasks.answer_choice import choice_rates


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


def test_saes_explain_what_the_headlines_say_and_random_ones_do_not():
    explained = {}
    for manifest in reference_runs("saes"):
        quality = pd.read_parquet(f"{manifest['folder']}/quality.parquet")
        learnt, random = (quality[quality["sae"] == name].set_index("layer") for name in ("seed 0", "random"))
        assert (learnt["dead"] < 0.1).all() and (learnt["explained_variance"] > 3 * random["explained_variance"]).all()
        for layer, row in learnt.iterrows():
            told = f"layer {layer}: explained variance {row['explained_variance']:.2f} (random {random.loc[layer, 'explained_variance']:.2f})"
            assert told in manifest["headline"]
        explained |= learnt["explained_variance"].to_dict()
    assert sorted(explained) == [6, 9, 12, 15, 18, 22]
    assert sorted(layer for layer, share in explained.items() if share >= 0.80) == [6, 9, 12, 15, 18]  # 22: 0.799


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


@pytest.fixture(scope="module")
def sampled() -> tuple[dict, pd.DataFrame]:
    "Five answers to each validation problem at each temperature."
    manifest = next(run for run in reversed(reference_runs("generation")) if run["parameters"]["samples"] == 5)
    return manifest, pd.read_parquet(f"{manifest['folder']}/samples.parquet")


def test_pass_at_k_of_sampled_answers_is_counted_problem_by_problem(sampled, foretold):
    manifest, samples = sampled
    held_out = foretold[1].loc[foretold[1]["set"] == "validation", "task_id"]
    assert set(samples["task_id"]) == set(held_out) and len(samples) == 390 * 4 * 5
    assert (samples.groupby(["temperature", "task_id"]).size() == 5).all()
    passed = samples["verdict"].eq("passed")
    by_problem = passed.groupby([samples["temperature"], samples["task_id"]])
    told = {(row["answers"], row["k"]): row for row in manifest["summary"]}
    generator = np.random.default_rng(3)
    for k, shares in ((1, by_problem.mean()), (5, by_problem.any().astype(float))):  # any of five: pass@5 of five
        for temperature, of_problems in shares.groupby(level=0):
            row = told[f"temperature {temperature:g}", k]
            assert row["value"] == pytest.approx(of_problems.mean(), abs=5e-4), (temperature, k)
            means = generator.choice(of_problems.to_numpy(), (2000, 390)).mean(1)
            interval = np.quantile(means, [0.025, 0.975])
            assert (row["low"], row["high"]) == pytest.approx(tuple(interval), abs=0.01), (temperature, k)


@pytest.fixture(scope="module")
def chosen(sampled) -> tuple[dict, pd.DataFrame, pd.DataFrame, list[str]]:
    "What it is worth to choose among these answers: manifest, scores of every answer, choices, and names of the scores."
    manifest = reference_runs("ranking")[-1]
    assert sampled[0]["run_id"] in [read["run_id"] for read in manifest["inputs"]]
    scores, choices, nulls = (
        pd.read_parquet(f"{manifest['folder']}/{name}.parquet") for name in ("scores", "choices", "nulls")
    )
    return manifest, scores, choices, list(nulls["name"])


def rate_of_choice(answers: pd.DataFrame, score: str, k: int) -> float:
    "How often the best-scored of k answers is right, over all sets of k; of equal ones any is."
    right = []
    for some in combinations(range(len(answers)), k):
        few = answers.iloc[list(some)]
        right.append(few.loc[few[score] == few[score].max(), "passed"].mean())
    return float(np.mean(right))


def test_choices_are_those_of_every_set_of_answers(chosen, sampled):
    _, scores, choices, names = chosen
    passed = sampled[1].set_index(["task_id", "temperature", "sample"])["verdict"].eq("passed")
    keys = pd.MultiIndex.from_frame(scores[["task_id", "temperature", "sample"]])
    assert (scores["passed"].to_numpy() == passed.reindex(keys).to_numpy()).all()
    some = sorted(scores["task_id"].unique())[::40]
    of_some = scores[scores["task_id"].isin(some)]
    for name in names:
        for k in (2, 5):
            by_hand = [rate_of_choice(few, name, k) for _, few in of_some.groupby(["task_id", "temperature"])]
            rates = choice_rates(of_some, [name], (k,))
            assert rates[name].mean() == pytest.approx(np.mean(by_hand), abs=1e-9), (name, k)
    by_problem = scores.groupby(["task_id", "temperature"])["passed"].agg(["mean", "any"]).groupby("task_id").mean()
    told = choices[choices["k"] == 5].set_index("name")["value"]
    assert told["random choice"] == pytest.approx(by_problem["mean"].mean(), abs=1e-9)
    assert told["oracle"] == pytest.approx(by_problem["any"].mean(), abs=1e-9)
    for name in names:
        best = scores[scores[name] == scores.groupby(["task_id", "temperature"])[name].transform("max")]
        of_best = best.groupby(["task_id", "temperature"])["passed"].mean().groupby("task_id").mean()
        assert told[name] == pytest.approx(of_best.mean(), abs=1e-9), name


def test_the_recommended_order_is_worth_what_the_headline_says(chosen):
    "Verdicts permuted within problems and temperatures, and a bootstrap over groups, written anew."
    manifest, scores, choices, names = chosen
    name = next(name for name in names if f"by {name} " in manifest["headline"])
    best = scores[scores[name] == scores.groupby(["task_id", "temperature"])[name].transform("max")].index
    told = choices[(choices["k"] == 5) & (choices["name"] == name)].iloc[0]
    generator = np.random.default_rng(4)

    def value(passed: pd.Series) -> float:
        of_best = passed[best].groupby([scores.loc[best, "task_id"], scores.loc[best, "temperature"]]).mean()
        return float(of_best.groupby("task_id").mean().mean())

    places = scores.groupby(["task_id", "temperature"]).indices.values()
    permuted = []
    for _ in range(40):
        passed = scores["passed"].to_numpy(float).copy()
        for rows in places:
            passed[rows] = generator.permutation(passed[rows])
        permuted.append(value(pd.Series(passed, index=scores.index)))
    p = pd.read_parquet(f"{manifest['folder']}/nulls.parquet").set_index("name").loc[name, "p"]
    exceeded = np.mean([permuted_value >= told["value"] for permuted_value in permuted])
    assert abs(exceeded - p) < 0.2
    rates = scores.assign(best=scores.index.isin(best))
    by_cell = rates.groupby(["group", "task_id", "temperature"])
    gain = by_cell["passed"].mean().rename("any").to_frame()
    gain["best"] = rates[rates["best"]].groupby(["group", "task_id", "temperature"])["passed"].mean()
    by_problem = (gain["best"] - gain["any"]).groupby(["group", "task_id"]).mean().reset_index(name="gain")
    groups = [rows["gain"].to_numpy() for _, rows in by_problem.groupby("group")]
    means = [
        np.concatenate([groups[i] for i in generator.integers(0, len(groups), len(groups))]).mean() for _ in range(1000)
    ]
    assert told["gain"] == pytest.approx(by_problem["gain"].mean(), abs=1e-9)
    assert (told["gain_low"], told["gain_high"]) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.01)


def test_rates_of_pushes_are_counted_from_the_answers():
    manifest = reference_runs("steering")[-1]
    answers = pd.read_parquet(f"{manifest['folder']}/results.parquet")
    rates = pd.read_parquet(f"{manifest['folder']}/rates.parquet").set_index("setting")
    passed = answers.pivot(index="task_id", columns="setting", values="verdict") == "passed"
    assert len(passed) == 60 and set(passed) == set(rates.index)
    for setting, row in rates.iterrows():
        corrected = int((~passed[0] & passed[setting]).sum())
        corrupted = int((passed[0] & ~passed[setting]).sum())
        assert row["net"] == pytest.approx((corrected - corrupted) / 60), row["name"]
        assert row["pass@1"] == pytest.approx(passed[setting].mean()), row["name"]
        changed = corrected + corrupted
        assert row["p"] == pytest.approx(binomtest(corrected, changed).pvalue if changed else 1.0), row["name"]


def test_a_push_is_judged_beside_random_ones_as_strong():
    manifest = reference_runs("steering")[-1]
    rates = pd.read_parquet(f"{manifest['folder']}/rates.parquet")
    claims = json.loads((Path(manifest["folder"]) / "claims.json").read_text())
    pushed = rates[(rates["role"] == "chosen") & (rates["goal"] != "")]
    assert len(pushed) >= 2
    for row in pushed.itertuples():
        claim = next(claim for claim in claims if row.name in claim["claim"] and claim["claim"].startswith("pushed to"))
        random = rates[(rates["role"] == "null") & (rates["erased"] == 0) & ~rates["gated"]]
        random = random[(random["layer"] == row.layer) & np.isclose(random["coefficient"], row.coefficient)]
        p_values = []
        for _, of_kind in random.groupby("kind"):
            assert len(of_kind) >= 19
            nets = np.append(of_kind["net"], row.net)
            distances = np.abs(nets - np.median(nets))
            among_random = np.mean(distances >= distances[-1] - 1e-12)
            beyond = row.net - of_kind["net"].median()
            p_values.append(max(row.p, among_random) if row.net * beyond > 0 else 1.0)
        assert claim["number"] == pytest.approx(row.net) and claim["p"] == pytest.approx(max(p_values)), row.name


@pytest.fixture(scope="module")
def followed() -> tuple[dict, pd.DataFrame]:
    "What the code model, SmolLM2 and SmolLM2 that was taught binding say a variable holds: manifest and answers."
    manifest = next(run for run in reversed(reference_runs("tracking")) if len(run["parameters"]["models"]) == 3)
    answers = pd.concat(
        map(pd.read_parquet, Path(manifest["folder"]).glob("samples/part-*.parquet")), ignore_index=True
    )
    rules = pd.json_normalize([json.loads(rules) for rules in answers["heuristics"]])
    return manifest, answers.join(rules.reindex(columns=["first_line", "last_line", "last_number", "most_frequent"]))


def with_wilson(right: pd.Series) -> str:
    low, high = proportion_confint(int(right.sum()), len(right), method="wilson")
    return f"{right.mean():.2f} [{low:.2f}, {high:.2f}]"


def test_accuracy_and_what_lies_beyond_rules_are_counted_from_answers(followed):
    manifest, answers = followed
    assert (answers["correct"] == (answers["stated"] == answers["answer"])).all()
    cells = answers.assign(model=[Path(name).name for name in answers["model"]], depth=answers["depth"].fillna(0))
    cells = cells.groupby(["model", "task", "num_shots", "seq_len", "depth"])
    assert len(cells) == len(manifest["summary"]) and {len(rows) for _, rows in cells} == {
        manifest["parameters"]["num_seqs"]
    }
    for told in manifest["summary"]:
        place = (Path(told["model"]).name, told["task"], told["examples"], told["lines"], float(told["depth"] or 0))
        rows = cells.get_group(place)
        assert told["accuracy"] == with_wilson(rows["correct"]), place
        by_rule = {rule: (rows[rule] == rows["answer"]).mean() for rule in rows.columns[-4:]}
        by_rule["constant"] = rows["answer"].value_counts(normalize=True).iloc[0]
        share, rule = told["best rule"].split(" ", 1)
        assert float(share) == pytest.approx(max(by_rule.values()), abs=0.005 + 1e-9), place
        assert by_rule[rule.replace(" ", "_")] == max(by_rule.values()), place
        beyond = rows[~rows[rows.columns[-4:]].eq(rows["answer"], axis=0).any(axis=1)]
        if len(beyond):
            assert told["beyond rules"].startswith(f"{with_wilson(beyond['correct'])} (n={len(beyond)}"), place
        else:
            assert told["beyond rules"] == "no program"


@pytest.fixture(scope="module")
def traced() -> tuple[dict, pd.DataFrame]:
    "The trace of the code model: manifest, and the effect of every state of every program that was swept."
    manifest = next(run for run in reference_runs("tracing") if "coder" in run["parameters"]["model"])
    (table,) = Path(manifest["folder"]).glob("cells/part-*.parquet")
    cells = pd.read_parquet(table)
    return manifest, cells[cells["position_name"] != ""]


def test_peaks_of_the_trace_are_chosen_on_one_half_and_judged_on_the_other(traced):
    manifest, cells = traced
    numbers = sorted(cells["program"].unique())
    assert len(numbers) == 60
    cells = (
        cells.groupby(["direction", "position_name", "layer", "program"])[["effect", "success"]].mean().reset_index()
    )
    means = cells[cells["program"].isin(numbers[::2])].groupby(["direction", "position_name", "layer"])["effect"].mean()
    generator = np.random.default_rng(5)
    for told in manifest["summary"]:
        of_place = means[told["direction"], told["position"]]
        assert abs(of_place[told["layer"]]) == pytest.approx(of_place.abs().max(), abs=1e-12), told
        judged = cells[cells["program"].isin(numbers[1::2]) & (cells["layer"] == told["layer"])]
        judged = judged[(judged["direction"] == told["direction"]) & (judged["position_name"] == told["position"])]
        assert len(judged) == told["n"] and told["success [95%]"] == with_wilson(judged["success"])
        means_of_resamples = generator.choice(judged["effect"].to_numpy(), (4000, len(judged))).mean(1)
        expected = [judged["effect"].mean(), *np.quantile(means_of_resamples, [0.025, 0.975])]
        shown = [float(number) for number in re.findall(r"-?\d\.\d+", told["effect [95%]"])]
        assert shown == pytest.approx(expected, abs=0.012), told


def test_the_layer_at_which_the_last_token_takes_over_is_that_of_its_headline(traced):
    manifest, cells = traced
    effect = cells[cells["direction"] == "denoise"].pivot_table(
        index="program", columns=["position_name", "layer"], values="effect"
    )
    ahead = (effect["final"] - effect["rhs 1"]).to_numpy()
    layers = [int(np.argmax(rows.mean(0) > 0)) for rows in ahead[np.random.default_rng(6).integers(0, 60, (2000, 60))]]
    first = int(np.argmax(ahead.mean(0) > 0))
    low, high = np.quantile(layers, [0.025, 0.975], method="nearest")
    assert f"n=60; final token overtakes the root at layer {first} [{low}, {high}]" in manifest["headline"]


@pytest.fixture(scope="module")
def taken_apart() -> tuple[dict, list[dict], dict[str, pd.DataFrame]]:
    "The mechanism: its manifest, the heads that it chose, and its tables."
    (manifest,) = [run for run in reference_runs("mechanism") if run["parameters"].get("num_shots")]
    folder = Path(manifest["folder"])
    tables = {
        name: pd.concat(map(pd.read_parquet, sorted((folder / name).glob("part-*.parquet"))))
        for name in ("heads", "swapped", "ablated", "directions", "compared")
    }
    return manifest, json.loads((folder / "mechanism.json").read_text()), tables


def test_heads_are_chosen_on_one_half_and_judged_on_the_other(taken_apart):
    _, told, tables = taken_apart
    cells = tables["heads"].groupby(["position_name", "layer", "head", "program"])["effect"].mean().unstack("program")
    assert cells.shape[1] == 60 and len(cells) % (24 * 14) == 0
    means = cells.iloc[:, ::2].mean(axis=1)
    chosen = {(row["position_name"], row["layer"], row["head"]): row for row in told["heads"]}
    expected = set()
    for _, of_place in means.groupby("position_name"):
        ordered = of_place.reindex(of_place.abs().sort_values(ascending=False).index)
        expected |= set(ordered[ordered.abs() >= 0.02].index[:4])
    assert expected == set(chosen) and len(expected) == 5
    generator = np.random.default_rng(7)
    for place, row in chosen.items():
        judged = cells.loc[place].iloc[1::2].to_numpy()
        interval = bootstrap([judged], np.mean, n_resamples=4000, method="BCa", rng=generator).confidence_interval
        assert row["effect_when_chosen"] == pytest.approx(means[place], abs=2e-4) and row["n"] == len(judged) == 30
        shown = [row["effect"], row["low"], row["high"]]
        assert shown == pytest.approx([judged.mean(), *interval], abs=0.006)


def test_the_chosen_heads_bring_what_is_said_and_random_ones_nothing(taken_apart):
    manifest, told, tables = taken_apart
    patched = tables["swapped"]
    patched = patched[patched["position_name"] == "final"].groupby(["kind", "program"])["effect"].mean()
    assert f"together {patched['chosen'].mean():.2f} [" in told["sentences"][0].split("final: ")[1]
    assert patched["chosen"].min() > 0.3 > 0.1 > patched["random heads"].abs().max() and len(patched["chosen"]) == 30
    ablated = tables["ablated"]
    whole = ablated[ablated["kind"] == "intact"].set_index("program")["correct"]
    without = ablated[(ablated["where"] == "named") & (ablated["position_name"] == "all")]
    right = {kind: rows.groupby("program")["correct"].mean() for kind, rows in without.groupby("kind")}
    shown = f"accuracy {with_wilson(whole)}, with their means instead {with_wilson(right['chosen'])}"
    assert manifest["headline"].endswith(shown) and len(whole) == 60
    pairs = right["random heads"] - right["chosen"]
    assert pairs.mean() > 0 and binomtest(int((pairs > 0).sum()), int((pairs != 0).sum())).pvalue > 0.01


def test_directions_and_the_compared_models_are_as_the_sentences_say(taken_apart):
    _, told, tables = taken_apart
    swapped = tables["directions"].groupby(["position_name", "layer", "basis", "k"])["effect"].mean()
    for row in told["directions"]:
        effects = swapped[row["position_name"], row["layer"], row["basis"]]
        enough = effects.index[effects >= 0.9 * swapped[row["position_name"], row["layer"], "all"].iloc[0]]
        assert (row["k"] is None and enough.empty) or row["k"] == enough.min(), row
    compared = tables["compared"]
    for model, rows in compared.groupby("model"):
        right = rows.groupby("program")["correct"].first()
        sentence = f"{Path(model).name} (accuracy {with_wilson(right)})"
        assert (sentence in told["sentences"][3]) == (model != "smollm2") and len(right) == 30


def test_the_report_says_what_the_records_say_and_adjusts_for_all_of_its_tests(sampled, chosen, answers):
    manifest = reference_runs("report")[-1]
    claims = pd.DataFrame(json.loads((Path(manifest["folder"]) / "claims.json").read_text()))
    tested = claims[claims["p"].notna()]
    adjusted = multipletests(tested["p"].astype(float), method="holm")[1]
    assert len(tested) == 21 and tested["p_adjusted"].astype(float).to_numpy() == pytest.approx(adjusted, abs=1e-9)
    numbers = claims.set_index(["phase", "claim"])["number"]
    for phase, run in (("1.0", answers[0]), ("1.2", sampled[0])):
        told = {
            f"pass@{row['k']}, {row['answers']}": row["value"]
            for row in run["summary"]
            if row["answers"] != "empty body"
        }
        assert numbers[phase].to_dict() == pytest.approx(told, abs=5e-4)
    gains = chosen[2][chosen[2]["k"] == 5].set_index("name")["gain"]
    for claim, number in numbers["3.5"].items():
        name = re.search(r"answers by (.+), on validation", claim)[1]
        assert number == pytest.approx(gains[name], abs=1e-9)
    steering = json.loads((Path(reference_runs("steering")[-1]["folder"]) / "claims.json").read_text())
    assert numbers["3.2"].to_dict() == pytest.approx({row["claim"]: row["number"] for row in steering})
