"Write small GGUF files as llama.cpp's converter does, from tiny models whose weights are known."

from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from codetrace.models.lm import LM
from codetrace.models.tiny import TINY_CONFIGS

TOKENS = ["<|endoftext|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "123", "re", "ret"]
MERGES = ["1 2", "12 3", "r e", "re t"]
TRANSPOSED = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")  # Of GPT-2


def _stored(lm: LM, name: str, weights: np.ndarray) -> np.ndarray:
    "A tensor as the file has it."
    config = lm.hf.config
    if lm.arch == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        split = weights.reshape(heads, 2, weights.shape[0] // heads // 2, -1)
        return split.swapaxes(1, 2).reshape(weights.shape)
    if lm.arch.startswith("gemma") and "norm.weight" in name:
        return weights + 1
    if lm.arch == "gpt2" and name.endswith(TRANSPOSED):
        return weights.T
    return weights


def _add_sizes(writer: gguf.GGUFWriter, lm: LM):
    config = lm.hf.config
    writer.add_block_count(lm.n_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(lm.d_model)
    writer.add_feed_forward_length(96)
    writer.add_head_count(lm.n_heads)
    if lm.arch == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_head_count_kv(lm.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if lm.arch in ("qwen3", "gemma2", "gemma3"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    else:
        writer.add_rope_dimension_count(lm.d_model // lm.n_heads)
    if lm.arch.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if lm.arch == "gemma3":
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    if lm.arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _add_tokenizer(writer: gguf.GGUFWriter, cut: str):
    "Byte pairs of a few merges, said to cut text in some way."
    writer.add_tokenizer_model("gpt2")
    if cut:
        writer.add_tokenizer_pre(cut)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def make_tokenizer() -> PreTrainedTokenizerFast:
    "The same tokenizer, which cuts at every digit first."
    vocabulary = {token: i for i, token in enumerate(TOKENS)}
    backend = Tokenizer(BPE(vocabulary, [tuple(merge.split()) for merge in MERGES]))
    pieces = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    backend.decoder = decoders.ByteLevel()
    special = {"bos_token": TOKENS[0], "eos_token": TOKENS[1]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def make_small_model(family: str) -> LM:
    "A model of a family like those of `tiny`, with few tokens, so that its file is small."
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
    sizes |= TINY_CONFIGS[family] | dict(vocab_size=len(TOKENS), bos_token_id=0, eos_token_id=1, pad_token_id=0)
    config = AutoConfig.for_model({"gemma3": "gemma3_text"}.get(family, family), max_position_embeddings=512, **sizes)
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    random = torch.Generator().manual_seed(0)
    for weights in hf.parameters():
        noise = torch.randn(weights.shape, generator=random) * 0.25
        weights.data.copy_(noise if weights.ndim > 1 else weights.data + noise)
    return LM(f"small:{family}", hf.eval().requires_grad_(False), make_tokenizer())


def write_gguf(
    path: Path,
    lm: LM,
    cut: str = "smollm",  # How the tokenizer cuts text
    without: tuple[str, ...] = (),  # Tensors to leave out
    quantization: gguf.GGMLQuantizationType | None = None,  # Of matrices; None: float32
    extra: dict[str, np.ndarray] | None = None,  # Tensors besides
    change=lambda writer: None,  # Called with the writer, to say more
) -> Path:
    "A GGUF file of a model."
    family = "gemma3" if lm.arch == "gemma3" else lm.arch
    writer = gguf.GGUFWriter(path, family)
    _add_sizes(writer, lm)
    _add_tokenizer(writer, cut)
    change(writer)
    architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(architecture, lm.n_layers)
    tied = lm.hf.config.tie_word_embeddings
    for hf_name, weights in lm.hf.state_dict().items():
        if hf_name == "lm_head.weight" and tied:
            continue
        name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert name, hf_name
        if name in without:
            continue
        array = np.ascontiguousarray(_stored(lm, name, weights.to(torch.float32).numpy()))
        if quantization is not None and array.ndim > 1:
            writer.add_tensor(name, gguf.quantize(array, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(name, array)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
