"""The benchmark's counting, and that its rows still run."""
import json
import subprocess
import sys

import bench
import pytest


def test_the_least_flops_equal_a_hand_computed_example():
    size = dict(vocab_size=10, hidden_size=4, intermediate_size=3, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1)
    weights = 4 * 4 * 2 + 4 * 2 * 2 + 3 * 4 * 3                        # q and o, k and v, the MLP
    seen = 2 * 2 / 2 + (3 * 2 + 3 * 3 / 2) + (1 * 2 + 1 / 2)           # the prompt once, then both responses
    forward = 2 * (2 * weights * 6 + 4 * 4 * seen) + 2 * 4 * 10 * 4    # layers, output layer
    assert bench.least_flops({"model": size}, [(2, 3, 1)]) == 4 * forward


@pytest.mark.parametrize("variant", ["dpo", "pr"])
def test_a_row_runs_the_loop_and_reports_its_figures(variant, tmp_path):
    row = {"side": "sail", "name": "tiny", "model": bench.MODELS["tiny"], "variant": variant, "steps": 10,
           "batch": 2, "micro": None, "prompt": 8, "response": 6, "new_tokens": 6, "dtype": "float32"}
    child = subprocess.run([sys.executable, bench.__file__, "--row", json.dumps(row)],
                           capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    figures = json.loads(child.stdout.splitlines()[-1])
    assert len(figures["seconds"]) == 8 and figures["padding"] == 0 and figures["rate"] > 1e8
    share = min(figures["generation"]) / min(figures["seconds"])       # without what a busy machine adds
    assert (share > 0.3) == (variant == "pr")
    if variant == "dpo":
        assert figures["tokens"] == [2 * 2 * (8 + 6)] * 8
