"""Sampling speed of the engine against Hugging Face generate (with an adapter: PEFT), side by side.

    ninja -C build/release ht_bench_decode
    .venv/bin/python bench/sampler.py --model DIR [--threads 2] [--pairs 5] [--prompt 32] [--tokens 64] [--rank 32]

Same weights, float32 arithmetic, threads, and lengths; sampling at temperature 1, the prompt's forward included. Runs of
the two alternate, so both meet the same noise; the table shows medians and their ratio.
"""

import argparse
import os
import re
import statistics
import subprocess
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


def ours(args, batch, rank):
    program = Path(os.environ.get("HT_BENCH_BIN_DIR", ROOT / "build/release/bin")) / "ht_bench_decode"
    # The prompt's forward gives the first token.
    command = [program, args.model, args.threads, batch, args.prompt, args.tokens - 1, rank]
    text = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True,
                          env={**os.environ, "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "3000"}).stdout
    rate, prefill = re.search(r": ([\d.]+) tok/s.*prefill ([\d.]+) ms", text).groups()
    return batch * args.tokens / (batch * (args.tokens - 1) / float(rate) + float(prefill) / 1e3)


def rival(args, model, batch):
    tokens = torch.randint(model.config.vocab_size, (batch, args.prompt), generator=torch.Generator().manual_seed(1))
    start = time.perf_counter()
    out = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), do_sample=True, top_k=0,
                         temperature=1.0, min_new_tokens=args.tokens, max_new_tokens=args.tokens, pad_token_id=0)
    assert out.shape[1] == args.prompt + args.tokens
    return batch * args.tokens / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa").eval()
    print("| batch | adapter | ours, tokens/s | HF generate, tokens/s | ratio |\n|---|---|---|---|---|")
    for rank in (0, args.rank):
        if rank:
            model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=32, target_modules=TARGETS)).eval()
        for batch in args.batches:
            rival(args, model, batch)  # warm-up
            pairs = [(ours(args, batch, rank), rival(args, model, batch)) for _ in range(args.pairs)]
            mine, theirs = (statistics.median(side) for side in zip(*pairs))
            name = f"rank {rank}" if rank else "none"
            print(f"| {batch} | {name} | {mine:.1f} | {theirs:.1f} | {mine / theirs:.2f}× |", flush=True)
    print(f"\nPrompt {args.prompt}, {args.tokens} tokens a sample, {args.threads} threads, {args.pairs} pairs.")


if __name__ == "__main__":
    main()
