"The interventions on a model whose answers depend on one planted direction, from runs that lie on disk as earlier phases leave them."

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from codetrace.core.errors import BadInput
from codetrace.core.shards import shard_range
from codetrace.models.activations import States
from codetrace.models.loading import load
from codetrace.phases import steering, tuning
from codetrace.phases.steering import (
    ControlConfig,
    choice_directions,
    matched_null_rows,
    setting_effects_table,
    steering_claims_table,
    steering_settings,
)
from codetrace.phases.tuning import TuningConfig, choose_and_freeze, study_from_runs
from codetrace.planted.steering import (
    PLANTED_CAUSE,
    STEERING_STUDY_NAME,
    causal_direction,
    draw_planted_problems,
    letter_imbalance,
    load_steering_model,
    make_steering_study,
    planted_sae,
)
from codetrace.runs.claims import adjust_claims, claim_row
from codetrace.runs.inputs import resolve_inputs
from codetrace.runs.manifest import all_runs, find_run, newest_run
from codetrace.runs.run import open_run
from codetrace.sae.dataset import load_labelled_activations
from codetrace.sae.latent_search import search_all_positions
from codetrace.sae.sae import hook_name
from codetrace.sandbox.pool import SandboxPool
from codetrace.steering.directions import Direction, Gate, latent_gate, make_push
from codetrace.steering.freeze import NotFrozen, read_frozen_choice
from codetrace.steering.outcomes import (
    MIN_RANDOM_DIRECTIONS,
    pair_with_baseline,
    steering_p,
    steering_rates,
    steering_sentence,
)
from codetrace.steering.sweep import (
    BASELINE_SETTING,
    SteeringSetting,
    SteeringSweepOptions,
    combine_setting_shards,
    gate_open_at_prompt,
    gated_push_rows,
    measure_answers,
    sweep_settings,
)
from codetrace.tasks.problem_prompts import render_problem_prompt
from codetrace.tasks.problems import load_problems
from codetrace.tasks.sampled_solutions import SamplingOptions, finish_samples, generate_samples, plan_samples

HOME = Path(__file__).resolve().parents[1]
MBPP = HOME.parent / "shared" / "data" / "mbpp.jsonl"
OPTIONS = SteeringSweepOptions(max_new_tokens=8, slots=16, workers=1)
CUTS = {"sae": slice(0, 30), "hyperparams": slice(30, 42), "validation": slice(42, 60)}


class Told:
    "A sandbox that writes down which tasks are judged."

    def __init__(self, real):
        self.real = real
        self.judged = []

    def submit(self, pool, job):
        self.judged.append(job.name)
        return self.real(pool, job)


@pytest.fixture(scope="module", autouse=True)
def graded_once():
    "A program is graded once, however many settings write it: most of their answers are the same few."
    real = SandboxPool.submit
    verdicts = {}

    def submit(pool, job):
        if job not in verdicts or not verdicts[job].done() or verdicts[job].exception():
            verdicts[job] = real(pool, job)
        return verdicts[job]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SandboxPool, "submit", submit)
        yield


@pytest.fixture
def told(monkeypatch):
    spy = Told(SandboxPool.submit)
    monkeypatch.setattr(SandboxPool, "submit", lambda pool, job: spy.submit(pool, job))
    return spy


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    "The model's own answers to all sixty tasks, with states."
    folder = tmp_path_factory.mktemp("answers")
    items = plan_samples(draw_planted_problems())
    options = SamplingOptions(max_new_tokens=8, slots=16, workers=1)
    generate_samples(load_steering_model(), items, folder, options)
    finish_samples(folder, items)
    return folder


