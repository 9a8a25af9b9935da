"""GPT: the model with its methods for users. The network is `peakgpt.engine.model.transformer.Transformer`.

Each method calls the module that does the work; no module of the engine imports this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peakgpt.engine.checkpoint.adapters import attach
from peakgpt.engine.checkpoint.adapters.folder import write_adapter
from peakgpt.engine.checkpoint.folder import CONFIG
from peakgpt.engine.checkpoint.gguf.file import read_gguf
from peakgpt.engine.checkpoint.gguf.weights import load_gguf
from peakgpt.engine.checkpoint.model_folder import (
    ADAPTER_FILES,
    MODEL_FILES,
    TokenizerFiles,
    open_layout,
    read_config,
    read_source_files,
    read_weights,
    write_model,
)
from peakgpt.engine.checkpoint.quantized.folder import read_format, read_quantized, write_grouped
from peakgpt.engine.checkpoint.quantized.mxfp4 import is_mxfp4, mxfp4_weights, with_method, without_method
from peakgpt.engine.checkpoint.quantized.mxfp4_folder import load_mxfp4
from peakgpt.engine.checkpoint.quantized.packed_layers import PackedFormat
from peakgpt.engine.checkpoint.quantized.packed_weights import load_packed
from peakgpt.engine.checkpoint.source_files import read_generation_config
from peakgpt.engine.data.adapter_source import base_of, is_adapter
from peakgpt.engine.data.gguf_header import is_gguf
from peakgpt.engine.data.model_source import locate, name_and_revision
from peakgpt.engine.inference.beam_search import beam_search
from peakgpt.engine.inference.generate import check_prompt, generate, sampling_params, stream, with_arguments
from peakgpt.engine.inference.generation_config import GenerationConfig, generation_config
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.grouped_linear import GroupedExpertLinear, GroupedLinear
from peakgpt.engine.model.lora import DEFAULT_ADAPTER, LoraConfig
from peakgpt.engine.model.positions import left_padding_start
from peakgpt.engine.model.presets import preset
from peakgpt.engine.model.quantized_linear import QuantizedLinear
from peakgpt.engine.model.transformer import Transformer
from peakgpt.engine.training.optimizer import AdamW, decay_groups


class GPT(Transformer):
    """A GPT language model: build, load, save, train, generate."""

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> GPT:
        """Build a preset model with random weights.

        Args:
            name: a key of peakgpt.engine.model.presets.PRESETS, such as "gpt2".
            changes: GPTConfig fields that replace the preset's.
        Raises:
            ValueError: an unknown name or field, or inconsistent sizes.
        """
        return cls(preset(name, **changes))

    @classmethod
    def from_pretrained(
        cls, source: Path | str, *, dtype: torch.dtype = torch.float32, dropout: float | None = None,
        revision: str | None = None, dequantize: bool = False, merge_adapter: bool = False,
    ) -> GPT:  # fmt: skip
        """Load a checkpoint in the Hugging Face layout of its family; the model is in evaluation mode.

        Weights of a safetensors file that have this dtype and our layout are mapped, not copied: see
        engine/checkpoint/safetensors_io.py for what that means if the file changes.

        Args:
            source: a name of the Hugging Face hub ("gpt2", "org/name", "org/name@revision"), whose files are
                downloaded into its cache; a folder with config.json and model.safetensors (or its shards, or
                pytorch_model.bin); the folder of a run, for its newest checkpoint; a .gguf file, the format of
                llama.cpp, here or of the hub ("org/name/model.gguf"); or an adapter in PEFT's format: the model is then
                the base model that adapter_config.json names, with the adapter active. A generation_config.json of
                the adapter replaces that of the base model.
            dtype: of the parameters.
            dropout: replaces the checkpoint's rates.
            revision: of a model of the hub: a branch, a tag or a commit.
            dequantize: decode the quantized weights of a .gguf file, or of an MXFP4, GPTQ or AWQ checkpoint, to this
                dtype: to train or to export the model. Otherwise its linear layers multiply by their integers.
            merge_adapter: of a folder with an adapter, add the adapter to the weights unless these are quantized, as
                `merge_and_unload` does.
        Raises:
            ValueError: a missing, damaged or unsupported checkpoint; the message names file and tensor.
            OSError: a downloaded file cannot be written.
        """
        folder = locate(source, MODEL_FILES, revision)
        if is_adapter(folder):
            base, base_revision = base_of(folder)
            options = {"dtype": dtype, "dropout": dropout, "revision": base_revision, "dequantize": dequantize}
            model = cls.from_pretrained(base, **options)
            model.load_adapter(folder)
            model.source_files = {**model.source_files, **read_generation_config(folder)}
            if merge_adapter:
                attach.merge_floats(model)
            return model
        model = cls._from_folder(folder, dtype=dtype, dropout=dropout, dequantize=dequantize)
        model.name_or_path, model.revision = name_and_revision(source, revision, folder)
        return model

    @classmethod
    def _from_folder(cls, folder: Path, *, dtype: torch.dtype, dropout: float | None, dequantize: bool) -> GPT:
        """Load a model folder or a .gguf file; arguments as `from_pretrained`."""
        if is_gguf(folder):
            gguf = read_gguf(folder, dropout=dropout)
            model = cls._without_weights(gguf.config, folder)
            model.source_files = gguf.source_files
            return load_gguf(model, gguf, dtype, dequantize=dequantize)
        family, config = read_config(folder, dropout=dropout)
        model = cls._without_weights(config, Path(folder) / CONFIG)
        model.source_files = read_source_files(folder)
        if is_mxfp4(model.source_files[CONFIG]):
            if dequantize:
                model.source_files[CONFIG] = without_method(model.source_files[CONFIG])
            return load_mxfp4(folder, family, model, dtype, dequantize=dequantize)
        form = read_format(folder)
        if isinstance(form, PackedFormat):
            model.source_files[CONFIG] = without_method(model.source_files[CONFIG])
            return load_packed(folder, model, family, form, dtype, dequantize=dequantize)
        if form is not None:
            if dequantize:
                raise ValueError(f"{folder}: got quantized weights of peakgpt, expected others with dequantize=True: "
                                 "floats, GPTQ, AWQ or a .gguf file")  # fmt: skip
            return read_quantized(folder, model, form, dtype)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        weights = read_weights(open_layout(folder, family), family, config, shapes, dtype)
        model.load_state_dict(weights, assign=True)
        return model.eval()

    @classmethod
    def _without_weights(cls, config: GPTConfig, source: Path) -> GPT:
        """Build a model on the meta device; errors name the file that the config is from."""
        try:
            with torch.device("meta"):
                return cls(config)
        except (RuntimeError, OverflowError, TypeError, ValueError) as error:  # a size does not fit into 64 bits
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{source}: {reason}, expected sizes of a model") from None

    def save_pretrained(
        self, folder: Path | str, tokenizer: TokenizerFiles | None = None, *,
        weights: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None,
        max_shard_size: int | str | None = None,
    ) -> None:  # fmt: skip
        """Save in the Hugging Face layout of its family, or in our own layout, with a warning, if it has no family.

        Fields of config.json that peakgpt does not use, and generation_config.json, are those of the folder that the
        model was loaded from. An interrupted write keeps the old files. A model that multiplies by the integers of a
        .gguf file, GPTQ or AWQ is saved with these integers, in a folder that only peakgpt reads. Experts in MXFP4 are
        written as transformers has them, byte by byte as they were read, if all other weights are floats.

        Args:
            folder: created if it does not exist.
            tokenizer: saved in the same folder, such as peakgpt's Tokenizer.
            weights: tensors that replace the model's own, by name, as from AdamW.master_weights.
            dtype: of the written tensors; None keeps each tensor's dtype, which is float32 for master weights.
            max_shard_size: bytes, or a string such as "5GB"; larger models are split into several files with an index.
                None writes one file.
        Raises:
            OSError: the folder cannot be written.
            ValueError: the model was quantized by peakgpt, has adapters that are not merged, or max_shard_size is not a
                size; or a quantized model and weights or max_shard_size, which it would ignore.
        """
        mxfp4 = mxfp4_weights(self)
        if not mxfp4 and any(isinstance(module, GroupedLinear | GroupedExpertLinear) for module in self.modules()):
            if weights is not None or max_shard_size is not None:
                raise ValueError("save_pretrained: got weights or max_shard_size, expected none for a quantized model")
            write_grouped(folder, self, tokenizer, self.source_files, dtype)
            return
        if any(isinstance(module, QuantizedLinear) for module in self.modules()):
            raise ValueError("save_pretrained: got a quantized model, expected float weights; copy its folder instead")
        not_floats = {*mxfp4, *(f"{name.removesuffix('weight')}scale" for name in mxfp4)}
        state = {name: t for name, t in {**self.state_dict(), **(weights or {})}.items() if name not in not_floats}
        state = {name: t.to(dtype or t.dtype) for name, t in state.items()}
        source_files = with_method(self.source_files) if mxfp4 else self.source_files
        write_model(folder, self.config, state, tokenizer, max_shard_size, source_files, mxfp4)

    # ---- adapters, see engine/model/lora.py

    def add_adapter(self, config: LoraConfig, adapter_name: str = DEFAULT_ADAPTER) -> None:
        """Add a LoRA adapter, activate it, and freeze all weights but those of adapters, as transformers does.

        The model may be quantized. The new adapter changes nothing until it is trained.

        Args:
            config: rank, scale, and the layers that it is for.
            adapter_name: for the other methods; without a dot.
        Raises:
            ValueError: the model has an adapter of this name, or target_modules does not fit the model.
        """
        attach.add_adapter(self, config, adapter_name)

    def load_adapter(
        self, source: Path | str, adapter_name: str = DEFAULT_ADAPTER, *, is_trainable: bool = False,
        revision: str | None = None,
    ) -> None:  # fmt: skip
        """Load a LoRA adapter in PEFT's format, activate it, and freeze all weights but those of adapters.

        Args:
            source: a folder with adapter_config.json and adapter_model.safetensors, the folder of a run that trained an
                adapter, or a name of the Hugging Face hub.
            adapter_name: for the other methods; without a dot.
            is_trainable: whether the adapter's weights are trained further.
            revision: of an adapter of the hub: a branch, a tag or a commit.
        Raises:
            ValueError: the model has an adapter of this name; a missing or damaged file; an adapter of another model,
                or one that is not supported, such as DoRA: the message names the field.
        """
        attach.load_adapter(self, locate(source, ADAPTER_FILES, revision), adapter_name, is_trainable=is_trainable)

    def save_adapter(
        self, folder: Path | str, adapter_name: str | None = None, *, tokenizer: TokenizerFiles | None = None
    ) -> None:
        """Save an adapter in PEFT's format, which PEFT loads on the family's model of transformers.

        Args:
            folder: created if it does not exist.
            adapter_name: None means the active one.
            tokenizer: saved in the same folder.
        Raises:
            ValueError: the model has no such adapter.
            OSError: the folder cannot be written.
        """
        saved = attach.SavedAdapter(self, adapter_name)
        write_adapter(Path(folder), saved.content, saved.tensors(self.state_dict()), tokenizer)

    def set_adapter(self, adapter_name: str | None) -> None:
        """Activate an adapter; None activates none, so that the model is its base model.

        Raises:
            ValueError: the model has no such adapter.
        """
        attach.set_adapter(self, adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; its base model's weights stay frozen.

        Raises:
            ValueError: the model has no such adapter.
        """
        attach.delete_adapter(self, adapter_name)

    def merge_and_unload(self) -> GPT:
        """Add the active adapter to the weights and remove all adapters, as PEFT's method of this name; return self.

        The sum is formed in float32. The model then runs as fast as without adapters, and `save_pretrained` saves it.

        Raises:
            ValueError: a layer of the adapter is quantized.
        """
        attach.merge(self)
        return self

    @property
    def prepare_inputs_for_generation(self) -> Any:
        """Refuse the wrappers of PEFT that need the forward of transformers' models.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "GPT: got a wrapper for models of transformers (PEFT's task_type, prompt or prefix tuning), expected "
            "get_peft_model without task_type, with adapters of modules such as LoRA, DoRA or IA3"
        )

    @property
    def generation_config(self) -> GenerationConfig:
        """How the authors of the checkpoint generate text; empty for a model that was not loaded.

        Raises:
            ValueError: a field of generation_config.json has a wrong value.
        """
        return generation_config(self)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        num_beams: int | None = None,
        length_penalty: float | None = None,
        early_stopping: bool | str | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Continue a batch of prompts with a KV cache. The arguments have the names and the meaning of transformers.

        An argument that is None has the value of `generation_config`, or else the one named below.

        Args:
            input_ids: (B, T) int64 or int32; prompts of different lengths are padded on the left.
            attention_mask: (B, T), 0 for padding and then 1; None without padding.
            max_new_tokens: up to the model's block_size.
            do_sample: sample instead of taking the most likely token (False).
            temperature, top_k, top_p, min_p: of sampling, see SamplingParams (1, all tokens). top_k 0 is all tokens.
            repetition_penalty: see SamplingParams (1, none).
            num_beams: more than 1 is beam search, which returns the best sequence of each prompt (1).
            length_penalty: beam search divides a sequence's log-probability by its length to this power (1).
            early_stopping: beam search ends once `num_beams` sequences have ended (True), once a better one is unlikely
                (False, the default), or once a better one is impossible ("never").
            eos_token_id: one or more tokens that end a sequence; the sequence keeps the token. () means that none does.
            pad_token_id: fills a sequence after its end (the first of `eos_token_id`).
            seed: of sampling, 64 bits; None draws one from torch's generator. Each prompt has its own random numbers.
        Returns:
            (B, T + new), dtype of input_ids; new is the number of new tokens of the longest sequence.
        Raises:
            ValueError: an argument out of range, an argument that would be ignored, or more tokens than block_size.
        """
        self.generation_config.warn("GPT.generate", "stop_strings")
        config = with_arguments(
            "generate", self.generation_config, do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p,
            min_p=min_p, repetition_penalty=repetition_penalty, num_beams=num_beams, length_penalty=length_penalty,
            early_stopping=early_stopping, eos_token_id=eos_token_id, pad_token_id=pad_token_id, seed=seed,
        )  # fmt: skip
        count = check_prompt(self, input_ids, max_new_tokens, config)
        params = sampling_params(config, count, seed)
        start = None if attention_mask is None else left_padding_start(attention_mask, input_ids)
        search = generate if config.num_beams == 1 else beam_search
        return search(self, input_ids, params, config, start)

    def stream(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        seed: int | None = None,
    ) -> Iterator[int]:
        """Yield the new tokens of one sequence, (1, T), one by one, without the eos token. Arguments as `generate`."""
        self.generation_config.warn("GPT.stream", "stop_strings", "num_beams")
        config = with_arguments(
            "stream", self.generation_config, do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p,
            min_p=min_p, repetition_penalty=repetition_penalty, num_beams=1, eos_token_id=eos_token_id, seed=seed,
        )  # fmt: skip
        count = check_prompt(self, input_ids, max_new_tokens, config, "stream")
        return stream(self, input_ids, sampling_params(config, count, seed))

    def configure_optimizer(
        self,
        lr: float = 6e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        max_norm: float | None = 1.0,
        dtype: torch.dtype | None = None,
    ) -> AdamW:
        """Build AdamW with GPT-3's settings: weight decay for matrices, none for biases and norms.

        arXiv:2005.14165, appendix B.

        Args:
            lr, betas, eps, weight_decay, max_norm: as in peakgpt.AdamW.
            dtype: converts the model to this dtype; the optimizer keeps float32 master weights.
        """
        groups = decay_groups(self, weight_decay)
        return AdamW(groups, lr, betas, eps, max_norm=max_norm, dtype=dtype)
