"""Checkpoints: models in the Hugging Face layout of their family, and the state that a training run resumes from.

A model folder holds config.json and model.safetensors, or its shards and their index, as transformers' model of that
family writes and reads them; what else that layout allows (pytorch_model.bin, names without the base model's prefix,
the tied head written out) is read. Files are written beside their final place, flushed to disk and renamed, the weights
last: an interrupted write leaves what was there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peakgpt.engine.checkpoint.families import FAMILIES, OWN, Family, family_of, nearest
from peakgpt.engine.model.config import GPTConfig
from peakgpt.kernels.files import flush

if TYPE_CHECKING:
    from peakgpt.engine.data.tokenizer import Tokenizer

CONFIG, WEIGHTS, INDEX, PICKLE = "config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
QUANTIZED = "quantised.safetensors"  # see quantized_folder.py
ENTRIES = (WEIGHTS, INDEX, QUANTIZED)  # a file that names all weights
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
TRAINING = "training_state.safetensors"
NOWHERE: Mapping[str, Path] = MappingProxyType({})
DIGEST = "sha256"  # prefix of metadata that we write for each tensor, and compare where it is there
# Buffers that old transformers wrote.
BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


# ---- reading a model ----


def read_config(folder: Path | str, *, dropout: float | None = None) -> tuple[Family, GPTConfig]:
    """Read config.json.

    Args:
        folder: a checkpoint folder.
        dropout: replaces the checkpoint's rates.
    Raises:
        ValueError: no folder or file, damaged, of another model type, or asks for what this model does not do.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder}: got no such folder, expected one with {CONFIG} and {WEIGHTS}")
    path = folder / CONFIG
    found = read_json(path)
    family = FAMILIES.get(str(found.get("model_type")))
    if family is None:
        raise ValueError(f"{path}: model_type is {found.get('model_type')!r}, expected one of {', '.join(FAMILIES)}")
    try:
        return family, family.config(found, dropout=dropout)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def read_weights(
    folder: Path | str, family: Family, config: GPTConfig, expected: Mapping[str, torch.Size], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Read a folder's weights into the model's names and layout.

    Args:
        folder: a checkpoint folder.
        family, config: what its config.json said.
        expected: the model's tensor names and shapes, Linear layout.
        dtype: to convert to.
    Returns:
        The model's state dict, in memory of its own.
    Raises:
        ValueError: no weights, a damaged file, or missing, extra, misshapen or non-floating tensors.
    """
    path, found, places = _open_weights(Path(folder))
    found, places = family.standard_names(found), family.standard_names(places)
    shapes = family.shapes(config, expected)
    (name,) = family.theirs("lm_head.weight")
    head = found.pop(name, None) if config.tied_head else None
    found = {name: tensor for name, tensor in found.items() if name in shapes or not name.endswith(BUFFERS)}
    if family.always_biased and config.bias is not True:
        found = {name: tensor for name, tensor in found.items() if name in shapes or not _zero_bias(name, tensor)}
    found = family.swapped(found)
    _compare(path, found, shapes, places)
    (embedding,) = family.theirs("transformer.wte.weight")
    if head is not None and not torch.equal(head, found[embedding]):
        raise ValueError(f"{path}: {name} differs from {embedding}, expected a tied head")
    # A copy: what safetensors gives may be a map of the file, and a file can be overwritten.
    return {
        name: torch.empty(shape, dtype=dtype).copy_(family.to_ours(config, name, found))
        for name, shape in expected.items()
    }


def _zero_bias(name: str, tensor: Tensor) -> bool:
    return name.endswith(".bias") and not tensor.any()


def _open_weights(folder: Path) -> tuple[Path, dict[str, Tensor], dict[str, Path]]:
    """The file that names all tensors, the tensors, and the shards that hold them or should."""
    if (path := folder / WEIGHTS).exists():
        return path, read_safetensors(path)[0], {}
    if (path := folder / INDEX).exists():
        files = read_json(path).get("weight_map")
        names = sorted(set(files.values())) if isinstance(files, dict) else []
        if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise ValueError(f"{path}: got no weight_map to files of this folder, expected one")
        found: dict[str, Tensor] = {}
        for name in names:
            shard, _ = read_safetensors(folder / name)
            if twice := sorted(found.keys() & shard.keys()):
                raise ValueError(f"{folder / name}: got tensor {twice[0]} again, expected it in one shard")
            found |= shard
        return path, found, {name: folder / file for name, file in files.items()}
    if (path := folder / PICKLE).exists():
        return path, _read_pickle(path), {}
    raise ValueError(f"checkpoint {folder}: got no weights, expected {WEIGHTS}, {INDEX} or {PICKLE}")


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes raises anything; torch's texts advise to trust the file
        raise ValueError(f"{path}: {type(error).__name__}, expected a whole file of nothing but tensors") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: got a {type(found).__name__}, expected tensors by their names")
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {name} is a {type(value).__name__}, expected a tensor")
    return found


def _compare(
    path: Path, found: Mapping[str, Tensor], expected: Mapping[str, torch.Size], places: Mapping[str, Path] = NOWHERE
) -> None:
    for name, shape in expected.items():
        place = places.get(name, path)
        if name not in found:
            raise ValueError(f"{place}: got no tensor {name}, expected one of shape {tuple(shape)} as {CONFIG} says")
        if found[name].shape != shape or not found[name].is_floating_point():
            raise ValueError(
                f"{place}: {name} is {found[name].dtype} of shape {tuple(found[name].shape)}, "
                f"expected floating point of shape {tuple(shape)} as {CONFIG} says (both as [out, in])"
            )
    if extra := sorted(set(found) - set(expected)):
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise ValueError(
            f"{places.get(extra[0], path)}: got tensor {extra[0]}{more}, expected the {len(expected)} of {CONFIG} alone"
        )


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of a file, and its metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            found, metadata = {n: file.get_tensor(n) for n in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: {_cut_off(path) or error}, expected a whole safetensors file") from None
    for name, tensor in found.items():
        expected = metadata.get(f"{DIGEST}.{name}")
        if expected is not None and (digest := _digest(tensor)) != expected:
            raise ValueError(f"{path}: {name} has digest {digest}, expected {expected}: the file is damaged")
    return found, metadata


def _cut_off(path: Path) -> str | None:
    """Which tensor of a safetensors file lies beyond its end, in words; None where none does or nothing tells."""
    try:
        with path.open("rb") as file:
            length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
            header = json.loads(file.read(min(length, size)))
        header.pop("__metadata__", None)
        ends = {name: 8 + length + entry["data_offsets"][1] for name, entry in header.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError):
        return None
    first = min(((end, name) for name, end in ends.items() if end > size), default=None)
    return None if first is None else f"got {size} bytes, where {first[1]} ends at {first[0]}"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError where the file holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}, expected a JSON object") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: got a JSON {type(found).__name__}, expected an object")
    return found


# ---- writing a model ----


def write_model(
    folder: Path | str, config: GPTConfig, state: Mapping[str, Tensor], tokenizer: Tokenizer | None = None,
    max_shard_size: int | str | None = None,
) -> None:  # fmt: skip
    """Write a folder that transformers loads, where it has such models, atomically file by file.

    Args:
        folder: made where it is not there.
        config: of the model.
        state: the model's state dict, Linear layout.
        tokenizer: anything with `save(folder)` and `end_id`.
        max_shard_size: bytes, or such as "5GB"; more than this goes into several files, none larger unless it holds one
            tensor. None: one file.
    Raises:
        OSError: the folder can not be written; what was there still is.
        ValueError: max_shard_size is no size.
    """
    most = None if max_shard_size is None else _bytes(max_shard_size)
    family = family_of(config)
    if family.model_type == OWN:
        name, lacking = nearest(config)
        warnings.warn(
            f"checkpoint {folder}: no layout of transformers has this model, the nearest, {name}, lacks its "
            f"{', '.join(lacking)}: written in peakgpt's own, which transformers does not read",
            stacklevel=3,
        )
    tensors = family.to_theirs(config, _with_biases(state) if family.always_biased else state)

    def fill(stage: Path) -> None:
        text = json.dumps(_config_json(family, config, tensors, tokenizer), indent=2) + "\n"
        (stage / CONFIG).write_text(text, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(stage)
        _write_shards(stage, _shards(tensors, most))

    replace(Path(folder), fill)


def _bytes(size: int | str) -> int:
    """A size as transformers takes it: a number of bytes, or one with KB, MB or GB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)B?", str(size).upper())
    count = int(float(match[1]) * 1000 ** " KMG".index(match[2] or " ")) if match else 0
    if count < 1:
        raise ValueError(f"save_pretrained: max_shard_size is {size!r}, expected bytes, or such as '5GB', or None")
    return count


