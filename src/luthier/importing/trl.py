"""TRL's YAML (https://github.com/huggingface/trl, `trl sft --config FILE`), in which keys of accelerate may stand as well.

The file does not say which trainer it is for, since the command does: it is told from keys that only one trainer has, or from --objective.
"""

from __future__ import annotations

from typing import Any

from ..settings.config import error_at
from .translation import Translation, batch, default, every, floats, logging, model, modules, optimizer, schedule, steps_and_epochs

NAME = "trl"
TELLS = ("model_name_or_path", "dataset_name", "use_peft", "lora_target_modules", "load_in_4bit", "max_length", "dataset_train_split", "bnb_4bit_quant_type")
OBJECTIVES = ("sft", "dpo", "kto", "reward", "orpo", "grpo", "text")
ONLY = {  # keys that one trainer has
    "kto": ("desirable_weight", "undesirable_weight"),
    "reward": ("center_rewards_coefficient", "disable_dropout_reward"),
    "grpo": ("num_generations", "reward_funcs", "reward_model_name_or_path", "max_completion_length", "num_iterations"),
    "dpo": ("beta", "loss_type", "label_smoothing", "precompute_ref_log_probs", "max_prompt_length", "ld_alpha"),
    "sft": ("packing", "packing_strategy", "padding_free", "completion_only_loss", "assistant_only_loss", "dataset_text_field"),
}
RATES = {"sft": 2e-5, "dpo": 1e-6, "kto": 1e-6, "reward": 1e-4, "orpo": 1e-6, "grpo": 1e-6, "text": 2e-5}
LENGTHS = {"sft": 1024, "text": 1024}
ACCELERATE = (
    "compute_environment",
    "distributed_type",
    "num_processes",
    "num_machines",
    "machine_rank",
    "main_training_function",
    "main_process_ip",
    "main_process_port",
    "downcast_bf16",
    "rdzv_backend",
    "same_network",
    "tpu_env",
    "tpu_use_cluster",
    "tpu_use_sudo",
    "mixed_precision",
    "deepspeed_config",
    "fsdp_config",
    "gpu_ids",
    "dynamo_config",
    "dynamo_backend",
    "enable_cpu_affinity",
    "deepspeed_config_file",
    "accelerate_config",
    "debug",
    "env",
    "mpirun_config",
    "megatron_lm_config",
)

SAME = {
    "model_revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_epsilon": "optim.eps",
    "max_grad_norm": "optim.clip",
    "output_dir": "out",
    "run_name": "name",
    "save_total_limit": "checkpoint.keep",
    "logging_steps": "log.every_steps",
    "load_best_model_at_end": "evaluate.best",
    "dataset_train_split": "data.split",
}
NEEDLESS = {
    "attn_implementation": "the fastest attention that is exact is chosen",
    "lora_task_type": "the objective says it",
    "dataset_num_proc": "the tokenizer uses all cores",
    "packing_strategy": "whole examples share rows, and none is cut",
    "padding_free": "examples share rows without padding where the model allows it",
    "eval_packing": "evaluation packs as training does",
    "do_train": "luthier train trains",
    "do_eval": "what is held out is always measured",
    "gradient_checkpointing_kwargs": "recomputation is always the exact one",
    "remove_unused_columns": "nothing reads them",
    "logging_dir": "in the run's folder",
    "dataloader_num_workers": "batches are ready before they are asked for",
    "per_device_eval_batch_size": "evaluation takes as many as a training step",
    "overwrite_output_dir": "every run has a folder of its own below out",
    "log_level": "--quiet prints nothing but errors",
    "logging_strategy": "log.every_steps",
    "precompute_ref_log_probs": "they are computed once and kept (objective.reference: cached)",
    "bnb_4bit_quant_storage": "codes are bytes",
    "tf32": "chosen by the machine",
    "logging_first_step": "every step is written",
    "dataset_test_split": "validation files beside the training data are found by name",
    "use_liger_kernel": "no such kernels, and none needed for the result",
    "save_only_model": "checkpoints are deleted by checkpoint.keep",
    "generate_during_eval": "samples are written unasked",
    "ddp_timeout": "there is one process",
    "max_prompt_length": "data.max_tokens bounds prompt and answer; what is too long loses of its prompt first",
}
LEFT = {
    "deepspeed": "one device for now (place: one); recompute: blocks and precision: nf4 save memory on it",
    "fsdp": "one device for now (place: one)",
    "lora_modules_to_save": "embedding and head are names of method.targets, as pairs of low rank",
    "dataset_streaming": "files are read whole",
    "push_to_hub": "nothing is uploaded",
    "hub_model_id": "nothing is uploaded",
    "hub_token": "hf auth login remembers it; it is not written down",
    "resume_from_checkpoint": "luthier train --resume RUN",
    "neftune_noise_alpha": "no noise on embeddings",
    "eos_token": "the tokenizer's own is used",
    "pad_token": "padding is not seen by the model",
    "chat_template_path": "model.template=FILE.jinja",
    "activation_offloading": "recompute: blocks is nearest",
    "use_vllm": "luthier generate --engine vllm; rollouts are sampled by this program",
    "vllm_mode": "rollouts are sampled by this program",
    "sync_ref_model": "the reference stays as it is",
    "model_init_kwargs": "model.revision, model.trust_remote_code and precision say the usual ones",
    "ref_model_name_or_path": "the reference is the base itself",
    "rpo_alpha": "no cross-entropy beside DPO; objective: orpo has one",
    "torch_compile": "no such setting",
    "use_logits_to_keep": "only scored positions are ever computed",
    "mask_truncated_completions": "objective.missing_eos_penalty is nearest",
    "log_completions": "samples.jsonl holds answers",
    "epsilon": "objective.clip",
    "dataset_kwargs": "data.columns and data.shape",
}


