"Answers in slots: the same as one by one, whatever stands beside them, and whatever happens to the process."

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from shards import kernel_of, note

from codetrace import models
from codetrace.core.environment import KERNELS_VARIABLE
from codetrace.core.errors import BadInput
from codetrace.core.files import file_sha256
from codetrace.core.records import read_records
from codetrace.core.shards import shard_range
from codetrace.models import sampling, slot_cache
from codetrace.models.activations import read_states
from codetrace.models.decoding import EDIT_PLACES, STATE_KINDS, Decoder, Request, ResidualEdit
from codetrace.models.interventions import Intervention
from codetrace.models.lm import soft_cap_logits
from codetrace.models.sampling import choose_tokens, next_token_logits, random_stream, sample_tokens
from codetrace.models.slot_cache import SlotCache
from codetrace.models.tiny import TINY_CONFIGS
from codetrace.phases.generation import generation_headline, pass_at_k_table
from codetrace.runs.execute import execute_phase
from codetrace.runs.manifest import NoInputRun, read_manifest, resolve_run
from codetrace.runs.parameters import phase_values
from codetrace.runs.phases import find_phase, preset_parameters
from codetrace.sandbox.pool import SandboxLimits, Verdict
from codetrace.tasks import sampled_solutions
from codetrace.tasks.problem_prompts import render_problem_prompt
from codetrace.tasks.problems import load_problems
from codetrace.tasks.sampled_solutions import (
    SAMPLE_KEY,
    SamplingOptions,
    finish_samples,
    generate_samples,
    grade_again,
    merge_samples,
    plan_samples,
)

