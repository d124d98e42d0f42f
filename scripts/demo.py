"""The main job, small: track variables and trace what carries them, in SmolLM2 and in the model that has learnt it; then let SmolLM2 solve problems, look for
latents that know which solutions are right, judge them on other problems, and push the model along one of them. Says where the records are.
"""

import subprocess
import sys
import time
from pathlib import Path

from codetrace.runs.manifest import newest_run
from codetrace.runs.phases import phase_name

HOME = Path(__file__).resolve().parents[1]
STUDIES = (  # Phase, and its parameters in demo/
    ("tracking", "tracking"),
    ("tracing", "tracing"),
    ("tracing", "binding"),
    ("tracing", "reference"),
    ("0", "problems"),
    ("0.1", "problems"),
    ("1.0", "solving"),
    ("1.5", "dictionary"),
    ("2", "latents"),
    ("3", "validation"),
    ("3.1", "tuning"),
    ("3.2", "steering"),
    ("report", ""),
)


def main() -> int:
    took, records = {}, []
    for phase, study in STUDIES:
        began = time.monotonic()
        name = phase_name(phase)
        given = ["-f", f"demo/{study}.yaml"] if study else []
        print(f"\n== {name}" + (f", with {given[1]}" if given else ""), flush=True)
        command = ["codetrace", "run", phase, *given]
        done = subprocess.run(command, cwd=HOME, stdout=subprocess.DEVNULL)  # shown at the end
        if done.returncode != 0:
            return done.returncode
        took[f"{name} {study}".strip()] = time.monotonic() - began
        records.append(newest_run(name)["run_id"])
    print("\n== what was found, and where", flush=True)
    subprocess.run(["codetrace", "show", *records], cwd=HOME)
    subprocess.run(["codetrace", "runs"], cwd=HOME)
    whole = sum(took.values())
    print(f"{whole:.0f} s: " + ", ".join(f"{study} {seconds / whole:.0%}" for study, seconds in took.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
