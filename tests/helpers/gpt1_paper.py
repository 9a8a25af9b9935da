"""GPT-1 and its fine-tuning in float64, written from the paper: no import of the engine, one sequence at a time.

Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training": equation 2 (model), section 3.2
(losses), section 3.3 (sequences). The order inside a block, and the mean over the tokens of a sequence, are those of
the published code, finetune-transformer-lm: train.py, `block` and `model`.
"""

import math

import torch


def normalized(x, weight, bias, eps):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + eps).sqrt() * weight + bias


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class Gpt1:
    """The language model; `weights` are named as transformers names GPT-2's, matrices [out, in]."""

    def __init__(self, weights, layers, heads, eps=1e-5):
        self.w = {name: tensor.detach().double().requires_grad_() for name, tensor in weights.items()}
        self.layers, self.heads, self.eps = layers, heads, eps

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, name, x):
        return normalized(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], self.eps)

    def attention(self, name, x):
        tokens, width = x.shape
        size = width // self.heads
        query, key, value = self.linear(f"{name}.c_attn", x).split(width, -1)
        outputs = []
        for head in range(self.heads):
            columns = slice(head * size, (head + 1) * size)
            scores = query[:, columns] @ key[:, columns].T / math.sqrt(size)
            future = torch.ones(tokens, tokens).triu(1).bool()
            outputs.append(scores.masked_fill(future, -math.inf).softmax(-1) @ value[:, columns])
        return self.linear(f"{name}.c_proj", torch.cat(outputs, -1))

    def hidden_states(self, ids):
        """h_n of one sequence, (T, C)."""
        h = self.w["transformer.wte.weight"][ids] + self.w["transformer.wpe.weight"][: len(ids)]
        for layer in range(self.layers):
            name = f"transformer.h.{layer}"
            h = self.norm(f"{name}.ln_1", h + self.attention(f"{name}.attn", h))
            inner = gelu(self.linear(f"{name}.mlp.c_fc", h))
            h = self.norm(f"{name}.ln_2", h + self.linear(f"{name}.mlp.c_proj", inner))
        return h

    def lm_loss(self, ids):
        """L1 of one sequence: the mean of -log P(u_i | u_1 ... u_i-1)."""
        logits = self.hidden_states(ids)[:-1] @ self.w["transformer.wte.weight"].T
        chosen = logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        return -chosen.mean()


def lm_losses(model, examples):
    """L1 of examples, each a list of sequences."""
    return torch.stack([torch.stack([model.lm_loss(ids) for ids in sequences]).mean() for sequences in examples])


def class_loss(model, head, sequences, label):
    """-log P(y | x) = -log softmax(h W_y); the h of several sequences are added (similarity)."""
    h = sum(model.hidden_states(ids)[-1] for ids in sequences)
    return -(h @ head.T).log_softmax(-1)[label]


def score_loss(model, head, sequences, label):
    """The squared error of a number."""
    h = sum(model.hidden_states(ids)[-1] for ids in sequences)
    return (h @ head.T - label).square().squeeze()


def choice_loss(model, head, sequences, label):
    """One number for each sequence, and a softmax over them."""
    numbers = torch.stack([(model.hidden_states(ids)[-1] @ head.T).squeeze() for ids in sequences])
    return -numbers.log_softmax(-1)[label]


def objective(model, head, examples, labels, loss, weight):
    """L3 = L2 + weight L1, means over the examples."""
    task = torch.stack([loss(model, head, *example) for example in zip(examples, labels, strict=True)]).mean()
    return task + weight * lm_losses(model, examples).mean()
