"""The cookbook's recipes, unmodified, to their end on the real SmolLM2: numbers, not exit codes.

sl_loop and sl_basic: the first step's NLL equals Hugging Face's within 1e-4, and training lowers it.
rl_loop: the logprobs that came with the samples equal those of the first training pass (KL ≤ 1e-4).
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from offline_hub import MODEL_NAME, make_offline_hub

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def hub(tmp_path_factory, smollm2):
    return make_offline_hub(tmp_path_factory.mktemp("hub"), smollm2)


@pytest.fixture(scope="module")
def server(start_server, smollm2):
    return start_server({MODEL_NAME: smollm2})


def run_recipe(server, hub, tmp_path, module, *arguments):
    """Runs the recipe in the offline hub; returns (recorded calls, lines of its metrics.jsonl)."""
    record = tmp_path / "record.json"
    log = tmp_path / "log"
    environment = {**os.environ, "TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-test", "TINKER_TELEMETRY": "0",
                   "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "WANDB_MODE": "disabled"}
    completed = subprocess.run(
        [sys.executable, HERE / "record_run.py", record, f"tinker_cookbook.recipes.{module}", f"log_path={log}", *arguments],
        cwd=hub, env=environment, capture_output=True, text=True, timeout=900)
    assert completed.returncode == 0, completed.stdout[-3000:] + completed.stderr[-6000:]
    metrics = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    return json.loads(record.read_text()), metrics


@pytest.fixture(scope="module")
def reference(smollm2):
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


def reference_nll(model, datums):
    """Weighted mean NLL of the base model: a fresh adapter changes nothing."""
    total, weights = 0.0, 0.0
    for datum in datums:
        with torch.no_grad():
            logprobs = model(torch.tensor([datum["tokens"]])).logits[0].log_softmax(-1)
        chosen = logprobs.gather(1, torch.tensor(datum["inputs"]["target_tokens"])[:, None])[:, 0]
        weight = torch.tensor(datum["inputs"]["weights"])
        total -= float((chosen.double() * weight).sum())
        weights += float(weight.sum())
    return total / weights


def test_sl_loop(server, hub, tmp_path, reference):
    calls, metrics = run_recipe(server, hub, tmp_path, "sl_loop", "batch_size=4", "max_steps=4", "learning_rate=2e-3",
                                "save_every=2", "max_length=256")
    nll = [line["train_mean_nll"] for line in metrics if "train_mean_nll" in line]
    assert len(nll) == len(calls) == 4
    assert nll[0] == pytest.approx(reference_nll(reference, calls[0]["datums"]), abs=1e-4)
    assert nll[-1] < nll[0]
    checkpoints = [json.loads(line) for line in (tmp_path / "log/checkpoints.jsonl").read_text().splitlines()]
    assert [entry["name"] for entry in checkpoints] == ["000002", "final"]
    assert all(entry["state_path"].startswith("tinker://") for entry in checkpoints)


def test_sl_basic(server, hub, tmp_path, reference):
    calls, metrics = run_recipe(server, hub, tmp_path, "sl_basic", "dataset_builder.common_config.batch_size=4",
                                "dataset_builder.common_config.max_length=256", "max_steps=2", "eval_every=1",
                                "learning_rate=2e-3")
    nll = [line["train_mean_nll"] for line in metrics if "train_mean_nll" in line]
    assert nll[0] == pytest.approx(reference_nll(reference, calls[0]["datums"]), abs=1e-4)
    assert all(math.isfinite(value) for value in nll) and nll[-1] < nll[0]
    evaluations = [line["test/nll"] for line in metrics if "test/nll" in line]
    assert evaluations and all(math.isfinite(value) for value in evaluations)


@pytest.mark.parametrize("loss_fn", ["stable_reinforce", "importance_sampling"])
def test_rl_loop(server, hub, tmp_path, loss_fn):
    calls, metrics = run_recipe(server, hub, tmp_path, "rl_loop", "batch_size=3", "group_size=6", "max_tokens=40",
                                "max_steps=2", f"loss_fn={loss_fn}", "learning_rate=1e-4")
    assert [line["progress/batch"] for line in metrics if "progress/batch" in line] == [0, 1]
    assert calls, "no group had differing rewards: nothing was trained"
    assert {call["loss_fn"] for call in calls} == {loss_fn}
    differences = [sampled - trained for datum in calls[0]["datums"]
                   for sampled, trained in zip(datum["inputs"]["logprobs"], datum["logprobs"]) if sampled != 0.0]
    assert len(differences) > 50
    assert abs(sum(differences) / len(differences)) <= 1e-4  # KL(sample, train), k1 estimator
    assert max(map(abs, differences)) <= 1e-3
