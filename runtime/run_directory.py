"""A run's directory: args.json, logs, checkpoints/STEP, model/.

Apart from the logs, which grow by lines, a file or directory appears under its final name only when it is
complete: it is written under another name and then renamed. Nothing is written through a symbolic link, and
nothing that does not belong to a run is replaced. Neither random states nor the position in the data are
saved, because they follow from seed, step and rank.
"""
import fcntl
import hashlib
import json
import math
import operator
import os
import re
import shlex
import shutil
import socket
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from runtime.command_line import DATA_FILES, InputError, first_line, foreign
from runtime.intervals import few, format_figure
from runtime.processes import fails_together, of_all, of_rank_0, print0, rank, world_size

MODEL_FILES = (".safetensors", ".bin", ".py", ".json", ".jinja", ".model", ".txt")
LOGS = ("metrics", "eval", "samples")
NAMES = ("model", "adapter", "checkpoints", "args.json", *[f"{name}.jsonl" for name in LOGS])
PRINTED = ("loss margin accuracy label_sharpness reward kl response_length unfinished grad_norm "
           "learning_rate seconds").split()

# --- files --------------------------------------------------------------------------------------------------


def parse_json(text, **options):
    """Parse a JSON text. Raises ValueError also if its brackets are nested too deeply for json.loads."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None


def read_json(path):
    """The object in a JSON file, as a dict. Raises InputError if the file holds anything else, for example
    because it was cut short."""
    try:
        return dict(parse_json(Path(path).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: is damaged ({error}); it was cut short, or edited") from None


def write_bytes(path, content):
    """Write a file under a free name and then rename it. So there is never half a file, a symbolic link is
    replaced and not followed, and a backup that shares the earlier file by a hard link keeps its content."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = free_name(path, f".{os.getpid()}.writing")
    try:
        aside.write_bytes(content)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def free_name(path, ending):
    """The path with this ending. If that name is taken, a number stands before the ending."""
    candidate, number = Path(f"{path}{ending}"), 1
    while os.path.lexists(candidate):
        number += 1
        candidate = Path(f"{path}.{number}{ending}")
    return candidate


def write_text(path, text):
    """Write a text file as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))  # a lone surrogate


def write_json(path, value):
    """Write an object as a JSON file."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_rows(path, rows):
    """Write rows as JSON lines."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def refuse_output(path, is_own, *inputs, flag="--out"):
    """Refuse an output file before there is work to lose. Raises InputError if something exists at the path
    that is no regular file, is one of the `inputs`, the files that the command reads (or None), or holds a
    text for which is_own(text) is false, since another program has written it; raises OSError if it cannot be
    written. The file's directory is made. flag: the option that names the file, for the messages."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise InputError(f"{flag} {path} is a directory, or no regular file; give the name of a file")
    for name in inputs:
        if path.exists() and name and Path(name).exists() and path.samefile(name):
            raise InputError(f"{flag} {path} is a file that this command reads; give another {flag}")
    earlier = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    if earlier and not is_own(earlier):
        raise InputError(f"{flag} {path} is a file that this command has not written and would overwrite; "
                         f"give another {flag}")
    path.parent.mkdir(parents=True, exist_ok=True)
    trial = free_name(path, f".{os.getpid()}.writing")
    trial.write_bytes(b"")
    trial.unlink()


def has_columns(*names):
    """A function that tells whether the first line of a text is a JSON object with these columns."""
    def is_own(text):
        try:
            return {*names} <= {*parse_json(text[:text.find("\n")])}
        except (ValueError, TypeError):
            return False

    return is_own


def refuse_output_of_rows(path, columns, *inputs, flag="--out"):
    """Refuse an output file for rows with these columns, as `refuse_output` does. Raises InputError also if
    the name does not end in .jsonl, which tells the commands that read the file what it holds."""
    refuse_output(path, has_columns(*columns), *inputs, flag=flag)
    if Path(path).suffix != ".jsonl":
        raise InputError(f"{flag} {path}: the name must end in .jsonl, for the commands that read the file")


