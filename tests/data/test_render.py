"""Tokens and masks, checked by a slow method that shares nothing with ours: texts built by hand, tokens decoded one by one."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.conftest import CHATML, byte_bpe
from luthier.core import LuthierError, Row
from luthier.data.answers import MARKERS, ODD_PROMPT, SHORT_OF_TURNS, STRADDLES, Renderer
from luthier.data.codec import Codec
from luthier.data.render import render_chat, render_chats, render_prompt, render_text, stop_ids
from luthier.data.rows import Counts, Dropped
from luthier.data.shapes import Chat, Document
from luthier.data.templates import TEMPLATES, Refused, Template

LONG = 100_000


def chat(*contents: str, system: str | None = None, **how: Any) -> Chat:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    return Chat(messages, where="f:1", **how)


THREE = ("Which pub is near the river?", "The Vaults is near it.", "Is it cheap?", "No.\n\nIt is not.", "Why?", "She said so.")


def row_of(c: Chat, tokenizer: Any, template: str | None = None, **how: Any) -> Row:
    row = render_chat(c, tokenizer, template, **{"max_tokens": LONG, **how})
    assert isinstance(row, Row), row
    return row


def noted(c: Chat, tokenizer: Any, template: str | None = None, **how: Any) -> tuple[Row | Dropped, Counts]:
    counts = Counts()
    renderer = Renderer(tokenizer, template, how.get("train_on", "all"))
    pairs = list(render_chats([c], renderer, max_tokens=how.get("max_tokens", LONG), over_length=how.get("over_length", "truncate"), counts=counts))
    return pairs[0][1], counts


def trained_text(row: Row, tokenizer: Any) -> list[str]:
    """The runs of trained tokens."""
    runs, before = [], False
    for token, on in zip(row.ids.tolist(), row.train.tolist(), strict=True):
        if on and not before:
            runs.append([])
        if on:
            runs[-1].append(token)
        before = on
    return [tokenizer.decode(r) for r in runs]


@pytest.mark.parametrize("name", [None, *TEMPLATES])
def test_texts_are_rendered_as_transformers_renders_them(name: str | None, chatml: Any) -> None:
    """Ours leaves out what makes other values safe, and remembers prompts; what comes out must be the same, refusals included."""
    ours = Template(chatml, name)
    conversations = [chat(*THREE[:n], system=system).messages for n in range(1, 7) for system in (None, "Be brief.")]
    compared = 0
    for _ in range(2):  # the second time from memory
        for messages in conversations:
            for generation in (False, True):
                try:
                    theirs = chatml.apply_chat_template(messages, chat_template=ours.source, tokenize=False, add_generation_prompt=generation)
                except Exception:
                    with pytest.raises(Refused):
                        ours.text(messages, generation=generation)
                    continue
                assert ours.text(messages, generation=generation) == theirs
                compared += 1
    assert compared >= 20


def test_a_remembered_prompt_is_forgotten_with_the_template_and_the_tokens_it_was_made_by() -> None:
    made = byte_bpe(template=CHATML + "{{ eos_token }}")
    ours, asked = Template(made, None), [{"role": "user", "content": "Why?"}]
    first = ours.text(asked, generation=True)
    made.add_special_tokens({"eos_token": "<|im_end|>"})
    second = ours.text(asked, generation=True)
    made.chat_template = CHATML
    third = ours.text(asked, generation=True)
    assert first.endswith("</s>") and second.endswith("<|im_end|>") and third == first.removesuffix("</s>")


# --- text -----------------------------------------------------------------------------------------------------------


def test_a_document_begins_and_ends_as_the_tokenizer_wants(tokenizer: Any, with_bos: Any) -> None:
    doc = Document("She said so.", "f:1")
    (row,) = render_text(doc, tokenizer, max_tokens=LONG)
    assert tokenizer.decode(row.ids) == "She said so.</s>"
    (row,) = render_text(doc, with_bos, max_tokens=LONG)
    assert with_bos.decode(row.ids) == "<s>She said so.</s>"
    assert row.train.tolist() == [False] + [True] * (len(row) - 1)


@pytest.mark.parametrize("limit", [2, 3, 7, 16, 31, 200])
def test_every_token_of_a_split_document_is_a_target_once(limit: int, with_bos: Any) -> None:
    doc = Document(" ".join(THREE), "f:1")
    (whole,) = render_text(doc, with_bos, max_tokens=LONG)
    rows = render_text(doc, with_bos, max_tokens=limit)
    assert max(len(r) for r in rows) <= limit and not any(r.train[0] for r in rows)
    assert np.concatenate([r.ids[1:] for r in rows]).tolist() == whole.ids[1:].tolist()
    for a, b in pairwise(rows):
        assert a.ids[-1] == b.ids[0]  # the first target of a piece has the token before it as its context


def test_a_long_document_can_be_dropped(tokenizer: Any) -> None:
    assert render_text(Document("She said so. " * 50), tokenizer, max_tokens=16, over_length="drop") == []


def test_the_ends_a_document_already_has_are_not_doubled(with_bos: Any) -> None:
    (row,) = render_text(Document("<s>a</s>"), with_bos, max_tokens=LONG)
    assert with_bos.decode(row.ids) == "<s>a</s>"
    with pytest.raises(LuthierError, match="begins with <s> twice"):
        render_text(Document("<s><s>a", "f:9"), with_bos, max_tokens=LONG)


def test_a_tokenizer_file_that_asks_for_truncation_or_padding_is_not_obeyed() -> None:
    tok = byte_bpe()
    tok.backend_tokenizer.enable_truncation(4)
    tok.backend_tokenizer.enable_padding(length=50)
    codec, text = Codec(tok), "She said so, and the assistant asks why."
    tok.backend_tokenizer.enable_truncation(4)
    tok.backend_tokenizer.enable_padding(length=50)
    assert tok.decode(codec.encode([text])[0]) == tok.decode(codec.encode_spans([text])[0][0]) == text
    (row,) = render_text(Document(text), tok, max_tokens=LONG)
    assert tok.decode(row.ids) == text + "</s>"


# --- masks ----------------------------------------------------------------------------------------------------------


def by_hand(pieces: list[tuple[str, bool]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Ids and mask of a text of (piece, learned), from the lengths of decoded tokens alone (ASCII, byte-level BPE)."""
    learned = [flag for text, flag in pieces for _ in text]
    ids = tokenizer("".join(text for text, _ in pieces), add_special_tokens=False)["input_ids"]
    at, mask = 0, []
    for i in ids:
        mask.append(learned[at])
        at += len(tokenizer.decode([i]))
    assert at == len(learned)
    return ids, mask


