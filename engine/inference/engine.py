"""Continuous batching: requests come and go between steps, and every step runs what all of them need next.

A step runs one token of each sequence that is past its prompt, and as many prompt tokens as the budget leaves, first
come first served; a long prompt takes several steps, so that nobody's text waits long for another's prompt. When blocks
run out, the sequence that came last gives its own back and begins again later. What a request gets depends on none of
this, to the last bit, where the runner's logits do not (tests/engine/inference/test_scheduler.py).

Kwon et al. 2023, arXiv:2309.06180 (blocks, preemption by recomputing); Agrawal et al. 2023, "SARATHI", arXiv:2308.16369
(prompts in chunks beside decoding).
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count
from typing import TypeVar

import torch
from torch import Tensor

from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.inference.block_pool import BLOCK, BlockPool, Chunk, digests
from peakgpt.engine.inference.cache_size import default_blocks
from peakgpt.engine.inference.constrained_decoding import ChoiceConstraint
from peakgpt.engine.inference.ops_runner import runner_for
from peakgpt.engine.inference.sampling import TokenLogprob, Uniforms, adjust, choose, draw_seed, log_probabilities
from peakgpt.engine.inference.sampling_params import SamplingParams
from peakgpt.engine.inference.speculative import Ask, Speculation
from peakgpt.engine.inference.text_stream import TextStream
from peakgpt.engine.model.transformer import Transformer

__all__ = ["Engine", "Output", "Request", "SamplingParams", "TokenLogprob"]

T = TypeVar("T")
# Tokens of a step. On the CPU 0.12 s of GPT-2 124M in bf16 on two cores. On a GPU by count, not measured: 300 tokens
# are multiplied while weights are read (989 TFLOP/s, 3.35 TB/s), and launching a step's kernels takes longer than that.
BUDGET = {"cpu": 256, "cuda": 2048}
STREAMS = 64  # continuations at once
CHECKED = 8  # tokens that decoding takes in one pass with proposals: GPT-2 124M takes 1.15 times as long as for one


@dataclass(frozen=True)
class Output:
    """What a step added to one continuation of a request.

    Args:
        request: its id.
        index: which of its n continuations.
        tokens: new ids.
        text: new text that is sure to stay, where the engine has a tokenizer.
        logprobs: one a token, where asked for.
        finish: None while it goes on; "stop", "length" or "error".
        stopped_by: the stop id or string that ended it.
        prompt_logprobs: with the first output of index 0, where asked for.
        error: what ended it, where that is an error; the others go on.
    """

    request: int
    index: int = 0
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish: str | None = None
    stopped_by: int | str | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    error: Exception | None = None


@dataclass(frozen=True)
class Request:
    """A prompt and how it is continued; `id` is the engine's."""

    id: int
    ids: tuple[int, ...]
    params: SamplingParams


@dataclass(eq=False)
class _Running:
    """One continuation of a request while it lives."""

    request: Request
    index: int
    limit: int  # of all tokens
    tokens: list[int]  # the prompt and the text
    uniforms: Uniforms
    text: TextStream | None
    choices: ChoiceConstraint | None
    computed: int = 0  # tokens whose keys and values are in the blocks
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # of its full blocks
    published: int = 0  # of those, how many are known to the pool
    scored: list[TokenLogprob] = field(default_factory=list)  # of the prompt
    draft: list[int] = field(default_factory=list)  # proposed for this step

    def __post_init__(self):
        p = self.request.params
        self.params, self.prompt = p, len(self.request.ids)
        scores_prompt = p.prompt_logprobs is not None and self.index == 0
        first = min(max(1, p.prompt_logprobs_start), self.prompt) if scores_prompt else self.prompt
        self.first_scored = first

    @property
    def decoding(self) -> bool:
        return self.computed == len(self.tokens) - 1

    @property
    def first_wanted(self) -> int:
        """The first position whose logits are still wanted."""
        return min(self.first_scored + len(self.scored), len(self.tokens)) - 1

    @property
    def complete(self) -> bool:
        """Whether nothing is left to be computed."""
        return self.limit == len(self.tokens) and self.first_scored + len(self.scored) >= self.prompt

    def take(self, count: int) -> Chunk:
        """The next `count` tokens that are there, and the draft."""
        end = self.computed + count
        ids = [*self.tokens[self.computed : end], *self.draft]
        wanted = count - max(self.first_wanted - self.computed, 0)
        return Chunk(ids, self.computed, self.blocks, max(wanted, 0) + len(self.draft))


