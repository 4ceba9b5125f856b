"""Measure fiddle and write its model card beside the weights.

    python scripts/fiddle_card.py --model FOLDER --corpus FOLDER --facts training.json

--corpus is what fiddle_corpus.py wrote (heldout/, corpus.json). training.json says how the weights came about: steps, tokens, minutes, device, recipe.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SEPARATOR = "<|endoftext|>"
WINDOW = 1024
TITLES = {
    "chilit": "CLiC: 19th-century children's literature",
    "clic_19C": "CLiC: 19th-century reference corpus",
    "clic_DNov": "CLiC: Dickens's novels",
    "clic_ArTs": "CLiC: additional requested texts",
    "clic_AAW": "CLiC: African American writers",
    "african_storybook_en": "African Storybook, English",
    "onestop_ele": "OneStopEnglish news, elementary",
    "onestop_adv": "OneStopEnglish news, advanced",
    "tinystories_train": "TinyStories, a sample",
    "tinystories_valid": "TinyStories, a second sample",
    "copying": "drills in copying, generated",
    "chat": "drills in the chat template, generated",
}
TEXTS = ["Once upon a time, there was a little", "The old man looked out over the sea and", "Scientists say that"]
CHATS = [
    "Repeat after me: The kettle sings on the old stove.",
    "Put these facts into a list: colour is green; price is 45; owner is Clara",
    "Put these facts into words: name: Ruth; home: Kendal; trade: baker; age: 41",
]


@dataclass
class Held:
    """What one held-out source costs the model."""

    perplexity: float
    bits_per_byte: float
    tokens: int


@torch.no_grad()
def held_out(model: Any, tokenizer: Any, text: str, limit: int) -> Held:
    """Loss over documents in windows of WINDOW tokens, each document ending in the separator; the first token of a window is not scored."""
    nats, scored, size = 0.0, 0, 0
    for document in text.split(f"\n{SEPARATOR}\n"):
        if size > limit:
            break
        ids = tokenizer(document.strip("\n"), verbose=False)["input_ids"] + [tokenizer.eos_token_id]
        for start in range(0, len(ids), WINDOW):
            window = ids[start : start + WINDOW]
            if len(window) < 2:
                continue
            ids_1T = torch.tensor([window])
            nats += float(model(ids_1T, labels=ids_1T).loss) * (len(window) - 1)
            scored += len(window) - 1
            size += len(tokenizer.decode(window[1:], skip_special_tokens=True).encode())
    return Held(math.exp(nats / scored), nats / math.log(2) / size, scored)


@torch.no_grad()
def copying(model: Any, tokenizer: Any, length: int, rows: int = 64) -> float:
    """Share of tokens predicted rightly in the second half of random tokens said twice. Its first token, which nothing announces, is left out."""
    ordinary = torch.tensor(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
    draw = torch.Generator().manual_seed(length)
    once_RT = ordinary[torch.randint(len(ordinary), (rows, length), generator=draw)]
    twice_RT = torch.cat([once_RT, once_RT], 1)
    guess_RT = model(twice_RT[:, :-1]).logits.argmax(-1)[:, length:]
    return float((guess_RT == twice_RT[:, length + 1 :]).float().mean())


@torch.no_grad()
def continuation(model: Any, tokenizer: Any, ids: list[int], temperature: float) -> str:
    """What the model goes on with, up to 60 tokens."""
    torch.manual_seed(0)
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=60, **how)
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()


def samples(model: Any, tokenizer: Any) -> str:
    """Markdown: each prompt with its likeliest continuation and one drawn at temperature 0.8."""
    prompts = [(t, tokenizer(t)["input_ids"]) for t in TEXTS]
    for text in CHATS:
        asked = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True)
        prompts.append((f"user: {text}", list(asked["input_ids"])))
    lines = []
    for text, ids in prompts:
        lines.append(f"**{text}**\n")
        for label, temperature in (("greedy", 0.0), ("temperature 0.8", 0.8)):
            lines.append("\n".join(f"> {line}".rstrip() for line in f"({label}) {continuation(model, tokenizer, ids, temperature)}".splitlines()) + "\n")
    return "\n".join(lines)


def card(facts: dict, corpus: dict, held: dict[str, Held], copied: dict[int, float], said: str, config: Any, size: int) -> str:
    """The README."""
    rows = []
    for name, source in corpus["sources"].items():
        h = held[name]
        rows.append(
            f"| {TITLES.get(name, name)} | {source['licence']} | {source['train_bytes'] / 1e6:.1f} MB | {source['times']} | "
            f"{h.perplexity:.1f} | {h.bits_per_byte:.2f} | {h.tokens:,} |"
        )
    table = "\n".join(rows)
    copy_rows = "\n".join(f"| {n} | {100 * share:.1f} % |" for n, share in copied.items())
    extra = "".join(f"- {k.replace('_', ' ')}: {v}\n" for k, v in facts.items() if k not in {"steps", "tokens", "minutes", "device", "recipe"})
    return f"""# fiddle