def _shards(tensors: Mapping[str, Tensor], most: int | None) -> list[dict[str, Tensor]]:
    """The tensors in their order, cut where a part would have more than `most` bytes."""
    parts: list[dict[str, Tensor]] = [{}]
    room = most
    for name, tensor in tensors.items():
        if most is not None and parts[-1] and tensor.nbytes > room:
            parts.append({})
            room = most
        parts[-1][name] = tensor
        room = None if most is None else room - tensor.nbytes
    return parts


def _write_shards(stage: Path, parts: list[dict[str, Tensor]]) -> None:
    """One file, or several with an index, as transformers names them."""
    if len(parts) == 1:
        write_safetensors(stage / WEIGHTS, parts[0], {"format": "pt"})
        return
    files = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    for file, part in zip(files, parts, strict=True):
        write_safetensors(stage / file, part, {"format": "pt"})
    places = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    total = sum(tensor.nbytes for part in parts for tensor in part.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2) + "\n"
    (stage / INDEX).write_text(text, encoding="utf-8")


def _with_biases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with zeros for the biases that it does not have; embeddings and heads have none."""
    weights = {name: t for name, t in state.items() if re.search(r"\.(ln_\w+|c_\w+)\.weight$", name)}
    zeros = {name.removesuffix("weight") + "bias": t.new_zeros(t.shape[0]) for name, t in weights.items()}
    return {**zeros, **state}


def _config_json(
    family: Family, config: GPTConfig, tensors: Mapping[str, Tensor], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    end = None if tokenizer is None else tokenizer.end_id
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    return {**family.config_json(config), "bos_token_id": end, "eos_token_id": end, "torch_dtype": dtype}


def _digest(tensor: Tensor) -> str:
    """Of a tensor's bytes; 64 bits tell damage, not malice."""
    content = tensor.cpu().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content).hexdigest()[:16]


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file of tensors; OSError where that fails."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        path.touch()
        mode = path.stat().st_mode  # as the umask has it; safetensors leaves the file to its owner only
        found = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        digests = {f"{DIGEST}.{name}": _digest(tensor) for name, tensor in found.items()}
        save_file(found, path, {**metadata, **digests})
        path.chmod(mode)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def replace(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write files into a hidden folder, then move them into `folder`, what names all weights last.

    Where the weights are shards the old ones lose their name before: a folder between two models has none, and no
    reader takes some of each.
    """
    try:
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with _stage(folder, made) as stage:
            fill(stage)
            files = sorted(stage.iterdir(), key=lambda file: file.name in ENTRIES)
            new = {file.name for file in files}
            for file in files:
                flush(file)
            if INDEX in new:
                _remove(folder / name for name in ENTRIES)
            for file in files:
                os.replace(file, folder / file.name)
            if new.intersection(ENTRIES):
                _remove(path for path in folder.iterdir() if _is_weights(path.name) and path.name not in new)
            flush(folder)
    except OSError as error:
        raise OSError(f"checkpoint {folder}: {error.strerror or error}, expected a folder to write into") from None


def _is_weights(name: str) -> bool:
    return name in ENTRIES or SHARD.fullmatch(name) is not None


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _stage(folder: Path, made: bool) -> Iterator[Path]:
    stage = Path(tempfile.mkdtemp(prefix=".incoming-", dir=folder))
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if made and not any(folder.iterdir()):
            folder.rmdir()


# ---- resuming a run ----


def save_training_state(
    folder: Path | str, model: nn.Module, optimizer: torch.optim.Optimizer, values: Mapping[str, Any]
) -> None:
    """Write training_state.safetensors: everything that a run needs to go on bit for bit.

    Args:
        folder: made where it is not there.
        model: its state dict is kept in the dtype it trains in.
        optimizer: its state, remainders included, and its groups' options.
        values: what else the run must know (steps done, position in the data), JSON.
    Raises:
        OSError: the folder can not be written; what was there still is.
    """
    packed = optimizer.state_dict()
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"optimizer.{i}.{k}": t for i, entry in packed["state"].items() for k, t in entry.items()}
    tensors |= {f"random.{i}": state for i, state in enumerate(_random_states())}
    text = json.dumps({"values": dict(values), "param_groups": packed["param_groups"]})
    replace(Path(folder), lambda stage: write_safetensors(stage / TRAINING, tensors, {"training": text}))


def load_training_state(folder: Path | str, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load what `save_training_state` wrote into a model and its optimizer, and set torch's generators.

    Returns:
        The values that were saved with it.
    Raises:
        ValueError: no such file, a damaged one, or one of another model or optimizer.
    """
    path = Path(folder, TRAINING)
    tensors, metadata = read_safetensors(path)
    if "training" not in metadata:
        raise ValueError(f"{path}: got no training state in it, expected one written by save_training_state")
    saved = json.loads(metadata["training"])
    weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    _compare(path, weights, {name: tensor.shape for name, tensor in model.state_dict().items()})
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, *rest = name.split(".")
        if kind == "optimizer":
            states.setdefault(int(rest[0]), {})[rest[1]] = tensor
    groups = [{**group, "betas": tuple(group["betas"])} for group in saved["param_groups"]]
    model.load_state_dict(weights)
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    _set_random_states([tensors[f"random.{i}"] for i in range(sum(name.startswith("random.") for name in tensors))])
    return saved["values"]


def _random_states() -> list[Tensor]:
    """The CPU generator's state, then each CUDA device's."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]


def _set_random_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if torch.cuda.is_available() and len(states) == torch.cuda.device_count() + 1:
        torch.cuda.set_rng_state_all(states[1:])
