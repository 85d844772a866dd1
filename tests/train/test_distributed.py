"""Two processes under torchrun train one model, log once and resume."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nestlearn.train import read_log, verify

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo, the CPU backend"),
]

TINY = ("--preset hope-tiny --hidden-size 16 --num-attention-heads 2 --num-hidden-layers 1 --sequence-length 32 "
        "--threads 1 --log-interval 1 --save-interval 2 --eval-windows 4 --dtype float64").split()  # fmt: skip


def launch(*words: str, processes: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone",
               "-m", "nestlearn", "train", *words]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_two_processes_equal_one_with_twice_the_batch(tmp_path: Path):
    (tmp_path / "texts").mkdir()
    for number in range(40):
        draw = random.Random(number)
        text = " ".join(draw.choice(["so", "many", "words", "to", "read"]) for _ in range(80))
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    common = [*TINY, "--corpus", f"text:{tmp_path / 'texts'}"]
    one = launch(*common, "--out", str(tmp_path / "one"), "--batch-size", "4", "--steps", "4", processes=1)
    two = launch(*common, "--out", str(tmp_path / "two"), "--batch-size", "2", "--steps", "4", processes=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert two.stdout.count("Saved") == 1
    logs = [[line for line in read_log(tmp_path / name) if "loss" in line] for name in ("one", "two")]
    assert [line["tokens"] for line in logs[0]] == [line["tokens"] for line in logs[1]]
    for a, b in zip(*logs, strict=True):
        assert a["bits_per_byte"] == pytest.approx(b["bits_per_byte"], rel=0.02)
    verify(tmp_path / "two" / "checkpoint-4")

    resumed = launch("--resume", "--out", str(tmp_path / "two"), "--steps", "6", processes=2)
    assert resumed.returncode == 0, resumed.stderr
    assert [line["step"] for line in read_log(tmp_path / "two") if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert all(torch.isfinite(x).all() for x in load_file(tmp_path / "two" / "model.safetensors").values())
