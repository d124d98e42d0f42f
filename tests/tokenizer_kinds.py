"Small tokenizers that cut text as those of large models do, learnt from Python's own library."

import functools
import inspect
import json
import textwrap

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS


@functools.cache
def _texts() -> list[str]:
    "Python source, and prompts such as are asked, whose joins a code model's tokenizer has learnt."
    lines = [
        f"print({a})  # prints {i}\n#{a}:\n{a} = {b}\n{a} += {i}"
        for i, a in enumerate("abcdefghijklmnopqrstuvwxyz")
        for b in "xyz"
    ]
    return [*(inspect.getsource(module) for module in (textwrap, functools, json, inspect)), *lines]


def _train(pre_tokenizer, normalizer=None, decoder=None, **options) -> PreTrainedTokenizerFast:
    backend = Tokenizer(BPE(byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = decoder or decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False, **options)
    backend.train_from_iterator(_texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def _split_by(name: str):
    split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _digits_first():
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _sentencepiece_like() -> PreTrainedTokenizerFast:
    "Gemma's way: spaces are underscores, digits are alone, and words join with the spaces before them."
    pieces = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.Split(Regex("▁+[^▁]*|[^▁]+|\n+"), "isolated"),
    ]
    return _train(pre_tokenizers.Sequence(pieces), normalizers.Replace(" ", "▁"), decoders.Replace("▁", " "))


TOKENIZER_KINDS = {
    "SmolLM2": functools.partial(_train, _digits_first()),
    "Qwen2.5": functools.partial(_train, _split_by("qwen2")),
    "Llama 3": functools.partial(_train, _split_by("llama-bpe")),
    "GPT-2": functools.partial(_train, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "Gemma 3": _sentencepiece_like,
}  # What makes each