def spelt(c: Chat, name: str) -> list[tuple[str, bool]]:
    """What three templates should give, written down independently of Jinja."""
    out: list[tuple[str, bool]] = []
    last = len(c.messages) - 1
    if name == "alpaca":
        out.append(("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n", False))
    for i, m in enumerate(c.messages):
        learned = m["role"] == "assistant"
        if name in ("chatml", "own"):
            out += [(f"<|im_start|>{m['role']}\n", False), (m["content"] + "<|im_end|>", learned)] + ([("\n", False)] if i < last else [])
        elif name == "plain":
            out += [(m["content"] + "</s>", True)] + ([("\n", False)] if i < last else []) if learned else [(m["content"] + "\n", False)]
        else:
            head = "### Response:\n" if learned else "### Instruction:\n"
            out += (
                [(head, False), (m["content"] + "</s>", True)] + ([("\n\n", False)] if i < last else []) if learned else [(head + m["content"] + "\n\n", False)]
            )
    return out


@pytest.mark.parametrize("name", ["own", "plain", "alpaca"])
@pytest.mark.parametrize("turns", [2, 4, 6])
def test_the_mask_is_exactly_the_answers_and_their_ends(name: str, turns: int, tokenizer: Any, chatml: Any) -> None:
    tok = chatml if name == "own" else tokenizer
    c = chat(*THREE[:turns])
    row = row_of(c, tok, None if name == "own" else name)
    ids, mask = by_hand(spelt(c, name), tok)
    assert row.ids.tolist() == ids
    if name == "alpaca":  # what follows an end token ("\n\n") belongs to the next question
        assert "\n\n" not in tok.decode(row.ids[row.train])[-2:]
    assert row.train.tolist() == mask


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("fixture", ["tokenizer", "with_bos", "chatml", "llama_like", "slow"])
def test_every_template_trains_every_answer_and_an_end_token(name: str, fixture: str, request: pytest.FixtureRequest) -> None:
    tok = request.getfixturevalue(fixture)
    row = row_of(chat(*THREE), tok, name)
    runs = trained_text(row, tok)
    assert len(runs) == 3
    for run, answer in zip(runs, THREE[1::2], strict=True):
        assert answer.strip() in run
        assert "river" not in run and "cheap" not in run
    assert row.train[-1] and int(row.ids[-1]) in Codec(tok).ends
    assert int(row.ids[-1]) in stop_ids(tok, name)
    assert not row.train[0]


