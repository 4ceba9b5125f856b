"""fiddle's tokenizer, chat template and configuration, from the corpus that fiddle_corpus.py wrote.

    python scripts/fiddle_tokenizer.py --corpus FOLDER

FOLDER is what fiddle_corpus.py wrote. The files go to src/luthier/assets/fiddle; the token counts are printed and added to FOLDER/corpus.json.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEPARATOR = "<|endoftext|>"
SPECIAL = [SEPARATOR, "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>", *(f"<|reserved_{k}|>" for k in range(9))]
VOCABULARY = 4096
SAMPLE = 20_000_000  # characters the merges are learned from

# Words with the space before them, contractions apart, digits one by one (so that 1894 is copied as it is read), punctuation in runs.
SPLIT = r"'(?:[sdmt]|ll|ve|re)\b| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

TEMPLATE = """\
{%- macro text(content) -%}
    {%- if content is string -%}{{ content }}
    {%- elif content -%}{%- for part in content -%}{{ part['text'] }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- set first = messages and messages[0]['role'] == 'system' -%}
{%- if first or tools -%}
    {{- '<|system|>\\n' -}}
    {%- if first -%}{{- text(messages[0]['content']) -}}{%- endif -%}
    {%- if tools -%}
        {{- ('\\n\\n' if first else '') + 'Tools:' -}}
        {%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
    {%- endif -%}
    {{- '<|end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- '<|assistant|>\\n' -}}
        {%- generation -%}
        {{- text(message['content']) -}}
        {%- for call in message['tool_calls'] or [] -%}
            {{- ('\\n' if message['content'] or not loop.first else '') + ((call['function'] or call) | tojson) -}}
        {%- endfor -%}
        {{- '<|end|>' -}}
        {%- endgeneration -%}
        {{- '\\n' -}}
    {%- elif message['role'] in ['user', 'tool', 'system'] -%}
        {%- if not (loop.first and message['role'] == 'system') -%}
            {{- '<|' + message['role'] + '|>\\n' + text(message['content']) + '<|end|>\\n' -}}
        {%- endif -%}
    {%- else -%}
        {{- raise_exception("this template knows the roles system, user, assistant and tool, not '" + message['role'] + "'") -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""


def sample(train: Path, rng: random.Random) -> Iterator[str]:
    """About SAMPLE characters of the training documents, without the special tokens written in them."""
    files = sorted(train.glob("*.txt"))
    share = SAMPLE / sum(f.stat().st_size for f in files)
    for file in files:
        for document in file.read_text(encoding="utf-8").split(f"\n{SEPARATOR}\n"):
            if rng.random() < share:
                yield re.sub(r"<\|\w+\|>", "", document)


def learn(train: Path, seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (Sennrich et al., 2016, arXiv 1508.07909) with the special tokens at the lowest ids and nothing added around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(sample(train, random.Random(seed)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SEPARATOR,
        pad_token="<|pad|>",
        additional_special_tokens=SPECIAL[2:],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
    )


def configuration(tokenizer: PreTrainedTokenizerFast) -> tuple[LlamaConfig, GenerationConfig]:
    """The shape of fiddle, and when it stops: at the end of a turn or of a document."""
    end, eos, pad = (tokenizer.convert_tokens_to_ids(t) for t in ("<|end|>", SEPARATOR, "<|pad|>"))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=768,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    return config, GenerationConfig(bos_token_id=None, eos_token_id=[end, eos], pad_token_id=pad)


def count(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Print, and add to corpus.json, what the corpus costs in tokens; bytes per token of each source come from its held-out text."""
    path = out / "corpus.json"
    facts = json.loads(path.read_text())
    print(f"{'source':24} {'bytes/token':>11} {'tokens':>8}")
    for name, source in facts["sources"].items():
        text = (out / "heldout" / f"{name}.txt").read_text(encoding="utf-8")
        source["bytes_per_token"] = len(text.encode()) / len(tokenizer(text, verbose=False)["input_ids"])
        source["train_tokens"] = round(source["train_bytes"] / source["bytes_per_token"])
        print(f"{name:24} {source['bytes_per_token']:11.2f} {source['train_tokens'] / 1e6:7.2f}M")
    print(f"{'in all':24} {'':11} {sum(s['train_tokens'] for s in facts['sources'].values()) / 1e6:7.2f}M")
    path.write_text(json.dumps(facts, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="what fiddle_corpus.py wrote")
    parser.add_argument("--assets", type=Path, default=Path(__file__).parents[1] / "src" / "luthier" / "assets" / "fiddle")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = learn(args.corpus / "train", args.seed)
    args.assets.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.assets, save_jinja_files=False)
    config, generation = configuration(tokenizer)
    config.save_pretrained(args.assets)
    generation.save_pretrained(args.assets)
    count(tokenizer, args.corpus)
    print(f"{sum(p.numel() for p in LlamaForCausalLM(config).parameters()):,} parameters")


if __name__ == "__main__":
    main()