TEXTS = [
    "def add(a, b):\n    return",
    "x = 1\ny = x\nprint(",
    "The",
    "def f(n):\n    for i in range(n):\n        print(i)\n\n\nclass A:\n    pass",
    "1 2 3 4 5 6 7 8 9 10 11 12",
]
# Qwen 2 is Llama with biases, Qwen 3 is it with normed queries and keys, Gemma 3 is Gemma 2 without soft caps
LIKE_OTHERS = {"qwen2", "qwen3", "gemma3"}
ARCHES = [pytest.param(name, marks=[pytest.mark.slow] * (name in LIKE_OTHERS)) for name in sorted(TINY_CONFIGS)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Bits are compared, and a forked process can only use one thread."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny():
    loaded = {}
    return lambda arch: loaded.setdefault(arch, models.load(f"tiny:{arch}"))


def decoded(lm, requests, n=12, **options) -> dict:
    return {c.request.key: c for c in Decoder(lm, requests, n, **options)}


def teacher_forced(lm, ids, tokens) -> dict:
    "The states of a run over prompt and answer at once."
    seen = lm.capture([[*ids, *map(int, tokens)]], [("resid_post", layer) for layer in range(lm.n_layers)])
    whole = torch.stack([seen["resid_post", layer][0] for layer in range(lm.n_layers)]).float()
    n = len(ids)
    return {
        "last_prompt": whole[:, n - 1],
        "last_generated": whole[:, -1],
        "mean_generated": whole[:, n:].mean(1),
        "each": whole[:, n:],
    }


@pytest.mark.parametrize("arch", ARCHES)
def test_text_and_states_are_those_of_one_pass(tiny, arch):
    "Refilled slots of mixed lengths, beyond the sliding window; equal to greedy search, and to teacher forcing within 1e-4."
    lm = tiny(arch)
    ids = lm.ids(TEXTS)
    got = decoded(lm, [Request(row, key=i) for i, row in enumerate(ids)], slots=3, layers=None, per_token=[1])
    wanted = [lm.generate([row], 12)[0] for row in ids]
    assert [got[i].text for i in range(len(ids))] == wanted
    for i, row in enumerate(ids):
        forced = teacher_forced(lm, row, got[i].tokens)
        for kind in STATE_KINDS:
            torch.testing.assert_close(got[i].states[kind], forced[kind], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got[i].per_token["resid_post", 1], forced["each"][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_ties_are_scored_again_alike_where_a_gpu_is_not_waited_for(arch, monkeypatch):
    lm = models.load(f"tiny:{arch}", dtype="bfloat16", device="cpu")
    hidden = 3 * torch.randn(40, lm.d_model, generator=torch.Generator().manual_seed(0)).bfloat16()
    rounded = soft_cap_logits(lm.hf.get_output_embeddings()(hidden).float(), lm.hf.config)
    waited_for = next_token_logits(lm, hidden)
    assert not torch.equal(waited_for, rounded)
    monkeypatch.setattr(sampling, "_reaching", sampling._likeliest)
    assert torch.equal(next_token_logits(lm, hidden), waited_for)


def choose_by_definition(logits, temperature, uniform):
    "The first token whose cumulative probability exceeds the random number; without one, the first of the largest logits."
    tokens = []
    for z, heat, u in zip(logits.double(), temperature, uniform):
        if heat == 0:
            tokens.append(int((z == z.max()).nonzero()[0]))
            continue
        weight = ((z - z.max()).float() / torch.tensor(heat, dtype=torch.float32)).exp().double()
        cumulative = weight.cumsum(0)
        tokens.append(int((cumulative > u * cumulative[-1]).nonzero()[0]))
    return tokens


@pytest.mark.parametrize("vocab", [1, 7, 512, 513, 1024, 5000])
def test_tokens_are_those_of_the_definition(vocab):
    generator = torch.Generator().manual_seed(vocab)
    logits = (4 * torch.randn(60, vocab, generator=generator)).round(decimals=1)  # with ties
    logits[30:, : vocab // 3] = -torch.inf  # never drawn
    logits[40:, -(vocab // 3) :] = -torch.inf if vocab > 2 else 0.0
    temperature = [0.0, 0.5, 1.3] * 20
    uniform = random_stream("u", 60)
    uniform[[1, 31, 46]], uniform[[2, 32, 47]] = 0.0, np.nextafter(1.0, 0.0)
    tokens, logprobs, entropies = sample_tokens(logits.clone(), temperature, uniform)
    assert tokens == choose_by_definition(logits, temperature, uniform)
    log_p = logits.double().log_softmax(-1)
    np.testing.assert_allclose(logprobs, log_p[range(60), tokens], atol=1e-5)
    np.testing.assert_allclose(entropies, torch.special.entr(log_p.exp()).sum(-1), atol=1e-5)


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_a_token_of_probability_0_is_never_drawn(end):
    "Also where rounding puts the random number at the very end of what can be drawn."
    logits = torch.full((4, 1300), -torch.inf)
    logits[:, 600:610] = torch.linspace(0, -3, 10)
    for u in (end, np.nextafter(end, 0.5)):
        tokens, _, _ = sample_tokens(logits.clone(), [0.7] * 4, [u] * 4)
        assert set(tokens) == {600 if end == 0 else 609}


def test_a_row_of_no_numbers_has_near_ties_in_the_vocabulary_only():
    row, token = sampling._reaching(torch.full((2, 700), -torch.inf), torch.full((2, 1), -torch.inf))
    assert token.max() == 699 and len(row) == 1400


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 9, 17])
def test_rows_chosen_a_few_at_a_time_are_those_chosen_together(dtype, rows, monkeypatch):
    lm = models.load("tiny:llama", dtype=dtype, device="cpu")
    hidden = 3 * torch.randn(rows, lm.d_model, generator=torch.Generator().manual_seed(rows)).to(lm.dtype)
    heat, uniform = [0.7 * (i % 2) for i in range(rows)], random_stream(rows, rows)
    together = sample_tokens(next_token_logits(lm, hidden), heat, uniform)
    seen = []
    plain = sampling.sample_tokens
    monkeypatch.setattr(sampling, "_ROWS_BYTES", 0)
    monkeypatch.setattr(
        sampling, "sample_tokens", lambda logits, *args: seen.append(len(logits)) or plain(logits, *args)
    )
    assert tuple(choose_tokens(lm, hidden, heat, uniform)) == tuple(together)
    assert sum(seen) == rows and min(seen) >= min(rows, 4) and len(seen) == max(1, rows // 4)


@pytest.mark.parametrize("arch", ["gemma2", "gemma3"])
def test_a_sliding_window_is_seen(tiny, arch):
    "The check above can fail: a model whose windows are ignored has other states."
    lm = tiny(arch)
    row = lm.ids(TEXTS[3])[0]
    with pytest.MonkeyPatch.context() as patch:
        plain = slot_cache._SlotBlock.of.__func__

        def blind(cls, slots, lengths, columns, windows, like):
            block = plain(cls, slots, lengths, columns, {None}, like)
            block.masks = dict.fromkeys(windows, block.masks[None])
            return block

        patch.setattr(slot_cache._SlotBlock, "of", classmethod(blind))
        got = decoded(lm, [Request(row, key=0)], slots=1, layers=None)[0]
    forced = teacher_forced(lm, row, got.tokens)
    assert (got.states["last_generated"] - forced["last_generated"]).abs().max() > 1e-3


def test_neighbours_slots_and_order_change_no_bit(tiny):
    lm = tiny("llama")
    ids = lm.ids(TEXTS * 3)
    asked = [Request(row, key=("seed", i), temperature=0.8 * (i % 2)) for i, row in enumerate(ids)]
    together = decoded(lm, asked, slots=8, layers=None)
    shuffled = decoded(lm, random.Random(3).sample(asked, len(asked)), slots=8, layers=None)
    part = decoded(lm, asked[4:9], slots=8, layers=None)
    for key, c in (*shuffled.items(), *part.items()):
        assert (c.tokens, c.finish, c.logprob, c.entropy) == (
            together[key].tokens,
            together[key].finish,
            together[key].logprob,
            together[key].entropy,
        )
        assert all(torch.equal(c.states[kind], together[key].states[kind]) for kind in STATE_KINDS)


def test_a_stream_depends_on_its_key_alone(tiny):
    lm = tiny("llama")
    row = lm.ids(TEXTS[0])[0]
    keys = [(0, "a", 0.9, 0), (0, "a", 0.9, 1), (1, "a", 0.9, 0), (0, "b", 0.9, 0)]
    got = decoded(lm, [Request(row, key=key, temperature=0.9) for key in keys])
    assert len({tuple(c.tokens) for c in got.values()}) == len(keys)
    alone = decoded(lm, [Request(row, key=keys[2], temperature=0.9)], slots=1)
    assert alone[keys[2]].tokens == got[keys[2]].tokens


def test_sampling_follows_the_distribution(tiny):
    lm = tiny("qwen2")
    row = lm.ids("print(")[0]
    drawn = [sample_tokens(lm.logits([row]), [2.0], [u])[0][0] for u in random_stream("x", 300)]
    p = (lm.logits([row])[0] / 2.0).softmax(-1)
    top = int(p.argmax())
    assert abs(np.mean([t == top for t in drawn]) - float(p[top])) < 4 * float((p[top] * (1 - p[top]) / 300).sqrt())


def test_moving_answers_between_blocks_changes_no_bit(tiny):
    lm = tiny("gpt_neox")
    ids = [lm.ids("x = 1\n" * n)[0] for n in [40, *[1] * 7, 38, *[1] * 7]]
    asked = [Request(row, key=i) for i, row in enumerate(ids)]
    still = decoded(lm, asked, 6, slots=16, layers=None)
    moved = []
    with pytest.MonkeyPatch.context() as patch:
        tidy = Decoder._tidy
        swap = SlotCache.swap
        step = Decoder._step

        def noted_swap(self, a, b):
            moved.append((a, b))
            swap(self, a, b)

        def tidied_step(self, hooks):
            tidy(self)
            step(self, hooks)

        patch.setattr(SlotCache, "swap", noted_swap)
        patch.setattr(Decoder, "_step", tidied_step)
        tidied = decoded(lm, asked, 6, slots=16, layers=None)
    assert moved
    for i, c in still.items():
        assert c.tokens == tidied[i].tokens
        assert all(torch.equal(c.states[kind], tidied[i].states[kind]) for kind in STATE_KINDS)


def test_over_and_the_last_token(tiny):
    "An answer that is over keeps the token that showed it, and the state that read it."
    lm = tiny("llama")
    row = lm.ids(TEXTS[0])[0]
    free = decoded(lm, [Request(row, key=0)], 9)[0]
    piece = lm.tokenizer.decode([free.tokens[4]])
    cut = decoded(lm, [Request(row, key=0, over=lambda text: True, marks=piece[-1])], 9, layers=None)[0]
    assert cut.finish == "answered" and cut.tokens == free.tokens[: len(cut.tokens)] and len(cut.tokens) <= 5
    forced = teacher_forced(lm, row, cut.tokens)
    torch.testing.assert_close(cut.states["last_generated"], forced["last_generated"], rtol=1e-4, atol=1e-4)


def test_an_end_of_text_is_no_part_of_the_answer(tiny):
    lm = tiny("llama")
    row = lm.ids(TEXTS[1])[0]
    free = decoded(lm, [Request(row, key=0)], 6)[0]
    for position in (0, 3):
        position = free.tokens.index(free.tokens[position])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lm, "_ends", lambda position=position: {free.tokens[position]}, raising=False)
            got = decoded(lm, [Request(row, key=0)], 6, layers=None)[0]
        assert (got.finish, got.tokens) == ("eos", free.tokens[:position])
        forced = teacher_forced(lm, row, got.tokens)
        if position == 0:
            assert torch.equal(got.states["last_generated"], got.states["last_prompt"])
            forced["mean_generated"] = forced["last_prompt"]
        for kind in STATE_KINDS:
            torch.testing.assert_close(got.states[kind], forced[kind], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", EDIT_PLACES)
def test_an_edit_acts_where_it_says(tiny, where):
    "Against the slow way: a full pass over all tokens, with the same change at the same positions."
    lm = tiny("llama")
    rows = lm.ids(TEXTS[:3])
    push = torch.linspace(-2, 2, lm.d_model)
    edit = ResidualEdit(1, lambda x, of: x + push * torch.tensor([[float(r.key)] for r in of]), where)
    got = decoded(lm, [Request(row, key=i) for i, row in enumerate(rows)], 6, slots=2, layers=[2], edits=[edit])
    for i, row in enumerate(rows):
        ids = list(row)
        n = len(row)
        places = {
            "prompt": slice(0, n),
            "last_prompt": slice(n - 1, n),
            "generated": slice(n, None),
            "all": slice(None),
        }

        def change(x, i=i, place=places[where]):
            new = x.clone()
            new[:, place] += i * push
            return new

        for _ in range(6):
            with lm.intervene(Intervention("resid_post", 1, change)):
                ids.append(int(lm.logits([ids])[0].argmax()))
        assert got[i].tokens == ids[n:], (where, i)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.hf.modules())


def test_hooks_are_gone_after_an_error(tiny):
    lm = tiny("gpt2")

    def fail(x, of):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        decoded(lm, [Request([5, 6, 7], key=0)], 4, edits=[ResidualEdit(0, fail, "all")])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.hf.modules())
    assert lm.hf.config._attn_implementation == "sdpa"


def test_memory_that_runs_out_halves_the_slots(tiny):
    lm = tiny("llama")
    asked = [Request(row, key=i) for i, row in enumerate(lm.ids(TEXTS * 4))]
    wanted = decoded(lm, asked, 8, slots=8)
    decoder = Decoder(lm, asked, 8, slots=16)
    failed = []
    after = []
    step = Decoder._step

    def full(self, hooks):
        after.append(self.cache.n)
        if self.cache.n > 8 and self.step_count == 3:
            failed.append(self.cache.n)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, hooks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "_step", full)
        got = {c.request.key: c for c in decoder}
    assert failed == [16] and max(after[after.index(8) :]) == 8
    assert after[-1] == 4  # nobody waits for the place of an answer that is over
    assert {i: c.tokens for i, c in got.items()} == {i: c.tokens for i, c in wanted.items()}


def test_requests_that_cannot_be():
    with pytest.raises(BadInput, match="empty prompt"):
        Request([], key="a")
    with pytest.raises(BadInput, match="temperature"):
        Request([1], temperature=-0.1)
    with pytest.raises(BadInput, match="place of an edit"):
        ResidualEdit(0, lambda x, of: x, "everywhere")


def test_a_prompt_longer_than_the_context(tiny):
    lm = tiny("gpt2")
    with pytest.raises(BadInput, match="holds 512"):
        decoded(lm, [Request([5] * 512, key="long")])
    got = decoded(lm, [Request([5] * 509, key="close")], 12)["close"]
    assert len(got.tokens) <= 3


# The phase


class Judge(sampled_solutions.SandboxPool):
    "In place of the sandbox, which has tests of its own: every answer without code is wrong."

    def __init__(self, workers):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def submit(self, job) -> Future:
        verdict = Future()
        verdict.set_result(Verdict("no_function", (None,) * len(job.tests), "no function", random.random()))
        return verdict


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_bits_do_not_depend_on_how_long_the_neighbours_are(tiny, arch):
    "In float32 a product over more than 384 columns is summed in parts, so one long answer used to change all others."
    lm = tiny(arch)
    short, long = lm.ids(["def f(x):\n    return x\n" * 30, "a = 1\n" * 90])
    assert len(short) + 20 < 384 < len(long)
    (alone,) = Decoder(lm, [Request(short, key="short")], 20, 8, layers=None)
    together = Decoder(lm, [Request(long, key="long"), Request(short, key="short")], 20, 8, layers=None)
    beside = next(answer for answer in together if answer.request.key == "short")
    assert beside.tokens == alone.tokens
    for kind in STATE_KINDS:
        assert torch.equal(beside.states[kind], alone.states[kind]), kind


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setattr(sampled_solutions, "SandboxPool", Judge)


ASKED = {"model": "tiny:llama", "num_problems": 120, "max_new_tokens": 6, "slots": 8}
FILES = ("samples.parquet", *(f"activations/{kind}.safetensors" for kind in STATE_KINDS))


@pytest.fixture(scope="module")
def items():
    return plan_samples(load_problems("basics", 120))


def written(lm, items, folder: Path, progress=lambda steps, **details: steps, **options) -> dict[str, str]:
    "Hashes of what a run leaves."
    options = SamplingOptions(max_new_tokens=6, slots=8, workers=1, **options)
    generate_samples(lm, items, folder, options, progress=progress)
    finish_samples(folder, items)
    return {name: file_sha256(folder / name) for name in FILES}


@pytest.fixture(scope="module")
def whole(tiny, items, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampled_solutions, "SandboxPool", Judge)
        return folder, written(tiny("llama"), items, folder)


def test_answers_are_graded_in_the_sandbox(tiny, tmp_path, monkeypatch):
    "A model that knows the solutions."
    some = load_problems("basics", 3)
    completions = {p.task_id: "\n" + p.reference for p in some} | {some[2].task_id: "pass"}

    def completion_text(self, answer):
        return completions[answer.request.key[1]]

    monkeypatch.setattr(Decoder, "_text", completion_text)
    options = SamplingOptions(max_new_tokens=3, layers=[0], workers=1)
    generate_samples(tiny("llama"), plan_samples(some), tmp_path, options)
    table = finish_samples(tmp_path, plan_samples(some)).set_index("task_id")
    assert [table["verdict"][p.task_id] for p in some] == ["passed", "passed", "no_function"]
    assert table["passed"].tolist() == (table["verdict"] == "passed").tolist()
    assert set(table["per_test"][some[0].task_id]) == {"passed"}


def note_total(totals: list):
    "A progress function that notes how many answers are left to write."

    def progress(steps, total=None, **_):
        totals.append(total)
        return steps

    return progress


class Stop(BaseException):
    "As sudden as it gets within a process."


def until(n: int):
    def progress(steps, **_):
        for i, step in enumerate(steps):
            if i == n:
                raise Stop
            yield step

    return progress


@pytest.mark.slow  # a process that is killed, below, ends harder
@pytest.mark.parametrize("step", [0, 50, 77])
def test_an_interruption_changes_nothing(judge, tiny, items, whole, tmp_path, step):
    with pytest.raises(Stop):
        written(tiny("llama"), items, tmp_path, until(step))
    assert written(tiny("llama"), items, tmp_path) == whole[1]


class Stopped(Judge):
    "What a grader says whose workers were stopped, now and then."

    def __init__(self, workers):
        self.asked = 0

    def submit(self, job) -> Future:
        verdict = super().submit(job)
        self.asked = self.asked + 1
        if self.asked in (3, 60, 77):
            verdict = Future()
            verdict.set_result(Verdict("runner_error", (None,) * len(job.tests), "the worker was lost", 0.0))
        if self.asked == 70:
            verdict = Future()
            verdict.set_exception(RuntimeError("no new worker"))
        return verdict


def test_a_stop_that_reaches_the_judges_leaves_no_label(judge, tiny, items, whole, tmp_path, monkeypatch):
    "Answers that were not judged when the run was stopped are written again; an error before that is a result."
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(sampled_solutions, "SandboxPool", Stopped)
        written(tiny("llama"), items, tmp_path, until(77))
    table = read_records(tmp_path / "samples")
    assert len(table) == 77 - 3 and (table["verdict"] == "runner_error").sum() == 1
    begun = []
    count = note_total(begun)
    written(tiny("llama"), items, tmp_path, count)
    assert begun == [120 - 74]
    table = read_records(tmp_path / "samples")
    whole = read_records(whole[0] / "samples")
    assert table["token_ids"].map(list).tolist() == whole["token_ids"].map(list).tolist()
    assert (table["verdict"] == "runner_error").sum() == 1


def test_what_the_grader_failed_on_is_graded_again(judge, tiny, items, whole, tmp_path, monkeypatch):
    "A run whose grader failed now and then ends with the verdicts of one whose grader did not."
    options = SamplingOptions(max_new_tokens=6, slots=8, workers=1)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(sampled_solutions, "SandboxPool", Stopped)
        generate_samples(tiny("llama"), items, tmp_path, options, progress=until(66))
    assert (read_records(tmp_path / "samples")["verdict"] == "runner_error").sum() == 1
    assert written(tiny("llama"), items, tmp_path) == whole[1]
    assert len(read_records(tmp_path / "graded_again")) == 1
    assert "runner_error" not in set(pd.read_parquet(tmp_path / "samples.parquet")["verdict"])
    assert grade_again(tmp_path, items) == 0


class NeverGrades(Judge):
    "A grader that always fails."

    def submit(self, job) -> Future:
        verdict = Future()
        verdict.set_result(Verdict("runner_error", (None,) * len(job.tests), "the worker was lost", 0.0))
        return verdict


def test_what_cannot_be_graded_is_counted_and_no_label(tiny, tmp_path, monkeypatch):
    some = plan_samples(load_problems("basics", 3))
    monkeypatch.setattr(sampled_solutions, "SandboxPool", NeverGrades)
    generate_samples(tiny("llama"), some, tmp_path, SamplingOptions(max_new_tokens=3, layers=[0], workers=1))
    table = finish_samples(tmp_path, some)
    scores = pass_at_k_table(table, table)
    assert grade_again(tmp_path, some) == 3 and scores["not_judged"][0] == 3 and scores["problems_left_out"][0] == 3
    assert "3 runner_error, left out" in generation_headline(scores, table)


POISON = {
    "surrogate": "def f(x): raise ValueError('\\ud800')",
    "surrogate in an assert": "def f(x):\n    assert False, '\\udfff'",
    "surrogate in the source": "def f(x): return '\ud800'",
    "NUL": "def f(x): raise ValueError('\\x00')",
    "a name that is not UTF-8": "import ctypes\nctypes.CDLL(None).prctl(15, b'\\xff', 0, 0, 0)\ndef f(x):\n    while True: pass",
}


@pytest.mark.parametrize("what", POISON)
def test_no_text_of_a_program_stops_the_phase(tiny, tmp_path, monkeypatch, what):
    "Whatever a program says, its verdict is stored, and it is a verdict."
    problem = load_problems("basics", 1)[0]
    problem = replace(problem, entry_point="f", tests=("assert f(1) == 1",), setup="")
    monkeypatch.setattr(sampled_solutions, "extract_code", lambda *_: POISON[what])
    quick = partial(sampled_solutions.SandboxPool, limits=SandboxLimits(wall=1.0, patience=1.0))
    monkeypatch.setattr(sampled_solutions, "SandboxPool", quick)
    items = plan_samples([problem])
    generate_samples(tiny("llama"), items, tmp_path, SamplingOptions(max_new_tokens=3, layers=[], workers=1))
    (row,) = finish_samples(tmp_path, items).to_dict("records")
    assert row["verdict"] not in ("runner_error", "passed") and row["code"].encode()
    assert pd.read_parquet(tmp_path / "samples.parquet")["verdict"].tolist() == [row["verdict"]]


def test_a_signal_to_everybody_spoils_no_verdict(tiny, tmp_path):
    "Ctrl-C to the kernel's process group and SIGTERM to all below it, while slow answers are judged in the sandbox."
    some = plan_samples(load_problems("basics", 12))
    slow = {i.problem.task_id: "\nimport time\ntime.sleep(0.7)\n" + i.problem.reference for i in some}
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.default_int_handler)

            def tell(steps, **_):
                for n, step in enumerate(steps, 1):
                    yield step
                    if n == 8:
                        os.write(write, b".")
                        time.sleep(60)

            Decoder._text = lambda self, answer: slow[answer.request.key[1]]
            options = SamplingOptions(max_new_tokens=3, slots=4, layers=[0], workers=2)
            generate_samples(tiny("llama"), some, tmp_path, options, progress=tell)
        finally:
            os._exit(0)
    os.close(write)
    assert os.read(read, 1) == b"."
    import psutil

    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)
    os.killpg(pid, signal.SIGINT)
    os.waitpid(pid, 0)
    os.close(read)
    table = read_records(tmp_path / "samples")
    assert table["verdict"].tolist() == ["passed"] * 8, table["verdict"].tolist()


