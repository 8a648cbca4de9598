"""One row of logits as a distribution over tokens: engine/sampling/token_distribution.h, in float64."""

import numpy as np

UNDEFINED_LOGPROB = -99999.0


class TokenDistribution:
    """softmax(logits / temperature), restricted to the top_k tokens and then to the smallest set of the most probable
    ones whose share of what is left reaches top_p, as transformers' TopKLogitsWarper and TopPLogitsWarper in this
    order; ties go to the lower token. Temperature 0 is greedy. top_k <= 0 and top_p >= 1 are off."""

    def __init__(self, logits: np.ndarray, temperature: float, top_k: int = -1, top_p: float = 1.0):
        """`logits`: float32 (vocab)."""
        self._logits = logits
        self._max = logits.max()  # NaN where there is one
        self.finite = bool(np.isfinite(self._max))
        if not self.finite:
            return
        with np.errstate(divide="ignore", over="ignore"):
            inverse = np.float32(1.0) / np.float32(temperature)
        self._greedy = not temperature > 0 or not np.isfinite(inverse)
        self._inverse = 1.0 if self._greedy else float(inverse)
        self._weights = np.exp((logits.astype(np.float64) - np.float64(self._max)) * self._inverse)
        self._total = self._weights.sum()
        self._kept = None  # token ids, best first; None: all, in the order of their ids
        cut_k = 0 < top_k < len(logits)
        if not self._greedy and (cut_k or top_p < 1.0):
            self._kept = self._truncated(top_k if cut_k else len(logits), top_p)

    def _best(self, count: int) -> np.ndarray:
        return np.lexsort((np.arange(len(self._logits)), -self._logits.astype(np.float64)))[:count]

    def _truncated(self, count: int, top_p: float) -> np.ndarray:
        best = self._best(count)
        if top_p >= 1.0:
            return best
        cumulative = np.cumsum(self._weights[best])
        limit = top_p * (self._total if count == len(self._logits) else cumulative[-1])
        return best[: int(np.searchsorted(cumulative, limit, side="left")) + 1]

    def draw(self, unit: float) -> int:
        """The token at `unit` of the cumulative distribution; the greedy token at temperature 0."""
        if self._greedy:
            return int(np.argmax(self._logits))
        weights = self._weights if self._kept is None else self._weights[self._kept]
        cumulative = np.cumsum(weights)
        last = int(np.flatnonzero(weights)[-1])  # rounding must not reach a token without weight
        index = min(int(np.searchsorted(cumulative, unit * cumulative[-1], side="right")), last)
        return index if self._kept is None else int(self._kept[index])

    def logprob(self, token) -> np.ndarray:
        """log-softmax of logits / temperature (temperature 0: of the logits), before top_k and top_p; of one token or
        many."""
        centred = self._logits[token].astype(np.float64) - np.float64(self._max)
        return (centred * self._inverse - np.log(self._total)).astype(np.float32)

    def top(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k most probable tokens, best first, with logprob(): (k,) each. Cells beyond the vocabulary are
        undefined."""
        tokens, logprobs = np.zeros(k, np.int32), np.full(k, UNDEFINED_LOGPROB, np.float32)
        best = self._best(k)
        tokens[: len(best)], logprobs[: len(best)] = best, self.logprob(best)
        return tokens, logprobs