def translate(t: Translation, objective: str | None = None) -> None:
    """TRL to a run. ``objective``: which of its trainers; told from the keys where it is not given."""
    for key in ACCELERATE:
        if key in t.tree.values:
            t.drop(key, "a key of accelerate, which is not used here: one process, on the device of place.on")
    if t.truth("use_cpu"):
        t.put("place.on", "cpu", "use_cpu")
    model(t, "model_name_or_path")
    kind = _objective(t, objective)
    _method(t)
    _precision(t)
    length = "max_length" if t.has("max_length") or not t.has("max_seq_length") else "max_seq_length"
    max_tokens = t.count(length, LENGTHS.get(kind, 1024))
    t.put("data.max_tokens", max_tokens, length, comment=t.given(length))
    _data(t, kind)
    if t.has("packing"):
        t.put("data.pack", "yes" if t.truth("packing") else "no", "packing")
    if t.truth("gradient_checkpointing", True):
        t.put("recompute", "blocks", "gradient_checkpointing", comment=t.given("gradient_checkpointing"))
    default(t, "learning_rate", "optim.lr", RATES[kind])
    steps_and_epochs(t, "num_train_epochs", 3.0 if kind not in ("reward",) else 1.0)
    batch(t, "per_device_train_batch_size", "gradient_accumulation_steps", default=8, max_tokens=max_tokens)
    schedule(t, "lr_scheduler_type", default="linear")
    if t.has("lr_scheduler_kwargs"):
        rest = dict(t.take("lr_scheduler_kwargs"))
        if "min_lr_rate" in rest:
            t.put("optim.min_lr", rest.pop("min_lr_rate"), "lr_scheduler_kwargs")
        for key in rest:
            t.leave(f"lr_scheduler_kwargs.{key}", "optim.min_lr, a share of the peak, is what a schedule has")
    default(t, "weight_decay", "optim.weight_decay", 0.0)
    optimizer(t, "optim")
    floats(t)
    every(t, "eval_strategy", "eval_steps", "evaluate.every_steps")
    every(t, "save_strategy", "save_steps", "checkpoint.every_steps")
    logging(t)
    t.put("seed", t.number("seed", 42), "seed", comment=t.given("seed"))
    t.moves(SAME)
    t.drops(NEEDLESS)
    t.leaves(LEFT)


def _objective(t: Translation, given: str | None) -> str:
    told = next((k for k, keys in ONLY.items() if any(t.has(key) for key in keys)), "sft")
    kind = given or told
    why = (
        ""
        if given
        else "told from its keys; --objective says another"
        if any(t.has(k) for k in ONLY[told])
        else "the file does not say which; --objective does"
    )
    loss = t.take("loss_type") if kind == "dpo" else None
    if kind == "sft" and t.has("assistant_only_loss") and not t.truth("assistant_only_loss"):
        why = "assistant_only_loss: false learns the questions of conversations as well; objective: text does"
    if kind == "sft" and t.has("completion_only_loss") and not t.truth("completion_only_loss"):
        kind, why = "text", "completion_only_loss: false learns every token"
    t.truth("assistant_only_loss")
    t.truth("completion_only_loss")
    t.put("objective.kind", kind, comment=why)
    if kind == "dpo":
        names = [str(x) for x in (loss if isinstance(loss, list) else [loss or "sigmoid"])]
        if names in (["sigmoid"], ["ipo"]):
            t.put("objective.loss_kind", names[0], "loss_type")
        else:
            t.leave("loss_type", f"there is no loss {', '.join(names)}: objective.loss_kind is sigmoid or ipo, and sigmoid is taken")
        t.move("label_smoothing", "objective.label_smoothing")
    if kind in ("dpo", "kto"):
        t.move("beta", "objective.beta")
    if kind == "orpo":
        t.move("beta", "objective.weight")
    if kind == "kto":
        t.moves({"desirable_weight": "objective.desirable", "undesirable_weight": "objective.undesirable"})
    if kind == "reward":
        t.move("center_rewards_coefficient", "objective.centre")
    if kind == "grpo":
        _grpo(t)
    return kind


