"""The chat study: how its pairs are divided, and its tables, on data and rows made up here."""
import json

import chat

from data import load_tokenizer


def test_no_prompt_is_in_two_parts_and_every_short_pair_is_in_one(base, tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "PAIRS", 8)
    data = tmp_path / "data.jsonl"
    with data.open("w") as file:
        for i in range(30):
            turns = f"\n\nHuman: how is soup {i // 2}?\n\nAssistant:"              # two pairs to a prompt
            answer = "x " * 200 if i == 7 else f"good {i}"                         # one is too long
            file.write(json.dumps(dict(chosen=f"{turns} {answer}", rejected=f"{turns} bad {i}")) + "\n")
    chat.divide(data, load_tokenizer(base), tmp_path)
    parts = {name: (tmp_path / f"{name}.jsonl").read_text().splitlines()
             for name in ("reward", "judge", "held-out", "judge-unseen")}
    assert len(parts["reward"]) >= 8 and len(parts["judge"]) >= 8
    assert len(parts["reward"] + parts["judge"] + parts["held-out"]) == 29
    assert sorted(parts["judge-unseen"]) == sorted(parts["reward"] + parts["held-out"])
    prompts = [{json.dumps(json.loads(row)["prompt"]) for row in parts[name]}
               for name in ("reward", "judge", "held-out")]
    assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]


def test_the_tables_have_the_scorers_and_then_the_policies():
    judge = dict(what="scorer", name="judge", pairs=800, tested=512, accuracy=0.61, interval=[0.57, 0.65])
    text = chat.table([judge])
    assert text.endswith("| the judge | 800 | 0.610 [0.570, 0.650] of 512 |") and "win rate" not in text
    figures = {name: dict(value=-1.0, low=-1.5, high=-0.5)
               for name in ("reward", "kl", "objective", "margin", "accuracy", "win_rate")}
    policy = dict(what="policy", name="dpo", seconds=12.4, reward=figures, judge=figures)
    assert chat.table([judge, policy]).endswith("| DPO |" + " −1.00 ± 0.50 |" * 7 + " 12 |")


def test_a_policy_is_measured_on_all_held_out_prompts(tmp_path, monkeypatch):
    (tmp_path / "held-out.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    monkeypatch.setattr(chat, "ROWS", tmp_path / "rows.jsonl")
    measured = []

    def run(script, *flags):
        settings = dict(zip(flags[1::2], flags[2::2], strict=True))
        measured.append((script, settings["--eval-limit"]))
        settings["--out"].write_text('{"start": {"reward": 1}}')

    monkeypatch.setattr(chat, "run", run)
    chat.train_policy("start", "DIR", tmp_path)
    assert measured == [("evaluate", 2), ("evaluate", 2)]
    assert chat.recorded(chat.ROWS)[0]["judge"] == {"reward": 1}
