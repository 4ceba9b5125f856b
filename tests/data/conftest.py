"""Tokenizers made on the spot: byte-level BPE (GPT-2, Qwen), metaspace (Llama), bytes without offsets (ByT5)."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

WORDS = """The restaurant in the city centre serves cheap Italian food near the river. Which question would you answer first, and why?
A user asks; the assistant says what it knows. There are 24 pubs, of which seven have a garden. It is not family friendly, she said.
One day a little girl found a needle in her room and wanted to share it with her mother, who could sew a button on her shirt. """
SPECIAL = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)


def byte_bpe(*, bos: bool = False, template: str | None = None, eos: str | None = "</s>", trim: bool = False) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator([WORDS] * 3, trainer)
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    elif trim:
        inner.post_processor = processors.ByteLevel(trim_offsets=True)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token=eos, pad_token="<pad>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    return made


def metaspace() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    alphabet = [chr(c) for c in range(32, 127)] + ["\n"]
    inner.train_from_iterator([WORDS], trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", *SPECIAL], initial_alphabet=alphabet, show_progress=False))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """No beginning token, no template."""
    return byte_bpe()


@pytest.fixture(scope="session")
def with_bos() -> PreTrainedTokenizerFast:
    return byte_bpe(bos=True)


@pytest.fixture(scope="session")
def chatml() -> PreTrainedTokenizerFast:
    return byte_bpe(template=CHATML, eos="<|im_end|>")


@pytest.fixture(scope="session")
def llama_like() -> PreTrainedTokenizerFast:
    return metaspace()


@pytest.fixture(scope="session")
def slow() -> ByT5Tokenizer:
    """Tokens that do not say where they lie."""
    return ByT5Tokenizer()
