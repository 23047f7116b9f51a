"""The loop: its budget, its gradient whatever the micro-batches and ranks, its files, its determinism."""
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TOY_REWARD, sail_args, sail_main, tiny_model
from ranks import batch_gradient, pairs_of
from test_scale import rows_of

import generate
import sail
from data import Pair
from generate import load_policy
from reward import swap_responses
from runtime import processes
from runtime.command_line import seeded
from runtime.packing import allow_packing
from runtime.processes import own_device, share_of_process
from sail import Method, draw_pairs, plan
from toy import write_world

ROOT = Path(sail.__file__).parent
COMMON = ["--steps", "3", "--batch-size", "10", "--limit", "60", "--eval-limit", "4"]


def run(base, out, *more):
    """Train on the toy for a few steps; returns metrics.jsonl as rows without their seconds."""
    sail_main(["--model", base, *COMMON, "--out", str(out), *more])
    return rows_of(out)


@pytest.mark.parametrize("variant, samples", [("pr", True), ("spin", True), ("dpo", False)])
def test_the_entropy_is_that_of_the_samples_per_token(variant, samples, base, tmp_path, capsys):
    """Of a policy whose every token has the same probability it is the vocabulary's logarithm."""
    policy, tokenizer = load_policy(base)
    with torch.no_grad():
        policy.get_input_embeddings().weight.zero_()
    uniform = shutil.copytree(base, tmp_path / "uniform")
    policy.save_pretrained(uniform)
    rows = run(str(uniform), tmp_path / "run", "--variant", variant, "--learning-rate", "1e-12")
    expected = pytest.approx(math.log(len(tokenizer)), abs=1e-4) if samples else None
    assert [row["entropy"] for row in rows] == [expected] * 3
    assert all(0 <= row["label_sharpness"] <= 1 for row in rows)
    line, *_ = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1/3")]
    assert " | label_sharpness " in line and (" | unfinished " in line) == samples


# --- budget and batches

def numbered(n):
    """n pairs whose prompt is their number."""
    return [Pair(place, "", "") for place in range(n)]


@pytest.mark.parametrize("mix", [0.0, 0.1, 0.3, 1 / 3, 0.7, 0.99])
@pytest.mark.parametrize("n, epochs", [(7, 1), (100, 3), (33, 2.5)])
def test_every_offline_pair_is_seen_epochs_times_whatever_the_mix(n, epochs, mix):
    args = sail_args(["--variant", "dp", "--mix", str(mix), "--epochs", str(epochs), "--batch-size", "10"])
    total, count = plan(n, args.mix, args)
    batches, seen, on_the_way = [], [], []
    for step in range(1, count + 1):
        data_pairs, variant_pairs = draw_pairs(numbered(n), step, total, count, args, args.seed)
        assert not any(pair.self_labelled for pair in data_pairs)
        assert all(pair.self_labelled for pair in variant_pairs)
        seen += [pair.prompt for pair in data_pairs]
        on_the_way += [pair.prompt for pair in variant_pairs]
        batches.append(data_pairs + variant_pairs)
    assert len(seen) == int(epochs * n) and len(seen) + len(on_the_way) == total
    assert (sorted(seen[:n]) == list(range(n)) and sorted(on_the_way[:n]) == list(range(n))[:len(on_the_way)]
            or len(on_the_way) < n)
    assert max(map(len, batches)) <= 10 and max(map(len, batches)) - min(map(len, batches)) <= 1
    assert total == pytest.approx(int(epochs * n) / (1 - mix), abs=1 / (1 - mix))


def test_mix_one_is_epochs_of_the_prompts_on_the_variants_route():
    args = sail_args(["--variant", "pr", "--mix", "1", "--epochs", "2", "--batch-size", "10"])
    assert plan(25, args.mix, args) == (50, 5)
    drawn = [draw_pairs(numbered(25), step, 50, 5, args, args.seed) for step in range(1, 6)]
    pairs = [pair for _, variant_pairs in drawn for pair in variant_pairs]
    assert all(pair.on_policy for pair in pairs) and not any(data_pairs for data_pairs, _ in drawn)
    assert sorted(pair.prompt for pair in pairs[:25]) == list(range(25))


