"""Adapters in flat float32 buffers, and the hooks that apply one to the base model."""

import contextlib
import dataclasses

import torch

from hosted_tinker.pytorch_worker.errors import UserError
from hosted_tinker.pytorch_worker.philox import initial_lora_a
from hosted_tinker.pytorch_worker.sites import ATTN, MLP, UNEMBED, Site

ALPHA = 32  # whatever the rank


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    rank: int
    seed: int
    train_attn: bool
    train_mlp: bool
    train_unembed: bool

    @staticmethod
    def of(message) -> "LoraConfig":
        """From the protocol's LoraConfig."""
        return LoraConfig(message.rank, message.seed, message.train_attn, message.train_mlp, message.train_unembed)

    def trains(self, group: str) -> bool:
        return {ATTN: self.train_attn, MLP: self.train_mlp, UNEMBED: self.train_unembed}[group]

    def shape(self) -> str:
        on = {True: "on", False: "off"}
        return (
            f"rank {self.rank}, attn {on[self.train_attn]}, mlp {on[self.train_mlp]}, unembed {on[self.train_unembed]}"
        )


class Layout:
    """Where each site's A (rank, in) and B (out, rank) lie in a flat buffer."""

    def __init__(self, sites: list[Site], config: LoraConfig):
        if not 1 <= config.rank <= 256 or config.rank & (config.rank - 1):
            raise UserError(f"LoRA rank {config.rank}: allowed are the powers of two from 1 to 256")
        self.config = config
        self.all_sites = sites
        self.sites = [site for site in sites if config.trains(site.group)]  # that this adapter has
        self.offsets, offset = [], 0
        for site in self.sites:
            middle = offset + config.rank * site.in_features
            end = middle + config.rank * site.out_features
            self.offsets.append((offset, middle, end))
            offset = end
        self.numel = offset
        if not self.sites:
            raise UserError("an adapter must train at least one of attention, MLP and unembedding")

    def factors(self, flat: torch.Tensor):
        """(site, A, B) views into `flat`."""
        rank = self.config.rank
        for site, (begin, middle, end) in zip(self.sites, self.offsets):
            yield site, flat[begin:middle].view(rank, site.in_features), flat[middle:end].view(site.out_features, rank)


@dataclasses.dataclass
class Adapter:
    layout: Layout
    weights: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: int = 0

    @property
    def nbytes(self) -> int:
        return 4 * self.weights.nbytes


def with_zero_state(layout: Layout, weights: torch.Tensor) -> Adapter:
    return Adapter(layout, weights, *(torch.zeros_like(weights) for _ in range(3)))


def create(layout: Layout, device: torch.device) -> Adapter:
    """A by the counter-based function of (seed, site, element), B zero."""
    flat = torch.zeros(layout.numel, dtype=torch.float32)
    for site, a, _ in layout.factors(flat):
        a.copy_(torch.from_numpy(initial_lora_a(site.module, layout.config.rank, site.in_features, layout.config.seed)))
    return with_zero_state(layout, flat.to(device))


class LoraHooks:
    """Forward hooks on every module with sites. They add nothing until an adapter is active."""

    def __init__(self, model, sites: list[Site]):
        self._active: dict[str, list] = {}  # module path → [(site, A, B)] in the order of rows
        self._scale = 0.0
        for path in dict.fromkeys(site.path for site in sites):
            model.get_submodule(path).register_forward_hook(self._hook(path))

    def _hook(self, path: str):
        def add_delta(_, inputs, output):
            parts = self._active.get(path)
            if not parts:
                return output
            x = inputs[0]
            deltas = []
            for _, a, b in parts:
                down = torch.nn.functional.linear(x, a.to(device=x.device, dtype=x.dtype))
                deltas.append(torch.nn.functional.linear(down, b.to(device=x.device, dtype=x.dtype)))
            delta = deltas[0] if len(deltas) == 1 else torch.cat(deltas, dim=-1)
            return output + delta * self._scale

        return add_delta

    def _activate(self, layout: Layout, factors) -> None:
        self._scale = ALPHA / layout.config.rank
        for site, a, b in factors:
            self._active.setdefault(site.path, []).append((site, a, b))

    @contextlib.contextmanager
    def applied(self, layout: Layout | None, weights: torch.Tensor | None):
        """The adapter in forward passes, without gradients. None: the base model."""
        if layout is not None:
            self._activate(layout, layout.factors(weights))
        try:
            yield
        finally:
            self._active = {}

    @contextlib.contextmanager
    def trained(self, layout: Layout, weights: torch.Tensor, grad: torch.Tensor):
        """The adapter in forward and backward passes; gradients add up in the flat buffer `grad`."""
        factors = []
        for (site, *pair), (_, *gradients) in zip(layout.factors(weights), layout.factors(grad)):
            leaves = [value.detach().requires_grad_() for value in pair]
            for leaf, gradient in zip(leaves, gradients):
                leaf.grad = gradient
            factors.append((site, *leaves))
        self._activate(layout, factors)
        try:
            yield
        finally:
            self._active = {}
