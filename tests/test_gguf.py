"GGUF files: the numbers of the model they were made from, tokenizers that cut as the original, and files that are refused."

import multiprocessing
import os
import shutil
import signal
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_files import make_small_model, write_gguf
from safetensors.torch import load_file

from codetrace import models
from codetrace.core.errors import BadInput
from codetrace.core.files import file_sha256
from codetrace.models.architectures import UnsupportedArchitecture
from codetrace.models.folders import check_model_name
from codetrace.models.gguf_header import GGUF_FAMILIES, NotAGGUF, check_gguf_file, gguf_quantization
from codetrace.models.gguf_models import gguf_model_folder
from codetrace.models.limits import MemoryLimits, NotEnoughMemory
from codetrace.runs.serve_command import vllm_arguments

TEXT = "def f(x):\n    return x + 123"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    "What is converted here goes to a folder of its own."
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("CODETRACE_CACHE", str(cache))
    return cache


@pytest.fixture
def small():
    return make_small_model("qwen2")


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_a_file_computes_what_the_model_does_that_it_was_made_from(family, tmp_path):
    lm = make_small_model(family)
    path = write_gguf(tmp_path / "model.gguf", lm)
    read = models.load(str(path), dtype="float32")
    assert (read.arch, read.n_layers) == (lm.arch, lm.n_layers)
    torch.testing.assert_close(read.logits(TEXT), lm.logits(TEXT), atol=2e-5, rtol=1e-5)
    assert read.tokenizer.tokenize(TEXT) == lm.tokenizer.tokenize(TEXT)
    assert read.tokenizer.eos_token == lm.tokenizer.eos_token


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "Q5_1"])
def test_quantised_blocks_are_the_numbers_that_the_gguf_package_reads(small, tmp_path, kind):
    quantization = gguf.GGMLQuantizationType[kind]
    path = write_gguf(tmp_path / "model.gguf", small, quantization=quantization)
    assert gguf_quantization(check_gguf_file(path)) == kind
    written = small.hf.model.layers[0].mlp.up_proj.weight.numpy()
    expected = gguf.dequantize(gguf.quantize(written, quantization), quantization)
    read = models.load(str(path), dtype="float32").hf.model.layers[0].mlp.up_proj.weight.numpy()
    np.testing.assert_array_equal(read, expected)
    assert not np.array_equal(read, written)


def test_the_manifest_names_file_quantisation_and_hash(small, tmp_path):
    path = write_gguf(tmp_path / "mine.gguf", small, change=lambda writer: writer.add_file_type(15))
    revision = models.load(str(path)).provenance()["revision"]
    assert revision == f"mine.gguf, Q4_K_M, sha256:{file_sha256(path)[:16]}"


def test_a_folder_has_the_dtype_asked_for(small, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", small)
    exact = models.load(str(path), dtype="float32")
    rounded = models.load(str(path), dtype="bfloat16")
    assert rounded.dtype == torch.bfloat16
    for name, weights in exact.hf.state_dict().items():
        assert torch.equal(weights.to(torch.bfloat16), rounded.hf.state_dict()[name])


def test_vllm_is_given_the_weights_of_the_dtype_asked_for(small, tmp_path):
    path = write_gguf(tmp_path / "small.gguf", small)
    for dtype, wanted in (("float32", torch.float32), ("auto", torch.bfloat16)):
        folder = Path(vllm_arguments(str(path), dtype=dtype)[1])
        weights = load_file(folder / "model.safetensors").values()
        assert {weight.dtype for weight in weights} == {wanted}


# --- what transformers leaves out ----------------------------------------------------------------------------------


def test_llama_3s_rotary_frequencies(tmp_path):
    lm = make_small_model("llama")
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 10000.0}
    config = type(lm.hf.config).from_dict(lm.hf.config.to_dict() | {"rope_parameters": scaling})
    stretched = type(lm.hf)(config).eval()
    stretched.load_state_dict(lm.hf.state_dict())
    plain = lm.hf.model.rotary_emb.inv_freq
    factors = (plain / stretched.model.rotary_emb.inv_freq).numpy().astype(np.float32)
    assert factors.max() == 8 and factors.min() == 1
    path = write_gguf(tmp_path / "model.gguf", lm, extra={"rope_freqs.weight": factors})
    read = models.load(str(path), dtype="float32")
    ids = torch.tensor([lm.tokenizer(TEXT * 9)["input_ids"]])
    torch.testing.assert_close(read.hf(ids).logits, stretched(ids).logits, atol=2e-5, rtol=1e-5)
    assert (stretched(ids).logits - lm.hf(ids).logits).abs().max() > 0.01  # it makes a difference
    odd = write_gguf(tmp_path / "odd.gguf", lm, extra={"rope_freqs.weight": factors[::-1].copy()})
    with pytest.raises(NotAGGUF, match="not those of Llama 3"):
        models.load(str(odd))


def test_stretched_positions_of_gemma_3(tmp_path):
    lm = make_small_model("gemma3")

    def stretch(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)

    read = models.load(str(write_gguf(tmp_path / "model.gguf", lm, change=stretch)), dtype="float32")
    rope = read.hf.config.rope_parameters
    assert rope["full_attention"]["rope_type"] == "linear" and rope["full_attention"]["factor"] == 8
    assert rope["sliding_attention"].get("factor") is None


def test_positions_stretched_otherwise_are_refused(small, tmp_path):
    path = write_gguf(
        tmp_path / "model.gguf", small, change=lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    )
    with pytest.raises(NotAGGUF, match="'yarn' are not read"):
        models.load(str(path))


