"""Axolotl's YAML (https://github.com/axolotl-ai-cloud/axolotl, examples/): adapter, datasets with types, rl."""

from __future__ import annotations

from typing import Any

from ..settings.config import error_at
from .translation import Translation, batch, default, floats, model, modules, optimizer, schedule, steps_and_epochs, validation

NAME = "axolotl"
TELLS = ("base_model", "sequence_len", "micro_batch_size", "datasets", "pretraining_dataset", "val_set_size", "lora_target_linear", "sample_packing", "adapter")
TEMPLATES = {"alpaca": "alpaca", "chatml": "chatml", "gemma": "gemma", "llama3": "llama3"}
TYPES = ("alpaca", "sharegpt", "chat_template", "completion", "chatml")
JUDGED = ("chosen", "dpo", "orpo", "kto", "intel", "ultra", "argilla", "prompt_pairs", "bradley_terry")
OF_A_SET = (
    "path",
    "type",
    "split",
    "data_files",
    "ds_type",
    "name",
    "field_messages",
    "field",
    "conversation",
    "chat_template",
    "text_column",
    "message_property_mappings",
    "message_field_role",
    "message_field_content",
    "roles",
    "roles_to_train",
    "train_on_eos",
)

SAME = {
    "revision_of_model": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "lora_model_dir": "method.from",
    "max_grad_norm": "optim.clip",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_epsilon": "optim.eps",
    "output_dir": "out",
    "save_total_limit": "checkpoint.keep",
    "logging_steps": "log.every_steps",
    "early_stopping_patience": "evaluate.patience",
    "eval_steps": "evaluate.every_steps",
    "save_steps": "checkpoint.every_steps",
    "cosine_min_lr_ratio": "optim.min_lr",
}
NEEDLESS = {
    "base_model_config": "config.json is read from the model",
    "model_type": "the model says what it is",
    "tokenizer_type": "the tokenizer says what it is",
    "is_llama_derived_model": "the model says what it is",
    "strict": "settings are always read strictly",
    "debug": "luthier --debug",
    "dataset_prepared_path": "prepared data is kept and found by itself (data.cache)",
    "dataset_processes": "the tokenizer uses all cores",
    "eval_sample_packing": "evaluation packs as training does",
    "pad_to_sequence_len": "shapes are rounded up by themselves",
    "group_by_length": "rows of like length go together where they are not packed",
    "flash_attention": "the fastest attention that is exact is chosen",
    "xformers_attention": "the fastest attention that is exact is chosen",
    "sdp_attention": "the fastest attention that is exact is chosen",
    "attn_implementation": "the fastest attention that is exact is chosen",
    "tf32": "chosen by the machine",
    "local_rank": "there is one process",
    "low_cpu_mem_usage": "weights are always streamed",
    "wandb_entity": "wandb reads WANDB_ENTITY",
    "wandb_watch": "gradient norms are in metrics.jsonl",
    "wandb_log_model": "adapters stay where they are",
    "lora_on_cpu": "only what is needed is loaded",
    "lora_fan_in_fan_out": "told by the model",
    "gradient_checkpointing_kwargs": "recomputation is always the exact one",
    "shuffle_merged_datasets": "rows are always shuffled, by the seed",
    "include_tokens_per_second": "always measured",
    "auto_resume_from_checkpoints": "luthier train --resume RUN says it",
    "eval_batch_size": "evaluation takes as many as a training step",
    "dataloader_num_workers": "batches are ready before they are asked for",
}
LEFT = {
    "special_tokens": "the tokenizer's own are used; tokens to add are named in tokens",
    "base_model_ignore_patterns": "all of the model's files are read",
    "deepspeed": "one device for now (place: one); recompute: blocks and precision: nf4 save memory on it",
    "fsdp": "one device for now (place: one)",
    "fsdp_config": "one device for now (place: one)",
    "tensor_parallel_size": "one device for now (place: one)",
    "context_parallel_size": "one device for now (place: one)",
    "sequence_parallel_degree": "one device for now (place: one)",
    "lora_modules_to_save": "embedding and head are names of method.targets, as pairs of low rank; rows of added tokens train by themselves",
    "evals_per_epoch": "evaluate.every_steps counts steps, and is about ten times a run where it is not given",
    "saves_per_epoch": "checkpoint.every_steps counts steps; a checkpoint is saved at every evaluation where it is not given",
    "resume_from_checkpoint": "luthier train --resume RUN",
    "hub_model_id": "nothing is uploaded",
    "hub_strategy": "nothing is uploaded",
    "plugins": "no plugins of theirs",
    "neftune_noise_alpha": "no noise on embeddings",
    "liger_rope": "no such kernels",
    "liger_rms_norm": "no such kernels",
    "liger_glu_activation": "no such kernels",
    "liger_fused_linear_cross_entropy": "the head never makes all logits",
    "relora_steps": "no ReLoRA",
    "mlflow_tracking_uri": "no mlflow; log.to: tensorboard, wandb, trackio",
    "torch_compile": "no such setting",
    "wandb_name": "name is the run's, for the folder and for loggers",
    "eval_table_size": "samples.jsonl holds answers",
    "trl": "settings of rewards: objective: grpo has its own",
    "gptq": "a GPTQ folder is opened as it is: model.id",
    "reward_model": "objective: reward",
    "lora_layers_to_transform": "method.targets takes a regular expression",
    "peft_layers_to_transform": "method.targets takes a regular expression",
    "embeddings_skip_upcast": "trained tensors are in float32",
}


