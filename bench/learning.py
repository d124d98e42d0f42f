"""Learning a dictionary against sae-lens's own trainer, on the same batches. The last line is JSON.

    python bench/learning.py              576 → 4096, TopK 32, batches of 512, two threads (two minutes)

Both train TopK with an auxiliary loss on the same made-up states, in turn, ten steps each; the ratio is that of the medians. sae-lens runs as it does by default, in float32; codetrace in the
dtype that this machine multiplies faster, as it does by default, and in float32 beside it.
"""

import argparse
import json
import statistics
import time

import torch

from codetrace.models.loading import resolve_dtype
from codetrace.sae.training import SAETrainer, SAETrainingConfig


def theirs(recipe: SAETrainingConfig, steps: int):
    "sae-lens's trainer and SAE; steps are taken by hand."
    from sae_lens import LoggingConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=576, d_sae=recipe.d_sae, k=recipe.k))
    config = SAETrainerConfig(
        steps * recipe.batch,
        recipe.batch,
        lr=recipe.lr,
        lr_end=recipe.lr,
        logger=LoggingConfig(log_to_wandb=False),
        dead_feature_window=40,
    )
    return sae, SAETrainer(cfg=config, sae=sae, data_provider=iter(()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = SAETrainingConfig()
    each = 10
    random = torch.Generator().manual_seed(0)
    basis = torch.randn(2000, 576, generator=random) / 24
    states = torch.cat([(torch.rand(512, 2000, generator=random) < 0.01).float() @ basis for _ in range(40)])
    fast = resolve_dtype("auto", torch.device("cpu"))
    learners = {
        "codetrace": SAETrainer(recipe, states, fast),
        "codetrace float32": SAETrainer(recipe, states, torch.float32),
    }
    sae, trainer = theirs(recipe, 10_000)
    seconds = {name: [] for name in [*learners, "sae-lens"]}
    for turn in range(options.rounds):
        batches = states[torch.randint(len(states), (each, recipe.batch), generator=random)]
        for name in seconds:
            began = time.perf_counter()
            for x in batches:
                if name == "sae-lens":
                    trainer._train_step(sae=sae, sae_in=x)
                    trainer.n_training_steps += 1
                else:
                    learners[name].step(x, 0.5)
            seconds[name].append((time.perf_counter() - began) / each)
        print(
            f"round {turn}: "
            + ", ".join(f"{name} {recipe.batch / s[-1]:,.0f} states/s" for name, s in seconds.items()),
            flush=True,
        )
    middle = {name: statistics.median(s[1:]) for name, s in seconds.items()}
    print(
        json.dumps(
            {
                "vs_sae_lens": round(middle["sae-lens"] / middle["codetrace"], 2),
                "vs_sae_lens_float32": round(middle["sae-lens"] / middle["codetrace float32"], 2),
                "dtype": str(fast),
            }
        )
    )


if __name__ == "__main__":
    main()