def on_disk(root: Path, answers: Path, flipped: str = "") -> str:
    "Runs of phases 0.1, 1.0, 1.5 and 2; labels of one split may be flipped. The id of 1.0."
    made = draw_planted_problems()
    problems = root / "words.jsonl"
    problems.write_text("".join(json.dumps(p.row()) + "\n" for p in made))
    split = {name: [p.task_id for p in made[cut]] for name, cut in CUTS.items()}
    run = open_run("splits", {"problems": str(problems)}, "made up", root=root)
    run.write_json("split_metadata.json", {"task_ids": split})
    pd.DataFrame({"first": [], "second": []}, dtype=str).to_parquet(run.folder / "near_duplicates.parquet", index=False)
    run.finish()
    splits = run.folder.name
    parameters = {
        "model": STEERING_STUDY_NAME,
        "problems": str(problems),
        "split": "all",
        "temperature": [0.0],
        "samples": 1,
    }
    parameters |= {"prompt": "pva", "max_new_tokens": 8, "dtype": "auto"}
    run = open_run("generation", parameters, "made up", root=root)
    table = pd.read_parquet(answers / "samples.parquet")
    rows_of_split = table["task_id"].isin(split.get(flipped, []))
    table["passed"] ^= rows_of_split
    table.to_parquet(run.folder / "samples.parquet", index=False)
    (run.folder / "activations").symlink_to(answers / "activations")
    run.finish()
    generated = run.folder.name
    run = open_run("saes", {"model": STEERING_STUDY_NAME}, "made up", root=root)
    for layer in range(3):
        planted_sae(layer).save(run.folder / f"layer_{layer}")
    run.write_json(
        "saes.json", {str(layer): {"folder": f"layer_{layer}", "model_name": STEERING_STUDY_NAME} for layer in range(3)}
    )
    run.finish()
    read = {"input": generated, "splits": splits, "saes": run.folder.name, "split": "sae"}
    run = open_run("latents", read, "made up", root=root)
    split_of_task = {task: name for name, tasks in split.items() for task in tasks}
    labels = table.assign(label=table["passed"], split=table["task_id"].map(split_of_task), group=table["task_id"])
    rows = labels[labels["split"] == "sae"].reset_index(names="row")
    activations = load_labelled_activations(
        States(find_run(generated, root)["folder"]), Path(newest_run("saes", root)["folder"]), rows
    )
    search_all_positions(activations, n_shuffles=50)[0].to_parquet(run.folder / "scores.parquet", index=False)
    run.finish()
    return generated


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, answers):
    "Chooses from such runs; gives the hash of the choice, and its folder."
    folder = tmp_path_factory.mktemp("tuned")

    @cache
    def choose(name: str, flipped: str = "") -> tuple[str, Path]:
        root = folder / name
        root.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tuning, "load_model", lambda *_, **__: load_steering_model())
            patch.setenv("CODETRACE_RUNS", str(root))
            return choose_in(root, flipped)

    def choose_in(root: Path, flipped: str) -> tuple[str, Path]:
        generated = on_disk(root, answers, flipped)
        inputs = resolve_inputs("tuning", {"input": generated}, root)
        study, pool = study_from_runs({name: Path(manifest["folder"]) for name, manifest in inputs.items()})
        tasks = study.problems["hyperparams"]
        problems = find_run(generated, root)["parameters"]["problems"]
        digest = choose_and_freeze(
            study, pool, root / "choice", tasks, TuningConfig(num_latents=3, refine=1, slots=16), problems="words"
        )[2]
        assert problems.endswith("words.jsonl")
        return digest, root / "choice"

    return choose


def test_nothing_of_the_validation_split_is_read_before_the_choice(tuned, told):
    "No validation task is answered, and validation labels may be anything: the choice is the same."
    digest, _ = tuned("watched")  # by nobody before, so all of it is told
    judging = {p.task_id for p in draw_planted_problems()[CUTS["validation"]]}
    assert told.judged and not judging & set(told.judged)
    assert tuned("validation flipped", "validation")[0] == digest


def test_other_labels_do_make_another_choice(tuned):
    "The test above can fail."
    assert tuned("watched")[0] != tuned("sae flipped", "sae")[0]


def test_the_evaluation_opens_the_frozen_choice_before_anything_else(told, tmp_path, monkeypatch):
    "On a folder without a choice it ends before a problem is read or an answer judged; the phase opens it in no other way."

    def never(*_, **__):
        raise AssertionError("problems were read before the choice")

    monkeypatch.setattr(steering, "evaluation_problems", never)
    with pytest.raises(NotFrozen, match="holds no choice"):
        steering.open_evaluation(tmp_path)
    assert told.judged == []
    cells = json.loads((HOME / "nbs/phases/27_steering.ipynb").read_text())["cells"]
    run_cells = [
        "".join(c["source"]) for c in cells if c["cell_type"] == "code" and "#| export" not in "".join(c["source"])
    ]
    opening = next(source for source in run_cells if "start_run(" in source)
    assert "open_evaluation(source" in opening and "select_problems" not in opening


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    "The whole of it: chosen on 18 tasks, judged on 27."
    folder = tmp_path_factory.mktemp("judged")
    study = make_steering_study(90)
    pool, _ = search_all_positions(
        study.activations.subset((study.activations.rows["split"] == "sae").to_numpy()), n_shuffles=50
    )
    choose_and_freeze(
        study,
        pool,
        folder / "choice",
        study.problems["hyperparams"],
        TuningConfig(coefficients=(-0.7, 0.7), n_random=20, slots=16),
        problems=STEERING_STUDY_NAME,
    )
    choice, vectors, _ = read_frozen_choice(folder / "choice")
    plan = steering_settings(choice, vectors, np.array(choice["norms"]), ControlConfig(temperatures=(0.8,)))
    tasks = study.problems["validation"]
    table = sweep_settings(study.lm, tasks, plan, folder / "written", OPTIONS)
    table = measure_answers(study.lm, table, plan)
    table["goal"] = table["goal"].fillna("")
    return study, choice, vectors, plan, tasks, table, folder