def translate(t: Translation) -> None:
    """Axolotl to a run."""
    model(t, "base_model")
    if t.has("tokenizer_config"):
        t.leave("tokenizer_config", "the tokenizer is the model's; put its files into the model's folder")
    objective = _objective(t)
    kind = _method(t)
    _precision(t, kind)
    max_tokens = t.count("sequence_len", 512)
    t.put("data.max_tokens", max_tokens, "sequence_len", comment=t.given("sequence_len"))
    _data(t, objective)
    validation(t, "val_set_size")
    if t.has("sample_packing"):
        t.put("data.pack", "yes" if t.truth("sample_packing") else "no", "sample_packing")
    if t.truth("gradient_checkpointing") if t.take("gradient_checkpointing") not in ("unsloth", "offload") else True:
        t.put("recompute", "blocks", "gradient_checkpointing")
    default(t, "learning_rate", "optim.lr", 2e-4)
    steps_and_epochs(t, "num_epochs", 1.0)
    batch(t, "micro_batch_size", "gradient_accumulation_steps", default=1, max_tokens=max_tokens)
    schedule(t, "lr_scheduler", default="cosine")
    default(t, "weight_decay", "optim.weight_decay", 0.0)
    optimizer(t, "optimizer")
    floats(t)
    _logging(t)
    if t.has("tokens"):
        t.put("tokens", t.take("tokens"), "tokens")
    t.put("seed", t.number("seed", 42), "seed", comment=t.given("seed"))
    t.moves(SAME)
    t.drops(NEEDLESS)
    t.leaves(LEFT)


def _objective(t: Translation) -> str:
    rl, kind = t.take("rl"), "sft"
    if t.has("pretraining_dataset") or _all_of(t, "completion"):
        kind = "text"
    elif t.truth("reward_model"):
        kind = "reward"
    elif rl in ("dpo", "ipo", "orpo", "kto", "grpo"):
        kind = "dpo" if rl == "ipo" else str(rl)
    elif rl is not None:
        t.leave("rl", f"there is no objective {rl!r}; dpo is taken, and luthier kinds lists the others")
        kind = "dpo"
    t.put("objective.kind", kind, "rl", "reward_model")
    if rl == "ipo":
        t.put("objective.loss_kind", "ipo", "rl")
    if kind in ("dpo", "kto"):
        t.move("rl_beta", "objective.beta")
        t.move("dpo_label_smoothing", "objective.label_smoothing")
    if kind == "orpo":
        t.move("orpo_alpha" if t.has("orpo_alpha") else "rl_beta", "objective.weight")
    if kind == "kto":
        t.moves({"kto_desirable_weight": "objective.desirable", "kto_undesirable_weight": "objective.undesirable"})
    if t.truth("train_on_inputs") and kind == "sft":
        kind = "text"
        t.put("objective.kind", "text", "train_on_inputs", comment="train_on_inputs: every token of a conversation is learned")
    return kind


