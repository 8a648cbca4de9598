"""Starting and ending a server as a person does: progress on a terminal and in healthz, Ctrl-C, help, legible refusals."""

import os
import re
import subprocess
import sys
import time
import urllib.error

import psutil
import pytest

from hosted_tinker import cli, embedded_model, installation
from server import ROOT, Server
from terminal import Terminal

PROGRESS = re.compile(r"\r\x1b\[K\[(#*) *\] +(\d+)%")


@pytest.fixture(scope="module")
def smollm():
    """Large enough that its loading can be watched."""
    return embedded_model.ensure()


@pytest.fixture
def on_terminal(smollm, tmp_path):
    """start() → (Terminal, Server): a server of SmolLM2 on a terminal; the Server only asks it things."""
    terminals = []

    def start():
        server = Server({}, tmp_path / "data")
        command = [sys.executable, "-m", "hosted_tinker", "serve", "--base-model", str(smollm), "--port", str(server.port),
                   "--data-dir", str(server.data_dir), "--threads", "2"]
        environment = dict(os.environ, PYTHONPATH=str(ROOT / "python"), OMP_WAIT_POLICY="passive")
        environment.setdefault("HOSTED_TINKER_BIN_DIR", str(ROOT / "build/release/bin"))
        terminals.append(Terminal(command, environment))
        server.process = terminals[-1].process
        return terminals[-1], server

    yield start
    for terminal in terminals:
        terminal.close()


def watch(server) -> list[tuple[int, dict]]:
    """Every answer of healthz from the first to the first 200."""
    answers = []
    deadline = time.monotonic() + 120
    while not answers or answers[-1][0] != 200:
        assert server.process.poll() is None and time.monotonic() < deadline
        try:
            answers.append(server.request("GET", "healthz"))
        except (OSError, urllib.error.URLError):
            time.sleep(0.01)
    return answers


def test_loading_is_seen_on_a_terminal_and_in_healthz_and_ctrl_c_ends_all(on_terminal, smollm):
    terminal, server = on_terminal()
    answers = watch(server)
    progress = [body["models"][0]["progress"] for status, body in answers if status == 503]
    assert all(body["status"] == "loading" for status, body in answers if status == 503)
    assert any(0 < fraction < 1 for fraction in progress), progress
    assert progress == sorted(progress)
    assert answers[-1][1]["models"][0]["state"] == "ready" and answers[-1][1]["status"] == "ok"

    terminal.wait_for("hosted-tinker serves")
    shown = [int(percent) for _, percent in PROGRESS.findall(terminal.text)]
    assert len(set(shown)) > 2 and shown == sorted(shown), terminal.text
    assert "model.layers." in terminal.text  # what is being read
    # The line is gone when the address comes.
    assert f"\r\x1b[Khosted-tinker serves {smollm} at {server.url}" in terminal.text

    workers = server.workers()
    assert len(workers) == 1
    terminal.press_ctrl_c()
    assert terminal.wait() == 0
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)

    again = Server({"again": smollm}, server.data_dir).start()
    assert again.stop() == 0


def test_ctrl_c_while_loading(on_terminal):
    terminal, server = on_terminal()
    deadline = time.monotonic() + 60
    while not server.workers():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = server.workers()
    terminal.press_ctrl_c()
    assert terminal.wait() == 0
    assert "serves" not in terminal.text
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)


def test_no_progress_line_where_there_is_no_terminal(make_server):
    server = make_server()
    deadline = time.monotonic() + 30
    while "hosted-tinker serves" not in (text := server.log.read_text()):
        assert time.monotonic() < deadline, text
        time.sleep(0.02)
    assert "\r" not in text and "\x1b" not in text and "[#" not in text
    assert server.stop() == 0


# ---- help and version ---------------------------------------------------------------------------------------------------


def run(*arguments):
    environment = dict(os.environ, PYTHONPATH=str(ROOT / "python"), COLUMNS="1000")
    return subprocess.run([sys.executable, "-m", *arguments], env=environment, capture_output=True, text=True, timeout=60)


