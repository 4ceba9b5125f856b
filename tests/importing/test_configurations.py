"""Configurations in the manner of LLaMA-Factory, Axolotl and TRL: exactly which run each becomes, and exactly what is not translated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier import cli
from luthier.errors import ConfigError
from luthier.importing.reading import TOOLS, translated
from luthier.settings import runfile
from luthier.settings.config import load_run

INFO = {
    "pubs": {"file_name": "pubs.json"},
    "asked": {"file_name": "asked.json", "columns": {"prompt": "question", "response": "reply"}},
    "pairs": {
        "file_name": "p.json",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    },
    "judged": {"file_name": "k.json", "formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "label"}},
    "story": {"hf_hub_url": "roneneldan/TinyStories", "subset": "v2", "columns": {"prompt": "text"}},
}
LORA = {"kind": "lora", "rank": 8, "alpha": 16, "targets": ["all"]}

# name: (file, the run's settings, keys not translated with a word of the reason)
CASES: dict[str, tuple[str, dict[str, Any], list[tuple[str, int, str]]]] = {
    "llama-factory: sft with lora": (
        """
        model_name_or_path: fiddle
        stage: sft
        do_train: true
        finetuning_type: lora
        lora_rank: 16
        lora_alpha: 32
        lora_dropout: 0.05
        lora_target: q_proj,v_proj
        dataset: pubs
        dataset_dir: data
        template: llama3
        cutoff_len: 512
        max_samples: 1000
        overwrite_cache: true
        output_dir: saves/pubs
        logging_steps: 10
        save_steps: 500
        plot_loss: true
        per_device_train_batch_size: 2
        gradient_accumulation_steps: 8
        learning_rate: 1.0e-4
        num_train_epochs: 3.0
        lr_scheduler_type: cosine
        warmup_ratio: 0.1
        bf16: true
        val_size: 0.1
        eval_strategy: steps
        eval_steps: 250
        rope_scaling: linear
        flavour: sweet
        """,
        {
            "model": {"id": "fiddle", "template": "llama3"},
            "data": {"train": ["data/pubs.json"], "max_tokens": 512, "limit": 1000, "validation_share": 0.1},
            "method": {"kind": "lora", "rank": 16, "alpha": 32, "dropout": 0.05, "targets": ["q_proj", "v_proj"]},
            "objective": {"kind": "sft"}, "precision": "bfloat16",
            "optim": {"lr": 1e-4, "epochs": 3.0, "batch_examples": 16, "micro_tokens": 1024, "schedule": "cosine", "warmup": 0.1, "weight_decay": 0.0},
            "evaluate": {"every_steps": 250}, "checkpoint": {"every_steps": 500}, "log": {"every_steps": 10}, "seed": 42, "out": "saves/pubs",
        },
        [("rope_scaling", 30, "positions"), ("flavour", 31, "not known")],
    ),
    "llama-factory: dpo on four bits": (
        """
        model_name_or_path: fiddle
        quantization_bit: 4
        quantization_method: bitsandbytes
        double_quantization: false
        stage: dpo
        finetuning_type: lora
        lora_target: all
        pref_beta: 0.2
        pref_loss: ipo
        dataset: pairs
        template: qwen
        learning_rate: 5.0e-6
        max_steps: 400
        warmup_steps: 40
        optim: paged_adamw_8bit
        report_to: [wandb, mlflow]
        """,
        {
            "model": {"id": "fiddle"}, "data": {"train": ["data/p.json"], "max_tokens": 2048}, "method": LORA,
            "objective": {"kind": "dpo", "loss_kind": "ipo", "beta": 0.2}, "precision": {"kind": "nf4", "double": False},
            "optim": {"lr": 5e-6, "steps": 400, "batch_examples": 8, "micro_tokens": 16384, "schedule": "linear", "warmup": 0.1,
                "weight_decay": 0.0, "state": "paged-8bit"},
            "log": {"to": ["wandb"]}, "seed": 42,
        },
        [("template", 12, "the model's own"), ("report_to", 17, "mlflow")],
    ),
    "llama-factory: full with deepspeed": (
        """
        model_name_or_path: fiddle
        stage: sft
        finetuning_type: full
        lora_rank: 8
        deepspeed: examples/deepspeed/ds_z3_config.json
        dataset: asked
        per_device_train_batch_size: 1
        gradient_accumulation_steps: 2
        warmup_steps: 20
        lr_scheduler_type: polynomial
        """,
        {
            "model": {"id": "fiddle"}, "data": {"train": ["data/asked.json"], "max_tokens": 2048, "columns": {"instruction": "question", "output": "reply"}},
            "method": {"kind": "full"}, "objective": {"kind": "sft"},
            "optim": {"lr": 5e-5, "epochs": 3.0, "batch_examples": 2, "micro_tokens": 2048, "schedule": "cosine", "weight_decay": 0.0}, "seed": 42,
        },
        [("deepspeed", 6, "one device"), ("warmup_steps", 10, "a share of all steps"), ("lr_scheduler_type", 11, "no schedule 'polynomial'")],
    ),
    "llama-factory: pretraining": (
        """
        model_name_or_path: fiddle
        stage: pt
        finetuning_type: freeze
        freeze_trainable_layers: 3
        dataset: story
        packing: true
        weight_decay: 0.1
        """,
        {
            "model": {"id": "fiddle"}, "data": {"train": ["roneneldan/TinyStories:v2"], "max_tokens": 2048, "pack": "yes"},
            "method": {"kind": "partial", "last_blocks": 3}, "objective": {"kind": "text"},
            "optim": {"lr": 5e-5, "epochs": 3.0, "batch_examples": 8, "micro_tokens": 16384, "schedule": "linear", "warmup": 0.0,
                "weight_decay": 0.1}, "seed": 42,
        },
        [],
    ),
    "llama-factory: kto": (
        """
        model_name_or_path: fiddle
        stage: kto
        finetuning_type: lora
        use_dora: true
        dataset: judged
        pref_beta: 0.1
        kto_rejected_weight: 1.5
        neftune_noise_alpha: 5
        """,
        {
            "model": {"id": "fiddle"}, "data": {"train": ["data/k.json"], "max_tokens": 2048}, "method": LORA | {"kind": "dora"},
            "objective": {"kind": "kto", "beta": 0.1, "undesirable": 1.5},
            "optim": {"lr": 5e-5, "epochs": 3.0, "batch_examples": 8, "micro_tokens": 16384, "schedule": "linear", "warmup": 0.0,
                "weight_decay": 0.0}, "seed": 42,
        },
        [("neftune_noise_alpha", 9, "no noise")],
    ),
    "axolotl: qlora": (
        """
        base_model: fiddle
        load_in_4bit: true
        adapter: qlora
        datasets:
          - path: data/pubs.jsonl
            type: chat_template
            field_messages: dialogue
            shards: 3
        dataset_prepared_path: last_run_prepared
        val_set_size: 0.05
        output_dir: ./outputs
        sequence_len: 1024
        sample_packing: true
        pad_to_sequence_len: true
        lora_r: 32
        lora_alpha: 16
        lora_dropout: 0.05
        lora_target_linear: true
        gradient_accumulation_steps: 4
        micro_batch_size: 2
        num_epochs: 4
        optimizer: adamw_bnb_8bit
        lr_scheduler: cosine
        learning_rate: 2e-4
        bf16: auto
        gradient_checkpointing: true
        resume_from_checkpoint:
        warmup_ratio: 0.1
        evals_per_epoch: 4
        weight_decay: 0.0
        """,
        {
            "model": {"id": "fiddle"},
            "data": {"train": ["data/pubs.jsonl"], "max_tokens": 1024, "columns": {"messages": "dialogue"}, "validation_share": 0.05, "pack": "yes"},
            "method": {"kind": "lora", "rank": 32, "alpha": 16, "dropout": 0.05, "targets": ["all"]},
            "objective": {"kind": "sft"}, "precision": {"kind": "nf4"},
            "optim": {"lr": 2e-4, "epochs": 4, "batch_examples": 8, "micro_tokens": 2048, "schedule": "cosine", "warmup": 0.1,
                "weight_decay": 0.0, "state": "8bit"},
            "seed": 42, "recompute": "blocks", "out": "./outputs",
        },
        [("datasets.0.shards", 9, "one source"), ("evals_per_epoch", 30, "counts steps")],
    ),
    "axolotl: full on alpaca": (
        """
        base_model: fiddle
        datasets:
          - path: tatsu-lab/alpaca
            type: alpaca
        sequence_len: 2048
        micro_batch_size: 1
        num_epochs: 1
        learning_rate: 0.00002
        lora_r:
        wandb_project: pubs
        fsdp: [full_shard]
        """,
        {
            "model": {"id": "fiddle", "template": "alpaca"}, "data": {"train": ["tatsu-lab/alpaca"], "max_tokens": 2048}, "method": {"kind": "full"},
            "objective": {"kind": "sft"},
            "optim": {"lr": 2e-5, "epochs": 1, "batch_examples": 1, "micro_tokens": 2048, "schedule": "cosine", "warmup": 0.0, "weight_decay": 0.0},
            "log": {"to": ["wandb"]}, "seed": 42,
        },
        [("wandb_project", 11, "WANDB_PROJECT"), ("fsdp", 12, "one device")],
    ),
    "axolotl: dpo": (
        """
        base_model: fiddle
        adapter: lora
        lora_r: 8
        lora_alpha: 16
        lora_target_modules: [q_proj, v_proj]
        lora_modules_to_save: [embed_tokens]
        rl: dpo
        rl_beta: 0.3
        chat_template: chatml
        datasets:
          - {path: data/pairs.jsonl, type: chatml.intel}
        sequence_len: 1024
        micro_batch_size: 2
        num_epochs: 1
        learning_rate: 1e-5
        """,
        {
            "model": {"id": "fiddle", "template": "chatml"}, "data": {"train": ["data/pairs.jsonl"], "max_tokens": 1024},
            "method": {"kind": "lora", "rank": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]}, "objective": {"kind": "dpo", "beta": 0.3},
            "optim": {"lr": 1e-5, "epochs": 1, "batch_examples": 2, "micro_tokens": 2048, "schedule": "cosine", "warmup": 0.0, "weight_decay": 0.0}, "seed": 42,
        },
        [("lora_modules_to_save", 7, "method.targets")],
    ),
    "axolotl: completion": (
        """
        base_model: fiddle
        datasets:
          - {path: stories, type: completion, field: story}
        sequence_len: 512
        max_steps: 100
        warmup_steps: 5
        learning_rate: 1e-4
        """,
        {
            "model": {"id": "fiddle"}, "data": {"train": ["stories"], "max_tokens": 512, "columns": {"text": "story"}}, "method": {"kind": "full"},
            "objective": {"kind": "text"},
            "optim": {"lr": 1e-4, "steps": 100, "batch_examples": 1, "micro_tokens": 512, "schedule": "cosine", "warmup": 0.05,
                "weight_decay": 0.0}, "seed": 42,
        },
        [],
    ),
    "trl: dpo with accelerate's keys": (
        """
        compute_environment: LOCAL_MACHINE
        num_processes: 8
        model_name_or_path: fiddle
        dataset_name: data/pairs.jsonl
        beta: 0.2
        learning_rate: 5.0e-6
        per_device_train_batch_size: 2
        gradient_accumulation_steps: 8
        max_length: 768
        use_peft: true
        lora_r: 32
        lora_target_modules: all-linear
        load_in_4bit: true
        use_bnb_nested_quant: true
        eval_strategy: epoch
        gradient_checkpointing: false
        """,
        {
            "model": {"id": "fiddle"}, "data": {"train": ["data/pairs.jsonl"], "max_tokens": 768},
            "method": {"kind": "lora", "rank": 32, "alpha": 32, "dropout": 0.05, "targets": ["all"]},
            "objective": {"kind": "dpo", "loss_kind": "sigmoid", "beta": 0.2}, "precision": {"kind": "nf4", "double": True},
            "optim": {"lr": 5e-6, "epochs": 3.0, "batch_examples": 16, "micro_tokens": 1536, "schedule": "linear", "warmup": 0.0,
                "weight_decay": 0.0}, "seed": 42,
        },
        [("eval_strategy", 16, "once an epoch")],
    ),
    "trl: sft, full": (
        """
        model_name_or_path: fiddle
        torch_dtype: bfloat16
        datasets:
          - {path: trl-lib/Capybara, split: train}
          - {path: json, data_files: data/pubs.jsonl, columns: [messages]}
        packing: true
        max_length: 2048
        learning_rate: 2.0e-5
        num_train_epochs: 1
        lr_scheduler_type: cosine_with_min_lr
        lr_scheduler_kwargs: {min_lr_rate: 0.1}
        warmup_ratio: 0.03
        push_to_hub: true
        """,
        {
            "model": {"id": "fiddle"}, "data": {"train": ["trl-lib/Capybara", "data/pubs.jsonl"], "max_tokens": 2048, "pack": "yes"},
            "method": {"kind": "full"},
            "objective": {"kind": "sft"}, "precision": "bfloat16", "recompute": "blocks",
            "optim": {"lr": 2e-5, "epochs": 1, "batch_examples": 8, "micro_tokens": 16384, "schedule": "cosine", "warmup": 0.03, "min_lr": 0.1,
                "weight_decay": 0.0},
            "seed": 42,
        },
        [("datasets.1.columns", 6, "one for all"), ("push_to_hub", 14, "nothing is uploaded")],
    ),
    "trl: kto": (
        """
        model_name_or_path: fiddle
        dataset_name: trl-lib/kto-mix-14k
        desirable_weight: 1.0
        undesirable_weight: 1.3
        use_peft: true
        use_cpu: true
        """,
        {
            "model": {"id": "fiddle"}, "data": {"train": ["trl-lib/kto-mix-14k"], "max_tokens": 1024},
            "method": {"kind": "lora", "rank": 16, "alpha": 32, "dropout": 0.05},
            "objective": {"kind": "kto", "desirable": 1.0, "undesirable": 1.3}, "place": {"on": "cpu"}, "recompute": "blocks",
            "optim": {"lr": 1e-6, "epochs": 3.0, "batch_examples": 8, "micro_tokens": 8192, "schedule": "linear", "warmup": 0.0,
                "weight_decay": 0.0}, "seed": 42,
        },
        [],
    ),
    "trl: grpo": (
        """
        model_name_or_path: fiddle
        dataset_name: data/sums.jsonl
        num_generations: 4
        max_completion_length: 32
        reward_funcs: ./sums.py:right
        use_vllm: true
        learning_rate: 1e-5
        """,
        {
            "model": {"id": "fiddle"}, "data": {"train": ["data/sums.jsonl"], "max_tokens": 1024}, "method": {"kind": "full"}, "recompute": "blocks",
            "objective": {"kind": "grpo", "samples": 4, "max_new": 32, "kl": 0.0, "rewards": {"./sums.py:right": 1.0}},
            "optim": {"lr": 1e-5, "epochs": 3.0, "batch_examples": 8, "micro_tokens": 8192, "schedule": "linear", "warmup": 0.0,
                "weight_decay": 0.0}, "seed": 42,
        },
        [("use_vllm", 7, "rollouts")],
    ),
}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "theirs.yaml"
    path.write_text("\n".join(line.removeprefix("        ") for line in text.split("\n")))
    return path


@pytest.mark.parametrize("name", CASES)
def test_a_configuration_becomes_exactly_this_run_and_what_is_left_is_exactly_this(here: Path, name: str) -> None:
    theirs, settings, left = CASES[name]
    file = write(here, theirs)
    got = translated(file)
    assert got.tool == name.partition(":")[0]
    assert runfile.parse(got.text, "ours").values == settings
    assert [(x.key, x.line) for x in got.left] == [(k, n) for k, n, _ in left]
    assert all(word in x.why for x, (*_, word) in zip(got.left, left, strict=True)), got.left
    assert all(f"#   {x}" in got.text for x in got.left), "what was left stands in the file too"
    (here / "ours.yaml").write_text(got.text)
    assert load_run(here / "ours.yaml") == got.run == load_run(settings)


@pytest.mark.parametrize("name", CASES)
def test_every_key_is_accounted_for(here: Path, name: str) -> None:
    file = write(here, CASES[name][0])
    tree = runfile.read_file(file)
    from luthier.importing.translation import Translation

    t = Translation(name.partition(":")[0], tree, file)
    TOOLS[t.tool].translate(t)
    t.finish()
    said = t.placed | {x.key.partition(".")[0] for x in [*t.left, *t.needless]}
    assert set(tree.values) <= said
    assert not t.placed & {x.key for x in t.needless}


def test_a_key_that_nobody_knows_is_listed_whatever_its_value(here: Path) -> None:
    for tool, theirs in (("llama-factory", "stage: sft"), ("axolotl", "base_model: fiddle"), ("trl", "use_peft: true")):
        file = write(here, f"{theirs}\nbrand_new: false\nempty_one:\nlora_rnk: 4\ntarget_modules: [q_proj]\n")
        got = translated(file, tool=tool)
        assert {"brand_new", "target_modules"} <= {x.key for x in got.left} and "empty_one" in {x.key for x in got.needless}
        assert "lora_rnk" in {x.key for x in [*got.left, *got.needless]}
        assert "method.targets" in next(x.why for x in got.left if x.key == "target_modules")


def test_a_value_that_is_not_accepted_is_refused_with_its_file_and_line(here: Path) -> None:
    for text, what in (
        ("stage: sft\nfinetuning_type: lora\nlora_rank: many", r"theirs.yaml, line 3: lora_rank: found 'many', accepted is a number"),
        ("stage: sfd\nfinetuning_type: lora", r"theirs.yaml, line 1: stage: found 'sfd', known are pt, sft"),
        ("stage: sft\nfinetuning_type: lora\nlearning_rate: 3", r"theirs.yaml, line 3: optim.lr: found 3"),
        ("stage: sft\nfinetuning_type: lora\ngradient_accumulation_steps: 0", r"line 3: gradient_accumulation_steps: found 0"),
        ("stage: sft\nfinetuning_type: lora\nbf16: true\npissa_init: perhaps", r"line 4: pissa_init: found 'perhaps', accepted is true or false"),
        ("stage: sft\ntemplate: x\ndataset: nobody", r"theirs.yaml, line 3: dataset: .*dataset_info.json has no 'nobody'; it has asked, judged"),
        ("base_model: fiddle\nsequence_len: 64\ndatasets: [{type: alpaca}]", r"line 3: datasets.0: a data set is {path"),
    ):
        with pytest.raises(ConfigError, match=what):
            translated(write(here, text))


def test_whose_it_is_is_told_from_its_keys_or_asked(here: Path) -> None:
    with pytest.raises(ConfigError, match="do not say whose it is; name the program: --from llama-factory, axolotl, trl"):
        translated(write(here, "learning_rate: 1e-4\nseed: 3"))
    with pytest.raises(ConfigError, match="do not say whose it is"):
        translated(write(here, "template: plain\nseed: 3"))  # one key alone could be anybody's
    with pytest.raises(ConfigError, match="a run file of this program already: luthier train"):
        translated(write(here, "model: fiddle\ndata: {train: a.jsonl}\nmethod: lora"))
    with pytest.raises(ConfigError, match="--from axolotle: known are .*; did you mean axolotl?"):
        translated(write(here, "seed: 3"), tool="axolotle")
    with pytest.raises(ConfigError, match="--objective dpo: axolotl says it in the file"):
        translated(write(here, "seed: 3"), tool="axolotl", objective="dpo")


def test_the_trainer_of_trl_can_be_named(here: Path) -> None:
    file = write(here, "model_name_or_path: fiddle\nuse_peft: true\nbeta: 0.4\ndataset_name: a.jsonl")
    assert translated(file, objective="kto").run.objective.beta == 0.4
    assert type(translated(file).run.objective).__module__ == "luthier.objectives.dpo"
    assert translated(file, objective="reward").left[0].key == "beta"


def test_names_without_a_dataset_info_are_put_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    got = translated(write(tmp_path, "stage: sft\nfinetuning_type: lora\ndataset: a, b"))
    assert got.run.data.train == ("a", "b")
    assert [x.key for x in got.left] == ["model_name_or_path", "dataset"] and "names of a dataset_info.json" in got.left[1].why


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_the_verb_prints_a_run_file_that_train_accepts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(here, CASES["llama-factory: sft with lora"][0])
    assert cli.main(["import-config", str(file)]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("# theirs.yaml of llama-factory") and "line 31: flavour" in printed.err
    assert cli.main(["import-config", str(file), "--output", "run.yaml"]) == 0
    said = capsys.readouterr().out
    assert (here / "run.yaml").read_text() == printed.out
    assert "2 keys not translated" in said and "luthier train run.yaml --dry-run" in said
    assert cli.main(["train", "run.yaml", "--dry-run"]) == 0
    assert "trained parameters" in capsys.readouterr().out


def test_strict_fails_where_something_is_left_and_errors_write_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["import-config", str(write(here, CASES["llama-factory: sft with lora"][0])), "--strict"]) == 1
    assert cli.main(["import-config", str(write(here, CASES["trl: kto"][0])), "--strict"]) == 0
    capsys.readouterr()
    assert cli.main(["import-config", str(write(here, "stage: sft\nlora_rank: x\nfinetuning_type: lora")), "--output", "run.yaml"]) == 2
    assert "line 2: lora_rank" in capsys.readouterr().err and not (here / "run.yaml").exists()
    assert cli.main(["import-config", "nothing.yaml"]) == 2
    assert "nothing.yaml: no such" in capsys.readouterr().err
    assert cli.main(["import-confg", "x.yaml"]) == 2
    assert "did you mean: luthier import-config" in capsys.readouterr().err
