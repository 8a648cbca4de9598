"""Every family against transformers + peft: logprobs, adapter gradients, a loss curve."""

import pytest
import torch
from losses import datum_loss, model_logprobs
from models import lora_parameters, peft_model, write_adapter
from probe import one_call, run_probe


def relative_errors(actual: dict, expected: dict) -> dict:
    assert set(actual) == set(expected)
    return {name: float((actual[name] - e).norm() / (e.norm() + 1e-12)) for name, e in expected.items()}


def reference_gradients(model, datums, loss="cross_entropy", config=None):
    model.zero_grad()
    logprobs, total = [], 0.0
    for datum in datums:
        lp = model_logprobs(model, datum)
        value = datum_loss(loss, lp, datum, config or {})
        value.backward()
        total += float(value.detach())
        logprobs.append(lp.detach().flatten())
    return torch.cat(logprobs), total, {n: p.grad.clone() for n, p in lora_parameters(model).items()}


def test_logprobs_and_gradients(family, checkpoints, datums, tmp_path):
    checkpoint = checkpoints(family)
    model = peft_model(checkpoint, rank=8)
    adapter = write_adapter(lora_parameters(model), 8, tmp_path / "adapter")
    logprobs, loss, gradients = reference_gradients(model, datums)
    job = {"adapters": [{"dir": str(adapter)}], "steps": [{"calls": [one_call(datums)]}]}
    result = run_probe(checkpoint, job, tmp_path / "out")
    assert (result.logprobs() - logprobs).abs().max() <= 2e-5
    assert result.losses()[0][0] == pytest.approx(loss, rel=1e-5, abs=1e-3)
    errors = relative_errors(result.gradients(), gradients)
    assert max(errors.values()) <= 2e-5, errors


@pytest.mark.parametrize("recompute", ["norms_mlp", "block"])
def test_recompute_changes_nothing(recompute, checkpoints, datums, tmp_path):
    checkpoint = checkpoints("qwen3-qk-norm")
    job = {"adapters": [{"rank": 4, "seed": 3}], "steps": [{"calls": [one_call(datums)], "adam": {}}, {"calls": [one_call(datums)]}]}
    kept = run_probe(checkpoint, job, tmp_path / "kept")
    again = run_probe(checkpoint, {**job, "recompute": recompute}, tmp_path / "again")
    for name, gradient in kept.gradients().items():
        assert torch.equal(gradient, again.gradients()[name]), name


@pytest.mark.parametrize(
    "targets", [dict(attn=False), dict(mlp=False), dict(unembed=False), dict(attn=False, mlp=False)], ids=str
)
@pytest.mark.parametrize("rank", [1, 32])
def test_targets_and_ranks(rank, targets, checkpoints, datums, tmp_path):
    checkpoint = checkpoints("llama-tied-9-3-heads")
    model = peft_model(checkpoint, rank=rank, **targets)
    adapter = write_adapter(lora_parameters(model), rank, tmp_path / "adapter")
    logprobs, _, gradients = reference_gradients(model, datums)
    job = {"adapters": [{"dir": str(adapter)}], "steps": [{"calls": [one_call(datums)]}]}
    result = run_probe(checkpoint, job, tmp_path / "out")
    assert (result.logprobs() - logprobs).abs().max() <= 2e-5
    errors = relative_errors(result.gradients(), gradients)
    assert max(errors.values()) <= 2e-5, errors


def test_twenty_step_loss_curve(checkpoints, datums, tmp_path):
    checkpoint = checkpoints("llama-tied-9-3-heads")
    for datum in datums:
        datum["weights"] = [1.0] * len(datum["tokens"])
    tokens = sum(len(d["tokens"]) for d in datums)
    model = peft_model(checkpoint, rank=8)
    adapter = write_adapter(lora_parameters(model), 8, tmp_path / "adapter")
    adam = dict(learning_rate=2e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.01)
    job = {"adapters": [{"dir": str(adapter)}], "steps": [{"calls": [one_call(datums)], "adam": adam}] * 20}
    result = run_probe(checkpoint, job, tmp_path / "out")

    optimizer = torch.optim.AdamW(
        list(lora_parameters(model).values()), lr=2e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01
    )
    curve = []
    for _ in range(20):
        _, loss, _ = reference_gradients(model, datums)
        optimizer.step()
        curve.append(loss / tokens)
    ours = [losses[0] / tokens for losses in result.losses()]
    assert ours[-1] < ours[0] - 0.1
    assert max(abs(a - b) for a, b in zip(ours, curve, strict=True)) <= 1e-4
