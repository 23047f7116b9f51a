"""Four ranks, and two agents as on two machines, train what one process trains."""
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import as_settings, sail_main
from test_scale import largest_difference, weights

import reward
from generate import load_model

ROOT = Path(reward.__file__).parent
FLAGS = ["--steps", "6", "--batch-size", "8", "--eval-every", "0", "--eval-limit", "2",
         "--learning-rate", "1e-4"]
DP = ["--variant", "dp", "--max-response-length", "12", *FLAGS]
LORA = [*DP, "--lora", "4"]


def launch(path, name, runs, *more):
    """Start torchrun with these flags; each of its ranks works through the runs, lists of arguments."""
    (path / f"{name}.json").write_text(json.dumps(runs))
    command = [sys.executable, "-m", "torch.distributed.run", *more, ROOT / "tests/ranks.py", "runs",
               path / f"{name}.json"]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def without_last_checkpoint(out, copy):
    """A copy of a finished run as if it had stopped after its checkpoint before the last."""
    shutil.copytree(out, copy)
    *_, last = sorted((copy / "checkpoints").iterdir(), key=lambda path: int(path.name))
    shutil.rmtree(last)
    shutil.rmtree(copy / "model")
    return copy


def free_port():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """The directory of all runs: `whole`, `lora` and `reward` by one process; `agents` by two agents;
    `continued` by four ranks and then `again` by one; `lora-4` and `reward-4` by four ranks with shards."""
    pytest.importorskip("peft")
    path = tmp_path_factory.mktemp("four")
    train_reward = ["--train", "--model", base, "--data", f"{base}/toy-pairs.jsonl", *FLAGS]
    sail_main(["--model", base, *DP, "--out", path / "whole"])
    sail_main(["--model", base, *LORA, "--out", path / "lora"])
    flags, chosen = as_settings([*train_reward, "--out", path / "reward"])
    reward.main(flags, **chosen)
    where = f"127.0.0.1:{free_port()}"
    agents = [launch(path, "agents",
                     [["--model", base, *DP, "--save-every", "4", "--out", str(path / "agents")]],
                     "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d",
                     "--rdzv_endpoint", where, "--rdzv_id", "two") for _ in range(2)]
    assert [agent.wait(200) for agent in agents] == [0, 0]
    continued = without_last_checkpoint(path / "agents", path / "continued")
    four = launch(path, "four", [
        ["--model", base, *LORA, "--shard", "--out", str(path / "lora-4")],
        ["--model", base, *DP, "--save-every", "1", "--resume", "--out", str(continued)],
        [*train_reward, "--shard", "--out", str(path / "reward-4")]], "--standalone", "--nproc_per_node", "4")
    assert four.wait(300) == 0
    again = without_last_checkpoint(continued, path / "again")
    sail_main(["--model", base, *DP, "--resume", "--out", again])
    return path


@pytest.mark.parametrize("name, one", [("agents", "whole"), ("continued", "whole"), ("again", "whole"),
                                       ("lora-4", "lora")])
def test_the_parameters_are_those_of_one_process(name, one, runs, base):
    assert largest_difference(weights(runs / name / "model"), weights(runs / one / "model")) < 2e-6
    assert largest_difference(weights(runs / one / "model"), weights(base)) > 1e-5


def test_a_reward_model_of_four_ranks_with_shards_is_that_of_one_process(runs):
    from transformers import AutoModelForSequenceClassification
    one, four = (
        dict(load_model(AutoModelForSequenceClassification, str(runs / name / "model")).named_parameters())
        for name in ("reward", "reward-4"))
    assert largest_difference(one, four) < 2e-6
