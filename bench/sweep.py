"""How much faster is the staircase than what is used today? The last line is JSON.

    python bench/sweep.py            the full bench, about half an hour on two idle cores
    python bench/sweep.py --quick    a few minutes: fewer repeats, loops timed on fewer layers

Everything runs in one process, on the same pairs, model, dtype, attention implementation and threads; the contestants alternate,
and a ratio is that of their medians. A loop over cells costs the same for each layer, so it is timed on every `stride`-th layer, and its time is scaled
by the number of layers; `--stride 1` times all of it. Peak memory is that of a process of its own, which loads the model and sweeps.

On SmolLM2 a sweep is of one pair. On the small 6-layer model each sweep, by every engine, is of eight pairs together: there overhead and not arithmetic
rules, and what saves it is that a study's programs share a batch, as they do in `run_sweep`. `small_vs_naive` is the ratio for such a batch;
`small_one_pair_vs_naive`, in a line of its own before the last, is the ratio where only one pair is swept.
"""

import argparse
import copy
import itertools
import json
import logging
import math
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

from codetrace import models
from codetrace.models.lm import LM
from codetrace.patching.engine import PatchOptions, patch_all
from codetrace.patching.sites import EngineWork, PatchPair
from codetrace.patching.staircase import sweep_layer_tokens

TEXT = "a = {}\nb = 5\nc = a\nd = b\ne = c\nf = d\ng = e\nh = f\ni = g\nj = h\nk = i\nl = j\nm = k\nn = l\no = n\n#o:"


def pairs_of(lm, n_tokens: int) -> list[PatchPair]:
    "Couples of runs of so many tokens that differ in one of the first; eight for a small model, whose programs are swept together, else one."
    runs = [lm.ids([TEXT.format(digit)])[0][:n_tokens] for digit in range(9)]
    assert len(runs[0]) == n_tokens, f"the text has only {len(runs[0])} tokens"
    return [PatchPair(base, source) for base, source in itertools.pairwise(runs)][: 8 if lm.name == "small" else 1]


def cut(lm, n_layers: int):
    "A model's first layers, as a model that shares its weights."
    hf = copy.deepcopy(lm.hf, {id(t): t for t in [*lm.hf.parameters(), *lm.hf.buffers()]})
    hf.config.num_hidden_layers = n_layers
    hf.base_model.layers = hf.base_model.layers[:n_layers]
    return LM(f"{lm.name}:{n_layers}", hf, lm.tokenizer, revision=lm.revision)


def small() -> "models.LM":
    "A model of the size that is trained for such studies: 6 layers, 64 wide; overhead rules."
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(
        hidden_size=64, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4
    )
    config = AutoConfig.for_model("llama", vocab_size=8192, bos_token_id=1, eos_token_id=2, **sizes)
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    return LM("small", hf, models.load("tiny:llama").tokenizer, revision="seed=0")


def lead(logits, i):
    "A metric: the lead of one token over another."
    return logits[:, 1:2] - logits[:, :1]


class Bench:
    def __init__(self, options):
        self.repeats = options.repeats
        self.stride = options.stride
        self.clock = time.process_time if options.cpu_time else time.perf_counter

    def alternate(self, contestants: dict) -> dict[str, float]:
        "Median seconds of each, one after the other in every round; the first round only warms up."
        seconds = {name: [] for name in contestants}
        for turn in range(self.repeats + 1):
            for name, run in contestants.items():
                begin = self.clock()
                run()
                seconds[name].append(self.clock() - begin)
                logging.info("%s: %.2f s%s", name, seconds[name][-1], "" if turn else " (warm-up)")
        return {name: statistics.median(s[1:]) for name, s in seconds.items()}

    def sweeps(self, lm, n_tokens: int, site: str, engines, stride: int, most: int | None = None) -> dict[str, float]:
        "Seconds of a whole sweep by each engine, of all pairs together or the first few."
        pairs = pairs_of(lm, n_tokens)[:most]
        some = list(range(0, lm.n_layers, stride))

        def run(engine):
            return lambda: patch_all(
                lm, pairs, site, lead, PatchOptions(layers=None if engine == "staircase" else some, engine=engine)
            )

        seconds = self.alternate({engine: run(engine) for engine in ("staircase", *engines)})
        seconds |= {engine: seconds[engine] * lm.n_layers / len(some) for engine in engines}
        ratios = {engine: round(seconds[engine] / seconds["staircase"], 2) for engine in engines}
        report(
            model=lm.name,
            layers=lm.n_layers,
            tokens=n_tokens,
            site=site,
            pairs=len(pairs),
            staircase=round(seconds["staircase"], 3),
            times_faster_than=ratios,
        )
        return seconds

    def share(self, lm, n_tokens: int) -> dict[str, float]:
        "Layer-tokens a second of the sweep over those of a plain batched forward pass; and how many were computed over how many are needed."
        pair = pairs_of(lm, n_tokens)[0]
        work = EngineWork()
        rows = 32
        ids = torch.tensor([pair.base] * rows)
        patch_all(lm, [pair], "resid_pre", lead, work=work)
        needed = sweep_layer_tokens(lm.n_layers, n_tokens, pair.first_difference)

        def plain():
            return lm.unembed(lm.hf.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -1])

        seconds = self.alternate({"plain": plain, "staircase": lambda: patch_all(lm, [pair], "resid_pre", lead)})
        rate = {
            "plain": rows * n_tokens * lm.n_layers / seconds["plain"],
            "staircase": work.layer_tokens / seconds["staircase"],
        }
        out = {
            "layer_tokens_over_needed": work.layer_tokens / needed,
            "share_of_plain_forward": rate["staircase"] / rate["plain"],
        }
        report(model=lm.name, tokens=n_tokens, **out)
        return out


