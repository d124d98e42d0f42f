"The main job: track variables in SmolLM2, trace what carries them there and in the model that has learnt it, and say where the records are."

import subprocess
import sys
import time
from pathlib import Path

from codetrace import runs

HOME = Path(__file__).resolve().parents[1]
STUDIES = {
    "tracking": "tracking",
    "tracing": "tracing",
    "binding": "tracing",
    "reference": "tracing",
}  # parameters in demo/, and the phase


def main() -> int:
    took, records = {}, []
    for study, phase in STUDIES.items():
        began = time.monotonic()
        print(f"\n== {phase}, with demo/{study}.yaml", flush=True)
        command = ["codetrace", "run", phase, "-f", f"demo/{study}.yaml"]
        done = subprocess.run(command, cwd=HOME, stdout=subprocess.DEVNULL)  # shown at the end
        if done.returncode != 0:
            return done.returncode
        took[study] = time.monotonic() - began
        records.append(runs.newest(phase)["run_id"])
    print("\n== what was found, and where", flush=True)
    subprocess.run(["codetrace", "show", *records], cwd=HOME)
    subprocess.run(["codetrace", "runs"], cwd=HOME)
    whole = sum(took.values())
    print(f"{whole:.0f} s: " + ", ".join(f"{study} {seconds / whole:.0%}" for study, seconds in took.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
