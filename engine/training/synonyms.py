"""Names of settings in other training programs, for the error of an unknown key and the table in docs/training.md.

litgpt: `litgpt pretrain` (litgpt/pretrain.py, args.py, config.py). torchtitan: torchtitan/config/configs.py and the
Config classes in components/. nanoGPT: train.py. transformers: TrainingArguments; GPT2Config, LlamaConfig and
Gemma2Config for [model].
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

PROGRAMS = ("litgpt", "torchtitan", "nanoGPT", "transformers")

# Our key or flag -> what each program calls it; several names are separated by blanks, "" if it has none.
SYNONYMS: dict[str, tuple[str, str, str, str]] = {
    "preset": ("model_name", "model.flavor", "init_from", "model_name"),
    "init": ("initial_checkpoint_dir", "checkpoint.initial_load_path", "", "model_name_or_path"),
    "tokenizer": ("tokenizer_dir", "hf_assets_path", "", "tokenizer_name"),
    "n_kv_head": ("n_query_groups", "n_kv_heads", "", "num_key_value_heads"),
    "n_layer": ("", "n_layers", "", "num_hidden_layers"),
    "n_head": ("", "n_heads", "", "num_attention_heads"),
    "n_embd": ("", "dim", "", "hidden_size"),
    "head_dim": ("head_size", "", "", ""),
    "n_inner": ("intermediate_size", "hidden_dim", "", "intermediate_size"),
    "block_size": ("max_seq_length", "max_seq_len", "", "n_positions n_ctx max_position_embeddings"),
    "vocab_size": ("padded_vocab_size", "", "", ""),
    "norm": ("norm_class_name", "", "", ""),
    "rotary_dim": ("rotary_percentage", "", "", ""),
    "rotary_base": ("rope_base", "", "", "rope_theta"),
    "rotary_interleaved": ("rope_interleave", "", "", ""),
    "rope_scaling": ("rope_adjustments", "", "", "rope_parameters"),
    "local_rotary_base": ("rope_local_base_freq", "", "", "rope_local_base_freq"),
    "rotary_layers": ("", "", "", "no_rope_layers"),
    "embedding_scale": ("scale_embeddings", "", "", ""),
    "windows": ("sliding_window_size", "", "", "sliding_window"),
    "attention_scale": ("attention_scores_scalar", "", "", ""),
    "qkv_clip": ("", "", "", "clip_qkv"),
    "attention_softcap": ("attention_logit_softcapping", "", "", "attn_logit_softcapping"),
    "residual": ("parallel_residual", "", "", ""),
    "activation": ("gelu_approximate", "", "", "activation_function hidden_act"),
    "gated_mlp": ("mlp_class_name", "", "", ""),
    "experts": ("n_expert", "", "", "num_local_experts"),
    "expert_inner": ("moe_intermediate_size", "", "", "moe_intermediate_size"),
    "experts_every": ("", "", "", "decoder_sparse_step"),
    "normalize_experts": ("norm_topk_prob", "", "", "norm_topk_prob"),
    "balance_loss": ("", "", "", "router_aux_loss_coef"),
    "experts_per_token": ("n_expert_per_token", "", "", "num_experts_per_tok"),
    "bias": ("attn_bias", "", "", "attention_bias mlp_bias"),
    "head_bias": ("lm_head_bias", "", "", ""),
    "layer_norm_epsilon": ("norm_eps", "norm_eps", "", "rms_norm_eps"),
    "tied_head": ("tie_embeddings", "enable_weight_tying", "", "tie_word_embeddings"),
    "dropout": ("", "", "", "resid_pdrop hidden_dropout"),
    "embedding_dropout": ("", "", "", "embd_pdrop"),
    "attention_dropout": ("", "", "", "attn_pdrop"),
    "label_smoothing": ("", "", "", "label_smoothing_factor"),
    "text": ("data.train_data_path", "", "", "train_file"),
    "dataset": ("data", "dataset_path", "", "dataset_name"),
    "batch": ("global_batch_size", "global_batch_size num_tokens_per_train_step", "", ""),
    "micro_batch": ("micro_batch_size", "local_batch_size num_tokens_per_microbatch_per_dp_rank",
                    "batch_size gradient_accumulation_steps", "per_device_train_batch_size"),
    "tokens": ("", "seq_len max_context_length", "", "max_length"),
    "steps": ("max_steps", "training.steps", "max_iters", "max_steps"),
    "epochs": ("train.epochs", "", "", "num_train_epochs"),
    "minutes": ("max_time", "", "", ""),
    "dtype": ("precision", "mixed_precision_param", "", "bf16 fp16"),
    "recompute": ("activation_checkpointing", "activation_checkpoint", "", "gradient_checkpointing"),
    "optimizer": ("", "optimizer.name", "", "optim"),
    "lr": ("optimizer.lr", "optimizer.lr", "learning_rate", "learning_rate"),
    "betas": ("optimizer.betas", "", "beta1 beta2", "adam_beta1 adam_beta2"),
    "eps": ("optimizer.eps", "optimizer.eps", "", "adam_epsilon"),
    "max_norm": ("train.max_norm", "training.max_norm", "grad_clip", "max_grad_norm"),
    "schedule": ("", "decay_type", "decay_lr", "lr_scheduler_type"),
    "warmup": ("lr_warmup_fraction", "", "", "warmup_ratio"),
    "warmup_steps": ("lr_warmup_steps", "lr_scheduler.warmup_steps", "warmup_iters", "warmup_steps"),
    "decay_steps": ("", "total_steps", "lr_decay_iters", ""),
    "decay_fraction": ("", "decay_ratio", "", ""),
    "min_lr_fraction": ("", "min_lr_factor", "", ""),
    "validate_every": ("interval eval.interval", "validator.freq", "eval_interval", "eval_steps"),
    "validation_batches": ("max_iters eval.max_iters", "validator.steps", "eval_iters", "eval_max_batches"),
    "patience": ("", "", "", "early_stopping_patience"),
    "save_every": ("save_interval", "checkpoint.interval", "", "save_steps"),
    "keep_last": ("", "keep_latest_k", "", "save_total_limit"),
    "profile": ("", "enable_profiling profile_freq", "", ""),
    "wandb_project": ("log.project", "", "", ""),
    "enable_wandb": ("logger_name", "", "wandb_log", "report_to"),
    "--config": ("", "job.config_file", "", ""),
    "--out": ("out_dir", "dump_folder", "out_dir", "output_dir"),
    "--resume": ("resume", "checkpoint.load_step", "", "resume_from_checkpoint"),
    "--device": ("devices", "", "device", ""),
}  # fmt: skip


FORMER = {"model": "preset"}  # names of earlier versions

# Names of other programs for what needs no setting here, and why.
NEEDLESS = {
    **dict.fromkeys(("log_interval", "log_freq", "logging_steps"), "metrics.jsonl has every step"),
    "compile": "own kernels take its place",
    "eval_only": "`peakgpt score` evaluates a checkpoint",
    "always_save_checkpoint": "every save is kept as keep_last says, and the best one too",
}


class Names(NamedTuple):
    """Names of other programs.

    Args:
        programs: the columns of the table.
        table: our key or flag -> its names in each program, separated by blanks.
    """

    programs: tuple[str, ...]
    table: Mapping[str, tuple[str, ...]]


TRAINING = Names(PROGRAMS, SYNONYMS)


def our_name(
    name: str, known: Collection[str], *, as_flag: bool = False, others: tuple[Names, ...] = (TRAINING,)
) -> str | None:
    """Return what to use instead of a name of another program; None if no program has it.

    Args:
        name: a key or a flag without its dashes; sections may stand before it, as in train.global_batch_size.
        known: names of our settings; others are not named.
        as_flag: name the flag instead of the key.
        others: where to look, in this order.
    """
    wanted = name.replace("-", "_")
    last = wanted.rpartition(".")[2]
    if last in NEEDLESS:
        return f"expected none: {NEEDLESS[last]}"
    rows = [(ours, program, other) for names in others for ours, theirs in names.table.items()
            if ours in known or ours.startswith("--")
            for program, cell in zip(names.programs, theirs, strict=True) for other in cell.split()]  # fmt: skip

    def find(matches: Callable[[str], bool]) -> tuple[str, str] | None:
        return next(((ours, f"{program}: {other}") for ours, program, other in rows if matches(other)), None)

    found = find(lambda other: wanted == other)  # "max_iters" alone is nanoGPT's; behind "eval." it is litgpt's
    same = FORMER.get(wanted, last if last != wanted else None)
    same = same if same in known else None
    if found is None and same is not None:
        return f"expected {_flag(same) if as_flag else same}"
    found = found or find(lambda other: last == other.rpartition(".")[2])
    if found is None:
        return None
    ours, source = found
    return f"expected {_flag(ours) if as_flag else ours} ({source})"


def _flag(name: str) -> str:
    return name if name.startswith("--") else f"--{name.replace('_', '-')}"
