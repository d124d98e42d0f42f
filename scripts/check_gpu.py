"""Check codetrace on a GPU: every fast path against a plain one, with models of random weights. No model file is needed.

python scripts/check_gpu.py                          on the GPU, up to eight minutes; writes bench/results/<card>.json
python scripts/check_gpu.py --device cpu --quick     the same checks, small, to see that they work

In float32 a check compares two ways to the same numbers. In bfloat16 both are compared with float32, on the same weights: the fast
way may be at most one and a half times as far from it as the plain way. Where two answers part, the gap is that between the logits of the
two tokens, in standard deviations of the logits: a near tie, which rounding decides, is small.

Packages that the machine lacks are taken from this checkout's .venv, if they are there (carry those folders).
"""

import argparse
import copy
import gc
import importlib.util
import json
import math
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
NEEDED = (
    "torch",
    "transformers",
    "numpy",
    "safetensors",
    "filelock",
    "psutil",
    "fastcore",
    "jaxtyping",
    "pandas",
    "scipy",
    "wadler_lindig",
)
OPTIONAL = ("nnsight", "transformer_lens", "sae_lens")  # oracles that are not used here


def missing_packages(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def borrow_packages(names: list[str]) -> list[str]:
    "Look for packages in this checkout's .venv, after everything else; those that are found there."
    folders = [str(folder) for folder in HOME.glob(".venv/lib/python3*/site-packages")]
    sys.path.extend(folder for folder in folders if folder not in sys.path)
    importlib.invalidate_caches()
    return [name for name in names if importlib.util.find_spec(name)]


LACKING = missing_packages(NEEDED)
BORROWED = borrow_packages(LACKING) if LACKING else []
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(HOME))
if MISSING := missing_packages(NEEDED):
    sys.exit(
        f"missing: {', '.join(MISSING)}. Nothing of codetrace can be imported without; install them, or carry from "
        f".venv/lib/python3.11/site-packages: {', '.join(f'{name} and its .dist-info' for name in MISSING)}"
    )

import numpy as np
import torch
import transformers
from torch import Tensor

from codetrace.models.decoding import EDIT_PLACES, STATE_KINDS, Continuation, Decoder, Request, ResidualEdit
from codetrace.models.interventions import register_hook
from codetrace.models.lm import LM
from codetrace.models.loading import load
from codetrace.models.memory import estimate_generation_memory, estimate_pass_memory
from codetrace.models.tiny import TINY_CONFIGS, _build_tiny, freeze_weights
from codetrace.models.word_tokenizers import pattern_tokenizer
from codetrace.patching.engine import PatchOptions, patch_all
from codetrace.patching.sites import PatchPair, patch_sites
from codetrace.sae.sae import SAE, random_sae
from codetrace.sae.separation import encode_active_latents, separation_scores
from codetrace.sae.training import SAETrainer, SAETrainingConfig
from codetrace.steering.ablation import orthogonalize_weights, residual_writers

END_TOKEN = 2
BFLOAT16_RATIO = 1.5  # how much farther from float32 the fast way may be than the plain way
TIE = 0.25  # largest gap, in standard deviations of the logits, that rounding to bfloat16 explains


@dataclass
class Measurement:
    "What a check measured."

    error: float
    tolerance: float
    note: str = ""
    values: dict[str, float] = field(default_factory=dict)
    at_least: bool = False  # must the number be at least the tolerance, not at most?

    @property
    def passed(self) -> bool:  # NaN never passes
        if self.at_least:
            return bool(self.error >= self.tolerance)
        return bool(self.error <= self.tolerance)  # NumPy's False is not False, and would count as passed


@dataclass
class Result:
    "A line of the report."

    name: str
    passed: bool | None  # None: not run
    error: float | None
    tolerance: float | None
    note: str
    values: dict[str, float]
    seconds: float


class Checks:
    "Runs checks one by one; one that fails or raises stops no other."

    def __init__(self, limit: float, pattern: str):
        self.began = time.monotonic()
        self.limit = limit
        self.pattern = pattern
        self.results: list[Result] = []

    def run(self, name: str, check: Callable[[], Measurement]) -> None:
        if self.pattern not in name:
            return
        began = time.monotonic()
        if began - self.began > self.limit:
            self.add(Result(name, None, None, None, "not run: no time left", {}, 0.0))
            return
        try:
            measurement = check()
            error = float(measurement.error) if math.isfinite(measurement.error) else None
            result = Result(
                name, measurement.passed, error, measurement.tolerance, measurement.note, measurement.values, 0.0
            )
        except Exception as error:
            traceback.print_exc(limit=-4)
            reason = (str(error).splitlines() or [""])[0]
            result = Result(name, False, None, None, f"{type(error).__name__}: {reason}", {}, 0.0)
        result.seconds = round(time.monotonic() - began, 2)
        self.add(result)

    def skip(self, name: str, reason: str) -> None:
        if self.pattern in name:
            self.add(Result(name, None, None, None, f"not run: {reason}", {}, 0.0))

    def add(self, result: Result) -> None:
        self.results.append(result)
        print(line_of(result), flush=True)


def line_of(result: Result) -> str:
    word = {True: "ok  ", False: "FAIL", None: "--  "}[result.passed]
    numbers = "" if result.error is None else f"{result.error:.3g} (tolerance {result.tolerance:.3g})"
    values = ", ".join(f"{name} {value:.4g}" for name, value in result.values.items())
    return "  ".join(
        part for part in (word, result.name, numbers, values, result.note, f"{result.seconds:.1f} s") if part
    )


# --- models -------------------------------------------------------------------------------------------------------


def character_tokenizer():
    "A tokenizer of single characters; tokens that a random model writes beyond them have no text."
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = ["<pad>", "<unknown>", "<end>", *characters]
    special = {"pad_token": "<pad>", "unk_token": "<unknown>", "eos_token": "<end>"}
    return pattern_tokenizer(vocabulary, r"[\s\S]", **special)


def wrap_model(name: str, hf: torch.nn.Module) -> LM:
    hf.generation_config.eos_token_id = END_TOKEN
    hf.generation_config.pad_token_id = 0
    return LM(name, freeze_weights(hf), character_tokenizer(), revision="seed=0")


