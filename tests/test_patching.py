"What a notebook cannot hold of `patching`: every engine on every family and site, odd batches, running out of memory, bad input."

import pytest
import torch

from codetrace import models
from codetrace.core.errors import BadInput, UnknownName
from codetrace.models.interventions import Intervention
from codetrace.models.tiny import TINY_CONFIGS
from codetrace.patching import blocks, staircase
from codetrace.patching.blocks import NoFastPath
from codetrace.patching.engine import ENGINES, PatchOptions, _unpatched_logits, patch_all
from codetrace.patching.grouped_query_heads import n_site_heads
from codetrace.patching.sites import PATCH_SITES, EngineWork, PatchPair, patch_sites
from codetrace.patching.staircase import sweep_layer_tokens

CODE = "a = {}\nb = a\n#b:"
TOLERANCE = 1e-4


# Qwen 2 is Llama with biases, Qwen 3 is it with normed queries and keys, Gemma 3 is Gemma 2 without soft caps
# GPT-2 packs queries, keys and values as GPT-NeoX does, and adds attention before the MLP as Llama does
LIKE_OTHERS = {"qwen2", "qwen3", "gemma3", "gpt2"}


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name in LIKE_OTHERS)) for name in TINY_CONFIGS],
)
def lm(request):
    return models.load(f"tiny:{request.param}", attn="eager")


@pytest.fixture(scope="session")
def llama():
    return models.load("tiny:llama", attn="eager")


def logits(x, i):
    "A sample of the logits, and the prediction."
    return torch.cat([x[:, ::16], x.argmax(-1, keepdim=True).float()], -1)


def lead(x, i):
    return x[:, :8]


def pair_of(lm, code=CODE, base=3, source=7, **options) -> PatchPair:
    return PatchPair(*lm.ids([code.format(base), code.format(source)]), **options)


def hooks(lm) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.hf.modules())


def agree(got, want):
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        assert torch.allclose(x, y, rtol=0, atol=TOLERANCE)


# --- engines agree


