"""Continuous batching: requests come and go between steps, and each step runs the next tokens of all of them.

    schedule   tokens of each sequence, blocks (scheduler.py), drafts (speculative.py)
    execute    logits, or the hidden states of texts that are embedded (executor.py, embedding.py)
    sample     tokens (sampling.py)
    outputs    tokens and text of each sequence (sequence.py)

If the executor's logits do not depend on the batch, neither does a request's output, to the last bit
(tests/engine/inference/test_engine.py). More than 300 lines: the whole step of a batch is read in one place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.inference.block_pool import BlockPool
from peakgpt.engine.inference.cache_size import default_blocks
from peakgpt.engine.inference.chunk import Chunk
from peakgpt.engine.inference.embedding import LAST, EmbeddingSequence
from peakgpt.engine.inference.executor import make_executor
from peakgpt.engine.inference.generation_config import generation_config
from peakgpt.engine.inference.interrupts import INTERRUPTS
from peakgpt.engine.inference.padded_vocabulary import PaddedVocabulary
from peakgpt.engine.inference.preparation import Preparation
from peakgpt.engine.inference.sampling import TokenLogprob, choose, log_probabilities
from peakgpt.engine.inference.sampling_params import SamplingParams
from peakgpt.engine.inference.scheduler import Batch, Scheduled, Scheduler
from peakgpt.engine.inference.sequence import Output, Request, RunningSequence
from peakgpt.engine.inference.speculative import DraftRequest, Speculation
from peakgpt.engine.model.plain import Snapshot
from peakgpt.engine.model.transformer import Transformer

__all__ = ["Engine", "Output", "Request", "SamplingParams", "TokenLogprob"]

T = TypeVar("T")
# Tokens of a step. CPU: such a step takes 0.12 s for GPT-2 124M in bf16 on two cores. GPU: estimated, not measured.
# While it reads the weights, it can multiply 300 tokens (989 TFLOP/s, 3.35 TB/s); launching a step's kernels takes
# longer than that.
BUDGET = {"cpu": 256, "cuda": 2048}
STREAMS = 64  # sequences that run at once
MAX_CHECKED = 8  # tokens of a step with drafts; for GPT-2 124M it takes 1.15 times as long as a step of one token

Sample = tuple[RunningSequence, list[int], list["TokenLogprob | None"]]  # tokens and their log-probabilities


class Engine:
    """A model that continues many requests at once. Only one thread may use it, except for `preparation`."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer | None = None, *, blocks: int | None = None,
        streams: int = STREAMS, budget: int | None = None, speculation: Speculation | None = None,
        cache: str | None = None,
    ):  # fmt: skip
        """
        Args:
            model: its weights are read in place, except routers and attention sinks in bfloat16. A change of their
                values takes effect with the next step, but keys and values that are in the cache stay. A hook, an
                adapter, another module or a weight in other memory, as after `model.to(dtype)`, takes effect with the
                next request of an idle engine.
            tokenizer: for output text, stop strings and choices given as strings; its end of text ends an output. Ids
                of the model that it does not have are not sampled unless a request names them in its bias or choices.
            blocks: blocks of the KV cache; None means enough for all streams, see engine/inference/cache_size.py.
            streams: maximum number of sequences that run at once.
            budget: maximum number of tokens of a step; None means the device's default.
            speculation: proposes tokens, which do not change the output; `proposed` and `accepted` count them.
            cache: "int8" stores keys and values as bytes, in half of bfloat16's memory; None in the model's dtype.
        Raises:
            ValueError: a draft model with another vocabulary, an unknown cache, or a wrong value in the checkpoint's
                generation_config.json.
        """
        if speculation and speculation.vocab_size not in (None, model.config.vocab_size):
            raise ValueError(f"speculation: the draft has vocab_size {speculation.vocab_size}, expected the model's "
                             f"{model.config.vocab_size}")  # fmt: skip
        self.config, self.tokenizer, self.streams = model.config, tokenizer, streams
        if blocks is None:
            blocks = default_blocks(model.config, streams, model.dtype, model.device, cache)
        self.budget = BUDGET[model.device.type] if budget is None else budget
        self._memory = blocks, cache
        self._prepare(model)
        self.speculation, self.proposed, self.accepted = speculation, 0, 0
        defaults = generation_config(model)
        defaults.warn("Engine", "num_beams", *(() if tokenizer else ("stop_strings",)))
        self.preparation = Preparation(model.config, tokenizer, self._cache_tokens, defaults)
        self._vocabulary = PaddedVocabulary(model.config.vocab_size, tokenizer, model.device)

    def _prepare(self, model: Transformer) -> None:
        """Make the executor, and the blocks and the scheduler of its empty KV cache."""
        (blocks, cache), self.snapshot = self._memory, Snapshot(model)
        self.executor = None  # frees the KV cache of the one before
        self.executor = make_executor(model, blocks, cache_dtype=cache)
        self.pool = BlockPool(self.executor.kv_cache.num_blocks)
        self.scheduler = Scheduler(self.pool, budget=self.budget, max_running=self.streams)

    @property
    def executor_note(self) -> str:
        """Why the model runs on torch ops and not in the C++ program; empty if it runs in the program."""
        return f"torch ops: {self.executor.note}" if self.executor.note else ""

    @property
    def cache_note(self) -> str:
        """The size of the KV cache as a sentence."""
        blocks, size = self.pool.num_blocks, self.executor.kv_cache.nbytes / (1 << 20)
        return (f"cache: {blocks} blocks of {self.pool.block_tokens} tokens, {self._cache_tokens} tokens in all, "
                f"{size:.0f} MiB; {self.streams} sequences of {self._cache_tokens // self.streams} tokens "
                "at once")  # fmt: skip

    @property
    def _cache_tokens(self) -> int:
        return self.pool.num_blocks * self.pool.block_tokens

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        return self.scheduler.has_work

    # ---- requests

    def submit(self, prompt_token_ids: Sequence[int], params: SamplingParams | None = None) -> int:
        """Queue a prompt.

        Args:
            prompt_token_ids: at least one token.
            params: how to continue it. None: as the generation_config.json of the checkpoint says; without one, sample
                from the model's own distribution to its end of text.
        Returns:
            The request's id.
        Raises:
            InvalidParam: tokens or parameters that the model, the tokenizer or the cache does not support.
        """
        return self.add(*self.preparation.prepare([(prompt_token_ids, params)]))

    def add(self, sequences: list[RunningSequence]) -> int:
        """Queue the sequences of a prompt that `preparation` made, in any thread; return the request's id.

        Raises:
            ValueError: modules or weights of the model were hooked or replaced while requests run.
        """
        self._follow_model()
        self.scheduler.add(sequences)
        return sequences[0].request.request_id

    def cancel(self, request_id: int) -> bool:
        """Drop a request and free its blocks; return whether it was waiting or running."""
        cancelled = self.scheduler.cancel(request_id)
        for sequence in cancelled:
            self._drop_draft(sequence)
        return bool(cancelled)

    def outputs(self) -> Iterator[Output]:
        """Step until no request is left."""
        while self.has_work:
            yield from self.step()

    def stream(self, prompt_token_ids: Sequence[int], params: SamplingParams | None = None) -> Iterator[Output]:
        """Continue one prompt alone, step by step. Closing the iterator cancels the request; an error is raised.

        Raises:
            ValueError: as `submit`; or the engine has other requests, whose outputs would be lost.
        """
        if self.has_work:
            raise ValueError("stream: got an engine with other requests, expected an idle one")
        return self._stream(self.submit(prompt_token_ids, params))

    def embed(
        self, inputs: Sequence[str | Sequence[int]], *, pooling: str = LAST, normalize: bool = True
    ) -> Tensor:
        """Compute one vector for each text, from its hidden states after the model's last norm.

        Args:
            inputs: N texts, with the tokenizer's special tokens around them, or lists of token ids.
            pooling: "last" takes the hidden state of the last token, "mean" the mean over all tokens.
            normalize: divide each vector by its length, so that a product of two is their cosine.
        Returns:
            (N, C) float32 on the CPU.
        Raises:
            ValueError: an empty or too long text, tokens outside the vocabulary, an unknown pooling, texts without a
                tokenizer; or the engine has other requests, whose outputs would be lost.
        """
        if isinstance(inputs, str):
            raise ValueError(f"embed: got the text {inputs[:60]!r}, expected a list of texts or of token ids")
        if self.has_work:
            raise ValueError("embed: got an engine with other requests, expected an idle one")
        sequences = self.preparation.prepare_embeddings(inputs, pooling, normalize)
        vectors = torch.empty(len(sequences), self.config.word_dim)
        rows = {self.add(sequence): row for row, sequence in enumerate(sequences)}
        try:
            for output in self.outputs():
                if output.error:
                    raise output.error
                vectors[rows[output.request_id]] = output.embedding
        finally:
            for request_id in rows:
                self.cancel(request_id)
        return vectors

    def _stream(self, request_id: int) -> Iterator[Output]:
        try:
            for output in self.outputs():
                if output.error:
                    raise output.error
                yield output
        finally:
            self.cancel(request_id)

    def _follow_model(self) -> None:
        """Make a new executor if modules or weights were hooked or replaced since the last request."""
        if self.snapshot.is_current:
            return
        if self.has_work:
            raise ValueError("generate: the model's modules or weights were hooked or replaced while requests run, "
                             "expected an idle engine: finish or cancel its requests first")  # fmt: skip
        self._prepare(self.snapshot.model)

    # ---- a step

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Run the next tokens of all requests.

        Returns:
            New tokens and ends of sequences, errors included; sequences without new tokens are omitted.
        """
        batch = self.scheduler.schedule()
        outputs = [sequence.output(finish_reason="length") for sequence in batch.complete]
        for sequence in batch.preempted:
            self._drop_draft(sequence)
        embedded = [item for item in batch.scheduled if isinstance(item.sequence, EmbeddingSequence)]
        if embedded:
            batch.scheduled = [item for item in batch.scheduled if item not in embedded]
            outputs += self._embed(batch, *self._execute(batch, embedded, self.executor.hidden_states))
        if self.speculation:
            self._propose_drafts(batch)
        batch.scheduled, logits = self._execute(batch, batch.scheduled, self.executor.step)
        if logits is not None:
            for sample in self._sample(batch, logits, self._record_computed(batch, logits)):
                if output := self._isolate(batch, sample[0], self._append, *sample):
                    outputs.append(output)
        return [*outputs, *batch.failures]

    def _propose_drafts(self, batch: Batch) -> None:
        """Propose drafts for the sequences that decode, as far as free blocks can hold them."""
        decoding = [item.sequence for item in batch.scheduled if item.sequence.is_decoding]
        decoding = [sequence for sequence in decoding if not sequence.choices]
        count = MAX_CHECKED // max(len(decoding), 1) - 1
        counts = [min(count, s.max_draft) for s in decoding]
        requests = [(s, DraftRequest(id(s), s.token_ids, n)) for s, n in zip(decoding, counts, strict=True) if n > 0]
        try:
            drafts = self.speculation.propose([request for _, request in requests])
        except INTERRUPTS:
            raise
        except BaseException as error:  # the output does not depend on drafts
            warnings.warn(f"generate: continues without speculation, which failed: {error!r}", stacklevel=2)
            self.speculation = None
            return
        for (sequence, _), draft in zip(requests, drafts, strict=True):
            self.scheduler.allocate_draft(sequence, draft)
            self.proposed += len(sequence.draft)

    def _execute(
        self, batch: Batch, items: list[Scheduled], run: Callable[[Sequence[Chunk]], Tensor]
    ) -> tuple[list[Scheduled], Tensor | None]:
        """Run the chunks of some sequences. If that fails, retry them one by one and end those that raise.

        Returns:
            The sequences that ran, and the rows of their chunks; None if none ran.
        """
        for item in items:
            item.chunk = item.sequence.next_chunk(item.num_tokens)
        if not items:
            return items, None
        try:
            return items, run([item.chunk for item in items])
        except INTERRUPTS:
            raise
        except BaseException:  # of one sequence or of the whole batch: running each sequence alone shows which
            results = [(item, self._isolate(batch, item.sequence, run, [item.chunk])) for item in items]
            results = [(item, rows) for item, rows in results if rows is not None]
            return [item for item, _ in results], torch.cat([rows for _, rows in results]) if results else None

    def _embed(self, batch: Batch, items: list[Scheduled], hidden: Tensor | None) -> list[Output]:
        """Pool the hidden states of a step; return the vectors of the texts that it has ended."""
        parts = () if hidden is None else hidden.split([item.chunk.num_logits for item in items])
        outputs = [self._isolate(batch, item.sequence, self._record_hidden, item, rows)
                   for item, rows in zip(items, parts, strict=True)]  # fmt: skip
        return [output for output in outputs if output]

    def _record_hidden(self, item: Scheduled, rows: Tensor) -> Output | None:
        """Record that a chunk of a text is computed; return the text's vector after its last chunk."""
        sequence = item.sequence
        sequence.add_hidden_states(rows)
        sequence.num_computed += item.num_tokens
        self.scheduler.publish(sequence)
        if not sequence.is_complete:
            return None
        output = sequence.embedded()
        self._end(sequence)
        return output

    def _record_computed(self, batch: Batch, logits: Tensor) -> list[tuple[RunningSequence, range]]:
        """Record that the chunks are computed; return the sequences to sample for, with their rows of logits."""
        to_sample, end = [], 0
        for item in batch.scheduled:
            begin, end = end, end + item.chunk.num_logits
            num_rows = self._isolate(batch, item.sequence, self._record_chunk, item, logits[begin:end])
            if num_rows is not None and item.sequence.num_new == 0:
                to_sample.append((item.sequence, range(end - num_rows, end)))
        return to_sample

    def _record_chunk(self, item: Scheduled, logits: Tensor) -> int:
        """Record that a chunk is computed; return the number of trailing rows to sample from, if it is the last one."""
        sequence = item.sequence
        if sequence.num_computed < sequence.num_prompt:
            sequence.add_prompt_logprobs(item.chunk, logits)
        sequence.num_computed += item.num_tokens
        self.scheduler.publish(sequence)
        return 0 if sequence.is_complete else 1 + len(sequence.draft)

    def _sample(self, batch: Batch, logits: Tensor, to_sample: list[tuple[RunningSequence, range]]) -> list[Sample]:
        """Sample from the rows of each sequence. If it fails, retry one by one and end those that raise."""
        rows = [row for _, sequence_rows in to_sample for row in sequence_rows]
        logits = logits if len(rows) == len(logits) else logits[rows]
        sizes, candidates = [len(sequence_rows) for _, sequence_rows in to_sample], []
        parts = originals = logits.split(sizes)
        if self._vocabulary.padding:
            if any(sequence.params.logprobs is not None for sequence, _ in to_sample):
                originals = logits.clone().split(sizes)
            self._vocabulary.mask(logits, [(s, z) for (s, _), z in zip(to_sample, parts, strict=True)])
        for (sequence, _), z, original in zip(to_sample, parts, originals, strict=True):
            changes = sequence.changes_logits
            unchanged = original.clone() if changes and sequence.params.logprobs is not None else original
            if not changes or self._isolate(batch, sequence, sequence.change_logits, z):
                candidates.append((sequence, z, unchanged))
        if not candidates:
            return []
        if len(candidates) < len(to_sample):
            logits = torch.cat([z for _, z, _ in candidates])
        try:
            return self._choose(candidates, logits)
        except INTERRUPTS:
            raise
        except BaseException:
            alone = [self._isolate(batch, c[0], self._choose, [c], c[1]) for c in candidates]
            return [sample for samples in alone for sample in samples or ()]

    def _choose(self, candidates: list[tuple[RunningSequence, Tensor, Tensor]], logits: Tensor) -> list[Sample]:
        """Choose a token for each row.

        Args:
            candidates: sequences, their rows, and the same rows before penalties, bias and choices.
            logits: all rows.
        """
        rows = [(sequence, row) for sequence, z, _ in candidates for row in range(len(z))]
        params = [sequence.params for sequence, _ in rows]
        uniforms = [sequence.uniform(row) for sequence, row in rows]
        tokens = choose(logits, params, uniforms).tolist() if rows else []
        logprobs: list[TokenLogprob | None] = [None] * len(rows)
        if scored := [i for i, p in enumerate(params) if p.logprobs is not None]:
            unchanged = torch.cat([z for sequence, _, z in candidates if sequence.params.logprobs is not None])
            # `choose` returns vocab_size for NaN logits; `append` raises for it.
            ids = [min(tokens[i], self.config.vocab_size - 1) for i in scored]
            values = log_probabilities(unchanged, ids, [params[i].logprobs for i in scored])
            for i, logprob in zip(scored, values, strict=True):
                logprobs[i] = logprob
        ends = accumulate(len(z) for _, z, _ in candidates)
        return [(sequence, tokens[end - len(z) : end], logprobs[end - len(z) : end])
                for (sequence, z, _), end in zip(candidates, ends, strict=True)]  # fmt: skip

    def _append(self, sequence: RunningSequence, tokens: list[int], logprobs: list[TokenLogprob | None]) -> Output:
        """Append sampled tokens to a sequence, and end the sequence if one of them ends it."""
        has_draft = bool(sequence.draft)
        output = sequence.append(tokens, logprobs, self.config.vocab_size)
        self.accepted += len(output.token_ids) - 1 if has_draft else 0
        if output.finish_reason:
            self._end(sequence)
        return output

    def _isolate(self, batch: Batch, sequence: RunningSequence, function: Callable[..., T], *args) -> T | None:
        """Call a function; if it raises, end this sequence with an error, keep the others, and return None."""
        try:
            return function(*args)
        except INTERRUPTS:
            raise
        except BaseException as error:
            self._end(sequence)
            batch.failures.append(sequence.failed(error))
            return None

    def _end(self, sequence: RunningSequence) -> None:
        self.scheduler.remove(sequence)
        self._drop_draft(sequence)

    def _drop_draft(self, sequence: RunningSequence) -> None:
        if self.speculation:
            self.speculation.drop(id(sequence))
