"""The Run: a whole run on one page. YAML files and ``Run(...)`` in Python are the same object.

Each field has one sentence below it; `luthier kinds --schema` and the errors of config.py use it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from .config import completed
from .plugins import Plug, Range


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which pretrained model, and how it is opened."""

    shorthand: ClassVar[str] = "id"

    id: str = "fiddle"
    """The embedded base (fiddle), a folder, or a Hub id."""
    revision: str | None = None
    """A branch, tag or commit of a Hub id."""
    random: bool = False
    """Start from random weights (pretraining): only the configuration and the tokenizer are read."""
    offline: bool = False
    """Never ask the Hub; use only what is on this machine."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you ask."""
    dropout: Annotated[float | None, Range(0, 1)] = None
    """Dropout inside the base. Default: 0 for a frozen base, the model's own for full fine-tuning."""
    cache: Literal["auto", "yes", "no"] = "auto"
    """Keep a base that was quantised on disk, so that it opens at once the next time. auto: from 500 million parameters up."""
    template: str | None = None
    """Chat template: a name (chatml, alpaca, plain, ...) or a .jinja file. Default: the model's own."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is trained on, and how records become tokens."""

    shorthand: ClassVar[str] = "train"

    train: tuple[str, ...] = ()
    """Files (.jsonl .json .csv .tsv .parquet .txt; .label .all: label, space, text), folders of these, or Hub data set ids."""
    validation: tuple[str, ...] = ()
    """Held-out files. Default: a share of the training rows is held out."""
    validation_share: Annotated[float, Range(0, 0.9)] = 0.05
    """Share of the training rows held out where no validation file is named (at most validation_rows)."""
    validation_rows: Annotated[int, Range(1)] = 500
    """At most so many rows are evaluated during training."""
    general: tuple[str, ...] = ()
    """Text files of general language on which forgetting is measured. Default: a small text that ships with the program."""
    shape: Literal["auto", "text", "prompt", "alpaca", "messages", "sharegpt", "label"] = "auto"
    """The shape of a record. auto: detected, and printed."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column mapping, ours: yours, for example {prompt: question, completion: answer} or {text: review, label: stars}."""
    split: str = "train"
    """The split of a Hub data set."""
    languages: tuple[str, ...] = ()
    """Read only what is in these languages, for example [en, de]: conversation trees, and records with a column lang or language. Default: all."""
    limit: Annotated[int | None, Range(1)] = None
    """Read at most so many records."""
    max_tokens: Annotated[int | None, Range(8)] = None
    """Longest example, in tokens. Default: what the model allows, at most 2,048."""
    over_length: Literal["drop", "truncate", "split"] = "truncate"
    """What happens to a longer one: dropped, its prompt truncated (the response is kept), or split. Raw text is always split rather than truncated."""
    train_on: Literal["all", "last"] = "all"
    """Which assistant turns of a conversation are trained: all of them, or the last."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """A malformed row stops the run, or is skipped and counted."""
    pack: Literal["auto", "yes", "no"] = "auto"
    """Examples share rows without padding and without seeing one another. auto: where the model was found to allow it."""
    cache: Literal["auto", "yes", "no"] = "auto"
    """Keep prepared data on disk, and read it from there while nothing it depends on has changed. auto: from a million bytes of data up."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    """How it is trained."""

    lr: Annotated[float | None, Range(0, 1, low_open=True)] = None
    """Peak learning rate. Default: by method and model width, printed and explained."""
    epochs: Annotated[float, Range(0, low_open=True)] = 3.0
    """Passes over the training data, unless steps is given."""
    steps: Annotated[int | None, Range(1)] = None
    """Optimizer steps; overrides epochs."""
    batch_tokens: Annotated[int, Range(1)] = 8192
    """Tokens per optimizer step, padding not counted."""
    batch_examples: Annotated[int | None, Range(1)] = None
    """Examples per optimizer step; overrides batch_tokens."""
    micro_tokens: Annotated[int, Range(1)] = 8192
    """Tokens per forward and backward; a step accumulates as many as it needs, with identical results."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup: Annotated[float, Range(0, 1)] = 0.06
    """Warm-up, as a share of all steps."""
    min_lr: Annotated[float, Range(0, 1)] = 0.0
    """Where cosine and linear end, as a share of the peak."""
    weight_decay: Annotated[float, Range(0)] = 0.01
    """AdamW weight decay, on matrices only."""
    beta1: Annotated[float, Range(0, 1)] = 0.9
    """AdamW beta 1."""
    beta2: Annotated[float, Range(0, 1)] = 0.999
    """AdamW beta 2."""
    eps: Annotated[float, Range(0, low_open=True)] = 1e-8
    """AdamW epsilon."""
    state: Literal["float32", "8bit", "paged-8bit"] = "float32"
    """How AdamW keeps its moments. 8bit: in a quarter of the memory (CUDA, bitsandbytes); paged-8bit: the same, moving to the CPU's memory where it must."""
    clip: Annotated[float, Range(0)] = 1.0
    """Largest gradient norm; 0: no clipping."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """What is measured before, during and after."""

    every_steps: Annotated[int | None, Range(1)] = None
    """Evaluate every so many steps. Default: about ten times a run."""
    patience: Annotated[int | None, Range(1)] = None
    """Stop after so many evaluations without a better validation loss. Default: never."""
    best: bool = True
    """Keep the weights of the best validation loss; no: of the last step."""
    samples: Annotated[int, Range(0)] = 3
    """So many fixed validation prompts are answered at each evaluation and written to samples.jsonl."""
    sample_tokens: Annotated[int, Range(1)] = 64
    """Longest sample, in tokens."""
    tasks: tuple[str, ...] = ()
    """Tasks scored on the validation rows before and after training (bleu, exact_match, ...)."""
    task_rows: Annotated[int, Range(1)] = 200
    """At most so many rows per task."""
    forgetting: bool = True
    """Measure the loss on general text before and after."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What is kept to go on from."""

    every_steps: Annotated[int | None, Range(1)] = None
    """Save every so many steps. Default: at every evaluation."""
    keep: Annotated[int, Range(1)] = 2
    """Keep the newest so many checkpoints (the best delta is kept beside them)."""


