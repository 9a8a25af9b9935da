"""The rows of families with a mixture of experts; see `Family` for the fields of a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peakgpt.engine.checkpoint.families_llama import LLAMA
from peakgpt.engine.checkpoint.family import Field, FieldGroup, with_defaults
from peakgpt.engine.checkpoint.layer_fields import uniform_window_fields
from peakgpt.engine.checkpoint.rope_fields import rope_fields
from peakgpt.engine.model.config import GPTConfig

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


def expert_names(module: str, *, gate: str, up: str, down: str) -> dict[str, str]:
    """Return the rows of `Family.names` for the experts of a layer, one module each: MODULE.{}.GATE."""
    names = {"c_gate": gate, "c_fc": up, "c_proj": down}
    return {f"transformer.h.{{}}.mlp.experts.{ours}": f"{module}.{{}}.{theirs}" for ours, theirs in names.items()}


MIXTRAL = "model.layers.{}.block_sparse_moe"

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
)  # fmt: skip
