"The phase `mechanism` against the planted truth, naive oracles, and what must be refused."

import numpy as np
import pandas as pd
import pytest
import torch

from codetrace import models
from codetrace.core.errors import BadInput
from codetrace.core.records import compute_missing_units
from codetrace.models.interventions import Intervention
from codetrace.patching.alignment import TraceCase
from codetrace.patching.batches import (
    TokenizedProgram,
    draw_reference_programs,
    draw_unfiltered_cases,
    program_means_table,
    tokenize_pair,
    tokenize_program,
    uniform_batches,
)
from codetrace.patching.cases import CaseOptions, ProgramShapes, draw_cases
from codetrace.patching.head_ablation import ablate_heads, check_means_cover, head_means, heads_sentence, needed_heads
from codetrace.patching.head_attention import head_attention, top_attention_sources
from codetrace.patching.heads import (
    HEAD_SWEEP_POSITIONS,
    choose_heads,
    draw_random_heads,
    heads_from_table,
    patch_heads,
    unchosen_heads_table,
)
from codetrace.patching.lookbacks import LOOKBACK_ANSWERS, draw_lookback_pairs, lookback_swaps, lookback_table
from codetrace.patching.probes import (
    STREAM_SWEEP_POSITIONS,
    LabelledStates,
    _fit_scaler,
    beyond_rules_p,
    mark_readable,
    probes_sentence,
    probes_with_effects,
    readable_p,
    run_probes,
    states_by_position,
)
from codetrace.patching.subspaces import choose_subspace_cells, directions_needed, patch_subspace, subspace_bases
from codetrace.patching.sweep import PatchSweepOptions, run_sweep
from codetrace.phases.mechanism import (
    pool_effects,
    sweep_units,
    trace_residual_stream,
    training_effect_figure,
    training_effect_peaks,
    training_sentence,
)
from codetrace.planted.binding import (
    D_MODEL,
    RESIDUAL_SUBSPACES,
    circuit_value_heads,
    load_binding_model,
    load_model_or_planted,
)
from codetrace.plots.mechanism import plot_head_sets


@pytest.fixture(scope="module")
def lm():
    return load_binding_model()


@pytest.fixture(scope="module")
def cases(lm):
    return draw_cases(lm, 8, ProgramShapes((6,), (2,), query_style="hash"), CaseOptions(num_shots=0))[0]


@pytest.fixture(scope="module")
def reference(lm):
    return draw_reference_programs(lm, 120, ProgramShapes((6,), (2,), "hash"))


@pytest.fixture(scope="module")
def fresh(lm, reference):
    return draw_reference_programs(lm, 30, ProgramShapes((6,), (2,), "hash"), seed=1, exclude=reference)


CHOSEN = sorted(circuit_value_heads(2))


# --- programs


def test_reference_programs_are_new_and_the_same_every_time(lm, reference, fresh):
    assert len({a.token_ids for a in reference + fresh}) == 150
    assert draw_reference_programs(lm, 5, ProgramShapes((6,), (2,), "hash")) == reference[:5]
    mixed = draw_reference_programs(lm, 8, ProgramShapes((4, 6), (1, 2), "hash"))
    assert len({kind for kind, _ in uniform_batches(mixed)}) == 4
    members = sorted(i for _, some in uniform_batches(mixed) for i in some)
    assert members == list(range(8))


def test_too_few_different_programs_are_an_error(lm):
    with pytest.raises(BadInput):
        draw_reference_programs(lm, 10, ProgramShapes((1,), (1,), "hash"))


# --- heads


def test_exactly_the_planted_heads_are_chosen(lm, cases):
    cells = run_sweep(lm, cases, PatchSweepOptions(sites=["head_out"], positions=HEAD_SWEEP_POSITIONS))
    chosen = choose_heads(cells)
    assert set(heads_from_table(chosen)) == circuit_value_heads(2)
    assert (chosen["low"] > 0.9).all() and (chosen["n"] == 4).all()
    rest = unchosen_heads_table(cells, chosen)
    assert rest["largest_effect"].abs().max() < 0.02
    assert rest["heads"].sum() == 4 * lm.n_layers * lm.n_heads - 3


def cells_of(effects: dict[tuple[int, int], list[float]]) -> pd.DataFrame:
    "Cells of one name, by layer and head, an effect a program."
    rows = [
        {"program": p, "site": "head_out", "layer": layer, "head": head, "position_name": "query", "effect": e}
        for (layer, head), effects_by_program in effects.items()
        for p, e in enumerate(effects_by_program)
    ]
    table = pd.DataFrame(rows).assign(logit_diff=0.0, success=0.0, prob=0.0, kl=0.1)
    return table.astype({"head": "Int64"})


