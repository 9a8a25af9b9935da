"""Tiny GPTQ and AWQ checkpoints of random integers, and the float model of transformers with the same weights.

The packer is written from the layouts of AutoGPTQ and AutoAWQ, one integer after the other, without any of our code.
"""

import json
import re

import numpy as np
import torch
from safetensors.torch import load_file, save_file

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
IDS = torch.tensor([[3, 17, 250, 5, 91, 7, 0, 33]])
LLAMA = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
         "intermediate_size": 96, "max_position_embeddings": 64, "vocab_size": 384}  # fmt: skip
GPT2 = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 384}
MODELS = {
    "llama": ("LlamaConfig", LLAMA),
    "mistral": ("MistralConfig", {**LLAMA, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", LLAMA),
    "qwen3": ("Qwen3Config", {**LLAMA, "head_dim": 16}),
    "phi3": ("Phi3Config", {**LLAMA, "pad_token_id": 0}),
    "gpt2": ("GPT2Config", GPT2),
    "gpt_neox": ("GPTNeoXConfig", {**LLAMA, "tie_word_embeddings": False}),
    "mixtral": ("MixtralConfig", {**LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1}),
}


def words(values, bits):
    """Pack rows of integers into int32, the first one of a row in the lowest bits: (A, B) -> (A, B bits / 32)."""
    packed = np.zeros((values.shape[0], values.shape[1] * bits // 32), np.uint32)
    for column in range(values.shape[1]):
        word, place = divmod(column, 32 // bits)
        packed[:, word] |= values[:, column].astype(np.uint32) << np.uint32(bits * place)
    return torch.from_numpy(packed.view(np.int32))


def awq_words(values):
    columns = [8 * (i // 8) + AWQ_COLUMNS[i % 8] for i in range(values.shape[1])]
    return words(values[:, columns], 4)


def pack_layer(rng, name, outputs, inputs, *, method="gptq", bits=4, group=32, sym=False, layout=None, groups_of=None):
    """Return the tensors of one layer of random integers, and its weight (outputs, inputs) in float64."""
    size = inputs if group == -1 else group
    count = -(-inputs // size)
    g_idx = np.arange(inputs) // size if groups_of is None else groups_of
    q = rng.integers(0, 1 << bits, (inputs, outputs))
    zero = np.full((count, outputs), 1 << bits - 1) if sym else rng.integers(1, 1 << bits, (count, outputs))
    scale = (rng.uniform(0.5, 1.0, (count, outputs)) / (1 << bits) / 2).astype(np.float16)
    weight = scale.astype(np.float64)[g_idx] * (q - zero[g_idx])
    tensors = {f"{name}.scales": torch.from_numpy(scale)}
    if method == "awq":
        tensors |= {f"{name}.qweight": awq_words(q), f"{name}.qzeros": awq_words(zero)}
    else:
        stored = zero if layout == "gptq_v2" else zero - 1
        tensors |= {f"{name}.qweight": words(q.T, bits).t().contiguous(), f"{name}.qzeros": words(stored, bits)}
        tensors[f"{name}.g_idx"] = torch.from_numpy(g_idx.astype(np.int32))
    return tensors, torch.from_numpy(weight.T.copy())


def write_checkpoint(folder, family="llama", *, act_order=False, skip=(), changes=None, shared_order=True, **packing):
    """Write a checkpoint, and return the float model of transformers with its weights.

    Args:
        act_order: give each layer a random group for each input; queries, keys and values share it, as gate and up do.
        skip: ends of the names of layers that stay floats.
        changes: fields of quantization_config.
        shared_order: False gives each layer an order of its own.
        packing: as in `pack_layer`.
    """
    import transformers

    name, fields = MODELS[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{"tie_word_embeddings": True, **fields})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    file, rng, orders = folder / "model.safetensors", np.random.default_rng(0), {}
    floats = load_file(file)
    tensors = dict(floats)
    for name, tensor in floats.items():
        layer = name.removesuffix(".weight")
        is_conv1d = family == "gpt2"
        if tensor.dim() != 2 or layer.endswith((*skip, ".gate")) or not re.search(r"\.\d+\.", name):
            continue
        outputs, inputs = tensor.mT.shape if is_conv1d else tensor.shape
        size = packing.get("group", 32)
        parent = layer.rpartition(".")[0] if shared_order else layer
        if act_order and (parent, inputs) not in orders:
            orders[parent, inputs] = rng.permutation(np.arange(inputs) // (inputs if size == -1 else size))
        made, weight = pack_layer(rng, layer, outputs, inputs, groups_of=orders.get((parent, inputs)), **packing)
        floats[name] = (weight.mT if is_conv1d else weight).float().contiguous()
        del tensors[name]
        tensors |= made
    save_file(floats, file, {"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    file.unlink()  # the model may map it
    save_file(tensors, file, {"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    fields = {"quant_method": packing.get("method", "gptq"), "bits": packing.get("bits", 4),
              "group_size": packing.get("group", 32), "sym": packing.get("sym", False), "desc_act": act_order}
    fields |= {"version": "gemm", "zero_point": True} if fields["quant_method"] == "awq" else {}
    fields |= {"checkpoint_format": packing["layout"]} if packing.get("layout") else {}
    content["quantization_config"] = {**fields, **(changes or {})}
    (folder / "config.json").write_text(json.dumps(content))
    return model
