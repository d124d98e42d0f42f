"""Write the list of known type errors with one line a file: basedpyright gives each number a line of its own, forty kilobytes more."""

import json
from pathlib import Path

BASELINE = Path(__file__).resolve().parents[1] / "tests" / "types-baseline.json"

if __name__ == "__main__":
    files = json.loads(BASELINE.read_text())["files"]
    lines = [f"{json.dumps(name)}:{json.dumps(errors, separators=(',', ':'))}" for name, errors in files.items()]
    BASELINE.write_text('{"files":{\n' + ",\n".join(lines) + "\n}}\n")
