"""Scores of every latent of every layer against the usual loop over npz files, and a thousand shuffles against one pass. The last line is JSON.

    python bench/latents.py               974 samples, 30 layers, 16,384 latents (three minutes, nearly all of it in the loop)
    python bench/latents.py --layers 3    a quick look

The contestants alternate layer by layer in one process, on the same states and the same dictionary, and must agree:
the loop opens one npz a task and layer, encodes its state as sae-lens does, with torch, and collects the activations by label, in `correct/` and `incorrect/`, as the project's notes lay them out;
codetrace reads a layer from one safetensors file, encodes portions of rows, and takes sums. Then come the shuffles, and memory, in a process of its own.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy import stats

from codetrace.sae.null_of_maximum import (
    null_of_maximum,
    null_of_maximum_t,
    permutation_design,
    permute_labels,
    weighted_labels,
)
from codetrace.sae.sae import SAE
from codetrace.sae.separation import encode_active_latents, separation_scores

D_MODEL = 576
ACTIVE = 64


def dictionary(d_sae: int) -> SAE:
    "Random directions with a threshold that about `ACTIVE` latents are above, as a JumpReLU dictionary has it."
    random = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(d_sae, D_MODEL, generator=random), dim=1)
    threshold = torch.full((d_sae,), float(stats.norm.ppf(1 - ACTIVE / d_sae)))
    zeros = torch.zeros(d_sae), torch.zeros(D_MODEL)
    return SAE(directions.T.contiguous(), directions, *zeros, "jumprelu", threshold=threshold)


def write(folder: Path, rows: int, layers: int, label: np.ndarray) -> None:
    "The same states twice: a file for all, and a file a task and layer."
    random = torch.Generator().manual_seed(1)
    states = {f"resid_post.{layer}": torch.randn(rows, D_MODEL, generator=random) for layer in range(layers)}
    save_file(states, folder / "states.safetensors")
    for name in ("correct", "incorrect"):
        (folder / name).mkdir()
    for layer in range(layers):
        for i, x in enumerate(states[f"resid_post.{layer}"].numpy()):
            np.savez(folder / ("correct" if label[i] else "incorrect") / f"{i}_layer_{layer}.npz", x)


def read(folder: Path, layer: int) -> np.ndarray:
    with safe_open(folder / "states.safetensors", "pt") as file:
        return file.get_tensor(f"resid_post.{layer}").numpy()


def loop(folder: Path, layer: int, rows: int, label: np.ndarray, sae: SAE) -> tuple[np.ndarray, np.ndarray]:
    "Separation and t of a layer, one file after the other."
    activations_by_label = {True: [], False: []}
    for i in range(rows):
        with np.load(folder / ("correct" if label[i] else "incorrect") / f"{i}_layer_{layer}.npz") as file:
            raw = torch.from_numpy(file["arr_0"])[None] @ sae.W_enc + sae.b_enc
        activations_by_label[bool(label[i])].append((raw.relu() * (raw > sae.threshold))[0].numpy())
    right = np.stack(activations_by_label[True])
    wrong = np.stack(activations_by_label[False])
    with np.errstate(invalid="ignore"):
        t = stats.ttest_ind(right, wrong, equal_var=False).statistic
    return (right > 0).mean(0) - (wrong > 0).mean(0), t


def child(folder: Path, layers: int, d_sae: int) -> None:
    "All layers and their shuffles in this process; its peak memory, in GB."
    label = np.load(folder / "label.npy")
    sae = dictionary(d_sae)
    design = permutation_design(label, np.arange(len(label)))
    shuffled = permute_labels(design, 1000)
    for layer in range(layers):
        active = encode_active_latents(sae, read(folder, layer))
        separation_scores(active, label)
        null_of_maximum(active, weighted_labels(design, shuffled))
        null_of_maximum_t(active, shuffled)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=974)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--latents", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        return child(Path(options.child), options.layers, options.latents)
    seconds = {"loop": 0.0, "pass": 0.0, "null": 0.0}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sae = dictionary(options.latents)
        label = np.random.default_rng(0).random(options.rows) < 0.3
        np.save(folder / "label.npy", label)
        write(folder, options.rows, options.layers, label)
        design = permutation_design(label, np.arange(options.rows))
        shuffled = permute_labels(design, 1000)
        for layer in range(options.layers):
            began = time.perf_counter()
            separation, t = loop(folder, layer, options.rows, label, sae)
            seconds["loop"] += time.perf_counter() - began
            began = time.perf_counter()
            active = encode_active_latents(sae, read(folder, layer))
            table = separation_scores(active, label)
            seconds["pass"] += time.perf_counter() - began
            began = time.perf_counter()
            null_of_maximum(active, weighted_labels(design, shuffled))
            null_of_maximum_t(active, shuffled)
            seconds["null"] += time.perf_counter() - began
            apart = np.abs(table["separation"] - separation) > 1e-6  # a row at the threshold but for rounding
            assert apart.sum() <= 5 and np.abs(table["separation"] - separation).max() < 1.1 / min(
                sum(label), sum(~label)
            )
            both = ~np.isnan(t) & ~table["t"].isna()
            both &= ~apart
            assert both.mean() > 0.9 and np.allclose(table["t"][both], t[both], atol=1e-2)
            print(
                f"layer {layer}: " + ", ".join(f"{k} {v / (layer + 1):.3f} s" for k, v in seconds.items()), flush=True
            )
        words = [
            sys.executable,
            __file__,
            "--child",
            name,
            "--layers",
            str(options.layers),
            "--latents",
            str(options.latents),
        ]
        peak = float(
            subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ).stdout.split()[-1]
        )
    print(
        json.dumps(
            {
                "vs_npz_loop": round(seconds["loop"] / seconds["pass"], 1),
                "null_over_pass": round(seconds["null"] / seconds["pass"], 2),
                "peak_memory_gb": round(peak, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