def test_all_engines_on_every_site_in_both_directions(lm):
    pair = pair_of(lm)
    ends = (pair.first_difference, len(pair.base) - 1)
    pairs = [pair, PatchPair(pair.source, pair.base, ends)]
    naive = {site: patch_all(lm, pairs, site, logits, PatchOptions(engine="naive")) for site in patch_sites(lm)}
    for site, want in naive.items():
        assert want[0].shape[:3] == (lm.n_layers, n_site_heads(lm, site), len(pair.base))
        assert (want[0] - want[0][0, 0, 0])[..., :-1].abs().max() > 1e-2, "a patch must change something"
        agree(patch_all(lm, pairs, site, logits), want)
    for number, (site, want) in enumerate(naive.items()):  # the slow engines last: they stay around the model's modules
        direction, layer = number % 2, 2 * (number // 2 % 2)  # both directions and layers, one at a site
        fewer = PatchPair(pairs[direction].base, pairs[direction].source, ends)
        at_ends = [pairs[direction].positions.index(position) for position in ends]
        for engine in ("nnsight", "transformer_lens"):
            few = patch_all(lm, [fewer], site, logits, PatchOptions(layers=[layer], engine=engine))
            agree(few, [want[direction][[layer], :][:, :, at_ends]])
    assert hooks(lm) == 0


@pytest.mark.parametrize("site", PATCH_SITES)
def test_windows(lm, site):
    if site not in patch_sites(lm):
        pytest.skip(f"{lm.arch} has no {site}")
    pair = pair_of(lm)
    pair = PatchPair(pair.base, pair.source, (pair.first_difference, pair.first_difference + 2, len(pair.base) - 1))
    for window in (2, 9) if site in ("resid_pre", "key") else (2,):  # 9: more layers than there are
        want = patch_all(lm, [pair], site, lead, PatchOptions(engine="naive", window=window))
        agree(patch_all(lm, [pair], site, lead, PatchOptions(window=window)), want)
    if site in ("resid_post", "head_out"):
        end = pair_of(lm, positions=(len(pair_of(lm).base) - 1,))
        some = dict(layers=[0, 2], window=2)
        agree(
            patch_all(lm, [end], site, lead, PatchOptions(engine="nnsight", **some)),
            patch_all(lm, [end], site, lead, PatchOptions(**some)),
        )


def test_nothing_is_left_out_by_mistake(lm):
    "Cells that are known to be the base's are, when they are computed."
    for site in patch_sites(lm):
        some = patch_all(lm, [pair_of(lm)], site, logits)
        agree(patch_all(lm, [pair_of(lm)], site, logits, PatchOptions(compute_unchanged=True)), some)


def test_plain_runs(lm):
    runs = lm.ids(["a = 3\n#a:", "b", "a = 4\n#a:"])
    assert torch.allclose(_unpatched_logits(lm, runs), lm.logits(runs), atol=1e-5)


def test_the_donors_stream_at_the_last_token_gives_the_donors_logits(lm):
    pair = pair_of(lm)
    top = patch_all(lm, [pair], "resid_post", logits)[0][-1, 0, -1]
    assert torch.allclose(top, logits(_unpatched_logits(lm, [pair.source]), 0)[0], atol=1e-5)


def test_patched_with_itself(lm):
    "No-op: the base exactly where nothing is computed; the base but for rounding where everything is."
    base = pair_of(lm).base
    want = logits(_unpatched_logits(lm, [base]), 0)[0]
    for site in patch_sites(lm):
        got = patch_all(lm, [PatchPair(base, base)], site, logits)[0]
        assert torch.equal(got, want.expand_as(got))
        computed = patch_all(lm, [PatchPair(base, base)], site, logits, PatchOptions(compute_unchanged=True))[0]
        assert (computed - want).abs().max() < 2e-5


# --- batches


def test_pairs_of_many_lengths_with_their_own_positions(llama):
    pairs = [
        pair_of(llama),
        pair_of(llama, "{} = b", "a", "c", positions=(2, 0)),
        pair_of(llama, positions=()),
        pair_of(llama, base=9, source=1, positions=(8, 3, 8)),
        pair_of(llama, "b = {}\nb = a\n#b:", "x", "y"),
        pair_of(llama, "{}", "x", "y"),
    ]
    for site in ("resid_pre", "head_out", "value"):
        want = patch_all(llama, pairs, site, lead, PatchOptions(layers=[2, 0], engine="naive"))
        assert [tuple(x.shape[:1] + x.shape[2:3]) for x in want] == [(2, len(pair.positions)) for pair in pairs]
        agree(patch_all(llama, pairs, site, lead, PatchOptions(layers=[2, 0])), want)


def test_the_measure_is_told_the_pair(llama):
    def tell(x, i):
        return torch.full((len(x), 1), float(i))

    for engine in ENGINES:
        out = patch_all(
            llama, [pair_of(llama), pair_of(llama, "{}", "x", "y")], "mlp_out", tell, PatchOptions(engine=engine)
        )
        assert [set(x.flatten().tolist()) for x in out] == [{0.0}, {1.0}]


def test_small_parts_give_the_same(llama, monkeypatch):
    pairs = [pair_of(llama, base=b, source=d) for b in range(3) for d in range(4, 6)]
    want = patch_all(llama, pairs, "head_out", lead)
    monkeypatch.setattr(staircase, "_HELD_BYTES", 20_000)
    monkeypatch.setitem(staircase._CHUNK_TOKENS, "cpu", 5)
    agree(patch_all(llama, pairs, "head_out", lead), want)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_the_batch_halves_when_memory_runs_out(llama, monkeypatch, error):
    pairs = [pair_of(llama, base=b, source=9) for b in range(5)]
    want = patch_all(llama, pairs, "resid_post", lead)
    sizes = []
    prepare = staircase._prepare_sweep
    run_rows = staircase._SiteSweep.run_rows

    def tight_prepare(stack, request, numbers):
        if len(numbers) > 2:
            raise error
        return prepare(stack, request, numbers)

    def tight_run_rows(self, rows):
        sizes.append(len(rows))
        if len(rows) > 6:
            raise error
        return run_rows(self, rows)

    monkeypatch.setattr(staircase, "_prepare_sweep", tight_prepare)
    monkeypatch.setattr(staircase._SiteSweep, "run_rows", tight_run_rows)
    agree(patch_all(llama, pairs, "resid_post", lead), want)
    assert min(sizes) <= 6 < max(sizes)


def test_other_errors_are_not_swallowed(llama, monkeypatch):
    monkeypatch.setattr(staircase._SiteSweep, "run_rows", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        patch_all(llama, [pair_of(llama)], "resid_pre", lead)


# --- what is computed


def test_work_is_what_the_arithmetic_says(llama):
    pair = pair_of(llama)
    work = EngineWork()
    patch_all(llama, [pair], "resid_pre", lead, work=work)
    L = llama.n_layers
    T = len(pair.base)
    p0 = pair.first_difference
    assert work.layer_tokens == sweep_layer_tokens(L, T, p0)
    assert work.cells == (L - 1) * (T - p0) + 1
    every = EngineWork()
    patch_all(llama, [pair], "resid_pre", lead, PatchOptions(compute_unchanged=True), work=every)
    assert every.cells == L * T


def test_naive_work(llama):
    pair = pair_of(llama)
    work = EngineWork()
    patch_all(llama, [pair], "resid_pre", lead, PatchOptions(engine="naive"), work=work)
    assert work.layer_tokens == sweep_layer_tokens(llama.n_layers, len(pair.base), pair.first_difference, naive=True)


def test_sdpa_models_and_half_precision(llama):
    "The staircase has its own attention, and takes any dtype."
    sdpa = models.load("tiny:llama", attn="sdpa")
    agree(
        patch_all(sdpa, [pair_of(sdpa)], "resid_pre", lead),
        patch_all(sdpa, [pair_of(sdpa)], "resid_pre", lead, PatchOptions(engine="naive")),
    )
    half = models.load("tiny:gemma3", dtype="bfloat16", attn="eager")
    for site in ("resid_mid", "key"):
        got, want = (
            patch_all(half, [pair_of(half)], site, lead, PatchOptions(engine=engine))[0]
            for engine in ("staircase", "naive")
        )
        assert (got - want).abs().mean() < 0.05 * want.std()


# --- bad input


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(engine="stairs"), "unknown engine 'stairs': did you mean 'staircase'"),
        (dict(site="resid_pro"), "unknown site 'resid_pro': did you mean"),
        (dict(layers=[3]), "unknown layer 3"),
        (dict(layers=[-1]), "unknown layer -1"),
        (dict(window=0), "window=0"),
        (dict(window=2, engine="transformer_lens"), "use another engine"),
    ],
)
def test_bad_input(llama, options, message):
    options = {"engine": "naive"} | options
    site = options.pop("site", "resid_pre")
    with pytest.raises(BadInput, match=message):
        patch_all(llama, [pair_of(llama)], site, lead, PatchOptions(**options))


