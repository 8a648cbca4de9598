"""Small calls on a running server through the official SDK: what a step costs beside its arithmetic.

    .venv/bin/python bench/small_calls.py [--rounds 30] [--base-url URL --base-model NAME]

Without a URL it starts a server of a tiny random model: the figures are about the way, not the work. Prints medians.
"""

import argparse
import os
import statistics
import tempfile
import time

os.environ.setdefault("TINKER_API_KEY", "tml-bench")
os.environ.setdefault("TINKER_TELEMETRY", "0")

import tinker  # noqa: E402
from tinker import types  # noqa: E402


def timed(call):
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def datum(length):
    tokens = [(i * 7) % 50 + 1 for i in range(length)]
    return types.Datum(model_input=types.ModelInput.from_ints(tokens),
                       loss_fn_inputs={"target_tokens": tokens[1:] + [1], "weights": [1.0] * length})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url")
    parser.add_argument("--base-model", default="tiny")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    if args.base_url:
        return measure(args.base_url, args.base_model, args.rounds)
    from tiny_server import make_tiny_llama, serve

    with tempfile.TemporaryDirectory() as directory:
        make_tiny_llama(directory)
        with serve(directory, args.base_model) as (url, _, _):
            measure(url, args.base_model, args.rounds)


def measure(base_url, base_model, rounds):
    service = tinker.ServiceClient(base_url=base_url)
    trainer = service.create_lora_training_client(base_model=base_model, rank=8).result()
    prompt = types.ModelInput.from_ints(list(range(1, 17)))
    adam = types.AdamParams(learning_rate=1e-4)
    sampler = trainer.save_weights_and_get_sampling_client().result()

    def sample(tokens, count=1):
        params = types.SamplingParams(max_tokens=tokens, temperature=1.0, stop=[])
        futures = [sampler.sample(prompt=prompt, num_samples=1, sampling_params=params) for _ in range(count)]
        for future in futures:
            future.result()

    calls = {
        "optim_step": lambda: trainer.optim_step(adam).result(),
        "forward_backward 1×32": lambda: trainer.forward_backward([datum(32)], "cross_entropy").result(),
        "sample, 1 token": lambda: sample(1),
        "16 concurrent samples of 64 tokens": lambda: sample(64, 16),
        "save_weights_and_get_sampling_client": lambda: trainer.save_weights_and_get_sampling_client().result(),
    }
    print("| call | median, ms | p90, ms |\n|---|---|---|")
    for name, call in calls.items():
        for _ in range(3):
            call()
        times = sorted(timed(call) for _ in range(rounds))
        print(f"| {name} | {statistics.median(times):.1f} | {times[int(len(times) * 0.9)]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
