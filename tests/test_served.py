"Answers that a server writes: those of the slots, none lost or doubled whatever the server does, and none of another model."

import json
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pandas as pd
import pytest
import torch
from shards import wait_for

from codetrace import models
from codetrace.core.records import read_records
from codetrace.models import model_server, served_decoder
from codetrace.models.activations import read_states
from codetrace.models.decoding import STATE_KINDS, Decoder, Request
from codetrace.models.lm import LM
from codetrace.models.model_server import ModelServer, ServerFailed, open_model_server
from codetrace.models.served_decoder import ServedDecoder, WrongServedModel, read_written_tokens, token_choices
from codetrace.runs.execute import execute_phase
from codetrace.sandbox.pool import Verdict
from codetrace.tasks import sampled_solutions
from codetrace.tasks.problems import load_problems
from codetrace.tasks.sampled_solutions import SamplingOptions, finish_samples, generate_samples, plan_samples

LENGTH = 6  # Tokens of an answer, at most
FAILURES = ("429", "500", "cut", "nonsense", "error", "closed")


class Judge:
    "A grader that fails all programs at once."

    def __init__(self, *_):
        pass

    def submit(self, job) -> Future:
        verdict = Future()
        verdict.set_result(Verdict("failed_assertion", ("failed_assertion",) * len(job.tests), "", 0.0))
        return verdict

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture(autouse=True)
def judge(monkeypatch):
    monkeypatch.setattr(sampled_solutions, "SandboxPool", Judge)


@pytest.fixture(scope="module")
def lm():
    return models.load("tiny:llama")


@pytest.fixture(scope="module")
def items():
    return plan_samples(load_problems("basics", 24))


KNOWN = {}  # What the usual model answers


@cache
def usual_model():
    "The engine's own: slots and passes over whole answers each change a model while they last."
    return models.load("tiny:llama")


class Engine:
    "A server of completions, with vLLM's additions, that fails as it is told to."

    def __init__(self, lm=None, failures=(), pause: float = 0.0, names_texts: bool = False):
        self.lm = lm or usual_model()
        self.known = {} if lm else KNOWN
        self.failures = deque(failures)
        self.pause = pause  # Seconds between two tokens
        self.names_texts = names_texts  # Are tokens named by their texts alone, as SGLang does?
        self.lock = threading.Lock()
        self.silence = threading.Event()  # Ends it
        self.bodies = []
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self):
        self.silence.set()
        self.http.shutdown()
        self.http.server_close()

    def tokens(self, body: dict) -> list[tuple[int, float]]:
        "The tokens of an answer and their log-probabilities, computed once."
        with self.lock:
            key = (*body["prompt"], body["max_tokens"], body["temperature"], body["temperature"] and body["seed"])
            if key not in self.known:
                request = Request(body["prompt"], body["seed"], body["temperature"])
                (answer,) = Decoder(self.lm, [request], body["max_tokens"], 1)
                hidden, _ = read_written_tokens(self.lm, body["prompt"], answer.tokens)
                logprobs = [logprob for logprob, _ in token_choices(self.lm, hidden, answer.tokens)]
                self.known[key] = [*zip(answer.tokens, logprobs)]
            return self.known[key]

    def handler(engine):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(200, json.dumps({"data": [{"id": "tiny"}]}))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with engine.lock:
                    engine.bodies.append(body)
                    failure = engine.failures.popleft() if engine.failures else ""
                if failure == "silent":
                    engine.silence.wait(60)
                elif failure in ("429", "500"):
                    self.send_response(int(failure))
                    self.send_header("retry-after", "0.01")
                    self.end_headers()
                elif failure != "closed":
                    self.stream(body, failure)

            def stream(self, body, failure):
                self.send_response(200)
                self.end_headers()
                tokens = engine.tokens(body)
                for token, logprob in tokens[: len(tokens) // 2] if failure else tokens:
                    name = engine.lm.tokenizer.decode([token]) if engine.names_texts else f"token_id:{token}"
                    logprobs = {"tokens": [name], "token_logprobs": [logprob]}
                    ids = {} if engine.names_texts else {"token_ids": [token]}
                    self.say(json.dumps({"choices": [{"text": "?", "logprobs": logprobs} | ids]}))
                    time.sleep(engine.pause)
                if failure in ("nonsense", "error"):
                    self.say({"nonsense": "{", "error": '{"error": {"message": "engine died"}}'}[failure])
                if not failure:
                    reason = "length" if len(tokens) == body["max_tokens"] else "stop"
                    self.say(json.dumps({"choices": [{"text": "", "finish_reason": reason}]}))
                    self.say("[DONE]")

            def say(self, text: str):
                self.wfile.write(f"data: {text}\n\n".encode())
                self.wfile.flush()

            def answer(self, status: int, text: str):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        return Handler


@contextmanager
def engine_of(*args, **options):
    engine = Engine(*args, **options)
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(model_server, "_WAIT", lambda state: 0.01)


def served(lm, items, folder: Path, server: ModelServer, slots: int = 8) -> pd.DataFrame:
    options = SamplingOptions(max_new_tokens=LENGTH, slots=slots, workers=1, server=server)
    generate_samples(lm, items, folder, options)
    return finish_samples(folder, items)


@pytest.fixture(scope="module")
def in_slots(lm, items, tmp_path_factory):
    folder = tmp_path_factory.mktemp("slots")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampled_solutions, "SandboxPool", Judge)
        generate_samples(lm, items, folder, SamplingOptions(max_new_tokens=LENGTH, slots=8, workers=1))
    return folder, finish_samples(folder, items)