def test_the_epochs_are_shuffled_differently_and_by_the_seed():
    def ids(seed):
        drawn = [draw_pairs(numbered(50), step, 100, 2, Method("dpo", mix=0.0), seed) for step in (1, 2)]
        return [pair.prompt for data_pairs, _ in drawn for pair in data_pairs]

    assert ids(0) == ids(0) != ids(1) and ids(0)[:50] != ids(0)[50:] and ids(0) != sorted(ids(0))
    assert sail.order_of(50, 0, True, 0) != sail.order_of(50, 0, False, 0)


@pytest.mark.parametrize("from_data, on_the_way", [(3, 1), (4, 2), (5, 0), (0, 7), (2, 3)])
def test_every_pair_of_a_step_is_of_one_process_and_the_shares_are_even(from_data, on_the_way, monkeypatch):
    monkeypatch.setattr(processes, "world_size", lambda: 3)
    kinds, shares = ([*range(from_data)], [*range(100, 100 + on_the_way)]), []
    for rank in range(3):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        data_pairs, variant_pairs = share_of_process(*kinds)
        assert {*data_pairs} <= {*kinds[0]} and {*variant_pairs} <= {*kinds[1]}
        shares.append(data_pairs + variant_pairs)
    assert sorted(sum(shares, [])) == kinds[0] + kinds[1]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_gradient_repeats_bit_for_bit_on_several_threads():
    """Tokens that pairs of one prompt share are added up by several threads."""
    own_device()
    model, threads = allow_packing(tiny_model(max_position_embeddings=1024)), torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    prompt, *responses = torch.randint(5, 261, (9, 400), generator=generator).tolist()
    pairs = [Pair("", "", "", prompt, responses[place], responses[place + 1]) for place in range(0, 8, 2)]
    gradients = []
    torch.set_num_threads(4)
    try:
        for _ in range(4):
            gradients.append(torch.autograd.grad(sail.pair_logps(model, pairs).sum(), [*model.parameters()]))
    finally:
        torch.set_num_threads(threads)
    for other in gradients[1:]:
        assert all(map(torch.equal, gradients[0], other))


# --- random numbers

PURPOSES = [purpose for name in sorted([*ROOT.glob("*.py"), *ROOT.glob("runtime/*.py")])
            for purpose in re.findall(r'(?<!def )seeded\("([^"]+)"', name.read_text())]


def test_the_toy_computes_on_one_thread_and_other_data_on_as_many_as_there_are(base, tmp_path, monkeypatch):
    shutil.copy(f"{base}/toy-pairs.jsonl", tmp_path / "mine.jsonl")
    for more, threads in (([], [1]), (["--data", f"{tmp_path}/mine.jsonl", "--max-prompt-length", "8",
                                       "--max-response-length", "24"], [])):
        seen = []
        monkeypatch.setattr(torch, "set_num_threads", seen.append)
        run(base, tmp_path / f"run{len(more)}", "--variant", "dpo", "--steps", "1", *more)
        assert seen == threads


