"Sweeps of a tiny model against patches one by one, and tables of made-up cells whose means, orders and peaks are plain to see."

import numpy as np
import pandas as pd
import pytest
import torch

from codetrace import models
from codetrace.core.errors import BadInput, UnknownName
from codetrace.core.stats import benjamini_hochberg, bootstrap_interval, sign_flip_p, wilson
from codetrace.models.interventions import Intervention
from codetrace.patching.alignment import CELL_COLUMNS, PATCH_METRICS, TraceCase, align_pair, measure_patch
from codetrace.patching.sweep import (
    PatchSweepOptions,
    _first_positive,
    _from_difference_on,
    _name_order,
    _swept_positions,
    average_by_position,
    can_be_significant,
    crossover_layer,
    parse_position_names,
    peak_effects,
    run_sweep,
    split_halves,
    strongest_heads,
)
from codetrace.tasks.programs import as_program

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

PREFIX = "k = 5\n#k: 5\n\n"
CASES = [
    TraceCase(as_program(("a = 1\nb = a\n#b:", "1")), as_program(("a = 4\nb = a\n#b:", "4")), PREFIX),
    TraceCase(as_program(("z = 8\na = 1\n#a:", "1")), as_program(("z = 8\na = 2\n#a:", "2"))),
]


@pytest.fixture(scope="module")
def lm():
    return models.load("tiny:llama")


def test_names_of_positions():
    assert parse_position_names("all") == parse_position_names("named") == []
    assert parse_position_names(" rhs 1,query ") == ["rhs 1", "query"]
    names = ["query", "final", "end other", "lhs 1b", "rhs 10", "end 2z"]
    assert parse_position_names(tuple(names)) == names


@pytest.mark.parametrize("name", ["rhs 0", "rhs", "rhs 1a", "rhs 1bc", "xlhs 1", "end 1 ", "other", "", "rhs 01"])
def test_what_names_no_position_is_refused(name):
    with pytest.raises(UnknownName, match=f"^unknown position '{name}': "):
        parse_position_names(["final", name])


def test_a_name_like_a_position_is_suggested():
    for wrong, right in {
        "al": "all",
        "name": "named",
        "qery": "query",
        "finl": "final",
        "end othr": "end other",
    }.items():
        with pytest.raises(UnknownName, match=f"did you mean '{right}'"):
            parse_position_names([wrong])
    for wrong, right in {"lhs1": "lhs 1", "rhs1": "rhs 1", "end1": "end 1"}.items():
        with pytest.raises(UnknownName, match=f"did you mean '{right}'"):
            parse_position_names([wrong])


def test_options_are_checked_and_one_site_is_a_list():
    options = PatchSweepOptions()
    assert (options.sites, options.positions, options.direction) == (("resid_pre",), "all", "denoise")
    assert PatchSweepOptions(sites="head_out").sites == ("head_out",)
    assert PatchSweepOptions(sites=["head_out", "resid_mid"]).sites == ("head_out", "resid_mid")
    for wrong, message in {
        ("sites", ()): "^no site given: give at least one of resid_pre, ",
        ("sites", "resid"): "^unknown site 'resid'",
        ("direction", "both"): "^unknown direction 'both'",
        ("positions", "rhs 0"): "^unknown position 'rhs 0'",
        ("window", 0): "^window=0: a window is at least one layer$",
    }.items():
        with pytest.raises(BadInput, match=message):
            PatchSweepOptions(**dict([wrong]))


def test_positions_that_are_swept(lm):
    pair = align_pair(lm, CASES[0].pair, prefix=PREFIX)
    names = dict(zip(pair.roles["position"], pair.roles["position_name"]))
    first = min(names)
    assert first == 12 and list(names) == list(range(first, len(pair.base)))
    assert _swept_positions(pair.roles, "all") == list(names)
    assert _swept_positions(pair.roles, "named") == [position for position in names if names[position]]
    wanted = _swept_positions(pair.roles, "rhs 1, final")
    assert wanted == [pair.first_difference, len(pair.base) - 1] == _swept_positions(pair.roles, ["final", "rhs 1"])
    assert _from_difference_on(pair, [first, first + 3, first + 4, 99]) == [first + 3, first + 4, 99]