def test_heads_are_judged_on_programs_they_were_not_chosen_on():
    lucky = [1.0, 0.0] * 4
    real = [0.5] * 8
    chosen = choose_heads(cells_of({(0, 0): lucky, (0, 1): real, (1, 0): [0.0] * 8}))
    judged = chosen.set_index(["layer", "head"])
    assert list(judged.index) == [(0, 0), (0, 1)]
    assert judged["effect_when_chosen"].tolist() == [1.0, 0.5] and judged["effect"].tolist() == [0.0, 0.5]
    assert len(choose_heads(cells_of({(0, 0): lucky, (0, 1): real}), top=1)) == 1
    assert choose_heads(cells_of({(0, 0): [0.01] * 8})).empty


def test_a_single_swapped_head_is_a_cell_of_the_sweep(cases):
    for name in ("planted:binding", "tiny:llama", "tiny:gpt_neox"):
        lm = load_model_or_planted(name)
        pairs = (
            cases[:2] if name == "planted:binding" else draw_unfiltered_cases(lm, 2, ProgramShapes((5,), (2,), "hash"))
        )
        options = PatchSweepOptions(sites=["head_out"], positions="rhs 2, query", layers=[1, 2])
        cells = run_sweep(lm, pairs, options)
        for head in [(1, 3, "rhs 2"), (2, 1, "query")]:
            rows = patch_heads(lm, pairs, [head], draws=0)
            got = rows[(rows["kind"] == "chosen") & (rows["position_name"] == head[2])].sort_values("program")["effect"]
            same = (cells["layer"] == head[0]) & (cells["head"] == head[1]) & (cells["position_name"] == head[2])
            assert np.allclose(got, cells[same].sort_values("program")["effect"], atol=2e-3), (name, head)


def test_only_the_planted_heads_restore_the_answer(lm, cases):
    shares = program_means_table(patch_heads(lm, cases, CHOSEN), "effect").set_index(["position_name", "kind"])
    for name in ("rhs 2", "query", "final", "all"):
        assert shares["low"][name, "chosen"] > 0.95
        assert shares["high"][name, "random heads"] < 0.05
        assert shares["effect"][name, "chosen"] == pytest.approx(shares["effect"][name, "all heads"], abs=0.05)


def test_random_heads_are_others_of_the_same_layers(lm):
    rng = np.random.default_rng(0)
    for _ in range(20):
        drawn = draw_random_heads(lm, CHOSEN, rng)
        assert len(set(drawn)) == len(CHOSEN) and not set(drawn) & set(CHOSEN)
        assert [(layer, name) for layer, _, name in drawn] == [(layer, name) for layer, _, name in CHOSEN]
    layer = [(1, head, "query") for head in range(lm.n_heads)]
    others = draw_random_heads(lm, layer, rng)
    assert len(set(others)) == lm.n_heads and not {k for k, *_ in others} & {1}
    every = [(k, h, "query") for k in range(lm.n_layers) for h in range(lm.n_heads)]
    assert draw_random_heads(lm, every, rng) == []


def test_ablating_planted_heads_destroys_and_others_do_not(lm, reference, fresh):
    means = head_means(lm, reference)
    rows = ablate_heads(lm, fresh, means, CHOSEN)
    right = program_means_table(rows, "correct", ("where", "position_name", "kind")).set_index(
        ["where", "position_name", "kind"]
    )
    for where in ("named", "everywhere"):
        for name in ("rhs 2", "query", "final", "all"):
            assert right["high"][where, name, "chosen"] < 0.5
            assert right["correct"][where, name, "random heads"] == 1
    assert right["correct"]["", "", "intact"] == 1
    assert rows["correct"][rows["kind"] == "random heads"].min() == 1
    decoy = ablate_heads(lm, fresh, means, [(2, 1, "end 1"), (2, 1, "end 2")], draws=0)
    assert decoy["correct"].min() == 1


