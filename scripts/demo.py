"""The main job, small: the phases of recipes/demo.yaml one after the other.

Variables are tracked and traced, in SmolLM2 and in the model that has learnt it; then SmolLM2 solves problems, latents that separate right from wrong are
found and judged on other problems, and the model is steered along one of them. Each phase says its finding as it ends.
"""

import subprocess
import sys
import time
from pathlib import Path

import yaml

from codetrace.core.errors import BadInput
from codetrace.runs.execute import RunFailed, execute_phase
from codetrace.runs.phases import find_phase
from codetrace.runs.warm_kernels import warm_kernels

HOME = Path(__file__).resolve().parents[1]


def main() -> int:
    seconds = {}
    run_ids = []
    for step in yaml.safe_load((HOME / "recipes" / "demo.yaml").read_text(encoding="utf-8")):
        began = time.monotonic()
        name = find_phase(step["phase"]).name
        print(f"\n== {name}: {step['purpose']}", flush=True)
        try:
            manifest = execute_phase(step["phase"], step.get("parameters", {}))
        except (BadInput, RunFailed) as error:
            print(error, file=sys.stderr)
            return 1
        print(manifest["headline"], flush=True)
        run_ids.append(manifest["run_id"])
        seconds[f"{len(run_ids)} {name}"] = time.monotonic() - began
    print("\n== what was found, and where", flush=True)
    subprocess.run(["codetrace", "show", *run_ids], cwd=HOME)
    subprocess.run(["codetrace", "runs"], cwd=HOME)
    total = sum(seconds.values())
    shares = ", ".join(f"{step} {duration / total:.0%}" for step, duration in seconds.items())
    print(f"{total:.0f} s: {shares}")
    return 0


if __name__ == "__main__":
    with warm_kernels():  # phases share its imports
        sys.exit(main())
