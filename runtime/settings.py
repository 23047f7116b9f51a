"""Settings are declared once, as fields of a dataclass. Flags, checks and args.json follow from the fields.

`setting` makes a field, with its default, its help text and its range; its type is the annotation. `Parser`
turns fields into flags, and `read_settings` reads them back from a run's args.json. A field without a help
text is no flag: a study sets it from Python, as in sail.main(flags, warmup_steps=0).
"""
import argparse
import dataclasses
import math
import sys
import typing
from dataclasses import dataclass, fields
from pathlib import Path

from runtime.command_line import InputError
from runtime.run_directory import is_run_directory, read_json, run_of_checkpoint


def setting(default, help=None, low=-math.inf, high=math.inf, choices=None, metavar=None, may_change=False):
    """A field of a dataclass of settings. low, high: the range of a number. metavar: how the help names a
    value. may_change: whether --resume may give it another value."""
    declared = dict(help=help, low=low, high=high, choices=choices, metavar=metavar, may_change=may_change)
    return dataclasses.field(default=default, metadata=declared)


def same_as(cls, name, **changes):
    """A field like the field of this name in another dataclass of settings. `changes` replaces its default or
    other parts of its declaration."""
    field, = (field for field in fields(cls) if field.name == name)
    return setting(**{"default": field.default, **field.metadata, **changes})


def flag_of(name):
    """max_length -> --max-length."""
    return "--" + name.replace("_", "-")


def kind_of(cls, name):
    """The type of a field's value: int, float, str or bool, also where None is allowed. It is NoneType if
    only None is allowed."""
    annotation = typing.get_type_hints(cls)[name]
    kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    return kinds[0] if kinds else annotation