def test_ablation_agrees_with_a_loop(lm, reference, fresh):
    means = head_means(lm, reference)
    head = (1, 3)
    name = "rhs 2"
    states = torch.stack(
        [
            lm.capture([list(a.token_ids)], [("head_out", 1)], a.positions[name])["head_out", 1][0, 0, 3]
            for a in reference
        ]
    )
    rows = ablate_heads(lm, fresh, means, [(*head, name)], draws=0)
    got = (
        rows[(rows["where"] == "named") & (rows["position_name"] == name)].sort_values("program")["log_prob"].to_numpy()
    )
    for program, expected in zip(fresh[:5], got):
        with lm.intervene(Intervention("head_out", 1, states.mean(0), positions=program.positions[name], heads=3)):
            log_prob = lm.logits([list(program.token_ids)]).log_softmax(-1)[0, program.answer_id]
        assert float(log_prob) == pytest.approx(expected, abs=1e-3)


def test_means_must_be_of_such_programs(lm, reference):
    shorter = draw_reference_programs(lm, 2, ProgramShapes((4,), (1,), "hash"))
    with pytest.raises(BadInput, match="reference_programs"):
        ablate_heads(lm, shorter, head_means(lm, reference), CHOSEN)
    with pytest.raises(BadInput, match=r"no means for programs of .* reference_programs"):
        check_means_cover(reference, shorter)
    with pytest.raises(BadInput, match="no means"):
        check_means_cover(reference[:1], reference[:1])  # one program is no mean
    check_means_cover(reference, reference)


def test_heads_are_patched_behind_solved_examples_as_by_hand(lm):
    cases = draw_unfiltered_cases(lm, 4, ProgramShapes((5,), (2,), "hash"), num_shots=1)
    assert len({case.prefix for case in cases}) == 4
    layer, head, name = CHOSEN[0]
    patched = patch_heads(lm, cases, [(layer, head, name)], draws=0)
    effects = patched[(patched["kind"] == "chosen") & (patched["position_name"] == name)].set_index("program")["effect"]
    for number, case in enumerate(cases):
        base, source = (list(lm.ids(case.prefix + program.code)[0]) for program in case.pair)
        base_id, source_id = (tokenize_program(lm, program).answer_id for program in case.pair)
        position = tokenize_program(lm, case.program).positions[name] + len(base) - len(lm.ids(case.program.code)[0])
        state = lm.capture([source], [("head_out", layer)], position)["head_out", layer][0, 0, head]
        leads = [float(row[source_id] - row[base_id]) for row in lm.logits([base, source])]
        with lm.intervene(Intervention("head_out", layer, state[None], positions=position, heads=head)):
            row = lm.logits([base])[0]
        by_hand = (float(row[source_id] - row[base_id]) - leads[0]) / (leads[1] - leads[0])
        assert effects[number] == pytest.approx(by_hand, abs=1e-3)


def test_where_heads_look_and_nothing_stays_behind(lm, fresh):
    before = lm.logits([list(fresh[0].token_ids)])
    looked = head_attention(lm, fresh[:6], CHOSEN)
    named = top_attention_sources(looked).set_index("position_name")
    assert named["attended_name"].to_dict() == {"rhs 2": "rhs 1", "query": "rhs 2", "final": "query"}
    assert (named["low"] > 0.99).all() and (named["uniform_attention"] < 0.1).all()
    assert lm.hf.config._attn_implementation == "sdpa"
    assert torch.equal(before, lm.logits([list(fresh[0].token_ids)]))


# --- probes


def test_probes_find_the_value_where_it_is_and_shuffled_labels_nothing(lm, reference, fresh):
    probes = run_probes(states_by_position(lm, reference), states_by_position(lm, fresh))
    cells = probes.set_index(["position_name", "layer"])
    arrives = {"rhs 1": 0, "rhs 2": 2, "query": 4, "final": 5, "end 1": 3, "end 2": 3}
    for (name, layer), row in cells.iterrows():
        if layer >= arrives.get(name, 9):
            assert row["accuracy"] > 0.95, (name, layer)
        assert row["shuffled_low"] < 0.3, (name, layer)
    assert cells["accuracy"]["rhs 2", 0] < 0.4 and cells["accuracy"]["lhs 1", 3] < 0.4
    assert probes["shuffled_accuracy"].mean() < 0.2
    assert len(probes) == 8 * lm.n_layers


