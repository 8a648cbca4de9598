"""The suites with older releases of the SDK, each in an environment of its own: what they can ask for works as well."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SUITES = ["test_service.py", "test_forward_backward.py", "test_optim_step.py", "test_sampling.py", "test_checkpoints.py"]

# What a client of that age cannot say.
LACKING = {
    "0.25.0": [
        "last_n_prompt", "prompt_alternatives", "target_prompt_logprobs", "temperature_zero", "top_k_and_top_p",
        "frequencies_follow", "unique_ids", "stable_reinforce", "lists_metadata", "names_are_not_reused",
        "overwriting_replaces", "finished_session", "learning_rate-inf", "learning_rate-nan",
    ],
    "0.30.4": ["last_n_prompt", "prompt_alternatives"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("version", LACKING)
def test_older_client(version, tmp_path):
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    # Its own tinker first; everything else comes from the environment that runs this.
    site = next((tmp_path / "venv/lib").glob("python*")) / "site-packages"
    (site / "zz-outer.pth").write_text(sysconfig.get_paths()["purelib"])
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", f"tinker=={version}"]
    installed = subprocess.run(install, capture_output=True, text=True)
    if installed.returncode != 0:
        pytest.skip(f"tinker {version} cannot be installed here: {installed.stderr[-300:]}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", "-p", "older_sdk", "-m", "not slow"]
    command += ["--basetemp", str(tmp_path / "run"), "-k", " and ".join(f"not {name}" for name in LACKING[version])]
    done = subprocess.run(
        [*command, *(HERE / suite for suite in SUITES)], env=environment, cwd=HERE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert f"tinker {version}" in done.stdout
