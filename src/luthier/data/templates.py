"""Chat templates: the tokenizer's own, a named one, or a file; what each can render is tried and not assumed."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..core import LuthierError

Messages = list[dict[str, Any]]

TEMPLATES = {
    # prompt, newline, response, end token: nothing that a model without chat training would not have seen
    "plain": (
        "{%- for m in messages %}{{ m['content'] }}"
        "{%- if m['role'] == 'assistant' %}{{ eos_token }}{%- if not loop.last %}{{ '\\n' }}{%- endif %}"
        "{%- else %}{{ '\\n' }}{%- endif %}{%- endfor %}"
    ),
    "chatml": (
        "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
    ),
    # Taori et al., 2023: the preamble of Stanford Alpaca, which a system message replaces
    "alpaca": (
        "{%- if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}"
        "{%- else %}{{ 'Below is an instruction that describes a task. Write a response that appropriately completes the request.\\n\\n' }}{%- endif %}"
        "{%- for m in messages %}{%- if m['role'] == 'user' %}{{ '### Instruction:\\n' + m['content'] + '\\n\\n' }}"
        "{%- elif m['role'] == 'assistant' %}{{ '### Response:\\n' + m['content'] + eos_token }}{%- if not loop.last %}{{ '\\n\\n' }}{%- endif %}"
        "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{ '### Response:\\n' }}{%- endif %}"
    ),
    "zephyr": (
        "{%- for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{%- endif %}"
    ),
    "llama2": (
        "{%- for m in messages %}{%- if m['role'] == 'system' %}{{ '[INST] <<SYS>>\\n' + m['content'] + '\\n<</SYS>>\\n\\n' }}"
        "{%- elif m['role'] == 'user' %}{{ ('' if loop.index0 == 1 and messages[0]['role'] == 'system' else '[INST] ') + m['content'].strip() + ' [/INST]' }}"
        "{%- else %}{{ ' ' + m['content'].strip() + eos_token }}{%- endif %}{%- endfor %}"
    ),
    "llama3": (
        "{%- for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'].strip() + '<|eot_id|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
    ),
    "gemma": (
        "{%- for m in messages %}{%- if m['role'] == 'system' %}{{ raise_exception('no system role') }}{%- endif %}"
        "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + m['content'].strip() + '<end_of_turn>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{%- endif %}"
    ),
    "vicuna": (
        "{%- for m in messages %}{%- if m['role'] == 'system' %}{{ m['content'] + ' ' }}{%- elif m['role'] == 'user' %}{{ 'USER: ' + m['content'] }}"
        "{%- else %}{{ ' ASSISTANT: ' + m['content'] + eos_token }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{ ' ASSISTANT:' }}{%- endif %}"
    ),
}  # fmt: skip


class Refused(Exception):
    """The template raised an error on a conversation."""


class Template:
    """One template with its tokenizer. ``note`` is what the user should know about the choice."""

    def __init__(self, tokenizer: Any, template: str | None) -> None:
        self.tokenizer, self.note = tokenizer, ""
        self.source: str | None = None  # None: the tokenizer's own
        if template is None and tokenizer.chat_template:
            self.name = "the model's own"
        elif template is None:
            self.name, self.source = "plain", TEMPLATES["plain"]
            self.note = "the tokenizer has no chat template: plain is used (prompt, newline, response, end token); set model.template for another"
        elif template in TEMPLATES:
            self.name, self.source = template, TEMPLATES[template]
        else:
            self.name, self.source = template, _from_file(template)
        own = tokenizer.chat_template
        texts = [self.source] if self.source is not None else list(own.values()) if isinstance(own, dict) else [own]
        self._openings: dict[tuple[Any, ...], str] = {}
        self.marks_responses = any(re.search(r"\{%-?\s*generation\s*-?%\}", t) for t in texts)
        self.takes_system = self._can([_SYSTEM, _USER, _ANSWER], None, ("probe_system",))
        self.takes_tools = self._can([_USER, _CALL, _RESULT, _ANSWER], _PROBE_TOOLS, ("probe_call", "probe_result", "probe_schema"))

    def _can(self, messages: Messages, tools: list[dict[str, Any]] | None, shown: Sequence[str]) -> bool:
        try:
            text = self.text(messages, tools)
        except Refused:
            return False
        return all(word in text for word in shown)

    def text(self, messages: Messages, tools: list[dict[str, Any]] | None = None, *, generation: bool = False) -> str:
        """The conversation as the model reads it; with ``generation``, up to where its answer begins."""
        try:
            texts = messages and tools is None and all(m.keys() == _ONLY and type(m["role"]) is type(m["content"]) is str for m in messages)
            if texts and (compiled := _compiled()) is not None:
                return self._text_of_texts(messages, generation, compiled)
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self.source, tokenize=False, add_generation_prompt=generation
            )  # fmt: skip
        except Exception as e:  # a template is a program of someone else's: jinja errors, but also TypeError and KeyError
            raise Refused(" ".join(str(e).split())[:200] or type(e).__name__) from None

    def _text_of_texts(self, messages: Messages, generation: bool, compiled: Callable[[str], Any]) -> str:
        """The same for roles and contents alone: what transformers does with them, save that texts need not be made safe, nor prompts rendered twice."""
        source, special = self.source or self.tokenizer.get_chat_template(), self.tokenizer.special_tokens_map
        opening = generation and "strftime_now" not in source  # the same until the clock says otherwise
        asked = (source, *special.items(), *((m["role"], m["content"]) for m in messages)) if opening else ()
        if opening and asked in self._openings:
            return self._openings[asked]
        kept = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": generation}
        text: str = compiled(source).render(**{**special, **kept})
        if opening:
            if len(self._openings) == OPENINGS:
                self._openings.clear()
            self._openings[asked] = text
        return text

    def marked(self, messages: Messages, tools: list[dict[str, Any]] | None) -> tuple[str, list[tuple[int, int]]]:
        """The conversation and the character spans of its {% generation %} blocks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        source = self.source or self.tokenizer.get_chat_template(tools=tools)
        try:
            texts, spans = render_jinja_template(
                [messages], tools=tools, chat_template=source, return_assistant_tokens_mask=True, **self.tokenizer.special_tokens_map
            )
        except Exception as e:
            raise Refused(" ".join(str(e).split())[:200] or type(e).__name__) from None
        return texts[0], [(int(a), int(b)) for a, b in spans[0]]

    def adapt(self, messages: Messages, tools: list[dict[str, Any]] | None) -> tuple[Messages, list[dict[str, Any]] | None, list[str]]:
        """The conversation as this template can render it, and notes on what had to be rewritten. Message numbers stay, save a leading system's."""
        notes = []
        if not self.takes_tools and (tools or any(m["role"] == "tool" or m.get("tool_calls") for m in messages)):
            messages, tools = _tools_as_text(messages, tools), None
            notes.append("the template does not render tools: calls, results and schemas are written as text (<tool_call> JSON </tool_call>)")
        if not self.takes_system and messages[0]["role"] == "system" and len(messages) > 1:
            joined = f"{messages[0]['content']}\n\n{messages[1]['content']}"
            messages = [messages[1] | {"content": joined}, *messages[2:]]
            notes.append("the template has no system role: the system prompt is put before the first question")
        return messages, tools, notes


