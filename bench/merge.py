"""A million rows of 300 shards merged into one table. The last line is JSON.

    python bench/merge.py                     (two minutes)
    python bench/merge.py --rows 100000       fewer
    python bench/merge.py --out bench/results/merge.json

Rows are as phase 1.2 writes them: an answer's text, code, tokens and verdict. Each number of rows is merged in a process of its own, whose largest memory is read at its end;
`before` is what that process takes with the library imported and nothing merged. Memory that does not grow with the rows is enough for a larger study, too.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from codetrace.core.table_merge import write_grouped_parquet

KEY = ["task_id", "temperature", "sample"]
MERGE = """
import re, sys, time
from pathlib import Path
from codetrace.core.table_merge import merge_sorted_tables
import pyarrow.parquet as pq
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before, began = peak(), time.perf_counter()
rows = merge_sorted_tables(sorted(Path(sys.argv[1]).glob("*/samples.parquet")), sys.argv[3].split(), Path(sys.argv[2]))
print(rows, time.perf_counter() - began, before, peak())
"""


def make_shard(numbers: np.ndarray, rng: np.random.Generator) -> pd.DataFrame:
    "Answers as a shard writes them, sorted by their key."
    words = rng.integers(97, 123, (len(numbers), 600), dtype=np.uint8)
    texts = [row.tobytes().decode() for row in words]
    table = pd.DataFrame({"task_id": [f"task/{n // 20:07}" for n in numbers]})
    table["temperature"] = 0.3 * (1 + numbers // 5 % 4)
    table["sample"] = numbers % 5
    table["completion"] = texts
    table["code"] = [text[:400] for text in texts]
    table["token_ids"] = list(words[:, :150].astype(int))
    table["verdict"] = np.where(numbers % 3, "passed", "failed_assertion")
    table["passed"] = numbers % 3 > 0
    table["mean_logprob"] = rng.normal(size=len(numbers))
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=300)
    parser.add_argument("--out", type=Path, help="also write the rows here")
    options = parser.parse_args()
    results = []
    for n_rows in (options.rows // 10, options.rows):
        with tempfile.TemporaryDirectory() as folder:
            for shard, numbers in enumerate(np.array_split(np.arange(n_rows), options.shards)):
                path = Path(folder) / f"{shard:03}" / "samples.parquet"
                path.parent.mkdir()
                write_grouped_parquet(make_shard(numbers, np.random.default_rng(shard)), path)
            size = sum(path.stat().st_size for path in Path(folder).glob("*/samples.parquet"))
            command = [sys.executable, "-c", MERGE, folder, f"{folder}/whole.parquet", " ".join(KEY)]
            answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows, seconds, before, peak = map(float, answer.split())
        results.append(
            {"rows": int(rows), "shards": options.shards, "gb": round(size / 1e9, 2), "seconds": round(seconds, 1)}
            | {"before_mb": round(before), "peak_mb": round(peak)}
        )
        print(results[-1], flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
