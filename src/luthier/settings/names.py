"""The right name for a wrong one: typing slips, and what other programs call the same setting."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_OURS_THEIRS = {
    "model": "base_model model_name pretrained_model model_path",
    "model.id": "model_name_or_path pretrained_model_name_or_path base_model_name_or_path base_model_id model_id",
    "model.revision": "model_revision revision_of_model",
    "model.template": "chat_template prompt_template template_name",
    "data.train": "dataset datasets dataset_name dataset_path train_file train_files train_data train_dataset data_path training_data",
    "data.validation": "eval_dataset validation_file valid_file val_data eval_file test_data validation_data",
    "data.validation_share": "val_set_size val_size validation_split test_size eval_split_ratio split_ratio",
    "data.max_tokens": "cutoff_len sequence_len sequence_length seq_len seq_length max_length max_len max_seq_length max_seq_len model_max_length block_size",
    "data.languages": "lang language data_language dataset_language",
    "data.limit": "max_samples max_train_samples num_samples",
    "data.split": "dataset_split train_split",
    "data.pack": "packing sample_packing packed",
    "data.shape": "dataset_format data_format dataset_type conversation_format",
    "data.columns": "column_mapping field_mapping field_messages dataset_text_field",
    "method": "adapter adapter_type finetuning_type peft peft_type peft_method fine_tune_type tuning_type use_dora",
    "method.rank": "lora_r lora_rank r lora_dim",
    "method.alpha": "lora_alpha",
    "method.dropout": "lora_dropout",
    "method.targets": "target_modules lora_target lora_target_modules lora_targets lora_modules modules_to_adapt",
    "method.rank_stabilised": "use_rslora rslora rank_stabilized",
    "method.init": "init_lora_weights",
    "method.ranks": "rank_pattern",
    "method.alphas": "alpha_pattern",
    "method.lr_ratio": "loraplus_lr_ratio",
    "tokens": "trainable_token_indices new_tokens added_tokens additional_special_tokens add_special_tokens",
    "objective": "stage trainer loss_type rl task_type train_on_inputs completion_only_loss mask_prompt",
    "precision": "load_in_4bit load_in_8bit quantization quantization_bit quantize bf16 fp16 dtype torch_dtype mixed_precision bnb_4bit_quant_type",
    "place.on": "device device_map use_cpu",
    "optim.lr": "learning_rate max_lr peak_lr base_lr",
    "optim.epochs": "num_train_epochs num_epochs n_epochs epoch train_epochs",
    "optim.steps": "max_steps num_steps total_steps train_steps max_iters iters num_iters",
    "optim.batch_examples": "per_device_train_batch_size train_batch_size batch_size global_batch_size effective_batch_size",
    "optim.micro_tokens": "gradient_accumulation_steps grad_accumulation_steps grad_accum_steps micro_batch_size",
    "optim.schedule": "lr_scheduler_type lr_scheduler lr_schedule scheduler",
    "optim.warmup": "warmup_ratio warmup_steps num_warmup_steps lr_warmup_steps warmup_share",
    "optim.min_lr": "min_lr_ratio lr_min cosine_min_lr_ratio",
    "optim.weight_decay": "wd decay",
    "optim.beta1": "adam_beta1 adam_beta",
    "optim.beta2": "adam_beta2",
    "optim.eps": "adam_epsilon adam_eps epsilon",
    "objective.class_weights": "class_weight label_weights loss_weights",
    "data.replay": "replay_dataset rehearsal replay_buffer experience_replay pt_dataset",
    "objective.loss_kind": "pref_loss dpo_loss_type",
    "objective.centre": "center_rewards_coefficient",
    "objective.beta": "pref_beta",
    "objective.desirable": "desirable_weight kto_chosen_weight",
    "objective.undesirable": "undesirable_weight kto_rejected_weight",
    "optim.state": "optim_bits use_8bit_adam use_8bit_optimizer",
    "precision.double": "bnb_4bit_use_double_quant use_bnb_nested_quant double_quantization",
    "precision.compute": "bnb_4bit_compute_dtype",
    "optim.clip": "max_grad_norm gradient_clip gradient_clip_val gradient_clipping grad_clip clip_grad_norm",
    "evaluate.every_steps": "eval_steps evaluation_steps steps_per_eval eval_interval eval_freq",
    "evaluate.patience": "early_stopping_patience early_stopping",
    "evaluate.best": "load_best_model_at_end",
    "checkpoint.every_steps": "save_steps save_every save_interval checkpoint_interval",
    "checkpoint.keep": "save_total_limit keep_checkpoints",
    "log.to": "report_to loggers logger use_wandb wandb_project",
    "log.every_steps": "logging_steps log_steps steps_per_report log_interval log_every_n_steps",
    "recompute": "gradient_checkpointing activation_checkpointing grad_checkpoint enable_activation_checkpointing",
    "seed": "random_seed",
    "name": "run_name experiment_name",
    "out": "output_dir save_dir out_dir output_path adapter_path results_dir",
}
FOREIGN = {theirs: ours for ours, names in _OURS_THEIRS.items() for theirs in names.split()}  # "lora_r" -> "method.rank"


def foreign(name: str) -> str | None:
    """Our key for a name that another program uses."""
    return FOREIGN.get(name.lower().replace("-", "_").lstrip("_"))


def nearest(name: str, accepted: Iterable[str], least: float = 0.6) -> str | None:
    """The accepted name a slip of typing is closest to, if one is close."""
    accepted = list(accepted)
    folded = {a.lower().replace("-", "_"): a for a in accepted}
    key = name.lower().replace("-", "_")
    if key in folded:
        return folded[key]
    close = difflib.get_close_matches(key, folded, 1, least)
    return folded[close[0]] if close else None
