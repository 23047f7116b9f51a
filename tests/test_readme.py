"""README.md and experiments/README.md: their code runs, what they name exists, tables follow from rows."""
import argparse
import importlib.util
import json
import re
from pathlib import Path

import bench
import chat
import first_runs
import memory
import noise
import pytest
import replicate
import sampler_gap
import sentiment
import terms_exact
import torch
import tuned

from generate import load_policy
from toy import grammar_pairs

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "experiments/README.md")
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
FENCED = {page: re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
          for page, text in TEXTS.items()}
LOOP, = (block for language, block in FENCED["README.md"] if language == "python")
TRL, = (block for language, block in FENCED["experiments/README.md"] if language == "python")
COMMANDS = [line for blocks in FENCED.values() for language, block in blocks if not language
            for line in block.replace("\\\n", "").splitlines() if "python " in line or "torchrun " in line]


def test_the_loop_runs_as_it_stands_and_raises_the_reward(capsys):
    torch.manual_seed(0)
    names = {}
    exec(LOOP, names)
    rewards = [float(value) for value in re.findall(r"reward (\S+),", capsys.readouterr().out)]
    assert len(rewards) == 20 and sum(rewards[-5:]) > sum(rewards[:5]) + 5      # one unit a response and more


def test_the_loops_log_probabilities_are_those_of_sail():
    from data import collate
    from sail import sequence_logps
    names = {}
    exec(LOOP.split("for step")[0], names)
    rows = collate(names["inputs"]["input_ids"][:2].tolist(), [[5, 6, 1], [7, 1]])
    reached = names["response_logps"](names["policy"], *rows[:2])
    torch.testing.assert_close(reached, sequence_logps(names["policy"], *rows))


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
def test_the_trainer_for_trl_trains(base, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig
    names = {}
    exec(TRL, names)
    model, tokenizer = load_policy(base)
    trainer = names["SAILTrainer"](
        model=model, processing_class=tokenizer, train_dataset=Dataset.from_list(grammar_pairs()[:16]),
        args=DPOConfig(output_dir=str(tmp_path), max_steps=2, learning_rate=1e-3, logging_steps=1, bf16=False,
                       use_cpu=True, report_to=[], gradient_checkpointing=False, save_strategy="no"))
    trainer.train()
    first, last = trainer.state.log_history[:2]
    assert first["sail/margin"] == 0 and last["sail/margin"] != 0 and 0 <= last["sail/self_labelled"] <= 1


def test_the_quoted_lines_of_the_loss_are_in_sail():
    def words(text):
        return re.sub(r"#.*|\s", "", text)

    source = words(re.sub(r"#.*", "", (ROOT / "sail.py").read_text(encoding="utf-8")))
    quoted = re.findall(r"^(?:mean_f|T2|T3) = .*", TEXTS["README.md"], re.MULTILINE)
    assert len(quoted) == 3 and all(words(line) in source for line in quoted)


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files_lead_to_files(page):
    links = re.findall(r"\]\(([^)#:]+)[^)]*\)", re.sub(r"\]\(https?:[^)]*\)", "", TEXTS[page]))
    assert links and [link for link in links if not (ROOT / page).parent.joinpath(link).is_file()] == []


def test_tests_that_are_named_exist():
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    named = {name for text in TEXTS.values() for name in re.findall(r"`(test_\w+)`", text)}
    assert named and [name for name in named if f"def {name}(" not in source] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_the_script_and_flags_of_a_command_exist(command, monkeypatch):
    script, rest = re.search(r"(\S+\.py) ?(.*)", command.split(" #")[0]).groups()
    assert (ROOT / script).is_file()
    flags = re.findall(r"--[\w-]+", rest)
    if flags:
        known = parser_of(Path(script).stem, monkeypatch)._option_string_actions
        assert [flag for flag in flags if flag not in known] == []


def parser_of(script, monkeypatch):
    """What a script's main would parse its command line with."""
    parsers = []

    def stop(parser, *_):
        parsers.append(parser)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    with pytest.raises(SystemExit):
        importlib.import_module(script).main()
    return parsers[0]


def rows_of(study):
    text = (ROOT / f"experiments/{study}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


FRONT = first_runs.table(rows_of("first_command"), columns=5)
TABLES = [terms_exact.table(rows_of("terms_exact")),
          *replicate.tables(rows_of("replication")).values(),
          *sentiment.tables(rows_of("sentiment")).values(),
          memory.measured_table(rows_of("memory")), bench.beside_peer(rows_of("speed")),
          bench.overhead_table(rows_of("overheads")),
          first_runs.table(rows_of("first_run")), noise.table(rows_of("noise")),
          sampler_gap.table(rows_of("sampler_gap")), chat.table(rows_of("chat")),
          *tuned.tables(rows_of("tuned")).values()]


@pytest.mark.parametrize("table", TABLES)
def test_the_tables_of_the_studies_follow_from_the_committed_rows(table):
    assert table in TEXTS["experiments/README.md"]


def test_the_table_of_one_command_follows_from_the_committed_rows():
    assert FRONT in TEXTS["README.md"]


def test_the_estimates_of_memory_are_those_that_its_command_prints(capsys):
    memory.print_estimate()
    printed = capsys.readouterr().out + memory.measured_table(rows_of("memory"))
    section, = re.findall(r"^## Memory$.*?^## ", TEXTS["experiments/README.md"], re.DOTALL | re.MULTILINE)
    shown = [line for line in section.splitlines() if line.startswith("|")]
    assert len(shown) > 20 and [line for line in shown if line not in printed.splitlines()] == []


def test_the_measured_rows_of_the_front_page_are_rows_of_the_studies():
    rows = {line for table in [FRONT, *TABLES] for line in table.splitlines()}
    measured = [line for line in TEXTS["README.md"].splitlines() if line.startswith("|") and "±" in line]
    assert len(measured) > 5 and [line for line in measured if line not in rows] == []


def test_the_front_page_is_short():
    text = TEXTS["README.md"]
    assert len(text.splitlines()) <= 235 and len(text.split()) <= 2700
