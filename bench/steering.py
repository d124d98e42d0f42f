"""How much does a sweep of pushes save over running each by itself, and what does a push cost? The last line is JSON.

    python bench/steering.py            SmolLM2, 16 problems, 2 directions at 4 strengths: a few minutes on two idle cores
    python bench/steering.py --quick    the same with a tiny model: seconds, to see that it works

`vs_rerun`: the same answers in two ways, in one process, in turns. The naive way gives every direction and strength a decoder of its own, which reads
all prompts again. The sweep writes all of them in one: a push on written tokens leaves the prompt alone, so its keys and values are read once for all.
Both have as many slots. Their tokens must be the same, or there is no number.

`overhead`: the same requests with a push of strength 0, which is computed and added like any other and changes no token, against no push at all;
medians of alternating rounds. `memory` is what the pushes keep, in MB; keys and values are as without them.
"""

import argparse
import json
import os
import statistics
import sys
import time

import numpy as np

from codetrace import generation, models, problems
from codetrace.decoding import Decoder, Request
from codetrace.vectors import edits_of, gaussian, median_norms, push


def say(**facts):
    print(json.dumps(facts), flush=True)


def timed(do):
    began = time.perf_counter()
    found = do()
    return time.perf_counter() - began, found


def main():
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--model", default="smollm2")
    ask.add_argument("--problems", type=int, default=16)
    ask.add_argument("--directions", type=int, default=2)
    ask.add_argument("--strengths", type=int, default=4)
    ask.add_argument("--tokens", type=int, default=32, help="most tokens of an answer")
    ask.add_argument("--slots", type=int, default=16)
    ask.add_argument("--rounds", type=int, default=3)
    ask.add_argument("--quick", action="store_true")
    options = ask.parse_args()
    if options.quick:
        options.model, options.problems, options.tokens, options.slots = "tiny:llama", 8, 12, 8
    lm = models.load(options.model)
    asked = []
    for p in problems.load("basics", options.problems):
        prompt = problems.prompt(p)
        over, marks = generation.is_over(prompt, p.entry_point)
        asked.append((p.task_id, lm.ids([prompt.text])[0], over, marks))
    norms = median_norms(lm, [ids for _, ids, *_ in asked[:4]])
    alphas = np.linspace(0.1, 0.4, options.strengths)
    pushes = [push(d, a, norms) for d in gaussian(lm.d_model, lm.n_layers // 2, options.directions) for a in alphas]
    requests = lambda numbers: [
        Request(ids, (t, k), 0.0, over, marks) for t, ids, over, marks in asked for k in numbers
    ]
    write = lambda some, edits: {
        c.request.key: c.tokens for c in Decoder(lm, some, options.tokens, options.slots, edits=edits)
    }

    def naive():
        found = {}
        for k, one in enumerate(pushes):
            found |= write(requests([k]), edits_of([one], lambda request: 0))
        return found

    sweep = lambda: write(requests(range(len(pushes))), edits_of(pushes))
    still = edits_of([push(p.direction, 0.0, norms) for p in pushes])
    same = requests(range(min(4, len(pushes))))
    plain, zero = lambda: write(same, ()), lambda: write(same, still)
    write(requests([0]), ())  # warm
    say(model=lm.name, dtype=str(lm.dtype), problems=len(asked), pushes=len(pushes), slots=options.slots)
    taken = {name: [] for name in ("naive", "sweep", "plain", "zero")}
    for turn in range(options.rounds):
        ways = {"naive": naive, "sweep": sweep, "plain": plain, "zero": zero}
        found = {}
        for name in list(ways) if turn % 2 else list(ways)[::-1]:
            seconds, found[name] = timed(ways[name])
            taken[name].append(seconds)
        if found["naive"] != found["sweep"] or found["plain"] != found["zero"]:
            sys.exit("the two ways gave different tokens: there is no ratio")
        say(round=turn, **{name: round(seconds[-1], 3) for name, seconds in taken.items()})
    middle = {name: statistics.median(seconds) for name, seconds in taken.items()}
    say(
        vs_rerun=round(middle["naive"] / middle["sweep"], 3),
        overhead=round(middle["zero"] / middle["plain"] - 1, 4),
        memory=round(len(pushes) * lm.d_model * 4 / 1e6, 3),
        answers=len(pushes) * len(asked),
    )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
