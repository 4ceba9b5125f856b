"""luthier chat: talk to a model in the terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from . import heavy


def command(
    what: Annotated[str, typer.Argument(help="fiddle, a model folder, a Hub id, an adapter or a run's folder.")] = "fiddle",
    model: Annotated[str | None, typer.Option(help="The adapter's base, where it is not where the adapter says.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Choose among the likeliest tokens that make up this share.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same answers.")] = 0,
    precision: Annotated[str, typer.Option(help="float32, bfloat16, or auto: what this machine does fast.")] = "auto",
    adapter: Annotated[list[str] | None, typer.Option(help="One more adapter on the same base, NAME=FOLDER; may be given several times.")] = None,
    use: Annotated[str | None, typer.Option(help="What answers at first: a name, a+b for a stack, none. Default: the first argument's.")] = None,
) -> None:
    """Talk: /base switches the adapter off and on, /use NAME takes another, /reset forgets the conversation, /exit (or Ctrl-D) ends."""
    heavy("opening")
    from ..data.render import render_prompt, stop_ids
    from ..errors import LuthierError
    from ..generating.prepacked import products
    from ..measuring.measure import can_write
    from ..opening import load, named

    policy = load(what, model=model, precision=precision, adapters=named(adapter or []), use=use)
    can_write(policy)
    tokenizer = policy.base.tokenizer
    name = policy.active
    stops = stop_ids(tokenizer, None)
    messages = start = [{"role": "system", "content": system}] if system else []
    typer.echo(f"{what} on {policy.device}. {'/base switches the adapter off and on, ' if name else ''}/reset forgets, /exit ends.")
    with products(policy.lm, max_new):  # weights are laid out once for all turns
        turn = 0
        while True:
            try:
                said = input("> ").strip()
            except EOFError:
                typer.echo()
                return
            if said in ("/exit", "/quit"):
                return
            if said == "/reset":
                messages = list(start)
                typer.echo("forgotten")
            elif said == "/base" and name:
                policy.use(None if policy.active else name)
                typer.echo("adapter off: this is the base" if policy.active is None else "adapter on")
            elif said.startswith("/use "):
                try:
                    policy.use(None if said.split()[1] == "none" else said.split()[1])
                    name = policy.active or name
                    typer.echo(f"now answers: {policy.active or 'the base'}")
                except LuthierError as e:
                    typer.echo(str(e))
            elif said.startswith("/"):
                typer.echo(f"{said}: there are /reset, {'/base, /use NAME, ' if name else ''}/exit")
            elif said:
                messages = [*messages, {"role": "user", "content": said}]
                ids = list(render_prompt(messages, tokenizer, None))
                if len(ids) >= policy.limit - 8:
                    typer.echo(f"the conversation is {len(ids)} tokens long, all this model can read; /reset forgets it")
                    messages = messages[:-1]
                    continue
                printer = _Printer(tokenizer)
                out = policy.generate([ids], max_new=max_new, temperature=temperature, top_p=top_p, seed=seed + turn, stop=stops, on_token=printer)
                typer.echo()
                messages = [*messages, {"role": "assistant", "content": tokenizer.decode(out.ids[0], skip_special_tokens=True).strip()}]
                turn += 1


class _Printer:
    """Prints tokens as they come; a character that several tokens make is printed when it is whole."""

    def __init__(self, tokenizer: object):
        self.tokenizer, self.ids, self.shown = tokenizer, [], 0  # type: ignore[var-annotated]

    def __call__(self, token: int) -> None:
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)  # type: ignore[attr-defined]
        if not text.endswith("\ufffd"):
            typer.echo(text[self.shown :], nl=False)
            self.shown = len(text)
