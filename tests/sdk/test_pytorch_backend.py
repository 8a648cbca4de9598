"""`--backend pytorch`: the native engine's numbers where both know the model, and any causal LM of transformers."""

import json

import numpy as np
import peft
import pytest
import tinker
import torch
import transformers
from safetensors.torch import load_file
from tinker import types

import models
from datums import adam, logprobs_of, random_datum, random_tokens, rl_datum, sample_tokens, sequence_datum, train_step
from server import Server

PYTORCH = ("--backend", "pytorch")
START = 300  # seconds: each worker imports torch and transformers, all at once
SIZES = dict(
    vocab_size=384,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.1,
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=0,
)
NATIVE_FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=9, tie_word_embeddings=False),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),
    "smollm2": lambda: transformers.LlamaConfig(
        **{**SIZES, "hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}, tie_word_embeddings=True
    ),
}
OTHER_FAMILIES = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=384,
        n_positions=512,
        n_embd=64,
        n_layer=2,
        n_head=4,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=2,
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        **SIZES, head_dim=16, sliding_window=9, query_pre_attn_scalar=16, final_logit_softcapping=30.0
    ),
    "phi3": lambda: transformers.Phi3Config(**SIZES, sliding_window=None, tie_word_embeddings=False),
    "olmo2": lambda: transformers.Olmo2Config(**SIZES, tie_word_embeddings=False),
}


