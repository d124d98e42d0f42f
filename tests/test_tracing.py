"What a notebook cannot hold of `tracing`: planted truths, every family of models, several tokenizers, refusals, resuming."

import copy
import itertools
import json
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch

from codetrace import models
from codetrace.core.errors import BadInput, UnknownName
from codetrace.models.interventions import Intervention
from codetrace.models.lm import LM
from codetrace.models.smollm2 import smollm2_folder
from codetrace.models.tiny import TINY_CONFIGS
from codetrace.patching import cases as patching_cases
from codetrace.patching import controls, knockout, traces
from codetrace.patching.alignment import (
    PATCH_DIRECTIONS,
    PATCH_METRICS,
    CannotTrace,
    Misaligned,
    RoleSharesToken,
    TraceCase,
    align_pair,
    pair_positions,
    token_roles,
)
from codetrace.patching.attribution import attribution_patching
from codetrace.patching.cases import (
    CANDIDATES_PER_PROGRAM,
    CaseOptions,
    ProgramShapes,
    draw_cases,
    exclusion_counts,
    exclusion_reasons,
)
from codetrace.patching.controls import ControlOptions, patch_states, run_controls
from codetrace.patching.site_ablation import SiteAblationOptions, ablate_sites, prompted_program
from codetrace.patching.sites import _site_states, patch_sites
from codetrace.patching.sweep import PatchSweepOptions, average_by_position, peak_effects, run_sweep, strongest_heads
from codetrace.patching.traces import PROGRAMS_PER_SWEEP, TraceOptions, trace_cases
from codetrace.phases import tracing
from codetrace.phases.tracing import (
    CausalExperimentRunner,
    ProgramSelection,
    cases_from_run,
    control_effects_table,
    head_grid_figure,
    token_grid_figure,
)
from codetrace.runs.manifest import newest_run
from codetrace.runs.run import Run
from codetrace.tasks.counterfactuals import make_counterfactual_pair, make_redirected_pair
from codetrace.tasks.generators import GENERATORS, make_variable_binding_program
from codetrace.tasks.heuristics import resists_shallow_heuristics
from codetrace.tasks.programs import QUERY_STYLES, analyse_program, as_program

PREFIX = "k = 5\nprint(k)  # prints 5\n\n"
# Qwen 2 is Llama with biases, Qwen 3 is it with normed queries and keys, Gemma 3 is Gemma 2 without soft caps
# GPT-2 packs queries, keys and values as GPT-NeoX does, and adds attention before the MLP as Llama does
LIKE_OTHERS = {"qwen2", "qwen3", "gemma3", "gpt2"}
FAMILIES = [pytest.param(name, marks=[pytest.mark.slow] * (name in LIKE_OTHERS)) for name in TINY_CONFIGS]


@pytest.fixture(scope="session")
def llama():
    return models.load("tiny:llama")


def pair_of(lm, depth=2, seq_len=4, style="print", seed=0):
    rng = np.random.default_rng(seed)
    program = make_variable_binding_program(seq_len, rng, depth=depth, query_style=style)
    return make_counterfactual_pair(program, rng, lm.tokenizer)


def as_cases(pairs, prefix=""):
    return [TraceCase(*pair, prefix) for pair in pairs]


@pytest.fixture(scope="session")
def pairs(llama):
    return [pair_of(llama, depth, seed=seed) for seed, depth in enumerate((1, 2, 2))]


# --- roles


@cache
def smollm2_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_folder("tokenizer"), local_files_only=True)


def bpe(lm, regex: bool, joined=()):
    "The same vocabulary cut otherwise: without the rule that keeps kinds of characters apart, or with tokens of one's own."
    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(smollm2_tokenizer())
    if not regex:
        from tokenizers.pre_tokenizers import ByteLevel

        tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in joined])
    return LM("other", lm.hf, tokenizer, "x")


@pytest.mark.parametrize("style", QUERY_STYLES)
@pytest.mark.parametrize("regex", [True, False])
@pytest.mark.parametrize("depth", [1, 3])
def test_roles_point_at_the_programs_own_text(llama, style, regex, depth):
    lm = bpe(llama, regex)
    program, _ = pair_of(llama, depth, 5, style)
    for prompt in (program.code, PREFIX + program.code):
        table = token_roles(lm, program, prompt).set_index("position_name")
        for link in program.chain:
            assert table["token"][f"rhs {link.depth}"].strip() == program.text(link.rhs)
            assert table["token"][f"lhs {link.depth}"].strip() == program.text(link.lhs)
            assert "\n" in table["token"][f"end {link.depth}"]
            assert table["line"][f"rhs {link.depth}"] == link.line
        assert table["token"]["query"].strip() == program.query
        assert table["position"]["final"] == len(table) - 1
        others = table.loc[["end other"]]["line"] if "end other" in table.index else []
        assert sorted([*others, *(link.line for link in program.chain)]) == list(range(5))


def test_a_special_token_at_the_start_shifts_positions_only(llama):
    from tokenizers.processors import TemplateProcessing

    lm = bpe(llama, True)
    program, _ = pair_of(llama)
    bos = lm.tokenizer.convert_ids_to_tokens(1)
    lm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 1)])
    table = token_roles(lm, program)
    plain = token_roles(llama, program)
    assert list(table["position_name"][1:]) == list(plain["position_name"]) and list(table["line"]) == [
        -1,
        *plain["line"],
    ]


@pytest.mark.parametrize(
    ("joined", "name"), [(["(w"], "query"), (["= 2"], "rhs 1"), (["w)"], "query"), (["\nj"], "lhs 2")]
)
def test_a_token_bears_the_role_that_it_holds_whole(llama, joined, name):
    "Qwen's and Llama 3's tokenizers join a bracket with the name behind it."
    program = as_program(("k = 2\nj = k\nw = j\nprint(w)  # prints ", "2"))
    table = token_roles(bpe(llama, True, joined), program).set_index("position_name")
    assert [table["token"][name]] == joined