def report(**what):
    print(json.dumps(what), flush=True)


def difference(lm, n_tokens: int, stride: int) -> float:
    "The largest difference of any logit between staircase and naive."
    pair = pairs_of(lm, n_tokens)[0]
    layers = list(range(0, lm.n_layers, stride))

    def whole(logits, i):
        return logits

    got, want = (
        patch_all(lm, [pair], "resid_pre", whole, PatchOptions(layers=layers, engine=engine))[0]
        for engine in ("staircase", "naive")
    )
    assert torch.equal(got.argmax(-1), want.argmax(-1)), "a prediction differs"
    return (got - want).abs().max().item()


def exponent(x: list[float], y: list[float]) -> float:
    "The slope of a line through the logarithms."
    x = [math.log(v) for v in x]
    y = [math.log(v) for v in y]
    return round(statistics.linear_regression(x, y).slope, 2)


def high_water() -> float:
    "Peak memory of this process in GB; its resource usage would begin with that of the process that started it."
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 2**20


def peak(options) -> float:
    "Peak memory in GB of a process that loads the model and sweeps."
    command = [sys.executable, __file__, "--peak", "--threads", str(options.threads), "--dtype", options.dtype]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="3 repeats, loops timed on every tenth layer, 25 tokens only"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds after the warm-up")
    parser.add_argument(
        "--stride",
        type=int,
        default=5,
        help="time loops over cells on every so many layers (heads: five times as many)",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the process's own time: on a machine that others use, with --threads 1",
    )
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.repeats = min(options.repeats, 3)
        options.stride = max(options.stride, 10)
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    lm = models.load("smollm2", dtype=options.dtype, attn="eager")
    if options.peak:
        patch_all(lm, pairs_of(lm, 25) * 4, "resid_pre", lead)
        return print(high_water())
    bench = Bench(options)
    loops = ("naive", "nnsight", "transformer_lens")
    heads_stride = 5 * options.stride
    sizes = [25] if options.quick else [25, 12, 60]
    tiny = small()
    by_tokens = {}
    by_layers = {}
    heads = {}
    little = {}
    for n in sizes:
        by_tokens[n] = bench.sweeps(
            lm, n, "resid_pre", loops if n == 25 else ("naive",), options.stride * (1 if n < 60 else 3)
        )
        little[n] = bench.sweeps(tiny, n, "resid_pre", loops if n == 25 else ("naive",), 1)
    for n in sizes[:2]:
        heads[n] = bench.sweeps(lm, n, "head_out", ("naive",), heads_stride)
        bench.sweeps(tiny, n, "head_out", ("naive",), 2)
    one_pair = bench.sweeps(tiny, 25, "resid_pre", ("naive",), 1, most=1)
    share = bench.share(lm, 25)
    for n in () if options.quick else (6, 12, 24):
        by_layers[n] = bench.sweeps(cut(lm, n), 25, "resid_pre", (), 1)["staircase"]
    if by_layers:
        tokens = sorted(by_tokens)
        report(
            cost_grows_with_layers_to_the=exponent(list(by_layers), list(by_layers.values())),
            cost_grows_with_tokens_to_the=exponent(tokens, [by_tokens[n]["staircase"] for n in tokens]),
        )

    def over(seconds, engine):
        return round(seconds[25][engine] / seconds[25]["staircase"], 2)

    report(small_one_pair_vs_naive=over({25: one_pair}, "naive"))
    report(
        vs_transformer_lens=over(by_tokens, "transformer_lens"),
        vs_nnsight=over(by_tokens, "nnsight"),
        vs_naive=over(by_tokens, "naive"),
        heads_vs_naive=over(heads, "naive"),
        small_vs_naive=over(little, "naive"),
        max_abs_logit_diff=difference(lm, 25, options.stride),
        layer_tokens_over_needed=round(share["layer_tokens_over_needed"], 4),
        share_of_plain_forward=round(share["share_of_plain_forward"], 3),
        peak_memory_gb=round(peak(options), 2),
    )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "transformers", "nnsight"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    main()
