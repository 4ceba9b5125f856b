"""Load and assemble: the one place where the axes meet, in the one order that works, and the compatibility check.

Choose the device; open the base in its precision; probe it; attach delta and heads; recompute policy; put. Nothing replaces a module after
put. The same code with ``weights=False`` builds on the meta device, where counting costs nothing.
"""

from __future__ import annotations

import logging
import random
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.utils import logging as hf_logging

from . import heap, speed, voices
from .core import Base, Incompatible, LuthierError, Method, Objective, Place, Precision
from .devices.launched import launched
from .devices.sharding import Sharding, sharding_of
from .hub import fingerprint, locate
from .modelling import attention, context, probe, recompute, vocabulary
from .modelling.anatomy import Anatomy, cast, max_positions, numbers
from .policy import Policy, leave_out_unread
from .quantising import codes, quantised
from .saving import adapter
from .settings.plugins import kind_of, plugin
from .settings.run import Model, Run

heap.keep_few_products()
hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()
logging.getLogger("torch.distributed").setLevel(logging.ERROR)


def seed_everything(seed: int) -> None:
    """One seed for all random numbers of this process; before anything is built."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def fast_precision(device: torch.device) -> tuple[str, str]:
    """The float precision this machine computes fast, and why."""
    if device.type == "cuda":
        good = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bfloat16", "this GPU has bf16 units") if good else ("float32", "this GPU has no bf16 units")
    if device.type == "mps":
        return "float32", "on MPS"
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    units = [k for k in ("amx_bf16", "avx512_bf16", "bf16") if able.get(k)]
    return ("bfloat16", f"this CPU has {units[0]}") if units else ("float32", "this CPU has no bf16 units")


def load_tokenizer(model: Model) -> Any:
    """The tokenizer of a model. Raises LuthierError where there is none."""
    folder = locate(model, weights=False)
    if not _has_tokenizer(folder):
        raise LuthierError(f"{folder}: no tokenizer here (tokenizer.json is looked for); copy the one the model was trained with into the folder")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except Exception as e:
        raise LuthierError(f"{folder}: the tokenizer cannot be opened: {_first_line(e)}") from e


def open_base(run: Run) -> Base:
    """The base of a run whose precision is resolved, where the run lives: over its ranks, where its place shards it."""
    whole = getattr(run.method, "whole", False)
    trains_base = run.method.edits == "weights"
    sharding = None
    if hasattr(run.place, "sharding"):
        on_meta = lambda: load(run.model, precision=run.precision, weights=False).model  # noqa: E731
        sharding = run.place.sharding(on_meta, trains=whole, needs_whole=whole and _needs_whole(run), compute=run.precision.dtype)
    return load(run.model, precision=run.precision, device=run.place.device, trains_base=trains_base, sharding=sharding)


def _needs_whole(run: Run) -> bool:
    """Whether something of a run that trains every weight wants them whole on a rank: a copy of the base, moments by blocks, rows for new tokens."""
    copy = "rollouts" in run.objective.needs and "reference" in run.objective.reads
    return copy or bool(run.data.replay.kl or run.data.replay.l2sp or run.tokens) or run.optim.state != "float32"


def load(
    model: Model | str,
    *,
    precision: Precision,
    device: torch.device | str = "cpu",
    weights: bool = True,
    trains_base: bool = False,
    sharding: Sharding | None = None,
) -> Base:
    """Open a pretrained model as a Base: frozen, probed, in evaluation mode.

    ``weights=False``: on the meta device, from the configuration alone. ``trains_base``: keep the model's own dropout. ``sharding``: hold this rank's part.
    Raises LuthierError for what cannot be found or opened, Incompatible for what this program cannot train.
    """
    model = Model(id=model) if isinstance(model, str) else model
    folder = locate(model, weights=weights and not model.random)
    config = _config(folder, model, trains_base)
    hash = fingerprint(folder, random=model.random)
    if weights and not model.random:
        precision = codes.as_stored(folder, precision, model.id)
    kind, headless = auto_class(config), False
    try:
        if not weights:
            with torch.device("meta"):
                lm = kind.from_config(config, dtype=precision.dtype, trust_remote_code=model.trust_remote_code)
        elif model.random:
            lm = kind.from_config(config, trust_remote_code=model.trust_remote_code)
            cast(lm, precision.dtype)
        else:
            cache = _cached(model, folder, hash, precision)
            lm, headless = _open(kind, folder if cache is None else cache, config, precision, model, sharding)
    except LuthierError:
        raise
    except Exception as e:
        raise LuthierError(f"{folder}: this model cannot be opened: {_first_line(e)}") from e
    if precision.packed and (model.random or not weights):
        quantised.pack(lm, precision)
    tokenizer = load_tokenizer(model) if _has_tokenizer(folder) else None
    if sharding is not None:
        if getattr(precision, "resident", "") == "yes":
            raise Incompatible(
                "precision.resident=yes: decoded weights of a base that is sharded over ranks are not kept; use resident=no, or place.shard=none"
            )
        if sharding_of(lm) is None:
            sharding.lay_out(lm)
        sharding.settle(lm)
    lm = lm.to(device) if weights and sharding is None else lm
    if sharding is not None:
        storage = sharding.said
    else:
        storage = quantised.settle(lm, precision) if precision.packed and weights else ""
    base = adopt(lm, tokenizer, source=model.id, revision=model.revision)
    base.hash, base.precision, base.storage = hash, precision, storage
    if headless:
        base.probes["head"] = None
    if precision.packed and weights and not model.random and cache is None and sharding is None:  # no rank holds all that would be written
        base.storage += _keep(base, folder, model)
    return base


def _cached(model: Model, folder: Path, hash: str, precision: Any) -> Path | None:
    """The quantised copy of this base on disk, where there is one to use."""
    if not precision.packed or model.cache == "no" or codes.stored_in(folder) is not None:
        return None
    where = codes.cached(hash, precision)
    return where if (where / "config.json").is_file() else None


def _keep(base: Base, folder: Path, model: Model) -> str:
    """Write the quantised base to the cache where that is asked for or worth it; what to say of it."""
    if codes.stored_in(folder) is not None or model.cache == "no" or (model.cache == "auto" and numbers(base.model) < quantised.LARGE):
        return ""
    where = codes.cached(base.hash, base.precision)
    where.parent.mkdir(parents=True, exist_ok=True)
    codes.write_folder(base, base.precision, where)
    return f"; kept for the next time in {where} (model.cache=no: not)"


def auto_class(config: Any) -> Any:
    """The class of transformers that opens a configuration with its language-model head. Raises Incompatible where there is none.

    A family may have several (BERT is an encoder, or with ``is_decoder`` a decoder): the configuration decides, not the name of the class that wrote it.
    """
    kinds = {c.__name__: c for c in (AutoModelForSeq2SeqLM, AutoModelForMaskedLM, AutoModelForCausalLM)}
    written = (getattr(config, "architectures", None) or [""])[0]
    for name, kind in kinds.items():
        if name in (getattr(config, "auto_map", None) or {}):  # code of its own
            return kind
    decodes = getattr(config, "is_decoder", False) or written.endswith(("ForCausalLM", "LMHeadModel"))
    if config.is_encoder_decoder:
        found = "AutoModelForSeq2SeqLM" if config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES else None
    elif config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decodes:
        found = "AutoModelForMaskedLM"
    else:
        found = "AutoModelForCausalLM" if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else None
    if found is None:
        raise Incompatible(
            f"{written or 'this model'} ({config.model_type}) is no language model that this program trains: it opens decoders (AutoModelForCausalLM), "
            "encoders (AutoModelForMaskedLM) and encoder-decoders (AutoModelForSeq2SeqLM)"
        )
    return kinds[found]


def adopt(lm: Any, tokenizer: Any = None, *, source: str = "", revision: str | None = None) -> Base:
    """A transformers model that is already in memory as a Base: frozen, its attention ours where the probe agrees."""
    sharding = sharding_of(lm)
    lm.requires_grad_(sharding is not None and sharding.trains).eval()  # FSDP2 asks at the first forward what trains
    anatomy = Anatomy.of(lm)
    base = Base(lm, tokenizer, anatomy, hash="", packs=anatomy.kind != "encoder_decoder", source=source, revision=revision)
    base.max_positions = max_positions(lm, anatomy.first_position)
    if next(lm.parameters()).device.type == "meta":
        probe.use(lm, attention.NAME)
        base.shares = anatomy.kind == "decoder"
        return base
    base.probes = probe.run(base)
    if sharding is not None:
        sharding.rest()
    base.packs, base.shares = base.probes["packs"], base.probes["shares"]
    return base


def assemble(run: Run, base: Base | None = None, *, name: str = "default") -> tuple[Policy, Objective]:
    """Everything a run trains, ready for the loop. Raises Incompatible where two choices cannot go together."""
    run, _ = resolve(run)
    method: Method = run.method
    objective: Objective = run.objective
    place: Place = run.place
    seed_everything(run.seed)
    check(run)
    context.check(run)
    if base is None:
        base = open_base(run)
    if place.context > 1:
        context.check_base(base, attention.NAME)
    heads = objective.heads(base)
    reads_head = not heads or getattr(objective, "reads_head", False)
    if run.speed.share_prompts == "on":
        can_share(run, base)
    if reads_head and base.probes.get("head", 0.0) is None:
        raise Incompatible(
            f"objective {kind_of(objective)} reads this model's own language-model head, which is missing from its files ({base.source}); "
            "use a checkpoint that has it, or an objective with a head of its own (classify)"
        )
    if run.tokens:
        vocabulary.extend(base, run.tokens)
    delta = method.attach(base, name)
    if place.context > 1:
        context.check_delta(delta)
    vocabulary.attach(base, delta, name)
    if not reads_head and method.edits == "weights":
        leave_out_unread(base, delta)
    policy = Policy(base, delta, method=method, name=name, heads=heads)
    policy.objective = objective
    policy.share_prompts = run.speed.share_prompts
    if getattr(method, "from_", None) and base.model.device.type != "meta":
        adapter.start_from(policy, method.from_)  # type: ignore[attr-defined]
    if "rollouts" in objective.needs:
        give_voices(policy, method, objective)
    speed.install(policy, run.speed, place.device.type)
    recompute.enable(base.model, base.anatomy.stacks.values(), run.recompute)
    if base.model.device.type != "meta":
        place.put(policy)
    return policy, objective


def give_voices(policy: Policy, method: Method, objective: Any) -> None:
    """What an objective that learns from its own answers asks of the base besides the policy: a reference, a value."""
    trains_weights = method.edits == "weights"
    if "reference" in objective.reads:
        voices.keep_reference(policy, method)
    if "value" in objective.reads:
        if objective.value == "own" and trains_weights:
            raise Incompatible(
                f"objective.value=own: method {kind_of(method)} trains weights of the base, which two voices cannot share; set objective.value=shared"
            )
        voices.add_value(policy, method, shared=objective.value == "shared" or trains_weights)


def check(run: Run) -> None:
    """The composition law, and what this version's objectives do not yet serve."""
    if hasattr(run.method, "candidates") and run.objective.renders not in ("text", "chat"):
        raise Incompatible(
            f"method {kind_of(run.method)} trains nothing, and objective {kind_of(run.objective)} has something to learn first; use it with sft or text, "
            "or a method that trains"
        )
    if run.precision.packed and run.method.edits == "weights" and not getattr(run.method, "reversible", False):  # those refuse by tensor
        raise Incompatible(
            f"method {kind_of(run.method)} trains the base's own weights, and precision {kind_of(run.precision)} packs them into codes; "
            "use a float precision, or a method that edits outputs (lora)"
        )


