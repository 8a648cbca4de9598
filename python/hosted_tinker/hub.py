"""A base model as a person names it → a directory with config.json, *.safetensors and a tokenizer."""

import os
import sys
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

    return _check(_download(name), name)


def _download(name: str) -> Path:
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
        print(f"Fetching {name} from the hub, unless it is in the cache …", file=sys.stderr, flush=True)
    elsewhere = "Give a local directory, or leave --base-model out to serve the embedded SmolLM2-135M-Instruct."
    try:
        return Path(snapshot_download(name, allow_patterns=NEEDED_FILES, ignore_patterns=IGNORED_FILES))
    except errors.HFValidationError as error:
        raise LauncherError(f"{name!r} is neither a directory nor a valid hub id: {error}") from error
    except errors.GatedRepoError as error:
        raise LauncherError(
            f"{name}: the hub gives this model only to those who accepted its terms: accept them on its page, then set "
            "HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise LauncherError(f"{name}: no such repository on the hub (or it is private: set HF_TOKEN)") from error
    except errors.LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else _reason(error.__cause__ or error)
        raise LauncherError(
            f"{name}: not (or not whole) in the local cache, and the hub could not be reached: {why}. {elsewhere}"
        ) from error
    except Exception as error:  # the hub's HTTP library has its own types, which change with its version
        raise LauncherError(
            f"{name}: the download stopped: {_reason(error)}. The same command keeps the files that are whole."
        ) from error


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