def test_read_is_not_used(lm, cases, reference, fresh):
    resid = run_sweep(lm, cases, PatchSweepOptions(sites=["resid_pre"], positions=STREAM_SWEEP_POSITIONS))
    probes = run_probes(states_by_position(lm, reference), states_by_position(lm, fresh))
    both = probes_with_effects(probes, resid[resid["kl"].notna()]).set_index(["position_name", "layer"])
    assert both["low"]["end 1", 4] > 0.8 and abs(both["effect"]["end 1", 4]) < 0.02
    assert both["low"]["rhs 2", 3] > 0.8 and both["effect"]["rhs 2", 3] > 0.95
    sentence = probes_sentence(both.reset_index())
    idle = sentence.partition("without effect:")[2].partition(";")[0]
    assert "end 2 (" in idle and "lhs" not in idle and "rhs 1" not in idle
    assert "not judged" in sentence and "rhs 1, end 1" in sentence.partition("not judged")[2]


def hand_made_states(x, value, distractor, control, beyond) -> LabelledStates:
    "Labelled states of one layer, with labels as given."
    return LabelledStates(x[None], value, np.arange(len(x)), control, distractor, beyond, np.full(len(x), 0.2))


def digits_in_states(rng, n: int, carried: str, share_of_rule: float = 0.7):
    "States that carry the `value`, the last constant (`distractor`), the `control` digit, or nothing, in noise; the last constant is often the value."
    value, last_constant, control = rng.integers(0, 10, (3, n))
    beyond = rng.random(n) > share_of_rule
    last_constant = np.where(last_constant == value, (last_constant + 1) % 10, last_constant)
    distractor = np.where(beyond, last_constant, value)
    x = 0.3 * rng.standard_normal((n, 40))
    if carried != "nothing":
        x[:, :10] += np.eye(10)[{"value": value, "distractor": distractor, "control": control}[carried]]
    if carried == "value":
        x[:, 10:20] += np.eye(10)[distractor]
    return hand_made_states(x, value, distractor, control, beyond)


def readable_cells_of(carried: str, seed: int, cells: int = 3) -> pd.DataFrame:
    rng = np.random.default_rng([seed, 5])
    train = {f"cell {i}": digits_in_states(rng, 200, carried) for i in range(cells)}
    test = {f"cell {i}": digits_in_states(rng, 60, carried) for i in range(cells)}
    return run_probes(train, test, seed)


@pytest.mark.parametrize("carried, claimed", [("value", True), ("distractor", False), ("control", False)])
def test_only_the_value_makes_a_cell_readable(carried, claimed):
    probes = readable_cells_of(carried, 0)
    assert (probes["readable"] == claimed).all()
    halves = (probes["accuracy_when_chosen"] + probes["judged_accuracy"]) / 2  # two halves, and not one of them twice
    assert np.allclose(halves, probes["accuracy"]) and (probes["n_judged"] == probes["n"] / 2).all()
    if carried == "distractor":  # the layout trap: far above shuffled labels and the control task, but only by the rule
        assert (probes["low"] > probes["shuffled_high"]).all() and (probes["low"] > probes["control_high"]).all()
        assert (probes["beyond"] < 0.3).all() and (probes["distractor_rate"] > 0.4).all()
        assert (probes["distractor_accuracy"] > 0.8).all()
        assert not probes["above_rules"].any()
    if carried == "control":
        assert (probes["selectivity"] < 0).all() and not probes["above_rules"].any()


def test_random_states_are_rarely_readable():
    studies = 20
    claims = sum(readable_cells_of("nothing", seed)["above_rules"].any() for seed in range(studies))
    assert claims <= 0.05 * studies


def test_a_study_of_240_null_cells_makes_a_claim_in_at_most_one_in_twenty():
    "The case of the sentence `readable`: 40 programs, 240 cells, accuracy 0.12 for value, shuffled labels and control task alike."
    rng = np.random.default_rng(0)
    studies = 60
    claims = 0
    for _ in range(studies):
        right, shuffled, control = rng.random((3, 240, 40)) < 0.12
        beyond = rng.random((240, 40)) < 0.5
        p = [readable_p(*rows, 0.12) for rows in zip(right, shuffled, control, beyond)]
        q = [beyond_rules_p(r, s, b, 0.12) for r, s, b in zip(right, shuffled, beyond)]
        marked = mark_readable(pd.DataFrame({"p": p, "p_beyond_rules": q}))
        claims += (marked["readable"] | marked["above_rules"]).any()
    assert claims <= 0.05 * studies
    true_cell = readable_p(np.ones(40, bool), right[0], control[0], beyond[0], 0.12)
    cells = pd.DataFrame({"p": [*p[1:], true_cell], "p_beyond_rules": [*q[1:], true_cell]})
    assert mark_readable(cells)["readable"].tolist()[-1]


