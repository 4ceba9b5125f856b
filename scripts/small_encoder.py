"""A small encoder's or encoder-decoder's tokenizer and configuration, to pretrain from random weights with masked_text.

    python scripts/small_encoder.py bert --corpus FOLDER --out small-bert
    python scripts/small_encoder.py t5 --corpus FOLDER --out small-t5

FOLDER is what fiddle_corpus.py wrote. The folder that comes out is the `model` of recipes/pretrain-bert-small.yaml and recipes/pretrain-t5-small.yaml.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from fiddle_tokenizer import SPLIT, sample
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForMaskedLM, PretrainedConfig, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

VOCABULARY = 8192
SENTINELS = 100  # as T5 has them (Raffel et al., 2019, arXiv 1910.10683)
BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def bert_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Lower-cased WordPiece with BERT's special tokens (Devlin et al., 2018, arXiv 1810.04805)."""
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=BERT_SPECIAL, show_progress=False))
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[(t, BERT_SPECIAL.index(t)) for t in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=256,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def t5_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, which loses no character of what is to be written, with an end of sequence; sentinels end the vocabulary, the first one last."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - SENTINELS, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", model_max_length=512, clean_up_tokenization_spaces=False)
    made.add_special_tokens({"additional_special_tokens": [f"<extra_id_{i}>" for i in reversed(range(SENTINELS))]})
    return made


def bert_config() -> PretrainedConfig:
    """4.3 M parameters: 6 layers of width 192."""
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=768,
        max_position_embeddings=256,
        pad_token_id=0,
        architectures=["BertForMaskedLM"],
    )


def t5_config() -> PretrainedConfig:
    """4.9 M parameters: 4 and 4 layers of width 192."""
    return T5Config(
        vocab_size=VOCABULARY,
        d_model=192,
        d_kv=32,
        d_ff=512,
        num_layers=4,
        num_heads=6,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        architectures=["T5ForConditionalGeneration"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["bert", "t5"])
    parser.add_argument("--corpus", type=Path, required=True, help="what fiddle_corpus.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make, config, model = (bert_tokenizer, bert_config(), BertForMaskedLM) if args.kind == "bert" else (t5_tokenizer, t5_config(), T5ForConditionalGeneration)
    tokenizer = make(sample(args.corpus / "train", random.Random(args.seed)))
    assert len(tokenizer) == VOCABULARY, f"the corpus is too small for {VOCABULARY} tokens: {len(tokenizer)}"
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out)
    config.save_pretrained(args.out)
    print(f"{args.out}: {len(tokenizer):,} tokens, {sum(p.numel() for p in model(config).parameters()):,} parameters")


if __name__ == "__main__":
    main()
