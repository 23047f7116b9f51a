"""Every switch changes the number that it should, to the right value; so do seeds, counters and the compute
dtype."""
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import TOY_REWARD, run_of, sail_args, sail_main, tiny_model
from ranks import pairs_of

import evaluate
import generate
import reward
import sail
from data import Pair
from formats import Account, read_rows
from generate import add_adapter, load_policy
from runtime.command_line import InputError, seeded
from runtime.optimizer import make_optimizer, optimizer_step
from runtime.run_directory import write_line, write_rows
from runtime.settings import Settings
from sail import draw_pairs, preference_losses, record_of
from toy import WORLD, draw_toy_pairs, toy_model, write_world

SHORT = ["--batch-size", "4", "--limit", "40", "--eval-limit", "4", "--eval-every", "0",
         "--max-prompt-length", "8", "--max-response-length", "6"]


def train(base, out, *more):
    """Train for a few steps; returns metrics.jsonl."""
    sail_main(["--model", base, *SHORT, "--out", str(out), *more])
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def losses_of(*flags, variant="pr", draw=None):
    """preference_losses of six pairs, of which three take the variant's way: (losses, metrics, pairs)."""
    args = sail_args(["--variant", variant, *flags])
    data_pairs, variant_pairs = pairs_of(6, variant)
    for pair in variant_pairs:
        pair.preference = 0.7
        pair.label_draw = draw
    pairs = data_pairs + variant_pairs
    return *preference_losses(tiny_model(seed=1), tiny_model(seed=2), pairs, args, baseline=0.0), pairs


# --- losses and labels

def test_a_sampled_label_is_the_one_that_its_draw_says():
    """Of probability 0.7: at a draw below it the chosen response has won, above it the rejected one."""
    losses = {draw: losses_of("--label", "sampled", draw=draw)[0][3:] for draw in (0.0, 0.69, 0.71)}
    mean = losses_of(draw=0.0)[0][3:]
    assert torch.equal(losses[0.0], losses[0.69])
    torch.testing.assert_close(0.7 * losses[0.0] + 0.3 * losses[0.71], mean)
    assert (losses[0.0] - losses[0.71]).abs().min() > 1e-4


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_the_preference_of_a_step_is_soft_or_hard(kind, base, tmp_path, monkeypatch):
    seen, original = [], sail.accumulate_gradients

    def watched(run, pairs, method):
        seen.extend((pair.preference, pair.rewards) for pair in pairs)
        return original(run, pairs, method)

    monkeypatch.setattr(sail, "accumulate_gradients", watched)
    train(base, tmp_path, "--variant", "online-dpo", "--mix", "1", "--steps", "2", "--preference", kind)
    apart = [(p, better - worse) for p, (better, worse) in seen if better != worse]
    assert len(apart) > 2
    for p, difference in apart:
        assert p == (1.0 if kind == "hard" else pytest.approx(1 / (1 + math.exp(-difference))))


PKU = {"response_0": "good", "response_1": "harmless", "better_response_id": 0, "safer_response_id": 1}
SCORED = {"chosen": "good", "rejected": "bad", "score_chosen": 5, "score_rejected": 4}


@pytest.mark.parametrize("row, more, label", [
    (PKU, ["--prefer", "better"], ("good", 1.0)), (PKU, ["--prefer", "safer"], ("harmless", 1.0)),
    (SCORED, ["--score-scale", "0.5"], ("good", 1 / (1 + math.exp(-2))))])
