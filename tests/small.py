"""Tiny bases with tokenizers, as folders: an encoder with WordPiece and [MASK], an encoder-decoder with sentinels. No network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

import tiny
from luthier.core import Row
from luthier.nn.corruption import Hiding
from luthier.objectives.classify import Objective
from luthier.policy import Policy

TEXT = """The film is a charming and often affecting journey. It is slow, very slow, and the plot makes no sense at all. What a fine story, she said;
they laughed until the end and went home happy. Who was the first man on the moon? How far is it from here to the river? The acting was dull and the music bad.
A girl found a needle in her room and wanted to share it with her mother, who could sew a button on her shirt. Nothing in this picture is worth your time."""
SENTINELS = 20


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's: lower case, [CLS] text [SEP] pair [SEP], with token types."""
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    inner.train_from_iterator([TEXT] * 3, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def with_sentinels() -> PreTrainedTokenizerFast:
    """T5's: text </s>, and <extra_id_0> ... at the end of the vocabulary, counted backwards as T5's are."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<pad>", "</s>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    inner.train_from_iterator([TEXT] * 3, trainer)
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", model_max_length=64)
    made.add_special_tokens({"additional_special_tokens": [f"<extra_id_{i}>" for i in reversed(range(SENTINELS))]})
    return made


def bert(path: Path, seed: int = 0) -> Path:
    """A BERT of two layers."""
    torch.manual_seed(seed)
    made = wordpiece()
    config = BertConfig(
        vocab_size=len(made),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
    )
    BertForMaskedLM(config).save_pretrained(path)
    made.save_pretrained(path)
    return path


def t5(path: Path, seed: int = 0) -> Path:
    """A T5 of two and two layers."""
    torch.manual_seed(seed)
    made = with_sentinels()
    config = T5Config(
        vocab_size=len(made), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(path)
    made.save_pretrained(path)
    return path


# --- rows for tiny models without a tokenizer -----------------------------------------------------------------------

USUAL = np.arange(5, tiny.V)
BY_MASK = Hiding(usual=USUAL, mask=4)
BY_SENTINEL = Hiding(usual=USUAL, sentinels=tuple(range(49, 39, -1)), start=0, eos=2)


def hidden_rows(hiding, n=6, length=30, seed=0, visit=()):
    """Rows of text between two special tokens, to be hidden by collating."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        ids = np.concatenate([[3], rng.integers(5, 40, length), [2]]).astype(np.int32)
        may = np.ones(len(ids), dtype=bool)
        may[[0, -1]] = False
        out.append(Row(ids, may, f"made:{i}", {"hiding": hiding}, (*visit, i) if visit else ()))
    return out


SINGLE = Objective(problem="single", labels=("bad", "fair", "good"))
MULTIPLE = Objective(problem="multiple", labels=("short", "old", "loud"))
NUMBER = Objective(problem="regression")
PROBLEMS = (SINGLE, MULTIPLE, NUMBER)


def labelled_rows(family, goal=SINGLE, n=6, seed=0):
    """Labelled rows as a family reads them."""
    out = []
    for i, r in enumerate(tiny.rows(n, seed=seed)):
        label = {"single": i % 3, "multiple": [float(i % 2), float(i % 3 == 0), 1.0], "regression": 0.5 * i - 1}[goal.problem]
        if family in tiny.SEQ2SEQ:
            start = np.array([2 if family == "bart" else 0], dtype=np.int32)
            out.append(Row(start, np.ones(1, dtype=bool), r.where, {"label": label, "source": r.ids}))
        else:
            out.append(Row(r.ids, np.ones(len(r), dtype=bool), r.where, {"label": label}))
    return out


def classifier(family, goal=SINGLE, seed=0):
    """A policy with a random head large enough to tell examples apart."""
    base = tiny.base(family)
    torch.manual_seed(seed)
    made = Policy(base, heads=goal.heads(base))
    tiny.randomise(dict(made.heads.named_parameters()), std=0.5)
    return made