def test_the_probed_layer_is_chosen_and_judged_on_different_programs():
    both = pd.DataFrame(
        {
            "position_name": ["query", "query"],
            "layer": [0, 1],
            "n": 40,
            "n_judged": 20,
            "accuracy": [0.6, 0.7],
            "accuracy_when_chosen": [0.9, 0.5],
            "judged_accuracy": [0.3, 0.9],
            "judged_low": 0.1,
            "judged_high": 0.95,
            "shuffled_accuracy": 0.1,
            "control_accuracy": 0.2,
            "control_low": 0.1,
            "control_high": 0.3,
            "beyond": 0.6,
            "beyond_low": 0.3,
            "beyond_high": 0.8,
            "beyond_chance": 0.4,
            "n_beyond": 8,
            "low": 0.5,
            "p": 0.01,
            "readable": [True, True],
            "above_rules": [True, True],
            "effect_low": [-0.9, -0.01],
            "effect_high": [-0.5, 0.01],
        }
    )
    sentence = probes_sentence(both)
    assert "query, layer 0" in sentence and "0.30 [0.10, 0.95] on the others" in sentence
    assert "n=8, fewer than 10" in sentence
    assert "without effect: query (layer 1);" in sentence  # a negative effect is an effect


# --- directions


def planted_directions() -> dict[str, np.ndarray]:
    "The nine directions between values, and all the others."
    whole = np.eye(D_MODEL)
    values = whole[RESIDUAL_SUBSPACES["value"]]
    nine = np.linalg.svd(values - values.mean(0), full_matrices=False)[2][:9]
    rest = np.linalg.svd(whole - whole @ nine.T @ nine)[2][: D_MODEL - 9]
    return {"planted": nine, "rest": rest}


def test_nine_planted_directions_are_the_whole_value(lm, cases):
    parts = patch_subspace(lm, cases, 4, "query", planted_directions(), [4, 9, D_MODEL])
    mean = parts.groupby(["basis", "k"])["effect"].mean()
    assert mean["planted", 9] == pytest.approx(mean["all", lm.d_model], abs=0.02)
    assert mean["planted", 4] < 0.8
    assert abs(mean["rest", D_MODEL - 9]) < 0.05
    needed = directions_needed(parts).set_index("basis")
    assert needed["k"]["planted"] == 9 and np.isinf(needed["k"]["rest"])


def test_directions_from_programs_approach_the_planted(lm, cases, reference):
    labelled = states_by_position(lm, reference)["query"]
    bases = subspace_bases(labelled.states[4], labelled.values)
    assert len(bases["values"]) == 9 and all(
        np.allclose(rows @ rows.T, np.eye(len(rows)), atol=1e-6) for rows in bases.values()
    )
    parts = patch_subspace(lm, cases, 4, "query", bases, [9, D_MODEL])
    mean = parts.groupby(["basis", "k"])["effect"].mean()
    assert mean["values", 9] > 0.8 > 0.2 > mean["random", 9]
    assert mean["random", lm.d_model] == pytest.approx(mean["all", lm.d_model], abs=1e-3)


def test_the_whole_state_is_a_cell_of_the_sweep(lm, cases):
    cells = run_sweep(lm, cases[:2], PatchSweepOptions(sites=["resid_pre"], positions="query"))
    parts = patch_subspace(lm, cases[:2], 3, "query", {})
    same = cells[(cells["layer"] == 3) & (cells["position_name"] == "query")].sort_values("program")["effect"]
    assert np.allclose(parts["effect"], same, atol=1e-3)


# --- several models


def traced(moved, full) -> pd.DataFrame:
    rows = [
        {"program": p, "layer": layer, "position_name": "query", "moved": m, "full": f, "success": 0.0, "correct": 1.0}
        for p, (moved_by_layer, f) in enumerate(zip(moved, full))
        for layer, m in enumerate(moved_by_layer)
    ]
    return pd.DataFrame(rows)


def test_pooled_effects_weigh_programs_by_their_difference():
    table = pool_effects(traced([[4.0, 0.0], [0.0, 1.0]] * 4, [8.0, 2.0] * 4)).set_index("layer")
    assert table["effect"].tolist() == pytest.approx([4 / 10, 1 / 10])
    assert (table["low"] <= table["effect"]).all() and (table["effect"] <= table["high"]).all()
    assert table["measurable"].all()