def test_the_sign_and_the_layer_are_found(judged):
    _, choice, vectors, *_ = judged
    for goal, sign in (("correct", 1), ("corrupt", -1)):
        g = choice["goals"][goal]
        assert g["better"] and g["net"] * sign > 0
        assert choice["directions"][g["direction"]]["layer"] == PLANTED_CAUSE["layer"]
        assert sign * g["coefficient"] * float(vectors["directions"][g["direction"]] @ causal_direction()) > 0.1


def test_the_push_works_and_its_controls_do_not(judged):
    effects = setting_effects_table(judged[5])
    ours = effects[(effects["role"] == "chosen") & (effects["goal"] != "")].set_index("goal")
    assert (
        ours.loc["correct", "p"] < 0.05
        and ours.loc["correct", "correction"] > 0.6
        and ours.loc["correct", "corrupted"] == 0
    )
    assert ours.loc["corrupt", "p"] < 0.05 and ours.loc["corrupt", "corruption"] > 0.6
    control = effects[effects["role"] == "control"]
    assert len(control) and (control["net"] == 0).all()
    null = effects[(effects["role"] == "null") & (effects["erased"] == 0)]
    assert (
        len(null) >= 12 and (null["p"] < 0.05).mean() <= 0.1
    )  # no more than its nominal rate, with room for 12 to 40 tests
    assert null["net"].abs().max() < ours.loc["correct", "net"]


def test_a_random_push_that_turns_what_is_on_edge_is_said_to_be_one(judged, tmp_path):
    "Words of hardly any imbalance: Gaussian directions have a part along the cause that turns them, and no verdict makes a finding of that."
    study, _, _, plan, *_ = judged
    tasks = [p for p in draw_planted_problems(60, min_imbalance=1) if abs(letter_imbalance(p.text)) == 1]
    some = [plan[0], *(s for s in plan if s.role == "null" and s.push)]
    table = sweep_settings(study.lm, tasks, some, tmp_path, OPTIONS)
    effects = setting_effects_table(table.assign(goal=""))
    by_kind = effects[effects["role"] == "null"].groupby("kind")["p"].min()
    assert by_kind["gaussian"] < 0.05 < by_kind["random latent"], by_kind  # alone, one of them would count as a cause
    gaussian = effects[(effects["kind"] == "gaussian") & (effects["p"] < 0.05)]
    spoken = []
    for _, row in gaussian.iterrows():
        others = matched_null_rows(effects, row)
        others = others[others["setting"] != row["setting"]]["net"].tolist()
        assert len(others) >= MIN_RANDOM_DIRECTIONS
        sentence = steering_sentence(row.to_dict(), "The push", others)
        spoken.append("no more than random pushes as strong" not in sentence)
    assert np.mean(spoken) <= 0.5, gaussian


def drifting_push(rng, base: np.ndarray) -> np.ndarray:
    "Whether tasks are solved under a direction that knows nothing: it helps all, or hurts all, as it happens."
    drift = rng.normal(0, 0.12)
    flips = rng.random(len(base)) < np.clip(np.where(base, 0.15 - drift, 0.15 + drift), 0, 1)
    return np.where(flips, ~base, base)


def null_study(seed: int, n_random: int, n_tasks: int) -> tuple[dict, list[float]]:
    "A chosen push that is one of many that drift: its rates, and the net changes of random ones."
    rng = np.random.default_rng([9, n_random, n_tasks, seed])
    base = rng.random(n_tasks) < 0.4
    row = steering_rates(pd.DataFrame({"base_passed": base, "passed": drifting_push(rng, base)}))
    return row, [drifting_push(rng, base).mean() - base.mean() for _ in range(n_random)]


FEW_AND_MANY = [(2, 80), (19, 30), (40, 80)]
BETWEEN = [pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(10, 30), (18, 80), (19, 80)]]