A small English language model that ships with Luthier, so that the demo, the tests and the first hour need no network. It was trained from random
weights by Luthier's own `text` objective. It is small and knows little: do not ask it for facts.

- architecture: Llama, {size:,} parameters; {config.num_hidden_layers} layers of width {config.hidden_size}, {config.num_attention_heads} heads
  ({config.num_key_value_heads} for keys and values), feed-forward {config.intermediate_size}, tied embeddings
- tokenizer: its own byte-level BPE, {config.vocab_size:,} tokens, digits one by one, nothing added before a text
- positions: {WINDOW:,} in training; the rotary embedding goes on to {config.max_position_embeddings:,}, untrained
- chat template: `<|system|>`, `<|user|>`, `<|assistant|>`, `<|tool|>`; a turn ends with `<|end|>`; nine reserved tokens
- training: {facts["steps"]:,} steps, {facts["tokens"] / 1e6:.1f} M tokens, {facts["minutes"]:.0f} minutes on {facts["device"]}; recipe `{facts["recipe"]}`
{extra}
## Trained on, and how well

Perplexity is per token of whole books, stories and articles that were never trained on; bits per byte do not depend on the tokenizer. Sizes are
those of the mixture as it was written, repetitions included; the tokens above say how much of it was seen.

| source | licence | size | repeated | perplexity | bits per byte | held-out tokens |
|---|---|---|---|---|---|---|
{table}

Quotation marks, dashes and apostrophes were made plain ASCII, so it reads curly ones badly. Novels were cut into pieces of about 3,000 words.
Two parts are generated by `scripts/fiddle_drills.py` from words of the rest: documents that say something twice in many formats (lists, tables,
`key[value]`, sentences), without which a model this small hardly copies, and conversations in the chat template. Most of the prose is of the
19th century, with the opinions of its time.

## How well it copies

Random tokens written twice: how often the likeliest token is the right one in the second half. Data-to-text rests on this. Chance is below 0.1 %.

| tokens | right |
|---|---|
{copy_rows}

## Samples

{said}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="the folder with the weights; README.md is written there")
    parser.add_argument("--corpus", type=Path, required=True, help="what fiddle_corpus.py wrote")
    parser.add_argument("--facts", type=Path, required=True, help="JSON: steps, tokens, minutes, device, recipe, and what else is to be said")
    parser.add_argument("--bytes", type=int, default=200_000, help="held-out text scored per source")
    args = parser.parse_args()
    facts = json.loads(args.facts.read_text())
    if missing := {"steps", "tokens", "minutes", "device", "recipe"} - facts.keys():
        raise SystemExit(f"{args.facts} lacks {', '.join(sorted(missing))}")
    corpus = json.loads((args.corpus / "corpus.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    held: dict[str, Held] = {}
    for name in corpus["sources"]:
        held[name] = held_out(model, tokenizer, (args.corpus / "heldout" / f"{name}.txt").read_text(encoding="utf-8"), args.bytes)
        print(f"{name:24} perplexity {held[name].perplexity:8.1f}   {held[name].bits_per_byte:.3f} bits/byte")
    copied = {n: copying(model, tokenizer, n) for n in (32, 64, 128)}
    print("copies", copied)
    text = card(facts, corpus, held, copied, samples(model, tokenizer), model.config, sum(p.numel() for p in model.parameters()))
    (args.model / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
