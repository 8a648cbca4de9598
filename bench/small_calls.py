"""Small calls on a running server through the official SDK: what a step costs beside its arithmetic.

    build/hosted-tinker serve --base-model DIR &
    .venv/bin/python bench/small_calls.py --base-url http://127.0.0.1:8000 --base-model DIR [--rounds 30]

Prints medians. Use a tiny random model: the figures are about the way, not the work.
"""

import argparse
import os
import statistics
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
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()

    service = tinker.ServiceClient(base_url=args.base_url)
    trainer = service.create_lora_training_client(base_model=args.base_model, rank=8)
    trainer = trainer.result() if hasattr(trainer, "result") else trainer
    prompt = types.ModelInput.from_ints(list(range(1, 17)))
    adam = types.AdamParams(learning_rate=1e-4)
    sampler = trainer.save_weights_and_get_sampling_client()
    sampler = sampler.result() if hasattr(sampler, "result") else sampler

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
        "save_weights_and_get_sampling_client": lambda: trainer.save_weights_and_get_sampling_client(),
    }
    print("| call | median, ms | p90, ms |\n|---|---|---|")
    for name, call in calls.items():
        for _ in range(3):
            call()
        times = sorted(timed(call) for _ in range(args.rounds))
        print(f"| {name} | {statistics.median(times):.1f} | {times[int(len(times) * 0.9)]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
