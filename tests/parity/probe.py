"""Runs engine_probe (engine_probe.cpp says what a job is) and reads its results."""

import json
import os
import subprocess
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
PROBE = Path(os.environ.get("HT_ENGINE_PROBE", ROOT / "build/release/bin/engine_probe"))


class Result:
    def __init__(self, directory: Path):
        self.directory = directory
        self.tensors = load_file(directory / "results.safetensors")
        self.report = json.loads((directory / "results.json").read_text())

    def logprobs(self, step=0, call=0, item=0):
        return self.tensors[f"step{step}.call{call}.item{item}.logprobs"]

    def losses(self):
        """Loss sums, one list of items a call, over all steps."""
        return [call["losses"] for call in self.report["calls"]]

    def gradients(self, adapter=0):
        return load_file(self.directory / f"grad{adapter}" / "adapter_model.safetensors")

    def weights(self, adapter=0):
        return load_file(self.directory / f"weights{adapter}" / "adapter_model.safetensors")

    def optimizer(self, adapter=0):
        return load_file(self.directory / f"weights{adapter}" / "optimizer.safetensors")


def run_probe(model_dir: Path, job: dict, directory: Path) -> Result:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "job.json").write_text(json.dumps({"threads": 2, **job}))
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [PROBE, model_dir, directory / "job.json", directory], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return Result(directory)


def one_call(datums, loss="cross_entropy", config=None, backward=True):
    return {"backward": backward, "items": [{"adapter": 0, "loss": loss, "config": config or {}, "datums": datums}]}
