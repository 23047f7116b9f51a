#!/usr/bin/env bash
# ./run.sh              sft → dpo → dp → pp → pr → compare, on the embedded toy world
# ./run.sh ARGS         the same with ARGS passed to sail.py: ./run.sh --model DIR --data FILE --reward DIR
#                       SFT_FLAGS="--learning-rate 2e-5 --epochs 3" ./run.sh … are for the SFT alone
# ./run.sh test         the tests
# NPROC=8 ./run.sh …    with eight processes, one for each GPU; PYTHON=python3.12 ./run.sh … picks the Python
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
run() { echo "+ $*"; "$@"; }
case " $* " in *" --help "* | *" -h "*) sed -n '2,6s/^# //p' "$here/run.sh"; exit ;; esac      # sail.py has its own

# Let glibc keep freed memory for the next step rather than return it to the kernel and pay for every page
# anew.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=34359738368 MALLOC_TOP_PAD_=268435456
export PYTORCH_ALLOC_CONF=expandable_segments:True             # the same for a GPU: every step has other shapes

# The packages: those of $PYTHON where it has them all, else .venv beside this file, made on first use.
PYTHON=${PYTHON:-python3}
complete='import importlib.metadata as m; [m.version(p) for p in "torch datasets tqdm numpy pytest matplotlib".split()]
assert int(m.version("transformers").split(".")[0]) >= 5'
if ! "$PYTHON" -c "$complete" 2>/dev/null; then
    if [ ! -x "$here/.venv/bin/python" ]; then run "$PYTHON" -m venv "$here/.venv"; fi
    PYTHON=$here/.venv/bin/python
    if ! "$PYTHON" -c "$complete" 2>/dev/null; then run "$PYTHON" -m pip install -q -r "$here/requirements.txt"; fi
fi

if [ "${1:-}" = test ]; then
    shift
    run "$PYTHON" -m pytest -q "$here/tests" "$@"
    exit
fi

source=toy previous=                        # of --data; sail.py names the run's directory after it
for argument in "$@"; do
    case $argument in --variant* | --out*)
        echo "run.sh: error: ${argument%%=*} is what run.sh itself gives to each run; use sail.py for one run" >&2
        exit 2 ;;
    esac
    case $previous$argument in --data?*) source=${argument#--data}; source=${source#=} ;; esac
    previous=; if [ "$argument" = --data ]; then previous=--data; fi
done
runs=$(PYTHONPATH=$here "$PYTHON" -c 'import sys; from runtime.run_directory import run_directory as name; print(name(sys.argv[1]))' "$source")
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600  # torchrun's patience at SIGTERM, in seconds: a step ends, and is saved
train=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "${NPROC:-1}" "$here/sail.py")     # torchrun
for variant in sft dpo dp pp pr; do
    if [ $variant = dpo ]; then set -- "$@" --model "$runs/sft/model"; fi         # the last --model counts
    case " $* " in *" --overwrite "* | *" --resume "*) again=yes ;; *) again= ;; esac
    if [ -d "$runs/$variant/model" ] && [ -z "$again" ]; then
        echo "# $runs/$variant is there already; --overwrite trains it anew"
    else
        only= anchor=
        if [ $variant = sft ]; then only=${SFT_FLAGS:-}; fi
        if [ $variant = pp ]; then anchor="--revkl-coef 0.3"; fi                  # without it PP diverges
        run "${train[@]}" --variant $variant $anchor "$@" $only --out "$runs/$variant"
    fi
done
best=(); if [ "$source" = toy ]; then best=(--frontier 2000 --reward "$here/toy.py:toy_reward"); fi      # the best possible
run "$PYTHON" "$here/evaluate.py" --compare "$runs/"{sft,dpo,dp,pp,pr} --out "$runs/results.json" ${best[@]+"${best[@]}"}