def test_the_label_that_is_followed_is_the_one_asked_for(row, more, label, base, tmp_path, monkeypatch):
    """In training and on held-out pairs of another file, by every script that has the flag. So is the limit,
    which is of the training pairs alone."""
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({**row, "prompt": f"Q{n}"}) + "\n" for n in range(40)))
    flags = ["--data", str(file), "--eval-data", str(file), *more]
    by_sail = sail.load_data(sail.parse_args(["--variant", "dpo", "--model", base, *flags], limit=30))[:2]
    _, settings = evaluate.find_run(base, evaluate.parse_args([base, *flags])[2])
    by_evaluate, _ = evaluate.held_out_pairs(settings)
    by_reward = []
    monkeypatch.setattr(reward, "encode_for_reward",
                        lambda pairs, _: by_reward.append(pairs) or ([], Account(), {}))
    with pytest.raises(InputError, match="none of 30 pairs can be used for training"):
        reward.train_reward(reward.parse_args(["--train", "--model", base, *flags], limit=30))
    for pairs, n in zip((*by_sail, by_evaluate, *by_reward), (30, 40, 40, 30, 40), strict=True):
        assert len(pairs) == n and {(pair.chosen, round(pair.preference, 9)) for pair in pairs} == {
            (label[0], round(label[1], 9))}


def test_so_many_prompts_as_the_flag_says_are_answered_at_a_time(base, held_out, tmp_path, monkeypatch):
    """In rollouts and evaluations of a run, by evaluate.py, which takes the run's number unless it has its
    own, and by generate.py. Each model that is loaded has first answered two."""
    seen, original = [], generate.draw

    def watched(model, prompt_ids, *more):
        seen.append(len(prompt_ids))
        return original(model, prompt_ids, *more)

    def numbers(main, *argv):
        seen.clear()
        monkeypatch.setattr("sys.argv", ["script.py", *argv])
        main()
        return list(seen)

    monkeypatch.setattr(generate, "draw", watched)
    train(base, tmp_path / "run", "--variant", "pr", "--mix", "1", "--steps", "1", "--sample-batch-size", "3")
    assert seen == [2, 3, 1, 3, 1]
    argv = [str(tmp_path / "run"), "--eval-limit", "4", "--reward", TOY_REWARD]
    assert numbers(evaluate.main, *argv) == [2, 2, 3, 1]
    assert numbers(evaluate.main, *argv, "--sample-batch-size", "4") == [2, 2, 4]
    assert numbers(generate.main, "--model", base, "--data", held_out, "--limit", "4", "--sample-batch-size",
                   "3", "--max-prompt-length", "8", "--max-response-length", "6", "--out",
                   str(tmp_path / "responses.jsonl")) == [2, 3, 1]


def test_the_anchor_adds_its_weight_times_the_reverse_kl():
    plain, metrics, _ = losses_of("--revkl-coef", "0", variant="pp", draw=0.0)
    anchored, measured, _ = losses_of("--revkl-coef", "0.5", variant="pp", draw=0.0)
    added = anchored - plain
    wanted = 0.5 * measured["revkl"].item()
    assert added.min() > 1e-3 and added.mean().item() == pytest.approx(wanted, rel=1e-4)
    assert metrics["revkl"] == 0
    assert sail_args(["--variant", "pp"]).revkl_coef == 0.3           # the toy's
    assert sail_args(["--variant", "pp", "--data", "x.jsonl", "--model", "m"]).revkl_coef == 0


# --- optimisation

def test_the_optimizer_is_the_one_that_was_asked_for():
    parameter = torch.nn.Parameter(torch.ones(3))
    for name, kind in (("adamw", torch.optim.AdamW), ("rmsprop", torch.optim.RMSprop)):
        optimizer, _ = make_optimizer([parameter], 10, Settings(learning_rate=1.0, optimizer=name))
        assert type(optimizer) is kind and optimizer.param_groups[0]["weight_decay"] == 0


