"""The rows of families with a mixture of experts; see `Family` for the fields of a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peakgpt.engine.checkpoint.families.family import Field, FieldGroup, with_defaults
from peakgpt.engine.checkpoint.families.layer_fields import bias_fields, uniform_window_fields, window_fields
from peakgpt.engine.checkpoint.families.llama import LLAMA, types_by_period
from peakgpt.engine.checkpoint.families.rope_fields import rope_fields
from peakgpt.engine.checkpoint.families.row_orders import alternating_gate_and_up
from peakgpt.engine.model.config import GPTConfig
from peakgpt.kernels.ops.mlp import SWIGLU_ALPHA, SWIGLU_LIMIT

EXPERTS = {"gated_experts": True, "balance_over": "model"}


def balance_fields(factor: float) -> FieldGroup:
    """Return the fields of the balance loss, which transformers adds to the loss if it returns the router's logits.

    Args:
        factor: transformers' router_aux_loss_coef if config.json has none.
    """

    def read(content: Mapping[str, Any]) -> dict[str, Any]:
        is_added = content.get("output_router_logits", False)
        return {"balance_loss": content.get("router_aux_loss_coef", factor) if is_added else 0.0}

    def write(config: GPTConfig) -> dict[str, Any]:
        is_added = config.balance_loss > 0
        return {"output_router_logits": is_added, **({"router_aux_loss_coef": config.balance_loss} if is_added else {})}

    return FieldGroup(("router_aux_loss_coef", "output_router_logits"), read, write)


def _layers_without_experts() -> FieldGroup:
    return FieldGroup(
        ("mlp_only_layers",),
        lambda content: {"mlp_only_layers": tuple(content.get("mlp_only_layers") or ())},
        lambda config: {"mlp_only_layers": list(config.mlp_only_layers)},
    )


def _optional_window() -> FieldGroup:
    """Return the fields of a window of all layers, which needs use_sliding_window."""
    group = uniform_window_fields(4096)

    def read(content: Mapping[str, Any]) -> dict[str, Any]:
        return group.read(content) if content.get("use_sliding_window", False) else {"windows": (None,)}

    def write(config: GPTConfig) -> dict[str, Any]:
        return {**group.write(config), "use_sliding_window": config.windows[0] is not None}

    return FieldGroup((*group.names, "use_sliding_window", "max_window_layers"), read, write)


def _attention_bias() -> FieldGroup:
    """Return the field that says whether attention has biases, in a family whose experts always have some."""

    def read(content: Mapping[str, Any]) -> dict[str, Any]:
        return {"bias": (*(("qkv", "out") if content.get("attention_bias", True) else ()), "mlp")}

    def write(config: GPTConfig) -> dict[str, Any]:
        return {"attention_bias": config.has_bias("qkv")}

    return FieldGroup(("attention_bias",), read, write)


def expert_names(module: str, *, gate: str, up: str, down: str) -> dict[str, str]:
    """Return the rows of `Family.names` for the experts of a layer, one module each: MODULE.{}.GATE."""
    names = {"c_gate": gate, "c_fc": up, "c_proj": down}
    return {f"transformer.h.{{}}.mlp.experts.{ours}": f"{module}.{{}}.{theirs}" for ours, theirs in names.items()}


MIXTRAL, GPT_OSS = "model.layers.{}.block_sparse_moe", "model.layers.{}.mlp"
GPT_OSS_ROPE = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                "original_max_position_embeddings": 4096}  # fmt: skip

EXPERT_FAMILIES = (
    replace(
        LLAMA,
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        fields=(
            *with_defaults(
                LLAMA.fields, num_key_value_heads=8, intermediate_size=14336, max_position_embeddings=131072,
                rms_norm_eps=1e-5,
            ),
            Field("experts", "num_local_experts", 8),
            Field("experts_per_token", "num_experts_per_tok", 2),
        ),
        constants={**LLAMA.constants, **EXPERTS, "experts_every": 1},
        fixed={"router_jitter_noise": 0.0},
        groups=(rope_fields(theta=1e6), uniform_window_fields(None), balance_fields(0.001)),
        names={
            **LLAMA.names,
            "transformer.h.{}.mlp.router": f"{MIXTRAL}.gate",
            **expert_names(f"{MIXTRAL}.experts", gate="w1", up="w3", down="w2"),
        },
        aliases={"num_experts": "num_local_experts"},
        stacked={
            "mlp.experts.gate_up_proj": (
                "block_sparse_moe.experts.{}.w1.weight",
                "block_sparse_moe.experts.{}.w3.weight",
            ),
            "mlp.experts.down_proj": ("block_sparse_moe.experts.{}.w2.weight",),
            "mlp.gate.weight": "block_sparse_moe.gate.weight",
        },
    ),
    replace(
        LLAMA,
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        fields=(
            *with_defaults(
                LLAMA.fields, num_hidden_layers=24, num_key_value_heads=4, hidden_size=2048, intermediate_size=6144,
                max_position_embeddings=32768, vocab_size=151936,
            ),
            Field("experts", "num_local_experts", 128),
            Field("experts_per_token", "num_experts_per_tok", 8),
            Field("expert_inner", "moe_intermediate_size", 768),
            Field("experts_every", "decoder_sparse_step", 1),
            Field("normalize_experts", "norm_topk_prob", False),
        ),
        constants={**LLAMA.constants, **EXPERTS, "qk_norm": "head"},
        groups=(
            rope_fields(),
            _optional_window(),
            bias_fields(attention_bias=("qkv", "out")),
            _layers_without_experts(),
            FieldGroup(("num_experts",), lambda content: {}, lambda config: {"num_experts": config.experts}),
            balance_fields(0.001),
        ),
        names={
            **LLAMA.names,
            "transformer.h.{}.attn.q_norm": "model.layers.{}.self_attn.q_norm",
            "transformer.h.{}.attn.k_norm": "model.layers.{}.self_attn.k_norm",
            "transformer.h.{}.mlp.router": "model.layers.{}.mlp.gate",
            **expert_names("model.layers.{}.mlp.experts", gate="gate_proj", up="up_proj", down="down_proj"),
        },
        aliases={"num_experts": "num_local_experts"},
        stacked={
            "mlp.experts.gate_up_proj": ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
            "mlp.experts.down_proj": ("mlp.experts.{}.down_proj.weight",),
        },
    ),
    replace(
        LLAMA,
        model_type="gpt_oss",
        architecture="GptOssForCausalLM",
        fields=(
            *with_defaults(
                tuple(field for field in LLAMA.fields if field.name != "activation"), num_hidden_layers=36,
                num_attention_heads=64, num_key_value_heads=8, hidden_size=2880, head_dim=64, intermediate_size=2880,
                max_position_embeddings=131072, vocab_size=201088, rms_norm_eps=1e-5,
            ),
            Field("experts", "num_local_experts", 128),
            Field("experts_per_token", "num_experts_per_tok", 4),
        ),
        constants={
            **LLAMA.constants, **EXPERTS, "experts_every": 1, "activation": "clamped_swiglu", "router_bias": True,
            "attention_sinks": True,
        },
        fixed={"hidden_act": "silu", "swiglu_limit": SWIGLU_LIMIT, "swiglu_alpha": SWIGLU_ALPHA},
        groups=(
            rope_fields(theta=150000.0, default=GPT_OSS_ROPE),
            window_fields(128, types_by_period(2)),
            _attention_bias(),
            balance_fields(0.001),
        ),
        names={
            **LLAMA.names,
            "transformer.h.{}.attn": "model.layers.{}.self_attn",  # of its sinks
            "transformer.h.{}.mlp.router": f"{GPT_OSS}.router",
            "transformer.h.{}.mlp.experts.c_gate": f"{GPT_OSS}.experts.gate_up_proj",
            "transformer.h.{}.mlp.experts.c_fc": f"{GPT_OSS}.experts.gate_up_proj",
            "transformer.h.{}.mlp.experts.c_proj": f"{GPT_OSS}.experts.down_proj",
        },
        row_orders={f"{GPT_OSS}.experts.gate_up_proj": alternating_gate_and_up},
        packed_experts=True,
        aliases={"num_experts": "num_local_experts"},
    ),
)  # fmt: skip
