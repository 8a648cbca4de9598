"""A plain PyTorch statement of every loss. A datum is a dict of lists; lp the current logprobs of its targets."""

import torch


def _tensor(datum, key, default=None):
    return torch.tensor(datum[key], dtype=torch.float32) if key in datum else default


def datum_loss(name: str, lp: torch.Tensor, datum: dict, config: dict) -> torch.Tensor:
    if name == "cross_entropy":
        return -(_tensor(datum, "weights", torch.ones_like(lp)) * lp).sum()
    q, advantages = _tensor(datum, "logprobs"), _tensor(datum, "advantages")
    ratio = torch.exp(lp - q)
    low = _tensor(datum, "clip_low_threshold", torch.full_like(lp, config.get("clip_low_threshold", 0.8)))
    high = _tensor(datum, "clip_high_threshold", torch.full_like(lp, config.get("clip_high_threshold", 1.2)))
    if name == "importance_sampling":
        return -(ratio * advantages).sum()
    if name == "ppo":
        return -torch.minimum(ratio * advantages, torch.clamp(ratio, low, high) * advantages).sum()
    if name == "cispo":
        low = _tensor(datum, "clip_low_threshold", torch.full_like(lp, config.get("clip_low_threshold", 0.0)))
        high = _tensor(datum, "clip_high_threshold", torch.full_like(lp, config.get("clip_high_threshold", 4.0)))
        return -(torch.clamp(ratio, low, high).detach() * lp * advantages).sum()
    if name == "dro":
        return -(lp * advantages - 0.5 * config.get("beta", 0.05) * (lp - q) ** 2).sum()
    if name == "gspo":
        mask = _tensor(datum, "sequence_ratio_mask", torch.ones_like(lp)) != 0
        s = torch.exp((lp - q)[mask].mean()).detach()
        token_ratio = s * torch.exp(lp - lp.detach())
        return -torch.minimum(token_ratio * advantages, torch.clamp(token_ratio, low, high) * advantages).sum()
    if name == "stable_reinforce":
        return -(torch.clamp(ratio, max=config.get("ratio_max", 2.0)).detach() * advantages * lp).sum()
    raise ValueError(name)


def model_logprobs(model, datum: dict) -> torch.Tensor:
    """Logprobs of a datum's targets, (N) or (N, K), by a forward pass over this datum alone."""
    logits = model(input_ids=torch.tensor([datum["tokens"]])).logits[0]
    targets = torch.tensor(datum["targets"])
    logprobs = torch.log_softmax(logits, -1)
    if targets.dim() == 1:
        return logprobs.gather(1, targets[:, None])[:, 0]
    return logprobs.gather(1, targets)
