"""luthier generate: answers to one prompt, or to a file of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import heavy

if TYPE_CHECKING:
    from ..policy import Policy

WINDOW = 256  # answers asked for and written at a time


def command(
    what: Annotated[str, typer.Argument(help="fiddle, a model folder, a Hub id, an adapter or a run's folder.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    input: Annotated[Path | None, typer.Option(help='Prompts, one JSON object a line: {"prompt": ...} or {"messages": [...]}.')] = None,
    output: Annotated[Path | None, typer.Option(help="Answers, one JSON object a line, in order; an interrupted file is continued.")] = None,
    model: Annotated[str | None, typer.Option(help="The adapter's base, where it is not where the adapter says.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message before every prompt.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")] = False,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each prompt; more than one need a temperature.")] = 1,
    max_new: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Choose among the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Choose among the likeliest tokens that make up this share.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same answers.")] = 0,
    precision: Annotated[str, typer.Option(help="float32, bfloat16, or auto: what this machine does fast.")] = "auto",
    adapter: Annotated[list[str] | None, typer.Option(help="One more adapter on the same base, NAME=FOLDER; may be given several times.")] = None,
    use: Annotated[str | None, typer.Option(help="What answers: a name of --adapter, default (that of the first argument), a+b for a stack, none.")] = None,
    engine: Annotated[Literal["luthier", "vllm"], typer.Option(help="What runs the model; vllm needs a GPU and the extra of that name.")] = "luthier",
) -> None:
    """Generate: `luthier generate runs/NAME --prompt "..."`, or `--input prompts.jsonl --output answers.jsonl` in batches."""
    from ..errors import LuthierError

    if bool(prompt) == bool(input):
        raise LuthierError('say either --prompt "..." or --input FILE.jsonl')
    if input and not output:
        raise LuthierError("--input needs --output: where the answers go, one JSON object a line")
    if samples > 1 and temperature == 0:
        raise LuthierError(f"--samples {samples} with a temperature of 0 would be the same answer {samples} times; set --temperature, for example 1")
    how = {"samples": samples, "max_new": max_new, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    rows = _read(input) if input else [{"prompt": p} for p in prompt or []]
    done = _done(output, rows, samples) if output else 0
    if output and done == len(rows) * samples:
        typer.echo(f"{output}: all {done} answers are there already")
        return
    policy = _opened(what, model, precision, adapter or [], use, engine)
    if output:
        _to_file(policy, rows, output, done, system, raw, how)
        return
    for row in rows:
        for s, out in enumerate(_answers(policy, [row], system, raw, 0, how), 1):
            typer.echo(f"[{s} of {samples}] {out['answer']}" if samples > 1 else out["answer"])


def _opened(what: str, model: str | None, precision: str, adapters: list[str], use: str | None, engine: str) -> Policy:
    """The model that answers: a policy, or an engine that answers as one."""
    heavy("opening")
    from ..errors import LuthierError
    from ..measuring.measure import can_write

    if engine == "vllm":
        from ..feedback.vllm_engine import open_engine

        if adapters or use or precision not in ("auto", "float32", "bfloat16"):
            raise LuthierError("--engine vllm serves the model or the LoRA that is named first, in float32 or bfloat16; leave out --adapter and --use")
        return open_engine(what, model=model, **({} if precision == "auto" else {"dtype": precision}))  # type: ignore[return-value]
    from ..opening import load, named

    policy = load(what, model=model, precision=precision, adapters=named(adapters), use=use)
    can_write(policy)
    return policy


def _to_file(policy: Policy, rows: list[dict[str, Any]], output: Path, done: int, system: str | None, raw: bool, how: dict[str, Any]) -> None:
    from rich.progress import track

    samples = how["samples"]
    if done:
        typer.echo(f"{output}: going on after {done} of {len(rows) * samples}")
    window = max(1, WINDOW // samples)
    with output.open("a", encoding="utf-8") as f:
        for start in track(range(done // samples, len(rows), window), description="answering"):
            got = _answers(policy, rows[start : start + window], system, raw, start, how)
            for i, out in enumerate(got, start * samples):
                if i >= done:
                    which = {"sample": i % samples} if samples > 1 else {}
                    line = {**rows[i // samples], **which, **{k: out[k] for k in ("answer", "stopped", "tokens")}}
                    f.write(json.dumps(line, ensure_ascii=False) + "\n")
            f.flush()
    typer.echo(f"{output}: {len(rows) * samples} answers")


def _answers(policy: Policy, rows: list[dict[str, Any]], system: str | None, raw: bool, first: int, how: dict[str, Any]) -> list[dict[str, Any]]:
    """To each row ``how["samples"]`` answers, side by side."""
    from ..measuring.measure import answer

    if raw:
        tokenizer = policy.base.tokenizer
        ids = [tokenizer(r["prompt"])["input_ids"] for r in rows]
        rollout = policy.generate(ids, stop=[tokenizer.eos_token_id], numbers=range(first, first + len(ids)), **how)
        texts = [tokenizer.decode(i, skip_special_tokens=True) for i in rollout.ids]
        return [{"answer": t, "stopped": s, "tokens": len(i)} for t, s, i in zip(texts, rollout.stopped, rollout.ids, strict=True)]
    before = [{"role": "system", "content": system}] if system else []
    chats = [
        before + (r["messages"] if "messages" in r else r["prompt"] if isinstance(r["prompt"], list) else [{"role": "user", "content": r["prompt"]}])
        for r in rows
    ]
    return answer(policy, chats, offset=first, **how)


def _read(path: Path) -> list[dict[str, Any]]:
    from ..errors import LuthierError

    if not path.is_file():
        raise LuthierError(f"{path}: no such file; prompts are read from a .jsonl file")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise LuthierError(f"{path}:{number}: not JSON: {e}") from None
        if not isinstance(row, dict) or not ("prompt" in row or "messages" in row):
            raise LuthierError(f'{path}:{number}: each line is {{"prompt": ...}} or {{"messages": [...]}}; found {line[:80]}')
        rows.append(row)
    if not rows:
        raise LuthierError(f"{path}: holds no prompt")
    return rows


def _done(output: Path, rows: list[dict[str, Any]], samples: int) -> int:
    """How many answers a file holds already; a half-written last line is dropped. Raises LuthierError where they answer other prompts."""
    from ..errors import LuthierError

    if not output.parent.is_dir():
        raise LuthierError(f"{output}: there is no folder {output.parent}")
    if not output.exists():
        return 0
    lines = output.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("}\n")]
    for i, (line, row) in enumerate(zip(whole, (r for r in rows for _ in range(samples)), strict=False)):
        there = json.loads(line)
        if there.get("sample", 0) != i % samples:
            raise LuthierError(f"{output}:{i + 1}: was written with another number of --samples; choose another --output, or delete it")
        if any(there.get(k) != row[k] for k in ("prompt", "messages") if k in row):
            raise LuthierError(f"{output}:{i + 1}: answers another prompt than the input's; choose another --output, or delete it")
    if len(whole) > len(rows) * samples:
        raise LuthierError(f"{output}: holds {len(whole)} answers, and {len(rows) * samples} are asked for; choose another --output")
    if len(whole) < len(lines):
        output.write_text("".join(whole), encoding="utf-8")
    return len(whole)
