"""A model's forward pass as one C++ program on the CPU (csrc/program/program.cpp): one call a step.

The instructions are the layers of engine/model/block.py, for the same config. In the last block, all layers after
attention are computed only for the rows whose logits are needed: a prompt of T tokens saves most of one layer in L.

Everything between two products is float32, in bfloat16 models too. docs/cpu.md says what is rounded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from peakgpt.engine.model.attention import CausalSelfAttention
from peakgpt.engine.model.block import Block
from peakgpt.engine.model.experts import ExpertLinear, Experts
from peakgpt.engine.model.mlp import GatedMLP
from peakgpt.engine.model.norms import BLOCK_NORMS, LayerNorm, RMSNorm
from peakgpt.engine.model.plain import change_of
from peakgpt.engine.model.positions import model_slopes
from peakgpt.engine.model.quantized_linear import QuantizedExpertLinear, QuantizedLinear
from peakgpt.engine.model.relative_positions import RELATIVE
from peakgpt.engine.model.rotary_tables import lookup_tables
from peakgpt.engine.model.transformer import Transformer
from peakgpt.kernels.cpu.ext import _C, DTYPES, threads
from peakgpt.kernels.cpu.gemm import ACTIVATE, ACTIVATIONS, GATE, STORE
from peakgpt.kernels.ops.attention_math import default_scale
from peakgpt.kernels.ops.mlp import UPS
from peakgpt.kernels.ops.norm import default_eps

NONE, LOGITS = -1, -1  # instead of a buffer's number


def objection(model: Transformer) -> str | None:
    """Why the program does not support a model; None if it does."""
    if change := change_of(model):
        return f"supports plain modules only: {change}"
    if model.adapters:
        return f"supports no adapters that are not merged, got {', '.join(model.adapters)}"
    config, weight = model.config, model.transformer.wte.weight
    if weight.device.type != "cpu" or weight.dtype not in DTYPES:
        return f"supports float32 and bfloat16 on the CPU, got {weight.dtype} on {weight.device}"
    if config.position in RELATIVE:
        return f"supports no relative positions, got position {config.position!r}"
    if config.qkv_clip is not None:
        return f"supports no limit of queries, keys and values, got qkv_clip {config.qkv_clip}"
    if config.word_dim != config.n_embd:
        return f"supports word embeddings as wide as the model, got word_dim {config.word_dim}"
    for name, parameter in model.named_parameters():
        if parameter.stride(-1) != 1 and parameter.shape[-1] > 1:
            return f"supports parameters with contiguous rows, got strides {parameter.stride()} of {name}"
    if config.head_dim % 8 or config.head_dim > 256:
        return f"supports head widths that are multiples of 8 up to 256, got {config.head_dim}"
    return None


class ModelProgram:
    """The program of one model, and the tensors that it reads in place."""

    def __init__(self, model: Transformer):
        """
        Raises:
            NotImplementedError: `objection` returns a reason, or a module has other sizes than the config.
        """
        if reason := objection(model):
            raise NotImplementedError(f"C++ program: {reason}")
        c, weight = model.config, model.transformer.wte.weight
        self.config, self.dtype = c, weight.dtype
        self.program, self.tensors = _C.Program(dtype=DTYPES[weight.dtype]), []
        widths = {"x": c.n_embd, "h": c.n_embd, "qkv": (c.n_head + 2 * c.n_kv_head) * c.head_dim,
                  "y": c.n_head * c.head_dim, "branch": c.n_embd, "up": c.n_inner}  # fmt: skip
        if c.gated_mlp:
            widths["gate"] = c.n_inner
        widths |= {"selected x": c.n_embd, "selected h": c.n_embd, "selected y": widths["y"]}
        self.widths = widths
        self.buffers = {name: self.program.buffer(width=width) for name, width in widths.items()}
        self._build(model)

    def run(self, **pass_args: Tensor | int) -> None:
        """Run one pass; the arguments are the fields of PassArgs in csrc/program/program.h."""
        self.program.run(**pass_args, threads=threads())

    # ---- instructions

    def _build(self, model: Transformer) -> None:
        c, t = self.config, model.transformer
        learned = c.position == "learned"
        _require("transformer.h", len(t.h), c.n_layer)
        _require("transformer.wte", tuple(t.wte.weight.shape), (c.vocab_size, c.n_embd))
        if learned:
            _require("transformer.wpe", tuple(t.wpe.weight.shape), (c.position_offset + c.block_size, c.n_embd))
        table = t.wpe.weight.detach()[c.position_offset :] if learned else None
        wte, wpe = self._hold(t.wte.weight), self._hold(table)
        self.program.embed(out=self.buffers["x"], wte=wte, wte_stride=wte.stride(0), wpe=wpe,
                           wpe_stride=0 if wpe is None else wpe.stride(0),
                           scale=float(torch.tensor(c.embedding_scale, dtype=self.dtype)))  # fmt: skip
        self.angles = lookup_tables(c, "cpu") if c.rotary_dim else ()
        self.slopes = model_slopes(c, "cpu")
        if c.embedding_norm:
            self._norm(t.ln_emb, "x", out="x")
        is_normalized = c.residual != "post_norm" and "ln_1" in BLOCK_NORMS[c.residual]  # the input of attention
        self._norm(t.h[0].ln_1, "x", out="h") if is_normalized else self._rename("h", "x")
        norms = [*(block._modules.get("ln_1") for block in t.h[1:]), t._modules.get("ln_f")]
        for layer, (block, norm) in enumerate(zip(t.h, norms, strict=True)):
            self._attend(block, layer)
            if layer == c.n_layer - 1:
                self._select_rows()
            RESIDUALS[c.residual](self, block, norm)
        self.program.hidden(x=self.buffers["h"])
        self._linear("h", LOGITS, model.lm_head if "lm_head" in model._modules else t.wte)
        if c.logit_scale != 1.0 or c.logit_softcap is not None:
            self.program.finish_logits(vocabulary=c.vocab_size, scale=c.logit_scale, softcap=c.logit_softcap or 0.0)

    def _attend(self, block: Block, layer: int) -> None:
        c, attn, number = self.config, block.attn, self.buffers
        heads = attn.n_head, attn.n_kv_head, attn.head_dim
        _require(f"transformer.h.{layer}.attn", heads, (c.n_head, c.n_kv_head, c.head_dim))
        self._linear("h", "qkv", attn.c_attn)
        tables = {}
        if attn.rotary_table is not None and self.angles:
            cos, sin = self.angles[attn.rotary_table]
            tables = {"cos": cos, "sin": sin, "pairs": cos.shape[1], "interleaved": c.rotary_interleaved}
        if c.qk_norm != "none":
            self._qk_norm(attn, tables)
        elif tables:
            rotated_heads = c.n_head + c.n_kv_head
            self.program.rotary(x=number["qkv"], width=c.head_dim, rotated_heads=rotated_heads, **tables)
        self.program.attention(
            x=number["qkv"], out=number["y"], layer=layer, heads=c.n_head, kv_heads=c.n_kv_head, width=c.head_dim,
            scale=default_scale(c.head_dim, attn.scale), window=attn.window or 0, softcap=attn.softcap or 0.0,
            alibi=self.slopes, sinks=self._sinks(attn),
        )  # fmt: skip

    def _sinks(self, attn: CausalSelfAttention) -> Tensor | None:
        """Return the sinks of a layer, (H,) float32, or None."""
        if attn.sinks is None:
            return None
        _require("attn.sinks", tuple(attn.sinks.shape), (self.config.n_head,))
        return self._hold(attn.sinks.detach().float())

    def _qk_norm(self, attn: CausalSelfAttention, tables: dict[str, object]) -> None:
        """Normalize the queries and keys of qkv in place, and rotate them by the tables, if there are any."""
        c, norm, joint = self.config, attn.q_norm, self.config.qk_norm == "full"
        weights = [self._hold(part.weight) for part in (norm, attn.k_norm)]
        expected = [(c.head_dim * (heads if joint else 1),) for heads in (c.n_head, c.n_kv_head)]
        _require("the norms of queries and keys", [tuple(w.shape) for w in weights], expected)
        options = [(part.eps, part.offset, part.weight.dtype) for part in (norm, attn.k_norm)]
        _require("k_norm", options[1], options[0])
        self.program.qk_norm(
            x=self.buffers["qkv"], width=c.head_dim, q_heads=c.n_head, k_heads=c.n_kv_head, joint=joint,
            q_norm=weights[0], k_norm=weights[1], w_dtype=DTYPES[weights[0].dtype],
            eps=default_eps(self.dtype, norm.eps), offset=norm.offset, **tables,
        )  # fmt: skip

    def _select_rows(self) -> None:
        """Continue with the rows whose logits are needed."""
        for name in ("x", "h", "y"):
            self.program.select_rows(x=self.buffers[name], out=self.buffers[f"selected {name}"])
            self._rename(name, f"selected {name}")

    def _rename(self, name: str, other: str) -> None:
        self.buffers = {**self.buffers, name: self.buffers[other]}

    def project_attention(self, block: Block) -> None:
        """branch = c_proj(y), the output of attention."""
        self._linear("y", "branch", block.attn.c_proj)

    def mlp(self, block: Block, source: str, out: str = "branch") -> None:
        """out = mlp(source)."""
        if isinstance(block.mlp, Experts):
            self._experts(block.mlp, source, out)
            return
        layer, activation = block.mlp, ACTIVATIONS[block.mlp.activation]
        if not isinstance(layer, GatedMLP):
            self._linear(source, "up", layer.c_fc, ACTIVATE, activation)
        elif isinstance(layer.c_fc, QuantizedLinear):  # its product has no gate epilogue
            other = UPS.get(layer.activation)
            self._linear(source, "gate", layer.c_gate, ACTIVATE, activation)
            self._linear(source, "up", layer.c_fc, *(() if other is None else (ACTIVATE, ACTIVATIONS[other])))
            self.combine("gate", "up", "up", product=True)
        else:
            self._linear(source, "gate", layer.c_gate)
            self._linear(source, "up", layer.c_fc, GATE, activation, "gate")
        self._linear("up", out, layer.c_proj)

    def _experts(self, layer: Experts, source: str, out: str) -> None:
        """out = the weighted sum of each row's experts."""
        c, mlps, router = self.config, layer.experts, layer.router
        _require("a router", tuple(router.weight.shape), (c.experts, c.n_embd))
        gate = mlps._modules.get("c_gate")
        for name, (n, k) in {"c_gate": (c.expert_inner, c.n_embd), "c_fc": (c.expert_inner, c.n_embd),
                             "c_proj": (c.n_embd, c.expert_inner)}.items():  # fmt: skip
            if name in mlps._modules:
                _require(f"experts.{name}", _stacked_sizes(mlps._modules[name]), (c.experts, n, k))
        biases = {f"{name}_bias": self._bias(part)
                  for name, part in (("gate", gate), ("up", mlps.c_fc), ("down", mlps.c_proj))}  # fmt: skip
        router_bias = None if router.bias is None else self._hold(router.bias.detach().float())
        self.program.experts(
            router=self._dense(router.weight.detach().float()), gate=self._expert_weights(gate),
            up=self._expert_weights(mlps.c_fc), down=self._expert_weights(mlps.c_proj), x=self.buffers[source],
            out=self.buffers[out], experts=c.experts, choices=layer.per_token, normalize=layer.normalize,
            activation=ACTIVATIONS[mlps.activation], router_bias=router_bias, **biases,
        )  # fmt: skip

    def combine(self, x: str, y: str, out: str, *, product: bool = False) -> None:
        """out = x + y, or x y."""
        number = self.buffers
        self.program.combine(x=number[x], y=number[y], out=number[out], product=product)

    def add_norm(self, norm: LayerNorm | RMSNorm, residual: str) -> None:
        """residual += branch, h = norm(residual)."""
        self._norm(norm, "branch", residual=residual, out="h")

    def norm_branch(self, norm: LayerNorm | RMSNorm) -> None:
        """branch = norm(branch)."""
        self._norm(norm, "branch", out="branch")

    def _norm(self, norm: LayerNorm | RMSNorm, source: str, *, out: str, residual: str | None = None) -> None:
        own = torch.ones(self.config.n_embd, dtype=self.dtype) if norm.weight is None else norm.weight
        _require("a norm", tuple(own.shape), (self.config.n_embd,))
        number, weight, bias = self.buffers, self._hold(own), self._hold(getattr(norm, "bias", None))
        self.program.norm(x=number[source], out=number[out], w=weight, w_dtype=DTYPES[weight.dtype],
                          eps=default_eps(self.dtype, norm.eps), rms=isinstance(norm, RMSNorm),
                          offset=getattr(norm, "offset", 0.0),
                          residual=NONE if residual is None else number[residual], b=bias)  # fmt: skip

    def _linear(
        self, source: str, out: str | int, layer: nn.Module, epilogue: int = STORE, activation: int = 0,
        gate: str | None = None,
    ) -> None:  # fmt: skip
        """out = epilogue(source W^T + b) of a linear layer, quantized or not, or of the tied embedding."""
        expected = self.config.vocab_size if out == LOGITS else self.widths[out], self.widths[source]
        _require(f"the {type(layer).__name__} of {out!r}", _sizes(layer), expected)
        weight = self._quantized(layer) if isinstance(layer, QuantizedLinear) else self._dense(layer.weight.detach())
        self.program.linear(weight=weight, x=self.buffers[source], out=out if out == LOGITS else self.buffers[out],
                            bias=self._bias(layer), epilogue=epilogue, activation=activation,
                            gate=NONE if gate is None else self.buffers[gate])  # fmt: skip

    def _bias(self, layer: nn.Module | None) -> Tensor | None:
        """Return the bias of a layer, in the dtype of its weight, or the program's if the weight is quantized."""
        bias = getattr(layer, "bias", None)
        if bias is None:
            return None
        dtype = layer.weight.dtype if layer.weight.is_floating_point() else self.dtype
        if bias.dtype != dtype:
            raise NotImplementedError(f"C++ program: supports biases in {dtype}, as the weights, got {bias.dtype}")
        return self._hold(bias.contiguous())

    def _dense(self, w: Tensor) -> object:
        return _C.DenseWeight(**_matrix(w), w=self._hold(w), w_row=w.stride(0))

    def _quantized(self, layer: QuantizedLinear) -> object:
        tensors = {name: self._hold(tensor) for name, tensor in layer.named_buffers() if name != "bias"}
        return _C.QuantizedWeight(dtype=DTYPES[self.dtype], n=layer.out_features, k=layer.in_features, **tensors,
                                  **layer.product_fields)  # fmt: skip

    def _expert_weights(self, layer: nn.Module | None) -> object | None:
        """Return the weights of one layer of all experts, dense or quantized."""
        if layer is None:
            return None
        if isinstance(layer, QuantizedExpertLinear):
            weight, scale = self._hold(layer.weight), self._hold(layer.scale)
            return _C.QuantizedExperts(
                dtype=DTYPES[self.dtype], n=layer.out_features, k=layer.in_features, weight=weight, scale=scale,
                experts=len(weight), weight_group=weight[0].nbytes, scale_group=scale[0].nbytes, **layer.product_fields,
            )  # fmt: skip
        w = self._hold(layer.weight.detach())
        return _C.DenseExperts(**_matrix(w[0]), w=w, w_row=w.stride(1), experts=len(w), w_group=w.stride(0))

    def _hold(self, tensor: Tensor | nn.Parameter | None) -> Tensor | None:
        """Keep a tensor alive as long as the program, and return it."""
        if tensor is not None:
            self.tensors.append(tensor.detach())
        return tensor


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Return (outputs, inputs) of a linear layer, quantized or not, or of the tied embedding."""
    return (layer.out_features, layer.in_features) if isinstance(layer, QuantizedLinear) else tuple(layer.weight.shape)


def _require(part: str, got: object, expected: object) -> None:
    if got != expected:
        raise NotImplementedError(f"C++ program: supports the sizes of the config, {part} has {got}, not {expected}")


def _matrix(w: Tensor) -> dict[str, int]:
    return {"dtype": DTYPES[w.dtype], "n": w.shape[0], "k": w.shape[1]}


def _stacked_sizes(layer: ExpertLinear | QuantizedExpertLinear) -> tuple[int, int, int]:
    """Return (E, outputs, inputs) of one layer of all experts, quantized or not."""
    if isinstance(layer, QuantizedExpertLinear):
        return len(layer.weight), layer.out_features, layer.in_features
    return tuple(layer.weight.shape)


def _pre_norm(program: ModelProgram, block: Block, norm: LayerNorm) -> None:
    program.project_attention(block)
    program.add_norm(block.ln_2, "x")
    program.mlp(block, "h")
    program.add_norm(norm, "x")


def _post_norm(program: ModelProgram, block: Block, norm: None) -> None:
    program.project_attention(block)
    program.add_norm(block.ln_1, "h")
    program.mlp(block, "h")
    program.add_norm(block.ln_2, "h")


def _parallel(program: ModelProgram, block: Block, norm: LayerNorm, source: str = "h") -> None:
    program.mlp(block, source, "h")  # nothing reads the old h after this
    program.project_attention(block)
    program.combine("branch", "h", "branch")
    program.add_norm(norm, "x")


def _parallel_two_norms(program: ModelProgram, block: Block, norm: LayerNorm) -> None:
    program._norm(block.ln_2, "x", out="h")
    _parallel(program, block, norm)


def _sandwich_norm(program: ModelProgram, block: Block, norm: LayerNorm) -> None:
    program.project_attention(block)
    program.norm_branch(block.ln_1_out)
    program.add_norm(block.ln_2, "x")
    program.mlp(block, "h")
    program.norm_branch(block.ln_2_out)
    program.add_norm(norm, "x")


def _output_norm(program: ModelProgram, block: Block, norm: LayerNorm | None) -> None:
    program.project_attention(block)
    program.norm_branch(block.ln_1_out)
    program.combine("branch", "x", "x")
    program.mlp(block, "x")
    program.norm_branch(block.ln_2_out)
    program.combine("branch", "x", "x") if norm is None else program.add_norm(norm, "x")


RESIDUALS: dict[str, Callable[[ModelProgram, Block, LayerNorm | None], None]] = {
    "pre_norm": _pre_norm,
    "post_norm": _post_norm,
    "parallel": _parallel,
    "parallel_two_norms": _parallel_two_norms,
    "sandwich_norm": _sandwich_norm,
    "output_norm": _output_norm,
}