@pytest.mark.parametrize(("n_random", "n_tasks"), [*FEW_AND_MANY, *BETWEEN])
def test_hardly_any_null_study_gets_a_verdict(n_random, n_tasks):
    "Every direction drifts: p against no push alone is below 0.05 in a seventh to a third of the studies."
    spoken = []
    significant = []
    for seed in range(400):
        row, null = null_study(seed, n_random, n_tasks)
        words = steering_sentence(row, "It", null)
        spoken.append("It raises" in words or "It lowers" in words)
        significant.append(row["p"] < 0.05)
        assert spoken[-1] == (steering_p(row, null) <= 0.05)
    assert np.mean(significant) > 0.1
    assert np.mean(spoken) <= (0.07 if n_random >= MIN_RANDOM_DIRECTIONS else 0), np.mean(spoken)


@pytest.mark.slow
@pytest.mark.parametrize("n_random", [19, 39, 100])
def test_verdicts_of_null_studies_keep_their_rate(n_random):
    "At nominal 5%, over 2,000 studies; and a push that does corrects a third of what is wrong is found."
    spoken = [steering_p(*null_study(seed, n_random, 60)) <= 0.05 for seed in range(2000)]
    assert np.mean(spoken) <= 0.06, np.mean(spoken)
    rng = np.random.default_rng(3)
    significant = []
    for _ in range(200):
        base = rng.random(60) < 0.4
        effective = pd.DataFrame({"base_passed": base, "passed": base | (rng.random(60) < 0.4)})
        still = [0.03 * rng.standard_normal() for _ in range(n_random)]
        significant.append(steering_p(steering_rates(effective), still) <= 0.05)
    assert np.mean(significant) > 0.9


def test_verdicts_of_a_report_hold_together():
    "Of 500 reports of five null claims, hardly any speaks a verdict; each claim by itself would in every fifth."
    alone = []
    together = []
    for report in range(500):
        rng = np.random.default_rng([4, report])
        p = rng.random(5)
        rows = [claim_row("x", 0, (0, 0), "raises", p=x, without_verdict="no verdict" if x <= 0.05 else "") for x in p]
        claims = pd.DataFrame(rows).assign(verdict=np.where(p <= 0.05, "raises", "does not change"))
        alone.append((claims["verdict"] == "raises").any())
        together.append((adjust_claims(claims)["verdict"] == "raises").any())
    assert np.mean(alone) > 0.15 and np.mean(together) <= 0.07


def test_random_pushes_of_another_coefficient_or_layer_are_no_null():
    "A null that ignores the coefficient makes any strong push look beyond random."
    columns = {"role": "null", "erased": 0, "gated": False, "net": 0.0}
    settings = [(0, 0.5), (0, 0.5), (0, -0.5), (0, 1.0), (1, 0.5)]
    effects = pd.DataFrame([columns | {"layer": layer, "coefficient": c} for layer, c in settings])
    effects["setting"] = range(len(effects))
    row = {"role": "chosen", "layer": 0, "coefficient": 0.5, "gated": False}
    assert matched_null_rows(effects, row)["setting"].tolist() == [0, 1]
    assert matched_null_rows(effects, row | {"coefficient": 1.0})["setting"].tolist() == [3]
    assert matched_null_rows(effects, row | {"gated": True}).empty


def test_every_random_direction_is_pushed_as_hard_as_what_was_chosen(judged):
    effects = setting_effects_table(judged[5])
    for row in effects[(effects["role"] == "chosen") & (effects["goal"] != "")].to_dict("records"):
        null = matched_null_rows(effects, row)
        assert len(null) >= MIN_RANDOM_DIRECTIONS
        assert np.allclose(null["added_norm"], row["added_norm"]) and (null["layer"] == row["layer"]).all()


def test_the_planted_push_gets_its_verdict(judged):
    effects = setting_effects_table(judged[5])
    claims = steering_claims_table(effects, pd.DataFrame()).set_index("claim")
    verdicts = claims[claims.index.str.startswith("pushed to")]["verdict"]
    assert len(verdicts) == 2
    without = claims["without_verdict"].loc[verdicts.index]
    for verdict, words in zip(verdicts, without):  # 20 random directions: one claim could speak, two cannot
        assert "adjusted for the other claims" in verdict and verdict == words


