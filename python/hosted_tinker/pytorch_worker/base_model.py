"""Loading a base model through transformers."""

import inspect
from pathlib import Path

import torch
import transformers

from hosted_tinker.pytorch_worker.backend_config import BackendConfig
from hosted_tinker.pytorch_worker.errors import UserError
from hosted_tinker.pytorch_worker.lora import Layout, LoraConfig, LoraHooks
from hosted_tinker.pytorch_worker.sites import find_sites, unreachable_experts


def _check_gpus(config: BackendConfig) -> None:
    count = torch.cuda.device_count()
    for gpu in config.train_gpus:
        if gpu >= count:
            raise UserError(f"backend config: train_gpus names device {gpu}, this machine has {count} GPUs")
    if config.device_map and count == 0:
        raise UserError("backend config: device_map auto needs GPUs, this machine has none")


def _without_dropout(config) -> None:
    """Training is a function of its input: replays give the same bits, forward and forward_backward the same
    logprobs."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for key, value in vars(part).items():
            if ("drop" in key) and isinstance(value, float):
                setattr(part, key, 0.0)


def _placement(config: BackendConfig) -> dict:
    if not torch.cuda.is_available():
        return {}
    gpus = config.train_gpus or (0,)
    if not config.device_map:
        return {"device_map": {"": gpus[0]}}
    if not config.train_gpus:
        return {"device_map": "auto"}
    return {"device_map": "auto", "max_memory": {gpu: torch.cuda.mem_get_info(gpu)[0] for gpu in gpus}}


class BaseModel:
    """The frozen model with its LoRA hooks. `forward` gives float32 logits."""

    def __init__(self, directory: str, config: BackendConfig):
        _check_gpus(config)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        try:
            settings = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=config.trust_remote_code)
        except (ValueError, KeyError) as error:
            raise UserError(f"the model in {directory} cannot be used: {error}") from error
        _without_dropout(settings)
        text = settings.get_text_config()
        dtype = config.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
        options = {"dtype": getattr(torch, dtype), "trust_remote_code": config.trust_remote_code, **_placement(config)}
        if getattr(text, "attn_logit_softcapping", None):
            options["attn_implementation"] = "eager"  # scaled_dot_product_attention has no soft cap
        try:
            self.model = transformers.AutoModelForCausalLM.from_pretrained(directory, config=settings, **options)
        except ValueError as error:
            raise UserError(f"the model in {directory} cannot be used: {error}") from error
        self.model.requires_grad_(False)
        self.model.eval()
        if config.gradient_checkpointing:
            if not self.model.supports_gradient_checkpointing:
                raise UserError(f"backend config: {type(self.model).__name__} has no gradient checkpointing")
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self._checkpointing = config.gradient_checkpointing

        self.name = str(Path(directory))
        self.dtype = dtype
        self.device = self.model.get_input_embeddings().weight.device
        self.vocab_size = self._vocab_size(text)
        self.longest = getattr(text, "max_position_embeddings", None)
        self.pads = (getattr(text, "rope_parameters", None) or {}).get("rope_type") not in ("dynamic", "longrope")
        self.eos_token_ids = self._eos()
        self.sites = find_sites(self.model)
        self.experts = unreachable_experts(self.model)
        self.hooks = LoraHooks(self.model, self.sites)
        self._keeps_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def _vocab_size(self, text) -> int:
        head = self.model.get_output_embeddings()
        rows = self.model.get_input_embeddings().weight.shape[0]
        return min(rows, head.weight.shape[0]) if head is not None else rows

    def _eos(self) -> frozenset[int]:
        generation = getattr(self.model, "generation_config", None)
        ids = generation.eos_token_id if generation is not None else self.model.config.eos_token_id
        return frozenset([ids] if isinstance(ids, int) else ids or [])

    def layout(self, config: LoraConfig) -> Layout:
        if config.train_mlp and self.experts:
            raise UserError(
                f"{self.experts[0]} keeps its experts in one tensor, on which --backend pytorch has no LoRA: "
                "choose train_mlp=False"
            )
        if config.train_unembed and self.model.get_output_embeddings() is None:
            raise UserError(f"{type(self.model).__name__} has no output embedding: choose train_unembed=False")
        return Layout(self.sites, config)

    def train_logits(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """tokens (batch, length) with a mask of the real ones (None: all) → (batch, length, vocab)."""
        self._set_training(self._checkpointing)
        return self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits

    def _set_training(self, training: bool) -> None:
        """transformers checkpoints in training mode alone, and then keeps no cache; dropout there is none."""
        if self.model.training != training:
            self.model.train(training)

    def cached_logits(self, tokens: torch.Tensor, cache, all_rows: bool):
        """tokens (batch, n) behind what `cache` holds (None: nothing) → logits float32 (batch, n or 1, vocab), and the
        cache with them; None from a model that has no such cache."""
        self._set_training(False)
        keep = {} if all_rows or not self._keeps_logits else {"logits_to_keep": 1}
        behind = {} if cache is None else {"past_key_values": cache}
        out = self.model(input_ids=tokens, use_cache=True, **behind, **keep)
        logits = out.logits if all_rows else out.logits[:, -1:]
        return logits.float(), getattr(out, "past_key_values", None)
