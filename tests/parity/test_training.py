"""Losses, batching and the optimizer against plain PyTorch."""

import random

import pytest
import torch
from conftest import make_datum
from losses import model_logprobs
from models import VOCAB, in_float64, lora_parameters, peft_model, write_adapter
from probe import one_call, run_probe
from test_families import reference_gradients, relative_errors

MODEL = "llama-tied-9-3-heads"


def policy_datums(model, clip_tensors=False):
    """Sampling logprobs near the model's own, so that every branch of the clipped losses is met."""
    rng = random.Random(11)
    made = []
    for length in (23, 4, 9):
        datum = make_datum(rng, length)
        del datum["weights"]
        with torch.no_grad():
            lp = model_logprobs(model, datum)
        datum["logprobs"] = [float(x) + rng.gauss(0, 0.4) for x in lp]
        datum["advantages"] = [rng.choice([-1.5, 0.0, 0.7, 2.0]) for _ in range(length)]
        if clip_tensors:
            datum["clip_low_threshold"] = [rng.uniform(0.5, 0.9) for _ in range(length)]
            datum["clip_high_threshold"] = [rng.uniform(1.1, 1.5) for _ in range(length)]
        made.append(datum)
    return made


@pytest.mark.parametrize(
    "loss,config,clip_tensors",
    [
        ("importance_sampling", {}, False),
        ("ppo", {}, False),
        ("ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.05}, False),
        ("ppo", {}, True),
        ("cispo", {}, False),
        ("cispo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.1}, False),
        ("cispo", {}, True),
        ("dro", {"beta": 0.3}, False),
        ("gspo", {}, False),
        ("gspo", {"clip_low_threshold": 0.99, "clip_high_threshold": 1.01}, False),
        ("gspo", {}, True),
        ("stable_reinforce", {}, False),
        ("stable_reinforce", {"ratio_max": 1.1}, False),
    ],
)
def test_policy_losses(loss, config, clip_tensors, checkpoints, tmp_path):
    checkpoint = checkpoints(MODEL)
    model = peft_model(checkpoint)
    adapter = write_adapter(lora_parameters(model), 8, tmp_path / "adapter")
    datums = policy_datums(model, clip_tensors)
    if loss == "gspo":
        for datum in datums:
            datum["sequence_ratio_mask"] = [float(a != 0) for a in datum["advantages"]]
    with in_float64(model):  # float32's own rounding would be as large as the tolerance
        logprobs, value, gradients = reference_gradients(model, datums, loss, config)
    calls = [one_call(datums, loss, config), one_call(datums, loss, config, backward=False)]
    job = {"adapters": [{"dir": str(adapter)}], "steps": [{"calls": calls}]}
    result = run_probe(checkpoint, job, tmp_path / "out")
    assert (result.logprobs() - logprobs).abs().max() <= 2e-5
    for losses in result.losses():
        assert losses[0] == pytest.approx(value, rel=2e-5, abs=2e-4)
    errors = relative_errors(result.gradients(), gradients)
    assert max(errors.values()) <= 2e-5, errors


@pytest.mark.parametrize("weights", [True, False])
def test_cross_entropy_with_several_targets(weights, checkpoints, tmp_path):
    rng = random.Random(5)
    datums = []
    for length in (12, 300):  # more rows than a chunk of the head
        datum = make_datum(rng, length)
        datum["targets"] = [[rng.randrange(VOCAB) for _ in range(3)] for _ in range(length)]
        datum["weights"] = [[rng.gauss(0, 1) for _ in range(3)] for _ in range(length)]
        if not weights:
            del datum["weights"]
        datums.append(datum)
    checkpoint = checkpoints("qwen3-tied")
    model = peft_model(checkpoint)
    adapter = write_adapter(lora_parameters(model), 8, tmp_path / "adapter")
    logprobs, value, gradients = reference_gradients(model, datums)
    job = {"adapters": [{"dir": str(adapter)}], "steps": [{"calls": [one_call(datums)]}]}
    result = run_probe(checkpoint, job, tmp_path / "out")
    assert (result.logprobs() - logprobs).abs().max() <= 2e-5
    assert result.losses()[0][0] == pytest.approx(value, rel=2e-5, abs=2e-3)
    errors = relative_errors(result.gradients(), gradients)
    assert max(errors.values()) <= 2e-5, errors


def test_zero_weights_give_exactly_zero_gradients(checkpoints, datums, tmp_path):
    for datum in datums:
        datum["weights"] = [0.0] * len(datum["tokens"])
    job = {"adapters": [{"rank": 8, "seed": 1}], "steps": [{"calls": [one_call(datums)]}]}
    result = run_probe(checkpoints(MODEL), job, tmp_path / "out")
    assert result.losses() == [[0.0]]
    assert all(torch.count_nonzero(g) == 0 for g in result.gradients().values())


def test_one_call_of_eight_datums_is_eight_calls_of_one(checkpoints, tmp_path):
    checkpoint = checkpoints("mistral-sliding-window")
    model = peft_model(checkpoint)
    adapter = write_adapter(lora_parameters(model), 8, tmp_path / "adapter")
    rng = random.Random(3)
    datums = [make_datum(rng, rng.randrange(1, 30)) for _ in range(8)]
    job = {"adapters": [{"dir": str(adapter)}]}
    together = run_probe(checkpoint, {**job, "steps": [{"calls": [one_call(datums)]}]}, tmp_path / "together")
    alone = run_probe(checkpoint, {**job, "steps": [{"calls": [one_call([d]) for d in datums]}]}, tmp_path / "alone")
    logprobs = torch.cat([alone.logprobs(call=i) for i in range(8)])
    assert (together.logprobs() - logprobs).abs().max() <= 1e-5
    assert together.losses()[0][0] == pytest.approx(sum(c[0] for c in alone.losses()), rel=1e-5)
    assert max(relative_errors(together.gradients(), alone.gradients()).values()) <= 1e-5


def test_adapters_of_unequal_rank_and_loss_share_a_batch(checkpoints, datums, tmp_path):
    checkpoint = checkpoints("qwen2-biases-tied")
    shapes = [dict(rank=4), dict(rank=32, mlp=False), dict(rank=1, unembed=False)]
    adapters, items, expected = [], [], []
    for i, shape in enumerate(shapes):
        model = peft_model(checkpoint, seed=i, **shape)
        adapters.append({"dir": str(write_adapter(lora_parameters(model), shape["rank"], tmp_path / f"adapter{i}"))})
        loss = ["cross_entropy", "gspo", "ppo"][i]
        mine = datums if loss == "cross_entropy" else policy_datums(model)
        with in_float64(model):
            expected.append(reference_gradients(model, mine, loss))
        items.append({"adapter": i, "loss": loss, "datums": mine})
    job = {"adapters": adapters, "steps": [{"calls": [{"backward": True, "items": items}]}]}
    result = run_probe(checkpoint, job, tmp_path / "out")
    for i, (logprobs, loss, gradients) in enumerate(expected):
        assert (result.logprobs(item=i) - logprobs).abs().max() <= 2e-5
        assert result.losses()[0][i] == pytest.approx(loss, rel=2e-5, abs=2e-4)
        assert max(relative_errors(result.gradients(i), gradients).values()) <= 2e-5


def test_the_same_job_gives_the_same_bits(checkpoints, datums, tmp_path):
    job = {"adapters": [{"rank": 8, "seed": 2}], "steps": [{"calls": [one_call(datums)], "adam": {}}] * 3}
    first = run_probe(checkpoints("qwen3-qk-norm"), job, tmp_path / "first")
    second = run_probe(checkpoints("qwen3-qk-norm"), job, tmp_path / "second")
    assert first.losses() == second.losses()
    for name in ("weights0/adapter_model.safetensors", "weights0/optimizer.safetensors", "state0.safetensors"):
        assert (first.directory / name).read_bytes() == (second.directory / name).read_bytes(), name


@pytest.mark.parametrize(
    "adam",
    [
        dict(learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-12),
        dict(learning_rate=1e-2, beta1=0.8, beta2=0.999, eps=1e-8, weight_decay=0.1),
        dict(learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, grad_clip_norm=0.5),
    ],
)
def test_adamw_on_identical_gradients(adam, checkpoints, tmp_path):
    checkpoint = checkpoints(MODEL)
    model = peft_model(checkpoint, rank=4)
    parameters = lora_parameters(model)
    adapter = write_adapter(parameters, 4, tmp_path / "adapter")
    generator = torch.Generator().manual_seed(0)
    steps, gradients = [], []
    for i in range(5):
        gradient = {n: torch.randn(p.shape, generator=generator) for n, p in parameters.items()}
        gradients.append(gradient)
        steps.append({"gradients": str(write_adapter(gradient, 4, tmp_path / f"gradient{i}")), "adam": adam})
    result = run_probe(checkpoint, {"adapters": [{"dir": str(adapter)}], "steps": steps}, tmp_path / "out")

    optimizer = torch.optim.AdamW(
        list(parameters.values()),
        lr=adam["learning_rate"],
        betas=(adam["beta1"], adam["beta2"]),
        eps=adam["eps"],
        weight_decay=adam.get("weight_decay", 0.0),
        foreach=False,
    )
    norms = []
    for gradient in gradients:
        for name, parameter in parameters.items():
            parameter.grad = gradient[name].clone()
        norms.append(float(torch.nn.utils.clip_grad_norm_(list(parameters.values()), adam.get("grad_clip_norm") or 1e30)))
        optimizer.step()
    assert [m["grad_norm"] for m in result.report["metrics"]] == pytest.approx(norms, rel=1e-5)
    ours, moments = result.weights(), result.optimizer()
    assert int(moments["step"]) == 5
    for name, parameter in parameters.items():
        torch.testing.assert_close(ours[name], parameter.detach(), rtol=1e-6, atol=1e-7)
        state = optimizer.state[parameter]
        torch.testing.assert_close(moments[name + ".exp_avg"], state["exp_avg"], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(moments[name + ".exp_avg_sq"], state["exp_avg_sq"], rtol=1e-6, atol=1e-7)