def can_share(run: Run, base: Base) -> None:
    """Raise Incompatible where nothing can be computed once for several examples."""
    if not base.shares:
        raise Incompatible(
            f"speed.share_prompts=on: found {base.anatomy.family}, of which one beginning cannot serve several examples (it takes a decoder whose examples may "
            "share a row); set speed.share_prompts=auto"
        )
    if run.data.pack == "no":
        raise Incompatible("speed.share_prompts=on: only examples that share a row can share a beginning, and data.pack=no; leave one of the two out")


def resolve(run: Run) -> tuple[Run, list[str]]:
    """Replace precision "auto" by this machine's fast one, and place one by fsdp where torchrun started several processes. Returns the notes to print."""
    here, notes = launched(), []
    if here.size > 1 and kind_of(run.place) == "one":
        same = {f.name: getattr(run.place, f.name) for f in fields(run.place)}
        run = replace(run, place=plugin("place", "fsdp")(**same))
        notes.append(f"place fsdp: {here.size} processes were started, which train one model together")
    if run.precision != "auto":
        return run, notes
    stored = codes.stored_in(locate(run.model, weights=False))
    kind, why = fast_precision(run.place.device) if stored is None else (stored, "so the model is stored")
    return replace(run, precision=plugin("precision", kind)()), [*notes, f"precision {kind}: {why}"]