def test_rows_and_states_belong_together(tiny, items, whole):
    folder, _ = whole
    saved = read_states(folder)
    lm = tiny("llama")
    assert list(saved.table["task_id"]) == sorted(item.problem.task_id for item in items)
    for row_number in (0, 57, 119):
        row = saved.table.iloc[row_number]
        ids = lm.ids([row["prompt"]])[0]
        assert len(ids) == row["prompt_tokens"] and len(row["token_ids"]) == row["generated_tokens"]
        forced = teacher_forced(lm, ids, list(row["token_ids"]))
        for kind in STATE_KINDS:
            np.testing.assert_allclose(saved.states(kind, 2)[row_number], forced[kind][2].numpy(), rtol=1e-4, atol=1e-4)


def test_parts_of_fifty_and_their_states(judge, tiny, items, tmp_path):
    with pytest.raises(Stop):
        written(tiny("llama"), items, tmp_path, until(110))
    parts = sorted((tmp_path / "samples").glob("part-*.parquet"))
    assert [len(pd.read_parquet(path)) for path in parts] == [50, 50, 10]
    from codetrace.models.activations import StateParts

    held = StateParts(tmp_path / "activations")
    assert sorted(map(len, held.parts.values())) == [10, 50, 50]
    assert held.done() == set(map(tuple, pd.concat(map(pd.read_parquet, parts))[list(SAMPLE_KEY)].to_numpy().tolist()))