def test_the_threshold_of_a_gate_is_of_the_hyperparameter_split(judged):
    "Chosen where nothing was ranked: readings of the SAE split may be anything."
    study, *_ = judged
    searched = study.activations.subset((study.activations.rows["split"] == "sae").to_numpy())
    pool, _ = search_all_positions(searched, n_shuffles=20)
    directions = tuning.candidate_directions(study.activations, pool, 3)
    gate, _ = tuning.choose_gate(study.activations, directions, 0)
    tuned = study.activations.rows["split"].to_numpy() == "hyperparams"

    def shifted(kind: str, layer: int) -> np.ndarray:
        states = study.activations.states(kind, layer).copy()
        away = 30 * causal_direction().numpy()
        wrong = ~study.activations.rows["label"].to_numpy(bool)
        states[~tuned] += np.where(wrong[~tuned, None], -away, away) if layer == 0 else 0
        return states

    moved = replace(study.activations, states=shifted)
    gate_of_moved, _ = tuning.choose_gate(moved, directions, 0)
    assert (gate.threshold, gate.layer) == (gate_of_moved.threshold, gate_of_moved.layer)


def test_the_gate_opens_where_it_should(judged, tmp_path):
    "A latent that predicts wrong answers, read at each token: pushed where it is active, and nowhere else."
    study, choice, vectors, *_, tasks, _, _ = judged
    goal = choice["goals"]["correct"]
    d = choice_directions(choice, vectors)[0][goal["direction"]]
    gate = latent_gate(planted_sae(0), PLANTED_CAUSE["latents"]["incorrect"], 0)
    always, gated = (make_push(d, goal["coefficient"], np.array(choice["norms"]), "generated", g) for g in (None, gate))
    plan = [BASELINE_SETTING, SteeringSetting("always", "chosen", always), SteeringSetting("gated", "selective", gated)]
    table = sweep_settings(study.lm, tasks, plan, tmp_path, OPTIONS)
    table = measure_answers(study.lm, table, plan).assign(goal="")
    rows_of_setting = table[table["setting"] == 2]
    bad = rows_of_setting["task_id"].map({p.task_id: letter_imbalance(p.text) for p in tasks}) < 0
    assert (
        rows_of_setting.loc[bad, "gate_open_rate"].mean() > 0.6
        and rows_of_setting.loc[~bad, "gate_open_rate"].mean() < 0.2
    )
    rates = setting_effects_table(table).set_index("setting")
    assert rates.loc[2, "corrected"] == rates.loc[1, "corrected"] > 0.6 * rates.loc[2, "wrong"]
    assert rates.loc[2, "corrupted"] == 0


def test_a_gate_at_the_prompt_opens_where_it_should(judged):
    study, _, _, plan, tasks, table, _ = judged
    gate = Gate(0, -causal_direction(), 0.0, 0.0)
    gate_open = gate_open_at_prompt(study.lm, gate, tasks)
    assert gate_open == {p.task_id: letter_imbalance(p.text) < 0 for p in tasks}
    down = next(i for i, s in enumerate(plan) if s.extra_columns.get("goal") == "correct" and s.role == "chosen")
    mixed = pd.concat([table, gated_push_rows(table, down, gate_open, len(plan))], ignore_index=True)
    row = setting_effects_table(mixed).set_index("setting").loc[len(plan)]
    constant = setting_effects_table(table).set_index("setting").loc[down]
    assert (row["corrected"], row["corrupted"]) == (constant["corrected"], 0)


def test_erased_random_directions_are_of_all_layers():
    "Two layers were chosen: the random directions erased are of both, as many of each kind as are wanted, or as there are."
    unit = torch.eye(4)[0]
    null = [
        Direction(f"{kind} {i}", kind, layer, unit)
        for layer in (3, 9)
        for kind in ("random latent", "gaussian")
        for i in range(10)
    ]
    erased = steering._in_turn_by_layer([*null, Direction("c 0", "probe", 3, unit)], 6)
    counted = Counter((direction.kind, direction.layer) for direction in erased)
    assert counted == {(kind, layer): 3 for kind in ("random latent", "gaussian") for layer in (3, 9)} | {
        ("probe", 3): 1
    }
    assert [d.name for d in erased if (d.kind, d.layer) == ("gaussian", 9)] == [f"gaussian {i}" for i in range(3)]


def test_erasing_removes_the_effect(judged):
    "Without the direction the answer no longer depends on the letter imbalance; random directions erased change nothing of that."
    table = judged[5]
    pass_rates = table[table["role"] == "erased"].groupby("name")["passed"].mean()
    assert (pass_rates.isin([0.0, 1.0])).any(), pass_rates  # always the same answer
    others = pair_with_baseline(table[(table["role"] == "null") & (table["erased"] > 0) | (table["setting"] == 0)])
    assert (others["passed"] == others["base_passed"]).mean() > 0.9


