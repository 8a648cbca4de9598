"""One training step (forward, cross entropy, backward) of the engine against Hugging Face + PEFT, side by side.

    .venv/bin/python bench/train_step.py [--model DIR] [--threads 2] [--pairs 5] [--rank 32]
    .venv/bin/python bench/train_step.py --memory [--model DIR]

Same weights, float32, threads, LoRA targets (all linears and the unembedding) and tokens a step. Steps of the two
alternate, so both meet the same noise; the table shows medians of wall time, their ratio, and the ratio of processor time
(what tells most where other programs share the cores). Without --model: a tiny random Llama (hidden 256, 4 layers,
vocabulary 4096).

--memory: our time and peak memory of a step of 4×512 tokens for every recompute policy, beside what the plan says.
"""

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from tiny_server import make_tiny_llama

ROOT = Path(__file__).resolve().parent.parent
# (name, lengths, our mode, rival: "padded" batch or "single" datums)
CASES = [
    ("equal 4×512", [512] * 4, "packed", "padded"),
    ("ragged 512,200,77,300 vs padded", [512, 200, 77, 300], "packed", "padded"),
    ("ragged 512,200,77,300 vs one by one", [512, 200, 77, 300], "packed", "single"),
    ("1×512", [512], "packed", "padded"),
    ("4×16", [16] * 4, "packed", "padded"),
    ("1×64", [64], "packed", "padded"),
    ("1×32", [32], "packed", "padded"),
]


class Rival:
    def __init__(self, directory, rank, threads):
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        self.torch = torch
        torch.set_num_threads(threads)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa")
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
        # A tied head gets its own LoRA: PEFT would otherwise warn that merging is impossible, which we do not do.
        self.model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=32, target_modules=targets))
        self.model.train()
        self.vocab = model.config.vocab_size

    def step(self, lengths, mode):
        torch = self.torch
        generator = torch.Generator().manual_seed(0)
        batches = [lengths] if mode == "padded" else [[n] for n in lengths]
        self.model.zero_grad(set_to_none=True)
        start, processor = time.perf_counter(), time.process_time()
        for batch in batches:
            width = max(batch)
            tokens = torch.randint(self.vocab, (len(batch), width), generator=generator)
            labels = torch.randint(self.vocab, (len(batch), width), generator=generator)
            mask = torch.arange(width)[None, :] < torch.tensor(batch)[:, None]
            logits = self.model(input_ids=tokens, attention_mask=mask.long() if len(set(batch)) > 1 else None).logits
            loss = torch.nn.functional.cross_entropy(logits[mask], labels[mask], reduction="sum")
            loss.backward()
        return time.perf_counter() - start, time.process_time() - processor


class Ours:
    def __init__(self, directory, rank, threads, recompute="none"):
        program = Path(os.environ.get("HT_BENCH_BIN_DIR", ROOT / "build/release/bin")) / "bench_train_step"
        self.process = subprocess.Popen([program, directory, str(rank), str(threads), recompute, "2048"], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True,
                                        env={**os.environ, "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "3000"})
        ready, *figures = self.process.stdout.readline().split()
        assert ready == "ready"
        self.loaded_mib, self.loading_peak_mib, self.plan_mib, self.plan_activations_mib = map(float, figures)

    def step(self, lengths, mode):
        self.process.stdin.write(f"{mode} {','.join(map(str, lengths))}\n")
        self.process.stdin.flush()
        seconds, processor, self.peak_mib = map(float, self.process.stdout.readline().split())
        return seconds, processor

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def compare(directory, args):
    ours, rival = Ours(directory, args.rank, args.threads), Rival(directory, args.rank, args.threads)
    print("| case | ours, ms | HF + PEFT, ms | ratio | ratio of processor time |\n|---|---|---|---|---|")
    for name, lengths, our_mode, rival_mode in CASES[: args.cases]:
        ours.step(lengths, our_mode), rival.step(lengths, rival_mode)  # warm-up
        pairs = [(ours.step(lengths, our_mode), rival.step(lengths, rival_mode)) for _ in range(args.pairs)]
        (mine, my_cpu), (theirs, their_cpu) = ([statistics.median(kind) for kind in zip(*side)] for side in zip(*pairs))
        print(f"| {name} | {mine * 1e3:.1f} | {theirs * 1e3:.1f} | {theirs / mine:.2f}× | {their_cpu / my_cpu:.2f}× |",
              flush=True)
    print(f"\nPeak memory of our process: {ours.peak_mib:.0f} MiB; pairs {args.pairs}, threads {args.threads}, "
          f"rank {args.rank}, float32.")


def memory(directory, args):
    print("| recompute | step, ms | processor, ms | loaded, MiB | peak, MiB | peak above loaded | planned activations "
          "| planned total |\n|---|---|---|---|---|---|---|---|")
    for recompute in ("none", "norms_mlp", "block"):
        ours = Ours(directory, args.rank, args.threads, recompute)
        steps = [ours.step([512] * 4, "packed") for _ in range(args.pairs + 1)][1:]
        seconds, processor = (statistics.median(kind) for kind in zip(*steps))
        print(f"| {recompute} | {seconds * 1e3:.0f} | {processor * 1e3:.0f} | {ours.loaded_mib:.0f} | {ours.peak_mib:.0f} "
              f"| {ours.peak_mib - ours.loaded_mib:.0f} | {ours.plan_activations_mib:.0f} | {ours.plan_mib:.0f} |", flush=True)
        ours.end()
    print(f"\nPeak while loading: {ours.loading_peak_mib:.0f} MiB, pages of the mapped files included.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first N cases")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = args.model or scratch
        if not args.model:
            make_tiny_llama(directory, layers=4, hidden=256, vocab=4096, intermediate_size=768, num_attention_heads=4)
        (memory if args.memory else compare)(directory, args)


if __name__ == "__main__":
    main()
