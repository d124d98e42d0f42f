"""All questions about a program's variables in one packed pass, against asking one by one. The last line is JSON.

    python bench/watch.py            SmolLM2, 12 lines and 6 variables, five rounds: a minute on two idle cores
    python bench/watch.py --quick    a tiny model, one round

Both score the true answers, in float32 and in turns; `times` is the ratio of the medians, `difference` the largest between two log-probabilities: above 1e-4 there is
no number. `seconds` is the whole of watching: run in the sandbox, asked, answers decoded.
"""

import argparse
import json
import statistics
import time

import torch

from codetrace import models
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


def score_one_by_one(lm: models.LM, packed: PackedQuestions) -> list[float]:
    "The log-probability of each true answer, a forward pass for each question."
    log_probs = []
    for index, truth in enumerate(packed.truth_ids):
        logits = lm.logits([packed.prompt_ids(index) + truth[:-1]], last=False)[0, -len(truth) :]
        log_probs.append(float(logits.log_softmax(-1)[range(len(truth)), truth].sum()))
    return log_probs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lm = models.load("tiny:llama" if options.quick else "smollm2", dtype="float32")
    program = TracedProgram(PROGRAM, "f([1, 2, 3])")
    (execution,) = record_executions([program])
    questions = state_questions(execution)
    packed = pack_questions(lm, execution, questions, "print")
    seconds = {"packed": [], "one by one": [], "watching": []}
    for _ in range(1 if options.quick else 5):
        began = time.perf_counter()
        answers = answer_packed(lm, packed, 0)
        seconds["packed"].append(time.perf_counter() - began)
        began = time.perf_counter()
        alone = score_one_by_one(lm, packed)
        seconds["one by one"].append(time.perf_counter() - began)
        began = time.perf_counter()
        watch_program(lm, program, style="print")
        seconds["watching"].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    difference = max(abs(answer.log_prob - value) for answer, value in zip(answers, alone))
    if difference > 1e-4:
        raise SystemExit(f"packed and single answers differ by {difference:.1e}")
    result = {"times": medians["one by one"] / medians["packed"], "difference": difference, "seconds": medians}
    print(json.dumps(result | {"questions": len(questions), "model": lm.name, "threads": options.threads}))


if __name__ == "__main__":
    main()
