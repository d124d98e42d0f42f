"The planted circuit is a truth test: it works by construction, and the tools find it and nothing else."

import numpy as np
import pytest
import torch

from codetrace.patching.batches import draw_reference_programs
from codetrace.patching.cases import CaseOptions, ProgramShapes, draw_cases
from codetrace.patching.engine import PatchOptions, patch_all
from codetrace.patching.head_ablation import ablate_each_head, head_means
from codetrace.patching.heads import patch_heads
from codetrace.patching.sites import PatchPair
from codetrace.patching.sweep import PatchSweepOptions, run_sweep
from codetrace.planted.binding import VOCABULARY, circuit_necessary_heads, circuit_value_heads, load_binding_model
from codetrace.tasks.counterfactuals import make_counterfactual_pair
from codetrace.tasks.generators import make_variable_binding_program

LENGTHS = {1: (2, 3, 8, 16), 2: (3, 5, 9, 16)}


@pytest.fixture(scope="module")
def lm():
    return load_binding_model()


def drawn(depth: int, seq_len: int, n: int, seed: int = 0):
    rng = np.random.default_rng([seed, depth, seq_len])
    return [make_variable_binding_program(seq_len, rng, depth=depth) for _ in range(n)]


def share_right(lm, asked) -> float:
    answer_ids = lm.logits([p.code for p in asked]).argmax(-1).tolist()
    return float(np.mean([VOCABULARY[i] == p.answer for i, p in zip(answer_ids, asked)]))


@pytest.mark.parametrize("depth", [1, 2])
def test_it_answers_every_program(lm, depth):
    assert all(share_right(lm, drawn(depth, seq_len, 100)) == 1 for seq_len in LENGTHS[depth])


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_whatever_the_noise(seed):
    lm = load_binding_model(seed=seed)
    assert share_right(lm, drawn(2, 16, 60, seed) + drawn(1, 16, 60, seed)) == 1


def test_it_has_two_hops_and_no_more(lm):
    assert share_right(lm, drawn(3, 8, 60) + drawn(4, 8, 60)) < 0.2


def test_noise_is_noise(lm):
    "There is something not to find: the noise depends on the value, and reaches the logits."
    program, counterfactual = make_counterfactual_pair(drawn(2, 5, 1)[0], np.random.default_rng(0), lm.tokenizer)
    states = lm.capture([program.code, counterfactual.code], [("head_out", layer) for layer in range(lm.n_layers)])
    differs = [(x[0] - x[1]).norm(dim=-1).amax(0) > 1e-3 for x in states.values()]
    assert torch.stack(differs).sum() > 15
    quiet = load_binding_model(noise=0)
    assert (lm.logits(program.code) - quiet.logits(program.code)).abs().max() > 0.01


def cases_of(lm, depth: int, n: int = 10, seq_len: int = 6):
    return draw_cases(lm, n, ProgramShapes((seq_len,), (depth,), query_style="hash"), CaseOptions(num_shots=0))[0]


STAY = {  # where the value is before each layer, in a program of depth 2
    0: "rhs 1", 1: "rhs 1", 2: "rhs 2", 3: "rhs 2", 4: "query", 5: "final",
}  # fmt: skip


def test_the_sweep_finds_the_way_of_the_value(lm):
    cells = run_sweep(lm, cases_of(lm, 2), PatchSweepOptions(sites=["resid_pre"], positions="all"))
    means = cells.groupby(["layer", "position_name"])["effect"].mean()
    for (layer, name), effect in means.items():
        assert effect == pytest.approx(float(STAY[layer] == name), abs=0.05), (layer, name)
    assert cells["effect"][(cells["position_name"] == "") | (cells["position_name"] == "end other")].abs().max() < 0.05


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("seed", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_the_sweep_finds_exactly_the_heads_that_carry_the_value(depth, seed):
    lm = load_binding_model(seed=seed)
    cells = run_sweep(lm, cases_of(lm, depth), PatchSweepOptions(sites=["head_out"], positions="all"))
    means = cells.groupby(["layer", "head", "position_name"])["effect"].mean()
    heads = {(int(layer), int(head), name) for (layer, head, name), effect in means.items() if abs(effect) > 0.05}
    assert heads == circuit_value_heads(depth)
    assert means[[key for key in means.index if key not in circuit_value_heads(depth)]].abs().max() < 0.02
    assert means[list(circuit_value_heads(depth))].min() > 0.95


@pytest.mark.slow  # test_patching compares the engines on every family
def test_the_naive_engine_agrees(lm):
    program, counterfactual = cases_of(lm, 2, 1, 5)[0].pair
    base, source = lm.ids([program.code, counterfactual.code])

    def last(logits, i):
        return logits

    for site in ("resid_pre", "head_out", "mlp_out"):
        fast, slow = (
            patch_all(lm, [PatchPair(base, source)], site, last, PatchOptions(engine=e))[0]
            for e in ("staircase", "naive")
        )
        assert torch.allclose(fast, slow, atol=1e-3), site


@pytest.mark.parametrize("depth", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ablation_finds_exactly_the_heads_that_are_needed(lm, depth):
    many = draw_reference_programs(lm, 80, ProgramShapes((6,), (depth,), "hash"))
    means = head_means(lm, many[40:])
    rows = [ablate_each_head(lm, many[:40], means, layer) for layer in range(lm.n_layers)]
    right = {head: rows_of_head["correct"].mean() for t in rows for head, rows_of_head in t.groupby(["layer", "head"])}
    assert {head for head, share in right.items() if share < 0.5} == circuit_necessary_heads(depth)
    assert all(share == 1 for head, share in right.items() if head not in circuit_necessary_heads(depth))


def test_random_donors_do_not_bring_the_answer(lm):
    "A random state of the source's norm destroys, but does not carry: its effect is about a half, its success nothing."
    rows = patch_heads(lm, cases_of(lm, 2), sorted(circuit_value_heads(2)))
    noise, real = (rows[rows["kind"] == kind] for kind in ("chosen, noise", "chosen"))
    assert real["success"].mean() == 1 and noise["success"].mean() < 0.35
    assert real["effect"].min() > 0.95 and noise["effect"].mean() < 0.75


def test_other_formats_are_refused_aloud(lm):
    with pytest.raises(Exception, match=r"(?i)unk|vocabulary|token"):
        lm.ids("print(a)")
