"""Records of any shape to one normal form: a chat or a document."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .formats import SEPARATOR, Bad, Record
from .shapes import NEEDED, Chat, Document, Shape
from .trees import NAME as TREE
from .trees import paths

_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "function_call": "assistant", "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
MESSAGES = Shape("messages", {"messages": "messages"})
_BEFORE = {"user": ("", "system", "assistant"), "assistant": ("user", "tool"), "tool": ("assistant", "tool"), "system": ("",)}
_KEPT = ("name", "tool_call_id", "reasoning_content")  # further keys of a message that templates read


class RowError(Exception):
    """Why one record cannot be used; becomes a bad row."""


def convert(record: Record, shape: Shape, bad: Bad) -> list[Chat | Document]:
    """The record in normal form. Several answers to one prompt, and the best paths of a tree, become one chat each; a bad row is reported and gives none."""
    if shape.name == TREE:
        return [chat for path in paths(record, bad) for chat in convert(path, MESSAGES, bad)]
    try:
        if shape.is_text:
            return [_document(record, shape)]
        return _CONVERT[shape.name](record, shape)
    except RowError as e:
        bad.add(record.where, str(e))
        return []


def _part(record: Record, shape: Shape, ours: str) -> Any:
    """A part of the record; missing optional parts and nulls are None."""
    yours = shape.columns.get(ours)
    value = record.fields.get(yours) if yours is not None else None
    if value is None and ours in NEEDED[shape.name]:
        what = "is null" if yours in record.fields else f"is missing (columns found: {', '.join(record.fields)})"
        raise RowError(f"column {yours or ours!r} {what}")
    return value


def string(value: Any, what: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and value and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        return "".join(string(p.get("text", p.get("value")), what) for p in value)
    if isinstance(value, list) and value and all(isinstance(p, dict) and "type" in p for p in value):
        other = next(p["type"] for p in value if p["type"] != "text")
        raise RowError(f"{what} has a part of the type {other!r}; only text is accepted")
    raise RowError(f"{what} is {_kind(value)}; text is accepted")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return {bool: "true or false", list: "a list", dict: "an object"}.get(type(value), f"of the type {type(value).__name__}")


def answer(value: Any, what: str) -> str:
    """A response. An end marker that the file carries is removed: the renderer ends each turn with the model's own."""
    text = string(value, what)
    if text.rstrip().endswith(SEPARATOR):
        text = text.rstrip().removesuffix(SEPARATOR)
    if not text.strip():
        raise RowError(f"{what} is empty: there is nothing to learn from this row")
    return text


def _document(record: Record, shape: Shape) -> Document:
    text = string(_part(record, shape, "text"), f"column {shape.columns['text']!r}")
    if text.rstrip().endswith(SEPARATOR):
        text = text.rstrip().removesuffix(SEPARATOR)
    if not text.strip():
        raise RowError(f"column {shape.columns['text']!r} is empty")
    return Document(text, record.where, record.fields)


def _system(record: Record, shape: Shape) -> list[dict[str, Any]]:
    value = _part(record, shape, "system")
    return [{"role": "system", "content": string(value, "the system prompt")}] if value else []


def _prompt(record: Record, shape: Shape) -> list[Chat | Document]:
    prompt, completion = _part(record, shape, "prompt"), _part(record, shape, "completion")
    p_name, c_name = f"column {shape.columns['prompt']!r}", f"column {shape.columns['completion']!r}"
    if _is_messages(prompt):
        before, _ = _messages(prompt)
    else:
        before = [{"role": "user", "content": string(prompt, p_name)}]
    before = _system(record, shape) + before
    if _is_messages(completion):
        after, more = _messages(completion)
        # what stands in the prompt is given, not learned
        given = frozenset(i for i, m in enumerate(before) if m["role"] == "assistant")
        chat = _checked(before + after, None, record, given | {i + len(before) for i in more})
        return [chat]
    answers = completion if isinstance(completion, list) else [completion]
    if not answers:
        raise RowError(f"{c_name} is an empty list: there is nothing to learn from this row")
    given = frozenset(i for i, m in enumerate(before) if m["role"] == "assistant")
    return [_checked([*before, {"role": "assistant", "content": answer(a, c_name)}], None, record, given) for a in answers]


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in value)