def patched_by_hand(lm, case: TraceCase, direction: str, site: str, names: set[str]) -> dict[tuple, list[float]]:
    "Metrics of each cell of an aligned pair by its layer, head and position; the base run's before the first difference."
    pair = align_pair(lm, case.pair, direction, case.prefix)
    plain = lm.logits([pair.base, pair.source])
    base = plain[0].log_softmax(-1)
    ends = measure_patch(plain, pair, base)[:, 0].tolist()
    heads = [0, 1, 2, 3] if site == "head_out" else [None]
    cells = {}
    for layer in range(lm.n_layers):
        states = lm.capture([pair.source], [(site, layer)])[site, layer][0]
        for position, name in zip(pair.roles["position"], pair.roles["position_name"]):
            for head in heads if name in names else []:
                where = {"positions": position} | ({} if head is None else {"heads": head})
                state = states[position] if head is None else states[position, head]
                with lm.intervene(Intervention(site, layer, state, **where)):
                    metrics = measure_patch(lm.logits([pair.base]), pair, base)[0].tolist()
                metrics[1] = (metrics[0] - ends[0]) / (ends[1] - ends[0])
                cells[layer, head, position] = metrics
    return cells


@pytest.mark.parametrize(("direction", "site"), [("denoise", "resid_pre"), ("noise", "head_out")])
def test_a_sweep_is_each_cell_patched_by_hand(lm, direction, site):
    "Two programs of different lengths, one after a solved example."
    names = ["lhs 1", "rhs 1", "final"]
    table = run_sweep(lm, CASES, PatchSweepOptions(sites=site, positions=names, direction=direction))
    assert list(dict.fromkeys(table["program"])) == [0, 1] and set(table["site"]) == {site}
    for number, case in enumerate(CASES):
        expected = patched_by_hand(lm, case, direction, site, set(names))
        swept = table[(table["program"] == number) & table["kl"].notna()]
        heads = [None if pd.isna(head) else head for head in swept["head"]]
        metrics_by_cell = dict(
            zip(zip(swept["layer"], heads, swept["position"]), swept[list(PATCH_METRICS)].to_numpy())
        )
        assert set(metrics_by_cell) == set(expected)
        for cell, metrics in expected.items():
            assert np.allclose(metrics_by_cell[cell], metrics, atol=2e-4), cell


def test_what_is_not_swept_is_not_a_number_and_layers_may_be_in_any_order(lm):
    whole = run_sweep(lm, CASES, PatchSweepOptions(positions="named"))
    two_layers = run_sweep(lm, CASES, PatchSweepOptions(positions="named", layers=[2, 0]))
    kept = whole["layer"] != 1
    pd.testing.assert_frame_equal(two_layers[kept], whole[kept])
    assert two_layers[~kept][list(PATCH_METRICS)].isna().all(axis=None)
    assert whole["kl"].notna().tolist() == (whole["position_name"] != "").tolist()


def test_before_the_first_difference_the_base_runs_metrics_stand(lm):
    "Also where nothing else is swept, and no patch is made at all."
    table = run_sweep(lm, CASES[1:], PatchSweepOptions(sites="head_out", positions="lhs 1, end other"))
    swept = table.dropna(subset="kl")
    assert swept["position_name"].unique().tolist() == ["end other", "lhs 1"] and len(swept) == lm.n_layers * 2
    pair = align_pair(lm, CASES[1].pair)
    logits = lm.logits([pair.base])
    expected = measure_patch(logits, pair, logits[0].log_softmax(-1))[0].tolist()
    expected[1] = 0
    assert np.allclose(swept[list(PATCH_METRICS)], [expected] * len(swept), atol=1e-6)


def test_every_token_of_every_site_is_swept_by_default(lm):
    table = run_sweep(lm, CASES[:1])
    pair = align_pair(lm, CASES[0].pair, prefix=PREFIX)
    assert len(table) == lm.n_layers * len(pair.roles) and table["kl"].notna().all()
    assert table["position"].tolist() == pair.roles["position"].tolist() * lm.n_layers
    pre = table.set_index(["layer", "position_name"])["effect"]
    assert pre[0, "rhs 1"] == pytest.approx(1, abs=1e-4) and pre[0, "final"] == pytest.approx(0, abs=1e-4)
    both = run_sweep(lm, CASES[:1], PatchSweepOptions(sites=("resid_pre", "resid_post")))
    assert both.index.tolist() == list(range(2 * len(table)))
    pd.testing.assert_frame_equal(both[: len(table)], table)


def made_cells(effects: dict[tuple, list[float]], site: str = "head_out") -> pd.DataFrame:
    "Cells by layer, head and position name: an effect a program, the other metrics a tenth of it apart."
    rows = []
    for (layer, head, name), values in effects.items():
        for program, effect in enumerate(values):
            place = {"program": program, "site": site, "layer": layer, "head": head, "position": 3, "token": "t"}
            metrics = {"logit_diff": effect - 0.1, "effect": effect, "success": float(effect > 0.2)}
            rows.append(place | {"position_name": name} | metrics | {"prob": effect + 0.1, "kl": effect + 0.2})
    return pd.DataFrame(rows).astype({"head": "Int64"})


