"""`--base-model some-org/some-model`: what is downloaded, what is shown, and what is said when it cannot be had."""

import os
import shutil
import subprocess
import sys

import pytest

import server as servers
from hub_server import Hub
from terminal import Terminal

ORG = "some-org"
NEEDED = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def repository(tiny_llama, tmp_path_factory):
    """A model as hubs have them: with other formats of the same weights, of which we want none."""
    directory = tmp_path_factory.mktemp("hub") / "repository"
    shutil.copytree(tiny_llama, directory)
    (directory / "onnx").mkdir()
    for name in ("pytorch_model.bin", "README.md", "consolidated.00.safetensors", "onnx/model.onnx", "onnx/model.safetensors"):
        (directory / name).write_bytes(b"not wanted")
    return directory


@pytest.fixture
def hub(repository, tmp_path):
    other_format = tmp_path / "other-format"
    other_format.mkdir()
    shutil.copy(repository / "config.json", other_format)
    (other_format / "pytorch_model.bin").write_bytes(b"not wanted")
    repositories = {f"{ORG}/model": repository, f"{ORG}/gated": repository, f"{ORG}/pickled": other_format}
    hub = Hub(repositories, gated=(f"{ORG}/gated",))
    yield hub
    hub.close()


def environment(hub, home, **more):
    ours = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = dict(ours, PYTHONPATH=str(servers.ROOT / "python"), HF_ENDPOINT=hub.url, HF_HOME=str(home), **more)
    settings.setdefault("HOSTED_TINKER_BIN_DIR", str(servers.ROOT / "build/release/bin"))
    return settings


def serve_command(name, tmp_path):
    return [sys.executable, "-m", "hosted_tinker", "serve", "--base-model", name, "--port", "0",
            "--data-dir", str(tmp_path / "data")]


def refused(hub, tmp_path, name, **more):
    """The one line that says why, after the line that announces the download."""
    done = subprocess.run(serve_command(name, tmp_path), env=environment(hub, tmp_path / "home", **more),
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and not done.stdout
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"hosted-tinker: {name}: ")
    return line


def serve_until_ready(hub, tmp_path):
    terminal = Terminal(serve_command(f"{ORG}/model", tmp_path), environment(hub, tmp_path / "home"))
    try:
        terminal.wait_for("hosted-tinker serves")
        terminal.press_ctrl_c()
        assert terminal.wait() == 0
        return terminal.text
    finally:
        terminal.close()


def test_downloads_what_is_needed_with_a_progress_bar_and_once(hub, tmp_path):
    text = serve_until_ready(hub, tmp_path)
    assert "100%|" in text and "5/5" in text
    assert f"hosted-tinker serves {ORG}/model at http://127.0.0.1:" in text
    assert hub.fetched() == NEEDED
    hub.requests.clear()
    serve_until_ready(hub, tmp_path)
    assert hub.fetched() == set()
    hub.close()
    serve_until_ready(hub, tmp_path)  # the network is down, the cache has it


def test_says_why_a_model_cannot_be_had(hub, tmp_path):
    assert "no such repository" in refused(hub, tmp_path, f"{ORG}/missing")
    line = refused(hub, tmp_path, f"{ORG}/gated")
    assert "accepted its terms" in line and "HF_TOKEN" in line
    assert "no *.safetensors" in refused(hub, tmp_path, f"{ORG}/pickled")
    assert hub.fetched() == {"config.json"}


def test_says_that_the_hub_is_out_of_reach(hub, tmp_path):
    assert "HF_HUB_OFFLINE is set" in refused(hub, tmp_path, f"{ORG}/model", HF_HUB_OFFLINE="1")
    hub.close()
    line = refused(hub, tmp_path, f"{ORG}/model")
    assert "could not be reached" in line and "Connection refused" in line and "embedded" in line


def test_a_download_that_breaks_off_keeps_the_whole_files(hub, tmp_path):
    hub.cut_after = 50_000
    assert "the download stopped" in refused(hub, tmp_path, f"{ORG}/model")
    hub.cut_after = None
    hub.requests.clear()
    serve_until_ready(hub, tmp_path)
    assert hub.fetched() == {"model.safetensors"}