def test_bad_pairs():
    with pytest.raises(BadInput, match="base has 2 tokens, source 1"):
        PatchPair((1, 2), (1,))
    with pytest.raises(BadInput, match="base has 0 tokens"):
        PatchPair((), ())
    with pytest.raises(BadInput, match="position 2 is outside"):
        PatchPair((1, 2), (1, 3), positions=(2,))


def test_no_resid_mid_in_parallel():
    neox = models.load("tiny:gpt_neox", attn="eager")
    with pytest.raises(BadInput, match="no resid_mid"):
        patch_all(neox, [pair_of(neox)], "resid_mid", lead)


def test_not_inside_an_intervention(llama):
    with llama.intervene(Intervention("resid_pre", 0, 0.0)), pytest.raises(BadInput, match="intervene"):
        patch_all(llama, [pair_of(llama)], "resid_pre", lead)


def test_unknown_families_are_refused_with_the_way_out(monkeypatch):
    lm = models.load("tiny:qwen2", attn="eager")
    monkeypatch.delitem(blocks._BLOCK_BUILDERS, "qwen2")
    with pytest.raises(NoFastPath, match="engine='naive'"):
        patch_all(lm, [pair_of(lm)], "resid_pre", lead)
    assert patch_all(lm, [pair_of(lm)], "resid_pre", lead, PatchOptions(engine="naive"))[0].isfinite().all()
    monkeypatch.setattr(lm.hf.config, "layer_types", ["chunked_attention"] * 3)
    monkeypatch.setitem(blocks._BLOCK_BUILDERS, "qwen2", blocks._llama_block)
    with pytest.raises(NoFastPath, match="attention"):
        patch_all(lm, [pair_of(lm)], "resid_pre", lead)


def test_unknown_names_are_key_errors_too():
    assert issubclass(UnknownName, BadInput)


# --- the real model


@pytest.fixture(scope="session")
def smollm2():
    return models.load("smollm2", dtype="float32", attn="eager")


@pytest.mark.slow
@pytest.mark.parametrize("site", PATCH_SITES)
def test_smollm2(smollm2, site):
    "Four positions of every third layer (with heads: every tenth), staircase against naive; a few cells against the other engines."
    lm = smollm2
    pair = pair_of(lm, "a = {}\nb = 5\nc = a\n#c:")
    pair = PatchPair(pair.base, pair.source, positions=(3, 7, 11, len(pair.base) - 1))
    pairs = [pair, PatchPair(pair.source, pair.base, pair.positions)]
    layers = range(0, lm.n_layers, 3 if n_site_heads(lm, site) == 1 else 10)
    want = patch_all(lm, pairs, site, logits, PatchOptions(layers=layers, engine="naive"))
    agree(patch_all(lm, pairs, site, logits, PatchOptions(layers=layers)), want)
    for engine in ("nnsight", "transformer_lens"):
        agree(patch_all(lm, pairs[:1], site, logits, PatchOptions(layers=layers[:3], engine=engine)), [want[0][:3]])