@pytest.mark.parametrize(("joined", "role"), [(["nt(w"], "query"), (["2\nj"], "rhs 1"), (["j = k"], "rhs 2")])
def test_a_role_cut_in_the_middle_of_a_token_is_refused(llama, joined, role):
    program = as_program(("k = 2\nj = k\nw = j\nprint(w)  # prints ", "2"))
    with pytest.raises(RoleSharesToken, match=role):
        token_roles(bpe(llama, True, joined), program)


def test_other_generators_have_roles(llama):
    rng = np.random.default_rng(0)
    for name, make in GENERATORS.items():
        program = make(3, rng)
        table = token_roles(llama, program)
        assert {"rhs 1", "query", "final"} <= set(table["position_name"]) or program.query_span[1] == len(
            program.code
        ), name


def test_a_prompt_that_asks_in_words_has_no_query_token(llama):
    program, _ = pair_of(llama)
    table = token_roles(llama, program, f"What is {program.query}?\n\n{program.source}\n\nAnswer:")
    assert (
        "query" not in set(table["position_name"])
        and table["position_name"].iloc[-1] == "final"
        and table["line"].iloc[-1] == -1
    )
    assert (table["position_name"] == "rhs 1").sum() == 1


# --- pairs that do not line up


def test_pairs_that_do_not_line_up_are_refused(llama, pairs):
    assert issubclass(CannotTrace, BadInput)

    def made(code):
        return as_program((code, code.split("\n")[0][-1]))

    program = made("a = 1\nb = 2\nc = a\n#c:")
    shorter = made("a = 1\nb = 2\n#a:")
    moved = as_program(("b = 2\na = 3\nc = a\n#c:", "3"))
    long = [as_program((f"x = {value}\n#x:", str(value))) for value in (12, 13)]
    for bad, error, says in [
        ((program, program), CannotTrace, "no difference"),
        ((program, shorter), Misaligned, "tokens"),
        ((program, moved), Misaligned, "same roles"),
        (long, CannotTrace, "is 2 tokens"),
    ]:
        with pytest.raises(error, match=says):
            run_sweep(llama, as_cases([tuple(bad)]), PatchSweepOptions(positions="final"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"positions": "querry"}, "did you mean 'query'"),
        ({"sites": ["resid"]}, "site"),
        ({"direction": "both"}, "direction"),
        ({"engine": "fast"}, "engine"),
    ],
)
def test_unknown_names_are_named(llama, pairs, options, says):
    with pytest.raises(UnknownName, match=says):
        run_sweep(llama, as_cases(pairs[:1]), PatchSweepOptions(**options))


# --- the sweep


def by_hand(lm, pair, prefix, site, layer, position, head=None):
    "One cell through the models' own capture and intervene."
    aligned = align_pair(lm, pair, prefix=prefix)
    state = lm.capture([list(aligned.source)], [(site, layer)], positions=[position])[site, layer][0, 0]
    value = state if head is None else state[head]
    with lm.intervene(Intervention(site, layer, value, positions=position, heads=head)):
        logits = lm.logits([list(aligned.base)])[0]
    plain = lm.logits([list(aligned.base)])[0].log_softmax(-1)
    base_answer, wanted = aligned.answer_ids
    log_probs = logits.log_softmax(-1)
    kl = float((plain.exp() * (plain - log_probs)).sum())
    return (
        float(logits[wanted] - logits[base_answer]),
        float(logits.argmax() == wanted),
        float(log_probs[wanted].exp()),
        kl,
    )


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_sweep_is_the_experiment_done_by_hand(arch):
    lm = models.load(f"tiny:{arch}", attn="eager")
    pair = pair_of(lm)
    for site in ("resid_pre", "mlp_out", "head_out"):
        cells = run_sweep(lm, as_cases([pair], PREFIX), PatchSweepOptions(sites=[site], positions="named"))
        live = cells[cells["position_name"].isin(["rhs 1", "rhs 2", "query"])].sample(4, random_state=0)
        for cell in live.itertuples():
            head = None if pd.isna(cell.head) else int(cell.head)
            expected = by_hand(lm, pair, PREFIX, site, cell.layer, cell.position, head)
            assert [cell.logit_diff, cell.success, cell.prob, cell.kl] == pytest.approx(expected, abs=2e-4)


def test_planted_truths(llama, pairs):
    cells = run_sweep(
        llama, as_cases(pairs, PREFIX), PatchSweepOptions(sites=["resid_pre", "resid_post"], positions="all")
    )
    pre, post = (cells[cells["site"] == site] for site in ("resid_pre", "resid_post"))
    last = llama.n_layers - 1
    # the embedding of the changed token is the whole difference, the last state of the last token is the whole answer
    assert pre[(pre["layer"] == 0) & (pre["position_name"] == "rhs 1")]["effect"].tolist() == pytest.approx(
        [1] * 3, abs=1e-4
    )
    assert post[(post["layer"] == last) & (post["position_name"] == "final")]["effect"].tolist() == pytest.approx(
        [1] * 3, abs=1e-4
    )
    # other tokens' embeddings are the same in both runs; other tokens' last states reach no logit
    silent = [
        pre[(pre["layer"] == 0) & (pre["position_name"] != "rhs 1")],
        post[(post["layer"] == last) & (post["position_name"] != "final")],
    ]
    for rows in silent:
        assert rows["effect"].abs().max() < 1e-4 and rows["kl"].abs().max() < 1e-5
    # before the root nothing differs, exactly
    for program, rows in cells.groupby("program"):
        root = rows["position"][rows["position_name"] == "rhs 1"].iloc[0]
        assert (rows[rows["position"] < root]["effect"] == 0).all(), program
    # one layer's output is the next one's input
    shifted = post[post["layer"] < last].assign(layer=lambda t: t["layer"] + 1)[
        ["program", "layer", "position", "logit_diff"]
    ]
    both = pre.merge(shifted, on=["program", "layer", "position"])
    assert np.allclose(both["logit_diff_x"], both["logit_diff_y"], atol=1e-4) and len(both)