@pytest.mark.slow  # test_store has the same of any table
def test_damaged_states_are_written_again_and_only_they(judge, tiny, items, whole, tmp_path, caplog):
    with pytest.raises(Stop):
        written(tiny("llama"), items, tmp_path, until(115))
    victim = next((tmp_path / "activations" / "parts").glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-9] + b"\x01" * 9)
    begun = []
    count = note_total(begun)
    assert written(tiny("llama"), items, tmp_path, count) == whole[1]
    assert victim.name in caplog.text and begun[0] in (5 + 50, 5 + 15)


def end_after_length(i: int) -> dict:
    "An end of the i-th answer that depends on i; every seventh has none."
    if i % 7 == 6:
        return {}
    return {"over": lambda text: len(text) > 10 * (1 + i % 7), "marks": "aeiou .,"}


@pytest.mark.parametrize("arch", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_what_is_left_is_written_as_in_the_whole(tiny, arch):
    "Answers of many lengths: whoever is last, alone in the end, has the bits of the answer among others."
    lm = tiny(arch)
    ids = lm.ids([f"x = {i}\n" * (1 + i % 5) for i in range(21)])
    asked = [Request(row, key=i, temperature=0.9, **end_after_length(i)) for i, row in enumerate(ids)]
    whole = decoded(lm, asked, 40, slots=16, layers=None)
    for some in (asked[:1], asked[3:5], asked[6:13], asked[13:]):
        for key, c in decoded(lm, some, 40, slots=16, layers=None).items():
            assert c.tokens == whole[key].tokens
            assert all(torch.equal(c.states[kind], whole[key].states[kind]) for kind in STATE_KINDS), (arch, key)


def test_shards_put_together_are_the_whole(judge, tiny, items, whole, tmp_path):
    lm = tiny("llama")
    shards = []
    for shard in range(3):
        mine = [items[i] for i in shard_range(len(items), 3, shard, 1)]
        shards.append(tmp_path / str(shard))
        generate_samples(lm, mine, shards[-1], SamplingOptions(max_new_tokens=6, slots=8, workers=1))
        finish_samples(shards[-1], mine)
    (tmp_path / "all").mkdir()
    merge_samples(tmp_path / "all", items, shards)
    assert {name: file_sha256(tmp_path / "all" / name) for name in FILES} == whole[1]
    with pytest.raises(BadInput, match="is in no shard"):
        merge_samples(tmp_path / "all", items, shards[:2])
    with pytest.raises(BadInput, match="holds already"):
        merge_samples(tmp_path / "all", items, [*shards, shards[0]])
    with pytest.raises(BadInput, match="samples are missing"):
        finish_samples(shards[0], items)


def test_temperatures_fall_into_shards(items):
    some = [item.problem for item in items[:10]]
    asked = plan_samples(some, [0.3, 0.6, 0.9, 1.2], 5)
    for k in range(8):
        mine = [asked[i] for i in shard_range(len(asked), 8, k, 5)]
        assert len({item.temperature for item in mine}) == 1 and len(mine) == 25


def test_numbers_stand_for_settings(tmp_path):
    assert find_phase("1.0") == find_phase("1.2") == find_phase("1") == find_phase("generation")
    assert preset_parameters("1.2")["temperature"] == [0.3, 0.6, 0.9, 1.2] and preset_parameters("generation") == {}
    assert phase_values("1.2", {})["samples"] == 5

    def made(name: str, **parameters):
        folder = tmp_path / "generation" / name
        folder.mkdir(parents=True)
        parameters = {
            "model": "smollm2",
            "problems": "basics",
            "split": "all",
            "samples": 1,
            "temperature": [0.0],
        } | parameters
        manifest = {
            "run_id": name,
            "phase": "generation",
            "status": "complete",
            "outputs": {},
            "parameters": parameters,
        }
        (folder / "run.json").write_text(json.dumps(manifest))

    made("1-greedy")
    made("2-warm", split="validation", samples=5, temperature=[0.3, 0.6, 0.9, 1.2])
    assert resolve_run("1.0", tmp_path)["run_id"] == "1-greedy"
    assert resolve_run("1.2", tmp_path, model="smollm2", problems="basics")["run_id"] == "2-warm"
    with pytest.raises(NoInputRun):
        resolve_run("1.0", tmp_path, model="other")


def test_a_split_needs_its_run(monkeypatch, tmp_path):
    monkeypatch.setenv("CODETRACE_RUNS", str(tmp_path))
    with pytest.raises(NoInputRun, match="splits"):
        execute_phase("1.2", {"model": "tiny:llama"}, show_progress=False)


# kill -9, from outside


def killed_after(lm, items, folder: Path, answers: int, seconds: float) -> int:
    "Begin a run in a process of its own and kill that after so many answers; gives how many were written by then."
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)

            def tell(steps, **_):
                for step in steps:
                    os.write(write, b".")
                    yield step

            written(lm, items, folder, tell)
        finally:
            os._exit(0)
    os.close(write)
    seen = 0
    while seen < answers and os.read(read, 1):
        seen += 1
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while os.read(read, 1):
        seen += 1
    os.close(read)
    return seen


