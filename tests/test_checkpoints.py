"""A run's checkpoint is a model, wherever a model can be named."""
import json
import shutil

import pytest
from conftest import TEMPLATE, TOY_REWARD, sail_main, tiny_model
from test_scale import largest_difference, rows_of, weights

import evaluate
import generate
import reward
import sail
from data import load_tokenizer
from generate import load_policy
from reward import load_reward

SHORT = ["--variant", "dpo", "--steps", "4", "--save-every", "2", "--batch-size", "4", "--limit", "40",
         "--eval-limit", "4", "--eval-every", "0", "--max-response-length", "6", "--learning-rate", "1e-3"]
FULL, LORA = [], ["--lora", "2"]
PROMPTS = [[{"role": "user", "content": "review the soup"}]] * 2


@pytest.fixture(scope="module", params=[FULL, LORA], ids=["full", "lora"])
def run(request, base, tmp_path_factory):
    """The directory of a run of four steps with checkpoints 2 and 4, of all weights or of an adapter."""
    if request.param:
        pytest.importorskip("peft")
    out = tmp_path_factory.mktemp("checkpoints") / "run"
    sail_main(["--model", base, *SHORT, *request.param, "--out", str(out)])
    return out


def test_the_last_checkpoint_is_the_saved_model_and_an_earlier_one_is_not(run, base):
    last = weights(run / "checkpoints/4")
    assert largest_difference(last, weights(run / "model")) == 0
    assert 0 < largest_difference(last, weights(run / "checkpoints/2"))
    assert 0 < largest_difference(weights(base), weights(run / "checkpoints/2"))
    assert all(weight.requires_grad for weight in last.values())       # a run may go on from it


def test_a_run_starts_from_a_checkpoint_and_its_own_checkpoints_are_models_too(run, tmp_path):
    start = str(run / "checkpoints/2")
    sail_main(["--model", start, *SHORT, "--data", data_of(run), "--max-prompt-length", "60",
               "--out", str(tmp_path / "next")])
    assert rows_of(tmp_path / "next")[0]["margin"] == 0                # the reference is the checkpoint
    assert largest_difference(weights(tmp_path / "next/checkpoints/4"), weights(tmp_path / "next/model")) == 0


def data_of(run):
    return json.loads((run / "args.json").read_text())["data"]


def test_evaluate_takes_a_checkpoint_with_its_runs_settings(run, tmp_path, capsys):
    names = [str(run / "checkpoints/4"), str(run)]
    evaluate.main([*names, "--reward", TOY_REWARD, "--eval-limit", "8",
                   "--out", str(tmp_path / "figures.json")])
    rows = [line.split("|")[2:] for line in capsys.readouterr().out.splitlines()
            if line.startswith((f"| {run.name}/checkpoints/4 |", f"| {'/'.join(run.parts[-3:])} |"))]
    assert len(rows) == 2 and rows[0] == rows[1]


def test_generate_takes_a_checkpoint(run, tmp_path, monkeypatch):
    answers = []
    for name in ("checkpoints/4", "model"):
        out = tmp_path / f"{len(answers)}.jsonl"
        monkeypatch.setattr("sys.argv", ["generate.py", "--model", str(run / name), "--data", data_of(run),
                                         "--limit", "4", "--max-response-length", "6",
                                         "--max-prompt-length", "60", "--out", str(out)])
        generate.main()
        answers.append(out.read_text())
    assert answers[0] == answers[1]


def test_a_checkpoint_keeps_the_chat_template_that_its_run_was_given(checkpoint, held_out, tmp_path):
    (tmp_path / "mine.jinja").write_text(TEMPLATE + "{# mine #}")
    sail_main(["--model", str(checkpoint), "--data", held_out, *SHORT, "--max-prompt-length", "60",
               "--chat-template", str(tmp_path / "mine.jinja"), "--out", str(tmp_path / "run")])
    found = load_tokenizer(tmp_path / "run/checkpoints/4")
    assert found.chat_template == load_tokenizer(tmp_path / "run/model").chat_template
    assert found.chat_template.endswith("{# mine #}")
    assert load_tokenizer(tmp_path / "run/checkpoints/4", chat_template="none").chat_template is None
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    with pytest.raises(sail.InputError, match="chat template .*mine.jinja has changed since it began"):
        load_tokenizer(tmp_path / "run/checkpoints/4")
    (tmp_path / "mine.jinja").unlink()
    with pytest.raises(sail.InputError, match="chat template .*mine.jinja has changed .* or is gone"):
        load_tokenizer(tmp_path / "run/checkpoints/4")


