"""Train LoRA adapters over random 4-bit weights (QLoRA), and print the peak memory of the process.

    python examples/qlora_memory.py                      GPT-2 XL, 1.56 billion parameters
    python examples/qlora_memory.py --preset gpt3-xl

The weights are drawn matrix by matrix, so the model never exists in floats. Memory and speed do not depend on their
values. The last line is the peak of resident memory of the whole process, Python and torch included, from its start.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

import peakgpt
from peakgpt.engine.checkpoint.quantized.weights import load_quantized, quantized_shapes
from peakgpt.engine.model.lora import LoraConfig
from peakgpt.engine.model.presets import preset
from peakgpt.engine.model.quantized_linear import Format
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer

STD = 0.02


class RandomWeights(Mapping[str, Tensor]):
    """The tensors of a quantized model, drawn when they are asked for."""

    def __init__(self, model: peakgpt.GPT, form: Format):
        """
        Args:
            model: on the meta device.
            form: of the weights of the blocks.
        """
        self.shapes = quantized_shapes(model.state_dict(), form)

    def __getitem__(self, name: str) -> Tensor:
        shape, dtype = self.shapes[name]
        if dtype is not None:
            low, high = (-127, 128) if dtype == torch.int8 else (0, 256)
            return torch.randint(low, high, shape, dtype=dtype)
        if name.endswith(".scale"):
            return torch.full(shape, 3 * STD / 127, dtype=torch.float32 if len(shape) == 1 else torch.bfloat16)
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
        return torch.randn(shape) * STD

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def quantized_model(name: str, layers: int | None) -> peakgpt.GPT:
    """Build a model with random weights of 4 bits, in groups of 64."""
    config = preset(name, **({} if layers is None else {"n_layer": layers}))
    with torch.device("meta"):
        model = peakgpt.GPT(config)
    return load_quantized(model, RandomWeights(model, Format(4)), Format(4), torch.bfloat16)


def peak_bytes() -> int:
    """Return the peak of this process's resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def size(tensors: Iterator[Tensor]) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def main() -> None:
    """Train for some steps; exit with an error above the limit."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--preset", default="gpt2-xl", help="the size of the model")
    parser.add_argument("--layers", type=int, help="instead of the preset's")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters of all linear layers")
    parser.add_argument("--tokens", type=int, default=512, help="of the one sequence of a step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--limit-gb", type=float, default=4.0, help="most gigabytes of resident memory")
    args = parser.parse_args()
    torch.manual_seed(0)
    start = peak_bytes()
    model = quantized_model(args.preset, args.layers)
    frozen = size(model.buffers()) + size(model.parameters())
    model.add_adapter(LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = TrainConfig(batch=1, tokens=args.tokens, recompute="block", dtype=torch.bfloat16, warmup=0, lr=1e-3)
    trainer = Trainer(model.train(), config, steps=args.steps)
    ids = torch.randint(model.config.vocab_size, (1, args.tokens + 1))
    losses, begin = [], time.perf_counter()
    for _ in range(args.steps):
        losses.append(trainer.step(ids[:, :-1], ids[:, 1:]).item())
    seconds, peak = (time.perf_counter() - begin) / args.steps, peak_bytes()
    print(f"loss of each step       {' '.join(f'{loss:.3f}' for loss in losses)}")
    print(f"Python and torch        {start / 1e9:.3f} GB")
    print(f"frozen weights          {frozen / 1e9:.3f} GB")
    print(f"trained parameters      {sum(p.numel() for p in trained) / 1e6:.1f} million")
    print(f"one step                {seconds:.1f} s, {args.tokens / seconds:.1f} tokens/s")
    print(f"peak resident memory    {peak / 1e9:.3f} GB")
    if peak > args.limit_gb * 1e9:
        raise SystemExit(f"qlora_memory: the peak is {peak / 1e9:.3f} GB, expected at most {args.limit_gb} GB")


if __name__ == "__main__":
    main()