def test_the_loop_takes_its_optimizer_and_schedule_from_the_flags(base, tmp_path):
    rows = train(base, tmp_path, "--variant", "dpo", "--steps", "4", "--optimizer", "rmsprop", "--schedule",
                 "cosine", "--learning-rate", "1e-3", "--save-every", "4")
    rates = [1e-3 * (1 + math.cos(math.pi * done / 4)) / 2 for done in range(4)]
    assert [row["learning_rate"] for row in rows] == pytest.approx(rates)
    from safetensors import safe_open
    files = list((tmp_path / "checkpoints/4").glob("*.safetensors"))
    names = {name for file in files for name in safe_open(file, "pt").keys()}
    assert any("square_avg" in name for name in names) and not any("exp_avg" in name for name in names)


def test_a_tenth_of_the_steps_warms_up():
    optimizer, scheduler = make_optimizer([torch.nn.Parameter(torch.ones(1))], 40,
                                          Settings(learning_rate=1.0))
    rates = []
    for _ in range(6):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_gradient_is_clipped_to_its_largest_norm_and_told_as_it_was():
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    for largest, moved in ((0.5, 0.5), (10.0, 5.0)):
        before = model.weight.detach().clone()
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        norm, _, finite = optimizer_step(model, optimizer, scheduler, largest, 0.0)
        assert norm == pytest.approx(5.0) and finite
        assert (model.weight - before).norm().item() == pytest.approx(moved, rel=1e-3)


def test_the_norm_to_clip_to_is_the_flags(base, tmp_path, monkeypatch):
    seen = []

    def watched(policy, optimizer, scheduler, max_grad_norm, loss):
        seen.append(max_grad_norm)
        return optimizer_step(policy, optimizer, scheduler, max_grad_norm, loss)

    monkeypatch.setattr(sail, "optimizer_step", watched)
    train(base, tmp_path, "--variant", "dpo", "--steps", "1", "--max-grad-norm", "0.25")
    assert seen == [0.25]


def test_sft_weighs_tokens_alike_not_pairs():
    args = sail_args(["--variant", "sft"])
    pairs, _ = pairs_of(7, "dpo")
    assert len({len(pair.chosen_ids) for pair in pairs}) > 1
    policy = tiny_model(seed=1)
    run = run_of(policy, None)
    sail.accumulate_gradients(run, pairs, args)
    reached = torch.cat([p.grad.flatten() for p in policy.parameters()])
    policy.zero_grad()
    losses, _ = sail.sft_losses(policy, pairs)
    (losses.sum() / sum(len(pair.chosen_ids) for pair in pairs)).backward()
    torch.testing.assert_close(reached, torch.cat([p.grad.flatten() for p in policy.parameters()]))


def test_steps_that_are_not_finite_count_only_in_a_row(base, tmp_path, monkeypatch):
    original, steps = sail.preference_losses, []

    def poisoned(*inputs):
        losses, metrics = original(*inputs)
        steps.append(1)
        return losses * (math.nan if len(steps) % 8 else 1.0), metrics

    monkeypatch.setattr(sail, "preference_losses", poisoned)
    rows = train(base, tmp_path, "--variant", "dpo", "--steps", "17")
    assert len(rows) == 17 and rows[-1]["skipped"] == 15


# --- headline figures

def test_a_steps_figures_are_means_over_what_they_are_of():
    totals = Counter(pairs=10, on_policy=4, self_labelled=5, offline=6, samples=8, sampled_tokens=40,
                     unfinished=2, scored=8, reward=16.0, kl=2.0, nll=3.0, loss=7.0,
                     label_reversed=1, ties=3, tokens=99)
    row = record_of(3, totals, sail_args(["--variant", "pr"]), {"grad_norm": 2.5})
    wanted = dict(step=3, loss=0.7, kl=0.5, reward=2.0, response_length=5.0, unfinished=0.25, nll=0.5,
                  on_policy=0.4, self_labelled=0.5, label_reversed=0.2, ties=3, tokens=99, grad_norm=2.5)
    assert {name: row[name] for name in wanted} == pytest.approx(wanted)


