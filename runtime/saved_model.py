"""The results of a run that can be used as models: OUT/model, in the files that other tools read, and each
checkpoint, which holds the trained parameters of a base model."""
import shlex
from dataclasses import fields
from pathlib import Path

from safetensors.torch import save_file

from runtime.command_line import InputError, foreign
from runtime.intervals import format_figure
from runtime.processes import fails_together, rank
from runtime.run_directory import (
    evaluation_of, fingerprint_files, is_run_directory, read_json, read_log, run_of_checkpoint,
    write_directory, write_json, write_text)
from runtime.settings import Settings, flag_of, read_settings

# The models in transformers 4 that have layers of different kinds with different rotary angles.
LAYER_KINDS = ("gemma3_text", "gemma3n_text", "olmo3")


@fails_together                                        # no process ends before the model is written
def save_model(policy, tokenizer, args, merge):
    """Write OUT/model, a whole model that any tool loads. For a policy with an adapter, this is the model
    that merge({name: trained weight}) returns, and the adapter itself is written to OUT/adapter. Earlier ones
    are replaced. args: the run's settings. All processes take part, and rank 0 writes."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    state = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    names = {name for name, _ in policy.named_parameters()}            # one name of tied parameters
    names |= {name for name, _ in policy.named_buffers()}
    state = {name: value for name, value in state.items() if name in names}
    out = Path(args.out)
    if rank() == 0:
        if hasattr(policy, "peft_config"):
            save_adapter(policy, state, out)
            trained = {}
            for name, parameter in policy.named_parameters():
                if parameter.requires_grad:
                    trained[name] = state[name]
            policy, state = merge(trained), None

        card = model_card(args)

        def write(aside):
            policy.save_pretrained(aside, state_dict=state)
            tokenizer.save_pretrained(aside)
            add_keys_of_version_4(aside)
            write_text(aside / "README.md", card)

        write_directory(out / "model", write)


def add_keys_of_version_4(directory):
    """Add to a saved model's config.json the keys that transformers 4 reads in place of those that version 5
    writes, and rename in tokenizer_config.json what only version 5 knows. Otherwise version 4 takes its
    default rotary angles in silence, which makes another model, and it finds no tokenizer."""
    config = read_json(directory / "config.json")
    for part in (config, *config.values()):                # a multimodal model has several configs
        if isinstance(part, dict):
            add_rotary_keys(part)
            if "dtype" in part:
                part["torch_dtype"] = part["dtype"]
    write_json(directory / "config.json", config)
    file = directory / "tokenizer_config.json"
    if file.is_file():
        tokenizer = read_json(file)
        if tokenizer["tokenizer_class"] == "TokenizersBackend":
            tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"       # version 5 knows this name as well
        if isinstance(tokenizer.get("extra_special_tokens"), list):
            tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
        write_json(file, tokenizer)


def add_rotary_keys(config):
    """Add rope_theta, partial_rotary_factor and rope_scaling, in place, to a configuration that has
    rope_parameters, and the other names that Gemma 3 and Pythia, for example, read. Rotary encodings of which
    version 4 knows no form are left as they are."""
    rope = config.get("rope_parameters") or {}
    if config.get("model_type") in LAYER_KINDS:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if "rope_type" not in rope:                            # version 4 has no keys for other forms
        return
    scaling = {}
    for key, value in rope.items():
        if key in ("rope_theta", "partial_rotary_factor"):
            config[key] = value
        else:
            scaling[key] = value
    if rope["rope_type"] == "longrope":                    # version 4 wants only `type` and two lists
        scaling["type"] = scaling.pop("rope_type")
        if "original_max_position_embeddings" in config:
            del scaling["original_max_position_embeddings"]
    config["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
    if config.get("model_type") == "gpt_neox":             # Pythia, for example, reads two other names
        config["rotary_emb_base"], config["rotary_pct"] = rope["rope_theta"], rope["partial_rotary_factor"]


# --- the README.md of a saved model -------------------------------------------------------------------------

def model_card(args):
    """The text of a saved model's README.md: its base, method and data, the command, the settings without a
    flag, and the last held-out figures of the run with the settings `args`."""
    front, origin = "", origin_of(args.model)
    if not Path(origin).exists():                          # the hub refuses a card whose base is a directory
        front = f"base_model: {origin}\n"
    what, how = "A reward model", "Bradley-Terry's likelihood"
    if hasattr(args, "variant"):
        what = "A language model"
        how = f"`--variant {args.variant}` of an implementation of SAIL (arXiv 2406.15567)"
    command, without_flag = command_of(args)
    return (f"---\n{front}library_name: transformers\n---\n\n# {Path(args.out).resolve().name}\n\n"
            f"{what}: `{args.model}`, trained with {how} on `{args.data}`:\n\n    {command}\n\n"
            f"Settings that have no flag: {without_flag}.\n\n{last_figures(Path(args.out))}\n")


def origin_of(model):
    """The hub name or directory of the base from which `model`, the model or a checkpoint of a run, was
    trained. If the base is itself one of a run, that run's base is taken, and so on. Any other model is its
    own base."""
    for _ in range(100):                                   # args.json of a foreign run may name itself
        out = run_of_checkpoint(model)
        if Path(model).name == "model" and is_run_directory(Path(model).parent):
            out = Path(model).parent
        if out is None:
            break
        model = read_settings(out / "args.json", Settings, "model").get("model", model)
    return model


def command_of(args):
    """The command line of a run with these settings, and its settings that have no flag: (text, text). Values
    that are a field's default, and settings that may change or have no effect on the run, are left out."""
    words = ["python", "sail.py" if hasattr(args, "variant") else "reward.py"]
    without_flag = []
    for field in fields(args):
        value = getattr(args, field.name)
        has_no_effect = field.metadata["may_change"] or field.name in args.unused
        if value == field.default or has_no_effect:
            continue
        if field.metadata["help"] is None:
            without_flag.append(f"{field.name} {value}")
            continue
        words.append(flag_of(field.name))
        if value is not True:
            words.append(str(value))
    return shlex.join(words), ", ".join(without_flag) or "all at their defaults"


