"""Every variant of the Triton kernels, compiled for each supported chip, without a GPU."""

import json
import os
import subprocess
import sys

import pytest

SHARED_LIMIT = 99 << 10  # bytes a program may have on the smallest of the chips (8.6, 8.9, 12.0)
REGISTER_FILE = 65536


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_no_variant_spills(capability):
    # In a separate process, because in this one the kernels belong to the interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.backends.ahead_of_time", str(capability)]
    told = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert told.returncode == 0, told.stderr
    reports = [json.loads(line) for line in told.stdout.splitlines()]
    assert len(reports) > 50
    for report in reports:
        assert report["stack"] == 0, report
        assert report["registers"] * report["threads"] <= REGISTER_FILE, report
        assert report["shared"] <= SHARED_LIMIT, report
        if report["aligned"]:
            assert report["wide_loads"], report
            assert report["wide_stores"] == report["writes"], report
