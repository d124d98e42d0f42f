"The main job: track variables in SmolLM2, trace what carries them, and say where the records are."

import subprocess
import sys
import time
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
PHASES = ["tracking", "tracing"]


def main() -> int:
    took = {}
    for phase in PHASES:
        began = time.monotonic()
        print(f"\n== {phase}, with demo/{phase}.yaml", flush=True)
        command = ["codetrace", "run", phase, "-f", f"demo/{phase}.yaml"]
        done = subprocess.run(command, cwd=HOME, stdout=subprocess.DEVNULL)  # shown at the end
        if done.returncode != 0:
            return done.returncode
        took[phase] = time.monotonic() - began
    print("\n== what was found, and where", flush=True)
    subprocess.run(["codetrace", "show", *PHASES], cwd=HOME)
    subprocess.run(["codetrace", "runs"], cwd=HOME)
    whole = sum(took.values())
    print(f"{whole:.0f} s: " + ", ".join(f"{phase} {seconds / whole:.0%}" for phase, seconds in took.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
