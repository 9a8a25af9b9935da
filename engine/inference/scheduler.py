"""Which sequences run in a step, and which blocks they own.

A step runs one token of each decoding sequence and fills the rest of the token budget with prompt tokens, first come
first served. A long prompt takes several steps, so that it does not delay the other sequences. If the cache is full,
the sequence that came last is preempted: it frees its blocks, and its tokens are recomputed later.
So is a sequence that became so long that its tokens have other angles (engine/model/rotary_tables.py).

Kwon et al. 2023, arXiv:2309.06180 (blocks, preemption by recomputation); Agrawal et al. 2023, "SARATHI",
arXiv:2308.16369 (chunked prefill together with decoding).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from peakgpt.engine.inference.block_pool import BlockPool
from peakgpt.engine.inference.chunk import Chunk
from peakgpt.engine.inference.sequence import Output, RunningSequence


@dataclass(eq=False)
class Scheduled:
    """A sequence in a step.

    Args:
        num_tokens: known tokens to run, without the draft.
        chunk: these tokens and the draft.
    """

    sequence: RunningSequence
    num_tokens: int
    chunk: Chunk | None = None


@dataclass(eq=False)
class Batch:
    """One step: the sequences that run in it, and those that end in it.

    Args:
        scheduled: sequences to run; those that fail are removed.
        complete: sequences that need no computation.
        preempted: sequences that lost their blocks.
        failures: outputs of the sequences that failed.
    """

    scheduled: list[Scheduled] = field(default_factory=list)
    complete: list[RunningSequence] = field(default_factory=list)
    preempted: list[RunningSequence] = field(default_factory=list)
    failures: list[Output] = field(default_factory=list)


class Scheduler:
    """Waiting and running sequences, and the block pool that they share."""

    def __init__(self, pool: BlockPool, *, budget: int, max_running: int):
        """
        Args:
            budget: maximum number of tokens of a step.
            max_running: maximum number of sequences that run at once.
        """
        self.pool, self.budget, self.max_running = pool, budget, max_running
        self.waiting: deque[RunningSequence] = deque()
        self.running: list[RunningSequence] = []  # in order of arrival

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequences: Iterable[RunningSequence]) -> None:
        """Queue new sequences."""
        self.waiting.extend(sequences)

    def schedule(self) -> Batch:
        """Plan the next step: how many tokens of each sequence run. Their blocks are allocated."""
        self._restart_outdated()
        tokens_left, num_tokens, batch = self.budget, {}, Batch()
        for sequence in list(self.running):
            new = min(sequence.num_new, max(tokens_left, 1 if sequence.is_decoding else 0))
            if sequence in self.running and new and self._allocate(sequence, sequence.num_computed + new, batch):
                num_tokens[sequence] = new
                tokens_left -= new
        while self.waiting and tokens_left > 0 and len(self.running) < self.max_running:
            if self.waiting[0].is_complete:
                batch.complete.append(self.waiting.popleft())
                continue
            if not self._admit(self.waiting[0]):
                break
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            num_tokens[sequence] = min(sequence.num_new, tokens_left)
            tokens_left -= num_tokens[sequence]
        # Sequences that were preempted after they got their tokens are no longer in `running`.
        batch.scheduled = [Scheduled(s, num_tokens[s]) for s in self.running if s in num_tokens]
        return batch

    def allocate_draft(self, sequence: RunningSequence, draft: list[int]) -> None:
        """Give a sequence as much of a draft as free blocks can hold; no sequence is preempted for it."""
        table, size, known = sequence.block_table, self.pool.block_tokens, len(sequence.token_ids)
        while len(table) * size < known + len(draft) and self.pool.free_blocks:
            table.append(self.pool.allocate())
        sequence.draft = draft[: len(table) * size - known]

    def publish(self, sequence: RunningSequence) -> None:
        """Register the blocks that became full for prefix reuse."""
        full = sequence.num_computed // self.pool.block_tokens
        if full > sequence.num_published:
            sequence.update_hashes(full * self.pool.block_tokens, self.pool.block_tokens)
            for i in range(sequence.num_published, full):
                self.pool.publish(sequence.block_table[i], sequence.block_hashes[i])
            sequence.num_published = full

    def remove(self, sequence: RunningSequence) -> None:
        """End a running sequence and free its blocks."""
        self.release(sequence)
        self.running.remove(sequence)

    def cancel(self, request_id: int) -> list[RunningSequence]:
        """Remove the sequences of a request, waiting or running, and return them."""
        cancelled = [s for s in (*self.waiting, *self.running) if s.request.request_id == request_id]
        for sequence in cancelled:
            self.release(sequence)
        self.waiting = deque(s for s in self.waiting if s.request.request_id != request_id)
        self.running = [s for s in self.running if s.request.request_id != request_id]
        return cancelled

    def release(self, sequence: RunningSequence) -> None:
        """Free a sequence's blocks."""
        for block in sequence.block_table:
            self.pool.release(block)
        sequence.block_table, sequence.num_published, sequence.num_computed = [], 0, 0

    def _restart_outdated(self) -> None:
        """Let the sequences whose keys have the angles of shorter texts wait, so that all their tokens run again."""
        for sequence in [s for s in reversed(self.running) if s.is_outdated]:
            self.remove(sequence)
            self.waiting.appendleft(sequence)
            sequence.block_hashes, sequence.is_outdated = [], False

    def _allocate(self, sequence: RunningSequence, num_tokens: int, batch: Batch) -> bool:
        """Allocate blocks for a running sequence, if necessary by preemption; False if it is preempted itself."""
        while len(sequence.block_table) * self.pool.block_tokens < num_tokens:
            if (block := self.pool.allocate()) is not None:
                sequence.block_table.append(block)
                continue
            last = self.running.pop()
            self.release(last)
            self.waiting.appendleft(last)
            batch.preempted.append(last)
            if last is sequence:
                return False
        return True

    def _admit(self, sequence: RunningSequence) -> bool:
        """Allocate blocks for a waiting sequence, reusing cached blocks of its prefix; False if it must wait."""
        size, pool = self.pool.block_tokens, self.pool
        sequence.update_hashes(len(sequence.token_ids), size)
        usable = sequence.block_hashes[: sequence.first_logit_position // size]
        matched = pool.match_prefix(usable)
        needed = -(-len(sequence.token_ids) // size) - len(matched)
        # A running sequence may be computing the next block of this prefix: wait for it.
        following = usable[len(matched) : len(matched) + 1]
        is_being_computed = any(following[0] in s.block_hashes[s.num_published :] for s in self.running if following)
        if needed > pool.free_blocks or is_being_computed:
            for block in matched:
                pool.release(block)
            return False
        sequence.block_table = [*matched, *(pool.allocate() for _ in range(needed))]
        sequence.num_published, sequence.num_computed = len(matched), len(matched) * size
        return True