@dataclass(frozen=True, kw_only=True)
class Log:
    """Where metrics go besides metrics.jsonl."""

    shorthand: ClassVar[str] = "to"

    to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Loggers to write to; each must be installed."""
    every_steps: Annotated[int, Range(1)] = 1
    """Write a line every so many steps."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A whole run: model x method x objective x precision x place, the data, and how it is trained and judged."""

    model: Model = Model()
    """The pretrained model."""
    data: Data = Data()
    """The data."""
    method: Annotated[Any, Plug("methods", "Method")] = "lora"
    """What is added and what trains."""
    objective: Annotated[Any, Plug("objectives", "Objective")] = "sft"
    """What the loss is."""
    precision: Annotated[Any, Plug("precision", "Precision")] = "auto"
    """How the frozen weights are stored. auto: what this machine does fast."""
    place: Annotated[Any, Plug("place", "Place")] = "one"
    """Where it runs."""
    optim: Optim = Optim()
    """How it is trained."""
    evaluate: Evaluate = Evaluate()
    """What is measured."""
    checkpoint: Checkpoint = Checkpoint()
    """What is kept."""
    log: Log = Log()
    """Where metrics go."""
    tokens: tuple[str, ...] = ()
    """Tokens to add to the vocabulary, for example [<tool>]; their rows are trained and saved with the delta, whatever the method."""
    seed: Annotated[int, Range(0)] = 0
    """The same seed twice gives the same bits on CPU."""
    name: str | None = None
    """The run's name. Default: from the data, the method and the time."""
    out: str = "runs"
    """The folder that holds runs."""
    recompute: Literal["none", "blocks"] = "none"
    """blocks: do not keep activations inside transformer blocks; compute them again in backward (less memory, more time)."""

    def __post_init__(self) -> None:
        """Check and complete, so that Run(method="lora") in Python is what `method: lora` is in a file. Raises ConfigError."""
        for name, value in completed(self).items():
            object.__setattr__(self, name, value)
