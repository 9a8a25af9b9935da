"""Zero-shot answers: choose by the log-probabilities that a model gives to texts, without training for the task.

    acceptable:   mean_t log p(x_t | x_<t) > threshold                                        (CoLA)
    restricted:   argmax_w log p(w | text, cue)                                               (SST-2, cue " very")
    best answer:  argmax_a mean_t log p(a_t | context, a_<t)                                  (RACE)
    Winograd:     argmax_r mean_t log p(rest_t | text with r in the pronoun's place, rest_<t) (DPRD)

Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", section 5, "Zero-shot Behaviors";
Trinh and Le 2018, arXiv:1806.02847 (partial scores of Winograd schemas).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.evaluation.score import Score, Scorer

BLANK = "_"  # in place of a schema's pronoun


class ZeroShot:
    """A Scorer with a tokenizer: scores texts instead of token ids."""

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer):
        self.scorer, self.tokenizer = scorer, tokenizer

    def continuations(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """Score continuations given their contexts.

        Args:
            pairs: (context, continuation); an empty context means that the continuation is a whole text.
        """
        return self.scorer.score(encode_pairs(self.tokenizer, pairs))

    def mean_logprobs(self, texts: Sequence[str]) -> list[float]:
        """Return for each text the mean log-probability of its tokens, in nats."""
        return [score.mean for score in self.continuations([("", text) for text in texts])]

    def acceptable(self, texts: Sequence[str], threshold: float) -> list[bool]:
        """Return for each text whether its mean token log-probability is above a threshold; see `best_threshold`."""
        return [mean > threshold for mean in self.mean_logprobs(texts)]

    def restricted(self, text: str, words: Sequence[str], cue: str = " very") -> int:
        """Return the index of the most likely word after the text and a cue; each word begins with a space."""
        scores = self.continuations([(text + cue, word) for word in words])
        return max(range(len(words)), key=lambda i: scores[i].total)

    def best_answer(self, context: str, answers: Sequence[str]) -> int:
        """Return the index of the answer with the highest mean token log-probability after the context."""
        scores = self.continuations([(context, answer) for answer in answers])
        return max(range(len(answers)), key=lambda i: scores[i].mean)

    def winograd(self, schema: str, referents: Sequence[str]) -> int:
        """Return the index of the referent that makes the text after it most likely.

        Args:
            schema: a sentence with `_` in place of the pronoun, such as "The cup does not fit since _ is too big."
            referents: texts to put in place of the pronoun.
        Raises:
            ValueError: the schema does not have exactly one `_`, or ends with it.
        """
        before, blank, rest = schema.partition(BLANK)
        if not blank or BLANK in rest or not rest.strip():
            raise ValueError(f"winograd: got {schema!r}, expected one {BLANK!r} and text after it")
        scores = self.continuations([(before + referent, rest) for referent in referents])
        return max(range(len(referents)), key=lambda i: scores[i].mean)


def encode_pairs(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], *, add_special_tokens: bool = True
) -> list[tuple[list[int], list[int]]]:
    """Encode contexts and continuations, each pair as one text, and split its tokens.

    Trailing spaces of a context belong to its continuation. A context starts with the tokens that the tokenizer puts
    before a text, such as BOS. An empty context is `Tokenizer.context_ids`.

    Args:
        pairs: (context, continuation).
        add_special_tokens: False for rendered chats, which have their own.
    """
    start = tokenizer.start_ids if add_special_tokens else []
    contexts = dict.fromkeys(context.rstrip() or context for context, _ in pairs)
    counts = {context: len(ids) for context, ids in zip(contexts, _encode_batch(tokenizer, contexts), strict=True)}
    encoded = []
    wholes = _encode_batch(tokenizer, [context + continuation for context, continuation in pairs])
    for (context, _), whole in zip(pairs, wholes, strict=True):
        first = counts[context.rstrip() or context]
        encoded.append((start + whole[:first], whole[first:]) if context else (tokenizer.context_ids, whole))
    return encoded


def _encode_batch(tokenizer: Tokenizer, texts: Iterable[str]) -> list[list[int]]:
    return tokenizer.encode_batch(list(texts), add_special_tokens=False)


def best_threshold(means: Sequence[float], labels: Sequence[bool]) -> float:
    """Return the threshold that classifies the most labeled texts correctly, halfway between two of their means.

    Args:
        means: mean token log-probability of each text.
        labels: whether each text is acceptable.
    Raises:
        ValueError: no texts, or another number of labels than means.
    """
    if not means or len(means) != len(labels):
        raise ValueError(
            f"best_threshold: got {len(means)} means and {len(labels)} labels, expected equal numbers, at least 1"
        )
    ordered = sorted(means)
    cuts = [ordered[0] - 1.0, *((a + b) / 2 for a, b in pairwise(ordered)), ordered[-1] + 1.0]
    return max(cuts, key=lambda cut: sum((mean > cut) == label for mean, label in zip(means, labels, strict=True)))
