"""One sample request: prompt scores, then its samples decoded together over a key/value cache."""

import numpy as np
import torch

from hosted_tinker.pytorch_worker import protocol
from hosted_tinker.pytorch_worker.base_model import BaseModel
from hosted_tinker.pytorch_worker.errors import UserError
from hosted_tinker.pytorch_worker.philox import ALTERNATIVE, SAMPLE, draw_unit
from hosted_tinker.pytorch_worker.stops import StopMatcher
from hosted_tinker.pytorch_worker.token_distribution import UNDEFINED_LOGPROB, TokenDistribution
from hosted_tinker.pytorch_worker.versions import Weights

_STOP, _LENGTH = 0, 1  # StopReason
_MAX_SAMPLES = 4096


def _check_range(value: int, low: int, high: int, what: str) -> None:
    if not low <= value <= high:
        raise UserError(f"{what} is {value}, allowed are {low} to {high}")


def _check_ids(ids: np.ndarray, lowest: int, vocab_size: int, what: str) -> None:
    wrong = ids[(ids < lowest) | (ids >= vocab_size)]
    if len(wrong):
        raise UserError(f"{what} {wrong[0]}: the vocabulary has the ids 0 to {vocab_size - 1}")


class _Sequence:
    def __init__(self, matcher: StopMatcher):
        self.matcher = matcher
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.topk: list[tuple[np.ndarray, np.ndarray]] = []
        self.stop_reason = _LENGTH


