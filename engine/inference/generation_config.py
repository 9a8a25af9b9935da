"""generation_config.json: how the authors of a checkpoint generate text. Explicit arguments win over it.

The names are transformers' (GenerationConfig). A field that would change the text and that peakgpt does not implement
is named in a warning. What only changes how the text is computed, such as `use_cache`, has no effect.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from peakgpt.engine.checkpoint.folder import CONFIG
from peakgpt.engine.checkpoint.source_files import GENERATION_CONFIG
from peakgpt.engine.inference.sampling_params import MIN_TEMPERATURE, MIN_TOP_P, InvalidParam, SamplingParams
from peakgpt.engine.model.transformer import Transformer

# Fields that change the text and are not implemented -> values without effect, besides null.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": ([],), "begin_suppress_tokens": ([],), "constraints": ([],), "diversity_penalty": (0,),
    "dola_layers": (), "encoder_no_repeat_ngram_size": (0,), "encoder_repetition_penalty": (1,), "epsilon_cutoff": (0,),
    "eta_cutoff": (0,), "exponential_decay_length_penalty": (), "force_words_ids": ([],), "forced_bos_token_id": (),
    "forced_eos_token_id": (), "guidance_scale": (1,), "max_time": (), "min_length": (0,), "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,), "num_beam_groups": (1,), "num_return_sequences": (1,), "penalty_alpha": (0,),
    "sequence_bias": ([], {}), "token_healing": (False,), "top_h": (), "typical_p": (1,), "watermarking_config": (),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Defaults of a checkpoint; None where it has none.

    Args:
        eos_token_id: every one of them ends a text.
        pad_token_id: fills a sequence after its end.
        do_sample: whether tokens are sampled.
        temperature, top_k, top_p, min_p, repetition_penalty: see SamplingParams.
        max_new_tokens: most new tokens.
        max_length: most tokens of prompt and text; max_new_tokens comes first.
        suppress_tokens: never generated.
        stop_strings: end a text; they need a tokenizer.
        num_beams, length_penalty, early_stopping: of beam search, see GPT.generate.
        unsupported: fields of the file that have an effect in transformers and none here.
    """

    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    suppress_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    unsupported: tuple[str, ...] = ()

    @property
    def states_sampling(self) -> bool:
        """Whether the checkpoint says how tokens are chosen."""
        sampling = (self.do_sample, self.temperature, self.top_k, self.top_p, self.min_p)
        return any(value is not None for value in sampling)

    @property
    def note(self) -> str:
        """The stated fields as a sentence; empty if there are none."""
        stated = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "unsupported"}
        texts = [f"{name} {value}" for name, value in stated.items() if value not in (None, ())]
        return f"{GENERATION_CONFIG}: {', '.join(texts)}" if texts else ""

    def max_tokens(self, num_prompt: int) -> int | None:
        """Return the most new tokens after a prompt; None: the checkpoint has no limit.

        Raises:
            InvalidParam: the prompt is not shorter than max_length.
        """
        if self.max_new_tokens is not None or self.max_length is None:
            return self.max_new_tokens
        if num_prompt >= self.max_length:
            raise InvalidParam("max_tokens", f"{GENERATION_CONFIG}: max_length is {self.max_length} and the prompt has "
                               f"{num_prompt} tokens, expected fewer, or an explicit number of new tokens")  # fmt: skip
        return self.max_length - num_prompt

    def sampling(self) -> dict[str, Any]:
        """Return the fields of SamplingParams that choose tokens; without temperature if the checkpoint has none."""
        names = ("repetition_penalty",)
        if self.do_sample is not False:
            names += ("temperature", "top_k", "top_p", "min_p")
        values = {name: value for name in names if (value := getattr(self, name)) is not None}
        greedy = {"temperature": 0.0} if self.do_sample is False else {}
        return {**greedy, **values, "logit_bias": dict.fromkeys(self.suppress_tokens, -math.inf)}

    def sampling_params(self, num_prompt: int) -> SamplingParams:
        """Return the parameters of a request that names none.

        Raises:
            InvalidParam: the prompt is not shorter than max_length.
        """
        return SamplingParams(max_tokens=self.max_tokens(num_prompt), stop=self.stop_strings, **self.sampling())

    def warn(self, method: str, *others: str) -> None:
        """Warn of fields that have no effect.

        Args:
            method: that ignores them.
            others: fields that this method does not implement, and others do.
        """
        stated = [name for name in others if getattr(self, name) not in (None, 1, ())]
        if names := [*self.unsupported, *stated]:
            warnings.warn(f"{GENERATION_CONFIG}: {method} does not implement {', '.join(names)}; the text may differ "
                          "from that of transformers", stacklevel=3)  # fmt: skip