def _all_of(t: Translation, kind: str) -> bool:
    sets = t.tree.values.get("datasets")
    return isinstance(sets, list) and bool(sets) and all(isinstance(d, dict) and str(d.get("type")) == kind for d in sets)


def _method(t: Translation) -> str:
    adapter = t.take("adapter")
    if adapter in (None, ""):
        if t.has("unfrozen_parameters"):
            t.put("method.kind", "partial", "unfrozen_parameters")
            t.put("method.matching", [f".*{p}.*" for p in t.names("unfrozen_parameters")], "unfrozen_parameters", comment="whole names are matched here")
        else:
            t.put("method.kind", "full", comment="no adapter is named")
        for key in [k for k in t.tree.values if k.startswith(("lora_", "peft_")) and k not in t.seen and k != "lora_model_dir"]:
            t.drop(key, "without an adapter there is none")
        return "full"
    if adapter not in ("lora", "qlora"):
        t.leave("adapter", f"there is no method {adapter!r}; luthier kinds lists ours, and lora is taken")
    t.put("method.kind", "dora" if t.truth("peft_use_dora") else "lora", "adapter")
    t.put("method.rank", t.count("lora_r", 8), "lora_r")
    t.put("method.alpha", t.number("lora_alpha", 16), "lora_alpha")
    t.moves({"lora_dropout": "method.dropout", "peft_use_rslora": "method.rank_stabilised", "loraplus_lr_ratio": "method.lr_ratio"})
    linear = t.truth("lora_target_linear")
    if not modules(t, "lora_target_modules") and linear:
        t.put("method.targets", ["all"], "lora_target_linear")
    elif linear:
        t.put("method.targets", ["all", *[m for m in t.run.values["method"]["targets"] if m != "all"]], "lora_target_linear")
    if t.has("peft_init_lora_weights"):
        init = str(t.take("peft_init_lora_weights"))
        t.put("method.init", "pissa", "peft_init_lora_weights") if init.startswith("pissa") else t.leave(
            "peft_init_lora_weights", "method.init is zero or pissa"
        )
    return str(adapter)


def _precision(t: Translation, adapter: str) -> None:
    four, eight = t.truth("load_in_4bit", adapter == "qlora"), t.truth("load_in_8bit")
    if (four or eight) and adapter == "full":
        t.leave("load_in_4bit" if four else "load_in_8bit", "codes cannot be trained in place: name an adapter, or leave precision as it is")
    elif four or eight:
        t.put("precision.kind", "nf4" if four else "int8", "load_in_4bit" if four else "load_in_8bit")
    if t.has("bnb_config_kwargs"):
        t.leave("bnb_config_kwargs", "precision.double and precision.compute are what nf4 has")


def _data(t: Translation, objective: str) -> None:
    sets = t.take("pretraining_dataset") if t.has("pretraining_dataset") else t.take("datasets", [])
    key = "pretraining_dataset" if t.has("pretraining_dataset") else "datasets"
    sets = [{"path": sets}] if isinstance(sets, str) else [sets] if isinstance(sets, dict) else sets
    paths: list[str] = []
    kinds: list[str] = []
    for i, one in enumerate(sets):
        if not isinstance(one, dict) or "path" not in one:
            raise error_at(t.tree, (key, i), "a data set is {path: ..., type: ...}")
        paths += _set(t, f"{key}.{i}", one)
        kinds.append(str(one.get("type", "")).partition(".")[0] or "chat_template")
    t.put("data.train", paths, key)
    if columns := _columns(t, key, sets, objective):
        t.put("data.columns", columns, key)
    if tests := t.take("test_datasets"):
        t.put("data.validation", [p for i, one in enumerate(tests) for p in _set(t, f"test_datasets.{i}", one)], "test_datasets")
    _template(t, kinds, objective)