def last_figures(out):
    """A sentence with the last figures in a run's eval.jsonl, or one that says that there are none."""
    evaluations = read_log(out / "eval.jsonl", evaluation_of)
    if not evaluations:
        return "No pair was held out, so the model was not evaluated."
    last = evaluations[-1]
    figures = [f"{name} {format_figure(*figure)}" for name, figure in last.figures.items()]
    return (f"Held-out figures after step {last.step}, on {last.prompts} prompts, with 95 % intervals: "
            f"{', '.join(figures)}.")


# --- adapters, and the base of a checkpoint -----------------------------------------------------------------

def save_adapter(policy, state, out):
    """Write out/adapter, in the form that PeftModel reads."""
    from peft import get_peft_model_state_dict
    adapter = {}
    for name, value in get_peft_model_state_dict(policy, state).items():
        adapter[f"base_model.model.{name}"] = value

    def write(aside):
        policy.peft_config["default"].save_pretrained(aside)
        save_file(adapter, aside / "adapter_model.safetensors")

    write_directory(out / "adapter", write)


def base_of(name):
    """Settings with the model (the base), lora and chat_template of the run that wrote the checkpoint `name`;
    the others have their defaults. A base that is a hub name becomes the directory of its files. Returns None
    if `name` is no checkpoint. Raises InputError if the run has no valid args.json, if the base is not on
    this machine, or if the base's files or the chat template have changed since the run began."""
    out = run_of_checkpoint(name)
    if out is None:
        return None
    if not is_run_directory(out):
        raise InputError(f"{name} is a checkpoint, but {out}/args.json, which names its base, is not a run's")
    settings = Settings(**read_settings(out / "args.json", Settings, "model", "lora", "chat_template"))
    base = settings.model
    if not Path(str(base)).is_dir():
        from transformers.utils import cached_file
        with foreign(f"{name}: its base {base} is not on this machine"):
            settings.model = str(Path(cached_file(base, "config.json", local_files_only=True)).parent)
    recorded = read_json(out / "args.json")
    if fingerprint_files(settings.model) != recorded.get("model_sha256"):
        raise InputError(f"{name}: the files of its base {base} have changed since the run began")
    template = settings.chat_template
    is_gone = template not in (None, "none") and not Path(template).is_file()
    if is_gone or fingerprint_files(template) != recorded.get("chat_template_sha256"):
        raise InputError(f"{name}: the run's chat template {template} has changed since it began, or is gone")
    return settings
