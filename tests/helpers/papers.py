"""GPT-3, PaLM, Gopher and GLaM in float64, written from their papers: one sequence, token, head and expert at a time.

This module shares no code with the engine. Weights are a dict by the engine's parameter names, in [out, in] layout.
"""

import math

import torch


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + torch.exp(-x))


def linear(x, w, name):
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def layer_norm(x, w, b=0.0, eps=1e-5):
    d = x - x.mean(-1, keepdim=True)
    return d / (d.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w + b


def rms_norm(x, w, eps=1e-5):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w


def rope(x, position, base=10000.0):
    """Rotate features i and i + D/2 of x, (D,)."""
    half = len(x) // 2
    angle = position * torch.tensor([base ** (-i / half) for i in range(half)], dtype=x.dtype)
    a, b = x[:half], x[half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))


def attend(c, h, w, prefix, score):
    """Attend over the keys j <= i with scores `score(head, q_i, k_j, i, j)`. c is the config, h the normed input."""
    heads, kv_heads, d = c.n_head, c.n_kv_head, c.head_dim
    parts = linear(h, w, f"{prefix}.attn.c_attn").split([heads * d, kv_heads * d, kv_heads * d], -1)
    q, k, v = (part.unflatten(-1, (-1, d)) for part in parts)
    outputs = []
    for i in range(len(h)):
        output = []
        for head in range(heads):
            kv_head = head * kv_heads // heads
            s = torch.stack([score(head, q[i, head], k[j, kv_head], i, j) for j in range(i + 1)])
            output.append(s.softmax(0) @ v[: i + 1, kv_head])
        outputs.append(torch.cat(output))
    return linear(torch.stack(outputs), w, f"{prefix}.attn.c_proj")


def mlp(h, w, prefix, act):
    return linear(act(linear(h, w, f"{prefix}.c_fc")), w, f"{prefix}.c_proj")


def gated(h, w, prefix, act):
    return linear(act(linear(h, w, f"{prefix}.c_gate")) * linear(h, w, f"{prefix}.c_fc"), w, f"{prefix}.c_proj")


def gpt3(c, ids, w):
    """arXiv:2005.14165, section 2.1: GPT-2 with alternating dense and locally banded attention."""
    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: len(ids)]
    for layer in range(c.n_layer):
        prefix, band = f"transformer.h.{layer}", (len(ids), c.windows[1])[layer % 2]

        def score(head, q, k, i, j, band=band):
            return q @ k / math.sqrt(c.head_dim) if j > i - band else torch.tensor(-math.inf, dtype=q.dtype)

        norms = [(w[f"{prefix}.ln_{n}.weight"], w[f"{prefix}.ln_{n}.bias"]) for n in (1, 2)]
        x = x + attend(c, layer_norm(x, *norms[0]), w, prefix, score)
        x = x + mlp(layer_norm(x, *norms[1]), w, f"{prefix}.mlp", gelu)
    x = layer_norm(x, w["transformer.ln_f.weight"], w["transformer.ln_f.bias"])
    return x @ w["transformer.wte.weight"].T, 0.0


def palm(c, ids, w):
    """arXiv:2204.02311, section 2: y = x + MLP(LN(x)) + Attention(LN(x)); logits scaled by 1 / sqrt(n_embd)."""
    x = w["transformer.wte.weight"][ids]

    def score(head, q, k, i, j):
        return rope(q, i) @ rope(k, j) / math.sqrt(c.head_dim)

    for layer in range(c.n_layer):
        prefix = f"transformer.h.{layer}"
        h = layer_norm(x, w[f"{prefix}.ln_1.weight"])
        x = x + gated(h, w, f"{prefix}.mlp", silu) + attend(c, h, w, prefix, score)
    x = layer_norm(x, w["transformer.ln_f.weight"])
    logits = x @ w["transformer.wte.weight"].T / math.sqrt(c.n_embd)
    return logits, 1e-4 * logits.exp().sum(-1).log().pow(2).mean()  # section 5: 1e-4 log^2 Z


def gopher(c, ids, w):
    """arXiv:2112.11446, section 3.1, with the scores of arXiv:1901.02860, section 3.3."""
    x = w["transformer.wte.weight"][ids]
    rates = torch.tensor([10000 ** (-2 * i / c.n_embd) for i in range(c.n_embd // 2)], dtype=x.dtype)
    for layer in range(c.n_layer):
        prefix = f"transformer.h.{layer}"
        names = (f"{prefix}.attn.relative.{name}" for name in ("c_rel.weight", "u", "v"))
        w_r, u, v = (w[name] for name in names)

        def score(head, q, k, i, j, w_r=w_r, u=u, v=v):
            r = torch.cat(((i - j) * rates,) * 2)
            r = torch.cat((r[: len(rates)].sin(), r[len(rates) :].cos())) @ w_r.T
            r = r.unflatten(0, (c.n_head, c.head_dim))[head]
            return (q @ k + q @ r + u[head] @ k + v[head] @ r) / math.sqrt(c.head_dim)

        x = x + attend(c, rms_norm(x, w[f"{prefix}.ln_1.weight"]), w, prefix, score)
        x = x + mlp(rms_norm(x, w[f"{prefix}.ln_2.weight"]), w, f"{prefix}.mlp", gelu)
    return rms_norm(x, w["transformer.ln_f.weight"]) @ w["transformer.wte.weight"].T, 0.0


def bucket(distance):
    """The bucket of a distance in arXiv:1910.10683: 16 buckets of one distance each, then 16 that widen up to 128."""
    far = 16 + int(math.log(max(distance, 16) / 16) / math.log(128 / 16) * 16)
    return distance if distance < 16 else min(far, 31)


def expert(w, prefix, e):
    """The weights of one expert, by the names of an MLP."""
    return {name.replace(prefix, "mlp."): tensor[e] for name, tensor in w.items() if name.startswith(prefix)}


def glam(c, ids, w):
    """arXiv:2112.06905, section 4: the top two experts in every second layer, a GELU-gated MLP in the others."""
    x, balance = w["transformer.wte.weight"][ids], 0.0
    for layer in range(c.n_layer):
        prefix = f"transformer.h.{layer}"
        table = w[f"{prefix}.attn.relative.weight"]

        def score(head, q, k, i, j, table=table):
            return q @ k / math.sqrt(c.head_dim) + table[bucket(i - j), head]

        x = x + attend(c, layer_norm(x, w[f"{prefix}.ln_1.weight"]), w, prefix, score)
        h = layer_norm(x, w[f"{prefix}.ln_2.weight"])
        if layer % 2 == 0:
            x = x + gated(h, w, f"{prefix}.mlp", gelu)
            continue
        p = (h @ w[f"{prefix}.mlp.router.weight"].T).softmax(-1)
        outputs, first_choices = [], torch.zeros(c.experts, dtype=x.dtype)
        for token, probabilities in zip(h, p, strict=True):
            a, b = sorted(range(c.experts), key=lambda e, probabilities=probabilities: -probabilities[e].item())[:2]
            pair = [mlp(token, expert(w, f"{prefix}.mlp.experts.", e), "mlp", gelu) * probabilities[e] for e in (a, b)]
            outputs.append(sum(pair) / (probabilities[a] + probabilities[b]))
            first_choices[a] += 1
        balance = balance + c.experts * (first_choices / len(h) * p.mean(0)).sum()
        x = x + torch.stack(outputs)
    return layer_norm(x, w["transformer.ln_f.weight"]) @ w["transformer.wte.weight"].T, c.balance_loss * balance
