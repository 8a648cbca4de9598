"""Long datums: what a step keeps grows with their length, not with its square."""

import random

import pytest
from conftest import make_datum
from probe import one_call, run_probe


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-tied-9-3-heads", "mistral-sliding-window"])
def test_memory_is_linear_up_to_8k_tokens(name, checkpoints, tmp_path):
    def peak(tokens):
        datums = [make_datum(random.Random(1), tokens)]
        job = {"adapters": [{"rank": 8, "seed": 1}], "steps": [{"calls": [one_call(datums)]}]}
        return run_probe(checkpoints(name), job, tmp_path / str(tokens)).report["peak_mib"]

    short, middle, long = peak(2048), peak(4096), peak(8192)
    print(f"peaks: {short:.0f}, {middle:.0f}, {long:.0f} MiB")
    # Scores of 9 heads over 8192² pairs would take 2.3 GiB.
    assert long - middle <= 1.3 * 2 * (middle - short)
    assert long - short <= 400