SIX = [0.3, 0.5, 0.1, 0.4, 0.2, 0.6]


def test_names_stand_in_the_order_of_a_program():
    names = ["lhs 1", "rhs 1", "end 1", "lhs 1b", "rhs 1b", "end 1g", "lhs 2", "rhs 2", "rhs 10", "end 10b"]
    names += ["end other", "query", "final"]
    assert sorted(names[::-1], key=_name_order) == names
    assert _name_order("rhs 12b") == (0, 2, "12b", 1) and _name_order("end other") == (1, "end other")


def test_means_over_programs():
    "A program's tokens of one name are one value; tokens without a name, and cells that were not swept, are none."
    cells = made_cells({(0, 0, "query"): SIX, (0, 0, "rhs 1"): [-0.2] * 3, (0, 1, "rhs 1"): [0.0] * 6})
    twice = made_cells({(0, 0, "query"): [0.5]})
    ignored = made_cells({(0, 0, ""): SIX, (0, 0, "query"): [9.0] * 6})
    ignored.loc[ignored["position_name"] == "query", "kl"] = np.nan
    table = average_by_position(pd.concat([cells, twice, ignored]))
    assert table[["position_name", "head", "n"]].to_numpy().tolist() == [
        ["rhs 1", 0, 3],
        ["rhs 1", 1, 6],
        ["query", 0, 6],
    ]
    effects = np.array([0.4, *SIX[1:]])
    query = table.iloc[2]
    assert query[list(PATCH_METRICS)].tolist() == pytest.approx(
        [effects.mean() - 0.1, effects.mean(), 4 / 6, effects.mean() + 0.1, effects.mean() + 0.2]
    )
    assert table["effect"].tolist() == pytest.approx([-0.2, 0, effects.mean()])
    assert (query["low"], query["high"]) == pytest.approx(bootstrap_interval(effects))
    assert (query["success_low"], query["success_high"]) == pytest.approx(wilson(4, 6))
    assert query["p"] == query["q"] == sign_flip_p(effects) == 2 / 64
    assert table["p"].isna().tolist() == [True, True, False]  # Three programs are too few, and zero is not tested


def test_adjusted_p_are_of_all_that_were_tested():
    cells = made_cells({(0, 0, "query"): SIX, (1, 0, "query"): [*SIX[:5], -0.6], (2, 0, "query"): [0.1] * 5})
    table = average_by_position(cells)
    assert table["p"].tolist()[:2] == [sign_flip_p(SIX), sign_flip_p([*SIX[:5], -0.6])] and np.isnan(table["p"][2])
    assert np.array_equal(table["q"], benjamini_hochberg(table["p"]), equal_nan=True)
    assert table["q"][0] > table["p"][0]


def test_averages_stand_by_columns_site_name_head_and_layer():
    parts = []
    for direction in ("noise", "denoise"):
        for site in ("resid_pre", "head_out"):
            names = [(layer, head, name) for layer in (1, 0) for head in (1, 0) for name in ("final", "lhs 1")]
            parts.append(made_cells({name: [0.5, 0.25] for name in names}, site).assign(direction=direction))
    table = average_by_position(pd.concat(parts), ["direction"])
    expected = [
        [direction, site, layer, head, name]
        for direction in ("denoise", "noise")
        for site in ("head_out", "resid_pre")
        for name in ("lhs 1", "final")
        for head in (0, 1)
        for layer in (0, 1)
    ]
    assert table[["direction", *CELL_COLUMNS]].to_numpy().tolist() == expected
    assert table.index.tolist() == list(range(32))
    assert list(table) == [
        *("direction", *CELL_COLUMNS, "n", *PATCH_METRICS),
        *("low", "high", "success_low", "success_high", "p", "q"),
    ]


def test_a_site_without_heads_is_averaged_too():
    table = average_by_position(made_cells({(0, pd.NA, "query"): [0.5, 0.3], (1, pd.NA, "query"): [0.1, 0.1]}))
    assert table["effect"].tolist() == pytest.approx([0.4, 0.1]) and table["head"].isna().all()


def test_a_claim_needs_six_programs_at_a_level_of_a_twentieth():
    assert can_be_significant(pd.Series([4, 5, 6, 20])).tolist() == [False, False, True, True]
    assert can_be_significant(pd.Series([4, 5]), 2 / 32).tolist() == [False, True]


