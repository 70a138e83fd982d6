"""Two real processes train one policy: as one process does, and writing its files once."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from demo_files import data_set, write_demo_file

from trm_helpers.__main__ import main
from trm_helpers.files import read_jsonl
from trm_helpers.training.distributed import Team

SETTINGS = dict(
    num_demos=5, hidden_dim=16, num_recursions=2, image_size=36, cameras=["agentview_rgb"],
    chunk=2, execution_horizon=1, epochs=2, batch_size=8, num_threads=1, precision="fp32",
    augmentation="none", max_demos_per_task=0, device="cpu",
)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """A function: run ``trm_helpers train`` here or in n processes; returns its rows and output."""
    name = "pick_up_the_alphabet_soup_and_place_it_in_the_basket_demo.hdf5"
    write_demo_file(tmp_path / "libero_object" / name, (6, 7, 8, 9, 10), image_size=36)
    monkeypatch.setenv("TRM_ARTIFACTS_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(processes, run_name):
        command = ["train", "tiny", "--run-name", run_name, "--demo-dir", str(tmp_path)]
        for key, value in SETTINGS.items():
            command += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
        if processes:
            done = subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                 str(processes), "-m", "trm_helpers", *command], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
        else:
            assert main(command) == 0
        rows = read_jsonl(tmp_path / "runs" / run_name / "metrics.jsonl")
        return rows, done.stdout if processes else ""

    return run


@pytest.mark.sim  # the task's name is read from LIBERO
def test_two_processes_give_the_losses_of_one_and_resume(train):
    alone, _ = train(0, "alone")
    together, printed = train(2, "together")
    assert [row["epoch"] for row in together] == [1, 2]
    for key in ("val_loss", "grad_norm"):
        assert [row[key] for row in together] == pytest.approx([row[key] for row in alone],
                                                               rel=2e-3)
    assert printed.count("2 epochs, validation loss") == 1
    assert printed.splitlines()[0] == "waiting for all 2 processes of torchrun"
    assert train(2, "together")[0] == together  # nothing left to do


def test_shares_of_a_batch_add_up_to_the_batch(tmp_path):
    file = write_demo_file(tmp_path / "soup_demo.hdf5", (6, 7), image_size=8)
    data = data_set(file, chunk=2)
    for whole, *parts in zip(data.batches(5, 3, 1),
                             *(data.batches(5, 3, 1, part=(rank, 4)) for rank in range(4)),
                             strict=True):
        count = len(whole["actions"])  # 5, 5 and 3: the last leaves the fourth part empty
        for rank, part in enumerate(parts):
            if rank < count:
                assert torch.equal(part["actions"], whole["actions"][rank::4])
            else:
                assert not part["mask"].any()
        assert sum(part["mask"].sum() for part in parts) == whole["mask"].sum()


class Pair(Team):
    """One of two processes, here threads."""

    together, sums = threading.Barrier(2, timeout=10), [None, None]

    def __init__(self, rank):
        self.size, self.rank, self.device = 2, rank, torch.device("cpu")

    def sum(self, value):
        self.sums[self.rank] = value.detach()
        self.together.wait()
        assert self.sums[0].shape == self.sums[1].shape  # else a GPU waits for ever
        total = self.sums[0] + self.sums[1]
        self.together.wait()
        return total


def test_a_weight_without_gradient_in_one_process_gets_that_of_the_other():
    layers = [torch.nn.Linear(2, 2) for _ in range(2)]
    for number, layer in enumerate(layers):
        layer.unused, layer.frozen = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
        layer.frozen.requires_grad_(False)
        layer.weight.grad = torch.full((2, 2), 2.0 + 4 * number)
    layers[1].bias.grad = torch.tensor([1.0, 3.0])  # in the first process there is none
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank: Pair(rank).average_gradients(layers[rank]), range(2)))
    for layer in layers:
        assert torch.equal(layer.weight.grad, torch.full((2, 2), 4.0))
        assert layer.bias.grad.tolist() == [0.5, 1.5]
        assert layer.unused.grad is layer.frozen.grad is None


@pytest.mark.parametrize("variables", [
    {"WORLD_SIZE": "2"},
    dict(WORLD_SIZE="2", RANK="x", LOCAL_RANK="-1", MASTER_ADDR="h", MASTER_PORT="1.5"),
    dict(WORLD_SIZE="two", RANK="0", LOCAL_RANK="0", MASTER_ADDR="h", MASTER_PORT="1"),
    dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")])
def test_a_leftover_world_size_is_ignored(monkeypatch, capsys, variables):
    """Also with all variables of torchrun left over: no other process would join."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    team = Team("cpu")
    assert team.size == 1 and team.is_main
    team.barrier()  # for nobody
    assert f"WORLD_SIZE={variables['WORLD_SIZE']} is ignored: torchrun did not start" in (
        capsys.readouterr().out)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1",
                            MASTER_PORT="1", TORCHELASTIC_RUN_ID="a").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="LOCAL_RANK=1 .*this machine has 1"):
        Team("cuda")


def test_a_team_of_one_process():
    team = Team("cpu")
    assert team.is_main and team.broadcast(0.5) == 0.5
    assert team.loss_weight(torch.tensor(3.0)) == 1.0
    assert team.sum(torch.tensor([1.0, 0.0])).tolist() == [1.0, 0.0]