def assert_same(table: pd.DataFrame, expected: pd.DataFrame):
    for name in ("task_id", "completion", "finish", "generated_tokens", "prompt_sha256"):
        assert table[name].tolist() == expected[name].tolist(), name
    assert table["token_ids"].map(list).tolist() == expected["token_ids"].map(list).tolist()
    for name in ("mean_logprob", "mean_entropy"):
        assert np.allclose(table[name], expected[name], atol=1e-4), name


def test_a_server_gives_the_answers_and_states_of_the_slots(lm, items, in_slots, tmp_path):
    with engine_of() as engine:
        assert_same(served(lm, items, tmp_path, open_model_server(engine.url)), in_slots[1])
    assert all(body["top_k"] == -1 and body["top_p"] == 1.0 and body["model"] == "tiny" for body in engine.bodies)
    ours, theirs = read_states(tmp_path), read_states(in_slots[0])
    for kind, layer in product(STATE_KINDS, range(lm.n_layers)):
        assert np.allclose(ours.states(kind, layer), theirs.states(kind, layer), atol=1e-4), (kind, layer)


def test_tokens_that_are_named_by_their_texts_are_found(lm, items, in_slots, tmp_path):
    with engine_of(names_texts=True) as engine:
        assert_same(served(lm, items, tmp_path, open_model_server(engine.url)), in_slots[1])


def test_only_texts_of_one_token_name_it():
    texts = ["a", "b", "a", "", "\ufffd", "c"]
    tokenizer = MagicMock(batch_decode=lambda rows, **_: [texts[token] for (token,) in rows], __len__=lambda _: 6)
    assert served_decoder.tokens_by_text(MagicMock(spec=LM, tokenizer=tokenizer)) == {"b": 1, "c": 5}


def test_a_text_that_several_tokens_have_is_refused(lm, items, tmp_path, monkeypatch):
    plain = served_decoder.tokens_by_text
    monkeypatch.setattr(served_decoder, "tokens_by_text", lambda lm: dict(list(plain(lm).items())[:5]))
    with (
        engine_of(names_texts=True) as engine,
        pytest.raises(ServerFailed, match="of no token of this model or of several"),
    ):
        served(lm, items, tmp_path, open_model_server(engine.url))


@pytest.mark.parametrize("failure", FAILURES)
def test_no_answer_is_lost_or_doubled_whatever_the_server_does(failure, lm, items, in_slots, tmp_path):
    with engine_of(failures=[failure, "", failure, failure, ""] * 2) as engine:
        assert_same(served(lm, items, tmp_path, open_model_server(engine.url)), in_slots[1])
    assert len(engine.bodies) == len(items) + 6


def test_a_server_that_dies_is_named_and_what_it_wrote_is_kept(lm, items, in_slots, tmp_path):
    with engine_of(failures=[""] * 12 + ["closed"] * 500) as engine:
        server = ModelServer(engine.url, "tiny", attempts=3)
        with pytest.raises(ServerFailed, match=r"failed 3 times, last with.* What was written is kept"):
            served(lm, items, tmp_path, server, slots=2)
    kept = len(read_records(tmp_path / "samples"))
    assert 9 <= kept <= 12
    with engine_of() as engine:
        assert_same(served(lm, items, tmp_path, open_model_server(engine.url)), in_slots[1])
    assert len(engine.bodies) == len(items) - kept


def test_a_slow_server_is_waited_for_and_one_that_is_silent_is_not(lm, items, tmp_path):
    with engine_of(pause=0.05) as engine:
        table = served(lm, items[:4], tmp_path / "slow", open_model_server(engine.url))
        assert len(table) == 4
        silent = ModelServer(engine.url, "tiny", attempts=2, timeout=0.02)
        with pytest.raises(ServerFailed, match="ReadTimeout"):
            served(lm, items[:4], tmp_path / "silent", silent)