def write_checkpoint(directory, make_config):
    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_config(make_config(), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    models.write_tokenizer(directory, 320)
    return directory


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {name: write_checkpoint(root / name, make) for name, make in {**NATIVE_FAMILIES, **OTHER_FAMILIES}.items()}


@pytest.fixture(scope="module")
def native(tmp_path_factory, directories):
    served = {name: directories[name] for name in NATIVE_FAMILIES}
    server = Server(served, tmp_path_factory.mktemp("native") / "data").start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def pytorch(tmp_path_factory, directories):
    server = Server(directories, tmp_path_factory.mktemp("pytorch") / "data", *PYTORCH).start(START)
    yield server
    server.stop()


def new_client(service, model, rank=8, **more) -> tinker.TrainingClient:
    return service.create_lora_training_client(base_model=model, rank=rank, seed=3, **more).result()


def ragged(seed):
    return [random_datum(seed + n, 6 + 5 * n) for n in range(4)]


def rl_data(seed):
    return [
        rl_datum(random_tokens(seed + n, 12), list(np.linspace(-6, -5, 11)), [(-1.0) ** i * i / 5 for i in range(11)])
        for n in range(3)
    ]


def adapter_file(server, name):
    (found,) = [file for file in server.data_dir.rglob("adapter_model.safetensors") if name in str(file)]
    return found


def script(server, service, family):
    """Every kind of number that a server gives, by name."""
    client, seen = new_client(service, family), {}
    client.save_state(f"initial-{family}").result()
    for step in range(3):
        call = client.forward_backward(ragged(10 * step), loss_fn="cross_entropy")
        norm = client.optim_step(adam(weight_decay=0.1, grad_clip_norm=50.0)).result().metrics["grad_norm"]
        seen[f"loss {step}"], seen[f"norm {step}"] = call.result().metrics["loss:sum"] / 54, norm / 1000
        seen[f"logprobs {step}"] = np.concatenate(logprobs_of(call.result()))
    for loss in ("importance_sampling", "ppo", "cispo", "dro"):
        result = client.forward_backward(rl_data(40), loss_fn=loss).result()
        seen[loss] = np.append(np.concatenate(logprobs_of(result)), result.metrics["loss:sum"] / 33)
        seen[f"{loss} norm"] = client.optim_step(adam(0.0)).result().metrics["grad_norm"] / 1000
    sampler = client.save_weights_and_get_sampling_client().result()
    prompt = random_tokens(77, 20)
    scored = sampler.sample(
        types.ModelInput.from_ints(prompt),
        1,
        types.SamplingParams(max_tokens=1, seed=1),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=3,
    ).result()
    seen["prompt"] = np.array(scored.prompt_logprobs[1:])
    seen["topk"] = np.array([[logprob for _, logprob in row] for row in scored.topk_prompt_logprobs[1:]])
    drawn = {
        "plain": dict(seed=5, num_samples=3, stop=[]),
        "cut": dict(seed=6, num_samples=3, temperature=0.7, top_k=50, top_p=0.8, stop=[]),
        "greedy": dict(seed=7, temperature=0.0, stop=[]),
    }
    tokens = {name: sample_tokens(sampler, prompt, max_tokens=12, **params) for name, params in drawn.items()}
    return seen, tokens, load_file(adapter_file(server, f"initial-{family}"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_one_script_on_both_backends_gives_the_same_numbers(native, pytorch, connect, family):
    (expected, their_tokens, theirs), (seen, tokens, initial) = (
        script(server, connect(server), family) for server in (native, pytorch)
    )
    assert initial.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(initial[name], tensor), name  # the initial adapter, bit for bit
    for name, value in expected.items():
        np.testing.assert_allclose(seen[name], value, atol=1e-4, rtol=0, err_msg=name)
    assert tokens == their_tokens  # the same random numbers over the same distributions


def load(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )


def merged(directory, adapter):
    """The base model in transformers with the adapter's deltas added to its weights, fused ones by their rows."""
    model = load(directory)
    tensors = load_file(adapter / "adapter_model.safetensors")
    rank = json.loads((adapter / "adapter_config.json").read_text())["r"]
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # the input embedding of a tied model stays
    weights = dict(model.named_parameters(remove_duplicate=False))
    filled = {}  # rows of a fused weight that have their delta
    by_rows = sorted(tensors, key=lambda name: "k_proj" in name or 2 * ("v_proj" in name or "up_proj" in name))
    for name in [name for name in by_rows if ".lora_A." in name]:
        site = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        delta = 32 / rank * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        parent, leaf = site.rsplit(".", 1)
        places = [site, *(f"{parent}.{fused}" for fused in ("c_attn", "qkv_proj", "gate_up_proj"))]
        if leaf == "unembed_tokens":
            weight, place = head.weight.data, "head"
        else:
            place = next(
                place
                for place in places
                if f"{place}.weight" in weights
                and (place == site or (leaf in ("gate_proj", "up_proj")) == ("gate" in place))
            )
            weight = weights[f"{place}.weight"].data
            weight = weight if delta.shape[1] == weight.shape[1] and "c_" not in place else weight.T
        begin = filled.get(place, 0)
        weight[begin : begin + delta.shape[0]] += delta
        filled[place] = begin + delta.shape[0]
        assert filled[place] <= weight.shape[0]
    return model


def reference_logprobs(model, tokens):
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1]
        return torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_any_model_trains_samples_and_reloads_in_transformers(pytorch, connect, directories, family):
    service = connect(pytorch)
    client = new_client(service, family)
    tokens = random_tokens(8, 30)
    base = load(directories[family])
    before = logprobs_of(client.forward([sequence_datum(tokens)], loss_fn="cross_entropy").result())[0]
    np.testing.assert_allclose(before, reference_logprobs(base, tokens), atol=1e-4, rtol=0)
    losses = [train_step(client, ragged(20), learning_rate=1e-3) for _ in range(4)]
    assert losses[3] < losses[2] < losses[1] < losses[0]

    path = client.save_state(f"trained-{family}").result().path
    again = service.create_training_client_from_state(path)
    assert train_step(again, ragged(20)) == train_step(client, ragged(20))  # weights, exactly

    client = service.create_training_client_from_state(path)
    sampler = client.save_weights_and_get_sampling_client().result()
    scored = sampler.compute_logprobs(types.ModelInput.from_ints(tokens)).result()
    trained = logprobs_of(client.forward([sequence_datum(tokens)], loss_fn="cross_entropy").result())[0]
    np.testing.assert_allclose(scored[1:], trained, atol=2e-5, rtol=0)  # trainer and sampler
    exported = merged(directories[family], adapter_file(pytorch, f"trained-{family}").parent)
    np.testing.assert_allclose(trained, reference_logprobs(exported, tokens), atol=1e-4, rtol=0)

    prompt = tokens[:10]
    made = sample_tokens(sampler, prompt, num_samples=3, max_tokens=10, temperature=0.0, stop=[])
    with torch.no_grad():
        for _ in range(10):
            prompt = [*prompt, int(exported(torch.tensor([prompt])).logits[0, -1].argmax())]
    assert made == [prompt[10:]] * 3  # the key/value cache gives what whole passes give


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_an_export_loads_in_peft(pytorch, connect, directories, family, tmp_path):
    client = new_client(connect(pytorch), family, train_unembed=False)
    train_step(client, ragged(30))
    client.save_state(f"export-{family}").result()
    base = load(directories[family])
    loaded = peft.PeftModel.from_pretrained(base, adapter_file(pytorch, f"export-{family}").parent)
    tokens = random_tokens(9, 25)
    ours = logprobs_of(client.forward([sequence_datum(tokens)], loss_fn="cross_entropy").result())[0]
    np.testing.assert_allclose(ours, reference_logprobs(loaded, tokens), atol=1e-4, rtol=0)


def test_adapters_of_one_base_are_independent(pytorch, connect):
    """A padded micro-batch, a second adapter in between and gradients over several calls: as if each were alone."""
    service = connect(pytorch)
    first, second = new_client(service, "gpt2", rank=4), new_client(service, "gpt2", rank=16)
    calls = [
        client.forward_backward([datum], loss_fn="cross_entropy") for datum in ragged(50) for client in (first, second)
    ]
    whole = new_client(service, "gpt2", rank=4)
    together = whole.forward_backward(ragged(50), loss_fn="cross_entropy").result()
    alone = [logprobs_of(call.result())[0] for call in calls[::2]]
    for left, right in zip(alone, logprobs_of(together)):
        np.testing.assert_allclose(left, right, atol=1e-5, rtol=0)
    norms = [client.optim_step(adam()).result().metrics["grad_norm"] for client in (first, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    trained = [client.forward(ragged(50), loss_fn="cross_entropy").result() for client in (first, whole)]
    np.testing.assert_allclose(*(np.concatenate(logprobs_of(result)) for result in trained), atol=1e-3, rtol=0)


def test_a_checkpoint_says_which_groups_it_trains(pytorch, connect):
    """GPT-2 has a c_proj in attention and in the MLP."""
    service = connect(pytorch)
    client = new_client(service, "gpt2", rank=4, train_mlp=False)
    train_step(client, ragged(60))
    again = service.create_training_client_from_state(client.save_state("attention").result().path)
    assert train_step(again, ragged(60)) == train_step(client, ragged(60))


def test_a_gradient_that_is_not_finite_is_refused(pytorch, connect):
    client = new_client(connect(pytorch), "olmo2")
    train_step(client, ragged(1))
    before = logprobs_of(client.forward(ragged(2), loss_fn="cross_entropy").result())
    tokens = random_tokens(3, 9)
    client.forward_backward([sequence_datum(tokens, [3e38] * 8)] * 2, loss_fn="cross_entropy").result()
    with pytest.raises(tinker.RequestFailedError, match="gradient is not finite"):
        client.optim_step(adam()).result()
    after = logprobs_of(client.forward(ragged(2), loss_fn="cross_entropy").result())
    assert all(np.array_equal(left, right) for left, right in zip(before, after))


def test_stops(pytorch, connect):
    sampler = connect(pytorch).create_sampling_client(base_model="phi3").result()
    tokenizer = transformers.AutoTokenizer.from_pretrained(pytorch.models["phi3"])
    prompt = random_tokens(4, 6)
    (free,) = sample_tokens(sampler, prompt, max_tokens=40, seed=2, stop=[])
    (by_id,) = sample_tokens(sampler, prompt, max_tokens=40, seed=2, stop=[free[5]])
    assert by_id == free[: free.index(free[5]) + 1]
    text = tokenizer.decode(next(token for token in free[3:] if tokenizer.decode(token).isascii() and token > 2))
    (by_text,) = sample_tokens(sampler, prompt, max_tokens=40, seed=2, stop=[text])
    assert by_text == free[: len(by_text)] and text in tokenizer.decode(by_text)
    assert len(by_text) < 40 and text not in tokenizer.decode(by_text[:-1])


def test_the_workers_death_costs_time_alone(tmp_path, directories, connect):
    """Snapshots, replayed micro-batches and versions: the bits of an undisturbed run."""

    def run(service, kill=lambda: None):
        client, seen = new_client(service, "gpt2", rank=4), []
        for step in range(5):
            call = client.forward_backward(ragged(step), loss_fn="cross_entropy")
            client.optim_step(adam()).result()
            seen += [logprobs.tobytes() for logprobs in logprobs_of(call.result())]
            if step == 2:
                sampler = client.save_weights_and_get_sampling_client().result()
                kill()
        return seen, sample_tokens(sampler, random_tokens(1, 5), seed=1)

    config = '{"micro_batch_tokens": 20, "gradient_checkpointing": true}'
    options = ("--backend-config", config, "--snapshot-seconds", "0.01")
    server = Server({"gpt2": directories["gpt2"]}, tmp_path / "data", *PYTORCH, *options).start(START)
    try:
        service = connect(server)
        undisturbed = run(service)
        assert run(service, server.kill_worker) == undisturbed
        assert list((server.data_dir / "snapshots").glob("*/*-*/manifest.json"))

        # Gradient checkpointing leaves the sampler its cache.
        sampler, prompt = service.create_sampling_client(base_model="gpt2").result(), random_tokens(2, 8)
        (made,) = sample_tokens(sampler, prompt, temperature=0.0, stop=[])
        base = load(directories["gpt2"])
        expected = base.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert made == expected[0, 8:].tolist()
    finally:
        server.stop()


def test_checkpoints_are_of_both_backends(tmp_path, directories, connect):
    """One data directory, served by one backend after the other: weights and moments go on where they were."""
    curve, path = [], None
    for backend in ("native", "pytorch", "native"):
        server = Server({"llama": directories["llama"]}, tmp_path / "data", "--backend", backend).start(START)
        service = connect(server)
        client = (
            new_client(service, "llama")
            if path is None
            else service.create_training_client_from_state_with_optimizer(path)
        )
        curve += [train_step(client, ragged(5), 3e-3) for _ in range(2)]
        path = client.save_state(f"by-{len(curve)}").result().path
        service.close("success")
        server.stop()
    server = Server({"llama": directories["llama"]}, tmp_path / "alone", "--backend", "native").start()
    client = new_client(connect(server), "llama")
    np.testing.assert_allclose(curve, [train_step(client, ragged(5), 3e-3) for _ in range(6)], rtol=1e-5)
    server.stop()


@pytest.mark.parametrize(
    "config, message",
    [
        ('{"dtype": "int8"}', 'dtype is "int8", allowed are float32, bfloat16, float16'),
        ('{"train_gpus": "0,1"}', 'several train_gpus need "device_map": "auto"'),
        ('{"gradient_checkpointing": 1}', "gradient_checkpointing is 1, allowed are true and false"),
    ],
)
def test_backend_config_is_checked(config, message):
    from hosted_tinker.pytorch_worker import backend_config
    from hosted_tinker.pytorch_worker.errors import UserError

    with pytest.raises(UserError) as refused:
        backend_config.parse(config)
    assert message in str(refused.value)
