import random

import pytest
import torch

from models import FAMILIES, VOCAB, write_checkpoint

torch.set_num_threads(2)


def pytest_addoption(parser):
    parser.addoption("--device", default="reference bfloat16", help="of test_bfloat16.py: cuda on a machine with a GPU")


@pytest.fixture(scope="session")
def bfloat16_device(request):
    device = request.config.getoption("--device")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA: torch finds no device")
    return device


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """name -> checkpoint directory, each written once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = write_checkpoint(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(params=list(FAMILIES))
def family(request):
    return request.param


def make_datum(rng: random.Random, length: int, **extra) -> dict:
    datum = {
        "tokens": [rng.randrange(VOCAB) for _ in range(length)],
        "targets": [rng.randrange(VOCAB) for _ in range(length)],
        "weights": [rng.choice([0.0, 1.0, 1.0, -0.5, 2.25]) for _ in range(length)],
    }
    datum.update(extra)
    return datum


@pytest.fixture
def datums():
    """Ragged: shorter and longer than every window and trained length of the families."""
    rng = random.Random(7)
    return [make_datum(rng, n) for n in (40, 5, 5, 17, 1)]