def test_any_two_of_purpose_seed_step_and_rank_give_different_streams():
    """Numbers in the seed that differ by a power of two were the same to a generator of 32 bits."""
    assert len(PURPOSES) == len({*PURPOSES}) >= 8
    numbers = [0, 1, 2, 3, 4, 10, 100, 1024, 2048, 2**20, 2**30]
    keys = [*itertools.product(["samples", "order"], numbers, [0, 1, 2, 3, 1024], [0, 1, 2]),
            *[(purpose,) for purpose in PURPOSES], *[(purpose, 0) for purpose in PURPOSES]]
    seeds = [seeded(*key) for key in keys]
    assert len(set(seeds)) == len(keys) and max(seeds) < 2**32
    streams = [torch.rand(8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    values, times = torch.cat(streams).unique(return_counts=True)
    assert times.max() <= 2 and len(values) > 0.999 * 8 * len(keys)    # nor shifted copies: 24 bits may meet


def test_the_order_and_the_label_draws_are_of_the_seed_also_of_those_that_32_bits_confuse():
    def drawn(seed):
        data_pairs, variant_pairs = draw_pairs(numbered(50), 1, 50, 1, Method("dp", mix=0.4), seed)
        pairs = data_pairs + variant_pairs
        return tuple(pair.prompt for pair in pairs), tuple(pair.label_draw for pair in pairs)

    orders, draws = zip(*map(drawn, [0, 4, 2048, 2**32, 2**40]), strict=True)
    assert len({*orders}) == len({*draws}) == 5


def test_the_rollouts_of_three_seeds_differ_and_those_of_one_do_not(base, tmp_path, monkeypatch):
    """Of the same prompt, so that nothing but the draws can differ."""
    drawn, original = [], sail.roll_out

    def roll_out(*inputs):
        pairs = original(*inputs)
        drawn.append(str([(pair.chosen_ids, pair.rejected_ids) for pair in pairs]))
        return pairs

    monkeypatch.setattr(sail, "roll_out", roll_out)
    for nth, seed in enumerate("0120"):
        run(base, tmp_path / str(nth), "--variant", "pr", "--mix", "1", "--limit", "1", "--steps", "2",
            "--learning-rate", "1e-12", "--seed", seed, "--eval-every", "0")
    assert len({*drawn}) == 6 and drawn[:2] == drawn[6:]               # three seeds of two steps each


# --- gradients

@pytest.mark.parametrize("variant", ["dpo", "dp", "pp", "pr"])
def test_the_gradient_does_not_depend_on_the_micro_batches(variant):
    whole, totals = batch_gradient(8, variant, 8)
    assert whole.norm() > 1e-3
    for size in (1, 2, 3):
        gradient, again = batch_gradient(8, variant, size)
        torch.testing.assert_close(gradient, whole, rtol=0, atol=1e-6)
        assert again == pytest.approx(dict(totals), abs=1e-3)


def test_two_ranks_give_the_gradient_of_one_process_also_on_uneven_shares(tmp_path):
    out = tmp_path / "gradients.json"
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                    ROOT / "tests/ranks.py", "gradients", out], check=True, timeout=200,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    for case, (shared, totals) in json.loads(out.read_text()).items():
        variant, n, label = case.split()
        gradient, alone = batch_gradient(int(n), variant, 2, label=label)
        torch.testing.assert_close(torch.tensor(shared), gradient, rtol=0, atol=1e-6, msg=case)
        assert totals == pytest.approx(dict(alone), abs=1e-3), case


def test_sft_is_the_mean_negative_log_likelihood_per_token(base, tmp_path):
    row = run(base, tmp_path, "--variant", "sft", "--steps", "1", "--learning-rate", "1e-9")[0]
    # 57 words, untrained
    assert row["loss"] == pytest.approx(math.log(57), rel=0.2) and row["margin"] is None


# --- runs

@pytest.mark.parametrize("variant", ["sft", "dpo", "dp", "pp", "pr"])
def test_a_run_repeats_bit_for_bit_and_leaves_its_files(base, tmp_path, variant):
    more = ["--variant", variant, "--mix", "0.5"] if variant not in ("sft", "dpo") else ["--variant", variant]
    rows = run(base, tmp_path / "a", *more, "--max-response-length", "8")
    assert rows == run(base, tmp_path / "b", *more, "--max-response-length", "8")
    assert [row["step"] for row in rows] == [1, 2, 3]
    wanted = ("step loss margin accuracy chosen_logps rejected_logps kl reward response_length unfinished "
              """on_policy
                self_labelled grad_norm learning_rate tokens""")
    assert set(wanted.split()) <= set(rows[0])
    if variant != "sft":
        assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)       # policy = reference at the start
    assert rows[0]["on_policy"] == (0.5 if variant in ("pp", "pr") else 0 if variant != "sft" else None)
    assert rows[0]["self_labelled"] == (0.5 if variant in ("dp", "pp") else 0 if variant != "sft" else None)
    assert (rows[0]["reward"] is not None) == (variant == "pr")
    policy, _ = load_policy(str(tmp_path / "a/model"))
    start, _ = load_policy(base)
    assert any(not torch.equal(one, other)
               for one, other in zip(policy.parameters(), start.parameters(), strict=True))
    assert json.loads((tmp_path / "a/args.json").read_text())["variant"] == variant
    samples = [json.loads(line) for line in (tmp_path / "a/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 8 and all("response" in row for row in samples)      # four held-out prompts, twice
    assert not (tmp_path / "a/model.writing").exists()


def test_iterative_dpo_fully_online_soft_labels_drawn_labels_and_another_optimizer_run(base, tmp_path):
    rows = run(base, tmp_path, "--variant", "pr", "--mix", "1", "--response-coef", "0",
               "--preference", "hard", "--label", "sampled", "--optimizer", "rmsprop",
               "--schedule", "cosine", "--micro-batch-size", "3")
    assert all(row["on_policy"] == 1 and row["loss"] is not None for row in rows)


@pytest.mark.parametrize("flags, first_loss", [
    ("--variant dpo --loss-type hinge --nll-coef 0.1", 1.0),
    ("--variant dpo --loss-type ipo --beta 0.5", 1.0),
    ("--variant dpo --label-smoothing 0.1", math.log(2)), ("--variant spin", math.log(2)),
    ("--variant dpo --loss-type simpo --beta 2", None),
    ("--variant dpo --loss-type orpo --nll-coef 10", None),
    ("--variant pp --revkl-coef 0.5 --loss-type sigmoid_norm", math.log(2)),
    ("--variant pr --mix 1", math.log(2))])
def test_the_named_special_cases_run(base, tmp_path, flags, first_loss):
    rows = run(base, tmp_path, *flags.split(), "--max-response-length", "8")
    assert all(row["skipped"] == 0 and math.isfinite(row["loss"]) for row in rows)
    if first_loss is not None:
        assert rows[0]["loss"] == pytest.approx(first_loss, abs=1e-4)
    assert rows[0]["on_policy"] == pytest.approx({"dpo": 0, "pp": 0.3, "pr": 1, "spin": 0}[flags.split()[1]])
    if "revkl" in flags:
        assert rows[0]["revkl"] == pytest.approx(0, abs=1e-5) and rows[2]["revkl"] > 0


def test_bfloat16_autocast_keeps_float32_weights(base, tmp_path):
    rows = run(base, tmp_path, "--variant", "pr", "--dtype", "bfloat16")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert next(load_policy(str(tmp_path / "model"))[0].parameters()).dtype == torch.float32


def test_parameters_move_at_a_learning_rate_of_5e_7(base, tmp_path):
    run(base, tmp_path, "--variant", "dpo", "--learning-rate", "5e-7", "--steps", "1")
    policy, start = load_policy(str(tmp_path / "model"))[0], load_policy(base)[0]
    moved = [(one != other).float().mean()
             for one, other in zip(policy.parameters(), start.parameters(), strict=True)]
    assert sum(moved) / len(moved) > 0.5


def test_non_finite_gradients_are_skipped_counted_and_stop_the_run_after_ten(base, tmp_path, monkeypatch):
    def poisoned(*args, **options):
        losses, metrics = original(*args, **options)
        return losses * math.nan, metrics

    original = sail.preference_losses
    monkeypatch.setattr(sail, "preference_losses", poisoned)
    rows = run(base, tmp_path / "few", "--variant", "dpo", "--steps", "4")
    assert [row["skipped"] for row in rows] == [1, 2, 3, 4]
    policy, start = load_policy(str(tmp_path / "few/model"))[0], load_policy(base)[0]
    assert all(torch.equal(one, other)
               for one, other in zip(policy.parameters(), start.parameters(), strict=True))
    with pytest.raises(sail.InputError, match="steps 1 to 10 had no finite loss or gradient"):
        run(base, tmp_path / "many", "--variant", "dpo", "--steps", "20")


@pytest.mark.parametrize("loss_type, f_zero", [("sigmoid", -math.log(2)), ("ipo", -1.0), ("hinge", -1.0)])
def test_the_baseline_follows_the_utility_of_past_fresh_pairs(loss_type, f_zero, base, tmp_path, monkeypatch):
    """It begins at f(0); of IPO at β 0.5, that is −1."""
    seen = []

    def watched(policy, reference, pairs, method, baseline, dtype):
        losses, metrics = original(policy, reference, pairs, method, baseline, dtype)
        seen.append((baseline, -(metrics["on_policy_loss"] / metrics["on_policy"]).item()))
        return losses, metrics

    original = sail.preference_losses
    monkeypatch.setattr(sail, "preference_losses", watched)
    run(base, tmp_path, "--variant", "pr", "--mix", "0.5", "--learning-rate", "1e-2",
        "--max-response-length", "8", "--loss-type", loss_type)
    assert seen[0][0] == pytest.approx(f_zero) and seen[1][1] != pytest.approx(seen[1][0], abs=1e-4)
    for (baseline, utility), (later, _) in itertools.pairwise(seen):
        assert later == pytest.approx(baseline + 0.1 * (utility - baseline), abs=1e-6)


def test_a_step_that_is_not_finite_leaves_the_baseline_where_it_was(base, tmp_path, monkeypatch):
    seen, original = [], sail.preference_losses

    def poisoned(policy, reference, pairs, method, baseline, dtype):
        losses, metrics = original(policy, reference, pairs, method, baseline, dtype)
        seen.append(baseline)
        if len(seen) == 3:
            losses, metrics["on_policy_loss"] = losses * math.nan, metrics["on_policy_loss"] * math.nan
        return losses, metrics

    monkeypatch.setattr(sail, "preference_losses", poisoned)
    run(base, tmp_path, "--variant", "pr", "--mix", "1", "--steps", "5", "--max-response-length", "8")
    assert len(seen) == 5 and seen[1] != seen[2] == seen[3] != seen[4] and math.isfinite(seen[4])


def test_the_logged_kl_is_the_mean_log_ratio_of_the_fresh_responses():
    args = sail_args(["--variant", "pr"])
    data_pairs, fresh = pairs_of(6, "pr")
    pairs = data_pairs + fresh
    policy, reference = tiny_model(seed=1), tiny_model(seed=2)
    _, metrics = sail.preference_losses(policy, reference, pairs, args, baseline=0.0)
    ours, theirs = sail.pair_logps(policy, fresh), sail.pair_logps(reference, fresh)
    assert metrics["kl"].item() == pytest.approx((ours - theirs).mean().item() * len(fresh) / 6, rel=1e-5)


def test_nll_is_that_of_the_datas_chosen_responses_and_not_of_pairs_on_the_variants_route():
    """As neither a self-labelled pair nor a sampled response is one that the data prefers."""
    for variant in ("dp", "pr"):
        args = sail_args(["--variant", variant, "--nll-coef", "0.5"])
        data_pairs, variant_pairs = pairs_of(6, variant)
        pairs, models = data_pairs + variant_pairs, (tiny_model(seed=1), tiny_model(seed=2))
        losses, metrics = sail.preference_losses(*models, pairs, args, baseline=0.0)
        args.nll_coef = 0.0
        plain, _ = sail.preference_losses(*models, pairs, args, baseline=0.0)
        chosen = sail.pair_logps(models[0], pairs)[0]
        nll = [0 if pair.on_policy or pair.self_labelled else -logps.item() / len(pair.chosen_ids)
               for pair, logps in zip(pairs, chosen, strict=True)]
        assert nll.count(0) == 3
        assert (losses - plain).tolist() == pytest.approx([0.5 * value for value in nll], abs=1e-4)
        assert metrics["nll"].item() == pytest.approx(sum(nll) / 6, rel=1e-4)


FRESH = ["--batch-size", "7", "--variant", "pr", "--mix", "1", "--max-response-length", "12"]
RUNS = {**{variant: ["--batch-size", "7", "--variant", variant, "--learning-rate", "1e-3"]
           for variant in ("sft", "dp")}, "pr": FRESH, "pr again": FRESH}


@pytest.fixture(scope="module")
def on_two_ranks(base, tmp_path_factory):
    """The directory with the results of RUNS, on two ranks of torchrun, in one launch."""
    path = tmp_path_factory.mktemp("ranks")
    write_world()
    arguments = [["--model", base, *COMMON, *more, "--out", str(path / name)] for name, more in RUNS.items()]
    (path / "runs.json").write_text(json.dumps(arguments))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                    ROOT / "tests/ranks.py", "runs", path / "runs.json"], check=True, timeout=200,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    return path


@pytest.mark.parametrize("variant", ["sft", "dp"])
def test_a_run_on_two_ranks_is_that_of_one_process(base, on_two_ranks, tmp_path, variant):
    alone = run(base, tmp_path, *RUNS[variant], "--micro-batch-size", "2")
    for one, two in zip(alone, rows_of(on_two_ranks / variant), strict=True):
        measured = {key: value for key, value in one.items() if value is not None}
        assert (set(two) == set(one)
                and {key: two[key] for key in measured} == pytest.approx(measured, rel=1e-3, abs=1e-5))


def test_ranks_draw_different_samples_and_a_rerun_repeats_them(base, on_two_ranks, tmp_path):
    rows = rows_of(on_two_ranks / "pr")
    assert rows == rows_of(on_two_ranks / "pr again")
    assert rows[0]["reward"] != run(base, tmp_path, *FRESH)[0]["reward"]


def test_the_gradient_is_that_of_the_mean_loss(base, tmp_path):
    more = ["--variant", "dp", "--reference", base, "--steps", "1", "--batch-size", "10", "--limit", "60"]
    row = run(base, tmp_path, *more)[0]
    args = sail_args(["--model", base, *more])
    loaded, *_ = sail.load_run(args)
    data_pairs, variant_pairs = draw_pairs(loaded.examples, 1, 10, 1, args, args.seed)
    losses, _ = sail.preference_losses(loaded.policy, loaded.reference, data_pairs + variant_pairs, args, 0.0)
    losses.mean().backward()
    norm = torch.stack([p.grad.norm() for p in loaded.policy.parameters()]).norm().item()
    assert (row["grad_norm"] == pytest.approx(norm, rel=1e-4)
            and row["loss"] == pytest.approx(losses.mean().item()))


@pytest.mark.parametrize("more", [[], ["--lora", "4"]], ids=["whole", "lora"])
def test_another_reference_is_used_and_never_moves(base, tmp_path, more):
    if more:
        pytest.importorskip("peft")
    other = Path(base, "reference")
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    rows = run(base, tmp_path / "run", "--variant", "dpo", "--reference", str(other), *more)
    assert rows[0]["loss"] != pytest.approx(math.log(2), abs=1e-4)
    assert before == {path.name: path.read_bytes() for path in other.iterdir()}


def test_pr_learns_the_toy_reward(tmp_path, monkeypatch):
    """From the command line, start to end: SFT and pairs on first use, then PR, which gains on held-out
    prompts."""
    monkeypatch.chdir(tmp_path)
    finished = subprocess.run([sys.executable, ROOT / "sail.py", "--variant", "pr", "--steps", "40"],
                              text=True, capture_output=True, timeout=1800, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "so it is trained now" in finished.stdout and "sampling pairs from" in finished.stdout
    curve = [json.loads(line)["reward"] for line in Path("runs/toy/pr/eval.jsonl").read_text().splitlines()]
    assert curve[-1] - curve[0] > 0.6


def test_each_process_samples_from_a_stream_of_its_own(base, tmp_path, monkeypatch):
    from runtime import training
    seeds = {}
    for rank in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(training, "rank", lambda rank=rank: rank)
            patch.setattr(sail, "roll_out", lambda policy, tokenizer, pairs, *_, rank=rank: (
                seeds.setdefault(rank, torch.initial_seed()), pairs)[1])
            sail_main(["--variant", "pr", "--model", base, "--steps", "1", "--batch-size", "4",
                       "--eval-limit", "1", "--eval-every", "0", "--out", str(tmp_path / str(rank))])
    assert seeds[0] != seeds[1]


# --- the reference's log-probabilities, computed once

@pytest.mark.parametrize("more, is_once", [
    (["--variant", "dpo", "--epochs", "2"], True), (["--variant", "dpo"], False),
    (["--variant", "dp"], True),                                      # its own pairs are the data's again
    (["--variant", "relabelled-dpo", "--epochs", "2", "--reward", TOY_REWARD], True),
    (["--variant", "dpo", "--epochs", "2", "--revkl-coef", "0.1"], False),        # it needs whole softmaxes
    (["--variant", "pr", "--epochs", "2", "--reward", TOY_REWARD], False),
    (["--variant", "pr", "--epochs", "2", "--mix", "0", "--reward", TOY_REWARD], True)])
def test_the_reference_scores_pairs_that_are_met_again_once_and_the_run_is_the_same(more, is_once, base,
                                                                                     tmp_path, monkeypatch):
    """The same up to the rounding of sums in float32, which depends on what else is in a batch."""
    argv = ["--model", base, "--data", f"{base}/toy-pairs.jsonl", "--limit", "60", "--batch-size", "16",
            "--max-prompt-length", "12", "--max-response-length", "6", "--learning-rate", "1e-3",
            "--eval-every", "0", "--eval-limit", "1", *more]
    by_reference, scored = generate.pair_logps, []
    monkeypatch.setattr(generate, "pair_logps", lambda model, pairs, dtype: (
        scored.append(len(pairs)), by_reference(model, pairs, dtype))[1])
    sail_main([*argv, "--out", str(tmp_path / "once")])
    assert (40 < sum(scored) < 60) == (is_once or more == ["--variant", "dpo"])
    started = []
    monkeypatch.setattr(sail, "score_once", lambda *_: started.append(True))
    sail_main([*argv, "--out", str(tmp_path / "each time")])
    assert bool(started) == is_once
    losses = [[row["loss"] for row in rows_of(tmp_path / name)] for name in ("once", "each time")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_a_fresh_response_forgets_the_log_probability_of_the_one_it_replaces(base):
    policy, tokenizer = load_policy(base)
    known = torch.tensor([-3.0, -4.0])
    pairs = [Pair("Q", "a", "b", [5, 6], [7, 1], [8, 1], reference_logps=known) for _ in range(2)]
    args = sail_args(["--variant", "spin", "--max-response-length", "4"])
    fresh = generate.roll_out(policy, tokenizer, pairs, ("rejected",), args)
    assert all(pair.reference_logps is None for pair in fresh) and pairs[0].reference_logps is known
    swap_responses(pairs[0])
    assert pairs[0].reference_logps.tolist() == [-4.0, -3.0]
