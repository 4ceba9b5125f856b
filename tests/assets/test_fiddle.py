"""The embedded base's tokenizer, chat template and configuration."""

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaForCausalLM

import luthier

FOLDER = Path(luthier.__file__).parent / "assets" / "fiddle"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.mark.parametrize(
    "text", ["name[The Vaults], price[£20-25]", "naïve “curly” 日本 🎻\r\n\t  x  \n\n", " leading and trailing ", "it's they'll 1894", "", "\x00\x7f"]
)
def test_any_text_comes_back_byte_for_byte(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_byte_has_a_token(tokenizer):
    text = "".join(chr(c) for c in range(0x800)) + "\U0001f3bb\uffff"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_are_single_lowest_ids_and_nothing_is_added(tokenizer):
    names = ["<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>", *(f"<|reserved_{k}|>" for k in range(9))]
    assert [tokenizer(name)["input_ids"] for name in names] == [[i] for i in range(16)]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (0, 1, None)
    assert tokenizer("ab")["input_ids"] == tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert len(tokenizer) == 4096


def test_digits_are_read_one_by_one(tokenizer):
    assert tokenizer.tokenize("1894")[-4:] == ["1", "8", "9", "4"]


CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "now?"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": {"zone": 1}}}]},
    {"role": "tool", "content": "noon"},
    {"role": "assistant", "content": "Noon."},
]


def test_the_template_writes_every_role_and_the_tools(tokenizer):
    text = tokenizer.apply_chat_template(CONVERSATION, tools=[{"name": "now"}], tokenize=False, add_generation_prompt=True)
    assert text == (
        '<|system|>\nBe kind.\n\nTools:\n{"name": "now"}<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello.<|end|>\n<|user|>\nAnd now?<|end|>\n'
        '<|assistant|>\n{"name": "now", "arguments": {"zone": 1}}<|end|>\n<|tool|>\nnoon<|end|>\n<|assistant|>\nNoon.<|end|>\n<|assistant|>\n'
    )
    alone = tokenizer.apply_chat_template(CONVERSATION[1:2], tools=[{"name": "now"}], tokenize=False)
    assert alone == '<|system|>\nTools:\n{"name": "now"}<|end|>\n<|user|>\nHi<|end|>\n'


def test_the_mask_covers_what_the_assistant_said_and_its_end_of_turn(tokenizer):
    out = tokenizer.apply_chat_template(CONVERSATION, return_dict=True, return_assistant_tokens_mask=True)
    trained = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(trained) == 'Hello.<|end|>{"name": "now", "arguments": {"zone": 1}}<|end|>Noon.<|end|>'


def test_a_prompt_is_a_prefix_of_its_conversation(tokenizer):
    prompt = tokenizer.apply_chat_template(CONVERSATION[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(CONVERSATION[:3], return_dict=True)["input_ids"]
    assert whole[: len(prompt)] == prompt


def test_an_unknown_role_is_refused_by_name(tokenizer):
    with pytest.raises(Exception, match="'critic'"):
        tokenizer.apply_chat_template([{"role": "critic", "content": "no"}])


def test_the_model_is_of_5_to_10_million_parameters_and_stops_at_the_end_of_a_turn():
    config = AutoConfig.from_pretrained(FOLDER)
    size = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    assert 5e6 < size < 10e6 and config.max_position_embeddings >= 1024
    assert GenerationConfig.from_pretrained(FOLDER).eos_token_id == [6, 0]
