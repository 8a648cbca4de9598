"""Forward and backward of datums, and AdamW."""

import math

import numpy as np
import torch

from hosted_tinker.pytorch_worker import protocol
from hosted_tinker.pytorch_worker.base_model import BaseModel
from hosted_tinker.pytorch_worker.errors import UserError, WorkerError
from hosted_tinker.pytorch_worker.lora import Adapter
from hosted_tinker.pytorch_worker.losses import CROSS_ENTROPY, token_loss

_PER_TARGET = (
    "weights",
    "logprobs",
    "advantages",
    "sequence_ratio_mask",
    "clip_low_threshold",
    "clip_high_threshold",
)


class Batch:
    """The protocol's TrainBatch as arrays, checked."""

    def __init__(self, message, loss: int, vocab_size: int, max_seq_len: int):
        self.tokens = protocol.int32(message.tokens)
        self.offsets = protocol.int32(message.cu_seqlens).astype(np.int64)
        self.widths = protocol.int32(message.target_width).astype(np.int64)
        self.targets = protocol.int32(message.targets)
        self.inputs = {name: protocol.float32(getattr(message, name)) for name in _PER_TARGET if getattr(message, name)}
        self.lengths = np.diff(self.offsets)
        self._check(loss, vocab_size, max_seq_len)
        self.target_offsets = np.concatenate([[0], np.cumsum(self.lengths * self.widths)])

    def _check(self, loss: int, vocab_size: int, max_seq_len: int) -> None:
        if len(self.lengths) < 1:
            raise UserError("the batch has no datum: at least 1 is needed")
        if len(self.widths) != len(self.lengths) or self.offsets[0] != 0 or self.offsets[-1] != len(self.tokens):
            raise WorkerError("the offsets of a training batch do not fit its arrays")
        for index, length in enumerate(self.lengths):
            if length < 1:
                raise UserError(f"datum {index} has no tokens")
            if length > max_seq_len:
                raise UserError(f"datum {index} has {length} tokens, at most {max_seq_len} are allowed")
        if self.widths.min() < 1:
            raise WorkerError("a target width is below 1")
        expected = int((self.lengths * self.widths).sum())
        if len(self.targets) != expected:
            raise UserError(f"target_tokens has {len(self.targets)} elements, expected {expected}")
        for what, ids in (("token", self.tokens), ("target token", self.targets)):
            wrong = ids[(ids < 0) | (ids >= vocab_size)]
            if len(wrong):
                raise UserError(f"{what} {wrong[0]}: the vocabulary has the ids 0 to {vocab_size - 1}")
        for name, values in self.inputs.items():
            if len(values) != expected:
                raise UserError(f"{name} has {len(values)} elements, target_tokens has {expected}")
        if loss != CROSS_ENTROPY and not {"logprobs", "advantages"} <= self.inputs.keys():
            raise UserError("this loss needs logprobs and advantages")


def _padded(batch: Batch, datums: range, device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(datums, longest) tokens, zeros behind the shorter ones, and the mask of what is real (None: all)."""
    longest = int(batch.lengths[datums.start : datums.stop].max())
    tokens = torch.zeros(len(datums), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, datum in enumerate(datums):
        begin, end = batch.offsets[datum : datum + 2]
        tokens[row, : end - begin] = torch.from_numpy(batch.tokens[begin:end].astype(np.int64))
        mask[row, : end - begin] = 1
    return tokens.to(device), None if bool(mask.all()) else mask.to(device)


def run(model: BaseModel, adapter: Adapter, request, batch: Batch, datums: range, grad: torch.Tensor | None):
    """The datums as one padded batch: (logprobs of their targets, float32 numpy; sum of their losses).

    `request`: the protocol's ForwardBackward. `grad`: the flat buffer that the gradient is added to; None: no backward.
    """
    with_grad = grad is not None
    layout, weights = adapter.layout, adapter.weights
    applied = model.hooks.trained(layout, weights, grad) if with_grad else model.hooks.applied(layout, weights)
    with torch.set_grad_enabled(with_grad), applied:
        logits = model.train_logits(*_padded(batch, datums, model.device))
        losses, logprobs = [], []
        for row, datum in enumerate(datums):
            length, width = int(batch.lengths[datum]), int(batch.widths[datum])
            begin, end = batch.target_offsets[datum : datum + 2]
            targets = torch.from_numpy(batch.targets[begin:end].astype(np.int64)).view(length, width).to(logits.device)
            rows = logits[row, :length].float()
            lp = (rows.gather(1, targets) - torch.logsumexp(rows, 1, keepdim=True)).reshape(-1)
            inputs = {
                name: torch.from_numpy(values[begin:end].astype(np.float64)).to(logits.device)
                for name, values in batch.inputs.items()
            }
            losses.append(token_loss(request.loss, request.config, lp.double(), inputs))
            logprobs.append(lp.detach().cpu().numpy())
        loss = torch.stack(losses).sum()
        if with_grad and loss.requires_grad:
            loss.backward()
    return np.concatenate(logprobs), float(loss.detach())


def optim_step(adapter: Adapter, params) -> dict[str, float]:
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019), as torch.optim.AdamW; clears the gradient.

    A gradient that is not finite is refused: weights and moments stay, the gradient is cleared.
    """
    norm = float(adapter.grad.double().norm())
    if not math.isfinite(norm):
        adapter.grad.zero_()
        raise UserError(
            f"the gradient is not finite (its norm is {norm}): the step was skipped, weights and moments are "
            "unchanged, the gradient is cleared"
        )
    adapter.step += 1
    grad = adapter.grad
    if params.grad_clip_norm > 0:
        grad = grad * min(1.0, params.grad_clip_norm / (norm + 1e-6))
    adapter.weights.mul_(1.0 - params.learning_rate * params.weight_decay)
    adapter.exp_avg.lerp_(grad, 1.0 - params.beta1)
    adapter.exp_avg_sq.mul_(params.beta2).addcmul_(grad, grad, value=1.0 - params.beta2)
    bias1, bias2 = 1.0 - params.beta1**adapter.step, 1.0 - params.beta2**adapter.step
    denominator = adapter.exp_avg_sq.sqrt().div_(math.sqrt(bias2)).add_(params.eps)
    adapter.weights.addcdiv_(adapter.exp_avg, denominator, value=-params.learning_rate / bias1)
    adapter.grad.zero_()
    return {"grad_norm": norm, "learning_rate": params.learning_rate, "step": float(adapter.step)}