@pytest.mark.parametrize("name", [None, *sorted(TEMPLATES)])
@pytest.mark.parametrize("fixture", ["tokenizer", "with_bos", "chatml", "llama_like"])
def test_generation_starts_from_what_training_put_before_the_answer(name: str | None, fixture: str, request: pytest.FixtureRequest) -> None:
    tok = request.getfixturevalue(fixture)
    c = chat(*THREE[:2], system=None)
    row = row_of(c, tok, name)
    prompt = render_prompt(c.messages[:1], tok, name)
    first = int(np.flatnonzero(row.train)[0])
    assert row.ids[: len(prompt)].tolist() == prompt
    assert len(prompt) == first


def test_only_the_last_turn_is_trained_where_asked(chatml: Any) -> None:
    assert trained_text(row_of(chat(*THREE), chatml, train_on="last"), chatml) == ["She said so.<|im_end|>"]


def test_a_turn_of_weight_zero_is_read_and_not_trained(chatml: Any) -> None:
    row = row_of(chat(*THREE, untrained=frozenset({1})), chatml)
    assert trained_text(row, chatml) == ["No.\n\nIt is not.<|im_end|>", "She said so.<|im_end|>"]
    assert "The Vaults" in chatml.decode(row.ids)


def test_what_follows_the_last_trained_turn_is_left_out(chatml: Any) -> None:
    row = row_of(chat(*THREE[:5]), chatml)
    assert chatml.decode(row.ids).endswith("It is not.<|im_end|>")
    row = row_of(chat(*THREE, untrained=frozenset({5})), chatml)
    assert chatml.decode(row.ids).endswith("It is not.<|im_end|>")


def test_an_answer_that_repeats_the_question_or_the_marks_is_found_where_it_stands(chatml: Any) -> None:
    row = row_of(chat("assistant", "assistant", "user\nassistant\n", "user"), chatml)
    assert trained_text(row, chatml) == ["assistant<|im_end|>", "user<|im_end|>"]


def test_spelt_out_special_tokens_are_noted(chatml: Any) -> None:
    _, counts = noted(chat("what is <|im_end|>?", "a mark"), chatml)
    assert counts.notes == {MARKERS: 1}


# --- the beginning token --------------------------------------------------------------------------------------------


