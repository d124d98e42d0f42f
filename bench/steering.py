"""How much does a sweep of pushes save over running each by itself, and what does a push cost? The last line is JSON.

    python bench/steering.py            SmolLM2, 32 problems, 2 directions at 3 coefficients: about ten minutes on two idle cores
    python bench/steering.py --quick    the same with a tiny model: seconds, to see that it works

`vs_rerun`: the same answers in two ways, in one process, in turns. The naive way gives every direction and coefficient a decoder of its own, which reads
all prompts again. The sweep writes all of them in one: a push on written tokens leaves the prompt alone, so its keys and values are read once for all.
Both have as many slots. In float32 their tokens must be the same, or there is no number; in bfloat16 rounding decides ties and some answers part (`agreement`), so
times are compared per token written.

`overhead`: the same requests with a push of coefficient 0, which is computed and added like any other and changes no token, against no push at all.
Both are medians of the rounds' ratios. `memory` is what a process holds at most while it sweeps, less what it holds at most while it writes the first push alone, in MB;
`directions` is what the vectors themselves take.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from codetrace import models
from codetrace.models.decoding import Decoder, Request
from codetrace.models.limits import peak_memory
from codetrace.steering.directions import gaussian_directions, make_push, median_norms, push_edits
from codetrace.tasks.problem_prompts import render_problem_prompt
from codetrace.tasks.problems import load_problems
from codetrace.tasks.sampled_solutions import answer_stop_condition


def say(**facts):
    print(json.dumps(facts), flush=True)


class Bench:
    "The prompts and the pushes, and the ways to write all answers."

    def __init__(self, options, dtype: str = "auto"):
        self.options = options
        self.lm = lm = models.load(options.model, dtype)
        self.asked = []
        for p in load_problems("basics", options.problems):
            prompt = render_problem_prompt(p)
            self.asked.append((p.task_id, lm.ids([prompt.text])[0], *answer_stop_condition(prompt, p.entry_point)))
        norms = median_norms(lm, [ids for _, ids, *_ in self.asked[:4]])
        coefficients = np.linspace(0.1, 0.4, options.coefficients)
        some = gaussian_directions(lm.d_model, lm.n_layers // 2, options.directions)
        self.pushes = [make_push(d, a, norms) for d in some for a in coefficients]
        self.still = [make_push(p.direction, 0.0, norms) for p in self.pushes]

    def write(self, numbers, edits) -> dict:
        wanted = [Request(ids, (t, k), 0.0, over, marks) for t, ids, over, marks in self.asked for k in numbers]
        return {
            c.request.key: c.tokens
            for c in Decoder(self.lm, wanted, self.options.tokens, self.options.slots, edits=edits)
        }

    def naive(self) -> dict:
        answers = {}
        for k, push in enumerate(self.pushes):
            answers |= self.write([k], push_edits([push], lambda request: 0))
        return answers

    def sweep(self) -> dict:
        return self.write(range(len(self.pushes)), push_edits(self.pushes))

    def plain(self) -> dict:
        return self.write([0], ())

    def zero(self) -> dict:
        return self.write([0], push_edits(self.still))


def peak(options, way: str) -> float:
    "The most memory, in MB, of a process that writes in one way only."
    asked = {"model": options.model, "problems": options.problems, "directions": options.directions}
    asked |= {"coefficients": options.coefficients, "tokens": options.tokens, "slots": options.slots}
    words = [f"--{name}={value}" for name, value in asked.items()]
    done = subprocess.run(
        [sys.executable, __file__, *words, "--only", way], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def only(options) -> None:
    "One way, and the most memory that it took."
    bench = Bench(options)
    {"sweep": bench.sweep, "alone": lambda: bench.write([0], push_edits(bench.pushes[:1]))}[options.only]()
    say(peak=1e3 * peak_memory()["host_gb"])


def turns(ways: dict[str, Callable[[], dict]], rounds: int) -> tuple[float, dict]:
    "How many times as long a token takes in the first way as in the second: the median over rounds, which begin in turns; and the last answers."
    ratios = []
    for turn in range(rounds):
        ms = {}
        answers_by_way = {}
        for name in list(ways) if turn % 2 else list(ways)[::-1]:
            began = time.perf_counter()
            answers_by_way[name] = ways[name]()
            ms[name] = 1e3 * (time.perf_counter() - began) / sum(map(len, answers_by_way[name].values()))
        first_ms, second_ms = (ms[name] for name in ways)
        ratios.append(first_ms / second_ms)
        say(round=turn, ms_a_token={name: round(x, 2) for name, x in ms.items()}, ratio=round(ratios[-1], 3))
    return statistics.median(ratios), answers_by_way


def main():
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--model", default="smollm2")
    ask.add_argument("--problems", type=int, default=32)
    ask.add_argument("--directions", type=int, default=2)
    ask.add_argument("--coefficients", type=int, default=3)
    ask.add_argument("--tokens", type=int, default=32, help="most tokens of an answer")
    ask.add_argument("--slots", type=int, default=32)
    ask.add_argument("--rounds", type=int, default=3)
    ask.add_argument("--quick", action="store_true")
    ask.add_argument("--only", choices=("sweep", "alone"), help=argparse.SUPPRESS)
    options = ask.parse_args()
    if options.quick:
        options.model = "tiny:llama"
        options.problems = 8
        options.tokens = 12
        options.slots = 8
    if options.only:
        return only(options)
    exact = Bench(argparse.Namespace(**vars(options) | {"problems": 4}), "float32")
    if exact.naive() != exact.sweep():
        sys.exit("in float32 the two ways gave different tokens: there is no number")
    bench = Bench(options)
    bench.write([0], ())  # warm
    say(model=bench.lm.name, dtype=str(bench.lm.dtype), pushes=len(bench.pushes), slots=options.slots)
    cost, answers_by_way = turns({"zero": bench.zero, "plain": bench.plain}, 4 * options.rounds)
    if answers_by_way["zero"] != answers_by_way["plain"]:
        sys.exit("a push of coefficient 0 gave other tokens: there is no number")
    saved, answers_by_way = turns({"naive": bench.naive, "sweep": bench.sweep}, options.rounds)
    say(
        vs_rerun=round(saved, 3),
        overhead=round(cost - 1, 4),
        agreement=round(
            float(np.mean([answers_by_way["naive"][key] == tokens for key, tokens in answers_by_way["sweep"].items()])),
            3,
        ),
        memory=round(peak(options, "sweep") - peak(options, "alone"), 1),
        directions=round(len(bench.pushes) * bench.lm.d_model * 4 / 1e6, 3),
        answers=len(answers_by_way["sweep"]),
    )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