_Chosen = tuple[_Running, list[int], list["TokenLogprob | None"]]


class Engine:
    """A model that continues many requests at once. One thread owns it."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer | None = None, *, blocks: int | None = None,
        streams: int = STREAMS, budget: int | None = None, speculation: Speculation | None = None,
        cache: str | None = None,
    ):  # fmt: skip
        """
        Args:
            model: as it is now: where it can be lowered to the CPU program, what becomes of its weights later does not
                reach the engine. Another model, or one on a GPU, runs by its ops.
            tokenizer: for texts, stop strings and choices that are strings.
            blocks: of the cache; None means room for all streams, see engine/inference/cache_size.py.
            streams: continuations that run at once at most.
            budget: tokens of a step; None means what suits the device.
            speculation: proposes tokens, which the text does not depend on; `proposed` and `accepted` count them.
            cache: "int8" keeps keys and values in bytes, in half of bfloat16's memory; None in the model's dtype.
        Raises:
            ValueError: speculation by a model with another vocabulary, or a cache that this model can not have.
        """
        if speculation and speculation.vocab_size not in (None, model.config.vocab_size):
            raise ValueError(f"speculation: the draft has vocab_size {speculation.vocab_size}, expected the model's "
                             f"{model.config.vocab_size}")  # fmt: skip
        weight = model.transformer.wte.weight
        self.config, self.tokenizer, self.streams = model.config, tokenizer, streams
        self.budget = BUDGET[weight.device.type] if budget is None else budget
        if blocks is None:
            blocks = default_blocks(model.config, streams, weight.dtype, weight.device, cache)
        self.runner = runner_for(model, blocks, cache)
        self.pool = BlockPool(self.runner.memory.blocks, BLOCK)
        self.waiting: deque[_Running] = deque()
        self.running: list[_Running] = []  # in the order in which they came
        self.speculation, self.proposed, self.accepted = speculation, 0, 0
        self._ids = count()

    @property
    def runner_note(self) -> str:
        """Why the model runs by its ops and not by the CPU program; empty where it does not."""
        reason = getattr(self.runner, "reason", None)
        return f"by ops: {reason}" if reason else ""

    @property
    def cache_note(self) -> str:
        """How large the cache is."""
        size, tokens = self.runner.memory.nbytes / (1 << 20), self.pool.blocks * BLOCK
        return (f"cache: {self.pool.blocks} blocks of {BLOCK} tokens, {tokens} tokens in all, {size:.0f} MiB; "
                f"{self.streams} texts of {tokens // self.streams} tokens at once")  # fmt: skip

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def submit(self, ids: Sequence[int], params: SamplingParams) -> int:
        """Queue a prompt.

        Args:
            ids: at least one token.
            params: how it is continued.
        Returns:
            The request's id.
        Raises:
            ValueError: ids or parameters that the model, its tokenizer or the cache can not take.
        """
        request = Request(next(self._ids), tuple(map(int, ids)), params)
        limit = self._limit(request)
        choices = [self._choice(choice) for choice in params.choices]
        seed = draw_seed() if params.seed is None else params.seed
        made = [
            _Running(
                request, index, limit, list(request.ids), Uniforms(seed, index),
                TextStream(self.tokenizer, params.stop) if self.tokenizer else None,
                ChoiceConstraint(choices, params.stop_token_ids) if choices else None,
            )
            for index in range(params.n)
        ]  # fmt: skip
        self.waiting.extend(made)
        return request.id

    def cancel(self, request: int) -> bool:
        """Forget a request and free its blocks; returns whether it was there."""
        mine = [s for s in (*self.waiting, *self.running) if s.request.id == request]
        for sequence in mine:
            self._release(sequence)
        self.waiting = deque(s for s in self.waiting if s.request.id != request)
        self.running = [s for s in self.running if s.request.id != request]
        return bool(mine)

    def outputs(self) -> Iterator[Output]:
        """Step until nothing is left to do."""
        while self.has_work:
            yield from self.step()

    def stream(self, ids: Sequence[int], params: SamplingParams) -> Iterator[Output]:
        """Continue one prompt alone, step by step; what is not taken is cancelled, an error is raised.

        Raises:
            ValueError: as `submit`; or there are other requests, whose outputs would be lost.
        """
        if self.has_work:
            raise ValueError("stream: got an engine with other requests, expected an idle one")
        return self._stream(self.submit(ids, params))

    def _stream(self, request: int) -> Iterator[Output]:
        try:
            for output in self.outputs():
                if output.error:
                    raise output.error
                yield output
        finally:
            self.cancel(request)

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Run once what is needed next.

        Returns:
            What was added, and what ended, by an error too; no output for who got nothing.
        """
        done, self._failed = self._schedule(), []
        chunks = self._run([sequence.take(new) for sequence, new in self._batch])
        return [*done, *(self._advance(*chunks) if chunks else ()), *self._failed]

    # ---- who fails

    def _run(self, chunks: list[Chunk]) -> tuple[Tensor, list[Chunk]] | None:
        """One pass; where it fails each chunk runs alone, and only who fails again ends. Returns logits, of whom."""
        if not chunks:
            return None
        try:
            return self.runner.step(chunks), chunks
        except Exception:  # of one, or of all together: each alone tells
            alone = [
                (pair, chunk, self._attempt(pair[0], self.runner.step, [chunk]))
                for pair, chunk in zip(self._batch, chunks, strict=True)
            ]
            alone = [run for run in alone if run[2] is not None]
            self._batch = [pair for pair, _, _ in alone]
            return (torch.cat([z for _, _, z in alone]), [chunk for _, chunk, _ in alone]) if alone else None

    def _attempt(self, sequence: _Running, function: Callable[..., T], *args) -> T | None:
        """What a function returns; or None: it failed, which ends the sequence and no other."""
        try:
            return function(*args)
        except Exception as error:
            self._release(sequence)
            self.running.remove(sequence)
            self._failed.append(Output(sequence.request.id, sequence.index, finish="error", error=error))
            return None

    # ---- what runs

    def _schedule(self) -> list[Output]:
        """Decide how many tokens of whom run; returns the outputs of those who need none."""
        left, plan = self.budget, {}
        for sequence in list(self.running):
            new = min(len(sequence.tokens) - sequence.computed, max(left, 1 if sequence.decoding else 0))
            if sequence in self.running and new and self._room(sequence, sequence.computed + new):
                plan[id(sequence)] = new
                left -= new
        done = []
        while self.waiting and left > 0 and len(self.running) < self.streams:
            if self.waiting[0].complete:
                done.append(self._output(self.waiting.popleft(), [], "", "length"))
                continue
            if not self._admit(self.waiting[0]):
                break
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            plan[id(sequence)] = min(len(sequence.tokens) - sequence.computed, left)
            left -= plan[id(sequence)]
        self._batch = [(s, plan[id(s)]) for s in self.running if id(s) in plan]
        if self.speculation:
            self._propose([s for s, _ in self._batch if s.decoding and not s.choices])
        return done

    def _propose(self, decoding: list[_Running]) -> None:
        """Give sequences drafts, where blocks are free."""
        count = CHECKED // max(len(decoding), 1) - 1
        asks = [Ask(id(s), s.tokens, min(count, s.limit - len(s.tokens) - 1)) for s in decoding]
        asked = [(s, ask) for s, ask in zip(decoding, asks, strict=True) if ask.count > 0]
        try:
            drafts = self.speculation.propose([ask for _, ask in asked])
        except Exception as error:  # the text does not depend on it
            warnings.warn(f"generate: goes on without speculation, which failed: {error!r}", stacklevel=2)
            self.speculation = None
            return
        for (s, _), draft in zip(asked, drafts, strict=True):
            while len(s.blocks) * self.pool.block < len(s.tokens) + len(draft) and self.pool.free_blocks:
                s.blocks.append(self.pool.allocate())
            s.draft = draft[: len(s.blocks) * self.pool.block - len(s.tokens)]
            self.proposed += len(s.draft)

    def _room(self, sequence: _Running, tokens: int) -> bool:
        """Give a sequence blocks for its tokens, at the cost of those who came later, at last its own."""
        while len(sequence.blocks) * self.pool.block < tokens:
            if (block := self.pool.allocate()) is not None:
                sequence.blocks.append(block)
                continue
            last = self.running.pop()
            self._release(last)
            self.waiting.appendleft(last)
            if last is sequence:
                return False
        return True

    def _admit(self, sequence: _Running) -> bool:
        """Give a waiting sequence blocks for all its tokens, known ones where there are; False: not now."""
        sequence.digests = digests(sequence.tokens, self.pool.block, sequence.digests)
        usable = sequence.digests[: sequence.first_wanted // self.pool.block]
        found = self.pool.find(usable)
        need = -(-len(sequence.tokens) // self.pool.block) - len(found)
        soon = usable[len(found) : len(found) + 1]  # somebody may be computing the next one just now
        if need > self.pool.free_blocks or any(soon[0] in s.digests[s.published :] for s in self.running if soon):
            for block in found:
                self.pool.release(block)
            return False
        sequence.blocks = [*found, *(self.pool.allocate() for _ in range(need))]
        sequence.published, sequence.computed = len(found), len(found) * self.pool.block
        return True

    def _release(self, sequence: _Running) -> None:
        for block in sequence.blocks:
            self.pool.release(block)
        sequence.blocks, sequence.published, sequence.computed = [], 0, 0
        if self.speculation:
            self.speculation.forget(id(sequence))

    # ---- what came out

    def _advance(self, logits: Tensor, chunks: list[Chunk]) -> list[Output]:
        """Choose tokens, and tell what each sequence got."""
        asked, at = [], 0
        for (sequence, new), chunk in zip(self._batch, chunks, strict=True):
            first, at = at, at + chunk.logits
            wanted = self._attempt(sequence, self._take_in, sequence, new, logits[first:at], chunk)
            if wanted is not None and sequence.computed == len(sequence.tokens):
                asked.append((sequence, range(at - wanted, at)))
        outputs = [self._attempt(one[0], self._extend, *one) for one in self._choose(logits, asked)]
        return [output for output in outputs if output]

    def _take_in(self, sequence: _Running, new: int, logits: Tensor, chunk: Chunk) -> int:
        """Note that a chunk was computed; returns of how many last rows tokens are to be chosen, if it is the last."""
        if sequence.computed < sequence.prompt:
            self._score_prompt(sequence, logits, chunk)
        sequence.computed += new
        self._publish(sequence)
        return 0 if sequence.complete else 1 + len(sequence.draft)

    def _score_prompt(self, sequence: _Running, logits: Tensor, chunk: Chunk) -> None:
        """Log-probabilities of the prompt's tokens that follow those of a chunk."""
        first = chunk.past + len(chunk.ids) - chunk.logits  # position of the first row
        targets = sequence.request.ids[first + 1 : first + 1 + chunk.logits]
        if first + 1 >= sequence.first_scored and targets:
            top = [sequence.params.prompt_logprobs or 0] * len(targets)
            sequence.scored += log_probabilities(logits[: len(targets)], targets, top)

    def _choose(self, logits: Tensor, asked: list[tuple[_Running, range]]) -> list[_Chosen]:
        """What each sequence gets for its rows of logits; none for who fails."""
        rows = [row for _, where in asked for row in where]
        logits = logits if len(rows) == len(logits) else logits[rows]
        parts, alive = logits.split([len(where) for _, where in asked]), []
        for (sequence, _), z in zip(asked, parts, strict=True):
            changed = sequence.params.changes_logits or sequence.choices
            own = z.clone() if changed and sequence.params.logprobs is not None else z
            if not changed or self._attempt(sequence, self._adjust, sequence, z) is not None:
                alive.append((sequence, z, own))
        if not alive:
            return []
        try:
            return self._pick(alive, logits if len(alive) == len(asked) else torch.cat([z for _, z, _ in alive]))
        except Exception:  # of one, or of all together: each alone tells
            alone = [self._attempt(one[0], self._pick, [one], one[1]) for one in alive]
            return [chosen for found in alone for chosen in found or ()]

    def _adjust(self, sequence: _Running, logits: Tensor) -> Tensor:
        """Apply penalties, bias and choices to a sequence's rows, in place."""
        for place, z in enumerate(logits):
            if sequence.params.changes_logits:
                text = [*sequence.tokens[sequence.prompt :], *sequence.draft[:place]]
                adjust(z, sequence.params, sequence.request.ids, text)
            if sequence.choices:
                allowed = torch.tensor(sequence.choices.allowed(), device=z.device)
                kept = z[allowed]
                z.fill_(float("-inf"))
                z[allowed] = kept
        return logits

    def _pick(self, alive: list[tuple[_Running, Tensor, Tensor]], logits: Tensor) -> list[_Chosen]:
        """Tokens, and log-probabilities or None, for sequences with their rows, adjusted and as the model gave them."""
        rows = [(s, place) for s, z, _ in alive for place in range(len(z))]
        params = [s.params for s, _ in rows]
        u = [0.0 if s.params.temperature == 0 else s.uniforms[len(s.tokens) - s.prompt + place] for s, place in rows]
        tokens = choose(logits, params, u).tolist() if rows else []
        logprobs: list[TokenLogprob | None] = [None] * len(rows)
        if told := [i for i, p in enumerate(params) if p.logprobs is not None]:
            own = torch.cat([own for s, _, own in alive if s.params.logprobs is not None])
            ids = [min(tokens[i], self.config.vocab_size - 1) for i in told]  # for none, what _extend does not tell
            scored = log_probabilities(own, ids, [params[i].logprobs for i in told])
            for i, logprob in zip(told, scored, strict=True):
                logprobs[i] = logprob
        ends = list(accumulate(len(z) for _, z, _ in alive))
        return [(s, tokens[end - len(z) : end], logprobs[end - len(z) : end])
                for (s, z, _), end in zip(alive, ends, strict=True)]  # fmt: skip

    def _extend(self, sequence: _Running, tokens: list[int], logprobs: list[TokenLogprob | None]) -> Output:
        """Add tokens up to the first that ends the text, or that the draft had otherwise."""
        kept, text, finish, stopped_by = 0, "", None if tokens else "length", None
        for token, drafted in zip(tokens, [*sequence.draft, None], strict=False):
            if token >= self.config.vocab_size:  # see choose
                raise ArithmeticError(f"generate: the logits after {len(sequence.tokens)} tokens are no numbers")
            sequence.tokens.append(token)
            kept += 1
            if token in sequence.params.stop_token_ids:
                finish, stopped_by = "stop", token
            else:
                text += sequence.text.feed(token) if sequence.text else ""
                stopped_by = sequence.text and sequence.text.stopped_by
                if stopped_by or (sequence.choices and sequence.choices.feed(token)):
                    finish = "stop"
                elif len(sequence.tokens) == sequence.limit:
                    finish = "length"
            if finish or token != drafted:
                break
        if sequence.draft:
            self.accepted += kept - 1
            sequence.computed, sequence.draft = len(sequence.tokens) - 1, []
        if finish:
            if sequence.text and not sequence.text.stopped_by:
                text += sequence.text.finish()
            self._release(sequence)
            self.running.remove(sequence)
        return self._output(sequence, tokens[:kept], text, finish, logprobs[:kept], stopped_by)

    def _output(self, sequence, tokens, text, finish, logprobs=(), stopped_by=None) -> Output:
        first = len(sequence.tokens) == sequence.prompt + len(tokens)
        return Output(
            sequence.request.id, sequence.index, tuple(tokens), text,
            None if sequence.params.logprobs is None else tuple(logprobs), finish, stopped_by,
            tuple(sequence.scored) if first and sequence.first_scored < sequence.prompt else None,
        )  # fmt: skip

    def _publish(self, sequence: _Running) -> None:
        """Make the blocks known that have become full."""
        full = sequence.computed // self.pool.block
        if full > sequence.published:
            sequence.digests = digests(sequence.tokens[: full * self.pool.block], self.pool.block, sequence.digests)
            for i in range(sequence.published, full):
                self.pool.publish(sequence.blocks[i], sequence.digests[i])
            sequence.published = full

    # ---- what may be asked

    def _limit(self, request: Request) -> int:
        c, p, ids, room = self.config, request.params, request.ids, self.pool.blocks * self.pool.block
        most = max(min(c.block_size, room), len(ids)) if p.max_tokens is None else len(ids) + p.max_tokens
        if not ids or most > c.block_size:
            raise ValueError(f"generate: {len(ids)} prompt tokens and max_tokens {p.max_tokens}, expected at "
                             f"least one token, at most block_size {c.block_size} in all")  # fmt: skip
        for name, tokens in (("prompt", ids), ("stop_token_ids", p.stop_token_ids), ("logit_bias", p.logit_bias)):
            for token in tokens:
                if not 0 <= token < c.vocab_size:
                    raise ValueError(f"generate: {name} has id {token}, expected 0 to vocab_size {c.vocab_size} - 1")
        if most > room:
            raise ValueError(f"generate: up to {most} tokens, expected at most {room}, which the cache has room for")
        if p.stop and not self.tokenizer:
            raise ValueError(f"generate: stop is {list(p.stop)}, expected none without a tokenizer")
        return most

    def _choice(self, choice: str | Sequence[int]) -> Sequence[int]:
        if isinstance(choice, str):
            if not self.tokenizer:
                raise ValueError(f"generate: choice {choice!r}, expected ids where there is no tokenizer")
            return self.tokenizer.encode(choice)
        for token in choice:
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(f"generate: choices have id {token}, expected 0 to {self.config.vocab_size - 1}")
        return choice