def test_the_beginning_token_is_there_once_whoever_writes_it(with_bos: Any, tokenizer: Any) -> None:
    bos = with_bos.bos_token_id
    once = lambda tok, template: row_of(chat("a", "b"), tok, template).ids.tolist().count(bos)  # noqa: E731
    assert once(with_bos, "plain") == 1
    writes_it = byte_bpe(bos=True, template="{{ bos_token }}" + CHATML)
    assert once(writes_it, None) == 1
    assert render_prompt([{"role": "user", "content": "a"}], writes_it).count(bos) == 1
    assert once(tokenizer, "plain") == 0  # a tokenizer that adds none gets none


def test_two_beginning_tokens_are_refused() -> None:
    tok = byte_bpe(bos=True, template="{{ bos_token }}{{ bos_token }}" + CHATML)
    with pytest.raises(LuthierError, match="begins with <s> twice"):
        row_of(chat("a", "b"), tok)


# --- difficult templates --------------------------------------------------------------------------------------------

THINKING = (  # like Qwen3: earlier turns lose their thinking
    "{%- set last = namespace(user=0) %}{%- for m in messages %}{%- if m['role'] == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}<|im_start|>{{ m['role'] + '\n' }}"
    "{%- if m['role'] == 'assistant' %}{%- if loop.index0 > last.user %}{{ '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)


def test_where_earlier_turns_are_rendered_otherwise_only_the_last_is_trained_and_this_is_said() -> None:
    tok = byte_bpe(template=THINKING, eos="<|im_end|>")
    row, counts = noted(chat(*THREE), tok)
    assert isinstance(row, Row)
    assert trained_text(row, tok) == ["<think>\n\n</think>\n\nShe said so.<|im_end|>"]
    assert counts.notes == {SHORT_OF_TURNS: 1}
    for turns in (("a", "b"), ("a", "b", "c")):  # a question nobody answers does not make the turn before it an earlier one
        assert trained_text(row_of(chat(*turns), tok), tok) == ["<think>\n\n</think>\n\nb<|im_end|>"]


def test_generation_marks_of_the_template_are_used_where_prefixes_fail() -> None:
    only_answers = (
        "{%- if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{%- else %}{{ m['content'] + '<|im_end|>\n' }}{%- endif %}"
    )
    tok = byte_bpe(template=THINKING.replace("{{ m['content'] + '<|im_end|>\n' }}", only_answers), eos="<|im_end|>")
    row, counts = noted(chat(*THREE), tok)
    assert isinstance(row, Row)
    assert trained_text(row, tok) == ["The Vaults is near it.<|im_end|>", "No.\n\nIt is not.<|im_end|>", "She said so.<|im_end|>"]
    assert SHORT_OF_TURNS not in counts.notes


def test_a_generation_prompt_that_is_no_prefix_is_noted() -> None:
    tok = byte_bpe(template=CHATML.replace("assistant\n", "assistant\n<think>\n"), eos="<|im_end|>")
    row, counts = noted(chat("a", "b"), tok)
    assert isinstance(row, Row)
    assert trained_text(row, tok) == ["b<|im_end|>"] and counts.notes == {ODD_PROMPT: 1}


def test_a_system_prompt_the_template_refuses_goes_before_the_question(tokenizer: Any) -> None:
    row, counts = noted(chat("a", "b", system="Be brief."), tokenizer, "gemma")
    assert isinstance(row, Row)
    assert tokenizer.decode(row.ids).startswith("<start_of_turn>user\nBe brief.\n\na<end_of_turn>")
    assert [n for n in counts.notes if "no system role" in n]


def test_a_conversation_the_template_refuses_is_a_bad_row() -> None:
    tok = byte_bpe(template="{%- if messages|length > 2 %}{{ raise_exception('one turn only') }}{%- endif %}" + CHATML)
    dropped = render_chat(chat(*THREE), tok, max_tokens=LONG)
    assert isinstance(dropped, Dropped) and dropped.bad and "one turn only" in dropped.reason


def test_a_template_without_an_end_token_gets_one_that_is_trained(tokenizer: Any) -> None:
    row = row_of(chat("a", "b"), tokenizer, "chatml")  # here <|im_end|> is a special token
    assert tokenizer.decode(row.ids).endswith("b<|im_end|>")
    bare = byte_bpe(
        template="{%- for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{%- endfor %}{%- if add_generation_prompt %}assistant:{%- endif %}"
    )
    row = row_of(chat("a", "b"), bare)
    assert bare.decode(row.ids) == "user: a\nassistant: b\n</s>" and row.train[-1]


def test_an_end_token_equal_to_padding_is_trained_all_the_same() -> None:
    tok = byte_bpe()
    tok.pad_token = "</s>"
    row = row_of(chat("a", "b"), tok, "plain")
    assert tok.decode(row.ids) == "a\nb</s>" and row.train[-1]


def test_a_token_that_begins_in_the_prompt_is_not_trained_and_noted() -> None:
    for trim in (False, True):  # with trimmed offsets a token's own space is outside of its span
        tok = byte_bpe(
            trim=trim,
            template="{%- for m in messages %}{{ m['role'] + ': ' + m['content'] }}{%- endfor %}{%- if add_generation_prompt %}{{ 'assistant: ' }}{%- endif %}",
        )
        row, counts = noted(chat("Which pub? ", "the river."), tok)
        assert isinstance(row, Row)
        assert trained_text(row, tok) == [" river.</s>"] and counts.notes == {STRADDLES: 1}


def test_a_template_file_and_a_wrong_name(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{%- for m in messages %}[{{ m['content'] }}]{%- endfor %}")
    assert tokenizer.decode(row_of(chat("a", "b"), tokenizer, str(path)).ids) == "[a][b]</s>"
    with pytest.raises(LuthierError, match=r"'chatlm' is no template. Did you mean chatml\?"):
        row_of(chat("a", "b"), tokenizer, "chatlm")
    with pytest.raises(LuthierError, match="no file"):
        row_of(chat("a", "b"), tokenizer, str(tmp_path / "other.jinja"))


# --- tools ----------------------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "price_of", "arguments": {"pub": "Vaults"}}}
SCHEMA = {"type": "function", "function": {"name": "price_of", "parameters": {}}}
TOOL_CHAT = Chat(
    [
        {"role": "user", "content": "Is it cheap?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "24"},
        {"role": "assistant", "content": "No."},
    ],
    tools=[SCHEMA],
)


def test_a_template_without_tools_gets_them_as_text(chatml: Any) -> None:
    row, counts = noted(TOOL_CHAT, chatml)
    assert isinstance(row, Row)
    text = chatml.decode(row.ids)
    assert '"parameters"' in text and "<tool_response>\n24\n</tool_response>" in text
    assert trained_text(row, chatml) == ['<tool_call>\n{"name": "price_of", "arguments": {"pub": "Vaults"}}\n</tool_call><|im_end|>', "No.<|im_end|>"]
    assert [n for n in counts.notes if "does not render tools" in n]


def test_a_template_with_tools_renders_them_itself() -> None:
    own = CHATML.replace("{%- for", "{%- if tools %}{{ tools|tojson }}{%- endif %}{%- for", 1).replace(
        "m['content'] +", "m['content'] + (('CALL' + m['tool_calls']|tojson) if m['tool_calls'] else '') +"
    )
    tok = byte_bpe(template=own, eos="<|im_end|>")
    row, counts = noted(TOOL_CHAT, tok)
    assert isinstance(row, Row)
    runs = trained_text(row, tok)
    assert runs[0].startswith("CALL[") and runs[1] == "No.<|im_end|>" and not counts.notes


# --- too long -------------------------------------------------------------------------------------------------------


def test_truncation_keeps_the_whole_answer_and_the_template(chatml: Any) -> None:
    question, answer = "near the river " * 30, "The Vaults is near it."
    whole = row_of(chat(question, answer), chatml)
    row, counts = noted(chat(question, answer), chatml, max_tokens=48)
    assert isinstance(row, Row)
    assert len(row) == 48 < len(whole)
    assert chatml.decode(row.ids[row.train]) == answer + "<|im_end|>"
    assert chatml.decode(row.ids).startswith("<|im_start|>user\n") and "<|im_end|>\n<|im_start|>assistant\nThe" in chatml.decode(row.ids)
    assert (counts.truncated, counts.cut_responses) == (1, 0)


def test_truncation_drops_the_earliest_exchanges_first_and_keeps_the_system_prompt(chatml: Any) -> None:
    last = row_of(chat(*THREE[4:], system="Be brief."), chatml)
    row = row_of(chat(*THREE, system="Be brief."), chatml, max_tokens=len(last) + 3)
    assert row.ids.tolist() == last.ids.tolist() and row.train.tolist() == last.train.tolist()


def test_truncation_keeps_the_beginning_token(with_bos: Any) -> None:
    row = row_of(chat("near the river " * 30, "No."), with_bos, "plain", max_tokens=20)
    assert with_bos.decode(row.ids).startswith("<s>") and with_bos.decode(row.ids).endswith("river \nNo.</s>") and len(row) == 20


def test_an_answer_longer_than_the_limit_loses_its_end_and_its_end_token(chatml: Any) -> None:
    row, counts = noted(chat("near the river " * 30, "The Vaults is near it. " * 30), chatml, max_tokens=64)
    assert isinstance(row, Row)
    assert len(row) == 64 and row.train[-1] and not chatml.decode(row.ids).endswith("<|im_end|>")
    assert (counts.truncated, counts.cut_responses) == (1, 1)
    asked = chatml.decode(row.ids[~row.train])
    assert "river" in asked  # an eighth of the limit stays for the question
    assert int(row.train.sum()) > 40


def test_a_limit_that_the_template_fills_drops_the_row(tokenizer: Any) -> None:
    dropped, counts = noted(chat("a", "b"), tokenizer, "alpaca", max_tokens=16)
    assert isinstance(dropped, Dropped) and not dropped.bad and counts.dropped_long == 1 and counts.truncated == 0


def test_dropping_is_counted_and_splitting_is_refused(chatml: Any) -> None:
    dropped, counts = noted(chat(*THREE), chatml, max_tokens=16, over_length="drop")
    assert isinstance(dropped, Dropped) and counts.dropped_long == 1
    with pytest.raises(LuthierError, match="split is for raw text"):
        noted(chat(*THREE), chatml, over_length="split")


@pytest.mark.parametrize("limit", range(12, 120, 7))
@pytest.mark.parametrize("fixture", ["chatml", "with_bos", "llama_like", "slow"])
def test_no_limit_makes_a_row_longer_than_it_or_one_that_trains_nothing(limit: int, fixture: str, request: pytest.FixtureRequest) -> None:
    tok = request.getfixturevalue(fixture)
    row = render_chat(chat(*THREE, system="Be brief, and friendly."), tok, "plain", max_tokens=limit)
    assert isinstance(row, Dropped) or (len(row) <= limit and row.train[1:].any() and len(row.ids) == len(row.train))


# --- real conversations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "own"])
def test_masks_of_real_rows_agree_with_the_slow_method(name: str, shared: Path, tokenizer: Any, chatml: Any) -> None:
    tok = chatml if name == "own" else tokenizer
    checked = 0
    for line in (shared / "data" / "instructions" / "alpaca_18k.jsonl").read_text().splitlines()[::60]:
        r = json.loads(line)
        if not line.isascii() or not (r["instruction"] + r["input"] + r["output"]).isascii() or not r["output"].strip():
            continue
        c = chat(f"{r['instruction']}\n{r['input']}" if r["input"].strip() else r["instruction"], r["output"])
        row = row_of(c, tok, None if name == "own" else name)
        ids, mask = by_hand(spelt(c, name), tok)
        assert row.ids.tolist() == ids and row.train.tolist() == mask
        checked += 1
    assert checked > 200
