"""Model "peakgpt" for the lm-evaluation-harness of EleutherAI; importing this module registers it.

    python -m peakgpt.harness --model peakgpt --model_args pretrained=FOLDER --tasks TASK

runs the command `lm_eval` after importing this module. The harness does not search other packages for models.
"""

from __future__ import annotations

import torch

try:
    from lm_eval import utils
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
except ImportError as error:
    reason = f"peakgpt.harness: got {error}, expected lm-evaluation-harness: pip install 'lm-eval[api]'"
    raise (SystemExit if __name__ == "__main__" else ImportError)(reason) from None

from peakgpt.engine.checkpoint.model_folder import MODEL_FILES
from peakgpt.engine.data.model_source import locate
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.evaluation.score import Scorer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.engine import Engine, SamplingParams
from peakgpt.kernels.hardware.device import choose_device

MAX_GEN_TOKS, DEFAULT_DEVICE = 256, "cuda:0"  # defaults of the harness


@register_model("peakgpt")
class PeakGPT(TemplateLM):
    """A checkpoint with its tokenizer.

    Args:
        pretrained: a name of the Hugging Face hub, or a folder, as in GPT.from_pretrained.
        dtype: dtype of the weights.
        max_length: maximum number of tokens. Longer inputs lose their beginning, as in the hf model.
        batch_size, max_batch_size: ignored, because the engine makes its own batches. The harness passes them.
        device: "cpu", "cuda", "cuda:N" or "auto". Where torch sees no CUDA device, "cuda:0" means the CPU as in the hf
            model, because the harness passes it by default.
    """

    def __init__(self, pretrained: str, dtype: str = "float32", max_length: int | None = None, batch_size=None,
                 max_batch_size=None, device=None):  # fmt: skip
        super().__init__()
        if device == DEFAULT_DEVICE and not torch.cuda.is_available():
            device = "cpu"
        source = locate(pretrained, MODEL_FILES)
        model = GPT.from_pretrained(source, dtype=getattr(torch, dtype), merge_adapter=True)
        self.model = model.to(choose_device(device))
        self.tokens = Tokenizer.load(source)
        self.max_length = min(max_length or self.model.config.block_size, self.model.config.block_size)
        self.scorer, self._engine = Scorer(self.model), None

    @property
    def eot_token_id(self) -> int | None:
        return self.tokens.end_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokens.context_ids[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        if add_special_tokens is None:  # as in the hf model, a text that begins with BOS gets no second one
            start = self.tokens.decode(self.tokens.start_ids and [self.prefix_token_id])
            add_special_tokens = not start or not string.startswith(start)
        return self.tokens.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(self, requests: list[tuple], **kwargs) -> list[tuple[float, bool]]:
        inputs = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        counts = [len(continuation) for _, _, continuation in requests]
        scores = self.scorer.score([(ids[:-n], ids[-n:]) for ids, n in zip(inputs, counts, strict=True)])
        answers = [(score.total, all(score.greedy)) for score in scores]
        for (strings, _, _), answer in zip(requests, answers, strict=True):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for (string,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(self.tok_encode(string), self.prefix_token_id, self.max_length, 1)
            pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
            totals.append(sum(total for total, _ in self._loglikelihood_tokens(pairs)))
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self._engine = self._engine or Engine(self.model, self.tokens)
        submitted, pieces = [], {}
        for context, options in (request.args for request in requests):
            ids, params, until = self._generation(context, options)
            submitted.append((self._engine.submit(ids, params), until))
        for output in self._engine.outputs():
            if output.error:
                raise output.error
            pieces.setdefault(output.request_id, []).append(output.text)
        texts = [
            postprocess_generated_text("".join(pieces.get(number, ())), until, None) for number, until in submitted
        ]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _generation(self, context: str, options: dict) -> tuple[list[int], SamplingParams, list[str]]:
        remaining = normalize_gen_kwargs(options, MAX_GEN_TOKS)
        until = handle_stop_sequences(remaining.pop("until", None), eos=self.tokens.end_of_text)
        count, sampled = remaining.pop("max_gen_toks"), remaining.pop("do_sample", False)
        temperature = remaining.pop("temperature", 1.0) if sampled else 0.0
        remaining.pop("temperature", None)
        names = ("top_k", "top_p", "min_p", "repetition_penalty")
        sampling = {name: remaining.pop(name) for name in names if name in remaining}
        if remaining:
            raise ValueError(f"peakgpt: got generation options {sorted(remaining)}, expected only known ones")
        if count >= self.max_length:
            raise ValueError(f"peakgpt: max_gen_toks is {count}, expected less than max_length {self.max_length}")
        ids = (self.tok_encode(context) or self.tokens.context_ids)[-(self.max_length - count) :]
        stop = tuple(text for text in until if text)
        params = SamplingParams(max_tokens=count, temperature=temperature, stop=stop, **sampling)
        return ids, params, until


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
