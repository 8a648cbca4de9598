"""A trained model with real text, SmolLM2-135M: our error against float64 is that of Hugging Face's own float32.

The reference is transformers + peft in float64 (models.in_float64).
"""

import contextlib

import pytest
import torch
from models import in_float64, lora_parameters, peft_model, write_adapter
from probe import one_call, run_probe
from transformers import AutoTokenizer

from hosted_tinker import embedded_model

TEXTS = [
    "The capital of France is Paris, a city on the river Seine.",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\nSunlight is scattered by the molecules of "
    "the air. Blue light has a shorter wavelength and is scattered more than red light, so that it reaches the eye from "
    "every direction of the sky. At sunset the light takes a longer way through the air, most of the blue is scattered "
    "out of it, and what remains is red.<|im_end|>\n",
]
PROMPTS = ["The capital of France is", "Once upon a time", "def add(a, b):\n    return"]


@pytest.fixture(scope="module")
def checkpoint():
    return embedded_model.ensure()


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint):
    """In float32, with a random adapter, B ≠ 0."""
    return peft_model(checkpoint, rank=8)


def reference(model, datums):
    """Logprobs of all targets and the adapter's gradients, in the model's dtype."""
    model.zero_grad()
    logprobs = []
    for datum in datums:
        logits = model(input_ids=torch.tensor([datum["tokens"]])).logits[0]
        lp = torch.log_softmax(logits, -1).gather(1, torch.tensor(datum["targets"])[:, None])[:, 0]
        (-lp.sum()).backward()
        logprobs.append(lp.detach())
    return torch.cat(logprobs), {name: p.grad.clone() for name, p in lora_parameters(model).items()}


def test_error_is_that_of_float32(checkpoint, tokenizer, model, tmp_path):
    datums = []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        datums.append({"tokens": ids[:-1], "targets": ids[1:], "weights": [1.0] * (len(ids) - 1)})
    adapter = write_adapter(lora_parameters(model), 8, tmp_path / "adapter")
    job = {"adapters": [{"dir": str(adapter)}], "steps": [{"calls": [one_call(datums)]}]}
    result = run_probe(checkpoint, job, tmp_path / "out")
    theirs, their_gradients = reference(model, datums)
    with in_float64(model):
        truth, gradients = reference(model, datums)
    ours, our_gradients = result.logprobs(), result.gradients()
    assert truth.dtype == torch.float64

    def root_mean_square(values):
        return float((values - truth).pow(2).mean().sqrt())

    print(f"logprobs, root mean square error: ours {root_mean_square(ours):.2e}, theirs {root_mean_square(theirs):.2e}")
    assert root_mean_square(ours) <= 1.5 * root_mean_square(theirs)
    assert float((ours - truth).abs().max()) <= 2 * float((theirs - truth).abs().max())

    def relative(values):
        """Of the whole gradient, and the worst tensor's."""
        errors = {name: float((values[name] - g).norm()) for name, g in gradients.items()}
        norms = {name: float(g.norm()) for name, g in gradients.items()}
        whole = sum(e**2 for e in errors.values()) ** 0.5 / sum(n**2 for n in norms.values()) ** 0.5
        return whole, max(errors[name] / norms[name] for name in errors)

    (our_whole, our_worst), (their_whole, their_worst) = relative(our_gradients), relative(their_gradients)
    print(f"gradient: ours {our_whole:.2e}, worst {our_worst:.2e}; theirs {their_whole:.2e}, worst {their_worst:.2e}")
    assert our_whole <= 1.5 * their_whole
    assert our_worst <= 1.5 * their_worst


@pytest.mark.parametrize("with_adapter", [False, True], ids=["base", "adapter"])
def test_greedy_tokens_are_those_of_generate(with_adapter, checkpoint, tokenizer, model, tmp_path):
    """Up to the first position whose best two tokens are closer than rounding."""
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    adapter = write_adapter(lora_parameters(model), 8, tmp_path / "adapter")
    jobs = [{"prompt": prompt, "max_tokens": 40, **({"adapter": 0} if with_adapter else {})} for prompt in prompts]
    result = run_probe(checkpoint, {"adapters": [{"dir": str(adapter)}], "steps": [], "generate": jobs}, tmp_path / "out")
    compared = 0
    for i, prompt in enumerate(prompts):
        with contextlib.nullcontext() if with_adapter else model.disable_adapter():
            ids = torch.tensor([prompt])
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40,
                                 eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True)
        for step, logits in enumerate(out.logits):
            best = logits[0].topk(2).values
            if best[0] - best[1] <= 1e-4:
                break
            token = int(out.sequences[0, len(prompt) + step])
            assert result.report["generated"][i][step] == token, (i, step)
            logprob = float(torch.log_softmax(logits[0], -1)[token])
            assert float(result.tensors[f"generate{i}.logprobs"][step]) == pytest.approx(logprob, abs=1e-4)
            compared += 1
    assert compared >= 60