def test_every_second_program_chooses():
    cells = pd.DataFrame({"program": [9, 4, 2, 7, 4, 2]})
    choosing, judging = split_halves(cells)
    assert choosing["program"].tolist() == [2, 7, 2] and judging["program"].tolist() == [9, 4, 4]
    assert choosing.index.tolist() == [2, 3, 5]


def test_a_peak_is_chosen_on_one_half_and_judged_on_the_other():
    "Programs 0 and 2 choose the negative cell; in 1 and 3 it is weak, and the other one is large."
    chosen = [-0.8, 0.1, -0.6, 0.3]
    cells = made_cells({(0, 1, "query"): chosen, (1, 0, "query"): [0.5, 0.9, 0.5, 0.9], (2, 0, "rhs 1"): [0.1] * 4})
    table = peak_effects(cells)
    columns = [*CELL_COLUMNS, "effect_when_chosen", "n", "effect", "low", "high", "success", "success_low"]
    assert list(table) == [*columns, "success_high"]
    assert table[[*CELL_COLUMNS, "n"]].to_numpy().tolist() == [
        ["head_out", 2, 0, "rhs 1", 2],
        ["head_out", 0, 1, "query", 2],
    ]
    assert table["effect_when_chosen"].tolist() == pytest.approx([0.1, -0.7])
    assert table["effect"].tolist() == pytest.approx([0.1, 0.2])
    judged = average_by_position(cells[cells["program"] % 2 == 1])
    judged = judged[(judged["layer"] == 0)].iloc[0]
    assert table.iloc[1][["low", "high", "success", "success_low"]].tolist() == [
        judged[name] for name in ("low", "high", "success", "success_low")
    ]


def test_peaks_of_sites_and_directions_are_apart():
    parts = []
    for shift, (site, direction) in enumerate([("resid_pre", "noise"), ("head_out", "noise"), ("head_out", "denoise")]):
        cells = made_cells({(layer, 0, "query"): [0.1 + (layer == shift)] * 2 for layer in range(3)}, site)
        parts.append(cells.assign(direction=direction))
    table = peak_effects(pd.concat(parts), ["direction"])
    expected = [["denoise", "head_out", 2], ["noise", "head_out", 1], ["noise", "resid_pre", 0]]
    assert table[["direction", "site", "layer"]].to_numpy().tolist() == expected
    assert table["effect"].tolist() == pytest.approx([1.1] * 3)


def test_a_peak_of_one_program_is_judged_by_none():
    table = peak_effects(made_cells({(0, 0, "query"): [0.5], (1, 0, "query"): [0.7]}))
    assert table[["layer", "effect_when_chosen"]].to_numpy().tolist() == [[1, 0.7]]
    assert table.iloc[:, 5:].isna().all(axis=None) and len(table.columns) == 12


def test_the_strongest_heads_are_of_either_sign_and_chosen_on_one_half():
    effects = {(0, head, "query"): [0.1 * head, 9.0, 0.1 * head] for head in range(12)}
    effects |= {(1, 0, "rhs 1"): [-2.0, 0, -2], (1, 1, "end other"): [5.0] * 3}
    cells = pd.concat([made_cells(effects), made_cells({(0, pd.NA, "query"): [7.0] * 3}, "resid_pre")])
    table = strongest_heads(cells)
    assert list(table) == list(CELL_COLUMNS) and table.index.tolist() == list(range(10))
    assert table["head"].tolist() == [0, *range(11, 2, -1)]
    assert table.iloc[0].tolist() == ["head_out", 1, 0, "rhs 1"]
    both = pd.concat([cells, made_cells({(2, 3, "query"): [0.01] * 3, (2, 4, "query"): [0.02] * 3}, "key")])
    assert strongest_heads(both, 1)[["site", "head"]].to_numpy().tolist() == [["head_out", 0], ["key", 4]]
    nothing = strongest_heads(cells[cells["head"].isna()])
    assert list(nothing) == list(CELL_COLUMNS) and len(nothing) == 0


def test_heads_of_equal_effect_stay_in_the_order_of_the_table():
    "Even heads have the larger of two effects."
    effects = {(layer, head, "query"): [0.5 - 0.2 * (head % 2)] * 2 for layer in range(4) for head in range(10)}
    table = strongest_heads(made_cells(effects), 40)
    assert table["head"].tolist() == [head for first in (0, 1) for head in range(first, 10, 2) for _ in range(4)]
    assert table["layer"].tolist() == [0, 1, 2, 3] * 10


