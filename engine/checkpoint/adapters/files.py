"""How a run that trains an adapter writes and reads its checkpoints: the adapter alone, in PEFT's format.

A checkpoint also has the tokenizer and generation_config.json: the adapter may have learned another token that ends a
text than the base model has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from peakgpt.engine.checkpoint.adapters.attach import SavedAdapter
from peakgpt.engine.checkpoint.adapters.folder import write_adapter_files
from peakgpt.engine.checkpoint.model_files import FileWriter
from peakgpt.engine.checkpoint.source_files import GENERATION_CONFIG, TokenizerFiles
from peakgpt.engine.model.transformer import Transformer
from peakgpt.kernels.strict_json import dumps


class AdapterFiles:
    """See ModelFiles: the active adapter of a GPT, with the tokenizer."""

    def __init__(self, model: Transformer, tokenizer: TokenizerFiles | None = None):
        self.saved, self.tokenizer = SavedAdapter(model, None), tokenizer
        self.generation = model.source_files.get(GENERATION_CONFIG)

    def check(self, folder: Path) -> None:
        """Every adapter can be written."""

    def layout(self, weights: Iterator[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        names = {name for pair in self.saved.parameter_names().values() for name in pair}
        return self.saved.tensors({name: tensor for name, tensor in weights if name in names}).items()

    def writer(self) -> FileWriter:
        content, tokenizer, generation = self.saved.content, self.tokenizer, self.generation

        def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
            write_adapter_files(folder, content, tensors, tokenizer)
            if generation:
                (folder / GENERATION_CONFIG).write_text(f"{dumps(generation, indent=2)}\n", encoding="utf-8")

        return write

    def read(self, folder: Path) -> dict[str, Tensor] | None:
        return self.saved.read(folder)