def test_a_steps_sums_are_of_what_it_has_worked_on():
    """Of SFT, which sees the chosen responses alone, too."""
    pairs = [Pair("", "", "", [1] * 2, [1] * 3, [1] * 5, rewards=(1.0, 1.0), samples=2, sampled_tokens=8,
                  unfinished=2, cut_for_reward=2),
             Pair("", "", "", [1] * 4, [1], [1] * 7, rewards=(2.0, 0.5), samples=1, sampled_tokens=7,
                  unfinished=1, cut_for_reward=1),
             Pair("", "", "", [1], [1], [1], rewards=(3.0, 1.0))]
    for likelihood, tokens in ((True, 2 + 3 + 4 + 1 + 2), (False, 2 * (2 + 4) + 3 + 1 + 5 + 7 + 4)):
        totals = sail.counts_of(pairs, likelihood)
        assert totals["tokens"] == tokens and totals["chosen_tokens"] == 5
        assert totals["ties"] == 1 and totals["reward"] == 8.5 and totals["cut_for_reward"] == 3
        assert (totals["samples"], totals["sampled_tokens"], totals["unfinished"]) == (3, 15, 3)


def test_what_is_not_finite_is_written_as_null(tmp_path):
    write_line(tmp_path, "metrics", dict(step=1, loss=math.nan, kl=-math.inf, reward=0.5))
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row == dict(step=1, loss=None, kl=None, reward=0.5)


def test_rows_that_were_dropped_from_either_file_or_altered_are_counted_by_reason_and_in_all(base, tmp_path):
    good = [dict(prompt=f"Q{n}", chosen=f"Q{n} a", rejected=f"Q{n} b") for n in range(3)]
    bad = [dict(prompt="Q", chosen="a", rejected="a"), dict(prompt="", chosen="a", rejected="b"),
           dict(prompt="Q", chosen="", rejected="b")]
    write_rows(tmp_path / "train.jsonl", good + bad)
    write_rows(tmp_path / "held-out.jsonl", good + bad[:1])
    args = sail_args(["--variant", "dpo", "--model", base, "--data", str(tmp_path / "train.jsonl"),
                       "--eval-data", str(tmp_path / "held-out.jsonl")])
    train, held_out, _, _, account, held_out_account = sail.load_data(args)
    assert len(train) == len(held_out) == 3
    altered = {"prompts repeated in their responses, taken out": 3}
    assert account.dropped == {"chosen equals rejected": 1, "empty prompt": 1, "empty response": 1}
    assert str(account).startswith("  dropped: 3 (1 ")
    assert held_out_account.dropped == {"chosen equals rejected": 1}
    assert account.altered == held_out_account.altered == altered


def test_held_out_figures_are_what_their_names_say(base, monkeypatch):
    policy, tokenizer = load_policy(base)
    reference, _ = load_policy(base)
    with torch.no_grad():
        policy.get_output_embeddings().weight.mul_(1.5)
    args = sail_args(["--variant", "dpo", "--beta", "0.7"])
    pairs, _ = pairs_of(8, "dpo")
    for pair in pairs:
        pair.prompt, pair.chosen, pair.rejected = "Q", "w w w", "w w"
        pair.prompt_ids, pair.chosen_ids, pair.rejected_ids = [5, 6], [7, 8, 1], [9, 1]
    drawn = [[[7, 8, 1]], [[7, 1]], [[8, 9, 1]], [[9, 7, 8, 9]]]
    finished = [[True], [True], [True], [False]]
    monkeypatch.setattr(evaluate, "sample", lambda *_, **__: (drawn, finished, None))
    scores = {3: 1.0, 2: -1.0, 4: 2.0}

    def by_length(prompts, responses):
        return [scores[len(text.split())] if text.split() else 0.0 for text in responses]

    monkeypatch.setattr(evaluate, "texts_of", lambda _, ids, __: [" ".join("w" * len(one)) for one in ids])
    figures, _ = evaluate.evaluate_policy(policy, reference, tokenizer, pairs,
                                          reward.Reward("length", by_length), args)
    value = {name: figure[0] for name, figure in figures.items()}
    assert value["unfinished"] == 0.25 and value["length"] == 3.0
    assert value["reward"] == pytest.approx((1.0 - 1.0 + 1.0 + 2.0) / 4)
    ratios = evaluate.log_ratios(policy, reference, pairs, [ids for ids, in drawn], "float32")
    assert value["kl"] == pytest.approx(ratios.mean().item(), abs=1e-5) and abs(value["kl"]) > 0.05
    assert value["objective"] == pytest.approx(value["reward"] - 0.7 * value["kl"], abs=1e-5)