def write_directory(directory, write):
    """Call write(path) on a new directory beside this one, then rename it: a directory appears under its
    final name only when it is complete. What had that name is removed. Raises InputError if the new directory
    cannot be written."""
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()                                             # writing a model takes a moment
    directory = Path(directory)
    aside = free_name(directory, f".{os.getpid()}.writing")
    try:
        with foreign(f"{directory} cannot be written"):
            aside.mkdir(parents=True)
            write(aside)
        remove(directory)
        aside.rename(directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove(directory):
    """Remove a directory if it exists. Of a symbolic link, only the link is removed."""
    if directory.is_symlink():
        directory.unlink()
    elif directory.exists():
        shutil.rmtree(directory)


# --- begin and log ------------------------------------------------------------------------------------------

def run_directory(source):
    """runs/NAME for a data source. NAME is a file's name, without its ending if DATA_FILES has it (so not
    .gz), the name of the directory to which a path leads, or a hub name with - for / and :."""
    path = Path(source)
    if path.exists() or path.suffix in DATA_FILES:
        name = os.path.basename(os.path.realpath(path))    # Path.resolve refuses a link to itself
        if path.suffix in DATA_FILES:
            name = path.stem
    else:
        name = re.sub("[/:]", "-", str(source))
    return Path("runs", name or "data")


def refuse_inputs_inside(out, inputs):
    """Raises InputError if an input, {flag: path, hub name, FILE.py:FUNCTION or None}, is OUT or lies in it,
    where a run deletes and replaces files."""
    whole = Path(os.path.realpath(out))
    for flag, name in inputs.items():
        path = Path(re.sub(r"(\.py):.*", r"\1", str(name)))
        real = Path(os.path.realpath(path))
        if name and path.exists() and whole in (real, *real.parents):
            raise InputError(f"{flag} {path} lies in --out {out}, where a run deletes and replaces files; "
                             "give another --out, or move it")


def refuse_unlike_directories(out):
    """Raises InputError on all processes if one of them, for example on another machine, does not see what
    rank 0 writes into OUT. Otherwise a part of each checkpoint would be missing."""
    if world_size() == 1:
        return
    token = of_rank_0(write_token(out))
    seen = of_all(wait_for(token))
    if rank() == 0:
        token.unlink()
    if not all(seen):
        raise InputError(f"{out}: rank {seen.index(False)} does not see what rank 0 writes there; "
                         "--out must lie on a file system that all machines share")


@fails_together
def write_token(out):
    """Rank 0 writes an empty file of a new name into OUT and returns its path; other ranks return None."""
    if rank() == 0:
        token = free_name(out / socket.gethostname(), ".token")
        write_bytes(token, b"")
        return token


def wait_for(path, seconds=10):
    """Whether a file appears within `seconds`, since a network's file system may be a little late."""
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.1)
    return path.exists()


@fails_together
def begin(out, args, recorded, progress, policy, optimizer, scheduler):
    """Begin a run in `out`, or with --resume continue it from its newest checkpoint: (lock, progress). Other
    runs are kept out for as long as the lock, an open file (None on ranks other than 0), is open. All
    processes call this together. Raises InputError as `lock_directory` and `resume` do."""
    lock = lock_directory(out, args)                                   # before what all processes do together
    refuse_unlike_directories(out)
    checkpoint = of_rank_0(newest_checkpoint(out))
    continued = checkpoint and args.resume
    if continued:
        progress = resume(checkpoint, recorded, policy, optimizer, scheduler)
    if rank() == 0:
        write_json(out / "args.json", recorded)                        # from now on, `out` is a run's
        if not continued:
            start_afresh(out, args)
    return lock, progress


@fails_together
def lock_directory(out, args):
    """Make and lock a run's directory on rank 0, and return the open lock; None on other ranks. Raises
    InputError if another run holds the lock, or as `refuse_occupied` does."""
    if rank() != 0:
        return None
    refuse_foreign(out)
    out.mkdir(parents=True, exist_ok=True)
    lock = open_lock(out)
    if lock is None:
        raise InputError(f"{out} is in use by another run; wait, or give another --out")
    refuse_occupied(out, args)                                         # again: a run may have ended since
    return lock


