"""LLaMA-Factory's YAML (https://github.com/hiyouga/LLaMA-Factory, examples/): stage, finetuning_type, dataset names of dataset_info.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..settings.config import error_at
from .translation import Translation, batch, default, every, floats, logging, model, modules, optimizer, schedule, steps_and_epochs, validation

NAME = "llama-factory"
TELLS = ("model_name_or_path", "finetuning_type", "stage", "cutoff_len", "dataset_dir", "dataset", "lora_rank", "lora_target", "quantization_bit", "template")
OBJECTIVES = {"pt": "text", "sft": "sft", "rm": "reward", "dpo": "dpo", "kto": "kto", "ppo": "ppo"}
TEMPLATES = {
    "alpaca": "alpaca",
    "chatml": "chatml",
    "gemma": "gemma",
    "llama2": "llama2",
    "llama3": "llama3",
    "vicuna": "vicuna",
    "zephyr": "zephyr",
    "empty": "plain",
}
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}  # alpaca: theirs -> ours

SAME = {
    "model_revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "max_samples": "data.limit",
    "weight_decay": "optim.weight_decay",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_epsilon": "optim.eps",
    "max_grad_norm": "optim.clip",
    "output_dir": "out",
    "run_name": "name",
    "save_total_limit": "checkpoint.keep",
    "logging_steps": "log.every_steps",
    "load_best_model_at_end": "evaluate.best",
}
NEEDLESS = {
    "do_train": "luthier train trains",
    "do_eval": "what is held out is always measured",
    "predict_with_generate": "samples are written unasked",
    "flash_attn": "the fastest attention that is exact is chosen",
    "overwrite_cache": "kept data is never stale (data.cache)",
    "preprocessing_num_workers": "the tokenizer uses all cores",
    "dataloader_num_workers": "batches are ready before they are asked for",
    "preprocessing_batch_size": "chosen by itself",
    "overwrite_output_dir": "every run has a folder of its own below out",
    "ddp_timeout": "there is one process",
    "plot_loss": "metrics.jsonl holds the numbers",
    "use_fast_tokenizer": "fast tokenizers are used where there are any",
    "upcast_layernorm": "trained tensors are in float32",
    "include_num_input_tokens_seen": "tokens are always counted",
    "include_tokens_per_second": "always measured",
    "tokenized_path": "kept data is found by itself (data.cache)",
    "save_only_model": "checkpoints are deleted by checkpoint.keep",
    "per_device_eval_batch_size": "evaluation takes as many as a training step",
    "group_by_length": "rows of like length go together where they are not packed",
    "low_cpu_mem_usage": "weights are always streamed",
    "disable_tqdm": "--quiet prints nothing",
    "remove_unused_columns": "nothing reads them",
    "quantization_method": "bitsandbytes' layout is what nf4 and int8 read and write",
    "logging_dir": "loggers write into the run's folder",
}
LEFT = {
    "deepspeed": "one device for now (place: one); recompute: blocks and precision: nf4 save memory on it",
    "fsdp": "one device for now (place: one)",
    "fsdp_config": "one device for now (place: one)",
    "freeze_vision_tower": "models of text only",
    "image_max_pixels": "models of text only",
    "video_max_pixels": "models of text only",
    "rope_scaling": "positions as the model has them",
    "enable_liger_kernel": "no such kernels",
    "use_unsloth": "no such kernels",
    "use_galore": "no GaLore; method: lora or partial trains with little memory",
    "use_badam": "no BAdam; method: partial is nearest",
    "use_apollo": "no APOLLO; optim.state: 8bit is nearest",
    "neftune_noise_alpha": "no noise on embeddings",
    "additional_target": "embedding and head are names of method.targets, as pairs of low rank; whole modules are trained by method: partial",
    "resume_from_checkpoint": "luthier train --resume RUN",
    "ref_model": "the reference is the base itself, or what method.from starts from",
    "reward_model_type": "objective.rewards names models, tasks and functions",
    "train_on_prompt": "objective: text learns every token of a conversation",
    "mix_strategy": "sources are read one after the other",
    "interleave_probs": "no mixing by weight in this setting",
    "streaming": "files are read whole",
    "cache_dir": "HF_HOME names it",
    "hf_hub_token": "hf auth login remembers it; it is not written down",
    "simpo_gamma": "no SimPO",
    "pref_ftx": "no cross-entropy beside DPO; objective: orpo has one",
    "ppo_score_norm": "objective.scale_rewards is on",
    "eval_dataset": "data.validation names files",
    "lora_plus_lr_embedding": "embeddings learn at optim.lr",
    "create_new_adapter": "method.from goes on with the adapter itself",
    "push_to_hub": "nothing is uploaded",
    "export_dir": "luthier merge RUN --output FOLDER",
}


def translate(t: Translation) -> None:
    """LLaMA-Factory to a run."""
    model(t, "model_name_or_path")
    objective, kind = _objective(t), _method(t)
    _precision(t, kind)
    max_tokens = t.count("cutoff_len", 2048)
    t.put("data.max_tokens", max_tokens, "cutoff_len", comment=t.given("cutoff_len"))
    _data(t, objective)
    _template(t)
    if t.has("packing") or t.has("neat_packing"):
        pack = t.truth("packing") or t.truth("neat_packing")
        t.put("data.pack", "yes" if pack else "no", "packing", "neat_packing", comment="examples never see one another" if pack else "")
    if t.truth("mask_history"):
        t.put("data.train_on", "last", "mask_history")
    validation(t, "val_size")
    if t.truth("disable_gradient_checkpointing") is False and t.has("disable_gradient_checkpointing"):
        t.put("recompute", "blocks", "disable_gradient_checkpointing")
    if t.truth("gradient_checkpointing"):
        t.put("recompute", "blocks", "gradient_checkpointing")
    default(t, "learning_rate", "optim.lr", 5e-5)
    steps_and_epochs(t, "num_train_epochs", 3.0)
    batch(t, "per_device_train_batch_size", "gradient_accumulation_steps", default=8, max_tokens=max_tokens)
    schedule(t, "lr_scheduler_type", default="linear")
    default(t, "weight_decay", "optim.weight_decay", 0.0)
    optimizer(t, "optim")
    floats(t)
    every(t, "eval_strategy", "eval_steps", "evaluate.every_steps")
    every(t, "save_strategy", "save_steps", "checkpoint.every_steps")
    logging(t)
    if t.has("add_tokens"):
        t.put("tokens", t.names("add_tokens"), "add_tokens")
    t.truth("resize_vocab")  # which adding tokens does by itself
    t.put("seed", t.number("seed", 42), "seed", comment=t.given("seed"))
    t.moves(SAME)
    t.drops(NEEDLESS)
    t.leaves(LEFT)


def _objective(t: Translation) -> str:
    stage = str(t.take("stage", "sft"))
    if stage not in OBJECTIVES:
        raise error_at(t.tree, ("stage",), f"found {stage!r}, known are {', '.join(OBJECTIVES)}")
    kind, loss = OBJECTIVES[stage], str(t.take("pref_loss", "sigmoid"))
    if kind == "dpo" and loss == "orpo":
        kind = "orpo"
    t.put("objective.kind", kind, "stage", *(["pref_loss"] if kind == "orpo" else []))
    if kind == "dpo":
        if loss in ("sigmoid", "ipo"):
            t.put("objective.loss_kind", loss, "pref_loss")
        else:
            t.leave("pref_loss", f"there is no loss {loss!r}: objective.loss_kind is sigmoid or ipo, and sigmoid is taken; objective: orpo is another")
        t.move("dpo_label_smoothing", "objective.label_smoothing")
    if kind in ("dpo", "kto"):
        t.move("pref_beta", "objective.beta")
    if kind == "orpo":
        t.move("pref_beta", "objective.weight")
    if kind == "kto":
        t.moves({"kto_chosen_weight": "objective.desirable", "kto_rejected_weight": "objective.undesirable"})
    if kind == "ppo":
        if t.has("reward_model"):
            t.put("objective.rewards", {str(t.take("reward_model")): 1.0}, "reward_model", comment="an adapter or run trained with objective: reward")
        t.moves(
            {
                "ppo_epochs": "objective.epochs",
                "ppo_target": "objective.kl_target",
                "max_new_tokens": "objective.max_new",
                "temperature": "objective.temperature",
            }
        )
        if t.has("top_p") or t.has("top_k"):
            for key in (k for k in ("top_p", "top_k") if t.has(k)):
                t.leave(key, "answers are sampled from the whole distribution, whose probabilities are what is learned")
    return kind


def _method(t: Translation) -> str:
    kind = str(t.take("finetuning_type", "lora"))
    if kind == "freeze":
        t.put("method.kind", "partial", "finetuning_type")
        t.put("method.last_blocks", t.count("freeze_trainable_layers", 2), "freeze_trainable_layers")
        return kind
    if kind not in ("lora", "full"):
        t.leave("finetuning_type", f"there is no method {kind!r} of theirs here; luthier kinds lists ours, and lora is taken")
        kind = "lora"
    if kind == "full":
        t.put("method.kind", "full", "finetuning_type")
        for key in [k for k in t.tree.values if k.startswith("lora_")]:
            t.drop(key, "finetuning_type full has none")
        return kind
    t.put("method.kind", "dora" if t.truth("use_dora") else "lora", "finetuning_type")
    rank = t.count("lora_rank", 8)
    t.put("method.rank", rank, "lora_rank", comment=t.given("lora_rank"))
    t.put("method.alpha", t.number("lora_alpha", 2 * rank), "lora_alpha", comment="" if t.has("lora_alpha") else f"{t.theirs}, twice the rank")
    t.move("lora_dropout", "method.dropout")
    if not modules(t, "lora_target"):
        t.put("method.targets", ["all"], comment=t.theirs)
    t.moves({"use_rslora": "method.rank_stabilised", "loraplus_lr_ratio": "method.lr_ratio", "adapter_name_or_path": "method.from"})
    if t.truth("pissa_init"):
        t.put("method.init", "pissa", "pissa_init", comment="by an exact decomposition")
    return kind


def _precision(t: Translation, method: str) -> None:
    bits = t.number("quantization_bit")
    if bits is None:
        t.truth("double_quantization", True)
        t.take("quantization_type")
        return
    if bits not in (4, 8):
        t.leave(
            "quantization_bit",
            f"there is no storage of {bits} bits that is quantised on the way; precision: nf4 or int8, or luthier quantize --bits {bits} first",
        )
        return
    t.put("precision.kind", "nf4" if bits == 4 else "int8", "quantization_bit")
    if str(t.take("quantization_type", "nf4")) != "nf4":
        t.leave("quantization_type", "there is no fp4: nf4 is taken, which is as small and nearer to the weights")
    if bits == 4:
        t.put("precision.double", t.truth("double_quantization", True), "double_quantization")
    else:
        t.take("double_quantization")


def _template(t: Translation) -> None:
    if not t.has("template"):
        return
    name = str(t.take("template"))
    if name in TEMPLATES:
        t.put("model.template", TEMPLATES[name], "template", comment="leave it out for the model's own")
    else:
        t.leave(
            "template", f"there is no template {name!r} here: the model's own is used, as its makers ship it; model.template names others, or a .jinja file"
        )


def _data(t: Translation, objective: str) -> None:
    names = [n for n in t.names("dataset") if n] if t.has("dataset") else []
    folder = str(t.take("dataset_dir", "data"))
    where = next((p for p in (Path(folder), t.file.parent / folder, t.file.parent) if (p / "dataset_info.json").is_file()), None)
    if where is None:
        t.put("data.train", names, "dataset", "dataset_dir")
        if names:
            t.leave("dataset", f"names of a dataset_info.json, which is neither in {folder} nor beside {t.file.name}: put the files' names in data.train")
        return
    try:
        info = json.loads((where / "dataset_info.json").read_text(encoding="utf-8"))
    except ValueError as e:
        raise error_at(t.tree, ("dataset",), f"{where / 'dataset_info.json'} is not JSON: {e}") from None
    found, mappings = [], []
    for name in names:
        entry = info.get(name)
        if not isinstance(entry, dict):
            raise error_at(t.tree, ("dataset",), f"{where / 'dataset_info.json'} has no {name!r}; it has {', '.join(sorted(info)[:12])}")
        found.append(_source(t, name, entry, where))
        mappings.append(_columns(t, name, entry, objective))
    t.put("data.train", found, "dataset", "dataset_dir")
    if mappings and all(m == mappings[0] for m in mappings):
        if mappings[0]:
            t.put("data.columns", mappings[0], "dataset", comment="as dataset_info.json names them")
    else:
        t.leave("dataset", "its data sets have columns of different names, and data.columns is one for all: rename them, or train on one")


def _source(t: Translation, name: str, entry: dict[str, Any], where: Path) -> str:
    if "file_name" in entry:
        out = str(where / entry["file_name"])
    elif hub := next((entry[k] for k in ("hf_hub_url", "ms_hub_url") if k in entry), None):
        out = f"{hub}:{entry['subset']}" if entry.get("subset") else str(hub)
        if entry.get("split", "train") != "train":
            t.put("data.split", entry["split"], "dataset")
    else:
        raise error_at(t.tree, ("dataset",), f"{name!r} in dataset_info.json has neither file_name nor hf_hub_url, and nothing else is read")
    for key in ("num_samples", "folder", "script_url"):
        if entry.get(key):
            t.leave("dataset", f"{name}: {key} of dataset_info.json: data.limit is one for all, and files are named")
    return out


def _columns(t: Translation, name: str, entry: dict[str, Any], objective: str) -> dict[str, str]:
    """Only what is not found by itself."""
    given = {k: v for k, v in entry.get("columns", {}).items() if v}
    odd = {
        k: v
        for k, v in entry.get("tags", {}).items()
        if v not in ("from", "value", "role", "content", "human", "user", "gpt", "assistant", "system", "observation", "function_call", "tool", "function")
    }
    if odd:
        t.leave("dataset", f"{name}: tags of dataset_info.json that no message here has ({', '.join(odd.values())}): rename them in the file")
    if objective in ("dpo", "orpo", "reward", "kto"):
        ours = {
            "prompt": "prompt",
            "messages": "prompt",
            "chosen": "chosen",
            "rejected": "rejected",
            "kto_tag": "label",
            "response": "completion",
            "system": "system",
        }
        mapping = {ours[k]: v for k, v in given.items() if k in ours}
        known = {"prompt": ("prompt", "instruction", "conversations", "messages"), "label": ("kto_tag", "label"), "completion": ("output", "completion")}
        return {} if all(v in known.get(k, (k,)) for k, v in mapping.items()) else mapping
    if objective == "text":
        return {} if given.get("prompt", "text") == "text" else {"text": given["prompt"]}
    if entry.get("formatting") in ("sharegpt", "openai"):
        mapping = {"conversations" if k == "messages" else k: v for k, v in given.items() if k in ("messages", "tools", "system")}
        return {} if mapping.get("conversations", "conversations") in ("conversations", "messages") else mapping
    mapping = {COLUMNS[k]: v for k, v in given.items() if k in COLUMNS}
    return {} if all(k == v for k, v in mapping.items()) else mapping