def crossing_cells(early: list[list[float]], late: list[list[float]], names=("rhs 1", "final")) -> pd.DataFrame:
    "Effects at two positions: of each program a list over layers."
    effects = {}
    for name, programs in zip(names, (early, late)):
        effects |= {(layer, 0, name): [effect[layer] for effect in programs] for layer in range(len(early[0]))}
    return made_cells(effects, "resid_pre")


EARLY = [[0.9, 0.5, 0.3, 0.0], [0.9, 0.9, 0.4, 0.1], [0.9, 0.9, 0.9, 0.2]]
LATE = [[0.1, 0.6, 0.6, 0.9], [0.1, 0.4, 0.5, 0.9], [0.1, 0.1, 0.6, 0.9]]


def test_the_crossover_is_the_first_layer_at_which_the_later_position_leads():
    "Mean leads: -0.8, -0.4, 0.03, 0.8. Its interval is of resampled programs."
    draws = np.random.default_rng(0).integers(3, size=(2000, 3))
    leads = np.subtract(LATE, EARLY)
    layers = [next(layer for layer in range(4) if leads[rows].mean(0)[layer] > 0) for rows in draws]
    expected = (2, *np.quantile(layers, [0.025, 0.975]))
    assert crossover_layer(crossing_cells(EARLY, LATE)) == expected and expected[1] < 2 < expected[2]
    assert crossover_layer(crossing_cells(EARLY, LATE)[::-1]) == expected
    named = crossing_cells(EARLY, LATE, ("lhs 1", "query"))
    assert crossover_layer(named, "lhs 1", "query") == expected
    few = crossover_layer(crossing_cells(EARLY, LATE), n_resamples=40)
    assert few == (2, *np.quantile(layers[:40], [0.025, 0.975]))


@pytest.mark.parametrize(("layers", "expected"), [([1, 2, 3], (2, 1, 3)), ([0, 2, 3], (2, 2, 3)), ([3], (3, 3, 3))])
def test_the_crossover_is_a_layer_of_the_model_where_only_some_were_swept(layers, expected):
    "It was the place among the layers that were swept; two layers of each are left to draws."
    cells = crossing_cells(EARLY, LATE)
    assert crossover_layer(cells[cells["layer"].isin(layers)]) == expected
    cells.loc[~cells["layer"].isin(layers), list(PATCH_METRICS)] = np.nan
    assert crossover_layer(cells) == expected


def test_an_interval_is_open_where_resampled_programs_never_cross():
    "Two of five programs are ahead at the last layer, by more than the others are behind: 0.6 ** 5 of the draws hold none."
    early = [[0.5, 0.5, 0.5]] * 5
    late = [[0.1, 0.1, 0.9]] * 2 + [[0.1, 0.1, 0.45]] * 3
    layer, low, high = crossover_layer(crossing_cells(early, late))
    assert (layer, low, high) == (2, 2, np.inf)


def test_where_there_is_no_crossover():
    cells = crossing_cells(EARLY, LATE)
    assert np.isnan(crossover_layer(cells, after="query")).tolist() == [True] * 3
    assert np.isnan(crossover_layer(cells, before="query")).tolist() == [True] * 3
    assert np.isnan(crossover_layer(crossing_cells(EARLY, EARLY))).tolist() == [True] * 3  # Level is not ahead
    layer, low, high = crossover_layer(crossing_cells(EARLY[:1], LATE[:1]))
    assert layer == 1 and np.isnan([low, high]).all()
    some = crossover_layer(crossing_cells([[0.5, 0.5], [0.5, 0.5]], [[0.1, 0.7], [0.1, 0.2]]))
    assert np.isnan(some[0]) and some[1:] == (1, np.inf)  # At layer 1 only where the first program is drawn twice


def test_a_program_without_both_positions_is_left_out():
    cells = crossing_cells(EARLY, LATE)
    cells.loc[(cells["program"] == 2) & (cells["position_name"] == "final") & (cells["layer"] == 3), "kl"] = np.nan
    assert crossover_layer(cells) == crossover_layer(crossing_cells(EARLY[:2], LATE[:2]))


def test_the_first_layer_above_zero():
    means = np.array([[-1.0, 0, 2, 3], [1, -1, -1, 5], [-1, 0, 0, -2]])
    assert np.array_equal(_first_positive(means), [2, 0, np.nan], equal_nan=True)
    assert float(_first_positive(means[0])) == 2
    assert torch.isnan(torch.tensor(float(_first_positive(means[2]))))
