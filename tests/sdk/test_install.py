"""`pip install .` from a clean clone: what it installs serves the official SDK without the clone."""

import os
import shutil
import signal
import subprocess
import sysconfig
import time
import venv

import pytest
from tinker import types

from server import ROOT, Server


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of the commands that pip installed. torch and the other dependencies are those of this environment."""
    work = tmp_path_factory.mktemp("install")
    clone = work / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    (clone / ".deps").symlink_to(ROOT / ".deps")
    subprocess.run([clone / "scripts/setup", "--for", "build"], check=True)
    venv.create(work / "venv", with_pip=True)
    commands = work / "venv/bin"
    subprocess.run([commands / "python", "-m", "pip", "install", "--quiet", "--no-deps", clone], check=True)
    shutil.rmtree(clone)
    (site_packages,) = (work / "venv/lib").glob("python3*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return commands


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_installed_from_a_clean_clone(installed, tiny_llama, tmp_path, connect):
    environment = {key: value for key, value in os.environ.items()
                   if key != "PYTHONPATH" and not key.startswith("HOSTED_TINKER_")}
    shown = subprocess.run([installed / "hosted-tinker", "--version"], env=environment, cwd=tmp_path, check=True,
                           capture_output=True, text=True).stdout
    assert shown.startswith("hosted-tinker ")
    server = Server({}, tmp_path / "data")
    command = [installed / "python", "-m", "hosted_tinker.api", "--base-model", str(tiny_llama), "--backend", "native",
               "--backend-config", '{"micro_batch_tokens": 1024}', "--port", str(server.port), "--data-dir", str(server.data_dir)]
    with server.log.open("wb") as log:
        server.process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not server.ready():
            assert server.process.poll() is None and time.monotonic() < deadline, server.log_tail()
            time.sleep(0.05)
        client = connect(server).create_lora_training_client(base_model=str(tiny_llama), rank=8).result()
        datum = types.Datum(model_input=types.ModelInput.from_ints([3, 4, 5]),
                            loss_fn_inputs={"target_tokens": [4, 5, 6], "weights": [1.0] * 3})
        losses = []
        for _ in range(3):
            result = client.forward_backward([datum], "cross_entropy")
            client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
            losses.append(result.result().metrics["loss:sum"])
        assert losses[2] < losses[0]
        # A stop string needs the tokenizer helper, the installed Python.
        params = types.SamplingParams(max_tokens=4, stop=["\n\n"])
        sampler = client.save_weights_and_get_sampling_client().result()
        sample = sampler.sample(types.ModelInput.from_ints([3, 4]), 1, params).result()
        assert 1 <= len(sample.sequences[0].tokens) <= 4
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(20) == 0
    finally:
        server.process.kill()
        server.process.wait()