@pytest.mark.parametrize("full", [[1.0, -1.0] * 4, [0.0] * 8, [-3.0] * 8])
def test_a_share_of_nothing_is_not_a_number(full):
    cells = traced([[1.0, 0.5]] * 8, full)
    table = pool_effects(cells)
    assert not table["measurable"].any() and table[["effect", "low", "high"]].isna().all(axis=None)
    peaks = training_effect_peaks(cells.assign(model="m"))
    assert peaks["effect"].isna().all() and peaks["accuracy"].tolist() == [1.0]
    assert "no difference to trace" in training_sentence(peaks)


def test_models_are_compared_on_the_same_programs(lm):
    pairs = draw_unfiltered_cases(lm, 4, ProgramShapes((5,), (2,), "hash"))
    tables = [
        trace_residual_stream(load_model_or_planted(m), pairs).assign(model=m)
        for m in ("tiny:llama", "planted:binding")
    ]
    peaks = training_effect_peaks(pd.concat(tables)).set_index(["model", "position_name"])
    assert peaks["accuracy"]["planted:binding"].eq(1).all() and peaks["accuracy"]["tiny:llama"].max() < 0.5
    assert peaks["layer"]["planted:binding", "query"] == 4 and peaks["effect"]["planted:binding", "query"] > 0.9
    assert training_effect_figure(pd.concat(tables)) is not None


# --- records


def test_work_that_is_done_is_not_done_again(tmp_path):
    calls = []

    def unit(name, fail=False):
        def work():
            calls.append(name)
            if fail:
                raise KeyboardInterrupt
            return pd.DataFrame({"x": [0.5, np.nan], "head": [1, None]})

        return work

    with pytest.raises(KeyboardInterrupt):
        compute_missing_units(tmp_path / "t", {"b": unit("b"), "a": unit("a", fail=True)})
    table = compute_missing_units(tmp_path / "t", {"b": unit("b"), "a": unit("a")})
    assert calls == ["b", "a", "a"] and list(table["unit"]) == ["b", "b", "a", "a"]
    again = compute_missing_units(tmp_path / "t", {"b": unit("b"), "a": unit("a")})
    assert calls == ["b", "a", "a"] and again.equals(table)


def test_a_sweep_in_pieces_is_the_sweep(lm, cases, tmp_path):
    units = sweep_units(lm, cases[:3], "head_out", "rhs 2, final", programs_per_unit=2)
    got = compute_missing_units(tmp_path / "h", units)
    whole = run_sweep(lm, cases[:3], PatchSweepOptions(sites=["head_out"], positions="rhs 2, final"))
    whole = whole[whole["kl"].notna()]
    key = ["program", "layer", "head", "position_name"]
    both = whole.merge(got.astype({"head": "Int64"}), on=key, suffixes=("", "_got"))
    assert len(both) == len(got) == len(whole) and np.allclose(both["effect"], both["effect_got"], atol=1e-6)


def test_programs_of_several_tokens_an_answer_are_refused():
    from codetrace.patching.alignment import CannotTrace
    from codetrace.tasks.programs import as_program

    long = as_program(("a = 12\n#a:", "12"))
    with pytest.raises(CannotTrace):
        tokenize_program(models.load("tiny:llama"), long)
    program = tokenize_program(models.load("tiny:llama"), as_program(("a = 3\nb = a\n#b:", "3")))
    assert (
        isinstance(program, TokenizedProgram)
        and program.value == 3
        and program.positions["final"] == len(program.token_ids) - 1
    )


def test_states_are_parted_where_they_are_about_to_be_read(lm, cases):
    resid = run_sweep(lm, cases, PatchSweepOptions(sites=["resid_pre"], positions=STREAM_SWEEP_POSITIONS))
    assert choose_subspace_cells(resid) == [(1, "rhs 1"), (3, "rhs 2"), (4, "query"), (5, "final")]


# --- the donor's states are read at the base's positions


@pytest.fixture(scope="module")
def redirected_cases():
    "Cases whose counterfactual has another chain, so that its own `rhs 1` is another token than the program's."
    lm = models.load("tiny:llama")
    cases = draw_unfiltered_cases(lm, 2, ProgramShapes((6,), (2,), "hash"), change="reference")
    for case in cases:
        base, counterfactual = (tokenize_program(lm, program) for program in case.pair)
        assert base.positions["rhs 1"] != counterfactual.positions["rhs 1"]
    return lm, cases