def is_finite(number):
    """Whether a number is finite, also as a float: an int may be too large for one."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def converter(cls, field):
    """The function that converts a text to the field's value, or raises ArgumentTypeError or ValueError. For
    a switch it is useless: "False" becomes True."""
    kind, declared = kind_of(cls, field.name), field.metadata

    def convert(text):
        value = kind(text)
        low, high = declared["low"], declared["high"]
        if kind in (int, float) and not (low <= value <= high and is_finite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not in {low:g} … {high:g}")
        if declared["choices"] and value not in declared["choices"]:
            known = ", ".join(declared["choices"])
            raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {known})")
        return value

    convert.__name__ = kind.__name__                    # argparse shows this name if `text` is no such number
    return convert


class Parser(argparse.ArgumentParser):
    """An argparse parser with short help, one-line errors, and flags made from settings. `parse_args` returns
    only the settings that were given, since the dataclass has the defaults. A flag may be written with _ as
    well as with -."""

    def __init__(self, description, arguments=""):
        super().__init__(description=description, usage=f"%(prog)s [flags]{arguments}", allow_abbrev=False,
                         argument_default=argparse.SUPPRESS,
                         formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=35))

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")

    def add_settings(self, cls, *names, title=None, **helps):
        """Add flags for the fields of a dataclass that have a help text: for those in `names`, or for all if
        `names` is empty. title: a heading for them. helps: {field: its help text here, with the default}."""
        add = self.add_argument_group(title).add_argument if title else self.add_argument
        for field in fields(cls):
            declared = field.metadata
            if declared["help"] is None or names and field.name not in names:
                continue
            help = helps.get(field.name, declared["help"])
            if kind_of(cls, field.name) is bool:
                add(flag_of(field.name), action="store_true", help=help)
                continue
            if field.default is not None and field.name not in helps:
                help += f" ({field.default})"
            help = help.replace("%", "%%")
            metavar = declared["metavar"]
            if declared["choices"]:
                metavar = f"{{{','.join(declared['choices'])}}}"
            add(flag_of(field.name), type=converter(cls, field), metavar=metavar, help=help)

    def parse_known_args(self, args=None, namespace=None):
        words = []
        for word in sys.argv[1:] if args is None else args:
            if word.startswith("--"):
                flag, equals, value = word.partition("=")
                word = flag.replace("_", "-") + equals + value
            words.append(word)
        found, rest = super().parse_known_args(words, namespace)
        if {"steps", "epochs"} <= vars(found).keys():
            self.error("argument --epochs: has no effect with --steps")
        return found, rest


def read_settings(file, cls, *names):
    """Read some settings back from a run's args.json: {name: value}, without those that are missing or null.
    names: settings that are no switches, since a switch would always be read as True. The file may have been
    edited, so this raises InputError for a value that no flag would accept."""
    saved, settings = read_json(file), {}
    for field in fields(cls):
        value = saved.get(field.name)
        if value is None or field.name not in names:
            continue
        try:
            settings[field.name] = converter(cls, field)(str(value))
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise InputError(f"{file}: argument {flag_of(field.name)}: {error}") from None
    return settings


def settings_to_resume(given, cls, own_code=None):
    """The settings that --resume takes over from the run in --out, {name: value}. There are none if `given`,
    the settings on the command line, lacks one of the two flags, or if there is no run. Switches are not
    taken over, nor are settings that may change. Code that the run's args.json names is taken over only if it
    is `own_code`; the command line has to name any other code."""
    out = Path(given.get("out") or "")
    if not given.get("resume") or "out" not in given or not is_run_directory(out):
        return {}
    names = []
    for field in fields(cls):
        if not field.metadata["may_change"] and kind_of(cls, field.name) is not bool:
            names.append(field.name)
    saved = read_settings(out / "args.json", cls, *names)
    return {name: value for name, value in saved.items() if ".py:" not in str(value) or value == own_code}


def read_run(path, cls, *names):
    """Find the model at a path and its run's settings: (directory or hub name, settings). `read_settings`
    says what `cls` and `names` are. The path of a run leads to the run's model, that of a checkpoint to the
    checkpoint itself, with its run's settings, and any other path, such as RUN/model, is a model, whose
    settings are {}. Raises InputError for a run that has no model yet, or as `read_settings` does."""
    run = run_of_checkpoint(path)
    if run is not None:
        return str(path), read_settings(run / "args.json", cls, *names)
    if Path(path, "args.json").is_file() and Path(path, "model").is_dir():
        return str(Path(path, "model")), read_settings(Path(path, "args.json"), cls, *names)
    if is_run_directory(Path(path)):
        raise InputError(f"{path} has no model yet; it is in training, or waits for --resume; a directory in "
                         f"{path}/checkpoints can be evaluated")
    return str(path), {}


@dataclass
class Objective:
    """The objective reward − β·KL(π‖π_ref), for which a policy is trained and by which it is measured."""
    reward: str | None = setting(None, "FILE.py:FUNCTION, or a one-logit classifier")
    reference: str | None = setting(None, "the model to which KL is measured (the model before training)")
    beta: float = setting(0.1, "weight of the KL penalty", low=1e-12)


TOKENS = dict(low=1, metavar="N")


@dataclass
class Settings:
    """What a training run works on, how long, on what machine, and where it writes. Fields without a help
    text are no flags."""
    # models and data
    model: str | None = setting(None, "a directory or hub name")
    lora: int | None = setting(None, "train a LoRA adapter of this rank (needs peft)", low=1, metavar="RANK")
    data: str | None = setting(None, "a .jsonl, .json, .csv (also .gz) or .parquet file, or a hub name")
    eval_data: str | None = setting(None, "held-out pairs, or a run, whose held-out pairs are used (one "
                                          "prompt in twenty of --data)")
    prefer: str = setting("better", "which label of PKU-SafeRLHF to use", choices=("better", "safer"))
    score_scale: float | None = setting(None, "use soft labels σ((score_chosen − score_rejected) / S)",
                                        low=1e-9, metavar="S")
    chat_template: str | None = setting(None, "a file with a template to use in place of the tokenizer's, or "
                                              "none for no template", metavar="FILE")
    max_prompt_length: int = setting(512, "tokens of a prompt; longer ones lose old turns or are dropped; "
                                          "without a chat template, texts lose their start", **TOKENS)
    max_response_length: int = setting(512, "tokens of a response; longer ones are cut at the end", **TOKENS)
    seed: int = setting(0, "random seed", low=0, metavar="N")
    trust_remote_code: bool = setting(False, "run code that comes with a hub model")
    # optimisation
    epochs: float = setting(1.0, "passes over the data, to which sail.py --mix adds pairs", low=1e-12)
    steps: int | None = setting(None, "optimizer steps, instead of --epochs", low=1)
    batch_size: int = setting(32, "pairs per step, over all processes", low=1)
    learning_rate: float | None = setting(None, "after the warm-up, which is a tenth of all steps", low=1e-12)
    dtype: str | None = setting(None, "the type to compute in (bfloat16 on a GPU that has it)",
                                choices=("float32", "bfloat16"))
    sample_batch_size: int = setting(64, "prompts answered at a time", low=1, metavar="N")
    eval_every: int = setting(100, "steps between evaluations; 0: only one, at the end", low=0, metavar="N")
    eval_limit: int = setting(128, "held-out pairs to evaluate on; if fewer exist, each is answered several "
                                   "times", low=1, metavar="N")
    optimizer: str = setting("adamw", choices=("adamw", "rmsprop"))
    schedule: str = setting("constant", choices=("constant", "cosine"))          # after the warm-up
    warmup_steps: int | None = setting(None, low=0)                              # None: a tenth of all steps
    max_grad_norm: float = setting(1.0, low=1e-12)
    limit: int | None = setting(None, low=1)                               # use only the data's first N pairs
    # memory, speed, output
    micro_batch_size: int | None = setting(None, low=1, may_change=True)         # None: what memory allows
    gradient_checkpointing: bool = setting(False, "recompute activations to save memory", may_change=True)
    shard: bool = setting(False, "split model and optimizer over the processes (FSDP2)", may_change=True)
    out: str | None = setting(None, "directory for logs and model", may_change=True)
    save_every: int | None = setting(None, "checkpoint every N steps; keep the last two", low=1, metavar="N",
                                     may_change=True)
    resume: bool = setting(False, "continue from OUT's newest checkpoint, if any", may_change=True)
    overwrite: bool = setting(False, "delete an earlier run in OUT before starting", may_change=True)
    unused = frozenset()                        # the names of settings without effect on this run


def may_change(settings):
    """The names in args.json whose values may change when a run is continued."""
    names = [field.name for field in fields(settings) if field.metadata["may_change"]]
    return [*names, "may_change"]
