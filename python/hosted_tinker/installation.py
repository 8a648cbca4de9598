"""Where the server's binaries and libtorch are."""

import importlib.util
import os
from pathlib import Path

from hosted_tinker.errors import LauncherError

PACKAGE_DIR = Path(__file__).resolve().parent
SERVER = "hosted-tinker-server"


def _clone_root() -> Path:
    # python/hosted_tinker in a clone; meaningless, and then simply empty of what we look for, in site-packages.
    return PACKAGE_DIR.parents[1]


def bin_dir() -> Path:
    """The folder that holds hosted-tinker-server and hosted-tinker-worker."""
    named = os.environ.get("HOSTED_TINKER_BIN_DIR")
    places = [Path(named)] if named else [PACKAGE_DIR / "bin", _clone_root() / "build/release/bin"]
    for place in places:
        if os.access(place / SERVER, os.X_OK):
            return place
    looked = ", ".join(str(place) for place in places)
    raise LauncherError(f"no {SERVER} in {looked}: run `make build` in a clone, or `pip install .`")


def torch_lib_dir() -> Path:
    """The folder of libtorch_cpu.so. Found without importing torch, which would take a second."""
    named = os.environ.get("HOSTED_TINKER_TORCH_LIB")
    places = [Path(named)] if named else [_clone_root() / ".deps/libtorch/torch/lib"]
    spec = None if named else importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        places.append(Path(spec.origin).parent / "lib")
    for place in places:
        if (place / "libtorch_cpu.so").exists():
            return place
    looked = ", ".join(str(place) for place in places)
    raise LauncherError(f"no libtorch_cpu.so in {looked}: run `scripts/setup --for build`, or `pip install torch==2.11.0`")


def check_pytorch() -> None:
    """What `--backend pytorch` runs on, without importing it."""
    missing = [name for name in ("google.protobuf", "safetensors", "torch", "transformers") if not _is_installed(name)]
    if missing:
        raise LauncherError(f"--backend pytorch needs {', '.join(missing)}: pip install 'hosted-tinker[pytorch]'")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False