def test_coefficient_0_is_the_baseline(judged):
    study, choice, vectors, _, tasks, table, folder = judged
    d = choice_directions(choice, vectors)[0][0]
    still = [BASELINE_SETTING, SteeringSetting("still", "control", make_push(d, 0.0, np.array(choice["norms"])))]
    again = sweep_settings(study.lm, tasks, still, folder / "still", OPTIONS)
    a, b = (again[again["setting"] == k].sort_values("task_id") for k in (0, 1))
    assert a["token_ids"].map(list).tolist() == b["token_ids"].map(list).tolist()
    np.testing.assert_allclose(a["mean_logprob"], b["mean_logprob"], atol=1e-6)
    base = table[table["setting"] == 0].sort_values("task_id")
    assert a["completion"].tolist() == base["completion"].tolist()


class Stop(BaseException):
    "As sudden as it gets within a process."


@pytest.mark.parametrize("step_of_stop", [0, 50, 61])
def test_an_interruption_changes_nothing(judged, tmp_path, step_of_stop):
    study, _, _, plan, tasks, table, _ = judged

    def until(steps, **_):
        for i, step in enumerate(steps):
            if i == step_of_stop:
                raise Stop
            yield step

    few = [plan[0], *[s for s in plan if s.role == "chosen"][:3]]
    with pytest.raises(Stop):
        sweep_settings(study.lm, tasks, few, tmp_path, replace(OPTIONS, progress=until))
    resumed = sweep_settings(study.lm, tasks, few, tmp_path, OPTIONS)
    for name in [s.name for s in few]:
        resumed_rows, whole_rows = (
            t[t["name"] == name].drop_duplicates("task_id").sort_values("task_id") for t in (resumed, table)
        )
        assert resumed_rows["completion"].tolist() == whole_rows["completion"].tolist()
        assert resumed_rows["verdict"].tolist() == whole_rows["verdict"].tolist()


def test_shards_together_are_the_whole(judged, tmp_path):
    study, _, _, plan, tasks, table, _ = judged
    few = [plan[0], *[s for s in plan if s.role == "chosen"][:2], next(s for s in plan if s.role == "erased")]
    done = []
    for k in range(2):
        part = shard_range(len(few) * len(tasks), 2, k, len(few))
        done.append(sweep_settings(study.lm, tasks, few, tmp_path / str(k), replace(OPTIONS, pair_range=part)))
    whole = combine_setting_shards(done, tasks, few)
    for name in [s.name for s in few]:
        combined_texts, whole_texts = (
            t[t["name"] == name].drop_duplicates("task_id").sort_values("task_id")["completion"].tolist()
            for t in (whole, table)
        )
        assert combined_texts == whole_texts


CHAIN = [Path(sys.executable).with_name("codetrace"), "run", "correctness", "--quiet"]
CHAINED = {  # The planted study needs no more; by phase
    "0": {"tokenizer": "{model}"},
    "0.1": {"tokenizer": "{model}", "similarity": 1.0},
    "1.0": {"dtype": "float32", "max_new_tokens": 8, "slots": 16},
    "1.2": {"dtype": "float32", "max_new_tokens": 8, "slots": 16, "temperature": [0.8], "samples": 2},
    "1.5": {
        "dtype": "float32",
        "layers": [0, 1, 2],
        "sae": "{sae}",
        "text": "{text}",
        "test_tokens": 1000,
        "context": 64,
    },
    "2": {"text": "{text}", "text_tokens": 1000, "max_density": 1.0, "shuffles": 1000},
    "3": {"random_latents": 3, "resamples": 100},
    "3.1": {"coefficients": [-0.5, 0.5], "refine": 1, "max_new_tokens": 8, "random_directions": 150},
    "3.2": {"temperatures": [0.8], "samples": 1, "prompts": []},
    "3.4": {"ask_model": False, "components": [8], "shuffles": 99, "resamples": 100},  # it reads letters, not words
    "3.5": {"ask_model": False, "components": [8], "shuffles": 99, "resamples": 100},
}


def save_steering_study(folder: Path, n: int = 60) -> dict[str, str]:
    "The planted model, its problems and its SAEs on disk, as phases are given them."
    lm = load_steering_model()
    lm.hf.save_pretrained(folder / STEERING_STUDY_NAME)
    lm.tokenizer.save_pretrained(folder / STEERING_STUDY_NAME)
    lines = [json.dumps(problem.row()) + "\n" for problem in draw_planted_problems(n)]
    (folder / "words.jsonl").write_text("".join(lines))
    names = {"model": STEERING_STUDY_NAME, "problems": "words.jsonl", "sae": "layer_{layer}"}
    paths = {role: str(folder / name) for role, name in names.items()}
    for layer in range(lm.n_layers):
        sae = planted_sae(layer)
        sae = replace(sae, metadata=sae.metadata | {"model_name": paths["model"]})
        sae.save(paths["sae"].format(layer=layer))
    return paths