@pytest.mark.parametrize(
    "answers, seconds",
    [pytest.param(3, 0.0, marks=pytest.mark.slow), (50, 0.02), pytest.param(99, 0.1, marks=pytest.mark.slow)],
)
def test_kill_9(judge, tiny, items, whole, tmp_path, answers, seconds):
    seen = killed_after(tiny("llama"), items, tmp_path, answers, seconds)
    left = []
    count = note_total(left)
    assert written(tiny("llama"), items, tmp_path, count) == whole[1]
    assert seen - (len(items) - left[0]) <= 50, "more than 50 finished answers were written again"


VICTIMS = ("kernel", "papermill", "shard")
MOMENTS = np.random.default_rng(7).uniform(0, 0.8, 21).round(2).tolist()  # Shares of all answers
KILLS = [(share, VICTIMS[number % 3]) for number, share in enumerate(MOMENTS)]


def start(folder: Path, victim: str) -> subprocess.Popen:
    "A run through papermill, or a shard as the launcher runs it."
    env = os.environ | {"CODETRACE_RUNS": str(folder), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    env |= {KERNELS_VARIABLE: ""}  # a child of its own, which can be found
    if victim == "shard":
        parameters = ASKED | {"shards": 2, "shard": 0, "num_problems": 0}
        call = f"execute_phase('generation', {parameters!r}, show_progress=False)"
        command = ["-c", f"from codetrace.runs.execute import execute_phase; {call}"]
    else:
        words = [word for name, value in ASKED.items() for word in ("-p", name, str(value))]
        command = ["-m", "papermill", str(find_phase("generation").notebook), str(folder / "out.ipynb"), *words]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, *command], env=env, **quiet)


