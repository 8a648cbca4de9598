"""The immutable adapter versions that samplers read."""

import collections
from pathlib import Path

import torch

from hosted_tinker.pytorch_worker import adapter_files
from hosted_tinker.pytorch_worker.base_model import BaseModel
from hosted_tinker.pytorch_worker.errors import UserError
from hosted_tinker.pytorch_worker.lora import Adapter, Layout

Weights = tuple[Layout, torch.Tensor]


class Versions:
    """Each is written into its directory when it is published, and stays in memory while the byte budget holds it."""

    def __init__(self, model: BaseModel, budget_bytes: int):
        self._model = model
        self._budget_bytes = budget_bytes
        self._weights: collections.OrderedDict[str, Weights] = collections.OrderedDict()  # last used last
        self._directories: dict[str, str] = {}  # of those published here, or restored

    def publish(self, version: str, adapter: Adapter, directory: str) -> None:
        weights = adapter.weights.clone()
        if directory:
            adapter_files.save_weights(adapter.layout, weights, self._model.name, Path(directory))
            self._directories[version] = directory
        self._keep(version, (adapter.layout, weights))

    def get(self, version: str, directory: str) -> Weights:
        """Read from `directory` if given (a checkpoint may have moved since it was written) when not in memory."""
        if version not in self._weights:
            found = directory or self._directories.get(version, "")
            if not found:
                raise UserError(f"no adapter version {version} in this worker, and no directory to load it")
            layout = self._model.layout(adapter_files.read_config(Path(found), self._model.sites))
            self._keep(version, (layout, adapter_files.load_weights(layout, Path(found), self._model.device)))
        self._weights.move_to_end(version)
        return self._weights[version]

    def drop(self, version: str) -> None:
        self._weights.pop(version, None)
        self._directories.pop(version, None)

    def restore(self, version: str, directory: str) -> None:
        self._directories[version] = directory

    def on_disk(self) -> dict[str, str]:
        """Published versions and their directories."""
        return dict(self._directories)

    def nbytes(self) -> int:
        return sum(weights.nbytes for _, weights in self._weights.values())

    def _keep(self, version: str, weights: Weights) -> None:
        self._weights[version] = weights
        self._weights.move_to_end(version)
        for old in list(self._weights):
            # Without a directory it could not come back.
            if self.nbytes() <= self._budget_bytes or old == version:
                break
            if old in self._directories:
                del self._weights[old]