def test_an_answer_is_cut_where_the_slots_cut_it(lm):
    "The server would go on; the reader stops at what the request calls complete."
    ids = lm.ids(["a = 1\n", "def f(x):", "print("])

    def requests(mark: str) -> list[Request]:
        return [Request(row, (0, i), over=lambda text: mark in text, marks=mark) for i, row in enumerate(ids)]

    whole = [answer.text for answer in Decoder(lm, requests("\0"), 12, 8)]
    mark = max("".join(whole), key="".join(whole).count)
    expected = {answer.request.key: answer for answer in Decoder(lm, requests(mark), 12, 8)}
    with engine_of() as engine:
        answers = list(ServedDecoder(lm, requests(mark), 12, open_model_server(engine.url)))
    assert len(answers) == 3 and "answered" in {answer.finish for answer in answers}
    for answer in answers:
        same = expected[answer.request.key]
        assert (answer.tokens, answer.text, answer.finish) == (same.tokens, same.text, same.finish)


def test_who_stops_does_not_wait_for_the_next_attempt(lm, monkeypatch):
    monkeypatch.setattr(model_server, "_WAIT", lambda state: 60.0)
    with engine_of(failures=["", "429", "429"]) as engine:
        ids = lm.ids(["a = 1\n", "def f(x):", "print("])
        requests = [Request(row, (0, i)) for i, row in enumerate(ids)]
        decoder = ServedDecoder(lm, requests, 40, open_model_server(engine.url))
        answers = iter(decoder)
        next(answers)
        answers.close()
        wait_for(lambda: not pool_threads(), 5)
        assert decoder.server.closing.is_set()


def test_who_stops_does_not_wait_for_a_server_that_is_silent(lm):
    "A connection that is closed while somebody reads from it would be read on until its time is up."
    with engine_of(failures=["", "silent", "silent"]) as engine:
        requests = [Request(row, (0, i)) for i, row in enumerate(lm.ids(["a = 1\n", "def f(x):", "print("]))]
        answers = iter(ServedDecoder(lm, requests, 40, open_model_server(engine.url)))
        next(answers)
        answers.close()
        wait_for(lambda: not pool_threads(), 5)


def pool_threads() -> list[threading.Thread]:
    "Threads that ask a server."
    return [thread for thread in threading.enumerate() if thread.name.startswith("codetrace-server")]


def test_another_model_is_refused_and_nothing_of_it_kept(lm, items, tmp_path):
    sharper = models.load("tiny:llama", dtype="bfloat16")
    with torch.no_grad():
        sharper.hf.lm_head.weight *= 1.5
    with engine_of(sharper) as engine, pytest.raises(WrongServedModel, match="nats from those of this model"):
        served(lm, items, tmp_path, open_model_server(engine.url))
    assert not (tmp_path / "samples").exists() or len(read_records(tmp_path / "samples")) == 0


def test_each_sample_has_a_seed_of_its_own_and_the_same_again(lm, tmp_path):
    wanted = plan_samples(load_problems("basics", 6), [0.9], samples=3)
    with engine_of() as engine:
        first, second = (served(lm, wanted, tmp_path / name, open_model_server(engine.url)) for name in "ab")
    assert len({body["seed"] for body in engine.bodies}) == len(wanted)
    assert_same(first, second)
    assert first.groupby("task_id")["completion"].nunique().min() > 1


def test_a_phase_has_its_answers_from_a_server(tmp_path):
    with engine_of() as engine:
        values = {"model": "tiny:llama", "num_problems": 3, "max_new_tokens": 6, "layers": [0], "engine": engine.url}
        manifest = execute_phase("1.0", values, root=tmp_path, show_progress=False)
    assert manifest["generated"]["agreement"]["mean_difference"] < 1e-4
    assert manifest["generated"]["agreement"]["tokens"] == manifest["generated"]["tokens"] > 0
    with pytest.raises(ServerFailed, match="no OpenAI-compatible server at"):
        execute_phase("1.0", values | {"num_problems": 4}, root=tmp_path, show_progress=False)
    with pytest.raises(ServerFailed, match="no address of a server"):
        execute_phase("1.0", values | {"engine": "vllm"}, root=tmp_path, show_progress=False)
    assert len(list((tmp_path / "generation").glob("2*"))) == 1


def test_what_looks_like_a_token_number_may_be_a_text():
    assert model_server._token_id("token_id:12", lambda: {}) == 12
    assert model_server._token_id("token_id:", lambda: {"token_id:": 3}) == 3  # a token that is called so
    with pytest.raises(ServerFailed, match="'token_id:x' only"):
        model_server._token_id("token_id:x", lambda: {})


def test_texts_of_tokens_are_read_once_for_all_threads():
    calls = []

    def compute():
        time.sleep(0.05)
        calls.append(1)
        return {"a": 1}

    texts = served_decoder._computed_once(compute)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: texts(), range(4))) == [{"a": 1}] * 4
    assert calls == [1]
