"""Several processes under torchrun train one model: replicas, divided parameters, resuming, a process that dies."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.testing import assert_close

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.train import TrainConfig, load_model, read_log, verify
from nestlearn.train.config import check_processes, share_batch

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo, the CPU backend")
SMALL: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
MATRIX = {"mixer": {"type": "self_modifying", "architecture": "matrix", "chunk_size": 8}}
DEEP = {"mixer": {"type": "self_modifying", "chunk_size": 8, "projection_chunk_size": 16}}
LEVELS = {"mixer": "attention", "cms": [{"period": 8, "hidden": 8}, {"hidden": 24}]}
CASES: dict[str, dict[str, Any]] = {
    "matrix": {"model": SMALL | MATRIX},
    "deep": {"model": SMALL | DEEP},
    "levels": {"model": SMALL | LEVELS},
    "levels-loss": {"model": SMALL | LEVELS | {"cms_signal": "loss"}},
    "m3": {"model": SMALL | MATRIX, "optimizer": "m3"},
    # Documents of a packed batch are read apart in one process and padded there, and DGD counts every input it sees.
    "dgd": {"model": SMALL | MATRIX | {"reset_token_id": None}, "optimizer": "dgd"},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(40):
        draw = random.Random(number)
        text = " ".join(draw.choice(["so", "many", "words", "to", "read"]) for _ in range(80))
        (folder / f"{number}.txt").write_text(text)
    return f"text:{folder}"


def fields(corpus: str, out: Path, **changes: Any) -> dict[str, Any]:
    """A run that reads four sequences per update, whatever the number of processes."""
    base = {"corpus": corpus, "out": str(out), "sequence_length": 32, "threads": 1, "log_interval": 1}
    return base | {"save_interval": 10, "eval_windows": 4, "dtype": "float64", "steps": 20} | changes


def launch(runs: list[dict[str, Any]], processes: int, folder: Path) -> subprocess.CompletedProcess[str]:
    """Train these runs one after the other in ``processes`` processes."""
    path = folder / f"runs-{len(list(folder.glob('runs-*')))}.json"
    path.write_text(json.dumps(runs))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    command += [str(Path(__file__).with_name("ranks.py")), str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=560, env=environment)
    assert done.returncode == 0, done.stderr
    return done


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_log(out) if "loss" in line]


def assert_same_run(out: Path, other: Path) -> None:
    a, b = (load_file(folder / "model.safetensors") for folder in (out, other))
    assert a.keys() == b.keys()
    for name, weights in a.items():
        assert_close(b[name], weights, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    assert_close(losses(other), losses(out), rtol=0, atol=1e-5)


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_and_four_processes_equal_one(case: str, corpus: str, tmp_path: Path):
    run = CASES[case]
    launch([fields(corpus, tmp_path / "one", batch_size=4, **run)], 1, tmp_path)
    two = [fields(corpus, tmp_path / s, batch_size=2, strategy=s, **run) for s in ("ddp", "fsdp")]
    launch(two, 2, tmp_path)
    # On four processes some parameters have no part on the last ones.
    hsdp = fields(corpus, tmp_path / "hsdp", batch_size=1, strategy="hsdp", shard_size=2, **run)
    launch([hsdp, fields(corpus, tmp_path / "four", batch_size=1, strategy="fsdp", **run)], 4, tmp_path)
    for strategy in ("ddp", "fsdp", "hsdp", "four"):
        assert_same_run(tmp_path / "one", tmp_path / strategy)
    assert load_model(tmp_path / "hsdp").config.num_hidden_layers == 2
    log = [line["tokens"] for line in read_log(tmp_path / "hsdp") if "loss" in line]
    assert log == [128 * step for step in range(1, 21)]


@needs_gloo
@pytest.mark.slow
def test_mixed_precision_is_the_same_divided_or_not(corpus: str, tmp_path: Path):
    half = {"dtype": "bfloat16", "batch_size": 2, **CASES["matrix"]}
    launch([fields(corpus, tmp_path / s, strategy=s, **half) for s in ("ddp", "fsdp")], 2, tmp_path)
    launch([fields(corpus, tmp_path / "wide", **half | {"dtype": "float32"})], 2, tmp_path)
    assert_close(losses(tmp_path / "fsdp"), losses(tmp_path / "ddp"), rtol=0, atol=1e-3)
    assert losses(tmp_path / "fsdp") != losses(tmp_path / "wide")
    assert load_file(tmp_path / "fsdp" / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.float32


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "m3"])
def test_a_divided_run_resumes_on_any_number_of_processes(optimizer: str, corpus: str, tmp_path: Path):
    # A schedule that does not depend on the number of steps.
    run = {"optimizer": optimizer, "strategy": "fsdp", "schedule": "constant", "warmup": 1, **CASES["matrix"]}
    whole, parts = (fields(corpus, tmp_path / name, batch_size=2, **run) for name in ("whole", "parts"))
    launch([whole, parts | {"steps": 10}], 2, tmp_path)
    # The same command each time, with the batch per process of the first start.
    go_on = {"resume": True, "out": parts["out"], "batch_size": 2}
    for steps, processes in ((12, 2), (14, 4), (16, 4), (20, 1)):
        launch([go_on | {"steps": steps}], processes, tmp_path)
        verify(tmp_path / "parts" / f"checkpoint-{steps}")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(AssertionError, match="reads 4 sequences at once .* 3 processes"):
        launch([go_on | {"steps": 30}], 3, tmp_path)


@needs_gloo
@pytest.mark.slow
def test_the_others_stop_where_one_process_dies(corpus: str, tmp_path: Path):
    """Started by hand, as on two machines: no agent of torchrun stops the other."""
    divided = {"batch_size": 2, "steps": 4000, "strategy": "fsdp", "save_interval": 5, **CASES["matrix"]}
    run = fields(corpus, tmp_path / "run", **divided)
    (tmp_path / "runs-0.json").write_text(json.dumps([run]))
    with_port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000), "WORLD_SIZE": "2"}
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), str(tmp_path / "runs-0.json")]
    processes = [
        subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **with_port, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    checkpoint = tmp_path / "run" / "checkpoint-5"
    for _ in range(1200):
        time.sleep(0.1)
        if checkpoint.exists() or processes[0].poll() is not None:
            break
    processes[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    _, error = processes[0].communicate(timeout=60)
    processes[1].communicate()
    assert processes[0].returncode == 1, error
    assert time.monotonic() - began < 60
    assert "Another process of this run has ended" in error
    assert "--resume" in error
    last = max(int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*"))
    launch([{"resume": True, "out": run["out"], "steps": last + 2}], 2, tmp_path)
    assert [line["step"] for line in read_log(tmp_path / "run") if "loss" in line] == list(range(1, last + 3))


@needs_gloo
@pytest.mark.slow
def test_torchrun_starts_a_run_again_where_it_was(corpus: str, tmp_path: Path):
    words = f"--hidden-size 16 --num-attention-heads 2 --num-hidden-layers 1 --corpus {corpus} --sequence-length 32"
    words += f" --batch-size 2 --steps 400 --save-interval 5 --eval-windows 4 --threads 1 --out {tmp_path / 'run'}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--max-restarts=1"]
    command += ["-m", "nestlearn", "train", *words.split(), "--log-interval", "1"]
    # The store of torchrun keeps the addresses of the processes before, which gloo would try again.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    agent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    for _ in range(1200):
        time.sleep(0.1)
        if (tmp_path / "run" / "checkpoint-5").exists() or agent.poll() is not None:
            break
    workers = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, error = agent.communicate(timeout=300)
    assert agent.returncode == 0, error
    assert [line["step"] for line in read_log(tmp_path / "run") if "loss" in line] == list(range(1, 401))


@needs_gloo
@pytest.mark.parametrize("signal_of_levels", ["local", "loss"])
def test_a_divided_model_computes_the_same(signal_of_levels: str, tmp_path: Path):
    from nestlearn.train.sharding import process_mesh, shard, whole_weights

    torch.manual_seed(0)
    levels = {"cms_signal": signal_of_levels, "reset_token_id": 0}
    config = HopeConfig.from_preset("hope-tiny", **SMALL | LEVELS | levels | {"num_hidden_layers": 1})
    model = HopeForCausalLM(config)
    ids = torch.tensor([[0, 3, 4, 5, 6, 0, 7, 8, 9, 10], [0, *range(1, 10)]])
    loss = model(ids, labels=ids).loss
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    before = {name: weights.clone() for name, weights in model.state_dict().items()}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        shard(model, process_mesh(None, torch.device("cpu")))
        divided = model(ids, labels=ids).loss
        divided.backward()
        assert_close(divided, loss)
        for name, parameter in model.named_parameters():
            assert hasattr(parameter, "placements"), name
            assert_close(parameter.grad.full_tensor(), gradients[name], msg=name)
        weights = whole_weights(model)
        assert weights.keys() == dict(model.named_parameters()).keys()  # a tied one once
        for name, found in weights.items():
            assert_close(found, before[name], rtol=0, atol=0)
    finally:
        dist.destroy_process_group()


def test_processes_that_cannot_share_the_work_are_refused():
    with pytest.raises(ValueError, match="torchrun --nproc-per-node"):
        check_processes(TrainConfig(strategy="fsdp"), 0)
    with pytest.raises(ValueError, match="Use one of 1, 3"):
        check_processes(TrainConfig(strategy="hsdp", shard_size=2), 3)
    with pytest.raises(ValueError, match="hsdp needs"):
        TrainConfig(strategy="hsdp")
    with pytest.raises(ValueError, match="no other strategy has one"):
        TrainConfig(strategy="fsdp", shard_size=2)
    with pytest.raises(ValueError, match="a number of processes that divides 4"):
        share_batch(TrainConfig(batch_size=2), 2, 3)
