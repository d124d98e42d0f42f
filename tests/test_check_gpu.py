"""What is to be run on a GPU runs on a processor, by the same code paths."""

import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from codetrace.models import decoding, load

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


@pytest.fixture
def check_gpu(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("check_gpu")


def test_one_check_passes_on_a_processor(check_gpu, tmp_path, monkeypatch, capsys):
    asked = "--device cpu --quick --only".split()
    monkeypatch.setattr(
        sys, "argv", ["check_gpu.py", *asked, "graphed llama sdpa float32", "--out", str(tmp_path / "cpu.json")]
    )
    assert check_gpu.main() == 0 and "1 passed, 0 failed, 0 not run" in capsys.readouterr().out


@pytest.fixture
def told_waits(check_gpu, monkeypatch):
    "`check_gpu` where torch tells of waits as on a GPU: as often as the test says for each choice of tokens, and each layer."
    monkeypatch.setattr(check_gpu.torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(check_gpu.torch.cuda, "set_sync_debug_mode", lambda mode: None)
    lm, plain = load("tiny:llama"), decoding.choose_tokens

    def waits(times):
        for _ in range(times):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    def measure(of_a_step, of_a_layer=0):
        def choose_tokens(*args):
            waits(of_a_step)
            warnings.warn("something else", stacklevel=1)
            return plain(*args)

        def sweep_of(lm, pair, site, engine, layers):
            waits(2 + of_a_layer * len(layers))

        monkeypatch.setattr(decoding, "choose_tokens", choose_tokens)
        monkeypatch.setattr(check_gpu, "sweep", sweep_of)
        return check_gpu.check_waits(lm)

    return measure


@pytest.mark.filterwarnings("ignore:called a synchronizing")
def test_waits_for_the_gpu_are_counted(told_waits):
    assert told_waits(1).passed and told_waits(1).values["waits a step"] == 1
    for of_a_step, of_a_layer in ((2, 0), (1, 1), (0, 0)):  # the last: torch tells of none
        assert not told_waits(of_a_step, of_a_layer).passed