def _config(folder: Path, model: Model, trains_base: bool) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except Exception as e:
        raise LuthierError(f"{folder / 'config.json'}: not a model configuration that transformers can read: {_first_line(e)}") from e
    dropout = model.dropout if model.dropout is not None else (None if trains_base else 0.0)
    if dropout is not None:
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            for key, value in part.to_dict().items():
                if ("dropout" in key or key.endswith(("pdrop", "layerdrop"))) and isinstance(value, int | float) and not isinstance(value, bool):
                    setattr(part, key, 0.0 if "layerdrop" in key else dropout)  # no one who asks for dropout asks for skipped layers
    return config


def _open(kind: Any, folder: Path, config: Any, precision: Any, model: Model, sharding: Sharding | None) -> tuple[Any, bool]:
    """The model, and whether its language-model head is missing from the files: an encoder may come without (it is then random, and never read)."""
    how = {"trust_remote_code": model.trust_remote_code, "local_files_only": True}
    if precision.packed:
        lm, info = quantised.open_model(kind, folder, config, precision, sharding=sharding, **how)
    elif sharding is not None:
        lm, info = quantised.open_sharded(kind, folder, config, precision.dtype, sharding, **how)
    else:
        lm, info = kind.from_pretrained(folder, config=config, dtype=precision.dtype, use_safetensors=True, output_loading_info=True, **how)
    odd = sorted(info["missing_keys"])
    headless = bool(odd) and kind is AutoModelForMaskedLM and not any(k.startswith(lm.base_model_prefix + ".") for k in odd)
    if odd and not headless:
        raise LuthierError(
            f"{folder}: {len(odd)} weights are missing from the files and would be random, for example {odd[0]!r}; the download may be incomplete"
        )
    if info["mismatched_keys"]:
        raise LuthierError(f"{folder}: config.json and the weights disagree on shapes, for example {sorted(info['mismatched_keys'])[0]}")
    return lm, headless


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / f).exists() for f in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model"))


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:300]
