"""A real trained Llama of 260 k parameters (TinyStories): loads, and learns from a user's file."""

import json
import shutil

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from luthier.running.starting import execute
from luthier.settings.run import Checkpoint, Data, Evaluate, Model, Optim, Run


def make_tokenizer(pieces):
    """The SentencePiece BPE of the model from its pieces: a longer piece is any two others put together, the earlier the likelier."""
    vocabulary = {p["piece"].strip("\n") if p["id"] in (1, 2) else p["piece"]: p["id"] for p in pieces}
    joined = [p["piece"] for p in pieces[259:] if len(p["piece"]) > 1]
    merges = [(w[:i], w[i:]) for w in joined for i in range(1, len(w)) if w[:i] in vocabulary and w[i:] in vocabulary]
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Prepend(" ")
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>", model_max_length=512)


@pytest.fixture
def stories(shared, tmp_path):
    source, folder = shared / "weights" / "stories260k", tmp_path / "stories260k"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, folder / name)
    make_tokenizer(json.loads((source / "tok512_pieces.json").read_text())).save_pretrained(folder)
    return folder


def test_its_tokenizer_reads_what_the_model_writes(stories, shared):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(stories)
    greedy = json.loads((shared / "weights" / "stories260k" / "expected_greedy.json").read_text())["bos_only_greedy_ids"]
    text = tokenizer.decode(greedy, skip_special_tokens=True)
    assert text.startswith("Once upon a time, there was a little girl named Lily.")
    assert tokenizer(text)["input_ids"] == greedy[1:]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_it_fine_tunes_on_a_users_file(stories, tmp_path, method):
    things = ["kettle", "ladder", "violin", "garden", "lantern", "basket", "window", "button"]
    rows = [f"Lily had a {a}. The {a} was next to the {b}. Lily took the {b} and left the {a} at home." for a in things for b in things if a != b]
    data = tmp_path / "own.jsonl"
    data.write_text("".join(json.dumps({"text": r}) + "\n" for r in rows))
    run = Run(
        model=Model(id=str(stories)),
        data=Data(train=(str(data),)),
        method={"kind": "lora", "targets": ["all"], "rank": 16} if method == "lora" else "full",
        objective="text",
        precision="float32",
        optim=Optim(lr=2e-2 if method == "lora" else 3e-3, steps=30, batch_tokens=1500),
        evaluate=Evaluate(samples=0, every_steps=10),
        checkpoint=Checkpoint(every_steps=30),
        out=str(tmp_path / "runs"),
    )
    result = execute(run)
    assert result.before.loss.value < 4.5  # it knows the words: 6.24 would be guessing
    assert result.after.loss.value < 0.6 * result.before.loss.value
