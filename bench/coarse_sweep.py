"""What does a coarse sweep miss, and what does it save? Against the exact sweep of the same programs; the last line is JSON.

    python bench/coarse_sweep.py                               SmolLM2 and binding, ten programs of 8 and of 16 lines (ten minutes)
    python bench/coarse_sweep.py --model path.gguf             another model
    python bench/coarse_sweep.py --out bench/results/coarse_sweep.json    rows of the same model and length are replaced

Exact and coarse sweeps alternate in one process, program by program. Recall is of the cells with an exact effect of at least 0.1, beside the share of all cells that were kept; saving is in layer-tokens,
without the two plain runs that both need; the ratio of seconds is with them.
"""

import argparse
import json
import time
from pathlib import Path

import pandas as pd
import torch

from codetrace.models.lm import LM
from codetrace.models.loading import load
from codetrace.patching.alignment import TraceCase, align_pair
from codetrace.patching.cases import CaseOptions, ProgramShapes, draw_cases
from codetrace.patching.coarse_sweep import CoarseSweepOptions, coarse_sweep, coarse_sweep_error
from codetrace.patching.staircase import sweep_layer_tokens
from codetrace.patching.sweep import run_sweep

DEPTHS = {"smollm2": 1, "binding": 2}  # That a model answers; 1 for others
SEED = 1  # Of the programs: the defaults were chosen on those of seed 0


def exact_tokens(lm: LM, case: TraceCase) -> int:
    "Layer-tokens of an exact sweep, without the plain runs."
    pair = align_pair(lm, case.pair, "denoise", case.prefix)
    n_tokens = len(pair.base)
    plain = 2 * ((lm.n_layers - 1) * n_tokens + 1)
    return sweep_layer_tokens(lm.n_layers, n_tokens, pair.first_difference) - plain


def compare(lm: LM, lines: int, depth: int, num_programs: int) -> dict:
    "Both sweeps of some programs, one program after the other."
    cases, _ = draw_cases(lm, num_programs, ProgramShapes(seq_lens=(lines,), depths=(depth,)), CaseOptions(seed=SEED))
    tables = {"cells": [], "work": [], "exact": []}
    seconds = {"exact": 0.0, "coarse": 0.0}
    for number, case in enumerate(cases):
        began = time.perf_counter()
        exact = run_sweep(lm, [case])
        between = time.perf_counter()
        cells, work = coarse_sweep(lm, [case], CoarseSweepOptions())
        seconds["coarse"] += time.perf_counter() - between
        seconds["exact"] += between - began
        for name, table in {"cells": cells, "work": work, "exact": exact}.items():
            tables[name].append(table.assign(program=number))
    joined = {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}
    tokens = [exact_tokens(lm, case) for case in cases]
    row = coarse_sweep_error(joined["cells"], joined["work"], joined["exact"], tokens).iloc[0].to_dict()
    setting = {"model": Path(lm.name).stem, "lines": lines, "depth": depth, "seed": SEED}
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    return setting | row | {"n": len(cases), "seconds_ratio": seconds["exact"] / seconds["coarse"]} | machine


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", help="default: smollm2 and binding")
    parser.add_argument("--lines", type=int, action="append", help="default: 8 and 16")
    parser.add_argument("--programs", type=int, default=10)
    parser.add_argument("--out", type=Path, help="also write the rows here, beside those of other models")
    options = parser.parse_args()
    rows = []
    for model in options.model or ["smollm2", "binding"]:
        lm = load(model)
        for lines in options.lines or [8, 16]:
            rows.append(compare(lm, lines, DEPTHS.get(model, 1), options.programs))
            print(pd.DataFrame(rows[-1:]).round(3).to_string(index=False), flush=True)
    rounded = [{name: round(x, 3) if isinstance(x, float) else x for name, x in row.items()} for row in rows]
    if options.out:
        known = json.loads(options.out.read_text()) if options.out.exists() else []
        measured = {(row["model"], row["lines"]) for row in rounded}
        kept = [row for row in known if (row["model"], row["lines"]) not in measured]
        options.out.write_text(json.dumps(kept + rounded, indent=1) + "\n")
    print(json.dumps(rounded))


if __name__ == "__main__":
    main()