def test_an_evaluation_says_that_chat_templates_differ_and_compares_no_prompts(
        checkpoint, held_out, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.jinja").write_text(TEMPLATE + "{# mine #}")
    lengths = ["--max-prompt-length", "60", "--max-response-length", "6"]
    sail_main(["--model", str(checkpoint), "--data", held_out, *SHORT, *lengths, "--chat-template",
               str(tmp_path / "mine.jinja"), "--out", str(tmp_path / "run")])
    (tmp_path / "mine.py").write_text("def score(prompts, responses): return [0.0] * len(responses)")
    for model, differ in ((checkpoint, True), (tmp_path / "run/model", False)):
        capsys.readouterr()
        argv = ["evaluate.py", str(model), str(tmp_path / "run"), "--eval-limit", "4", "--reward",
                f"{tmp_path}/mine.py:score", "--out", f"{tmp_path}/figures.json"]
        monkeypatch.setattr("sys.argv", argv)
        evaluate.main()
        said = capsys.readouterr().out
        assert ("the prompts differ, since the models' chat templates do" in said) == differ
        assert ("not compared, since its 4 prompts" in said) == differ


@pytest.mark.parametrize("more", [FULL, LORA], ids=["full", "lora"])
def test_a_reward_models_checkpoint_scores_as_its_model_does(more, checkpoint, held_out, tmp_path):
    if more:
        pytest.importorskip("peft")
    tiny_model().save_pretrained(tmp_path / "base")
    load_tokenizer(checkpoint).save_pretrained(tmp_path / "base")
    reward.main(["--train", "--model", str(tmp_path / "base"), "--data", held_out, "--steps", "2",
                 "--save-every", "2", "--batch-size", "4", "--max-length", "40", "--learning-rate", "1e-3",
                 "--out", str(tmp_path / "rm"), *more])
    answers = ["good", "bad " * 20]
    expected = load_reward(f"{tmp_path}/rm/model")(PROMPTS, answers)
    assert load_reward(f"{tmp_path}/rm/checkpoints/2")(PROMPTS, answers) == expected
    with pytest.raises(sail.InputError, match="does not fit its base, as a Llama.*: .* score.weight"):
        load_policy(f"{tmp_path}/rm/checkpoints/2")


def test_a_policys_checkpoint_is_no_reward_but_a_reward_model_may_start_from_it(run, tmp_path):
    with pytest.raises(sail.InputError, match="lacks weights that .* such as score.weight"):
        load_reward(str(run / "checkpoints/4"))
    reward.main(["--train", "--model", str(run / "checkpoints/4"), "--data", data_of(run), "--steps", "1",
                 "--batch-size", "4", "--out", str(tmp_path / "rm")])
    assert (tmp_path / "rm/model").is_dir()


# --- safe, and honest

def test_a_checkpoint_is_loaded_without_unpickling_or_running_anything(run, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("unpickled")

    before, _ = load_policy(str(run / "checkpoints/4"))
    for name in ("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "socket.socket.connect"):
        monkeypatch.setattr(name, refuse)
    policy, _ = load_policy(str(run / "checkpoints/4"))
    for mine, same in zip(policy.parameters(), before.parameters(), strict=True):
        assert mine.equal(same)


@pytest.fixture
def moved(run, tmp_path):
    """A copy of the run that may be harmed."""
    return shutil.copytree(run, tmp_path / "copy")


def change_args(**changes):
    def harm(out):
        file = out / "args.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return harm


def cut(out):
    file = next((out / "checkpoints/4").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("harm, said", [
    (cut, "checkpoints/4 cannot be read"),
    (lambda out: (out / "args.json").unlink(), "args.json, which names its base, is not a run's"),
    (change_args(model="no/such"), "its base no/such is not on this machine"),
    (change_args(model=None), "its base None is not on this machine"),
    (change_args(model_sha256="0"), "the files of its base .* have changed since the run began"),
    (change_args(lora="many"), "argument --lora: invalid literal for int"),
    (change_args(lora=3), "checkpoints/4 does not fit its base")],
    ids=["cut", "no args", "no base", "null", "changed base", "no rank", "other rank"])
def test_a_checkpoint_that_cannot_be_used_says_why(harm, said, moved):
    harm(moved)
    with pytest.raises(sail.InputError, match=said):
        load_policy(str(moved / "checkpoints/4"))


def test_a_part_of_a_sharded_checkpoint_that_is_missing_is_noticed(moved):
    from safetensors import safe_open
    from safetensors.torch import save_file
    file = min((moved / "checkpoints/4").glob("*.safetensors"))        # the weights come before the optimizer
    with safe_open(file, "pt") as opened:
        names = [*opened.keys()]
        assert names[0].startswith("model.")
        tensors, places = {}, {}
        for name in names:
            tensor = opened.get_tensor(name)
            half = len(tensor) // 2 if tensor.dim() > 1 else 0         # as if the first rank's file were lost
            tensors[name] = tensor[half:].contiguous() if half else tensor
            places[name] = {"saved_offsets": [half] + [0] * (tensor.dim() - 1) if tensor.dim() else []}
    save_file(tensors, file, {"DCP_SHARDING_INFO": json.dumps(places)})
    with pytest.raises(sail.InputError, match="cannot be read"):
        load_policy(str(moved / "checkpoints/4"))


def test_a_checkpoint_that_lacks_a_file_is_named(moved):
    min((moved / "checkpoints/4").glob("*.safetensors")).unlink()
    with pytest.raises(sail.InputError, match="checkpoints/4 does not fit its base"):
        load_policy(str(moved / "checkpoints/4"))


def test_a_checkpoint_is_written_in_small_files(run):
    """The writer holds a whole file in memory."""
    sizes = [file.stat().st_size for file in (run / "checkpoints/4").glob("*.safetensors")]
    assert len(sizes) > 8 and max(sizes) < sum(sizes) / 2
