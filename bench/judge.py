"""How often is the judge wrong? Programs with known verdicts, graded in each tier, by root and by a user without privileges.

    python bench/judge.py                      all files of ../shared, twice
    python bench/judge.py FILE... --tier 2     some files, one tier
    python bench/judge.py --list               also: every program that is misjudged
    python bench/judge.py --python /srv/py/bin/python3.11    the interpreter of the user without privileges, which has numpy

A row counts, of the wrong or hostile programs, those that passed; of the honest ones, those that did not; and the two verdicts that are none.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from codetrace.sandbox.pool import GradingJob, SandboxLimits, SandboxPool, why_tier_unavailable

HOME = Path(__file__).resolve().parents[1]
SHARED = HOME.parent / "shared"
NOBODY = 65534
PYTHONS = (os.path.realpath(sys.executable), "/usr/bin/python3.13", "/usr/bin/python3.12", "/usr/bin/python3.11")
WORKER = """
import json, sys
from codetrace.sandbox.pool import GradingJob, SandboxLimits, SandboxPool
tier, limits, rows = json.load(sys.stdin)
with SandboxPool(2, SandboxLimits(**limits), tier) as pool:
    verdicts = [[v.verdict, v.detail] for v in pool.grade(GradingJob(**row) for row in rows)]
    print(json.dumps([verdicts, pool.restarts]))
"""


def read_programs(path: Path) -> list[dict]:
    "The rows of a file, each with its acceptable verdicts and whether it is honest."
    programs = []
    for line in path.read_text("utf-8-sig").splitlines():
        row = json.loads(line)
        expected = row.get("expected", ["exception"] if "raise ValueError" in row["code"] else ["passed"])
        row["expected"] = [expected] if isinstance(expected, str) else expected
        row["honest"] = row["expected"] == ["passed"]
        programs.append(row)
    return programs


def as_job(row: dict) -> dict:
    "The fields of a grading job."
    fields = {"code": row["code"], "entry_point": row["entry_point"], "tests": tuple(row["tests"])}
    return fields | {"setup": row.get("setup") or "", "name": row["name"]}


def grade_here(rows: list[dict], tier: int, limits: SandboxLimits) -> tuple[list, int]:
    "Verdicts, and how many workers were lost."
    with SandboxPool(2, limits, tier) as pool:
        verdicts = [[v.verdict, v.detail] for v in pool.grade(GradingJob(**as_job(row)) for row in rows)]
        return verdicts, pool.restarts


def grade_as_nobody(rows: list[dict], tier: int, limits: SandboxLimits, pythons: Sequence[str]) -> tuple[list, int]:
    "The same by a user without privileges, with the first interpreter that this user can run."
    environment = {"PYTHONPATH": str(HOME), "PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    start = {"user": NOBODY, "group": NOBODY, "extra_groups": [], "cwd": "/", "env": environment, "text": True}
    message = json.dumps([tier, asdict(limits), [as_job(row) for row in rows]])
    for python in pythons:
        try:
            done = subprocess.run([python, "-c", WORKER], input=message, stdout=subprocess.PIPE, **start)
        except OSError:
            continue
        if done.returncode == 0:
            return tuple(json.loads(done.stdout))
    sys.exit("no interpreter here that a user without privileges can run codetrace with")


def count_mistakes(rows: list[dict], verdicts: list) -> Counter:
    "Mistakes by kind."
    counts = Counter()
    for row, (verdict, _) in zip(rows, verdicts, strict=True):
        counts["honest" if row["honest"] else "wrong"] += 1
        if verdict in ("unsupported", "runner_error"):
            counts[verdict] += 1
        elif row["honest"] and verdict != "passed":
            counts["honest_failed"] += 1
        elif not row["honest"] and verdict == "passed":
            counts["wrong_passed"] += 1
        elif verdict not in row["expected"]:
            counts["other_verdict"] += 1
    return counts


COLUMNS = "wrong wrong_passed honest honest_failed other_verdict unsupported runner_error".split()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--tier", type=int, choices=(1, 2), action="append")
    parser.add_argument("--user", choices=("root", "nobody"), action="append")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--python", action="append", default=[], help="interpreter of the user without privileges")
    parser.add_argument("--list", action="store_true", help="name what is misjudged")
    options = parser.parse_args()
    data = [SHARED / "data" / name for name in ("judged.jsonl", "hostile.jsonl")]
    files = options.files or [*data, *sorted((SHARED / "cases/judge").glob("*.jsonl"))]
    groups = {"cases": []}
    for path in files:
        groups.setdefault(path.stem if path.parent.name == "data" else "cases", []).extend(read_programs(path))
    print(f"{'programs':10} {'tier':4} {'user':7} " + " ".join(COLUMNS) + " restarts")
    for tier in options.tier or [tier for tier in (1, 2) if why_tier_unavailable(tier) is None]:
        for user in options.user or (["root", "nobody"] if os.getuid() == 0 else ["self"]):
            as_nobody = partial(grade_as_nobody, pythons=(*options.python, *PYTHONS))
            grader = as_nobody if user == "nobody" else grade_here
            for group, rows in groups.items():
                if not rows:
                    continue
                verdicts, restarts = grader(rows * options.rounds, tier, SandboxLimits())
                counts = count_mistakes(rows * options.rounds, verdicts)
                cells = " ".join(f"{counts[name]:{len(name)}}" for name in COLUMNS)
                print(f"{group:10} {tier:4} {user:7} {cells} {restarts:8}", flush=True)
                for row, (verdict, detail) in zip(rows * options.rounds, verdicts):
                    if options.list and verdict not in row["expected"]:
                        print(f"    {row['name']}: {verdict} ({detail[:120]})")


if __name__ == "__main__":
    main()