def _set(t: Translation, key: str, one: dict[str, Any]) -> list[str]:
    """The files or the id of one data set; what it asks for besides is left."""
    files = one.get("data_files")
    split = one.get("split", "train")
    if "[" in str(split):
        t.leave(f"{key}.split", f"{split}: data.limit reads the first rows of all data together")
    elif split != "train" and key.startswith("datasets"):
        t.put("data.split", split, "datasets")
    kind = one.get("type")
    if isinstance(kind, dict):
        t.leave(f"{key}.type", "a format of one's own: data.columns says which column is which, model.template how they are put together")
    elif kind is not None and not str(kind).startswith(TYPES) and not any(word in str(kind) for word in JUDGED):
        t.leave(f"{key}.type", f"{kind}: shapes are told from the columns here; luthier data preview shows what is found")
    for more in [k for k in one if k not in OF_A_SET]:
        t.leave(f"{key}.{more}", "no such setting for one source")
    if one.get("train_on_eos") not in (None, "turn", "all"):
        t.leave(f"{key}.train_on_eos", "the end of every answer is learned")
    if one.get("roles_to_train") not in (None, ["assistant"], ["gpt"], ["assistant", "gpt"], ["gpt", "assistant"]):
        t.leave(f"{key}.roles_to_train", "the assistant's turns are learned; objective: text learns all")
    if files:
        return [str(f) for f in (files if isinstance(files, list) else [files])]
    return [f"{one['path']}:{one['name']}" if one.get("name") else str(one["path"])]


def _columns(t: Translation, key: str, sets: list[dict[str, Any]], objective: str) -> dict[str, str]:
    """Where the messages or the text stand, if it is not where they are looked for anyway."""
    found = []
    for i, one in enumerate(sets):
        mapping: dict[str, str] = {}
        if one.get("field_messages") not in (None, "messages", "conversations"):
            mapping = {"messages": one["field_messages"]}
        text = one.get("field") or one.get("text_column")
        if objective == "text" and text not in (None, "text"):
            mapping = {"text": str(text)}
        names = one.get("message_property_mappings") or {}
        odd = {k: v for k, v in names.items() if v not in ("role", "from", "content", "value")}
        odd |= {k: one[k] for k in ("message_field_role", "message_field_content") if one.get(k) not in (None, "role", "from", "content", "value")}
        if odd:
            t.leave(
                f"{key}.{i}.message_property_mappings",
                f"messages are {{role, content}} or {{from, value}} here: rename {', '.join(map(str, odd.values()))} in the file",
            )
        found.append(mapping)
    if all(m == found[0] for m in found):
        return found[0] if found else {}
    t.leave(key, "its data sets have columns of different names, and data.columns is one for all: rename them, or train on one")
    return {}


def _template(t: Translation, kinds: list[str], objective: str) -> None:
    name = t.take("chat_template")
    if t.has("chat_template_jinja"):
        t.leave("chat_template_jinja", "put its text into a file, and name that: model.template=FILE.jinja")
    if name is None and kinds and all(k == "alpaca" for k in kinds) and objective == "sft":
        t.put(
            "model.template", "alpaca", "datasets", comment="type alpaca: its preamble; the input stands behind the instruction, without a heading of its own"
        )
    elif name in TEMPLATES:
        t.put("model.template", TEMPLATES[name], "chat_template", comment="leave it out for the model's own")
    elif name is not None and not str(name).startswith("tokenizer_default"):
        t.leave(
            "chat_template",
            f"there is no template {name!r} here: the model's own is used, as its makers ship it; model.template names others, or a .jinja file",
        )


def _logging(t: Translation) -> None:
    to = []
    if t.has("wandb_project") and str(t.take("wandb_mode", "")) != "disabled":
        to.append("wandb")
        t.leave("wandb_project", "log.to: [wandb] is put; the project's name is read from WANDB_PROJECT")
    t.take("wandb_mode")
    if t.truth("use_tensorboard"):
        to.append("tensorboard")
    if to:
        t.put("log.to", to, "use_tensorboard")
    t.move("wandb_run_id" if t.has("wandb_run_id") else "wandb_name", "name")
