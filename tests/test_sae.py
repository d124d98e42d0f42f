"""SAEs against sae-lens: each reads what the other wrote, and both say the same."""

from dataclasses import replace

import pytest
import torch

from codetrace.sae.loading import SAE_RELEASES, NoSAE, load_sae, load_sae_folder, sae_release
from codetrace.sae.sae import ACTIVATION_FUNCTIONS, SAE, random_sae
from codetrace.sae.training import SAETrainer, SAETrainingConfig

sae_lens = pytest.importorskip("sae_lens", reason="pip install -c constraints.txt 'codetrace[saes]'")


def of_kind(kind: str) -> SAE:
    made = random_sae(
        24,
        96,
        5,
        seed=1,
        centre=torch.randn(24, generator=torch.Generator().manual_seed(2)),
        hook_name="blocks.3.hook_resid_post",
        model_name="gpt2",
    )
    made = replace(made, b_enc=0.1 * torch.randn(96, generator=torch.Generator().manual_seed(3)))
    if kind == "topk":
        return made
    return replace(made, activation=kind, k=0, threshold=torch.full((96,), 0.7) if kind == "jumprelu" else None)


@pytest.mark.parametrize("kind", ACTIVATION_FUNCTIONS)
def test_sae_lens_reads_what_codetrace_writes(tmp_path, kind):
    ours = of_kind(kind)
    theirs = sae_lens.SAE.load_from_disk(ours.save(tmp_path))
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(4))
    assert torch.allclose(theirs.encode(x), ours.encode(x), atol=1e-5)
    assert torch.allclose(theirs.decode(theirs.encode(x)), ours.decode(ours.encode(x)), atol=1e-5)
    assert theirs.cfg.metadata.hook_name == "blocks.3.hook_resid_post"


@pytest.mark.parametrize("kind", ACTIVATION_FUNCTIONS)
def test_codetrace_reads_what_sae_lens_writes(tmp_path, kind):
    theirs = sae_lens.SAE.load_from_disk(of_kind(kind).save(tmp_path / "a"))
    theirs.save_model(tmp_path / "b")
    ours = load_sae_folder(tmp_path / "b")
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(4))
    assert torch.allclose(ours.encode(x), theirs.encode(x), atol=1e-5)
    assert ours.check_site("resid_post", 3, "gpt2") is ours


def test_a_trained_topk_of_sae_lens_is_folded(tmp_path):
    "Their trainer scales activations by decoder norms, and folds that when it saves."
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    theirs = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=24, d_sae=96, k=5))
    theirs.save_inference_model(tmp_path)
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(4))
    assert torch.allclose(load_sae_folder(tmp_path).encode(x), theirs.encode(x), atol=1e-5)


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        ("google/gemma-2-2b", 20),
        ("google/gemma-3-1b-pt", 3),
        ("meta-llama/Llama-3.1-8B", 15),
        ("Qwen/Qwen3-1.7B-Base", 7),
    ],
)
def test_the_releases_exist(model, layer):
    "What codetrace takes a model's SAE to be is in sae-lens's own list, for that model."
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    release, sae_id = sae_release(model, layer)
    known = get_pretrained_saes_directory()[release]
    assert sae_id in known.saes_map and model.split("/")[-1].lower() in known.model.lower()


def test_every_release_is_known_to_sae_lens():
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = get_pretrained_saes_directory()
    assert [model for model, (release, _) in SAE_RELEASES.items() if release not in known] == []


def test_unknown_releases_are_named():
    with pytest.raises(NoSAE, match="nonsense:layer_1"):
        load_sae("nonsense:layer_1")


def test_the_auxiliary_loss_revives_latents():
    "The same training with and without it, from a beginning where most latents are hardly ever active."
    random = torch.Generator().manual_seed(0)
    basis = torch.nn.functional.normalize(torch.randn(64, 32, generator=random), dim=1)
    amounts = (torch.rand(6000, 64, generator=random) < 0.05).float()
    states = amounts @ basis + 0.02 * torch.randn(6000, 32, generator=random)
    dead = {}
    for aux in (0.0, 1 / 8):
        config = SAETrainingConfig(
            d_sae=256, k=3, passes=6, batch=256, lr=3e-3, aux_weight=aux, k_aux=64, dead_after=2000
        )
        trainer = SAETrainer(config, states, torch.float32)
        with torch.no_grad():
            trainer.weights["b_enc"][:200] = -2  # not among the largest, but positive now and then
        for i in range(120):
            trainer.step(states[(i * 256) % 5600 : (i * 256) % 5600 + 256], 0.5)
        dead[aux] = int((trainer.to_sae().encode(states[:2000]) > 0).any(0).logical_not().sum())
    assert dead[1 / 8] < 0.7 * dead[0.0], dead
