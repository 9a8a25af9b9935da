"""From a model folder to the first token, versus transformers: `peakgpt bench load`.

A step is a whole process: it imports the library, loads bfloat16 weights from a folder of transformers' layout, runs a
prompt, computes one greedy token and ends. The folder is in the page cache. A second result has the part from the call
of from_pretrained to the token.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from peakgpt.bench.case import Case, expect_cpu, joined
from peakgpt.bench.contenders.contender import Contender
from peakgpt.bench.contenders.models import random_prompts, write_random_model
from peakgpt.bench.interleave import OnFailure, interleave
from peakgpt.bench.schema import Result
from peakgpt.bench.timing import Spread
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.presets import preset
from peakgpt.kernels.command_line import integer

TIMEOUT_S = 600.0

# What a user writes: imports, then the way from the folder to the token. `folder` and `ids` are given.
PROGRAMS = {
    "peakgpt": (
        "from peakgpt import GPT",
        "model = GPT.from_pretrained(folder, dtype=torch.bfloat16)",
        "token = model.generate(ids, max_new_tokens=1)[0, -1].item()",
    ),
    "peakgpt engine": (
        "from peakgpt import Engine, GPT, SamplingParams",
        "engine = Engine(GPT.from_pretrained(folder, dtype=torch.bfloat16))",
        "engine.submit(ids[0].tolist(), SamplingParams(temperature=0.0, max_tokens=1))",
        "token = engine.step()[0].token_ids[0]",
    ),
    "transformers": (
        "from transformers import AutoModelForCausalLM",
        "model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)",
        "token = model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1].item()",
    ),
}
SCRIPT = """
import json, resource, sys, time
import torch
{0}
folder, ids = sys.argv[1], torch.tensor([json.loads(sys.argv[2])])
torch.set_num_threads(int(sys.argv[3]))
start = time.perf_counter()
{1}
seconds = time.perf_counter() - start
peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({{"token": token, "seconds": seconds, "peak_kib": peak_kib}}))
"""


@dataclass(frozen=True)
class LoadCase(Case):
    """Loading a model of random weights and computing one token, in a new process each time.

    Args:
        model: name of the model, for the name of the case.
        config: the model, of a family of transformers.
        prompt: tokens of the prompt.
    """

    kind: ClassVar[str] = "load"
    model: str
    config: GPTConfig
    prompt: int

    @property
    def name(self) -> str:
        return joined(self.kind, self.model, f"1x{self.prompt}+1", "bfloat16")

    def all_contenders(self, device: torch.device) -> list[str]:
        return list(PROGRAMS)

    def _measure(self, device: torch.device, on_failure: OnFailure) -> list[Result]:
        with tempfile.TemporaryDirectory() as folder:
            write_random_model(Path(folder), self.config)
            ids = random_prompts(self.config, 1, self.prompt)[0].tolist()
            runs: dict[str, list[_Run]] = {name: [] for name in self.contenders(device)}
            timings = interleave({name: _step(name, folder, ids, runs[name]) for name in runs}, rounds=self.rounds,
                                 budget_s=self.seconds, one_call=True, on_failure=on_failure)  # fmt: skip
        results = []
        for name, timing in timings.items():
            contender = CONTENDERS[name]
            fields = {"bench": "load", "contender": name, "backend": contender.backend, "device": "cpu",
                      "dtype": "bfloat16", "memory_bytes": max(run.peak_bytes for run in runs[name])}  # fmt: skip
            sizes = {"n_layer": self.config.n_layer, "n_embd": self.config.n_embd, "prompt": self.prompt}
            note = f"first token {runs[name][0].token}"
            results.append(Result.of(timing.noted(note, contender.version), case=sizes, **fields))
            spread = Spread.of([run.seconds for run in runs[name][1:]])  # the first one warmed the page cache up
            results.append(Result(
                case={**sizes, "time": "from from_pretrained"}, median_s=spread.median, q25_s=spread.q25,
                q75_s=spread.q75, rounds=len(runs[name]) - 1, dropped=0, **fields,
            ))  # fmt: skip
        return results


@dataclass(frozen=True)
class _Run:
    token: int
    seconds: float  # from the call of from_pretrained
    peak_bytes: int  # resident, with the pages of the file that are mapped


CONTENDERS: Mapping[str, Contender] = {
    name: Contender(lambda: None, package=name.partition(" ")[0]) for name in PROGRAMS
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="llama-3.2-1b", help="preset of a family of transformers (llama-3.2-1b)")
    parser.add_argument("--prompt", type=integer(), default=16, help="prompt tokens (default 16)")


def cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    expect_cpu("load", device)
    return [LoadCase(args.model, preset(args.model), args.prompt, rounds=5)]


def _step(name: str, folder: str, ids: list[int], runs: list[_Run]) -> Callable[[], None]:
    """Return a function that runs the process of a contender and appends what it measured."""
    imports, *lines = PROGRAMS[name]
    script = SCRIPT.format(imports, "\n".join(lines))
    command = [sys.executable, "-c", script, folder, json.dumps(ids), str(torch.get_num_threads())]

    def step() -> None:
        CONTENDERS[name].expect_installed()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"load: {name} ended with exit code {done.returncode}; its message is above")
        report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        runs.append(_Run(report["token"], report["seconds"], 1024 * report["peak_kib"]))

    return step