def generation_config(model: Transformer) -> GenerationConfig:
    """Return the defaults of the checkpoint that a model was loaded from.

    Ids of special tokens that generation_config.json lacks are those of config.json.

    Raises:
        ValueError: a field of the file has a wrong value.
    """
    content = model.source_files.get(GENERATION_CONFIG, {})
    ids = {name: model.source_files.get(CONFIG, {}).get(name) for name in ("eos_token_id", "pad_token_id")}
    stated = {name: value for name, value in {**ids, **content}.items() if value is not None}
    values = {}
    for name, parse in _FIELDS.items():
        if name in stated:
            try:
                values[name] = parse(stated[name])
            except (TypeError, ValueError) as error:
                source = GENERATION_CONFIG if name in content else CONFIG
                raise ValueError(f"{source}: {name} is {stated[name]!r:.60}, expected {error}") from None
    size = model.config.vocab_size
    for name in ("eos_token_id", "suppress_tokens"):  # an id that the model does not have is never generated
        values[name] = tuple(token for token in values.get(name, ()) if 0 <= token < size)
    if not 0 <= values.get("pad_token_id", 0) < size:
        del values["pad_token_id"]
    unsupported = (name for name, neutral in UNSUPPORTED.items() if name in stated and stated[name] not in neutral)
    return GenerationConfig(**values, unsupported=tuple(unsupported))


# ---- values: (value of JSON) -> parsed value, or ValueError with what is expected


def _number(low: float, high: float, expected: str, *, neutral: float | None = None) -> Callable[[Any], float | None]:
    """A number in [low, high]; None for the one without effect."""

    def parse(value: Any) -> float | None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError(expected)
        return None if value == neutral else value

    return parse


def _integer(low: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if type(value) is not int or value < low:
            raise ValueError(f"an integer from {low}")
        return value

    return parse


def _boolean(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("true or false")
    return value


def _temperature(value: Any) -> float:
    parsed = _number(0, math.inf, "a number from 0")(value)
    if 0 < parsed < MIN_TEMPERATURE or parsed == math.inf:
        raise ValueError(f"0, or a finite number from {MIN_TEMPERATURE}")
    return parsed


def _top_k(value: Any) -> int | None:
    if type(value) is not int:
        raise ValueError("an integer")
    return value if value > 0 else None  # 0 and -1: all tokens


def _ids(value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    if not all(type(token) is int for token in ids):
        raise ValueError("a token id, or a list of them")
    return tuple(ids)


def _texts(value: Any) -> tuple[str, ...]:
    texts: Sequence[Any] = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("a text, or a list of them")
    return tuple(texts)


def _early_stopping(value: Any) -> bool | str:
    if value not in (True, False, "never") or type(value) is int:
        raise ValueError('true, false or "never"')
    return value


_FIELDS: Mapping[str, Callable[[Any], Any]] = {
    "eos_token_id": _ids,
    "pad_token_id": lambda value: _ids(value)[0],
    "do_sample": _boolean,
    "temperature": _temperature,
    "top_k": _top_k,
    "top_p": _number(MIN_TOP_P, 1, f"a number from {MIN_TOP_P} to 1", neutral=1),
    "min_p": _number(0, 1, "a number from 0 to 1", neutral=0),
    "repetition_penalty": _number(1e-3, 1e3, "a number from 0.001 to 1000", neutral=1),
    "max_new_tokens": _integer(1),
    "max_length": _integer(1),
    "suppress_tokens": _ids,
    "stop_strings": _texts,
    "num_beams": _integer(1),
    "length_penalty": _number(-math.inf, math.inf, "a number"),
    "early_stopping": _early_stopping,
}