def test_the_planted_model_and_its_problems_come_back_from_disk(tmp_path):
    paths = save_steering_study(tmp_path, 12)
    problems = draw_planted_problems(12)
    assert [p.text for p in load_problems(paths["problems"])] == [p.text for p in problems]
    prompts = [render_problem_prompt(p).text for p in problems[:4]]
    assert load(paths["model"], "float32").generate(prompts, 8) == load_steering_model().generate(prompts, 8)


def in_chain(words: list[str], env: dict) -> subprocess.CompletedProcess:
    return subprocess.run([*CHAIN, *words], cwd=HOME, env=env, capture_output=True, text=True, timeout=3600)


@pytest.mark.slow
def test_the_whole_chain_finds_what_was_planted_also_when_killed_in_between(tmp_path):
    "One command, from problems to report; killed while it pushes, and given again; and shared between two processes."
    names = save_steering_study(tmp_path / "made") | {"text": str(tmp_path / "text")}
    (tmp_path / "text").mkdir()
    for path in Path(ast.__file__).parent.glob("*.py"):
        if path.stat().st_size < 12_000 and path.read_bytes().isascii():
            shutil.copy(path, tmp_path / "text")

    def fill(x):
        return x.format(layer="{layer}", **names) if isinstance(x, str) else x

    parameters = {number: {key: fill(x) for key, x in values.items()} for number, values in CHAINED.items()}
    (tmp_path / "given.yaml").write_text(json.dumps(parameters))  # JSON is YAML
    words = ["--model", names["model"], "--problems", names["problems"], "-f", str(tmp_path / "given.yaml")]
    env = os.environ | {"CODETRACE_RUNS": str(tmp_path / "runs"), "PYTHONPATH": str(HOME)}
    killed = killed_while("steering", words, env, tmp_path / "runs")
    assert killed != 0 and not all_runs(tmp_path / "runs")[-1]["status"] == "complete"
    again = in_chain(words, env)
    assert again.returncode == 0, again.stderr
    assert "3.1 tuning: complete" in again.stderr and "3.2 steering: running" in again.stderr
    made = {m["phase"]: m for m in all_runs(tmp_path / "runs") if m["status"] == "complete"}
    assert len([m for m in all_runs(tmp_path / "runs") if m["phase"] == "steering"]) == 1  # the same run went on
    choice = read_frozen_choice(made["tuning"]["folder"])[0]
    assert choice["directions"][choice["goals"]["correct"]["direction"]]["layer"] == PLANTED_CAUSE["layer"]
    claims = pd.DataFrame(json.loads((Path(made["report"]["folder"]) / "claims.json").read_text()))
    pushed = claims[(claims["phase"] == "3.2") & claims["claim"].str.startswith("pushed to correct")].iloc[0]
    assert pushed["low"] > 0 and "raises" in pushed["verdict"]
    assert set(claims["phase"]) == {"1.0", "1.2", "1.5", "2", "3", "3.1", "3.2", "3.3", "3.4", "3.5"}
    assert "Not complete" not in (Path(made["report"]["folder"]) / "report.md").read_text()
    shared = in_chain([*words, "--devices", "cpu,cpu"], env)
    assert shared.returncode == 0, shared.stderr
    newest = {m["phase"]: m for m in all_runs(tmp_path / "runs") if m["status"] == "complete"}
    assert newest["steering"]["parameters"]["shards"] == 2 and newest["saes"] == made["saes"]
    parted = pd.DataFrame(json.loads((Path(newest["report"]["folder"]) / "claims.json").read_text()))
    pd.testing.assert_frame_equal(parted, claims)


REAL = {  # As little as says something, by phase
    "1.0": {"max_new_tokens": 100},
    "1.2": {"max_new_tokens": 100, "temperature": [0.8], "samples": 1},
    "1.5": {"layers": [15], "tokens": 20_000, "test_tokens": 4000, "d_sae": 1024, "batch": 256},
    "2": {"text_tokens": 5000, "max_density": 1.0, "shuffles": 100, "num_cards": 2},
    "3": {"random_latents": 3, "resamples": 100},
    "3.1": {"num_latents": 1, "coefficients": [-0.5, 0.5], "refine": 1, "max_new_tokens": 60, "random_directions": 2},
    "3.2": {"num_problems": 8, "temperatures": [0.8], "samples": 1, "prompts": []},
    "3.3": {"num_problems": 4},
    "3.4": {"components": [8], "shuffles": 99, "resamples": 100},
    "3.5": {"components": [8], "shuffles": 99, "resamples": 100},
}


