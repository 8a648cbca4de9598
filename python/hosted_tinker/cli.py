"""The `hosted-tinker` command: resolves what to serve, then becomes hosted-tinker-server (exec: one process, one Ctrl-C)."""

import argparse
import json
import os
import sys
from pathlib import Path

import hosted_tinker
from hosted_tinker import embedded_model, hub, installation
from hosted_tinker.errors import LauncherError

DESCRIPTION = """\
Serves LoRA training and sampling of an open model to the official tinker SDK.

  hosted-tinker serve --base-model Qwen/Qwen3-0.6B
  TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-local python your_script.py
"""


def _json_object(text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {text!r}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object such as '{{}}', got {text!r}")
    return text


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be 0 (any free port) to 65535, got {text!r}")
    return int(text)


def _natural(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def _alias(text: str) -> tuple[str, str]:
    name, equals, target = text.partition("=")
    if not name or not equals or not target:
        raise argparse.ArgumentTypeError(f"must be NAME=DIR, got {text!r}")
    return name, target


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="hosted-tinker", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--version", action="version", version=f"hosted-tinker {hosted_tinker.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="start the server",
        description="Starts the server and prints its address when it is ready. Ctrl-C ends it cleanly.",
    )
    serve.add_argument("--version", action="version", version=f"hosted-tinker {hosted_tinker.__version__}")
    serve.add_argument(
        "--base-model",
        action="append",
        default=[],
        metavar="DIR_OR_HUB_ID",
        help="a model directory, or a hub id, which is downloaded; repeatable, one worker each. "
        f"Default: the embedded {embedded_model.NAME}",
    )
    serve.add_argument(
        "--model-alias",
        action="append",
        default=[],
        type=_alias,
        metavar="NAME=DIR",
        help="also serve DIR (or a hub id) under NAME; repeatable; aliases of one directory share its weights",
    )
    serve.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    serve.add_argument("--port", type=_port, help="port to listen on, 0 for any free one (default: 8000)")
    serve.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="where sessions, the journal and checkpoints live (default: ~/.local/share/hosted-tinker)",
    )
    serve.add_argument(
        "--backend",
        choices=["native", "pytorch"],
        help="the engine: native, or pytorch for any causal LM of transformers (default: native)",
    )
    serve.add_argument(
        "--backend-config",
        type=_json_object,
        metavar="JSON",
        help="settings of the engine; keys: docs/backend-config.md (default: {})",
    )
    serve.add_argument("--max-seq-len", type=_natural, metavar="N", help="longest sequence, 0 for the model's own (default: 0)")
    serve.add_argument("--threads", type=_natural, metavar="N", help="compute threads, 0 for all cores (default: 0)")
    serve.add_argument(
        "--durability",
        choices=["process", "power"],
        help="what an acknowledged request survives: process: the death of any process; power: also a power cut, at the "
        "cost of a disk flush a request (default: process)",
    )
    limits = serve.add_argument_group("limits")
    limits.add_argument("--session-timeout", type=_natural, metavar="N", help="seconds without a heartbeat (default: 300)")
    limits.add_argument(
        "--snapshot-seconds",
        type=_positive,
        metavar="X",
        help="compute time from one snapshot of the adapters to the next: what a recovery has to repeat (default: 60)",
    )
    limits.add_argument("--max-body-bytes", type=_natural, metavar="N", help="largest request as sent (default: 256 MiB)")
    limits.add_argument(
        "--max-decoded-bytes", type=_natural, metavar="N", help="largest request after decompression (default: 512 MiB)"
    )
    limits.add_argument("--max-connections", type=_natural, metavar="N", help="open connections (default: 16384)")
    limits.add_argument("--max-queued-samples", type=_natural, metavar="N", help="waiting samples (default: 20000)")
    limits.add_argument(
        "--max-bodies-bytes", type=_natural, metavar="N", help="request bodies being read or answered (default: 2 GiB)"
    )
    limits.add_argument(
        "--max-model-requests", type=_natural, metavar="N", help="unfinished training requests of one model (default: 8192)"
    )
    limits.add_argument("--max-model-bytes", type=_natural, metavar="N", help="the bytes of those (default: 2 GiB)")
    limits.add_argument("--max-requests", type=_natural, metavar="N", help="unfinished ones of all models (default: 65536)")
    limits.add_argument(
        "--max-requests-bytes", type=_natural, metavar="N", help="the bytes of those and of samples (default: 16 GiB)"
    )
    return top


PASSED_ON = (
    "host port backend backend_config max_seq_len threads durability session_timeout snapshot_seconds "
    "max_body_bytes max_decoded_bytes max_connections max_queued_samples max_bodies_bytes max_model_requests "
    "max_model_bytes max_requests max_requests_bytes"
).split()


def resolve_models(base_models: list[str], aliases: list[tuple[str, str]]) -> list[tuple[str, Path]]:
    """(name that clients use, directory), the base models first. A name may stand for one directory only."""
    wanted = [(name.rstrip("/") or name, name) for name in base_models] + aliases
    models: dict[str, Path] = {}
    if not wanted:
        models[embedded_model.NAME] = embedded_model.ensure()
    for name, target in wanted:
        if "=" in name:
            raise LauncherError(f"{name}: '=' cannot be part of a model's name; use --model-alias NAME=DIR")
        directory = hub.resolve(target)
        if models.setdefault(name, directory) != directory:
            raise LauncherError(f"{name} names two directories: {models[name]} and {directory}")
    return list(models.items())


def server_command(arguments: argparse.Namespace, models: list[tuple[str, Path]]) -> list[str]:
    command = [str(installation.bin_dir() / installation.SERVER), "serve"]
    for name, directory in models:
        command += ["--base-model", f"{name}={directory}"]
    data_dir = arguments.data_dir
    if data_dir is None:
        data_dir = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "hosted-tinker"
    command += ["--data-dir", str(data_dir)]
    for option in PASSED_ON:
        value = getattr(arguments, option)
        if value is not None:
            command += [f"--{option.replace('_', '-')}", str(value)]
    return command


def server_environment(backend: str | None = None) -> dict[str, str]:
    package_parent = str(installation.PACKAGE_DIR.parent)
    environment = dict(os.environ)
    if backend == "pytorch":
        installation.check_pytorch()
        environment.pop("HOSTED_TINKER_TORCH_LIB", None)  # Python's torch finds its own libraries
        environment["HOSTED_TINKER_PYTORCH_COMMAND"] = json.dumps([sys.executable, "-m", "hosted_tinker.pytorch_worker"])
    else:
        environment["HOSTED_TINKER_TORCH_LIB"] = str(installation.torch_lib_dir())
    environment["HOSTED_TINKER_TOKENIZER_COMMAND"] = json.dumps([sys.executable, "-m", "hosted_tinker.tokenizer_helper"])
    paths = [package_parent, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return environment


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    try:
        # Before any download: without its binary nothing can be served.
        installation.bin_dir()
        command = server_command(arguments, resolve_models(arguments.base_model, arguments.model_alias))
        environment = server_environment(arguments.backend)
    except LauncherError as error:
        sys.exit(f"hosted-tinker: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.stdout.flush()
    os.execve(command[0], command, environment)