def open_lock(out):
    """Open the file `lock` of a run's directory and lock it: the open file, or None if another process holds
    the lock."""
    file = os.open(out / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return os.fdopen(file, "r+")


def refuse_foreign(out):
    """Raises InputError if `out` has a symbolic link under a name that a run writes, or if it has anything
    but a lock under such a name and no args.json that says that it is a run's directory."""
    for name in (*NAMES, "lock"):
        path = out / name
        if path.is_symlink():
            raise InputError(f"{path} is a symbolic link, and a run writes into its own directory alone; "
                             "remove it, or give another --out")
    is_run = is_run_directory(out)
    for name in NAMES:
        path = out / name
        if path.exists() and not is_run:
            raise InputError(f"{path} exists and belongs to no run; move it away, or give another --out")


def is_run_directory(out):
    """Whether a directory has the args.json of a run."""
    try:
        return "may_change" in read_json(out / "args.json")
    except (InputError, OSError):
        return False


def run_that_held_out(run):
    """The directory of the run whose settings name the pairs on which this run was evaluated. It is another
    run if this run's eval_data is a run. Raises InputError if an args.json is damaged, or if runs name each
    other in a circle."""
    passed = []
    while True:
        passed.append(os.path.realpath(run))
        source = read_json(Path(run, "args.json")).get("eval_data")
        if not isinstance(source, str) or not is_run_directory(Path(source)):
            return Path(run)
        if os.path.realpath(source) in passed:
            raise InputError(f"{run}/args.json: its eval_data, {source}, is a run whose pairs are from {run}")
        run = source


def refuse_occupied(out, args):
    """Raises InputError as `refuse_foreign` does, or if `out` holds a run with a checkpoint or a model that
    the settings neither replace nor continue, or a run to continue whose args.json is damaged."""
    if args.resume and (out / "args.json").is_file():
        read_json(out / "args.json")
    refuse_foreign(out)
    checkpoint = newest_checkpoint(out)
    if args.overwrite or checkpoint and args.resume or not (checkpoint or (out / "model").exists()):
        return
    if checkpoint:
        raise InputError(f"{out} holds an earlier run; --overwrite replaces it, --resume continues it, "
                         "another --out keeps it")
    raise InputError(f"{out} holds a finished run without a checkpoint, which --resume cannot continue; "
                     f"--model {out}/model --out ANOTHER trains on from its end, --overwrite replaces it")


def start_afresh(out, args):
    """Remove the models and checkpoints that an earlier run left in `out`, with --overwrite also the figures
    that evaluate.py wrote there, and begin empty logs. Without --overwrite, earlier logs that are not empty
    are kept, as NAME.jsonl.old or NAME.jsonl.2.old, and so on."""
    for name in ("model", "adapter", "checkpoints"):
        remove(out / name)
    if args.overwrite:
        (out / "evaluated.json").unlink(missing_ok=True)
    if args.resume:
        print0(f"--resume: {out} has no checkpoint, so the run starts from the beginning")
    for name in LOGS:
        path = out / f"{name}.jsonl"
        if path.exists() and path.stat().st_size and not args.overwrite:
            old = free_name(path, ".old")
            path.rename(old)
            print0(f"{path} of an earlier run is kept as {old.name}")
        write_bytes(path, b"")


def write_line(out, name, row):
    """Append a row to out/name.jsonl, on rank 0 only. A value of the row that is a number and not finite is
    written as null; numbers inside of a value are not changed."""
    if rank() != 0:
        return
    written = {}
    for key, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            value = None
        written[key] = value
    with open(out / f"{name}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(written, ensure_ascii=False) + "\n")


def print_step(record, steps):
    """Print a line with the values of PRINTED that a step's record has, once for all processes."""
    fields = [f"{name} {record[name]:.4g}" for name in PRINTED if record.get(name) is not None]
    print0(f"step {record['step']}/{steps} | " + " | ".join(fields))


def log_figures(out, step, figures, counts):
    """Append figures, {name: (value, low, high)}, and the numbers of things that they were measured on,
    {"prompts": 128, …}, to eval.jsonl, and print the figures in a line."""
    row, fields = {"step": step, **counts}, []
    for name, (value, low, high) in figures.items():
        row[name] = value
        row[f"{name}_interval"] = [low, high] if math.isfinite(low) else None
        fields.append(f"{name} {format_figure(value, low, high)}")
    write_line(out, "eval", row)
    print0(f"eval {step} | {' | '.join(fields)}{few(counts['prompts'])}")


# --- read what was logged -----------------------------------------------------------------------------------

@dataclass
class Evaluation:
    """What a run has measured on held-out data after a step: a row of eval.jsonl."""
    step: int
    prompts: int                                           # how many prompts were asked, or pairs scored
    figures: dict[str, tuple[float, float, float]]         # (value, low, high) of each that was measured


def evaluation_of(row):
    """The Evaluation in a row of eval.jsonl, {"step": 5, "prompts": 128, NAME: value, "NAME_interval": [low,
    high], …}. A figure whose value is null is left out; an interval that is null becomes nan. Raises
    KeyError, TypeError, ValueError or OverflowError for another row."""
    figures = {}
    for name, value in row.items():
        if f"{name}_interval" in row and value is not None:
            low, high = row[f"{name}_interval"] or (None, None)
            figures[name] = float_of(value), float_of(low), float_of(high)
    return Evaluation(operator.index(row["step"]), operator.index(row["prompts"]), figures)


def float_of(value):
    """A number of a log as a float; null is nan. Raises TypeError for a value that is no number, and
    OverflowError for an int that is too large."""
    if value is None:
        return math.nan
    if not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def whole_lines(path, size):
    """The whole lines in the first `size` bytes of a log, as bytes, without half a line at the end, which a
    full disk leaves."""
    lines = path.read_bytes()[:size]
    return lines[:lines.rfind(b"\n") + 1]


def read_log(path, convert, size=None):
    """Read the rows of a run's log: convert(object) of the JSON object on each line. If `size` is given, only
    `whole_lines` are read. Raises InputError for a line that no run has written, which is one that is no JSON
    object, or for which `convert` raises KeyError, TypeError, ValueError or OverflowError."""
    rows = []
    content = path.read_bytes() if size is None else whole_lines(path, size)
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(convert(dict(parse_json(line))))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{path}:{number}: no run has written this line ({error})") from None
    return rows


# --- checkpoints --------------------------------------------------------------------------------------------

def fingerprint(ids):
    """SHA-256 of the data as token ids, with or without labels, in lists of any depth. It differs if another
    text, label, tokenizer, template or truncation changes what the lists hold."""
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def refuse_missing(name):
    """Raises InputError if `name` is neither there nor the name of a model on a hub, OWNER/NAME."""
    if not Path(name).exists() and (str(name)[:1] in "/.~" or str(name).count("/") > 1):
        raise InputError(f"{name}: no such directory here; the paths in a run's args.json are relative to "
                         "the directory in which the run was started")


def fingerprint_files(name):
    """SHA-256 of the files that a model, a reward or a chat template comes from, by its directory, hub name,
    FILE.py:FUNCTION or file; None for None and for "none". Of a directory, these are the files with an ending
    in MODEL_FILES. Of a file of more than 4 MiB it reads the size and some 64 samples. Raises InputError for
    a name that is not found on the hub."""
    if name is None or name == "none":
        return None
    if ".py:" in name:
        files = [Path(name.rpartition(":")[0])]
    elif Path(name).is_file():
        files = [Path(name)]
    else:
        directory = Path(name)
        if not directory.is_dir():
            refuse_missing(name)
            from transformers.utils import cached_file
            with foreign(f"{name}: no such directory, and not found on the hub"):
                directory = Path(cached_file(name, "config.json")).parent
        files = [file for file in sorted(directory.iterdir()) if file.suffix in MODEL_FILES]
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as opened:
            for place in range(0, size, max(size // 64, 2**16)):
                opened.seek(place)
                digest.update(opened.read(2**16))
    return digest.hexdigest()


def checkpoints_of(out):
    """The directories of a run's checkpoints, the newest last."""
    paths = [path for path in (out / "checkpoints").glob("*") if re.fullmatch("[1-9][0-9]*", path.name)]
    return sorted(paths, key=lambda path: int(path.name))


def newest_checkpoint(out):
    """The directory of the newest checkpoint; None if there is none."""
    return (checkpoints_of(out) or [None])[-1]


def state_of(policy, optimizer):
    """What a checkpoint holds, by name: the trained parameters, tied ones once, and the optimizer's state of
    each."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    options = StateDictOptions(ignore_frozen_params=True, flatten_optimizer_state_dict=True)
    weights, optimizer_state = get_state_dict(policy, optimizer, options=options)
    state = {}
    for name, parameter in policy.named_parameters():                  # tied parameters occur once
        if parameter.requires_grad:
            state[f"model.{name}"] = weights[name]
    for name, value in optimizer_state.items():
        if isinstance(value, torch.Tensor):
            state[f"optimizer.{name}"] = value
    return state


def save_checkpoint(out, policy, optimizer, progress):
    """Write checkpoints/STEP, all processes together, unless it exists; keep the last two. Raises InputError
    if it fails."""
    import torch.distributed.checkpoint as dcp                        # here, since this import takes a second
    path = out / "checkpoints" / str(progress["step"])
    aside = path.with_name("writing")                      # the next save replaces what a failed one left
    if path.exists():
        return
    make_empty(aside)
    state = state_of(policy, optimizer)
    # The state goes into several files, because the writer holds a whole file in memory.
    files = {name: 1 + nth * 16 // len(state) for nth, name in enumerate(state)}
    try:
        with warnings.catch_warnings(action="ignore"):
            dcp.save(state, no_dist=not dist.is_initialized(),
                     storage_writer=dcp.HuggingFaceStorageWriter(str(aside), files, save_distributed=True))
    except dcp.CheckpointException as error:                           # every process raises it
        shutil.rmtree(aside, ignore_errors=True)
        raise InputError(f"{path} cannot be written ({reason_of(error)}); earlier checkpoints are untouched"
                         ) from None
    finish_checkpoint(out, aside, path, progress)


def reason_of(error):
    """The first line of an exception; of a CheckpointException, that of the first process that failed."""
    for failure, _ in getattr(error, "failures", {}).values():
        return first_line(failure)
    return first_line(error)


@fails_together
def make_empty(directory):
    """Rank 0 makes an empty directory, in place of the one that may be there."""
    if rank() == 0:
        remove(directory)
        directory.mkdir(parents=True)


@fails_together
def finish_checkpoint(out, aside, path, progress):
    """Rank 0 gives the checkpoint its progress and its name, and removes all but the last two checkpoints."""
    if rank() != 0:
        return
    logs = {name: (out / f"{name}.jsonl").stat().st_size for name in LOGS}
    write_json(aside / "progress.json", {**progress, "logs": logs})
    aside.rename(path)
    for old in checkpoints_of(out)[:-2]:
        remove(old)


def run_of_checkpoint(name):
    """The directory of the run of which `name` is a checkpoint; None for anything else."""
    path = Path(name).absolute()
    if (path / "progress.json").is_file():
        return path.parents[1]
    return None


def trained_weights(path):
    """The parameters that a checkpoint holds, {name: tensor}, whole and on the CPU. No other process takes
    part. Raises InputError if they cannot be read, or if one has a nan, which stands for a missing part."""
    import torch.distributed.checkpoint as dcp
    state = {}
    try:
        with warnings.catch_warnings(action="ignore"):
            reader = dcp.HuggingFaceStorageReader(str(path))
            for name, tensor in reader.read_metadata().state_dict_metadata.items():
                if name.startswith("model."):
                    state[name] = torch.full(tensor.size, math.nan, dtype=tensor.properties.dtype)
            dcp.load(state, no_dist=True, storage_reader=reader)
    except (Exception, dcp.CheckpointException) as error:              # a CheckpointException is no Exception
        raise InputError(f"{path} cannot be read ({reason_of(error)})") from None
    weights = {}
    for name, value in state.items():
        weights[name.removeprefix("model.")] = value
        if not value.isfinite().all():
            raise InputError(f"{path} cannot be read (a part of {name} is missing, or not finite)")
    return weights


def resume(path, recorded, policy, optimizer, scheduler):
    """Continue from the checkpoint `path`: restore weights, optimizer and scheduler in place, cut the logs to
    what they were at the checkpoint, and return the progress. All processes call this together. recorded: the
    present settings and fingerprints, as in args.json; its `may_change` names the settings that may differ
    from the run's args.json. Raises InputError if another value differs, if the checkpoint or eval.jsonl
    cannot be read, or if a log has lost lines."""
    import torch.distributed.checkpoint as dcp
    out, progress = path.parents[1], read_progress(path)
    logs = progress.pop("logs")
    refuse_changes(read_json(out / "args.json"), recorded, path)
    for name, size in logs.items():
        if (out / f"{name}.jsonl").stat().st_size < size:
            raise InputError(f"{out}/{name}.jsonl has lost lines since {path} was written; use --overwrite")
    read_log(out / "eval.jsonl", evaluation_of, logs["eval"])          # the model's card will read it
    refuse_unreadable(path)
    try:
        with warnings.catch_warnings(action="ignore"):                 # this fills the tensors in use
            dcp.load(state_of(policy, optimizer), no_dist=not dist.is_initialized(),
                     storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    except (dcp.CheckpointException, RuntimeError) as error:
        raise InputError(f"{path} cannot be read ({reason_of(error)}); remove it, then --resume") from None
    if rank() == 0:
        for name, size in logs.items():
            cut_log(out / f"{name}.jsonl", size)
    scheduler.last_epoch = progress["step"] - progress["skipped"] - 1
    scheduler.step()
    print0(f"continuing after step {progress['step']}, from {path}")
    return progress


@fails_together
def refuse_unreadable(path):
    """Raises InputError if heads of a checkpoint's files cannot be read, where dcp.load shows a traceback."""
    import torch.distributed.checkpoint as dcp
    with foreign(f"{path} cannot be read; remove it, then --resume"):
        dcp.HuggingFaceStorageReader(str(path)).read_metadata()


def cut_log(path, size):
    """Cut a log to its `whole_lines` of the first `size` bytes."""
    write_bytes(path, whole_lines(path, size))


def read_progress(path):
    """The progress of the checkpoint `path`. Raises InputError if no run can have written it."""
    file = path / "progress.json"
    progress = read_json(file)
    counts = [progress.get("step"), progress.get("skipped"), progress.get("in_a_row")]
    logs = progress.get("logs")
    is_sound = isinstance(logs, dict) and set(logs) == set(LOGS)
    for count in counts + list(logs.values() if is_sound else []):
        is_sound = is_sound and type(count) is int and count >= 0
    baseline = progress.get("baseline", 0.0)
    is_sound = is_sound and isinstance(baseline, float) and math.isfinite(baseline)
    evaluated, record = progress.get("evaluated"), progress.get("record")
    is_sound = is_sound and type(evaluated) is int and "record" in progress
    is_sound = is_sound and (record is None or is_record(record, counts[0]))
    if not is_sound or str(counts[0]) != path.name or max(counts[1:]) > counts[0]:
        raise InputError(f"{file}: no run has written this; remove {path}, then --resume")
    return progress


def is_record(record, step):
    """Whether a value is the record of this step: a dict of numbers and nulls, with the step as `step`."""
    if not isinstance(record, dict) or record.get("step") != step:
        return False
    return all(value is None or isinstance(value, (int, float)) for value in record.values())


def refuse_changed_settings(out, recorded):
    """Raises InputError if a setting has changed since the newest checkpoint of `out` and is not allowed to
    change."""
    checkpoint = newest_checkpoint(out)
    if checkpoint is not None:
        refuse_changes(read_json(out / "args.json"), recorded, checkpoint)


def refuse_changes(before, recorded, path):
    """Raises InputError if a value in `recorded` is not the one in `before`, the earlier args.json, and is
    not allowed to change. path: the checkpoint, for the message."""
    for name, value in recorded.items():
        if name in recorded["may_change"] or before.get(name) == value:
            continue
        what = f"--{name.replace('_', '-')} has"
        if name in ("data_sha256", "data_counts"):
            what = "the data have"
        elif name.endswith("_sha256"):
            what = f"the files of --{name.removesuffix('_sha256').replace('_', '-')} have"
        advice = "undo the change"
        if name not in ("model_sha256", "chat_template_sha256"):       # which the checkpoint itself needs
            advice += f", or go on in a new run: --model {shlex.quote(str(path))}"
            if before.get("reference"):
                advice += f" --reference {shlex.quote(before['reference'])}"
            advice += " --out ANOTHER"
        raise InputError(f"--resume: {what} changed since {path} was written, from {before.get(name)} to "
                         f"{value}; {advice}")
