"""The code of a step on fake CUDA tensors: no operation mixes devices, and none but the looks at live rows reads a value."""

import subprocess
import sys
import sysconfig
from pathlib import Path
from shutil import which

import pytest
import torch
from fake_cuda import GUARD_SOURCE


@pytest.mark.slow
@pytest.mark.skipif(which("g++") is None, reason="needs g++, to let a CPU build of torch make CUDA tensors without data")
def test_decoding_scoring_and_losses_run_on_one_device_and_read_nothing(tmp_path):
    folder = Path(torch.__file__).parent
    source, library = tmp_path / "guard.cpp", tmp_path / f"guard{sysconfig.get_config_var('SHLIB_SUFFIX')}"
    source.write_text(GUARD_SOURCE)
    flags = ["-std=c++20", "-shared", "-fPIC", f"-I{folder}/include", str(source), f"-L{folder}/lib", "-lc10"]
    subprocess.run(["g++", *flags, "-o", str(library)], check=True)
    script = Path(__file__).parent / "fake_cuda.py"
    done = subprocess.run([sys.executable, script, library], capture_output=True, text=True)
    assert [done.stdout.count(part) for part in ("decode", "update", "masked")] == [3, 4, 2] and done.returncode == 0, done.stderr