def patched_by_hand(lm, case: TraceCase, site: str, layer: int, name: str, **heads) -> float:
    "Share of the whole logit difference after one state is put in at the same token, from nothing but `capture` and `intervene`."
    program, counterfactual = (tokenize_program(lm, side) for side in case.pair)
    base_ids = list(program.token_ids)
    source_ids = list(counterfactual.token_ids)
    position = program.positions[name]
    state = lm.capture([source_ids], [(site, layer)])[site, layer][0, position]
    state = state[heads["heads"]] if heads else state
    with lm.intervene(Intervention(site, layer, state, positions=position, **heads)):
        patched = lm.logits([base_ids])[0]
    plain, whole = lm.logits([base_ids, source_ids])
    leads = [float(x[counterfactual.answer_id] - x[program.answer_id]) for x in (plain, patched, whole)]
    return (leads[1] - leads[0]) / (leads[2] - leads[0])


def test_the_donors_states_are_aligned_to_the_base(redirected_cases):
    lm, cases = redirected_cases
    for case in cases:
        program, counterfactual = tokenize_pair(lm, case)
        assert counterfactual.positions == program.positions
    names = ("rhs 2", "rhs 1", "query")
    options = PatchSweepOptions(sites=["head_out", "resid_pre"], positions=list(names), layers=[1])
    swept = run_sweep(lm, cases, options)
    parts = pd.concat(patch_subspace(lm, cases, 1, name, {}) for name in names)
    for name in names:
        heads = patch_heads(lm, cases, [(1, 2, name)], draws=0).query("kind == 'chosen' and position_name == @name")
        for i, case in enumerate(cases):
            stream = patched_by_hand(lm, case, "resid_pre", 1, name)
            head = patched_by_hand(lm, case, "head_out", 1, name, heads=2)
            cells = swept[(swept["program"] == i) & (swept["layer"] == 1) & (swept["position_name"] == name)]
            cells = cells.set_index("site")["effect"]
            assert parts.query("program == @i and position_name == @name")["effect"].item() == pytest.approx(
                stream, abs=2e-3
            )
            assert heads.set_index("program")["effect"][i] == pytest.approx(head, abs=2e-3)
            assert cells["resid_pre"] == pytest.approx(stream, abs=2e-3)
            assert cells["head_out"].iloc[2] == pytest.approx(head, abs=2e-3)


# --- signs, and heads that are needed


def test_a_negative_head_counts():
    cells = cells_of({(0, 0): [-0.6] * 12, (0, 1): [0.3] * 12, (1, 0): [-0.001] * 12})
    chosen = choose_heads(cells)
    assert heads_from_table(chosen) == [(0, 0, "query"), (0, 1, "query")]
    assert chosen["effect"].tolist() == pytest.approx([-0.6, 0.3])
    rows = [
        {"program": p, "position_name": n, "kind": k, "draw": 0, "heads": 2, "effect": -0.3}
        for p in range(6)
        for n in ("query", "all")
        for k in ("chosen", "random heads")
    ]
    kinds = [("", "", "intact"), ("named", "all", "chosen"), ("named", "all", "random heads")]
    ablated = [
        {"program": p, "where": w, "position_name": n, "kind": k, "draw": 0, "correct": 1.0}
        for p in range(6)
        for w, n, k in kinds
    ]
    assert "query: 0.0 (negative), 0.1," in heads_sentence(chosen, pd.DataFrame(rows), pd.DataFrame(ablated))


def test_a_test_that_cannot_be_significant_is_not_printed():
    few = choose_heads(cells_of({(0, 0): [0.5] * 10, (0, 1): [0.4] * 10}))
    assert (few["n"] == 5).all() and few[["p", "q"]].isna().all(axis=None)  # the smallest p of five programs is 1/16
    enough = choose_heads(cells_of({(0, 0): [0.5] * 12, (0, 1): [0.4] * 12}))
    assert (enough["n"] == 6).all() and (enough["p"] == 2**-5).all() and (enough["q"] <= 0.05).all()


def test_needed_heads_are_judged_on_programs_they_were_not_chosen_on():
    lucky = [1.0, 0.0] * 6
    real = [0.5] * 12
    rows = [
        {"program": p, "layer": 0, "head": head, "log_prob_drop": drop, "correct": 1.0}
        for head, drops in enumerate((lucky, real, [0.0] * 12))
        for p, drop in enumerate(drops)
    ]
    needed = needed_heads(pd.DataFrame(rows), top=2)
    assert needed["head"].tolist() == [0, 1] and needed["drop_when_chosen"].tolist() == [1.0, 0.5]
    assert needed["log_prob_drop"].tolist() == [0.0, 0.5] and (needed["n"] == 6).all()


# --- lookbacks: a pointer at one place, the payload at another