@dataclass(frozen=True, eq=False)
class Twins:
    "One model in float32 and in bfloat16, with the same weights: those that bfloat16 can hold."

    float32: LM
    bfloat16: LM


def make_twins(name: str, hf: torch.nn.Module) -> Twins:
    full = copy.deepcopy(hf).float()
    return Twins(wrap_model(name, full), wrap_model(name, hf))


def tiny_twins(family: str, attention: str, device: str) -> Twins:
    hf = _build_tiny(f"tiny:{family}", family, 0, attention).to(device, torch.bfloat16)
    return make_twins(f"tiny:{family}", hf)


# the unembedding is not tied as it is in the real ones: tied random weights repeat the last token for ever
REAL_SHAPES = {
    "qwen3-0.6b": (
        "qwen3",
        "sdpa",
        dict(
            vocab_size=151936,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40960,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
    ),
    "gemma-2-2b": (
        "gemma2",
        "eager",
        dict(
            vocab_size=256000,
            hidden_size=2304,
            intermediate_size=9216,
            num_hidden_layers=26,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=256,
            query_pre_attn_scalar=256,
            sliding_window=4096,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            max_position_embeddings=8192,
        ),
    ),
    "qwen3-4b": (
        "qwen3",
        "sdpa",
        dict(
            vocab_size=151936,
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40960,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
    ),
}
_TWINS_GB = {"qwen3-4b": 32}  # What a GPU must have for both twins and their work, where that is more than 24
_SMALLER = dict(vocab_size=4096, hidden_size=256, intermediate_size=512, num_hidden_layers=3)


def real_shape_twins(shape: str, device: str, small: bool) -> Twins:
    "A model of a real model's shape, or, where `small`, a small one of its family and head width."
    from transformers import AutoConfig, AutoModelForCausalLM

    family, attention, sizes = REAL_SHAPES[shape]
    sizes = sizes | dict(tie_word_embeddings=False, bos_token_id=1, eos_token_id=END_TOKEN, pad_token_id=0)
    config = AutoConfig.for_model(family, **sizes | (_SMALLER if small else {}))
    torch.manual_seed(0)
    with torch.device(device):
        hf = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    return make_twins(shape + (" (small)" if small else ""), hf)


# --- sums that several checks need --------------------------------------------------------------------------------


def root_mean_square(x: Tensor) -> float:
    return float(x.double().pow(2).mean().sqrt())


def distance_ratio(fast: Tensor, plain: Tensor, exact: Tensor) -> tuple[float, dict[str, float]]:
    "How much farther from float32 the fast way is than the plain way; and both distances, relative to the values."
    fast_error = root_mean_square(fast.double() - exact.double())
    plain_error = root_mean_square(plain.double() - exact.double())
    scale = root_mean_square(exact)
    values = {"fast": fast_error / scale, "plain": plain_error / scale}
    return fast_error / max(plain_error, 1e-12), values


def random_prompts(lm: LM, lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = lm.hf.config.vocab_size
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def prompt_lengths(n: int) -> list[int]:
    return [4 + 3 * i % 11 for i in range(n)]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def free_cached_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def generate_one(lm: LM, prompt: list[int], new: int) -> list[int]:
    "The greedy answer by Hugging Face's generate, without the token that ends it."
    ids = torch.tensor([prompt], device=lm.device)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        written = lm.hf.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
    tokens = written[0, len(prompt) :].tolist()
    return tokens[: tokens.index(END_TOKEN)] if END_TOKEN in tokens else tokens


def write_in_slots(lm: LM, prompts: list[list[int]], new: int, slots: int, **options) -> list[Continuation]:
    "Answers in the order of the prompts; a request's key is the number of its prompt."
    requests = [Request(prompt, key) for key, prompt in enumerate(prompts)]
    return sorted(Decoder(lm, requests, new, slots, **options), key=lambda answer: answer.request.key)


@contextmanager
def no_edit(lm: LM, key: int, n_prompt: int) -> Iterator[None]:
    yield


def largest_gap(
    lm: LM, prompts: list, answers: list, compared_answers: list, edit: Callable = no_edit
) -> tuple[float, float]:
    "Share of equal answers; largest gap between the two tokens' logits where answers part, in standard deviations."
    gaps = []
    for key, (prompt, a, b) in enumerate(zip(prompts, answers, compared_answers)):
        if a == b:
            continue
        parting = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        with edit(lm, key, len(prompt)):
            logits = lm.logits([[*prompt, *a[:parting]]])[0]
        first, second = (tokens[parting] if parting < len(tokens) else END_TOKEN for tokens in (a, b))
        gaps.append(float((logits[first] - logits[second]).abs() / logits.std()))
    return 1 - len(gaps) / len(prompts), max(gaps, default=0.0)


def compare_answers(lm: LM, prompts: list, slots: list, alone: list, edit: Callable = no_edit) -> Measurement:
    "In float32 the share of answers that differ, in bfloat16 the gap where they part."
    share, gap = largest_gap(lm, prompts, slots, alone, edit)
    values = {"identical": share, "gap": gap}
    if lm.dtype == torch.float32:
        return Measurement(1 - share, 0.0, "share of answers that differ", values)
    return Measurement(gap, TIE, "gap of the logits where answers part", values)


# --- 1: the staircase ---------------------------------------------------------------------------------------------


def logits_of_some_tokens(logits: Tensor, pair: int) -> Tensor:
    return logits[:, 3:35]


def sweep_pair(lm: LM, n_tokens: int, n_positions: int) -> PatchPair:
    "Two runs that differ in one token early on, and the positions to patch."
    base, source = random_prompts(lm, [n_tokens, n_tokens], seed=1)
    first = n_tokens // 4
    source = [*base[:first], source[first], *base[first + 1 :]]
    positions = np.linspace(first, n_tokens - 1, n_positions).astype(int).tolist()
    return PatchPair(base, source, positions)


def sweep(lm: LM, pair: PatchPair, site: str, engine: str, layers: list[int]) -> Tensor:
    options = PatchOptions(layers=layers, engine=engine)
    return patch_all(lm, [pair], site, logits_of_some_tokens, options)[0].double().cpu()


def check_sweep(twins: Twins, dtype: str, site: str, pair: PatchPair, layers: list[int]) -> Measurement:
    plain = sweep(twins.float32, pair, site, "naive", layers)
    if dtype == "float32":
        fast = sweep(twins.float32, pair, site, "staircase", layers)
        unpatched = twins.float32.logits([list(pair.base)])[:, 3:35].double().cpu()
        effect = root_mean_square(plain - unpatched)
        error = float((fast - plain).abs().max()) / max(effect, 1e-12)
        note = "largest difference, in root mean square effects"
        return Measurement(error, 1e-3, note, {"effect": effect})
    fast = sweep(twins.bfloat16, pair, site, "staircase", layers)
    naive = sweep(twins.bfloat16, pair, site, "naive", layers)
    ratio, values = distance_ratio(fast, naive, plain)
    return Measurement(ratio, BFLOAT16_RATIO, "distance from float32, over the naive one's", values)


def worst(measurements: dict[str, Measurement]) -> Measurement:
    "The measurement that is nearest to failing, with all errors as values."
    name = max(measurements, key=lambda key: _share_of_tolerance(measurements[key]))
    measurement = measurements[name]
    errors = {key: m.error for key, m in measurements.items()}
    return Measurement(measurement.error, measurement.tolerance, f"{measurement.note}; worst: {name}", errors)


def _share_of_tolerance(measurement: Measurement) -> float:
    "Above 1 where it fails."
    if measurement.tolerance > 0:
        return float(np.nan_to_num(measurement.error / measurement.tolerance, nan=np.inf))
    return 0.0 if measurement.error == 0 else math.inf


def check_tiny_sweep(twins: Twins, dtype: str, quick: bool) -> Measurement:
    pair = sweep_pair(twins.float32, 10, 3 if quick else 4)
    layers = list(range(twins.float32.n_layers))
    sites = patch_sites(twins.float32)
    return worst({site: check_sweep(twins, dtype, site, pair, layers) for site in sites})


def check_real_sweep(twins: Twins, dtype: str) -> Measurement:
    n = twins.float32.n_layers
    pair = sweep_pair(twins.float32, 16, 3)
    sites = ("resid_pre", "mlp_out", "key", "value")
    return worst({site: check_sweep(twins, dtype, site, pair, [0, n // 2, n - 1]) for site in sites})


# --- 2 and 3: answers in slots, and their states ------------------------------------------------------------------


def check_decoding(lm: LM, n: int, new: int, slots: int) -> Measurement:
    prompts = random_prompts(lm, prompt_lengths(n))
    alone = [generate_one(lm, prompt, new) for prompt in prompts]
    answers = write_in_slots(lm, prompts, new, slots)
    return compare_answers(lm, prompts, [answer.tokens for answer in answers], alone)


def check_graphed(lm: LM, n: int, new: int, slots: int) -> Measurement:
    "Steps that are replayed (on a processor: done again) into the same memory, against steps that are not, states and all."
    lengths = [length + 60 * (i % 2) for i, length in enumerate(prompt_lengths(n))]  # across the end of a recording
    prompts = random_prompts(lm, lengths)
    options = dict(layers=None, per_token=range(lm.n_layers))
    plain, graphed = (write_in_slots(lm, prompts, new, slots, graphed=on, **options) for on in (False, True))
    tokens = compare_answers(lm, prompts, [answer.tokens for answer in graphed], [answer.tokens for answer in plain])
    return worst({"tokens": tokens, "states": compare_kept_states(lm, graphed, plain)})


def compare_kept_states(lm: LM, answers: list[Continuation], plain: list[Continuation]) -> Measurement:
    "How far states are apart in answers of the same tokens."
    note = "largest difference of states, over their root mean square"
    same = [(a, b) for a, b in zip(answers, plain) if a.tokens == b.tokens and a.tokens]
    if not same:
        return Measurement(math.nan, 0.0, f"{note}: no two answers are the same")
    errors = []
    for pair in same:
        replayed, expected = (states_in_slots(lm, answer) for answer in pair)
        errors += [
            float((x - expected[kind]).abs().max()) / root_mean_square(expected[kind]) for kind, x in replayed.items()
        ]
    return Measurement(float(np.max(errors)), 1e-3 if lm.dtype == torch.float32 else 0.25, note)


def teacher_forced_states(lm: LM, answer: Continuation, edit: Callable = no_edit) -> dict[str, Tensor]:
    "The states of an answer by one pass over prompt and answer."
    prompt = list(answer.request.ids)
    sites = [("resid_post", layer) for layer in range(lm.n_layers)]
    with edit(lm, answer.request.key, len(prompt)):
        captured = lm.capture([[*prompt, *answer.tokens]], sites)
    states = torch.stack([captured[site][0] for site in sites]).float().cpu()
    written = states[:, len(prompt) :]
    by_kind = (states[:, len(prompt) - 1], written[:, -1], written.mean(1))
    return dict(zip(STATE_KINDS, by_kind)) | {"per_token": written}


def states_in_slots(lm: LM, answer: Continuation) -> dict[str, Tensor]:
    per_token = torch.stack([answer.per_token["resid_post", layer] for layer in range(lm.n_layers)])
    return {kind: x.float().cpu() for kind, x in (answer.states | {"per_token": per_token}).items()}


def check_states(twins: Twins, dtype: str, size: tuple[int, int, int]) -> Measurement:
    prompts = random_prompts(twins.float32, prompt_lengths(size[0]))
    return compare_slot_states(twins, dtype, prompts, size, (), no_edit)


def compare_slot_states(
    twins: Twins, dtype: str, prompts: list, size: tuple[int, int, int], edits: tuple[ResidualEdit, ...], edit: Callable
) -> Measurement:
    "States of answers in slots against teacher forcing, with the same edits by a plain hook."
    lm = getattr(twins, dtype)
    options = dict(layers=None, per_token=range(lm.n_layers), edits=edits)
    answers = [answer for answer in write_in_slots(lm, prompts, *size[1:], **options) if answer.tokens]
    slot_states = [states_in_slots(lm, answer) for answer in answers]
    exact = [teacher_forced_states(twins.float32, answer, edit) for answer in answers]
    plain = exact if dtype == "float32" else [teacher_forced_states(lm, answer, edit) for answer in answers]
    kinds = (*STATE_KINDS, "per_token")
    return worst({kind: compare_states(slot_states, plain, exact, kind, dtype) for kind in kinds})


def compare_states(slots: list, plain: list, exact: list, kind: str, dtype: str) -> Measurement:
    fast, slow, truth = (torch.cat([states[kind].flatten() for states in part]) for part in (slots, plain, exact))
    if dtype == "float32":
        error = float((fast - truth).abs().max()) / root_mean_square(truth)
        return Measurement(error, 1e-3, "largest difference, over the states' root mean square")
    ratio, values = distance_ratio(fast, slow, truth)
    return Measurement(ratio, BFLOAT16_RATIO, "distance from float32, over teacher forcing's", values)


# --- 4: steering --------------------------------------------------------------------------------------------------


def steering_vectors(lm: LM, n: int, layer: int, prompt: list[int]) -> Tensor:
    "A vector for each answer, as long as the stream is after the layer."
    norm = lm.capture([prompt], [("resid_post", layer)])[("resid_post", layer)][0].float().norm(dim=-1).median()
    vectors = torch.randn(n, lm.d_model, generator=torch.Generator().manual_seed(2))
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    return (vectors * float(norm)).to(lm.device)


def slot_edit(vectors: Tensor, layer: int, where: str) -> ResidualEdit:
    def change(x, requests):
        return x.float() + vectors[[request.key for request in requests]]

    return ResidualEdit(layer, change, where)


@contextmanager
def hooked_change(lm: LM, layer: int, vector: Tensor, columns_of: Callable[[Tensor], slice | None]) -> Iterator[None]:
    "A block in which a plain forward hook adds a vector to some columns of the stream."

    def visit(x):
        columns = columns_of(x)
        if columns is None:
            return None
        new = x.clone()
        new[:, columns] = (x[:, columns].float() + vector).to(x)
        return new

    module, side = lm.site_module("resid_post", layer)
    handle = register_hook(module, side, visit)
    try:
        yield
    finally:
        handle.remove()


def edit_while_writing(vectors: Tensor, layer: int, where: str, lm: LM, key: int):
    "The edit of an answer that `generate` writes: its prompt, of several tokens, is one pass, each token another."

    def columns_of(x):
        reads_prompt = x.shape[1] > 1
        if where != "all" and reads_prompt == (where == "generated"):
            return None
        return slice(-1, None) if where == "last_prompt" else slice(None)

    return hooked_change(lm, layer, vectors[key], columns_of)


def edit_in_one_pass(vectors: Tensor, layer: int, where: str, lm: LM, key: int, n_prompt: int):
    "The edit of an answer in one pass over prompt and answer."
    columns = {
        "prompt": slice(n_prompt),
        "last_prompt": slice(n_prompt - 1, n_prompt),
        "generated": slice(n_prompt, None),
        "all": slice(None),
    }
    return hooked_change(lm, layer, vectors[key], lambda x: columns[where])


def check_steering(twins: Twins, dtype: str, where: str, size: tuple[int, int, int]) -> Measurement:
    "In float32 the tokens are those of `generate`; the states are those of teacher forcing in both dtypes."
    lm = getattr(twins, dtype)
    layer = lm.n_layers // 2
    prompts = random_prompts(lm, prompt_lengths(size[0]))
    vectors = steering_vectors(lm, size[0], layer, prompts[0])
    edits = (slot_edit(vectors, layer, where),)
    steered = [answer.tokens for answer in write_in_slots(lm, prompts, *size[1:], edits=edits)]
    plain = [answer.tokens for answer in write_in_slots(lm, prompts, *size[1:])]
    if steered == plain:
        return Measurement(math.nan, 0.0, "the edit changes no answer: nothing is tested")
    in_one_pass = partial(edit_in_one_pass, vectors, layer, where)
    states = compare_slot_states(twins, dtype, prompts, size, edits, in_one_pass)
    if dtype != "float32" or not states.passed:
        return states
    alone = []
    for key, prompt in enumerate(prompts):
        with edit_while_writing(vectors, layer, where, lm, key):
            alone.append(generate_one(lm, prompt, size[1]))
    measurement = compare_answers(lm, prompts, steered, alone, in_one_pass)
    measurement.values |= {
        "states": states.error,
        "changed by the edit": float(np.mean([a != b for a, b in zip(steered, plain)])),
    }
    return measurement


# --- what a GPU is waited for -------------------------------------------------------------------------------------


@contextmanager
def waits_for_the_gpu() -> Iterator[list]:
    "What was done meanwhile for which the processor had to wait for the GPU, one item each, known when the block is left."
    waits: list[str] = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
            waits += [text for w in told if "called a synchronizing" in (text := str(w.message))]


def steps_and_waits(lm: LM, new: int) -> tuple[int, int]:
    "How many steps a few answers of this length take in as many slots, and how often the GPU is waited for."
    decoder = Decoder(lm, [Request(p, key) for key, p in enumerate(random_prompts(lm, [9] * 4))], new, 4, layers=None)
    with waits_for_the_gpu() as waits:
        list(decoder)
    return decoder.step_count, len(waits)


def sweep_waits(lm: LM, layers: list[int]) -> int:
    "How often the GPU is waited for in a sweep of these layers."
    pair = sweep_pair(lm, 24, 6)
    sweep(lm, pair, "resid_pre", "staircase", layers)  # the first time, memory is taken
    with waits_for_the_gpu() as waits:
        sweep(lm, pair, "resid_pre", "staircase", layers)
    return len(waits)


def check_waits(lm: LM, few: int = 4, many: int = 20) -> Measurement:
    "A step of slots waits once, for the chosen tokens; a sweep not once a layer."
    steps_and_waits(lm, few)  # the first time, memory is taken
    (few_steps, few_waits), (many_steps, many_waits) = steps_and_waits(lm, few), steps_and_waits(lm, many)
    some, all_layers = list(range(lm.n_layers // 2)), list(range(lm.n_layers))
    some_waits, all_waits = sweep_waits(lm, some), sweep_waits(lm, all_layers)
    values = {"waits in many steps": float(many_waits), "waits in a sweep": float(all_waits)}
    if many_steps <= few_steps or many_waits < many_steps:
        told = f"{many_waits} waits in {many_steps} steps, each of which reads its tokens: the waits are not all told"
        return Measurement(math.nan, 0.0, told, values)
    a_step = (many_waits - few_waits) / (many_steps - few_steps)
    a_layer = (all_waits - some_waits) / (len(all_layers) - len(some))
    values |= {"waits a step": a_step, "waits a layer of a sweep": a_layer}
    return Measurement(
        max(a_step - 1, a_layer), 0.5, "waits for the GPU beyond one a step, or a layer of a sweep", values
    )


# --- 5: ablation --------------------------------------------------------------------------------------------------


def largest_projection(lm: LM, directions: Tensor, prompts: list[list[int]]) -> float:
    "The largest part of a state along a direction, of its norm, over layers and tokens."
    captured = lm.capture(prompts, [("resid_post", layer) for layer in range(lm.n_layers)])
    states = torch.stack(list(captured.values())).float()
    states = states[~states.isnan().any(-1)]
    return float(((states @ directions.T).abs() / states.norm(dim=-1, keepdim=True)).max())


def check_ablation(lm: LM) -> Measurement:
    generator = torch.Generator().manual_seed(3)
    directions = torch.nn.functional.normalize(torch.randn(2, lm.d_model, generator=generator), dim=1)
    prompts = random_prompts(lm, [6, 9, 12])
    weights = [writer.module.weight for writer in residual_writers(lm)]
    before = largest_projection(lm, directions.to(lm.device), prompts)
    with orthogonalize_weights(lm, directions):
        error = largest_projection(lm, directions.to(lm.device), prompts)
    restored = all(a is w.module.weight for a, w in zip(weights, residual_writers(lm)))
    values = {"without ablation": before}
    if not restored:
        return Measurement(math.nan, 0.0, "the weights were not restored", values)
    tolerance = 1e-5 if lm.dtype == torch.float32 else 2**-7
    return Measurement(error, tolerance, "largest part of a state along the direction", values)


# --- 6: sparse autoencoders ---------------------------------------------------------------------------------------


def sparse_states(rows: int, d_model: int, device: str) -> Tensor:
    "States that are sums of a few of many directions."
    generator = torch.Generator().manual_seed(4)
    basis = torch.randn(4 * d_model, d_model, generator=generator) / d_model**0.5
    active = (torch.rand(rows, 4 * d_model, generator=generator) < 8 / (4 * d_model)).float()
    return (active.to(device) @ basis.to(device)).float()


def check_sae(device: str, matmul_dtype: torch.dtype) -> Measurement:
    "The loss after 120 steps; on a CPU it is four fifths of the first, and after 30 steps nine tenths."
    d_model = 64
    config = SAETrainingConfig(d_sae=8 * d_model, k=8, batch=512)
    states = sparse_states(16 * config.batch, d_model, device)
    trainer = SAETrainer(config, states, matmul_dtype, device)
    steps = 120
    losses = [trainer.step(batch_of(states, i, config.batch), i / steps) for i in range(steps)]
    devices = {weight.device.type for weight in trainer.weights.values()}
    first = np.mean(losses[:3])
    last = np.mean(losses[-3:])
    if devices != {device}:
        return Measurement(math.nan, 0.0, f"weights are on {devices}, not on {device}")
    return Measurement(last / first, 0.9, "last loss, over the first", {"first": first, "last": last})


def check_sae_steps(device: str, matmul_dtype: torch.dtype) -> Measurement:
    "Losses of the first steps of training beside those of the same steps in float32 on the processor."
    config = SAETrainingConfig(d_sae=512, k=8, batch=512)
    states = sparse_states(16 * config.batch, 64, "cpu")
    trainers = SAETrainer(config, states, matmul_dtype, device), SAETrainer(config, states, torch.float32, "cpu")
    steps = 24
    losses = [
        [trainer.step(batch_of(states, i, config.batch).to(place), i / steps) for i in range(steps)]
        for trainer, place in zip(trainers, (device, "cpu"))
    ]
    tried, plain = np.array(losses)
    tolerance = 1e-3 if matmul_dtype == torch.float32 else 0.03
    values = {"last": tried[-1], "last on the processor": plain[-1]}
    return Measurement(float(np.abs(tried / plain - 1).max()), tolerance, "largest difference of a loss", values)


def batch_of(states: Tensor, i: int, size: int) -> Tensor:
    start = i * size % len(states)
    return states[start : start + size]


def dictionary(d_model: int, d_sae: int, kind: str) -> SAE:
    "Random directions of which sixteen are active at a time."
    random = random_sae(d_model, d_sae, 16)
    if kind == "topk":
        return random
    threshold = torch.full((d_sae,), statistics.NormalDist().inv_cdf(1 - 16 / d_sae))
    return SAE(random.W_enc, random.W_dec, random.b_enc, random.b_dec, "jumprelu", threshold=threshold)


def on_device(sae: SAE, device: str) -> SAE:
    return replace(sae, **{name: x.to(device) for name, x in vars(sae).items() if isinstance(x, Tensor)})


def check_sae_lens(device: str, kind: str) -> Measurement:
    "Latents of a dictionary, and the states that they stand for, here and by sae-lens, which reads what was written here."
    import sae_lens

    written = dictionary(64, 512, kind)
    with tempfile.TemporaryDirectory() as folder:
        theirs = sae_lens.SAE.load_from_disk(written.save(folder)).to(device)
    ours = on_device(written, device)
    states = torch.randn(256, 64, generator=torch.Generator().manual_seed(1)).to(device)
    latents = ours.encode(states)
    errors = {"latents": float((latents - theirs.encode(states)).abs().max())}
    errors["states"] = float((ours.decode(latents) - theirs.decode(latents)).abs().max())
    return Measurement(float(np.max(list(errors.values()))), 1e-4, "largest difference", errors)


# --- 7: models in other forms --------------------------------------------------------------------------------------


def spread_model(hf: torch.nn.Module, device: str) -> torch.nn.Module:
    "A copy whose first layers are on another device than the rest: a second GPU, or else the processor, which hands them over."
    from accelerate import dispatch_model

    first_device = "cuda:1" if device == "cuda" and torch.cuda.device_count() > 1 else "cpu"
    device = "cuda:0" if device == "cuda" else device
    hf = copy.deepcopy(hf).cpu()
    parts = dict(hf.base_model.named_children())
    prefix = hf.base_model_prefix
    (name,) = [name for name, part in parts.items() if isinstance(part, torch.nn.ModuleList)]
    layers = parts.pop(name)
    places = {f"{prefix}.{name}.{i}": first_device if i < len(layers) // 2 else device for i in range(len(layers))}
    places |= {f"{prefix}.{part}": first_device if "norm" in part else device for part in parts}  # away from the head
    places |= {part: device for part, _ in hf.named_children() if part != prefix}
    return dispatch_model(hf, places, main_device=device, force_hooks=True)


def check_spread(twins: Twins, device: str, size: tuple[int, int, int]) -> Measurement:
    "A model on two devices against the same on one: a sweep, and answers in slots with their states."
    whole = twins.float32
    spread = wrap_model(whole.name, spread_model(whole.hf, device))
    pair = sweep_pair(whole, 10, 3)
    layers = list(range(whole.n_layers))
    plain = {site: sweep(whole, pair, site, "naive", layers) for site in ("resid_pre", "head_out", "key")}
    engine = "naive" if any(parameter.is_meta for parameter in spread.hf.parameters()) else "staircase"
    errors = {site: float((sweep(spread, pair, site, engine, layers) - plain[site]).abs().max()) for site in plain}
    prompts = random_prompts(whole, prompt_lengths(size[0]))
    answers = [write_in_slots(lm, prompts, *size[1:], layers=None) for lm in (whole, spread)]
    errors["answers that differ"] = float(np.mean([a.tokens != b.tokens for a, b in zip(*answers)]))
    for kind in STATE_KINDS:
        states = [torch.stack([answer.states[kind].float().cpu() for answer in of_lm]) for of_lm in answers]
        errors[kind] = float((states[0] - states[1]).abs().max())
    return Measurement(float(np.max(list(errors.values()))), 1e-3, "largest difference", errors)


def check_spread_answers(lm: LM, device: str, size: tuple[int, int, int]) -> Measurement:
    "Answers of a model on two devices and of the same on one, in bfloat16, where near ties are scored again."
    spread = wrap_model(lm.name, spread_model(lm.hf, device))
    prompts = random_prompts(lm, prompt_lengths(size[0]))
    whole, apart = ([answer.tokens for answer in write_in_slots(model, prompts, *size[1:])] for model in (lm, spread))
    return compare_answers(lm, prompts, apart, whole)


def check_quantized(twins: Twins, device: str, bits: str, size: tuple[int, int, int]) -> Measurement:
    "A quantised model: answers in slots against generate, on the same weights; and how far its logits are from the whole one's."
    with tempfile.TemporaryDirectory() as folder:
        twins.float32.hf.save_pretrained(folder)
        twins.float32.tokenizer.save_pretrained(folder)
        lm, plain = (load(folder, dtype="float32", device=device, quantize=form) for form in (bits, None))
    lm, plain = (wrap_model(loaded.name, loaded.hf) for loaded in (lm, plain))
    prompts = random_prompts(lm, prompt_lengths(size[0]))
    alone = [generate_one(lm, prompt, size[1]) for prompt in prompts]
    answers = write_in_slots(lm, prompts, *size[1:])
    _, gap = largest_gap(lm, prompts, [answer.tokens for answer in answers], alone)
    whole = plain.logits(prompts[:1])
    error = float((lm.logits(prompts[:1]) - whole).std() / whole.std())
    return Measurement(gap, TIE, "gap of the logits where answers part", {"gap": gap, "error of the logits": error})


def check_other_forms(checks: Checks, options: argparse.Namespace) -> None:
    "Layers on two devices, weights of 8 and 4 bits, dictionaries of sae-lens."
    size = (4, 8, 4) if options.quick else (8, 12, 4)
    for family in ("llama", "gemma2"):
        if missing_packages(("accelerate",)):
            checks.skip(f"two devices {family}", "accelerate is not here")
            continue
        twins = tiny_twins(family, attentions(family, options.quick)[0], options.device)
        checks.run(f"two devices {family}", partial(check_spread, twins, options.device, size))
        answers = partial(check_spread_answers, twins.bfloat16, options.device, size)
        checks.run(f"two devices {family} bfloat16", answers)
    for bits in ("8bit", "4bit"):
        name = f"quantised {bits} llama"
        if missing_packages(("bitsandbytes",)):
            checks.skip(name, "bitsandbytes is not here")
        else:
            checks.run(
                name, partial(check_quantized, tiny_twins("llama", "sdpa", options.device), options.device, bits, size)
            )
    for kind in ("jumprelu", "topk"):
        name = f"sae-lens {kind}"
        if missing_packages(("sae_lens",)):
            checks.skip(name, "sae_lens is not here")
        else:
            checks.run(name, partial(check_sae_lens, options.device, kind))


# --- 8: memory ----------------------------------------------------------------------------------------------------


def allocated_at_most(work: Callable[[], object]) -> float:
    "GB that a piece of work adds on the GPU at its worst moment."
    work()  # cuBLAS takes its workspace once
    free_cached_memory()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def memory_measurement(estimate: float, measured: float) -> Measurement:
    values = {"estimate GB": estimate, "measured GB": measured}
    ratio = measured / estimate
    note = "measured, over the estimate" if ratio >= 0.2 else "the estimate is more than five times too high"
    return Measurement(ratio if ratio >= 0.2 else math.nan, 1.05, note, values)


def check_pass_estimate(lm: LM, rows: int, tokens: int) -> Measurement:
    batch = lm.tokenize(random_prompts(lm, [tokens] * rows))
    measured = allocated_at_most(partial(lm.logits, batch))
    return memory_measurement(estimate_pass_memory(lm, rows, tokens).beside, measured)


def check_generation_estimate(lm: LM, slots: int, prompt: int, new: int) -> Measurement:
    prompts = random_prompts(lm, [prompt] * slots)
    measured = allocated_at_most(partial(write_in_slots, lm, prompts, new, slots, layers=None))
    estimate = estimate_generation_memory(lm, slots, prompt, new, keep=lm.n_layers)
    return memory_measurement(estimate.beside, measured)


# --- 9: benches ---------------------------------------------------------------------------------------------------


def time_in_turns(ways: dict[str, Callable[[], object]], device: str, rounds: int = 3) -> dict[str, float]:
    "Median seconds of each, in alternating order, after a round that warms up."
    seconds = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name in list(ways) if turn % 2 else list(ways)[::-1]:
            synchronize(device)
            began = time.perf_counter()
            ways[name]()
            synchronize(device)
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(taken[1:]) for name, taken in seconds.items()}


def bench_sweep(lm: LM, device: str, n_tokens: int, stride: int) -> Measurement:
    "A sweep of the stream over all layers and positions; the naive way is timed on some layers, and scaled."
    pair = sweep_pair(lm, n_tokens, n_tokens - n_tokens // 4)
    every = list(range(lm.n_layers))
    some = every[::stride]
    ways = {
        "staircase": partial(sweep, lm, pair, "resid_pre", "staircase", every),
        "naive": partial(sweep, lm, pair, "resid_pre", "naive", some),
    }
    if not missing_packages(("transformer_lens",)):
        ways["transformer_lens"] = partial(sweep, lm, pair, "resid_pre", "transformer_lens", some)
    seconds = time_in_turns(ways, device)
    naive = seconds["naive"] * len(every) / len(some)
    values = {"staircase s": seconds["staircase"], "naive s": naive, "cells": len(every) * len(pair.positions)}
    if "transformer_lens" in seconds:
        values["transformer_lens s"] = seconds["transformer_lens"] * len(every) / len(some)
    return Measurement(naive / seconds["staircase"], 1.0, "times faster than naive", values, at_least=True)


def generate_batch(lm: LM, prompts: list[list[int]], new: int) -> None:
    ids = torch.tensor(prompts, device=lm.device)
    options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False)
    with torch.no_grad():
        lm.hf.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)


def bench_decoding(lm: LM, device: str, slots: int, new: int, alone: int) -> Measurement:
    "Tokens a second in slots, with steps replayed as a graph or not; by generate one prompt at a time, and on one batch of equal prompts."
    prompts = random_prompts(lm, [64] * slots)
    written = {}

    def in_slots():
        written["slots"] = sum(len(answer.tokens) for answer in write_in_slots(lm, prompts, new, slots))

    def graphed():
        answers = write_in_slots(lm, prompts, new, slots, graphed=True)
        written["slots graphed"] = sum(len(answer.tokens) for answer in answers)

    def one_at_a_time():
        written["generate"] = sum(len(generate_one(lm, prompt, new)) for prompt in prompts[:alone])

    batched = partial(generate_batch, lm, prompts, new)
    ways = {"slots": in_slots, "slots graphed": graphed, "generate": one_at_a_time, "generate batch": batched}
    seconds = time_in_turns(ways, device)
    written["generate batch"] = slots * new
    speeds = {f"{name} tokens/s": written[name] / seconds[name] for name in seconds}
    ratio = speeds["slots tokens/s"] / speeds["generate tokens/s"]
    values = speeds | {"over generate batch": speeds["slots tokens/s"] / speeds["generate batch tokens/s"]}
    return Measurement(ratio, 1.0, f"times faster than one at a time, {slots} slots", values, at_least=True)


def bench_sae(device: str, quick: bool) -> Measurement:
    "Training steps a second, in float32 and with products in bfloat16."
    d_model = 64 if quick else 2304
    config = SAETrainingConfig(d_sae=8 * d_model, k=32, batch=512 if quick else 4096)
    states = sparse_states(config.batch, d_model, device)
    trainers = {name: SAETrainer(config, states, getattr(torch, name), device) for name in ("float32", "bfloat16")}
    steps = 5 if quick else 30

    def train(trainer):
        for _ in range(steps):
            trainer.step(states, 0.5)

    seconds = time_in_turns({name: partial(train, trainer) for name, trainer in trainers.items()}, device)
    speeds = {f"{name} steps/s": steps / taken for name, taken in seconds.items()}
    note = f"steps/s in float32; {d_model} to {config.d_sae}, batches of {config.batch}"
    return Measurement(speeds["float32 steps/s"], 0.0, note, speeds, at_least=True)


def bench_latents(device: str, small: bool) -> Measurement:
    "States of a layer encoded and scored by the second: sums over portions, against all latents of all states at once."
    rows, d_model, d_sae = (200, 64, 1024) if small else (974, 2304, 16384)
    sae = on_device(dictionary(d_model, d_sae, "jumprelu"), device)
    states = torch.randn(rows, d_model, generator=torch.Generator().manual_seed(1))
    label = np.arange(rows) % 3 == 0
    scored = {}

    def in_portions():
        active = encode_active_latents(sae, states)
        scored["portions"] = separation_scores(active, label)["separation"].to_numpy()

    def at_once():
        active = (sae.encode(states.to(device)) > 0).float()
        is_right = torch.from_numpy(label).to(device)
        scored["at once"] = (active[is_right].mean(0) - active[~is_right].mean(0)).cpu().numpy()

    seconds = time_in_turns({"portions": in_portions, "at once": at_once}, device)
    speeds = {f"{name} rows/s": rows / taken for name, taken in seconds.items()}
    error = float(np.abs(scored["portions"] - scored["at once"]).max())
    return Measurement(error, 1e-5, f"largest difference of two scores; {rows} states, {d_sae} latents", speeds)


# --- all of it ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    "What is checked of a model."

    sweep: Callable[[Twins, str], Measurement]
    size: tuple[int, int, int]  # answers, tokens of each, slots
    places: tuple[str, ...] = EDIT_PLACES


def check_model(checks: Checks, name: str, twins: Twins, plan: Plan) -> None:
    "All checks of one model, in both dtypes."
    for dtype in ("float32", "bfloat16"):
        lm = getattr(twins, dtype)
        label = f"{name} {dtype}"
        checks.run(f"sweep {label}", partial(plan.sweep, twins, dtype))
        checks.run(f"decoding {label}", partial(check_decoding, lm, *plan.size))
        checks.run(f"graphed {label}", partial(check_graphed, lm, *plan.size))
        checks.run(f"states {label}", partial(check_states, twins, dtype, plan.size))
        if lm.device.type == "cuda":
            checks.run(f"waits {label}", partial(check_waits, lm))
        else:
            checks.skip(f"waits {label}", "there is no GPU to wait for")
        for where in plan.places:
            checks.run(f"steering {where} {label}", partial(check_steering, twins, dtype, where, plan.size))
        checks.run(f"ablation {label}", partial(check_ablation, lm))


def attentions(family: str, quick: bool) -> tuple[str, ...]:
    "Attention implementations that a family has; soft-capped attention has only eager."
    if "attn_logit_softcapping" in TINY_CONFIGS[family]:
        return ("eager",)
    return ("sdpa",) if quick and family not in ("llama", "gpt2") else ("sdpa", "eager")


def check_tiny_models(checks: Checks, options: argparse.Namespace) -> None:
    plan = Plan(partial(check_tiny_sweep, quick=options.quick), (6, 8, 4) if options.quick else (10, 12, 4))
    for family in TINY_CONFIGS:
        for attention in attentions(family, options.quick):
            try:
                twins = tiny_twins(family, attention, options.device)
            except Exception as error:
                checks.add(Result(f"build {family} {attention}", False, None, None, str(error), {}, 0.0))
                continue
            check_model(checks, f"{family} {attention}", twins, plan)


def check_saes(checks: Checks, options: argparse.Namespace) -> None:
    for dtype in ("float32", "bfloat16"):
        checks.run(f"sae {dtype}", partial(check_sae, options.device, getattr(torch, dtype)))
        if options.device != "cpu" or dtype != "float32":
            checks.run(f"sae steps {dtype}", partial(check_sae_steps, options.device, getattr(torch, dtype)))


def check_real_shapes(checks: Checks, options: argparse.Namespace) -> None:
    small = options.quick or options.device == "cpu"
    plan = Plan(check_real_sweep, (4, 8, 4) if small else (6, 12, 4), ("last_prompt", "all"))
    for shape in REAL_SHAPES:
        card_gb = torch.cuda.get_device_properties(0).total_memory / 1e9 if options.device == "cuda" else math.inf
        if not small and card_gb < _TWINS_GB.get(shape, 0):
            checks.skip(shape, f"the GPU has {card_gb:.0f} GB, and its twins need {_TWINS_GB[shape]}")
            continue
        try:
            twins = real_shape_twins(shape, options.device, small)
        except Exception as error:
            checks.add(Result(f"build {shape}", False, None, None, f"{type(error).__name__}: {error}", {}, 0.0))
            continue
        label = shape + (" (small)" if small else "")
        check_model(checks, label, twins, plan)
        check_memory(checks, label, twins, options.device)
        lm = twins.bfloat16
        del twins  # the float32 model takes twice as much again
        free_cached_memory()
        bench_model(checks, label, lm, options.device, small)
        del lm
        free_cached_memory()


def check_memory(checks: Checks, label: str, twins: Twins, device: str) -> None:
    for dtype in ("float32", "bfloat16"):
        names = (f"memory pass {label} {dtype}", f"memory generation {label} {dtype}")
        if device != "cuda":
            for name in names:
                checks.skip(name, "only a GPU counts what is allocated")
            continue
        lm = getattr(twins, dtype)
        checks.run(names[0], partial(check_pass_estimate, lm, 16, 256))
        checks.run(names[1], partial(check_generation_estimate, lm, 16, 128, 24))


def bench_model(checks: Checks, label: str, lm: LM, device: str, small: bool) -> None:
    tokens, stride = (12, 2) if small else (48, 9)
    checks.run(f"bench sweep {label}", partial(bench_sweep, lm, device, tokens, stride))
    slots, new, alone = (4, 8, 2) if small else (32, 48, 4)
    checks.run(f"bench decoding {label}", partial(bench_decoding, lm, device, slots, new, alone))


def card_name(device: str) -> str:
    return torch.cuda.get_device_name().replace(" ", "-").lower() if device == "cuda" else "cpu"


def describe_machine(options: argparse.Namespace) -> dict:
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "numpy")}
    return {
        "card": card_name(options.device),
        "device": options.device,
        "quick": options.quick,
        "python": sys.version.split()[0],
        "cuda": torch.version.cuda,
        "versions": versions,
        "borrowed": BORROWED,
        "missing": missing_packages(OPTIONAL),
        "float32_matmul": torch.get_float32_matmul_precision(),
    }


def write_report(checks: Checks, machine: dict, path: Path) -> None:
    report = machine | {
        "seconds": round(time.monotonic() - checks.began, 1),
        "checks": [asdict(result) for result in checks.results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, default=float) + "\n")


def print_summary(checks: Checks, path: Path) -> int:
    "The last lines; how many checks failed."
    skipped = [result for result in checks.results if result.passed is None]
    failed = [result for result in checks.results if result.passed is not None and not result.passed]
    print("\n# benches")
    for result in checks.results:
        if result.name.startswith("bench") and result.passed is not None:
            print(line_of(result))
    print("\n# summary")
    for result in [*failed, *skipped]:
        print(line_of(result))
    passed = len(checks.results) - len(failed) - len(skipped)
    taken = time.monotonic() - checks.began
    print(f"{passed} passed, {len(failed)} failed, {len(skipped)} not run, in {taken:.0f} s; written to {path}")
    return len(failed)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small models and few rounds")
    parser.add_argument("--only", default="", metavar="TEXT", help="checks whose name holds this, such as 'bench'")
    parser.add_argument("--limit", type=float, default=450, metavar="SECONDS", help="start no check after this time")
    parser.add_argument("--out", type=Path, help="default: bench/results/<card>.json")
    return parser.parse_args()


def main() -> int:
    options = read_options()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no GPU here; use --device cpu --quick")
    transformers.logging.set_verbosity_error()
    machine = describe_machine(options)
    print(json.dumps(machine), flush=True)
    path = options.out or HOME / "bench" / "results" / f"{machine['card']}.json"
    checks = Checks(options.limit, options.only)
    try:
        check_saes(checks, options)
        check_other_forms(checks, options)
        check_tiny_models(checks, options)
        small = options.quick or options.device == "cpu"
        checks.run("bench sae", partial(bench_sae, options.device, small))
        checks.run("bench latents", partial(bench_latents, options.device, small))
        check_real_shapes(checks, options)
    finally:
        write_report(checks, machine, path)
    return 1 if print_summary(checks, path) else 0


if __name__ == "__main__":
    sys.exit(main())
