"""SAEs against sae-lens: each reads what the other wrote, and both say the same."""

import json
from dataclasses import replace

import pytest
import torch

from codetrace.sae import loading as sae_loading
from codetrace.sae.loading import SAE_RELEASES, NoSAE, load_sae, load_sae_folder, sae_release
from codetrace.sae.sae import ACTIVATION_FUNCTIONS, SAE, WrongHook, random_sae
from codetrace.sae.sae_lens_files import NotAnSAE
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


RANDOM = torch.Generator().manual_seed(0)
STATES = torch.randn(50, 16, generator=RANDOM) * 2
WEIGHTS = {"W_enc": torch.randn(16, 64, generator=RANDOM), "W_dec": torch.randn(64, 16, generator=RANDOM)}
WEIGHTS |= {"b_enc": torch.randn(64, generator=RANDOM) * 0.5, "b_dec": torch.randn(16, generator=RANDOM)}
THRESHOLD = {"threshold": torch.rand(64, generator=RANDOM)}
GATED = {name: WEIGHTS[name] for name in ("W_enc", "W_dec", "b_dec")}
GATED |= {name: torch.randn(64, generator=RANDOM) * 0.5 for name in ("b_gate", "b_mag", "r_mag")}
OLD = {  # As sae-lens wrote it before version 6
    **{"d_in": 16, "d_sae": 64, "dtype": "float32", "device": "cpu", "model_name": "gpt2-small", "hook_layer": 3},
    **{"hook_name": "blocks.3.hook_resid_pre", "prepend_bos": True, "context_size": 128, "dataset_path": "x"},
}
OLDEST = {name: value for name, value in OLD.items() if name != "hook_name"} | {"hook_point": "blocks.3.hook_resid_pre"}
NEW = {  # As it writes it now
    **{"d_in": 16, "d_sae": 64, "dtype": "float32", "device": "cpu", "reshape_activations": "none"},
    "metadata": {"sae_lens_version": "6.54.12", "model_name": "gpt2-small", "hook_name": "blocks.3.hook_resid_pre"},
}
TOPK_STR = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 8}}
ONES = {"scaling_factor": torch.ones(64)}
FOLDERS = {  # A configuration, and weights
    "oldest": (OLDEST, WEIGHTS),
    "oldest normalised by name": (OLDEST | {"normalize_activations": False}, WEIGHTS),
    "oldest normalised": (OLDEST | {"normalize_activations": True}, WEIGHTS),
    "old without apply_b_dec_to_input": (OLD | {"architecture": "standard"}, WEIGHTS),
    "old with apply_b_dec_to_input": (OLD | {"apply_b_dec_to_input": False}, WEIGHTS),
    "old with a scaling factor": (OLD | {"finetuning_scaling_factor": True}, WEIGHTS | ONES),
    "old with nulls": (OLD | {"normalize_activations": None, "neuronpedia_id": None}, WEIGHTS),
    "old relu by name": (OLD | {"activation_fn_str": "relu", "activation_fn_kwargs": {}}, WEIGHTS),
    "old topk by name": (OLD | TOPK_STR | {"architecture": "standard"}, WEIGHTS),
    "old topk by name, centred": (OLD | TOPK_STR | {"apply_b_dec_to_input": True}, WEIGHTS),
    "old topk": (OLD | {"architecture": "topk", "activation_fn_kwargs": {"k": 8}}, WEIGHTS),
    "old gated": (OLD | {"architecture": "gated"}, GATED),
    "old jumprelu": (OLD | {"architecture": "jumprelu"}, WEIGHTS | THRESHOLD),
    "new standard": (NEW | {"architecture": "standard"}, WEIGHTS),
    "new standard, half": (NEW | {"architecture": "standard", "dtype": "bfloat16"}, WEIGHTS),
    "new standard, torch.float32": (NEW | {"architecture": "standard", "apply_b_dec_to_input": False}, WEIGHTS),
    "new gated": (NEW | {"architecture": "gated", "apply_b_dec_to_input": False}, GATED),
    "new jumprelu": (NEW | {"architecture": "jumprelu"}, WEIGHTS | THRESHOLD),
    "new topk": (NEW | {"architecture": "topk", "k": 8}, WEIGHTS),
    "new topk rescaled": (NEW | {"architecture": "topk", "k": 8, "rescale_acts_by_decoder_norm": True}, WEIGHTS),
    "scaled on average": (
        NEW | {"architecture": "standard", "normalize_activations": "expected_average_only_in"},
        WEIGHTS,
    ),
}


def written(folder, config: dict, weights: dict):
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_of_every_version_give_what_sae_lens_gives(tmp_path, monkeypatch, kind, installed):
    folder = written(tmp_path / "sae", *FOLDERS[kind])
    theirs = sae_lens.SAE.load_from_disk(folder).to(torch.float32)
    theirs.cfg.dtype = "float32"
    if not installed:
        monkeypatch.setattr(sae_loading.importlib.util, "find_spec", lambda name: None)
    ours = load_sae_folder(folder)
    latents = theirs.encode(STATES).detach()
    close = dict(atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.encode(STATES), latents, **close)
    if not theirs.cfg.to_dict().get("rescale_acts_by_decoder_norm"):
        torch.testing.assert_close(ours.decode(latents), theirs.decode(latents).detach(), **close)
    assert ours.check_site("resid_post", 2, "gpt2") is ours


