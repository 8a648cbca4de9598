"""libht_cuda.so beside a whole torch: it loads, and says what it finds."""

import subprocess
import sys
from pathlib import Path

import pytest
from probe import PROBE

LIBRARY = PROBE.parent / "libht_cuda.so"
PROGRAM = """
import ctypes, sys
import torch  # brings libtorch_cuda and what it needs

class Result(ctypes.Structure):
    _fields_ = [("device", ctypes.c_void_p), ("why_not", ctypes.c_char_p)]

entry = ctypes.CDLL(sys.argv[1]).ht_cuda_device
entry.restype = Result
for version in (1, -1):
    result = entry(version)
    print("device" if result.device else result.why_not.decode())
print(torch.cuda.is_available())
"""


@pytest.mark.skipif(not LIBRARY.exists(), reason="no nvcc: libht_cuda.so is not built")
def test_library_loads_and_says_why_not():
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(LIBRARY)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, other_build, has_gpu = done.stdout.splitlines()
    assert "of another build" in other_build
    if has_gpu == "True":
        assert found == "device"
    else:
        assert "finds no device" in found


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there may be a GPU")
def test_a_device_that_is_missing_is_named(tmp_path):
    (tmp_path / "job.json").write_text('{"device": "cuda", "adapters": [], "steps": []}')
    done = subprocess.run([PROBE, tmp_path, tmp_path / "job.json", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1
    assert "device cuda: " in done.stderr and "NVIDIA driver" in done.stderr