def test_directions_are_each_others_mirror(llama, pairs):
    there = run_sweep(llama, as_cases(pairs), PatchSweepOptions(positions="named", direction="noise"))
    back = run_sweep(
        llama, as_cases([pair[::-1] for pair in pairs]), PatchSweepOptions(positions="named", direction="denoise")
    )
    pd.testing.assert_frame_equal(there, back)


def test_unswept_is_nan_never_zero(llama, pairs):
    cells = run_sweep(llama, as_cases(pairs), PatchSweepOptions(positions=["query", "final"]))
    asked = cells["position_name"].isin(["query", "final"])
    assert cells[~asked][list(PATCH_METRICS)].isna().all(axis=None) and cells[asked][list(PATCH_METRICS)].notna().all(
        axis=None
    )
    assert list(cells.columns) == [
        "program",
        "site",
        "layer",
        "head",
        "position",
        "token",
        "position_name",
        *PATCH_METRICS,
    ]


def test_engines_agree(llama, pairs):
    fast, slow = (
        run_sweep(llama, as_cases(pairs, PREFIX), PatchSweepOptions(positions="named", engine=e))
        for e in ("staircase", "naive")
    )
    assert np.nanmax((fast["logit_diff"] - slow["logit_diff"]).abs()) < 1e-4
    assert fast["success"].equals(slow["success"])