def test_pointer_and_payload_are_told_apart_where_they_were_planted(lm):
    table = lookback_table(lookback_swaps(lm, draw_lookback_pairs(20, seed=3)))
    share = table.set_index(["position_name", "layer", "state_holds"])["share"]
    assert (table["n"] == 20).all()
    for layer in range(lm.n_layers):  # hop 1 reads by name in layer 1, hop 2 in layer 3, the read-out in layer 4
        assert share["rhs 2", layer, "name" if layer < 2 else "payload" if layer < 4 else "nothing"] > 0.9
        assert share["query", layer, "payload" if layer == 4 else "nothing"] > 0.9
        assert share["final", layer, "payload" if layer == 5 else "nothing"] > 0.9


@pytest.mark.parametrize("holds", LOOKBACK_ANSWERS)
def test_each_thing_held_leads_to_an_answer_of_its_own(lm, holds, monkeypatch):
    "A model that acts on payload, name, position or nothing is told apart from the three others."
    from codetrace.patching import lookbacks

    pairs = draw_lookback_pairs(10, seed=5)
    answers = iter([pair.answers[holds] for pair in pairs])

    def pretend(lm, tokens, site, targets, states):
        logits = torch.zeros(len(targets), lm.hf.config.vocab_size)
        logits[:, lm.ids(next(answers))[0][-1]] = 1
        return logits, logits

    monkeypatch.setattr(lookbacks, "patch_states", pretend)
    swaps = lookback_swaps(lm, pairs, ["final"])
    assert (swaps["state_holds"] == holds).all()
    for pair in pairs:
        lines = dict(zip(("base", "source"), (pair.base.lines, pair.source.lines)))
        letter = next(line for line in lines["source"] if line.startswith(f"{pair.base.query} = "))[-1]
        line = next(i for i, line in enumerate(lines["source"]) if line.startswith(f"{letter} = "))
        assert pair.answers["payload"] == lines["source"][line][-1]
        assert pair.answers["position"] == lines["base"][line][-1]
        assert pair.answers["name"] == next(text for text in lines["base"] if text.startswith(f"{letter} = "))[-1]


def test_one_position_is_not_drawn_twice():
    sets = pd.DataFrame(
        {"position_name": ["final", "all"], "kind": "chosen", "effect": 0.5, "low": 0.4, "high": 0.6, "n": 8}
    )
    figure = plot_head_sets(sets, "effect")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["final"]
    assert "n = 8 programs (fewer than 10)" in figure._supxlabel.get_text()
    three = pd.concat([sets, sets.assign(position_name="query")])
    assert len(plot_head_sets(three, "effect").axes) == 3


def test_two_models_of_one_revision_have_measurements_of_their_own(monkeypatch, tmp_path):
    from types import SimpleNamespace

    from codetrace.phases import seeds

    def trace(lm, cases, change, study):
        return pd.DataFrame({"effect": [lm.effect], "site": ["resid_pre"]})

    monkeypatch.setattr(seeds, "_draw_cases", lambda lm, change, study: [])
    monkeypatch.setattr(seeds, "trace_stream_and_heads", trace)
    monkeypatch.setattr(seeds, "_choose_heads_of_cells", lambda cells, study: [])
    lms = [
        SimpleNamespace(name=name, revision="seed=0", effect=i) for i, name in enumerate(["tiny:llama", "tiny:qwen2"])
    ]
    lms += [SimpleNamespace(name="planted", revision=f"seed={i}", effect=i) for i in (5, 6)]
    measured = [seeds.measure_change(lm, "value", None, tmp_path)["cells"]["effect"].tolist() for lm in (*lms, *lms)]
    assert measured == [[lm.effect] for lm in (*lms, *lms)]


def test_dimensions_that_hardly_vary_are_not_blown_up():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 9)).astype(np.float32)
    x[:, 1] = 3.0  # constant
    x[:, 2] = 3.0 + 3e-7 * rng.integers(0, 2, 60)  # but for rounding
    assert x[:, 2].std() > 0
    x[:, 3:7] = 2.0 + 3e-7 * rng.integers(0, 2, (60, 4))  # most of them
    spread = _fit_scaler(x).scale_
    assert spread[0] == pytest.approx(x[:, 0].std(), rel=1e-5)
    assert np.allclose(spread[1:7], np.median(x[:, [0, 7, 8]].std(0)), rtol=1e-5)
    assert (_fit_scaler(np.zeros((5, 3))).scale_ == 1).all()