def test_caps_of_gemma_2(tmp_path):
    lm = make_small_model("gemma2")
    read = models.load(str(write_gguf(tmp_path / "model.gguf", lm)), dtype="float32")
    assert read.hf.config.attn_logit_softcapping == lm.hf.config.attn_logit_softcapping == 4.0
    assert read.hf.config.final_logit_softcapping == 12.0


# --- tokenizers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cut, pieces",
    [
        ("smollm", ["1", "2", "3"]),
        ("qwen2", ["1", "2", "3"]),
        ("llama-bpe", ["123"]),
        ("gpt-2", ["123"]),
    ],
)
def test_numbers_are_cut_as_the_name_says(small, tmp_path, cut, pieces):
    "Before merges: SmolLM2 and Qwen cut at every digit, Llama 3 after three, GPT-2 not at all."
    path = write_gguf(tmp_path / "model.gguf", small, cut=cut)
    tokenizer = models.load(str(path)).tokenizer
    cuts = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("123")
    assert [piece for piece, _ in cuts] == pieces
    assert (tokenizer.tokenize("e\u0301") == tokenizer.tokenize("é")) == (cut == "qwen2")  # NFC
    begins = tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    assert begins == (cut == "llama-bpe")


def test_a_way_to_cut_that_nobody_knows_is_refused(small, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", small, cut="next-year")
    with pytest.raises(NotAGGUF, match=r"tokenizer\.ggml\.pre: next-year"):
        models.load(str(path))
    with pytest.raises(NotAGGUF, match="missing"):
        models.load(str(write_gguf(tmp_path / "older.gguf", small, cut="")))


# --- files that are refused ----------------------------------------------------------------------------------------


def test_a_tensor_that_is_missing_is_named(small, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", small, without=("blk.1.ffn_up.weight",))
    with pytest.raises(NotAGGUF, match=r"lacks 1 tensors .* model\.layers\.1\.mlp\.up_proj\.weight"):
        models.load(str(path))


def test_a_file_that_is_cut_off_is_refused_before_a_run(small, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", small)
    content = path.read_bytes()
    for length in (0, 3, 40, len(content) // 3, len(content) - 100):
        path.write_bytes(content[:length])
        with pytest.raises(NotAGGUF, match=r"get the file again|cannot be read|no GGUF file"):
            check_model_name(str(path))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda writer: writer.add_uint16("split.count", 3), "one of 3 parts"),
        (lambda writer: writer.add_uint32("qwen2.expert_count", 8), "mixture of experts"),
        (lambda writer: writer.add_type("adapter"), "holds no model"),
    ],
)
def test_what_is_not_one_whole_model_is_refused(small, tmp_path, change, words):
    path = write_gguf(tmp_path / "model.gguf", small, change=change)
    with pytest.raises(BadInput, match=words):
        check_model_name(str(path))


def test_a_family_and_a_quantisation_that_nobody_knows(small, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", small)
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack("<Q", 5) + b"qwen2", struct.pack("<Q", 5) + b"mamba", 1))
    with pytest.raises(UnsupportedArchitecture, match="'mamba'"):
        check_model_name(str(path))
    name = b"blk.0.attn_k.weight"
    place = content.index(name) + len(name) + 4 + 16
    path.write_bytes(content[:place] + struct.pack("<I", 99) + content[place + 4 :])
    with pytest.raises(NotAGGUF, match=r"blk\.0\.attn_k\.weight is quantised in a way \(type 99\)"):
        check_model_name(str(path))


def test_memory_is_asked_for_before_the_file_is_converted(small, tmp_path, own_cache):
    path = write_gguf(tmp_path / "model.gguf", small)
    with pytest.raises(NotEnoughMemory, match=r"model\.gguf' needs about"):
        models.load(str(path), limits=MemoryLimits(host=0.001))
    assert not list(own_cache.glob("gguf-*"))


# --- the cache -----------------------------------------------------------------------------------------------------


def test_a_file_is_converted_once_wherever_it_is(small, tmp_path, own_cache):
    path = write_gguf(tmp_path / "model.gguf", small)
    folder = gguf_model_folder(path)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    moved = tmp_path / "elsewhere.gguf"
    shutil.move(path, moved)
    assert gguf_model_folder(moved) == folder and (folder / "model.safetensors").stat().st_mtime_ns == written
    qwen_file = write_gguf(tmp_path / "model.gguf", make_small_model("qwen3"))
    assert gguf_model_folder(qwen_file) != folder


def _convert(path):
    gguf_model_folder(path)


def test_two_conversions_are_one_and_one_that_was_killed_counts_for_nothing(small, tmp_path, own_cache):
    path = write_gguf(tmp_path / "model.gguf", small)
    fork = multiprocessing.get_context("fork")
    killed = fork.Process(target=_convert, args=(path,))
    killed.start()
    while not list(own_cache.glob(".gguf-*")):
        time.sleep(0.001)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert not list(own_cache.glob("gguf-*/manifest.json"))
    both = [fork.Process(target=_convert, args=(path,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    (folder,) = [converted for converted in own_cache.glob("gguf-*") if converted.is_dir()]
    assert (folder / "manifest.json").is_file() and not list(own_cache.glob(".gguf-*"))
    torch.testing.assert_close(
        models.load(str(path), dtype="float32").logits(TEXT), small.logits(TEXT), atol=2e-5, rtol=1e-5
    )