def test_other_held_out_pairs_are_other_data(base, held_out, tmp_path):
    rows = Path(held_out).read_text().splitlines(keepends=True)
    argv = ["--variant", "dpo", "--steps", "2", "--save-every", "1", "--data", f"{base}/toy-pairs.jsonl",
            "--eval-data", str(tmp_path / "held-out.jsonl")]
    (tmp_path / "held-out.jsonl").write_text("".join(rows[:8]))
    train(base, tmp_path / "run", *argv)
    (tmp_path / "held-out.jsonl").write_text("".join(rows[8:16]))
    with pytest.raises(sail.InputError, match="the data have changed"):
        train(base, tmp_path / "run", *argv, "--resume")


# --- seeds

def test_every_step_draws_its_labels_anew():
    args = sail_args(["--variant", "dp"])
    examples, _ = pairs_of(8, "dpo")
    draws = [[pair.label_draw for side in draw_pairs(examples, step, 8, 2, args, args.seed) for pair in side]
             for step in (1, 2)]
    assert len({*draws[0], *draws[1]}) == 8


def test_the_seed_is_that_of_the_held_out_samples(base):
    policy, tokenizer = load_policy(base)

    def samples(seed):
        args = sail_args(["--variant", "sft", "--seed", seed, "--max-response-length", "8"])
        pairs = [Pair("Q", None, None, [5, 6]) for _ in range(4)]
        _, rows = evaluate.evaluate_policy(policy, None, tokenizer, pairs, None, args)
        return [row["response"] for row in rows]

    assert samples("0") == samples("0") != samples("1")


