"""A program of a user: train, generate, call an op, patch a module, call a server. pyright --strict accepts it."""

import json
import urllib.request

import torch

import peakgpt


def train(steps: int = 3) -> peakgpt.GPT:
    config = peakgpt.GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=64)
    model = peakgpt.GPT(config)
    trainer = peakgpt.Trainer(model, peakgpt.TrainConfig(batch=2, tokens=8, lr=1e-3), steps=steps)
    for _ in range(steps):
        ids = torch.randint(config.vocab_size, (2, 9))
        loss = trainer.step(ids[:, :-1], ids[:, 1:])
        print(f"loss {loss.item():.3f}")
    return model.eval()


def generate(model: peakgpt.GPT, prompt: list[int]) -> list[int]:
    engine = peakgpt.Engine(model)
    params = peakgpt.SamplingParams(max_tokens=4, temperature=0)
    return [token for output in engine.stream(prompt, params) for token in output.token_ids]


def complete(url: str, prompt: str) -> str:
    body = json.dumps({"prompt": prompt, "max_tokens": 4}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return str(json.load(response)["choices"][0]["text"])


if __name__ == "__main__":
    print(generate(train(), [1, 2, 3]))
    q = torch.randn(1, 8, 2, 16)
    print(peakgpt.attention(q, q, q, causal=True).shape)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64)
    report = peakgpt.patch(layer, strict=False)
    print(f"{len(report.replaced)} modules replaced", peakgpt.doctor("cpu").device.cores)
    peakgpt.unpatch(layer)
    with peakgpt.use_backend("eager"):
        print(peakgpt.nn.RMSNorm(16)(q).shape)