_ONLY = {"role", "content"}
OPENINGS = 4096  # prompts remembered as rendered: data often answers one several times
_SYSTEM = {"role": "system", "content": "probe_system"}
_USER = {"role": "user", "content": "probe_user"}
_ANSWER = {"role": "assistant", "content": "probe_answer"}
_CALL = {
    "role": "assistant",
    "content": "",
    # nine characters, because Mistral's templates refuse call ids of another length
    "tool_calls": [{"id": "abcdef123", "type": "function", "function": {"name": "probe_call", "arguments": {"x": "1"}}}],
}
_RESULT = {"role": "tool", "name": "probe_call", "tool_call_id": "abcdef123", "content": "probe_result"}
_PROBE_TOOLS = [{"type": "function", "function": {"name": "probe_schema", "description": "d", "parameters": {"type": "object", "properties": {}}}}]


def _compiled() -> Callable[[str], Any] | None:
    """The function of transformers that compiles a template, in its sandbox; None where a version has another."""
    from transformers.utils import chat_template_utils

    return getattr(chat_template_utils, "_compile_jinja_template", None)


def _tools_as_text(messages: Messages, tools: list[dict[str, Any]] | None) -> Messages:
    """The spelling that Hermes and Qwen models use, in ordinary turns."""
    out: Messages = []
    for m in messages:
        if m["role"] == "tool":
            m = {"role": "user", "content": f"<tool_response>\n{m['content']}\n</tool_response>"}
            if out and out[-1]["role"] == "user":  # several results: one turn
                out[-1] = out[-1] | {"content": f"{out[-1]['content']}\n{m['content']}"}
                continue
        elif m.get("tool_calls"):
            calls = [f"<tool_call>\n{json.dumps(c['function'], ensure_ascii=False)}\n</tool_call>" for c in m["tool_calls"]]
            m = {"role": "assistant", "content": "\n".join(([m["content"]] if m["content"] else []) + calls)}
        out.append(m)
    if tools:
        schemas = "\n".join(json.dumps(t.get("function", t), ensure_ascii=False) for t in tools)
        text = f"You can call these tools with <tool_call> JSON </tool_call>:\n{schemas}"
        if out[0]["role"] == "system":
            out[0] = out[0] | {"content": f"{out[0]['content']}\n\n{text}"}
        else:
            out.insert(0, {"role": "system", "content": text})
    return out


def _from_file(template: str) -> str:
    path = Path(template).expanduser()
    if path.suffix in (".jinja", ".jinja2", ".j2"):
        if not path.is_file():
            raise LuthierError(f"model.template: no file {template}.")
        return path.read_text(encoding="utf-8")
    near = difflib.get_close_matches(template, TEMPLATES, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise LuthierError(f"model.template: {template!r} is no template.{hint} Accepted: {', '.join(TEMPLATES)}, or a .jinja file.")
