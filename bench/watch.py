"""One program of 12 lines and 6 variables is watched: packed questions against asking one by one, and how long what takes. The last line is JSON.

    python bench/watch.py                          SmolLM2, five rounds: two minutes on two idle cores
    python bench/watch.py --model model.gguf       another model
    python bench/watch.py --quick                  a tiny model, one round

Packed and single questions score the true answers, in float32 and in turns; `times` is the ratio of the medians, `difference` the largest between two log-probabilities:
above 1e-4 there is no number. `watching` is the whole of it: run in the sandbox, asked, answers decoded. `used` is the whole grid of one variable: each of its values
swapped at every place and layer with a run of another input. Both in the dtype that models are loaded with.
"""

import argparse
import json
import statistics
import time

import torch

from codetrace import models
from codetrace.patching.state_swaps import used_layers
from codetrace.tasks.execution import TracedProgram, record_executions
from codetrace.tasks.state_questions import PackedQuestions, answer_packed, pack_questions, state_questions
from codetrace.tasks.watching import watch_program

PROGRAM = """def f(xs):
    total = 0
    count = len(xs)
    first = xs[0]
    double = first * 2
    total = total + double
    last = xs[-1]
    total = total + last
    count = count - 1
    double = total // count
    total = total - first
    return total"""
VARIABLE = "total"


def score_one_by_one(lm: models.LM, packed: PackedQuestions) -> list[float]:
    "The log-probability of each true answer, a forward pass for each question."
    log_probs = []
    for index, truth in enumerate(packed.truth_ids):
        logits = lm.logits([packed.prompt_ids(index) + truth[:-1]], last=False)[0, -len(truth) :]
        log_probs.append(float(logits.log_softmax(-1)[range(len(truth)), truth].sum()))
    return log_probs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    name = "tiny:llama" if options.quick else options.model
    lm = models.load(name, dtype="float32")
    fast_lm = models.load(name)
    program = TracedProgram(PROGRAM, "f([1, 2, 3])")
    (execution,) = record_executions([program])
    questions = state_questions(execution)
    packed = pack_questions(lm, execution, questions, "print")
    answers, alone = [], []
    steps = {
        "packed": lambda: answers.append(answer_packed(lm, packed, 0)),
        "one by one": lambda: alone.append(score_one_by_one(lm, packed)),
        "watching": lambda: watch_program(fast_lm, program, style="print"),
        "used": lambda: used_layers(fast_lm, execution, [VARIABLE]),
    }
    seconds = {step: [] for step in steps}
    for _ in range(1 if options.quick else options.rounds):
        for step, do in steps.items():
            began = time.perf_counter()
            do()
            seconds[step].append(time.perf_counter() - began)
    medians = {step: statistics.median(values) for step, values in seconds.items()}
    difference = max(abs(answer.log_prob - value) for answer, value in zip(answers[0], alone[0]))
    if difference > 1e-4:
        raise SystemExit(f"packed and single answers differ by {difference:.1e}")
    result = {"times": medians["one by one"] / medians["packed"], "difference": difference, "seconds": medians}
    facts = {"model": lm.name, "dtype": str(fast_lm.dtype), "threads": options.threads, "rounds": len(seconds["used"])}
    print(json.dumps(result | {"questions": len(questions)} | facts))


if __name__ == "__main__":
    main()
