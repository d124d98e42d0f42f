"""How much faster do slots write answers than Hugging Face's `generate`, and what does it cost to keep the states? The last line is JSON.

    python bench/generate.py            SmolLM2 on 64 basics problems, 32 at a time, about fifteen minutes on two idle cores
    python bench/generate.py --quick    16 problems, 64 tokens: a few minutes
    python bench/generate.py --profile  only: where the time of slots goes, which bench/results/generation_profile.json keeps of each model

Four ways to the same greedy answers, in one process, on the same prompts, alternating chunk by chunk; a ratio is that of the summed times:

* sequential: one problem at a time through `model.generate`;
* batched: `model.generate` on left-padded batches of as many prompts as there are slots, sorted by length, finished rows padded until the last is over;
* slots: `codetrace.decoding`, no states kept;
* capture: the same, and the states of all layers at all three places kept.

All of them stop an answer when its code is complete, by the same rule: for `generate` a stopping criterion for each row. `identical` is the share of
answers in float32 whose tokens are those of the sequential way, rows of `generate` cut where they were over; the others are listed with the difference of the
two candidate logits where they part. `agreement` is the same in bfloat16, where rounding decides ties. The machine's limit is the slower of two things for
a step of all slots: to read the weights once (bandwidth, measured by reading as much memory), and to multiply (measured by one large product).
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch

from codetrace import models
from codetrace.models import decoding
from codetrace.models.decoding import Decoder, Request
from codetrace.tasks.problem_prompts import render_problem_prompt
from codetrace.tasks.problems import load_problems
from codetrace.tasks.sampled_solutions import answer_stop_condition


def say(**facts):
    print(json.dumps(facts), flush=True)


def requests_of(lm, n: int) -> list[Request]:
    "Prompts of the first problems, the longest first."
    requests = []
    for p in load_problems("basics", n):
        prompt = render_problem_prompt(p)
        over, marks = answer_stop_condition(prompt, p.entry_point)
        requests.append(Request(lm.ids([prompt.text])[0], p.task_id, 0.0, over, marks))
    return sorted(requests, key=lambda request: -len(request.ids))


class Over:
    "The stopping criterion of a padded batch: for each row, whether its code is complete."

    def __init__(self, lm, batch: list[Request], width: int):
        self.lm = lm
        self.batch = batch
        self.width = width
        self.at = [None] * len(batch)  # how many tokens each has when it is over

    def __call__(self, ids, scores, **_):
        for row, request in enumerate(self.batch):
            if self.at[row] is None:
                new = ids[row, self.width :].tolist()
                piece = self.lm.tokenizer.decode(new[-1:], clean_up_tokenization_spaces=False)
                if any(mark in piece for mark in request.marks) and request.over(self.lm._text(list(request.ids), new)):
                    self.at[row] = len(new)
        return torch.tensor([length is not None for length in self.at], device=ids.device)


def hugging_face(lm, requests: list[Request], most: int, size: int) -> dict:
    "Tokens of each answer through `model.generate`, so many prompts at a time."
    from transformers import StoppingCriteriaList

    out = {}
    for start in range(0, len(requests), size):
        batch = requests[start : start + size]
        padded = lm.tokenize([request.ids for request in batch])
        width = padded.input_ids.shape[1]
        over = None
        over = Over(lm, batch, width)
        written = lm.hf.generate(
            input_ids=padded.input_ids,
            attention_mask=padded.attention_mask,
            max_new_tokens=most,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([over]),
            pad_token_id=lm.tokenizer.pad_token_id,
        )
        for row, (request, length) in enumerate(zip(batch, over.at)):
            new = written[row, width:].tolist()[:length]
            end = next((i for i, token in enumerate(new) if token in lm._ends()), len(new))
            out[request.key] = new[:end]
    return out


def in_slots(lm, requests: list[Request], most: int, slots: int, layers) -> dict:
    return {c.request.key: c.tokens for c in Decoder(lm, requests, most, slots, layers)}


def raced(lm, requests: list[Request], options) -> tuple[dict, dict]:
    "Seconds and answers of all contestants; they take turns on chunks of four batches."
    ways = {
        "sequential": lambda chunk: hugging_face(lm, chunk, options.tokens, 1),
        "batched": lambda chunk: hugging_face(lm, chunk, options.tokens, options.slots),
        "slots": lambda chunk: in_slots(lm, chunk, options.tokens, options.slots, ()),
        "capture": lambda chunk: in_slots(lm, chunk, options.tokens, options.slots, None),
    }
    seconds = {way: [] for way in ways}
    answers = {way: {} for way in ways}
    for way in ways.values():  # warm
        way(requests[:1])
    size = 4 * options.slots
    for n, start in enumerate(range(0, len(requests), size)):
        chunk = requests[start : start + size]
        names = list(ways) if n % 2 else list(ways)[::-1]
        for way in [*names, *(("slots", "capture", "capture", "slots", "slots", "capture") if options.repeat else ())]:
            began = time.perf_counter()
            answers[way] |= ways[way](chunk)
            seconds[way].append((n, time.perf_counter() - began))
        say(chunk=n, **{way: [round(s, 2) for m, s in taken if m == n] for way, taken in seconds.items()})
    chunks = range(-(-len(requests) // size))
    median = {way: [statistics.median(s for m, s in taken if m == n) for n in chunks] for way, taken in seconds.items()}
    return {way: sum(taken) for way, taken in median.items()}, answers


def agreement(lm, requests: list[Request], tokens_by_key: dict, compared_tokens_by_key: dict) -> tuple[float, list]:
    "The share of equal answers, and for the others how far apart the two next tokens were."
    apart = []
    for request in requests:
        a = tokens_by_key[request.key]
        b = compared_tokens_by_key[request.key]
        if a != b:
            position = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
            logits = lm.logits([[*request.ids, *a[:position]]])[0]
            picked = [
                logits[tokens[position]] if position < len(tokens) else logits[list(lm._ends())].max()
                for tokens in (a, b)
            ]
            apart.append(
                {
                    "task": request.key,
                    "token": position,
                    "logit_difference": round(abs(float(picked[0] - picked[1])), 6),
                }
            )
    return 1 - len(apart) / len(requests), apart


def limit(lm, slots: int) -> dict:
    "Tokens a second that the machine could write: bandwidth, arithmetic."
    weights = sum(p.numel() for p in {id(p): p for p in lm.hf.parameters()}.values())
    size = torch.empty(0, dtype=lm.dtype).element_size()
    block = torch.ones(64 * 2**20)  # 256 MB: more than a cache holds
    a = torch.ones(1024, 1024, dtype=lm.dtype)
    b = torch.ones(1024, 1024, dtype=lm.dtype)

    def fastest(do, n=5):
        taken = []
        for _ in range(n):
            began = time.perf_counter()
            do()
            taken.append(time.perf_counter() - began)
        return min(taken)

    bandwidth = block.numel() * 4 / fastest(block.sum)
    arithmetic = 2 * 1024**3 / fastest(lambda: a @ b)
    step = max(weights * size / bandwidth, slots * 2 * weights / arithmetic)
    return {
        "gb_per_second": round(bandwidth / 1e9, 1),
        "gflops": round(arithmetic / 1e9),
        "tokens_per_second_limit": round(slots / step),
    }


KERNELS = {
    "products": ("mkldnn::_linear_pointwise", "aten::addmm", "aten::mm", "aten::bmm", "mkl::_mkl_linear"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
}


def seconds_of_parts(lm, requests: list[Request], options) -> dict[str, float]:
    "Seconds in each part of the decoder, states of all layers kept."
    seconds = dict.fromkeys(("reading prompts", "forward steps", "choosing tokens"), 0.0)

    def timed(part: str, do):
        def call(*args, **kwargs):
            began = time.perf_counter()
            try:
                return do(*args, **kwargs)
            finally:
                seconds[part] += time.perf_counter() - began

        return call

    with (
        patch.object(decoding, "_prefill_prompt", timed("reading prompts", decoding._prefill_prompt)),
        patch.object(decoding, "slot_step", timed("forward steps", decoding.slot_step)),
        patch.object(decoding, "choose_tokens", timed("choosing tokens", decoding.choose_tokens)),
    ):
        began = time.perf_counter()
        answers = in_slots(lm, requests, options.tokens, options.slots, None)
        total = time.perf_counter() - began
    return seconds | {"total": total, "tokens": sum(map(len, answers.values()))}


def seconds_of_kernels(lm, requests: list[Request], options) -> dict[str, float]:
    "Seconds that torch's profiler counts in each kind of kernel, of the same answers."
    began = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        in_slots(lm, requests, options.tokens, options.slots, None)
    total = time.perf_counter() - began
    by_kernel = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
    kinds = {kind: sum(by_kernel.get(name, 0.0) for name in names) for kind, names in KERNELS.items()}
    return kinds | {"other kernels": sum(by_kernel.values()) - sum(kinds.values()), "total": total}


def profiled(lm, requests: list[Request], options) -> dict:
    "Where the time goes, beside what the machine allows: shares of three runs' middle one by part, and of a run that a profiler slows by kernel."
    in_slots(lm, requests[:1], options.tokens, options.slots, None)
    parts = [seconds_of_parts(lm, requests, options) for _ in range(3)]
    middle = sorted(parts, key=lambda part: part["total"])[1]
    kernels = seconds_of_kernels(lm, requests, options)
    bounds = limit(lm, options.slots)
    speed = middle["tokens"] / middle["total"]
    shares = {name: middle[name] / middle["total"] for name in ("reading prompts", "forward steps", "choosing tokens")}
    shares |= {name: kernels[name] / kernels["total"] for name in (*KERNELS, "other kernels")}
    return {
        "model": lm.name.rsplit("/", 1)[-1].removesuffix(".gguf"),
        "slots": options.slots,
        "threads": torch.get_num_threads(),
        "tokens per second": round(speed, 1),
        **bounds,
        **{name: round(share, 3) for name, share in shares.items()},
    }


def keep_profile(row: dict) -> None:
    "Print a row, and keep it in place of the one of the same model and slots."
    path = Path(__file__).parent / "results" / "generation_profile.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    others = [known for known in rows if (known["model"], known["slots"]) != (row["model"], row["slots"])]
    path.write_text(json.dumps([*others, row], indent=1) + "\n")
    say(**row)


def main():
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--model", default="smollm2")
    ask.add_argument("--problems", type=int, default=64)
    ask.add_argument("--tokens", type=int, default=120, help="most tokens of an answer")
    ask.add_argument("--slots", type=int, default=32)
    ask.add_argument("--dtype", default="auto")
    ask.add_argument("--quick", action="store_true")
    ask.add_argument("--profile", action="store_true", help="only say where the time of slots goes")
    ask.add_argument("--no-repeat", dest="repeat", action="store_false", help="time slots and capture once a chunk")
    options = ask.parse_args()
    if options.quick:
        options.problems = 16
        options.tokens = 64
        options.slots = 8
    lm = models.load(options.model, dtype=options.dtype)
    requests = requests_of(lm, options.problems)
    say(
        model=lm.name, dtype=str(lm.dtype), threads=torch.get_num_threads(), problems=len(requests), slots=options.slots
    )
    if options.profile:
        return keep_profile(profiled(lm, requests, options))
    seconds, answers = raced(lm, requests, options)
    tokens = sum(map(len, answers["slots"].values()))
    bounds = limit(lm, options.slots)
    share, apart = agreement(lm, requests, answers["sequential"], answers["slots"])
    say(
        dtype=str(lm.dtype),
        agreement=share,
        batched_agreement=agreement(lm, requests, answers["sequential"], answers["batched"])[0],
        apart=apart,
    )
    exact = share
    ties = apart
    if lm.dtype != torch.float32:
        full = models.load(options.model, dtype="float32")
        some = requests[:: max(1, len(requests) // 32)]
        one_by_one = hugging_face(full, some, options.tokens, 1)
        exact, ties = agreement(full, some, one_by_one, in_slots(full, some, options.tokens, options.slots, None))
        say(dtype="torch.float32", identical=exact, apart=ties, n=len(some))
    speed = tokens / seconds["slots"]
    say(**bounds, share_of_limit=round(speed / bounds["tokens_per_second_limit"], 3))
    say(
        vs_sequential=round(seconds["sequential"] / seconds["slots"], 2),
        vs_batched=round(seconds["batched"] / seconds["slots"], 2),
        capture_overhead=round(seconds["capture"] / seconds["slots"] - 1, 4),
        identical=round(exact, 4),
        ties=sum(tie["logit_difference"] < 1e-3 for tie in ties),
        agreement=round(share, 4),
        tokens_per_second=round(speed, 1),
        limit=bounds["tokens_per_second_limit"],
    )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import logging

    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    main()