@pytest.mark.slow
@pytest.mark.skipif(not MBPP.is_file(), reason="the shared MBPP file is not here")
def test_the_whole_chain_on_mbpp_says_what_it_found(tmp_path):
    "SmolLM2 on a hundred problems, of which it solves few: whatever that gives, each phase is in the report, with its numbers or with the reason."
    (tmp_path / "given.yaml").write_text(json.dumps(REAL))
    words = ["--problems", str(MBPP), "-n", "100", "-f", str(tmp_path / "given.yaml")]
    done = in_chain(words, os.environ | {"CODETRACE_RUNS": str(tmp_path / "runs"), "PYTHONPATH": str(HOME)})
    report = newest_run("report", tmp_path / "runs")
    text = (Path(report["folder"]) / "report.md").read_text()
    assert (done.returncode == 0) == ("Not complete" not in text), done.stderr
    claims = pd.DataFrame(json.loads((Path(report["folder"]) / "claims.json").read_text()))
    assert "Not run" not in text and {"1.0", "1.2", "1.5"} <= set(claims["phase"]) and claims["verdict"].all()
    for number in ("2", "3", "3.1", "3.2", "3.3", "3.4", "3.5"):
        assert number in set(claims["phase"]) or (f"## {number} " in text and "Not complete: " in text)
    between = claims.dropna(subset=["low", "high"])
    assert len(between) and (between["low"] <= between["number"] + 1e-9).all()
    assert (between["number"] <= between["high"] + 1e-9).all()


def killed_while(phase: str, words: list[str], env: dict, root: Path) -> int:
    "Runs the chain, and kills all of it when a phase has written its first answers. Its exit status."
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*CHAIN, *words], cwd=HOME, env=env, start_new_session=True, **quiet)
    try:
        while process.poll() is None and not list(root.glob(f"{phase}/*/written/**/part-*.parquet")):
            time.sleep(0.2)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    status = process.wait()
    time.sleep(3)  # a kernel without its parent ends by itself
    return status


def test_hook_names_are_those_of_the_sae():
    assert planted_sae(1).metadata["hook_name"] == hook_name("resid_post", 1)


def choice_on_basics(problems: list) -> dict:
    "A choice whose latents were found on the first five of some problems, and which was tuned on the next five."
    seen = [digest for problem in problems[:10] for digest in tuning.problem_digests(problem)]
    ids = [problem.task_id for problem in problems]
    return {"problems": "basics", "searched_on": ids[:5], "tuned_on": ids[5:10], "seen_problems": seen, "seed": 0}


def test_what_the_choice_was_made_on_judges_it_in_no_guise(tmp_path):
    "The same set by its path, a part of it under other names and with other spaces, and tasks of the split `sae`."
    from codetrace.tasks import problems as tasks_problems

    basics = tasks_problems.load_problems("basics")
    choice = choice_on_basics(basics)
    by_path = str(Path(tasks_problems.__file__).parents[1] / "data" / "basics.jsonl")
    with pytest.raises(
        BadInput, match=f"10 of {len(basics)} problems of .*basics.jsonl, such as '{basics[0].task_id}'"
    ):
        steering.evaluation_problems(choice, by_path, "all")
    renamed = tmp_path / "mine.jsonl"
    rows = [json.loads(line) for line in Path(by_path).read_text().splitlines()]
    kept = [row | {"task_id": f"mine/{i}"} for i, row in enumerate(rows[12:20])]
    renamed.write_text("".join(json.dumps(row) + "\n" for row in kept))
    assert len(steering.evaluation_problems(choice, str(renamed), "all")) == 8
    kept.append(rows[3] | {"task_id": "x", "text": rows[3]["text"] + " "})
    renamed.write_text("".join(json.dumps(row) + "\n" for row in kept))
    with pytest.raises(BadInput, match=r"1 of 9 problems of .* such as 'x'"):
        steering.evaluation_problems(choice, str(renamed), "all")
    splits = tmp_path / "splits"
    splits.mkdir()
    ids = [problem.task_id for problem in basics]
    (splits / "split_metadata.json").write_text(json.dumps({"task_ids": {"validation": ids[10:]}}))
    assert len(steering.evaluation_problems(choice, splits_folder=splits)) == len(ids) - 10
    (splits / "split_metadata.json").write_text(json.dumps({"task_ids": {"validation": [ids[4], *ids[10:]]}}))
    with pytest.raises(BadInput, match=f"task {ids[4]!r} was used in choosing"):
        steering.evaluation_problems(choice, splits_folder=splits)