def test_the_seed_is_that_of_the_adapter_and_of_the_toys_model():
    pytest.importorskip("peft")

    def adapter(seed):
        model = tiny_model()
        add_adapter(model, 2, seed)
        return torch.cat([p.flatten() for p in model.parameters() if p.requires_grad])

    assert torch.equal(adapter(0), adapter(0)) and not torch.equal(adapter(0), adapter(1))
    model = tiny_model()
    add_adapter(model, 8)
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert layers and all(layer.scaling == {"default": 2.0} for layer in layers)       # alpha / rank
    weights = [next(toy_model(seed=seed)[0].parameters()) for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert sail_args(["--variant", "sft", "--seed", "3"]).model == "runs/toy/world/untrained-3"


def test_a_run_hands_its_seed_to_its_adapter(base):
    pytest.importorskip("peft")
    given = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (generate, reward):
            patch.setattr(module, "add_adapter", lambda _, *more: given.append(more))
        generate.load_parts(sail_args(["--variant", "sft", "--model", base, "--lora", "4", "--seed", "7"]))
        reward.load_trainee(reward.parse_args(["--train", "--model", base, "--data", "x.jsonl", "--lora", "5",
                                               "--seed", "8"]))
    assert given == [(4, 7), (5, 8)]


def test_each_seed_has_an_untrained_model_of_its_own_in_the_toys_world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (0, 3):
        write_world(seed)
        saved, drawn = load_policy(WORLD / f"untrained-{seed}")[0], toy_model(seed)[0]
        assert all(map(torch.equal, saved.parameters(), drawn.parameters()))


def test_the_toys_pairs_are_drawn_by_a_seed_of_their_own(base, tmp_path):
    def drawn(seed):
        torch.rand(1)                                      # a global random state of its own
        draw_toy_pairs(base, tmp_path / "pairs.jsonl", 12, seed)
        assert torch.initial_seed() == seeded("toy pairs", seed)
        return [list(row.values()) for row in read_rows(tmp_path / "pairs.jsonl")]

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert 8 < max(len(chosen.split()) for _, chosen, *_ in first) <= 24
    assert first == again and [prompt for prompt, *_ in first] != [prompt for prompt, *_ in other]


def test_the_seed_is_that_of_generate_py(base, held_out, tmp_path, monkeypatch):
    def answers(seed):
        out = tmp_path / "answers.jsonl"
        monkeypatch.setattr("sys.argv", ["generate.py", "--model", base, "--data", held_out, "--limit", "4",
                                         "--out", str(out), "--max-response-length", "8",
                                         "--max-prompt-length", "8", "--seed", seed])
        generate.main()
        return out.read_text()

    assert answers("0") == answers("0") != answers("1")


# --- precision

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_forward_computes_in_the_dtype_of_the_run(dtype, base, tmp_path, monkeypatch):
    """Policy and reference; in rollout, scoring, evaluation and SFT."""
    seen, original = [], generate.load_parts

    def watched(args):
        models, tokenizer = original(args)
        for place, model in enumerate(models):
            model.register_forward_pre_hook(
                lambda *_, place=place: seen.append((place, torch.is_autocast_enabled("cpu"))))
        return models, tokenizer

    monkeypatch.setattr(generate, "load_parts", watched)
    for variant, models in (("sft", {0}), ("pr", {0, 1})):
        seen.clear()
        train(base, tmp_path / variant, "--variant", variant, "--steps", "2", "--dtype", dtype,
              "--eval-every", "1")
        assert {*seen} == {(place, dtype == "bfloat16") for place in models}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_so_does_every_forward_of_the_other_commands(dtype, base, held_out, tmp_path, monkeypatch):
    """A reward model in training, in scoring and as a run's reward; answers; evaluations; the frontier."""
    seen = []

    def watch(module, name):
        original = getattr(module, name)

        def loading(*inputs, **options):
            loaded = original(*inputs, **options)
            loaded[0].register_forward_pre_hook(
                lambda *_: seen.append((name, torch.is_autocast_enabled("cpu"))))
            return loaded

        monkeypatch.setattr(module, name, loading)

    for module, name in ((reward, "load_classifier"), (generate, "load_answerer"), (evaluate, "load_frozen")):
        watch(module, name)
    same = ["--dtype", dtype, "--max-prompt-length", "8", "--max-response-length", "6"]
    monkeypatch.chdir(tmp_path)

    def computed(main, *argv):
        """The loaders of the models that a command has called, if all compute in the dtype."""
        seen.clear()
        monkeypatch.setattr("sys.argv", ["x", *map(str, argv)])
        main()
        assert {computes for _, computes in seen} == {dtype == "bfloat16"}
        return {name for name, _ in seen}

    data, scorer = ["--data", held_out, "--limit", "8"], f"{tmp_path}/rm/model"
    assert computed(reward.main, "--train", "--model", base, "--data", held_out, "--dtype", dtype, "--steps",
                    "1", "--eval-limit", "4", "--out", "rm") == {"load_classifier"}
    assert computed(generate.main, "--model", base, *data, *same) == {"load_answerer"}
    assert computed(reward.main, "--reward", scorer, "--dtype", dtype) == {"load_classifier"}
    train(base, "run", "--variant", "dpo", "--steps", "1", "--reward", scorer, "--dtype", dtype,
          "--beta", "9", "--eval-limit", "2")
    both = {"load_frozen", "load_classifier"}
    assert computed(evaluate.main, "run", "--eval-limit", "4") == both
    assert computed(evaluate.main, "run", "--compare", "--frontier", "100") == both
