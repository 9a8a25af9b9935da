"""Load a checkpoint of a task with labels, to predict the labels of other examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from peakgpt.engine.checkpoint.folder import read_json
from peakgpt.engine.checkpoint.model_folder import MODEL_FILES, read_config, read_source_files
from peakgpt.engine.data.hub import HubFiles
from peakgpt.engine.data.model_source import locate
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.finetuning.config import ExampleConfig, FinetuneConfig, TaskConfig
from peakgpt.engine.finetuning.head_files import TASK_FILE
from peakgpt.engine.finetuning.labelled_model import LabelledModel
from peakgpt.engine.finetuning.tasks.catalogue import TASKS
from peakgpt.engine.finetuning.tasks.label_config import LABEL_TASKS, LabelConfig
from peakgpt.engine.finetuning.tasks.labelled import LabelledTask
from peakgpt.engine.gpt import GPT
from peakgpt.engine.training.train_config import TrainConfig

FILES = HubFiles((*MODEL_FILES.always, TASK_FILE), MODEL_FILES.first_of)


class LoadedTask(NamedTuple):
    """A task and its model, in evaluation mode."""

    task: LabelledTask
    model: LabelledModel


def load_task(
    source: Path | str, data: Sequence[str], *, truncate: bool = False, dtype: torch.dtype = torch.float32
) -> LoadedTask:
    """Load a model with a head that `peakgpt finetune` has saved.

    Args:
        source: a folder of a checkpoint or a run, or a name of the Hugging Face hub.
        data: files of examples.
        truncate: cut examples that are too long.
        dtype: of the weights.
    Raises:
        ValueError: no such model, or a damaged one.
    """
    folder = locate(source, FILES)
    if not (folder / TASK_FILE).is_file():
        tasks = ", ".join(LABEL_TASKS)
        raise ValueError(f"{folder}: got no {TASK_FILE}, expected a checkpoint of peakgpt finetune with task {tasks}")
    saved = read_json(folder / TASK_FILE)
    try:
        name, state, settings = saved["task"], saved["state"], saved["settings"]
        fields = settings["text_fields"]
        labels = LabelConfig(text_fields=fields and tuple(fields), label_field=settings["label_field"])
        train = TrainConfig(tokens=settings["tokens"])
        kind = {task: TASKS[task] for task in LABEL_TASKS}[name]
        names = [*map(str, state["labels"])]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / TASK_FILE}: got {error!r}, expected what peakgpt finetune writes") from None
    config = FinetuneConfig(
        task=TaskConfig(task=name, init=str(folder)), fields={}, labels=labels, train=train,
        data=ExampleConfig(data=tuple(data), truncate=truncate),
    )  # fmt: skip
    task = kind(config, Tokenizer.load(folder), {"labels": names})
    _, model_config = read_config(folder)
    gpt = GPT._without_weights(model_config, folder)
    gpt.source_files = read_source_files(folder)
    model = task.with_head(gpt)
    state = task.files(model).read(folder)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    return LoadedTask(task, model.eval())