def _grpo(t: Translation) -> None:
    t.moves(
        {
            "num_generations": "objective.samples",
            "max_completion_length": "objective.max_new",
            "temperature": "objective.temperature",
            "num_iterations": "objective.epochs",
        }
    )
    if not t.has("max_completion_length"):
        t.put("objective.max_new", 256, comment=t.theirs)
    t.put("objective.kl", t.number("beta", 0.0), "beta", comment=t.given("beta"))
    if t.has("reward_model_name_or_path"):
        t.put(
            "objective.rewards",
            {str(t.take("reward_model_name_or_path")): 1.0},
            "reward_model_name_or_path",
            comment="an adapter or run trained with objective: reward",
        )
    if t.has("reward_funcs"):
        names = t.names("reward_funcs")
        files = [n for n in names if n.endswith(".py") or ".py:" in n]
        if files:
            t.put("objective.rewards", dict.fromkeys(files, 1.0), "reward_funcs")
        if rest := [n for n in names if n not in files]:
            t.leave("reward_funcs", f"{', '.join(rest)}: functions by file here: objective.rewards={{./FILE.py:NAME: 1}}")


def _method(t: Translation) -> None:
    if not t.truth("use_peft"):
        t.put("method.kind", "full", comment="use_peft is not on")
        for key in [k for k in t.tree.values if k.startswith("lora_") or k in ("use_rslora", "use_dora")]:
            t.drop(key, "without use_peft there is none")
        return
    t.put("method.kind", "dora" if t.truth("use_dora") else "lora", "use_peft")
    t.put("method.rank", t.count("lora_r", 16), "lora_r", comment=t.given("lora_r"))
    t.put("method.alpha", t.number("lora_alpha", 32), "lora_alpha", comment=t.given("lora_alpha"))
    t.put("method.dropout", t.number("lora_dropout", 0.05), "lora_dropout", comment=t.given("lora_dropout"))
    modules(t, "lora_target_modules")
    t.move("use_rslora", "method.rank_stabilised")


def _precision(t: Translation) -> None:
    four, eight = t.truth("load_in_4bit"), t.truth("load_in_8bit")
    nested, kind, dtype = t.truth("use_bnb_nested_quant"), str(t.take("bnb_4bit_quant_type", "nf4")), t.take("dtype") or t.take("torch_dtype")
    t.seen |= {"dtype", "torch_dtype"}
    if four:
        t.put("precision.kind", "nf4", "load_in_4bit")
        t.put("precision.double", nested, "use_bnb_nested_quant", comment=t.given("use_bnb_nested_quant"))
        if kind != "nf4":
            t.leave("bnb_4bit_quant_type", "there is no fp4: nf4 is taken, which is as small and nearer to the weights")
    elif eight:
        t.put("precision.kind", "int8", "load_in_8bit")
    elif dtype in ("bfloat16", "float32"):
        t.put("precision", dtype, "dtype" if t.has("dtype") else "torch_dtype")
    elif dtype not in (None, "auto"):
        t.leave("dtype" if t.has("dtype") else "torch_dtype", f"there is no {dtype}; bfloat16 is taken where the machine is fast at it")


def _data(t: Translation, objective: str) -> None:
    sets: list[Any] = t.take("datasets", [])
    paths: list[str] = []
    for i, one in enumerate(sets):
        if not isinstance(one, dict) or not (one.get("path") or one.get("data_files")):
            raise error_at(t.tree, ("datasets", i), "a data set is {path: ..., name: ..., data_files: ...}")
        files = one.get("data_files")
        paths += (files if isinstance(files, list) else [files]) if files else [f"{one['path']}:{one['name']}" if one.get("name") else one["path"]]
        for key in [k for k in one if k not in ("path", "name", "data_files", "split", "data_dir")]:
            t.leave(
                f"datasets.{i}.{key}", "no such setting for one source; data.columns is one for all" if key == "columns" else "no such setting for one source"
            )
        if one.get("split", "train") != "train":
            t.put("data.split", one["split"], "datasets")
    config = t.take("dataset_config")
    if t.has("dataset_name"):
        paths.append(f"{t.take('dataset_name')}:{config}" if config else t.take("dataset_name"))
    if not sets or paths:
        t.put("data.train", paths, "datasets" if sets else "dataset_name", "dataset_name", "dataset_config")
    if t.has("dataset_text_field"):
        field = str(t.take("dataset_text_field"))
        if objective == "text" and field != "text":
            t.put("data.columns", {"text": field}, "dataset_text_field")
        elif field != "text":
            t.leave("dataset_text_field", f"raw text is learned by objective: text, with data.columns={{text: {field}}}")
    if t.has("test_split_size"):
        t.put("data.validation_share", t.number("test_split_size"), "test_split_size")