def _alpaca(record: Record, shape: Shape) -> list[Chat | Document]:
    messages = _system(record, shape)
    for i, pair in enumerate(_part(record, shape, "history") or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(f"history[{i}] is not a pair [question, answer]")
        messages += [{"role": "user", "content": string(pair[0], f"history[{i}]")}, {"role": "assistant", "content": answer(pair[1], f"history[{i}]")}]
    asked = string(_part(record, shape, "instruction"), f"column {shape.columns['instruction']!r}")
    given = _part(record, shape, "input")
    if given is not None and (given := string(given, f"column {shape.columns['input']!r}")).strip():
        asked = f"{asked}\n{given}" if asked.strip() else given
    messages.append({"role": "user", "content": asked})
    messages.append({"role": "assistant", "content": answer(_part(record, shape, "output"), f"column {shape.columns['output']!r}")})
    return [_checked(messages, None, record, frozenset())]


def _conversation(record: Record, shape: Shape) -> list[Chat | Document]:
    column = NEEDED[shape.name][0]
    value = _part(record, shape, column)
    if not isinstance(value, list) or not value:
        raise RowError(f"column {shape.columns[column]!r} is {'an empty list' if value == [] else _kind(value)}; a list of messages is accepted")
    messages, untrained = _messages(value)
    system = _system(record, shape)
    if system and messages[0]["role"] == "system":
        raise RowError("two system prompts: a column 'system' and a first message with the role system")
    return [_checked(system + messages, _tools(_part(record, shape, "tools")), record, frozenset(i + len(system) for i in untrained))]


_CONVERT = {"prompt": _prompt, "alpaca": _alpaca, "messages": _conversation, "sharegpt": _conversation}


def _messages(value: Sequence[Any]) -> tuple[list[dict[str, Any]], set[int]]:
    """Messages with our role names, and the numbers of those whose weight says that they are not to be learned."""
    out, untrained = [], set()
    for i, m in enumerate(value):
        if not isinstance(m, dict):
            raise RowError(f"message {i + 1} is {_kind(m)}; accepted: {{role, content}} or {{from, value}}")
        given = m.get("role", m.get("from"))
        role = _ROLES.get(given) if isinstance(given, str) else None
        if role is None:
            raise RowError(f"message {i + 1} has the role {given!r}; accepted: {', '.join(_ROLES)}")
        content = m["content"] if "content" in m else m.get("value")
        message: dict[str, Any] = {"role": role, **{k: m[k] for k in _KEPT if m.get(k) is not None}}
        if given == "function_call":
            message |= {"content": "", "tool_calls": _calls(_parsed(content, f"message {i + 1}"), i)}
        elif m.get("tool_calls"):
            message |= {"content": string(content, f"message {i + 1}") if content else "", "tool_calls": _calls(m["tool_calls"], i)}
        elif role == "assistant":
            message["content"] = answer(content, f"message {i + 1} (assistant)")
        else:
            message["content"] = string(content, f"message {i + 1}")
        weight = next((m[k] for k in ("weight", "loss_weight", "train", "training") if m.get(k) is not None), 1)
        if weight not in (0, 1):
            raise RowError(f"message {i + 1} has the weight {weight!r}; 0 (not learned) and 1 (learned) are accepted")
        if not weight:
            untrained.add(i)
        out.append(message)
    return out, untrained


def _parsed(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as e:
        raise RowError(f"{what}: not JSON: {e.msg.lower()} at column {e.colno}") from None


def _calls(value: Any, i: int) -> list[dict[str, Any]]:
    """Tool calls as templates want them: {"type": "function", "function": {"name", "arguments": object}}."""
    calls = []
    for call in value if isinstance(value, list) else [value]:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise RowError(f"message {i + 1}: a tool call is {{name, arguments}} or {{function: {{name, arguments}}}}; found {str(call)[:60]}")
        arguments = _parsed(inner.get("arguments", {}), f"message {i + 1}: arguments of the tool call {inner['name']}")
        calls.append({**({"id": call["id"]} if "id" in call else {}), "type": "function", "function": {"name": inner["name"], "arguments": arguments}})
    return calls


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """The tool list; text is parsed (as ShareGPT files have it). None where there are none."""
    if isinstance(value, str) and not value.strip():
        return None
    value = _parsed(value, "tools")
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(t, dict) for t in value):
        raise RowError("tools is not a list of objects")
    return [t if "function" in t else {"type": "function", "function": t} for t in value]


def _checked(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, record: Record, untrained: frozenset[int] | set[int]) -> Chat:
    """Refuse an order of roles that no template was made for."""
    before = ""
    for i, m in enumerate(messages):
        role = m["role"]
        if before not in _BEFORE[role]:
            if role == "system":
                raise RowError(f"message {i + 1}: the role system comes only first")
            after = f"after {before}" if before else "first"
            raise RowError(f"message {i + 1}: the role {role} comes {after}; accepted before it: {', '.join(b or 'nothing' for b in _BEFORE[role])}")
        before = role
    learned = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i not in untrained]
    if not learned:
        raise RowError("no assistant message to learn from")
    return Chat(messages, tools, record.where, frozenset(untrained), record.fields)
