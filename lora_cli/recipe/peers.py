"""What other programs call a setting: axolotl, LLaMA-Factory, TRL, PEFT, transformers, unsloth."""

from __future__ import annotations

from typing import Any

_MOST = 20  # hints for what is inside one unknown section

# setting of a recipe: its other names, whose values mean the same
RENAMED = {
    "base_model": "base_model_name_or_path model_name_or_path model_name model model_id model_path",
    "revision": "model_revision revision_of_model",
    "output": "output_dir out_dir save_dir",
    "adapter.rank": "r lora_r lora_rank peft_r",
    "adapter.alpha": "lora_alpha",
    "adapter.dropout": "lora_dropout",
    "adapter.rank_stabilized": "use_rslora peft_use_rslora lora_use_rslora",
    "adapter.target_modules": "lora_target_modules lora_target",
    "adapter.layers": "layers_to_transform peft_layers_to_transform",
    "data.train": "train_file train_files train_data data_path data_files dataset_path train_dataset",
    "data.validation": "val_set_size val_size test_size validation_split validation_file eval_file eval_dataset",
    "data.max_seq_len": "sequence_len cutoff_len max_seq_length max_length seq_length seq_len block_size",
    "data.packing": "sample_packing neat_packing",
    "data.cache": "dataset_prepared_path tokenized_path",
    "train.epochs": "num_epochs num_train_epochs n_epochs",
    "train.max_steps": "max_train_steps iters",
    "train.learning_rate": "lr",
    "train.micro_batch_size": "per_device_train_batch_size per_device_batch_size",
    "train.gradient_accumulation_steps": "grad_accum grad_accumulation_steps",
    "train.gradient_checkpointing": "use_gradient_checkpointing grad_checkpoint",
    "train.max_grad_norm": "gradient_clipping gradient_clip_val grad_clip clip_grad_norm",
    "train.beta1": "adam_beta1",
    "train.beta2": "adam_beta2",
    "train.lora_plus_ratio": "loraplus_lr_ratio",
    "train.eval_every": "eval_steps eval_interval steps_per_eval",
    "train.checkpoint_every": "save_steps save_interval save_every",
    "train.keep_checkpoints": "save_total_limit",
    "train.seed": "random_seed random_state data_seed",
    "train.compile": "torch_compile",
    "train.liger_kernel": "use_liger_kernel enable_liger_kernel",
}
# what to write for names whose values mean something else here: the names
ANOTHER_VALUE = {
    "dtype: bf16": "bf16 bfloat16",
    "dtype: fp16": "fp16 float16",
    "dtype: bf16, fp16 or fp32": "torch_dtype bnb_4bit_compute_dtype mixed_precision precision",
    "quantization: nf4": "load_in_4bit bnb_4bit_quant_type",
    "quantization: int8": "load_in_8bit",
    "quantization: nf4, int8, int4, gguf or none": "quantization_bit quantization_method quantize quant_bits",
    "train.patience: 3, with train.eval_every": "early_stopping_patience",
    "double_quantization: true": "bnb_4bit_use_double_quant use_double_quant",
    "adapter.target_modules: all-linear": "lora_target_linear",
    "group_size: 32, with quantization: int4": "qalora_group_size",
    "adapter.method: qa_lora, with quantization: int4": "use_qalora",
    "adapter.init: kaiming or gaussian": "init_lora_weights peft_init_lora_weights",
    "data.train: a file, or {hub: owner/name}": "dataset datasets dataset_name dataset_dir",
    "data.columns: {text: your column}": "dataset_text_field text_field text_column",
    "data.template: chatml, another built-in one, or a .jinja file": "chat_template chat_template_path",
    "data.template: a .jinja file": "chat_template_jinja",
    "data.format: completion, instruction, chat or text, or nothing": "type dataset_type ds_type formatting",
    "data.train_on: all for prompts too; nothing trains answers alone": "train_on_inputs",
    "data.train_on: assistant or completion": "assistant_only_loss completion_only_loss train_on_responses_only",
    "train.schedule: cosine, linear or constant": "lr_scheduler_type lr_scheduler scheduler",
    "train.liger_kernel: true, on a GPU": "plugins liger_rope liger_rms_norm liger_glu_activation liger_swiglu",
    "train.optimizer: adamw, adamw_8bit or paged_adamw_8bit": "optim",
    "train.warmup_ratio: a share of all steps": "warmup_steps num_warmup_steps lr_warmup_steps",
    "train.min_learning_rate_ratio: a share of the rate": "min_lr lr_min cosine_min_lr_ratio",
    "train.batch_size, with train.micro_batch_size: auto": "total_batch_size global_batch_size auto_find_batch_size",
    "train.shard_base: true, to spread the base over processes": "deepspeed fsdp fsdp_config",
    "trackers: [wandb]": "report_to log_with use_wandb wandb_project wandb_entity logger loggers",
}
_REMOVE = {  # why nothing needs to be written: the names
    "every step is logged": "logging_steps log_every logging_strategy logging_first_step steps_per_report",
    "train.eval_every says it": "eval_strategy evaluation_strategy do_eval",
    "train.checkpoint_every says it": "save_strategy",
    "the best adapter is the one that is kept": "load_best_model_at_end metric_for_best_model greater_is_better",
    "the fastest attention for model and device is chosen": "flash_attention flash_attn attn_implementation "
    "use_flash_attention_2 sdp_attention xformers_attention",
    "examples of similar length go together without packing": "group_by_length pad_to_sequence_len",
    "evaluating needs none, its result does not depend on it": "per_device_eval_batch_size eval_batch_size",
    "the data is prepared once, before training": "dataloader_num_workers dataset_num_proc num_proc "
    "preprocessing_num_workers dataset_processes",
    "LoRA of a causal language model is all there is": "task_type peft_type finetuning_type stage do_train "
    "model_type tokenizer_type use_peft",
    "output must be a new folder": "overwrite_output_dir",
    "only columns with a meaning are read": "remove_unused_columns",
    "lora train RECIPE --resume continues a run": "resume_from_checkpoint auto_resume_from_checkpoints",
    "a token is read from the environment variable HF_TOKEN": "hf_token use_auth_token hf_use_auth_token",
}
_NOT_OFFERED = {  # what is not offered: the names
    "DoRA": "use_dora peft_use_dora lora_use_dora",
    "NEFTune": "neftune_noise_alpha noisy_embedding_alpha neftune_alpha",
    "training embeddings or other whole modules": "modules_to_save lora_modules_to_save additional_target",
    "adding tokens": "tokens add_tokens new_tokens special_tokens add_special_tokens resize_vocab",
    "training biases": "bias lora_bias",
    "PiSSA": "pissa_init pissa_iter",
    "GaLore": "use_galore galore_rank galore_target",
    "training for preferences or by reward": "rl rlhf dpo pref_beta pref_loss reward_model",
    "uploading": "push_to_hub hub_model_id hub_strategy push_to_hub_model_id",
}
_HINTS = {
    **{name: f"in this program: {key}" for key, names in RENAMED.items() for name in names.split()},
    **{name: f"in this program: {value}" for value, names in ANOTHER_VALUE.items() for name in names.split()},
    **{name: f"remove it: {why}" for why, names in _REMOVE.items() for name in names.split()},
    **{name: f"remove it: {what} is not offered" for what, names in _NOT_OFFERED.items() for name in names.split()},
}


def hint(name: str) -> str | None:
    """What to write for a setting of another program, as a fix; None for a name that none of them has."""
    return _HINTS.get(name.lower())


def hints_inside(value: Any) -> list[str]:
    """The same for the names within an unknown section, at any depth: a line each, for the details of an error."""
    lines: list[str] = []
    inside: Any = value if isinstance(value, dict) else dict(enumerate(value if isinstance(value, list) else ()))
    for name, inner in inside.items():
        if isinstance(name, str) and (said := hint(name)):
            lines.append(f"{name}: {said}")
        lines += hints_inside(inner)
    return lines[:_MOST]
