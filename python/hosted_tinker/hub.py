"""A base model as a person names it → a directory with config.json, *.safetensors and a tokenizer."""

import os
from pathlib import Path

from hosted_tinker.errors import LauncherError

# The server reads safetensors only; folders inside a repository hold other formats of the same weights.
NEEDED_FILES = [
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
]
IGNORED_FILES = ["*/*", "consolidated*"]


def _check(directory: Path, named: str) -> Path:
    if not (directory / "config.json").is_file():
        raise LauncherError(f"{named}: no config.json in {directory}, so this is no Hugging Face model directory")
    if not any(directory.glob("*.safetensors")):
        raise LauncherError(f"{named}: no *.safetensors in {directory}; other weight formats are not supported")
    return directory


def _is_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or name in (".", "..") or Path(name).is_dir()


def resolve(name: str) -> Path:
    """A local directory, or a hub id, downloaded (with a progress bar, HF_ENDPOINT and HF_HUB_OFFLINE honoured)."""
    if _is_path(name):
        directory = Path(name).expanduser()
        if not directory.is_dir():
            raise LauncherError(f"{name}: no such directory")
        return _check(directory.resolve(), name)
    if name.count("/") > 1 or not name.strip():
        raise LauncherError(f"{name!r} is neither a directory nor a hub id such as Qwen/Qwen3-8B")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        directory = snapshot_download(name, allow_patterns=NEEDED_FILES, ignore_patterns=IGNORED_FILES)
    except HFValidationError as error:
        raise LauncherError(f"{name!r} is neither a directory nor a valid hub id: {error}") from error
    except RepositoryNotFoundError as error:
        raise LauncherError(f"{name}: no such repository on the hub (or it is private: set HF_TOKEN)") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LauncherError(
            f"{name}: not in the local cache, and the hub could not be reached{offline}: {reason}. "
            "Give a local directory, or leave --base-model out to serve the embedded SmolLM2-135M-Instruct."
        ) from error
    return _check(Path(directory), name)
