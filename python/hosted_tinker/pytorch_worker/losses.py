"""The losses of docs/losses.md over one datum's targets, with PyTorch's gradient."""

import torch

from hosted_tinker.pytorch_worker.errors import WorkerError

# LossKind of src/worker_protocol/losses.h
CROSS_ENTROPY, IMPORTANCE_SAMPLING, PPO, CISPO, DRO, GSPO, STABLE_REINFORCE = range(1, 8)


def token_loss(kind: int, config, lp: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum over `lp` (float64, one a target) for the protocol's LossConfig. `inputs` as in TrainBatch; absent ones
    are not given. A target with weight (or advantage) 0 contributes exactly 0 whatever its logprob."""
    if kind == CROSS_ENTROPY:
        weights = inputs.get("weights")
        if weights is None:
            return -lp.sum()
        kept = weights != 0
        return -(weights[kept] * lp[kept]).sum()

    ratio = _sequence_ratio(lp, inputs) if kind == GSPO else None
    kept = inputs["advantages"] != 0 if kind != DRO else torch.ones_like(lp, dtype=torch.bool)
    lp, q, advantage = lp[kept], inputs["logprobs"][kept], inputs["advantages"][kept]
    low = inputs["clip_low_threshold"][kept] if "clip_low_threshold" in inputs else config.clip_low_threshold
    high = inputs["clip_high_threshold"][kept] if "clip_high_threshold" in inputs else config.clip_high_threshold
    if kind == DRO:
        return -(lp * advantage - 0.5 * config.beta * (lp - q) ** 2).sum()
    # A sequence's ratio is the value of each of its tokens', with the gradient of the token's own logprob.
    ratio = torch.exp(lp - q) if ratio is None else ratio * torch.exp(lp - lp.detach())
    if kind == IMPORTANCE_SAMPLING:
        return -(ratio * advantage).sum()
    if kind in (PPO, GSPO):
        return -torch.minimum(ratio * advantage, _clip(ratio, low, high) * advantage).sum()
    if kind == CISPO:
        return -(_clip(ratio, low, high).detach() * advantage * lp).sum()
    if kind == STABLE_REINFORCE:
        return -(torch.clamp(ratio, max=config.ratio_max).detach() * advantage * lp).sum()
    raise WorkerError(f"there is no loss number {kind}")


def _clip(ratio: torch.Tensor, low, high) -> torch.Tensor:
    if isinstance(low, float) and isinstance(high, float):
        return torch.clamp(ratio, low, high)
    bounds = (torch.as_tensor(bound, dtype=ratio.dtype, device=ratio.device) for bound in (low, high))
    return torch.clamp(ratio, *(bound.expand_as(ratio) for bound in bounds))


def _sequence_ratio(lp: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """exp(mean over the mask of (lp - q)); an all-zero mask: 1. A constant to the gradient."""
    difference = lp.detach() - inputs["logprobs"]
    mask = inputs.get("sequence_ratio_mask")
    if mask is not None:
        difference = difference[mask != 0]
    return torch.exp(difference.mean()) if difference.numel() else torch.ones((), dtype=lp.dtype, device=lp.device)