TRAINED = {  # What sae-lens's trainer holds, by class
    "standard": ("standard_sae", "StandardTrainingSAE", {}),
    "gated": ("gated_sae", "GatedTrainingSAE", {}),
    "topk": ("topk_sae", "TopKTrainingSAE", {"k": 5}),
    "jumprelu": ("jumprelu_sae", "JumpReLUTrainingSAE", {}),
    "batchtopk": ("batchtopk_sae", "BatchTopKTrainingSAE", {"k": 5}),
    "matryoshka": (
        "matryoshka_batchtopk_sae",
        "MatryoshkaBatchTopKTrainingSAE",
        {"k": 5, "matryoshka_widths": [32, 64]},
    ),
}


@pytest.mark.parametrize("kind", TRAINED)
def test_trained_saes_of_every_architecture(tmp_path, kind):
    "Saved for use, and saved as they stand in the middle of training."
    from importlib import import_module

    module, name, options = TRAINED[kind]
    library = import_module(f"sae_lens.saes.{module}")
    theirs = getattr(library, name)(getattr(library, f"{name}Config")(d_in=16, d_sae=64, **options))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.1)
    if hasattr(theirs, "topk_threshold"):
        theirs.topk_threshold = torch.tensor(1.5, dtype=torch.double)
    theirs.save_inference_model(tmp_path / "use")
    for_use = sae_lens.SAE.load_from_disk(tmp_path / "use")
    ours = load_sae_folder(tmp_path / "use")
    torch.testing.assert_close(ours.encode(STATES), for_use.encode(STATES), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.decode(ours.encode(STATES)), for_use(STATES), atol=1e-4, rtol=1e-4)
    theirs.save_model(tmp_path / "training")
    between = load_sae_folder(tmp_path / "training")
    torch.testing.assert_close(between.decode(between.encode(STATES)), for_use(STATES), atol=1e-4, rtol=1e-4)


REFUSED = {  # A configuration, weights, and what the message says
    "topk without k": (OLD | {"architecture": "topk"}, WEIGHTS, "needs 'k'"),
    "topk of too many": (NEW | {"architecture": "topk", "k": 65}, WEIGHTS, "more than the 64"),
    "jumprelu without threshold": (OLD | {"architecture": "jumprelu"}, WEIGHTS, "no 'threshold'"),
    "gated without a gate": (OLD | {"architecture": "gated"}, WEIGHTS, "no 'b_mag'"),
    "without a bias": (OLD, {name: WEIGHTS[name] for name in ("W_enc", "W_dec", "b_enc")}, "no 'b_dec'"),
    "of two sizes": (OLD, WEIGHTS | {"b_enc": torch.zeros(63)}, r"b_enc has the shape \[63\], expected \[64\]"),
    "transcoder": (
        NEW | {"architecture": "transcoder"},
        WEIGHTS,
        "'transcoder' is not read: it writes at another site",
    ),
    "jumprelu transcoder": (NEW | {"architecture": "jumprelu_transcoder"}, WEIGHTS, "another site"),
    "skip transcoder": (NEW | {"architecture": "skip_transcoder"}, WEIGHTS, "another site"),
    "temporal": (NEW | {"architecture": "temporal"}, WEIGHTS, "several tokens"),
    "matching pursuit": (NEW | {"architecture": "matching_pursuit"}, WEIGHTS, "a search"),
    "abstopk": (NEW | {"architecture": "abstopk", "k": 8}, WEIGHTS, "negative"),
    "unknown": (NEW | {"architecture": "tomorrow"}, WEIGHTS, "does not know it"),
    "tanh": (OLD | {"activation_fn_str": "tanh-relu"}, WEIGHTS, "tanh-relu"),
    "layer norm": (OLD | {"normalize_activations": "layer_norm"}, WEIGHTS, "layer_norm"),
    "heads": (NEW | {"reshape_activations": "hook_z"}, WEIGHTS, "hook_z"),
    "scaled": (OLD, WEIGHTS | {"scaling_factor": torch.full((64,), 2.0)}, "not folded in"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_sae_or_incomplete_is_said(tmp_path, kind):
    config, weights, message = REFUSED[kind]
    with pytest.raises(NotAnSAE, match=message):
        load_sae_folder(written(tmp_path / "sae", config, weights))


def test_files_that_hold_no_sae(tmp_path):
    folder = written(tmp_path / "sae", OLD, WEIGHTS)
    (folder / "cfg.json").write_text("[1]")
    with pytest.raises(NotAnSAE, match="no object"):
        load_sae_folder(folder)
    (folder / "cfg.json").write_text(json.dumps(OLD))
    (folder / "sae_weights.safetensors").write_bytes(b"not tensors")
    with pytest.raises(NotAnSAE, match="cannot be read"):
        load_sae_folder(folder)


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        ("gpt2", "gpt2-small", True),
        ("openai-community/gpt2", "gpt2-small", True),
        ("gpt2-medium", "gpt2-small", False),
        ("google/gemma-2-2b", "gemma-2-2b", True),
        ("google/gemma-2b", "gemma-2-2b", False),
        ("meta-llama/Meta-Llama-3-8B", "llama-3-8b", True),
        ("google/gemma-2-2b-it", "gemma-2-2b", False),
    ],
)
def test_models_by_any_of_their_names(ours, theirs, same):
    sae = random_sae(4, 8, 2, hook_name="blocks.1.hook_resid_post", model_name=theirs)
    if same:
        assert sae.check_site("resid_post", 1, ours) is sae
    else:
        with pytest.raises(WrongHook, match="trained on"):
            sae.check_site("resid_post", 1, ours)


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
