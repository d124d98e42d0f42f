"""What is to be run on a GPU runs on a processor, by the same code paths."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "check_gpu.py"


@pytest.mark.slow
def test_every_check_passes_on_a_processor(tmp_path):
    out = tmp_path / "cpu.json"
    command = [sys.executable, SCRIPT, "--device", "cpu", "--quick", "--limit", "900", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    checks = {check["name"]: check for check in json.loads(out.read_text())["checks"]}
    kinds = (
        "sweep",
        "decoding",
        "graphed",
        "states",
        "steering",
        "ablation",
        "two devices",
        "sae steps",
        "sae-lens",
        "bench",
    )
    for kind in kinds:
        assert any(name.startswith(kind) and check["passed"] for name, check in checks.items()), kind
    not_run = [name for name, check in checks.items() if check["passed"] is None]
    assert all(name.startswith(("memory", "quantised", "waits")) for name in not_run), not_run


def test_one_check_passes_on_a_processor(tmp_path):
    command = [sys.executable, SCRIPT, "--device", "cpu", "--quick", "--only", "graphed llama sdpa float32"]
    done = subprocess.run([*command, "--out", tmp_path / "cpu.json"], capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed, 0 failed, 0 not run" in done.stdout, done.stdout + done.stderr
