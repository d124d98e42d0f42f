"Pushes, gates and kept states at each site of the residual stream, against plain hooks of PyTorch; SAEs get the states of their site."

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from codetrace import models
from codetrace.core.errors import BadInput, UnknownName
from codetrace.core.files import write_json
from codetrace.models.activations import StateParts, States
from codetrace.models.architectures import RESIDUAL_SITES, residual_places
from codetrace.models.decoding import Decoder, Request
from codetrace.phases.tuning import check_push_site
from codetrace.runs.checks import check_run
from codetrace.runs.parameters import phase_values
from codetrace.sae.dataset import load_labelled_activations
from codetrace.sae.sae import WrongHook, hook_name, random_sae
from codetrace.steering.directions import Direction, Gate, make_push, median_norms, push_edits
from codetrace.steering.sweep import SteeringSetting
from codetrace.steering.text_loss import text_losses

PROMPT = "def add(a, b):\n    return"
LAYER = 1
# what adds to the stream between attention and MLP: the last module of attention, after Gemma's norm
ATTENTION_OUT = {"llama": "self_attn.o_proj", "gemma2": "post_attention_layernorm", "gpt2": "attn.c_proj"}


def plain_hook(lm, family: str, site: str, added: torch.Tensor):
    "A hook of PyTorch that adds a vector to the stream at a site of a layer, at every token."
    layer = lm.layers[LAYER]

    def after(module, args, output):
        if isinstance(output, tuple):
            return (output[0] + added, *output[1:])
        return output + added

    def before(module, args, kwargs):
        if args:
            return (args[0] + added, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"] + added}

    if site == "resid_pre":
        return layer.register_forward_pre_hook(before, with_kwargs=True)
    return (layer if site == "resid_post" else layer.get_submodule(ATTENTION_OUT[family])).register_forward_hook(after)


def push_at(lm, site: str, **options):
    direction = Direction("d", "gaussian", LAYER, torch.randn(lm.d_model, generator=torch.manual_seed(3)), site=site)
    return make_push(direction, 1.0, np.full(lm.n_layers, 4.0), **options)


@pytest.mark.parametrize("family", ATTENTION_OUT)
def test_a_push_at_a_site_is_what_a_plain_hook_adds(family):
    lm = models.load(f"tiny:{family}")
    ids = lm.ids([PROMPT])[0]
    losses_by_site = {}
    for site in RESIDUAL_SITES:
        push = push_at(lm, site, where="all")
        edits = push_edits([push])
        steered = next(iter(Decoder(lm, [Request(tuple(ids), key=("a", 0))], 5, slots=2, edits=edits))).tokens
        plain = list(ids)
        with torch.no_grad():
            handle = plain_hook(lm, family, site, push.added_norm * push.direction.vector)
            for _ in range(5):
                plain.append(int(lm.hf(torch.tensor([plain])).logits[0, -1].argmax()))
            logits = lm.hf(torch.tensor([ids])).logits[0, :-1]
            handle.remove()
        assert steered == plain[len(ids) :], site
        losses_by_site[site] = float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])))
        measured = text_losses(lm, [SteeringSetting("pushed", "null", push)], [ids])["loss"].iloc[0]
        assert measured == pytest.approx(losses_by_site[site], abs=1e-4), site
    assert len(set(losses_by_site.values())) == 3


def test_states_are_kept_at_the_sites_that_are_asked_for(tmp_path):
    lm = models.load("tiny:llama")
    request = Request(tuple(lm.ids([PROMPT])[0]), key=("a", 0.0, 0))
    decoder = Decoder(lm, [request], 4, layers=[0, 2], per_token=[2], sites=("resid_mid", "resid_pre"))
    answer = next(iter(decoder))
    places = residual_places(("resid_mid", "resid_pre"), (0, 2))
    seen = lm.capture([[*request.ids, *answer.tokens]], places)
    parts = StateParts(tmp_path / "activations")
    parts.append(
        [request.key],
        {kind: [x] for kind, x in answer.states.items()},
        places,
        {p: [x] for p, x in answer.per_token.items()},
    )
    parts.finish([request.key])
    pd.DataFrame({"task_id": ["a"]}).to_parquet(tmp_path / "samples.parquet")
    saved = States(tmp_path)
    assert set(saved.places) == set(places) and saved.sites == ("resid_pre", "resid_mid")
    start = len(request.ids)
    for site, layer in places:
        truth = seen[site, layer][0].numpy()
        assert np.allclose(saved.states("last_prompt", layer, site=site)[0], truth[start - 1], atol=1e-4)
        assert np.allclose(saved.states("last_generated", layer, site=site)[0], truth[-1], atol=1e-4)
        assert np.allclose(saved.states("mean_generated", layer, site=site)[0], truth[start:].mean(0), atol=1e-4)
    assert np.allclose(saved.tokens(2, 0, site="resid_mid"), seen["resid_mid", 2][0, start:].numpy(), atol=1e-4)
    with pytest.raises(BadInput, match="no states of resid_post of layer 2; it holds states of resid_pre, resid_mid"):
        saved.states("last_prompt", 2)