def the_run(folder: Path) -> Path | None:
    return max((path.parent for path in folder.glob("generation/*/run.json")), default=None)


def children(process: subprocess.Popen) -> list:
    import psutil

    return psutil.Process(process.pid).children(recursive=True)


def share_written(folder: Path) -> float:
    "Of all answers; -1 before the first is begun."
    run = the_run(folder)
    if run is None or not (run / "decoding.json").exists():
        return -1
    with suppress(OSError):  # it is not there yet, or no longer
        state = json.loads((run / "progress.json").read_text())
        return state["done"] / state["total"] if state["desc"] == "writing answers" else 0
    return 0


def interrupted(folder: Path, victim: str, share: float) -> int:
    "Start, wait for a share of all answers, kill; gives how many finished answers were lost."
    import psutil

    process = start(folder, victim)
    while process.poll() is None and share_written(folder) < share:
        time.sleep(0.05)
    assert process.poll() is None, "it was over before it was killed"
    family = children(process)
    (kernel_of(process) if victim == "kernel" else process).kill()
    process.wait(120)
    psutil.wait_procs(family, 60)  # the kernel of a killed launcher ends by itself
    run = the_run(folder)
    done = json.loads((run / "progress.json").read_text())["done"] if (run / "progress.json").exists() else 0
    return done - sum(len(pd.read_parquet(path)) for path in run.glob("samples/part-*.parquet"))


