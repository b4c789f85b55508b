"""A build with CUDA where no GPU can be used: it imports, serves on the CPU and says what is wrong.

python tests/no_gpu.py PACKAGE, the folder that holds the built package `armt`.
"""

from __future__ import annotations

import sys

sys.path.insert(0, sys.argv[1])

import armt
from armt import _core

session = armt.Engine.from_pretrained("demo", device="auto").session()
session.feed(range(1, 600))
assert session.tokens == 599
if _core.cuda_device_count() == 0:
    try:
        armt.Engine.from_pretrained("demo", device="cuda")
    except armt.DeviceError as error:
        assert "no GPU can be used" in str(error), error
        assert "\n" not in str(error), error
    else:
        raise SystemExit("device='cuda' without a GPU: found no error, expected DeviceError")
print(f"{armt.__file__}: fine")