@pytest.fixture
def saved(tmp_path) -> States:
    "States of two sites of one layer, which differ."
    keys = [(f"task {i}", 0.0, 0) for i in range(4)]
    parts = StateParts(tmp_path / "run" / "activations")
    states = torch.stack([torch.ones(4, 16), 2 * torch.ones(4, 16)], 1)
    parts.append(keys, {"last_generated": list(states)}, [("resid_mid", 1), ("resid_post", 1)])
    parts.finish(keys)
    pd.DataFrame({"task_id": [key[0] for key in keys]}).to_parquet(tmp_path / "run" / "samples.parquet")
    return States(tmp_path / "run")


def saes_of(folder: Path, site: str, site_in_file: str = "") -> Path:
    "A run of phase saes with one SAE, which reads a site; `said` is what the run says of it."
    sae = random_sae(16, 32, 4)
    sae.metadata.update(hook_name=hook_name(site, 1), model_name="m")
    sae.save(folder / "layer_1")
    write_json(folder / "saes.json", {"1": {"folder": "layer_1", "model_name": "m", "site": site_in_file or site}})
    return folder


def test_saes_get_the_states_of_their_site(saved, tmp_path):
    rows = pd.DataFrame({"row": range(4), "label": [True, False] * 2})
    for site, value in (("resid_mid", 1), ("resid_post", 2)):
        activations = load_labelled_activations(saved, saes_of(tmp_path / site, site), rows)
        assert activations.site == site and (activations.states("last_generated", 1) == value).all()
        assert activations.sae(1).d_model == 16
    with pytest.raises(
        BadInput, match="the SAEs read resid_pre, and the states that were saved are of resid_mid, resid_post"
    ):
        load_labelled_activations(saved, saes_of(tmp_path / "pre", "resid_pre"), rows)
    mislabelled = load_labelled_activations(
        saved, saes_of(tmp_path / "other", "resid_post", site_in_file="resid_mid"), rows
    )
    with pytest.raises(WrongHook, match="reads resid_post of layer 1"):
        mislabelled.sae(1)


def test_a_gate_is_read_at_its_site():
    "A gate at resid_mid that is open where the state there is on one side of a threshold between two prompts."
    lm = models.load("tiny:llama")
    prompts = lm.ids([PROMPT, "for i in range(3):\n    print"])
    weight = torch.randn(lm.d_model, generator=torch.manual_seed(5))
    readings = [float(lm.capture([ids], [("resid_mid", 0)])["resid_mid", 0][0, -1].float() @ weight) for ids in prompts]
    gate = Gate(0, weight, 0.0, float(np.mean(readings)), site="resid_mid")
    edits = push_edits([push_at(lm, "resid_post", where="last_prompt", gate=gate)])
    for ids, reading in zip(prompts, readings):
        request = Request(tuple(ids), key=("a", 0))
        pushed = next(iter(Decoder(lm, [request], 1, layers=[LAYER], edits=edits))).states["last_prompt"]
        plain = next(iter(Decoder(lm, [request], 1, layers=[LAYER]))).states["last_prompt"]
        assert (not torch.allclose(pushed, plain)) == (reading > gate.threshold)
    with pytest.raises(BadInput, match="the gate reads resid_post of layer 1, after the push at resid_mid of layer 1"):
        push_at(lm, "resid_mid", gate=Gate(1, weight, 0.0, 0.0))


def test_norms_are_those_of_the_site():
    lm = models.load("tiny:llama")
    norms = {site: median_norms(lm, [PROMPT], site=site) for site in RESIDUAL_SITES}
    assert np.allclose(norms["resid_pre"][1:], norms["resid_post"][:-1]) and not np.allclose(
        norms["resid_mid"], norms["resid_post"]
    )
    with pytest.raises(BadInput, match="has no resid_mid"):
        median_norms(models.load("tiny:gpt_neox"), [PROMPT], site="resid_mid")


def test_a_wrong_site_is_one_clear_line():
    for number, values in {
        "1.0": {"sites": ["resid_mid", "resid_past"]},
        "1.5": {"site": "attn_out"},
        "3.1": {"site": "mid"},
    }.items():
        with pytest.raises(UnknownName, match="resid_mid"):
            check_run(number, phase_values(number, values))
    check_push_site("", "resid_mid")
    with pytest.raises(BadInput, match="site=resid_pre: the directions of this study are of resid_mid"):
        check_push_site("resid_pre", "resid_mid")
