"""GPT-2 with a KV cache exported as a graph, for onnxruntime and OpenVINO.

Plain torch is traced with past keys and values as inputs and all keys and values as outputs, as optimum exports models.
onnxruntime's int8 is dynamic quantization of MatMul, per output channel. OpenVINO keeps the cache as state; its
bfloat16 is a precision hint over float32 weights, and its int8 is weight-only, by the package nncf.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.bench.contenders.contender import GreedyDecoder, Workload
from peakgpt.bench.contenders.eager_gpt import EagerGPT
from peakgpt.bench.contenders.models import float32_state
from peakgpt.bench.contenders.stepping import stepping
from peakgpt.engine.model.config import GPTConfig


class GraphGPT(EagerGPT):
    """GPT-2 whose KV cache is an input and an output of `forward`.

    forward(ids (B, T), order (B,), past keys and values of each layer (B, H, S, D)) returns the logits of the last
    token, then all keys and values. Sequence i continues sequence order[i], as beam search needs.
    """

    def forward(self, ids: Tensor, order: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        t, before = self.transformer, past[0].shape[2]
        positions = torch.arange(before, before + ids.shape[1])
        mask = torch.arange(before + ids.shape[1])[None] <= positions[:, None]  # (T, S)
        x, present = t["wte"](ids) + t["wpe"](positions), []  # (B, T, C)
        for layer, block in enumerate(t["h"]):
            qkv = block.attn.c_attn(block.ln_1(x)).chunk(3, -1)
            q, *new = (s.unflatten(-1, (self.config.n_head, -1)).transpose(1, 2) for s in qkv)
            old = past[2 * layer : 2 * layer + 2]
            k, v = (torch.cat([o.index_select(0, order), n], 2) for o, n in zip(old, new, strict=True))
            present += k, v
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + block.attn.c_proj(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln_2(x))
        return F.linear(t["ln_f"](x[:, -1:]), t["wte"].weight), *present


def _example(folder, config: GPTConfig, ids: Tensor) -> tuple[GraphGPT, tuple[Tensor, ...], list[str], list[str]]:
    """Return the module, example inputs for tracing, and the names of inputs and outputs."""
    model = GraphGPT(config)
    model.load_state_dict(float32_state(folder))
    past = [torch.zeros(len(ids), config.n_head, 3, config.head_dim)] * (2 * config.n_layer)
    names = [f"{layer}.{kind}" for layer in range(config.n_layer) for kind in ("key", "value")]
    inputs = ["ids", "order", *(f"past.{name}" for name in names)]
    return model.eval(), (ids, torch.arange(len(ids)), *past), inputs, ["logits", *(f"present.{n}" for n in names)]


def onnxruntime_decoder(folder, config: GPTConfig, ids: Tensor, workload: Workload, weights: str) -> GreedyDecoder:
    """Decode with onnxruntime. Keys and values go from output to input without a copy."""
    import numpy as np
    import onnxruntime as ort
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model, example, inputs, outputs = _example(folder, config, ids)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = str(Path(folder, "model.onnx"))
        axes = {name: {2: "tokens"} for name in (*inputs[2:], *outputs[1:])}
        torch.onnx.export(model, example, path, input_names=inputs, output_names=outputs, dynamo=False,
                          opset_version=17, dynamic_axes={"ids": {1: "new"}, **axes})  # fmt: skip
        if weights == "int8":
            float32_path, path = path, str(Path(folder, "int8.onnx"))
            quantize_dynamic(float32_path, path, op_types_to_quantize=["MatMul"], per_channel=True,
                             weight_type=QuantType.QInt8)  # fmt: skip
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        options.add_session_config_entry("session.force_spinning_stop", "1")  # spins within a pass only
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    value, empty = ort.OrtValue.ortvalue_from_numpy, np.zeros(example[2][:, :, :0].shape, np.float32)
    order, first = value(np.arange(len(ids))), [value(empty)] * (2 * config.n_layer)

    kept = []  # keys and values

    def step(rows: Tensor, past: int) -> Tensor:
        feed = [value(np.ascontiguousarray(rows.numpy())), order, *(kept if past else first)]
        logits, *kept[:] = session.run_with_ort_values(outputs, dict(zip(inputs, feed, strict=True)))
        return torch.from_numpy(logits.numpy()[:, 0])

    return stepping(step, ids, workload)


def openvino_decoder(folder, config: GPTConfig, ids: Tensor, workload: Workload, weights: str) -> GreedyDecoder:
    """Decode with OpenVINO. As in optimum-intel, the KV cache is the state of the request, gathered by sequence."""
    import numpy as np
    import openvino
    from openvino._offline_transformations import apply_make_stateful_transformation

    model, example, inputs, outputs = _example(folder, config, ids)
    batch = len(ids)
    cache = openvino.PartialShape([batch, config.n_head, -1, config.head_dim])
    shapes = [openvino.PartialShape([batch, -1]), openvino.PartialShape([batch]), *[cache] * (2 * config.n_layer)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = openvino.convert_model(model, example_input=example, input=shapes)
    for ports, names in ((graph.inputs, inputs), (graph.outputs, outputs)):
        for port, name in zip(ports, names, strict=True):
            port.get_tensor().set_names({name})
    apply_make_stateful_transformation(graph, dict(zip(inputs[2:], outputs[1:], strict=True)))
    request = openvino_request(graph, weights)
    order = np.arange(batch)

    def step(rows: Tensor, past: int) -> Tensor:
        if past == 0:
            request.reset_state()
        inputs = {"ids": rows.numpy(), "order": order}
        return torch.from_numpy(request.infer(inputs, share_inputs=True, share_outputs=True)[0][:, 0])

    return stepping(step, ids, workload)


def openvino_request(graph, weights: str):
    """Compile a graph with float32 weights for low latency on the CPU.

    int8 is nncf's symmetric weight compression in a bfloat16 graph, the fastest option: 137 tokens/s of GPT-2 124M with
    one stream and 602 with eight; asymmetric 129 and 497, in float32 132 and 476 (2-core Zen 4, 2026-11-21).
    """
    import openvino

    if weights == "int8":
        import nncf

        graph = nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)
    options = {"INFERENCE_PRECISION_HINT": "f32" if weights == "float32" else "bf16", "PERFORMANCE_HINT": "LATENCY",
               "INFERENCE_NUM_THREADS": torch.get_num_threads()}  # fmt: skip
    return openvino.Core().compile_model(graph, "CPU", options).create_infer_request()