def files_of(folder: Path) -> dict[str, str]:
    run = the_run(folder)
    return {name: file_sha256(run / name) for name in FILES}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    made = {}

    def of(victim: str) -> dict[str, str]:
        kind = "shard" if victim == "shard" else "whole"
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            assert start(folder, victim).wait(900) == 0
            made[kind] = files_of(folder)
        return made[kind]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("share, victim", KILLS)
def test_killed_at_any_moment(uninterrupted, tmp_path, share, victim):
    lost = interrupted(tmp_path, victim, share)
    assert lost <= 50
    assert start(tmp_path, victim).wait(900) == 0
    assert len(list(tmp_path.glob("generation/*/run.json"))) == 1, "a second run was begun"
    assert read_manifest(the_run(tmp_path))["status"] == "complete"
    same = files_of(tmp_path) == uninterrupted(victim)
    note(
        f"kill -9 of the {victim} after {share:.0%} of the answers: {max(0, lost)} written again, {'the same' if same else 'OTHER'} bytes"
    )
    assert same


@pytest.mark.slow
def test_smollm2_writes_what_generate_writes():
    "In float32, on real prompts, refilled and kept: the same tokens, and the states of a second pass."
    lm = models.load("smollm2", dtype="float32")
    some = load_problems("basics", 8)
    ids = lm.ids([render_problem_prompt(p).text for p in some])
    got = decoded(lm, [Request(row, key=i) for i, row in enumerate(ids)], 40, slots=4, layers=None)
    wanted = [lm.generate([row], 40)[0] for row in ids]
    assert [got[i].text for i in range(len(ids))] == wanted
    for i in (0, 5):
        forced = teacher_forced(lm, ids[i], got[i].tokens)
        for kind in STATE_KINDS:
            torch.testing.assert_close(got[i].states[kind], forced[kind], rtol=1e-4, atol=1e-4)