class Generation:
    """step() until it returns True; then result(). Draws depend on (seed, sample, position) alone."""

    def __init__(self, model: BaseModel, request, max_seq_len: int, max_sequences: int, table: list[bytes] | None):
        """`request`: the protocol's Sample. `table`: the bytes of tokens, None when there is none. Throws UserError."""
        self._model, self._request = model, request
        self.prompt = protocol.int32(request.prompt)
        self._targets = protocol.int32(request.prompt_targets)
        self._check(model.vocab_size, max_seq_len, table)
        length, params = len(self.prompt), request.params
        self._max_tokens = max(1, max_seq_len - length)
        if params.max_tokens > 0:
            self._max_tokens = min(self._max_tokens, params.max_tokens)
        self._stops = set(protocol.int32(params.stop_tokens).tolist())
        if params.stop_on_eos:
            self._stops |= model.eos_token_ids
        strings = list(params.stop_strings)
        self._sequences = [_Sequence(StopMatcher(strings, table)) for _ in range(request.num_samples)]
        self._width = max_sequences
        self._next = 0  # first sample that has not begun
        self._live: list[int] = []  # samples in the cache's rows
        self._cache = None
        self._scored = False
        self.tokens = 0
        self._make_scores(length)

    def _check(self, vocab: int, max_seq_len: int, table) -> None:
        request, length = self._request, len(self.prompt)
        if length < 1:
            raise UserError("the prompt is empty: at least 1 token is needed")
        if length > max_seq_len:
            raise UserError(f"the prompt has {length} tokens, the context holds {max_seq_len}")
        _check_ids(self.prompt, 0, vocab, "prompt token")
        _check_range(request.num_samples, 1, _MAX_SAMPLES, "num_samples")
        _check_range(request.params.max_tokens, 0, 2**31 - 1, "max_tokens")
        for what in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k"):
            _check_range(getattr(request, what), 0, vocab, what)
        _check_range(request.prompt_logprobs_last_n, 0, max(length - 1, 0), "prompt_logprobs_last_n")
        _check_range(request.target_width, 0, 2**31 - 1, "target_prompt_logprobs' width")
        expected = (length - 1) * request.target_width
        if len(self._targets) != expected:
            raise UserError(f"target_prompt_logprobs has {len(self._targets)} elements, expected {expected}")
        _check_ids(self._targets, -1, vocab, "prompt target token")
        if request.params.stop_strings and table is None:
            raise UserError(
                "stop strings need the model's tokenizer, which this server does not have: give stop token ids"
            )

    # ---- prompt scores

    def _make_scores(self, length: int) -> None:
        request, last_row = self._request, length - 1
        self._logprob_begin = last_row  # first row whose next token's logprob is asked for
        if request.prompt_logprobs or request.topk_prompt_logprobs > 0:
            last_n = request.prompt_logprobs_last_n
            self._logprob_begin = max(0, last_row - last_n) if last_n > 0 else 0
        width, k, alternatives = request.target_width, request.topk_prompt_logprobs, request.prompt_alt_tokens_k
        self._target_begin = 0 if alternatives or width else last_row
        self._prompt_logprobs = np.full(length if request.prompt_logprobs else 0, np.nan, np.float32)
        self._topk = (np.zeros((length, k), np.int32), np.full((length, k), UNDEFINED_LOGPROB, np.float32))
        self._target_logprobs = np.zeros((last_row, width), np.float32)
        shape = (last_row, alternatives)
        self._alternatives = (np.zeros(shape, np.int32), np.zeros(shape, np.float32))

    def _score(self, logits: np.ndarray) -> None:
        """logits (rows, vocab) of the rows before the prompt's last; row p scores the token at p + 1."""
        request, width = self._request, self._request.target_width
        targets = self._targets.reshape(-1, width) if width else None
        for row in range(min(self._logprob_begin, self._target_begin), len(self.prompt) - 1):
            plain = self._distribution(logits[row], row, 1.0)
            if row >= self._logprob_begin:
                if request.prompt_logprobs:
                    self._prompt_logprobs[row + 1] = plain.logprob(self.prompt[row + 1])
                if request.topk_prompt_logprobs > 0:
                    self._topk[0][row + 1], self._topk[1][row + 1] = plain.top(request.topk_prompt_logprobs)
            if width:
                asked = targets[row] >= 0
                self._target_logprobs[row, asked] = plain.logprob(targets[row][asked])
            if request.prompt_alt_tokens_k:
                alternatives = self._distribution(logits[row], row, request.params.temperature)
                for index in range(request.prompt_alt_tokens_k):
                    token = alternatives.draw(draw_unit(request.params.seed, row + 1, index, ALTERNATIVE))
                    self._alternatives[0][row, index] = token
                    self._alternatives[1][row, index] = alternatives.logprob(token)

    def _distribution(self, logits: np.ndarray, position: int, temperature: float, *cut) -> TokenDistribution:
        distribution = TokenDistribution(logits, temperature, *cut)
        if not distribution.finite:
            raise UserError(
                f"the logits at position {position} are not finite: the adapter's weights have diverged"
            )
        return distribution

    # ---- decoding

    def step(self, weights: Weights | None) -> bool:
        """A prompt or one token of every live sample. True: the request is done."""
        with torch.no_grad(), self._model.hooks.applied(*(weights or (None, None))):
            if self._live:
                self._decode()
            else:
                self._begin()
        return not self._live and self._next == len(self._sequences)

    def _begin(self) -> None:
        """The prompt, and the first token of as many samples as are decoded together."""
        scores = not self._scored and min(self._logprob_begin, self._target_begin) < len(self.prompt) - 1
        logits, cache = self._logits(torch.from_numpy(self.prompt.astype(np.int64))[None], None, scores)
        if scores:
            self._score(logits[0])
        self._scored = True
        width = self._width if cache is None or hasattr(cache, "batch_repeat_interleave") else 1
        self._live = list(range(self._next, min(self._next + width, len(self._sequences))))
        self._next += len(self._live)
        if cache is not None and len(self._live) > 1:
            cache.batch_repeat_interleave(len(self._live))
        self._cache = cache
        self._draw(np.broadcast_to(logits[:, -1], (len(self._live), logits.shape[-1])))

    def _decode(self) -> None:
        made = [self._sequences[sample].tokens for sample in self._live]
        if self._cache is None:  # a model without one: whole sequences, all of one length
            inputs = torch.tensor([[*self.prompt.tolist(), *tokens] for tokens in made])
        else:
            inputs = torch.tensor([tokens[-1:] for tokens in made])
        logits, self._cache = self._logits(inputs, self._cache, False)
        self._draw(logits[:, -1])

    def _logits(self, tokens: torch.Tensor, cache, all_rows: bool):
        self.tokens += tokens.numel()
        logits, cache = self._model.cached_logits(tokens.to(self._model.device), cache, all_rows)
        return logits[..., : self._model.vocab_size].cpu().numpy(), cache

    def _draw(self, logits: np.ndarray) -> None:
        """One token for each live sample; those that end leave the cache."""
        params, k = self._request.params, self._request.topk_sample_logprobs
        shared, kept = None, []
        for row, sample in enumerate(self._live):
            sequence = self._sequences[sample]
            position = len(self.prompt) + len(sequence.tokens)
            if shared is None or sequence.tokens:  # the first tokens come from one row
                shared = self._distribution(logits[row], position - 1, params.temperature, params.top_k, params.top_p)
            token = shared.draw(draw_unit(params.seed, position, sample, SAMPLE))
            sequence.tokens.append(token)
            sequence.logprobs.append(float(shared.logprob(token)))
            if k > 0:
                sequence.topk.append(shared.top(k))
            if sequence.matcher.feed(token) or token in self._stops:
                sequence.stop_reason = _STOP
            elif len(sequence.tokens) < self._max_tokens:
                kept.append(row)
        if not kept:
            self._cache = None
        elif self._cache is not None and len(kept) < len(self._live):
            self._cache.batch_select_indices(torch.tensor(kept, device=self._model.device))
        self._live = [self._live[row] for row in kept]

    def result(self):
        request = self._request
        result = protocol.SampleResult(
            prompt_logprobs=protocol.to_bytes(self._prompt_logprobs, "<f4"),
            target_prompt_logprobs=protocol.to_bytes(self._target_logprobs, "<f4"),
            prompt_alt_tokens=protocol.to_bytes(self._alternatives[0], "<i4"),
            prompt_alt_logprobs=protocol.to_bytes(self._alternatives[1], "<f4"),
        )
        if request.topk_prompt_logprobs > 0:
            _fill_topk(result.topk_prompt, request.topk_prompt_logprobs, *self._topk)
        for sequence in self._sequences:
            into = result.sequences.add(stop_reason=sequence.stop_reason)
            into.tokens = protocol.to_bytes(sequence.tokens, "<i4")
            into.logprobs = protocol.to_bytes(sequence.logprobs, "<f4")
            if request.topk_sample_logprobs > 0:
                _fill_topk(into.topk, request.topk_sample_logprobs, *zip(*sequence.topk))
        return result


def _fill_topk(message, k: int, tokens, logprobs) -> None:
    message.k = k
    message.token_ids = protocol.to_bytes(tokens, "<i4")
    message.logprobs = protocol.to_bytes(logprobs, "<f4")