def option_texts() -> dict[str, str]:
    """Option → its text in `hosted-tinker serve --help`."""
    texts = re.split(r"\n  (?=-)", run("hosted_tinker", "serve", "--help").stdout)
    return {option: " ".join(text.split()) for text in texts for option in re.findall(r"^(?:-\w, )?(--[a-z-]+)", text)}


def number(text: str) -> float:
    """"256 MiB" → 268435456."""
    value, _, unit = text.partition(" ")
    return float(value) * {"": 1, "MiB": 1 << 20, "GiB": 1 << 30}[unit]


def test_help_has_every_option_of_the_readme_with_its_default():
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `--")]
    assert len(rows) >= 6
    helped = option_texts()
    for row in rows:
        names, meaning = (cell.strip() for cell in row.strip("|").split("|"))
        options = re.findall(r"--[a-z-]+", names)
        # Values stand in backticks, one for each option that has one.
        defaults = [value for value in re.findall(r"`([^`]+)`", meaning) if not value.startswith("--")]
        for index, option in enumerate(options):
            assert option in helped, f"{option} of README.md is not in --help"
            if index < len(defaults):
                assert defaults[index] in helped[option], f"{option}: README.md says {defaults[index]}: {helped[option]}"


def test_help_tells_the_defaults_that_the_server_has():
    server = subprocess.run([installation.bin_dir() / installation.SERVER, "serve", "--help"],
                            capture_output=True, text=True, check=True).stdout
    theirs = dict(re.findall(r"^ *(--[a-z-]+) [^=\n]*=(\S+)", server, re.M))
    ours = option_texts()
    compared = set()
    for option in (f"--{name.replace('_', '-')}" for name in cli.PASSED_ON):
        assert option in server, f"the server has no {option}"
        told = re.search(r"\(default: ([^)]+)\)", ours[option])
        if told is None or option not in theirs:
            continue
        try:
            assert number(told[1]) == float(theirs[option]), option
        except (ValueError, KeyError):
            assert told[1] == theirs[option], option
        compared.add(option)
    assert len(compared) == len(cli.PASSED_ON), compared


@pytest.mark.parametrize("arguments", [["hosted_tinker"], ["hosted_tinker", "serve"], ["hosted_tinker.api"]])
def test_version(arguments):
    done = run(*arguments, "--version")
    project = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert (done.returncode, done.stdout) == (0, f"hosted-tinker {project}\n")
    server = subprocess.run([installation.bin_dir() / installation.SERVER, "--version"], capture_output=True, text=True)
    assert server.stdout == done.stdout


# ---- what cannot be served: one line, and not 0 --------------------------------------------------------------------------


def refused(tiny, data_dir, *options) -> str:
    done = run("hosted_tinker", "serve", "--base-model", str(tiny), "--data-dir", str(data_dir), *options)
    assert done.returncode not in (0, None) and not done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_a_port_in_use(server, tiny_llama, tmp_path):
    line = refused(tiny_llama, tmp_path / "data", "--port", str(server.port))
    assert f"127.0.0.1:{server.port}" in line and "in use" in line


def test_a_host_that_is_none(tiny_llama, tmp_path):
    assert "192.0.2.1" in refused(tiny_llama, tmp_path / "data", "--host", "192.0.2.1", "--port", "0")


def test_a_second_server_on_one_data_directory(server, tiny_llama):
    line = refused(tiny_llama, server.data_dir, "--port", "0")
    assert str(server.data_dir) in line and "in use by another server" in line and str(server.process.pid) in line


def test_a_data_directory_that_cannot_be_one(tiny_llama, tmp_path):
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refused(tiny_llama, tmp_path / "file", "--port", "0")
    (tmp_path / "locked" / "lock").mkdir(parents=True)  # what cannot be opened, also by root
    assert "lock cannot be opened" in refused(tiny_llama, tmp_path / "locked", "--port", "0")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "server.sqlite").write_text("not a database, whatever its name says")
    assert "server.sqlite" in refused(tiny_llama, tmp_path / "foreign", "--port", "0")


def test_models_that_are_none(tmp_path):
    assert str(tmp_path / "none") in refused(tmp_path / "none", tmp_path / "data")
    (tmp_path / "config.json").write_text("{}")
    assert "no *.safetensors" in refused(tmp_path, tmp_path / "data")
