"""The Run: a whole run on one page. YAML files and ``Run(...)`` in Python are the same object.

Each field has one sentence below it; `luthier kinds --schema` and the errors of config.py use it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal

from ..errors import ConfigError, LuthierError
from .config import completed
from .mix import Mix
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
class Replay:
    """What keeps a model from forgetting: other text learned beside the data, and pulls towards what it was before training."""

    shorthand: ClassVar[str] = "source"

    source: tuple[str, ...] = ()
    """General text or conversations learned beside the data: files, folders or Hub data set ids; self: text that the base itself writes before training."""
    share: Annotated[float | None, Range(0, 0.9, low_open=True)] = None
    """Share of the tokens of a step that is replayed, on top of the data's own. Default: 0.05 where source is named."""
    weight: Annotated[float | None, Range(0)] = None
    """Weight of the mean loss of the replayed tokens beside the objective's. Default: share / (1 - share), so that all tokens of a step count alike."""
    row_tokens: Annotated[int | None, Range(8)] = None
    """Longest piece that replayed raw text is cut to. Default: what a step replays, at least 64, so that every step gets some."""
    self_rows: Annotated[int | None, Range(2)] = None
    """Texts that the base writes where source is self. Default: 512."""
    self_tokens: Annotated[int | None, Range(8)] = None
    """Tokens of each at most. Default: 128."""
    kl: Annotated[float, Range(0)] = 0.0
    """Weight of the divergence KL(before || now) of the next token's distribution from what it was before training, in nats a token; 0: none."""
    kl_on: Literal["replay", "trained"] | None = None
    """Tokens at which it is taken: the replayed ones, or those that the objective trains. Default: replay where source is named."""
    l2sp: Annotated[float, Range(0)] = 0.0
    """Half of this times the squared distance of the trained weights from where they started is added to the loss; 0: none."""

    def __post_init__(self) -> None:
        if not self.source:
            for name in ("share", "weight", "row_tokens", "self_rows", "self_tokens"):
                if getattr(self, name) is not None:
                    raise LuthierError(f"{name}: nothing is replayed, so this does nothing; name general text in data.replay.source, or self")
        if "self" not in self.source:
            for name in ("self_rows", "self_tokens"):
                if getattr(self, name) is not None:
                    raise LuthierError(f"{name}: the base writes no text here, so this does nothing; set data.replay.source=self, or leave it out")
        if self.kl_on is not None and not self.kl:
            raise LuthierError("kl_on: there is no divergence to take, so this does nothing; set data.replay.kl, for example 0.1, or leave it out")
        if self.kl_on == "replay" and not self.source:
            raise LuthierError("kl_on: nothing is replayed; name general text in data.replay.source, or self, or set kl_on: trained")
        if self.weight == 0 and not (self.kl and self.kl_on != "trained"):
            raise LuthierError("weight: found 0, so what is replayed would teach nothing; set kl to hold the model on it, or leave weight out")
        if self.source and self.share is None:
            object.__setattr__(self, "share", 0.05)
        if self.kl and self.kl_on is None:
            object.__setattr__(self, "kl_on", "replay" if self.source else "trained")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """How often the rows of an epoch are drawn, where not once each."""

    shorthand: ClassVar[str] = "by"

    by: Literal["label", "difficulty"] | None = None
    """label: labels evenly (objective classify); difficulty: challenging rows more often, by the base's own loss on each before training."""
    balance: Annotated[float | None, Range(0, 1, low_open=True)] = None
    """By label: a label of n rows is drawn in proportion to n to the power of 1 - balance. Default: 1, all labels equally often."""
    hard: Annotated[float | None, Range(0, 1)] = None
    """By difficulty: the share of an epoch that is drawn from the hardest rows. Default: 0.3."""
    hardest: Annotated[float | None, Range(0, 0.9, low_open=True)] = None
    """By difficulty: which rows are the hardest: this share of them, trivial and broken ones left out. Default: 0.2."""
    trivial: Annotated[float | None, Range(0)] = None
    """By difficulty: a row is trivial where the base's loss is below so many nats a token. Default: 0.1."""
    broken: Annotated[float | None, Range(0)] = None
    """By difficulty: a row is broken where the base's loss is so many interquartile ranges above the upper quartile, or worse than chance. Default: 3."""
    drop: tuple[Literal["trivial", "broken"], ...] = ()
    """By difficulty: rows that are not trained on. Default: none, they are only listed."""

    def __post_init__(self) -> None:
        own = {"label": ("balance",), "difficulty": ("hard", "hardest", "trivial", "broken", "drop")}
        for by, names in own.items():
            for name in names:
                if self.by != by and getattr(self, name) not in (None, ()):
                    raise LuthierError(f"{name}: is of data.sample.by={by}, and by is {self.by or 'not given'}; set it, or leave {name} out")
        defaults = {"balance": 1.0} if self.by == "label" else {"hard": 0.3, "hardest": 0.2, "trivial": 0.1, "broken": 3.0} if self.by else {}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is trained on, and how records become tokens."""

    shorthand: ClassVar[str] = "train"

    train: tuple[str, ...] = ()
    """Files (.jsonl .json .csv .tsv .parquet .txt; .label .all: label, space, text), folders of these, or Hub data set ids."""
    mix: Mix | None = None
    """Several sources instead of train, and how often each is drawn; see docs/mixtures.md."""
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
    replay: Replay = Replay()
    """What keeps the model from forgetting: text replayed beside the data, KL to the base, decay towards it."""
    sample: Sample = Sample()
    """How often rows are drawn: labels evenly, or challenging rows more often."""

    cache: Literal["auto", "yes", "no"] = "auto"
    """Keep prepared data on disk, and read it from there while nothing it depends on has changed. auto: from a million bytes of data up."""

    def __post_init__(self) -> None:
        if self.mix is not None:
            for name, given in (("train", self.train), ("validation", self.validation), ("columns", self.columns)):
                if given:
                    raise LuthierError(
                        f"{name}: data.mix names its own; say data.mix.sources.NAME.{'files' if name == 'train' else name}, or leave data.mix out"
                    )

    @property
    def files(self) -> tuple[str, ...]:
        """All that is trained on, of a mixture too."""
        return self.train if self.mix is None else self.mix.files

    @property
    def held_out(self) -> tuple[str, ...]:
        """All that is named for validation, of a mixture too."""
        return self.validation if self.mix is None else self.mix.validation


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
    """Stop after so many evaluations without a better validation loss (held-out reward, under ppo and grpo). Default: never."""
    best: bool = True
    """Keep the weights of the best validation loss (held-out reward, under ppo and grpo); no: of the last step."""
    samples: Annotated[int, Range(0)] = 3
    """So many fixed validation prompts are answered at each evaluation and written to samples.jsonl."""
    sample_tokens: Annotated[int, Range(1)] = 64
    """Longest sample, in tokens."""
    tasks: tuple[str, ...] = ()
    """Tasks scored on the validation rows before and after training (bleu, exact_match, ...)."""
    task_rows: Annotated[int, Range(1)] = 200
    """At most so many rows per task."""
    forgetting: bool = True
    """Measure what is retained: loss on general text, instructions and more, KL from before, known facts; see docs/forgetting.md."""
    retain: tuple[str, ...] = ()
    """Tasks with rows of their own that are scored before, at every evaluation and after, because the run is to keep them (instruments, ./mine.py)."""
    retain_rows: Annotated[int, Range(1)] = 50
    """At most so many rows of each of these."""
    alarm: Literal["warn", "stop", "off"] = "warn"
    """When the run forgets or overfits: warn, stop it as well, or watch neither."""
    knowledge: Literal["watch", "stop", "off"] = "watch"
    """Rows with a column knowledge (luthier data knowledge --out): follow each category; stop: end where Unknown is memorised while Known decays."""
    knowledge_rows: Annotated[int, Range(1)] = 50
    """At most so many rows of each category are followed, of the trained and of the held-out rows each."""


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
class Speed:
    """Faster forms with the same results, and what is computed once instead of several times; off: the plain form."""

    lora: Literal["auto", "off"] = "auto"
    """LoRA fused with the products of its linears: query, key, value together, gate and up together, and the others one by one."""
    mlp: Literal["auto", "off"] = "auto"
    """SwiGLU feed-forwards as one step that keeps less for the backward; where their weights train, the activation alone."""
    kernels: Literal["auto", "off"] = "auto"
    """Row kernels: RMSNorm, SwiGLU, rotary positions, cross-entropy. On the CPU compiled once on a machine, in a second, where it has a C++ compiler; on CUDA
    by triton. And attention over packed examples: by hand on the CPU, in one call of torch's flash kernel on CUDA."""
    share_prompts: Literal["auto", "on", "off"] = "auto"
    """Compute what examples of a packed row begin with once for all of them, as the prompt of a pair's two answers. auto: where that saves enough; on: wherever
    anything is shared, and refuse a model that cannot."""
    trunk_cache: Literal["auto", "on", "off"] = "off"
    """Where only the top blocks train, keep on disk what enters them from the first epoch on, until the run ends. auto: where it is valid and saves a
    tenth. off by default: a run that is resumed fills it anew from other batches, and is then the same up to rounding, not bit for bit."""
    trunk_cache_gb: Annotated[float, Range(0, low_open=True)] = 8.0
    """Disk that it may take, in GB (1e9 bytes); what would take more is not kept."""

    @classmethod
    def plain(cls, **what: str) -> Speed:
        """Everything off but ``what``."""
        return cls(**{f.name: "off" for f in fields(cls) if f.default in ("auto", "off")} | what)  # type: ignore[arg-type]


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
    speed: Speed = Speed()
    """Which faster forms are used."""
    tokens: tuple[str, ...] = ()
    """Tokens to add to the vocabulary, for example [<tool>]; their rows are trained and saved with the delta, whatever the method."""
    seed: Annotated[int, Range(0)] = 0
    """The same seed twice gives the same bits on CPU."""
    name: str | None = None
    """The run's name. Default: from the data, the method and the time."""
    out: str = "runs"
    """The folder that holds runs."""
    recompute: Annotated[Literal["none", "blocks"] | int, Range(1)] = "none"
    """blocks: do not keep activations inside transformer blocks, compute them again in backward (less memory, more time); a number: only in so many blocks."""

    def __post_init__(self) -> None:
        """Check and complete, so that Run(method="lora") in Python is what `method: lora` is in a file. Raises ConfigError."""
        for name, value in completed(self).items():
            object.__setattr__(self, name, value)
        asked = {} if self.data.mix is None else {name: source.objective for name, source in self.data.mix.sources.items()}
        if asked and hasattr(self.objective, "joined"):
            object.__setattr__(self, "objective", self.objective.joined(asked))
        elif named := next((name for name, part in asked.items() if part is not None), None):
            raise ConfigError(
                f"data.mix.sources.{named}.objective={asked[named]}: names a part of objective multitask, and the objective is another; set objective=multitask"
            )