@pytest.mark.parametrize("arch", FAMILIES)
def test_controls_put_what_interventions_put(arch):
    lm = models.load(f"tiny:{arch}")
    aligned = align_pair(lm, pair_of(lm), prefix=PREFIX)
    positions = pair_positions(aligned)
    for site in patch_sites(lm):
        states = _site_states(lm, aligned.source, site)
        heads = states[1].shape[1]
        places = [(layer, heads - 1, positions[name]) for layer in (1, 2) for name in ("rhs 1", "query", "final")]
        patched_states = [states[layer][position, head] for layer, head, position in places]
        plain, mine = patch_states(lm, aligned.base, site, places, patched_states)
        torch.testing.assert_close(plain[0], lm.logits([list(aligned.base)])[0], atol=2e-4, rtol=1e-3)
        if site in ("key", "value"):
            continue  # `intervene` does not know them; the exact sweep does, below
        for row, (layer, head, position) in enumerate(places):
            only = {} if site != "head_out" else {"heads": head}
            with lm.intervene(Intervention(site, layer, patched_states[row], positions=position, **only)):
                theirs = lm.logits([list(aligned.base)])[0]
            torch.testing.assert_close(mine[row], theirs, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_no_op_is_exactly_nothing(arch, monkeypatch):
    monkeypatch.setattr(controls, "CONTROL_ROWS_PER_PASS", 7)  # the last rows do not fill a batch
    lm = models.load(f"tiny:{arch}")
    cases = [TraceCase(*pair_of(lm, seed=seed), prefix) for seed, prefix in enumerate((PREFIX, ""))]
    heads = [(site, layer, 1, name) for site in ("head_out", "key") for layer in (0, 2) for name in ("rhs 2", "final")]
    table = pd.DataFrame(heads, columns=["site", "layer", "head", "position_name"])
    some = ["resid_pre", "mlp_out", "head_out", "key"]
    effects = run_controls(lm, cases, ControlOptions(sites=some, layers=[1], direction="noise", heads=table))
    silent, noise = (effects[effects["control"] == kind] for kind in ("no-op", "random"))
    assert len(silent) == len(noise) and list(dict.fromkeys(silent["site"])) == some
    assert (silent["effect"] == 0).all() and (silent["kl"] == 0).all()
    assert (noise[(noise["position_name"] == "final") & (noise["layer"] < 2)]["kl"] > 0).all()


def test_controls_of_heads_put_the_wanted_answer_where_the_sweep_does(llama, pairs):
    "A source's own states, put in as a control would put them, have the sweep's effects: at keys and values, too."
    cells = run_sweep(
        llama, as_cases(pairs[1:2]), PatchSweepOptions(sites=["head_out", "key", "value"], positions=["rhs 1", "query"])
    )
    aligned = align_pair(llama, pairs[1])
    base_answer, wanted = aligned.answer_ids
    for site, rows in cells[cells["kl"].notna() & (cells["layer"] == 1)].groupby("site"):
        states = _site_states(llama, aligned.source, site)[1]
        places = [(1, int(r.head), int(r.position)) for r in rows.itertuples()]
        _, logits = patch_states(llama, aligned.base, site, places, [states[p, h] for _, h, p in places])
        assert (logits[:, wanted] - logits[:, base_answer]).tolist() == pytest.approx(
            rows["logit_diff"].tolist(), abs=1e-4
        )


def test_random_controls_have_the_donors_norm(llama, pairs):
    aligned = [align_pair(llama, pair) for pair in pairs]
    cells = [(1, 0, "query"), (2, 3, "final"), (2, 1, "end 1")]
    for site in ("resid_pre", "head_out"):
        mine = [(layer, head * (site == "head_out"), name) for layer, head, name in cells]
        random_states = {
            cell: x for kind, cell, x in controls._control_states(llama, aligned, 0, site, mine, 0) if kind == "random"
        }
        for (layer, head, name), state in random_states.items():
            source = _site_states(llama, aligned[0].source, site)[layer][pair_positions(aligned[0])[name], head]
            torch.testing.assert_close(state.norm(), source.norm())
            assert abs(torch.nn.functional.cosine_similarity(state, source, dim=0)) < 0.9


def test_an_unrelated_donor_has_the_answer_it_is_named_for(llama):
    def make(name, root):
        return as_program((f"{name} = {root}\nb = {name}\n#b:", str(root)))

    aligned = [
        align_pair(llama, (make(name, root), make(name, changed_root)))
        for name, root, changed_root in [("a", 3, 7), ("c", 7, 5)]
    ]
    kinds = [kind for kind, *_ in controls._control_states(llama, aligned, 0, "resid_pre", [(1, 0, "query")], 0)]
    assert kinds == ["no-op", "random", "unrelated, same answer"]  # nobody else answers 3
    *_, (_, _, state) = controls._control_states(llama, aligned, 0, "resid_pre", [(1, 0, "query")], 0)
    expected = _site_states(llama, aligned[1].base, "resid_pre")[1][pair_positions(aligned[1])["query"], 0]
    torch.testing.assert_close(state, expected)


@pytest.mark.parametrize("arch", FAMILIES)
def test_attribution_is_the_slope_of_a_small_patch(arch):
    lm = models.load(f"tiny:{arch}")
    step = 2e-3
    pair = pair_of(lm)
    aligned = align_pair(lm, pair, prefix=PREFIX)
    base_answer, wanted = aligned.answer_ids
    plain = lm.logits(lm.tokenize([list(aligned.base), list(aligned.source)]))
    full = float(plain[1, wanted] - plain[1, base_answer] - plain[0, wanted] + plain[0, base_answer])
    for site in ("resid_pre", "attn_out", "head_out"):
        table = attribution_patching(lm, as_cases([pair], PREFIX), [site])
        for cell in table[table["attribution"].abs() > 1e-3].sample(3, random_state=0).itertuples():
            head = None if pd.isna(cell.head) else int(cell.head)
            base, source = (
                lm.capture([list(ids)], [(site, cell.layer)], positions=[cell.position])[site, cell.layer][0, 0]
                for ids in (aligned.base, aligned.source)
            )
            moved = base + step * (source - base)
            value = moved if head is None else moved[head]
            with lm.intervene(Intervention(site, cell.layer, value, positions=cell.position, heads=head)):
                logits = lm.logits([list(aligned.base)])[0]
            slope = float(logits[wanted] - logits[base_answer] - plain[0, wanted] + plain[0, base_answer]) / step / full
            assert cell.attribution == pytest.approx(slope, rel=0.1, abs=0.02)
    assert not any(parameter.requires_grad for parameter in lm.hf.parameters())


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("arch", FAMILIES)
def test_a_cut_edge_carries_nothing(arch, attn, monkeypatch):
    if arch == "gemma2" and attn == "sdpa":
        pytest.skip("soft caps need eager attention")
    lm = models.load(f"tiny:{arch}", attn=attn)
    aligned = align_pair(lm, pair_of(lm))
    n = len(aligned.base)
    root = aligned.first_difference
    everywhere = range(lm.n_layers)
    plain = lm.logits([list(aligned.base)])[0]
    torch.testing.assert_close(
        knockout._knockout_logits(lm, aligned.base, [(n - 1, 0)], [])[0], plain, atol=1e-4, rtol=1e-3
    )
    assert not torch.allclose(
        plain, knockout._knockout_logits(lm, aligned.base, [(n - 1, n - 3)], everywhere)[0], atol=1e-3
    )
    assert not torch.allclose(plain, lm.logits([list(aligned.source)])[0], atol=1e-3)
    # with every edge to the root cut, what it holds cannot reach the answer
    blocked = knockout._knockout_mask

    def block_all(*args):
        mask = blocked(*args)
        mask[:, :, root + 1 :, root] = torch.finfo(lm.dtype).min
        return mask

    monkeypatch.setattr(knockout, "_knockout_mask", block_all)
    base, source = (
        knockout._knockout_logits(lm, tokens, [(n - 1, root)], everywhere)[0]
        for tokens in (aligned.base, aligned.source)
    )
    torch.testing.assert_close(base, source, atol=1e-4, rtol=1e-3)


# --- a whole trace


def start(folder):
    folder.mkdir(exist_ok=True)
    return Run(
        folder,
        {"run_id": "x", "phase": "tracing", "status": "scratch", "launcher": "test", "parameters": {}, "inputs": []},
    )


@pytest.mark.slow  # test_store has the same of any table
def test_an_interrupted_trace_ends_as_an_uninterrupted_one(llama, tmp_path, monkeypatch):
    cases = [TraceCase(*pair_of(llama, seed=seed), PREFIX) for seed in range(6)]
    options = TraceOptions(directions=["denoise", "noise"], positions="query,final", control_layers=1)
    whole = trace_cases(llama, cases, start(tmp_path / "a"), options=options)
    sweep = run_sweep
    calls = []

    def stops(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sweep(*args, **kwargs)

    monkeypatch.setattr(traces, "run_sweep", stops)
    with pytest.raises(KeyboardInterrupt):
        trace_cases(llama, cases, start(tmp_path / "b"), options=options)
    resumed = trace_cases(llama, cases, start(tmp_path / "b"), options=options)
    assert len(calls) == 3 + 2  # two units of four and two programs in each direction: the first two were kept
    pd.testing.assert_frame_equal(resumed.cells, whole.cells)
    for name in ("intervention_results.json", "patch_results.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# --- shards


def as_run(folder, shards=()):
    run = start(folder)
    run.manifest["inputs"] = [{"folder": str(x), "shard": k} for k, x in enumerate(shards)]
    return run


@pytest.fixture(scope="session")
def ten_cases(llama):
    return [TraceCase(*pair_of(llama, depth=1 + seed % 2, seed=seed), PREFIX) for seed in range(10)]


OPTIONS = {"sites": ["resid_pre", "head_out"], "directions": ["denoise", "noise"], "control_layers": 1}


@pytest.mark.slow
@pytest.mark.parametrize("shards", [2, 3])
def test_shards_put_together_are_the_whole_byte_for_byte(llama, ten_cases, tmp_path, shards):
    options = TraceOptions(**OPTIONS, attribution_patching=True)
    whole = trace_cases(llama, ten_cases, as_run(tmp_path / "whole"), options=options)
    options = replace(options, shards=shards)
    parts = [tmp_path / f"part{k}" for k in range(shards)]
    swept = []
    for k, folder in enumerate(parts):
        trace = trace_cases(llama, ten_cases, as_run(folder), options=replace(options, shard=k))
        swept += [sorted(set(trace.cells["program"]))]
        assert not trace.controls.size
        assert not (folder / "patch_results.json").exists()
    assert [i for part in swept for i in part] == list(range(10)) and all(
        part[0] % PROGRAMS_PER_SWEEP == 0 for part in swept
    )
    merged = trace_cases(llama, ten_cases, as_run(tmp_path / "merged", parts), options=options)
    pd.testing.assert_frame_equal(merged.cells, whole.cells, check_exact=True)
    pd.testing.assert_frame_equal(merged.controls, whole.controls, check_exact=True)

    def files(name):
        return {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*.parquet")}

    assert files("merged") == files("whole") and files("whole")
    for name in ("intervention_results.json", "patch_results.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_shards_that_do_not_fit_are_refused(llama, ten_cases, tmp_path):
    options = TraceOptions(positions="query", control_layers=0, shards=3)
    parts = [tmp_path / f"part{k}" for k in range(3)]
    for k, folder in enumerate(parts):
        trace_cases(llama, ten_cases, as_run(folder), options=replace(options, shard=k))
    with pytest.raises(BadInput, match="give shards=3 or fewer"):
        trace_cases(llama, ten_cases, as_run(tmp_path / "x"), options=replace(options, shards=4, shard=0))
    with pytest.raises(CannotTrace, match="no denoise/resid_pre of program 8"):
        trace_cases(llama, ten_cases, as_run(tmp_path / "a", parts[:2]), options=options)
    with pytest.raises(BadInput, match="already"):
        trace_cases(llama, ten_cases, as_run(tmp_path / "b", [*parts, parts[0]]), options=options)
    with pytest.raises(CannotTrace, match="part0 is a shard of other programs"):
        trace_cases(llama, ten_cases[::-1], as_run(tmp_path / "c", parts), options=options)


def test_the_json_holds_the_cells(llama, tmp_path):
    cases = [TraceCase(*pair_of(llama, seed=seed)) for seed in range(2)]
    options = TraceOptions(sites=["resid_pre", "head_out"], positions="query,final", control_layers=0)
    trace = trace_cases(llama, cases, start(tmp_path), options=options)
    record = json.loads((tmp_path / "intervention_results.json").read_text())[1]
    heads = record["results"]["denoise/head_out"]["effect"]
    vector = record["results"]["denoise/resid_pre"]["effect"]
    assert np.shape(heads) == (3, llama.n_heads, 2) and np.shape(vector) == (3, 2)
    assert [record["position_names"][record["positions"].index(p)] for p in record["swept_positions"]] == [
        "query",
        "final",
    ]
    cells = trace.cells[
        (trace.cells["program"] == 1) & (trace.cells["position_name"] == "query") & (trace.cells["layer"] == 2)
    ]
    assert vector[2][0] == pytest.approx(cells[cells["site"] == "resid_pre"]["effect"].item(), abs=1e-5)
    assert heads[2][3][0] == pytest.approx(cells[cells["head"] == 3]["effect"].item(), abs=1e-5)
    assert json.loads((tmp_path / "patch_results.json").read_text())["programs"]["traced"] == 2


def test_only_what_the_model_knows_is_traced(llama, monkeypatch):
    cases = [TraceCase(*pair_of(llama, seed=seed, depth=1, seq_len=5)) for seed in range(6)]
    known = {case.program.code for case in cases[:3]} | {case.counterfactual.code for case in cases[1:]}
    monkeypatch.setattr(
        patching_cases, "_answers_correctly", lambda lm, asked: [program.code in known for _, program in asked]
    )
    reasons = exclusion_reasons(llama, cases, include_shallow=True)
    kept = [i for i, reason in enumerate(reasons) if not reason]
    assert kept == [1, 2]
    assert reasons == ["wrong on the counterfactual", "", "", *["wrong on the program"] * 3]
    reasons = exclusion_reasons(llama, cases)
    assert [i for i, reason in enumerate(reasons) if not reason] == [
        i
        for i in kept
        if resists_shallow_heuristics(cases[i].program) and resists_shallow_heuristics(cases[i].counterfactual)
    ]
    assert exclusion_counts(reasons)["programs"].sum() == 6


def test_programs_drawn_do_not_depend_on_how_many_are_wanted(llama, monkeypatch):
    monkeypatch.setattr(
        patching_cases, "_answers_correctly", lambda lm, asked: [len(program.query) == 1 for _, program in asked]
    )
    few, many = (draw_cases(llama, n, ProgramShapes([5], [1, 2]), CaseOptions(num_shots=1))[0] for n in (2, 8))
    assert [case.program for case in few] == [many[0].program, many[4].program]
    assert all(case.prefix and resists_shallow_heuristics(case.program) for case in many)


def test_a_model_that_knows_nothing_is_told_apart(llama, tmp_path):
    cases, why = draw_cases(llama, 1, ProgramShapes([3], [1]))
    assert cases == [] and len(why) == CANDIDATES_PER_PROGRAM
    with pytest.raises(CannotTrace, match="none of 40 programs can be traced"):
        trace_cases(llama, cases, start(tmp_path), why)


def test_peaks_are_not_judged_where_they_were_chosen():
    rng = np.random.default_rng(0)
    chosen = []
    judged = []
    cell = {"site": "resid_pre", "head": pd.NA, "position": 0, "token": "x", "position_name": "query"} | dict.fromkeys(
        PATCH_METRICS, 0.0
    )
    for _ in range(6):
        noise = pd.DataFrame(
            [cell | {"program": p, "layer": layer, "effect": rng.normal()} for p in range(40) for layer in range(60)]
        )
        peak = peak_effects(noise).iloc[0]
        chosen.append(abs(peak["effect_when_chosen"]))
        judged.append(np.sign(peak["effect_when_chosen"]) * peak["effect"])
        assert peak["n"] == 20
    assert np.mean(chosen) > 0.45 and abs(np.mean(judged)) < 0.25
    assert (average_by_position(noise)["q"] > 0.05).all()


def test_programs_of_a_tracking_run(llama, tmp_path, monkeypatch):
    from codetrace.phases.tracking import ExperimentRunner, quick_experiment

    config = quick_experiment(
        "x", models=["tiny:llama"], num_seqs=4, seq_lens=[4], num_shots=1, depths=[2], query_style="print"
    )
    run = start(tmp_path)
    runner = ExperimentRunner()
    runner.loaded["tiny:llama"] = llama
    samples = runner.run(config, run=run).samples
    monkeypatch.setattr(patching_cases, "_answers_correctly", lambda lm, asked: [True] * len(asked))
    assert not samples["correct"].any()
    cases, why = cases_from_run(llama, tmp_path, 3, include_shallow=True)
    assert cases == [] and why == ["wrong on the program"] * 4
    rows = [dict(row, correct=True) for row in samples.to_dict("records")]
    monkeypatch.setattr(tracing, "read_records", lambda *args, **kwargs: rows)
    cases, why = cases_from_run(llama, tmp_path, 3, include_shallow=True)
    assert [case.program.code for case in cases] == list(samples["code"][:3]) and why == [""] * 3
    assert all(row["prompt"] == case.prefix + case.program.code for row, case in zip(rows, cases))
    with pytest.raises(BadInput, match="no answers of"):
        cases_from_run(LM("other", llama.hf, llama.tokenizer), tmp_path, 3)


def test_the_seeds_api(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("CODETRACE_RUNS", str(tmp_path))
    monkeypatch.setattr(patching_cases, "_answers_correctly", lambda lm, asked: [True] * len(asked))
    runner = CausalExperimentRunner()
    runner.loaded["tiny:llama"] = llama
    program, counterfactual = pair_of(llama)
    programs = [
        program,
        (program.code, program.answer),
        (program.code, program.answer, {"a": 1}),
        (program, counterfactual),
    ]
    trace = runner.run_intervention_experiment(
        model_id="tiny:llama",
        programs=programs,
        intervention_type="attention_heads",
        selection=ProgramSelection(options=CaseOptions(include_shallow=True)),
    )
    assert len(trace.cases) == 4 and set(trace.cells["site"]) == {"head_out"}
    record = newest_run("tracing")
    assert record["run_id"] == trace.run.folder.name and "strongest cell" in record["headline"]
    assert {"intervention_results.json", "patch_results.json"} <= set(record["outputs"])
    assert token_grid_figure(trace) is None and head_grid_figure(trace) is not None


def test_controls_of_heads_are_run_on_programs_that_did_not_choose_them(llama, ten_cases, tmp_path):
    options = TraceOptions(sites=["resid_pre", "head_out", "value"], positions="rhs 1,query,final", control_layers=1)
    trace = trace_cases(llama, ten_cases, start(tmp_path), options=options)
    heads = trace.controls[trace.controls["head"].notna()]
    assert set(heads["site"]) == {"head_out", "value"} and set(heads["program"]) == {1, 3, 5, 7, 9}
    assert set(trace.controls[trace.controls["head"].isna()]["program"]) == set(range(8))
    for site, rows in heads.groupby("site"):
        chosen = strongest_heads(trace.cells[trace.cells["site"] == site])
        assert len(chosen) == 10 and len(rows[["layer", "head", "position_name"]].drop_duplicates()) <= 10
        assert rows["control"].nunique() >= 3 and (rows[rows["control"] == "no-op"]["effect"] == 0).all()
    table = control_effects_table(trace).set_index(["site", "control"])
    real = trace.cells.merge(
        heads[heads["site"] == "value"][["program", "site", "layer", "head", "position_name"]].drop_duplicates()
    )
    assert table.loc[("value", "the counterfactual itself"), "mean effect"] == pytest.approx(real["effect"].mean())
    assert table.loc[("head_out", "no-op"), "largest cell"] == 0


# --- the real model


@pytest.mark.slow
@pytest.mark.parametrize("direction", PATCH_DIRECTIONS)
def test_smollm2_engines_decide_alike(direction):
    "Every success decision is the same, and no logit difference is further off than 1e-4 of what eager attention gives both."
    lm = models.load("smollm2", dtype="float32", attn="eager")
    rng = np.random.default_rng(0)
    program = make_variable_binding_program(3, rng, depth=2, query_style="print")
    pair = make_counterfactual_pair(program, rng, lm.tokenizer)

    def sweep(site, engine):
        return run_sweep(
            lm,
            as_cases([pair]),
            PatchSweepOptions(sites=site, positions=["rhs 2", "final"], direction=direction, engine=engine),
        )

    for site in ("resid_pre", "attn_out"):
        fast = sweep(site, "staircase")
        for engine in ("naive", "nnsight", "transformer_lens"):
            slow = sweep(site, engine)
            assert np.nanmax((fast["logit_diff"] - slow["logit_diff"]).abs()) <= 2e-4, (site, engine)
            assert fast["success"].equals(slow["success"]), (site, engine)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_a_reference_can_be_what_is_patched(direction):
    "The changed reference carries the whole effect before layer 0, and neither root any; names are the program's in both directions."
    lm = models.load("tiny:llama")
    program = as_program(("k = 4\nm = 7\nx = k\nb = x\n#b:", 4))
    pair = make_redirected_pair(program, np.random.default_rng(0), lm.tokenizer)
    case = TraceCase(*pair)
    assert case.changed_position == "rhs 2"
    cells = run_sweep(lm, as_cases([pair]), PatchSweepOptions(direction=direction)).set_index(
        ["position_name", "layer"]
    )["effect"]
    assert cells["rhs 2", 0] == pytest.approx(1, abs=1e-4)
    assert cells["rhs 1", 0] == 0 and cells["rhs 1b", 0] == 0
    assert {"lhs 1b", "end 1b", "rhs 3"} <= set(cells.index.get_level_values("position_name"))


def test_reference_cases_are_drawn_and_unknown_changes_named():
    from codetrace.planted.binding import load_binding_model

    lm = load_binding_model()
    cases, _ = draw_cases(
        lm, 4, ProgramShapes((6,), (2,), query_style="hash"), CaseOptions(num_shots=0, change="reference")
    )
    assert len(cases) == 4 and {case.changed_position for case in cases} == {"rhs 2"}
    assert all(case.program.chain[0] != case.counterfactual.chain[0] for case in cases)
    with pytest.raises(BadInput, match="value"):
        draw_cases(lm, 1, ProgramShapes((6,), (2,)), CaseOptions(change="valeu"))
    with pytest.raises(BadInput, match="no reference to change"):
        ProgramSelection(shapes=ProgramShapes(depths=[1, 2]), options=CaseOptions(change="reference"))


def test_given_programs_are_changed_as_asked(tmp_path):
    from codetrace.planted.binding import load_binding_model

    lm = load_binding_model()
    program = as_program(("a = 1\nk = 4\nm = 7\nx = k\n#x:", 4))
    row = {"code": program.code, "answer": "4", "task": "variable_binding", "index": 0, "prompt": program.code}
    for change, origin in (("value", "rhs 1"), ("reference", "rhs 2")):
        selection = ProgramSelection(shapes=ProgramShapes(depths=[2]), options=CaseOptions(change=change))
        assert tracing._as_case(program, lm, selection).changed_position == origin
        assert tracing._case_from_record(row, lm, 0, change).changed_position == origin


# --- programs that are given


GIVEN = "a = 1\nb = 7\nk = 4\nx = k\nprint(x)  # prints "
CHANGED = GIVEN.replace("4", "9")
GIVEN_PAIRS = {
    "texts": {"original": GIVEN, "counterfactual": CHANGED},
    "tuples": {"original": (GIVEN, "4"), "counterfactual": (CHANGED, "9", {"note": 1})},
    "programs": {"original": as_program((GIVEN, 4)), "counterfactual": as_program((CHANGED, 9))},
    "a couple": (as_program((GIVEN, 4)), as_program((CHANGED, 9))),
    "more keys": {"id": 3, "original": GIVEN, "counterfactual": CHANGED},
}


@pytest.fixture
def runner(llama, tmp_path, monkeypatch):
    "A runner with a model that is never wrong, and an empty folder of runs."
    monkeypatch.setenv("CODETRACE_RUNS", str(tmp_path))
    monkeypatch.setattr(patching_cases, "_answers_correctly", lambda lm, asked: [True] * len(asked))
    runner = CausalExperimentRunner()
    runner.loaded["tiny:llama"] = llama
    return runner


@pytest.mark.parametrize("form", GIVEN_PAIRS)
def test_the_seeds_dictionaries_are_taken(runner, form):
    trace = runner.run_intervention_experiment("tiny:llama", [GIVEN_PAIRS[form]])
    (case,) = trace.cases
    assert (case.program.code, case.counterfactual.code) == (GIVEN, CHANGED)
    assert (case.program.answer, case.counterfactual.answer) == ("4", "9")


@pytest.mark.parametrize("program", [GIVEN, {"original": GIVEN}, (GIVEN, "4")])
def test_a_program_alone_gets_a_counterfactual(runner, program):
    (case,) = runner.run_intervention_experiment("tiny:llama", [program]).cases
    assert case.program.code == GIVEN and case.counterfactual.answer != "4"


LEFT_OUT = {  # Programs, and what the message must say
    "line 1": (
        [("k = 4\na = 1\nb = 7\nprint(k)  # prints ", "4")] * 2,
        "2 answer on line 1 or 2, or twice.*include_shallow=True",
    ),
    "counterfactual on line 1": (
        [(as_program((GIVEN, 4)), as_program((GIVEN.replace("= k", "= a"), 1)))],
        "line 1 or 2",
    ),
    "counterfactual twice": ([{"original": GIVEN, "counterfactual": GIVEN.replace("4", "7")}], "or twice"),
    "no constant": (
        [("a = 1\nb = 2\nx = None\ny = x\nz = y\n#z:", "None")],
        "no counterfactual.*begins with a digit, truth value or word",
    ),
    "nothing": ([], "no programs to trace: give at least one"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_why_no_program_is_left_is_said_before_a_run_is_opened(runner, tmp_path, case):
    programs, message = LEFT_OUT[case]
    with pytest.raises(CannotTrace, match=message) as error:
        runner.run_intervention_experiment("tiny:llama", programs)
    assert "answers none" not in str(error.value) and "num_shots" not in str(error.value)
    assert not list(tmp_path.rglob("run.json"))


def test_a_model_that_knows_none_is_named(runner, tmp_path, monkeypatch):
    monkeypatch.setattr(patching_cases, "_answers_correctly", lambda lm, asked: [False] * len(asked))
    with pytest.raises(CannotTrace, match=r"1 wrong on the program.*num_shots"):
        runner.run_intervention_experiment("tiny:llama", [GIVEN])
    assert not list(tmp_path.rglob("run.json"))
    with pytest.raises(BadInput, match=r"'text'.*'original'"):
        runner.run_intervention_experiment("tiny:llama", [{"text": GIVEN}])


@pytest.mark.parametrize(
    ("program", "counterfactual"),
    [
        (GIVEN, GIVEN.replace("= k", "= a")),  # the counterfactual's answer stands on line 1
        (GIVEN, GIVEN.replace("= k", "= b")),  # on line 2
        (GIVEN, GIVEN.replace("4", "7")),  # twice, the first time on line 2
        ("a = 1\nb = 7\nk = 4\nm = 9\nn = 9\nx = k\n#x:", "a = 1\nb = 7\nk = 4\nm = 9\nn = 9\nx = m\n#x:"),  # twice
    ],
)
def test_the_filter_of_shallow_answers_holds_for_the_counterfactual(llama, monkeypatch, program, counterfactual):
    "The program itself passes, so that a filter that looks at it alone keeps the pair."
    monkeypatch.setattr(patching_cases, "_answers_correctly", lambda lm, asked: [True] * len(asked))
    pair = [analyse_program(text, "custom", {}) for text in (program, counterfactual)]
    assert [resists_shallow_heuristics(part) for part in pair] == [True, False]
    for case in (TraceCase(*pair), TraceCase(*reversed(pair))):
        assert exclusion_reasons(llama, [case]) == ["answer on line 1 or 2, or twice"]
    assert exclusion_reasons(llama, [TraceCase(*pair)], include_shallow=True) == [""]


@pytest.mark.parametrize("change", ["value", "reference"])
@pytest.mark.parametrize("generator", ["variable_binding", "balanced_binding"])
def test_neither_of_a_drawn_pair_has_a_shallow_answer(change, generator):
    from codetrace.planted.binding import load_binding_model

    options = CaseOptions(generator, num_shots=0, change=change)
    cases, reasons = draw_cases(load_binding_model(), 12, ProgramShapes((8,), (2,), query_style="hash"), options)
    assert len(cases) == 12
    for case in cases:
        assert all(map(resists_shallow_heuristics, case.pair)), case.pair
    if change == "reference":
        assert "answer on line 1 or 2, or twice" in reasons  # some counterfactuals had one


def test_neither_of_an_unfiltered_pair_has_a_shallow_answer():
    from codetrace.patching.batches import draw_unfiltered_cases
    from codetrace.planted.binding import load_binding_model

    shapes = ProgramShapes((8,), (2,), query_style="hash")
    cases = draw_unfiltered_cases(load_binding_model(), 20, shapes, change="reference")
    assert len(cases) == 20 and all(resists_shallow_heuristics(part) for case in cases for part in case.pair)


# --- mean and resample ablation


@pytest.mark.parametrize(
    "arch", ["gpt2", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("llama", "gemma3"))]
)
def test_site_ablation_is_the_experiment_done_by_hand(arch):
    lm = models.load(f"tiny:{arch}")
    cases = [TraceCase(*pair_of(lm, seed=seed), PREFIX) for seed in range(4)]
    programs = [prompted_program(lm, case) for case in cases]
    ids = [list(program.token_ids) for program in programs]
    names = ("rhs 1", "query")
    layers = (1, 2)
    before = [lm.logits([row])[0].log_softmax(-1) for row in ids]
    sites = ("resid_pre", "head_out", "mlp_out")
    captured = [lm.capture([row_ids], list(itertools.product(sites, layers))) for row_ids in ids]
    for site in sites:
        options = SiteAblationOptions(sites=[site], names=names, layers=layers)
        table = ablate_sites(lm, cases, options)
        assert set(table["kind"]) == {"mean", "resample"} and set(table["position_name"]) == set(names)
        for i, layer, name in itertools.product((0, 3), layers, names):
            states = [
                states_of_program[site, layer][0, program.positions[name]]
                for states_of_program, program in zip(captured, programs)
            ]
            others = [state for j, state in enumerate(states) if j != i]
            candidates = {"mean": [torch.stack(others).mean(0)], "resample": others}
            for kind, replacements in candidates.items():
                rows = table[(table["program"] == i) & (table["kind"] == kind)]
                rows = rows[(rows["layer"] == layer) & (rows["position_name"] == name)]
                for row in rows.to_dict("records"):
                    only = {"heads": int(row["head"])} if site == "head_out" else {}
                    drops = []
                    for state in replacements:
                        state = state[row["head"]] if only else state
                        with lm.intervene(
                            Intervention(site, layer, state, positions=programs[i].positions[name], **only)
                        ):
                            after = lm.logits([ids[i]])[0].log_softmax(-1)
                        drops.append(float((before[i] - after)[programs[i].answer_id]))
                    assert min(abs(drop - row["log_prob_drop"]) for drop in drops) < 1e-3


def test_the_reverse_direction_is_no_evidence_of_its_own(llama, pairs):
    "`noise` with a pair is `denoise` with the pair exchanged, cell by cell: on pairs drawn alike the two are one experiment."
    for pair in pairs[:2]:
        noise = run_sweep(llama, as_cases([pair]), PatchSweepOptions(direction="noise"))
        exchanged = run_sweep(llama, as_cases([pair[::-1]]), PatchSweepOptions(direction="denoise"))
        assert np.nanmax((noise["effect"] - exchanged["effect"]).abs()) < 1e-4


# --- what decides a run that is started from Python


def test_a_run_from_python_is_told_from_those_with_another_counterfactual_or_dtype(monkeypatch):
    from codetrace.runs.inputs import outcome_digest

    opened = []

    def stop(phase, parameters, source):
        opened.append(outcome_digest("code", parameters, []))
        raise InterruptedError

    monkeypatch.setattr(tracing, "open_run", stop)
    monkeypatch.setattr(tracing, "exclusion_reasons", lambda lm, cases, include_shallow: [""] * len(cases))
    monkeypatch.setattr(tracing, "check_enough_cases", lambda *arguments: None)
    monkeypatch.setattr(CausalExperimentRunner, "model", lambda self, name: None)
    original = ("a = 3\nb = 5\nc = a\n# c: ", "3")
    changed_value = ("a = 4\nb = 5\nc = a\n# c: ", "4")
    changed_reference = ("a = 3\nb = 5\nc = b\n# c: ", "5")
    runs = [({}, changed_value), ({}, changed_reference), ({"dtype": "bfloat16"}, changed_value), ({}, changed_value)]
    for options, counterfactual in runs:
        pair = {"original": original, "counterfactual": counterfactual}
        with pytest.raises(InterruptedError):
            CausalExperimentRunner(**options).run_intervention_experiment("m", [pair])
    assert len(set(opened[:3])) == 3 and opened[3] == opened[0]
