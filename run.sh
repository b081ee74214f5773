#!/usr/bin/env bash
# bash run.sh          set up this machine and train a chat model: on GPUs the speedrun, sized by them; elsewhere the demo
# bash run.sh test     set up and run the tests
# bash run.sh serve    set up and start the chat page
# Further words go to the program: `bash run.sh serve --port=9000`, `bash run.sh test -k muon`.
# OUT=DIR is the run's folder (out). DATA=demo is the demo on GPUs too. DATA=PATH trains on your own text, of DEPTH=12 layers on GPUs.
# DATA=climbmix (or c4, tinystories) downloads SHARDS=N of it, from MIRROR=URL if named, and trains while the rest is coming; on GPUs
# HOURS=2.5 or DEPTH=24 sizes the model then.
# A second call does only what is not done yet.
set -euo pipefail
DATA=${DATA:-} VAL=
case $DATA in climbmix | c4 | tinystories | demo) ;; ?*) DATA=$(realpath "$DATA") ;; esac
cd "$(dirname "$0")"
OUT=${OUT:-out} VENV=$PWD/.venv

fail() { echo "run.sh: $*" >&2; exit 1; }

setup() {
    local python=${PYTHON:-python3}
    command -v "$python" >/dev/null || fail "python3 (3.10 or newer) is missing: apt-get install python3 python3-venv"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "python 3.10 or newer is needed, this is $("$python" -V)"
    if [ ! -x "$VENV/bin/pip" ]; then
        rm -rf "$VENV"
        "$python" -m venv "$VENV" || { rm -rf "$VENV"; fail "python's venv is missing: apt-get install python3-venv"; }
    fi
    if ! "$VENV/bin/python" -c 'import torch, numpy, requests, pytest' 2>/dev/null; then
        # The torch that PyPI serves for Linux brings 4 GB of CUDA along. Without a GPU, try the CPU build first.
        echo "installing torch (once; minutes)"
        if [ "$(gpus)" = 0 ] && [ "$(uname)" = Linux ]; then
            "$VENV/bin/pip" install -q --retries 0 --timeout 15 --index-url https://download.pytorch.org/whl/cpu "torch>=2.9" 2>/dev/null ||
                echo "the CPU build of torch is out of reach, taking the one with CUDA"
        fi
        "$VENV/bin/pip" install "torch>=2.9" numpy requests pytest || fail "the packages cannot be installed; see pip's message above"
    fi
    # build the tokenizer again when its sources have changed
    local sum
    sum=$(cat tok.rs Cargo.toml Cargo.lock pyproject.toml | cksum)
    if [ "$(cat "$VENV/tok.sum" 2>/dev/null)" != "$sum" ]; then
        command -v cc >/dev/null || fail "a C compiler is missing (Rust links with it): apt-get install gcc libc6-dev"
        echo "building the tokenizer (tok.rs)"
        # where cargo is missing, the build fetches Rust by itself
        "$VENV/bin/pip" install -q --force-reinstall --no-deps . || fail "the tokenizer cannot be built; if Rust is what is missing, https://rustup.rs has it"
        echo "$sum" >"$VENV/tok.sum"
    fi
    # shellcheck disable=SC1091
    source "$VENV/bin/activate"
}

# End a download that nobody needs any more, and say so where it was not complete, whatever ended it.
unload() {
    kill "$loader" 2>/dev/null || true
    wait "$loader" || echo "run.sh: the download is not complete: $(tail -n 1 "$log")" >&2
    rm -f "$begun"
}

gpus() { { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true; }

case ${1:-all} in
test)
    shift
    setup
    exec python -m pytest -q test_all.py "$@"
    ;;
serve)
    shift
    setup
    exec python serve.py --out="$OUT" "$@"
    ;;
all)
    setup
    n=$(python -c 'import torch; print(torch.cuda.device_count())')
    run() { if [ "$n" -gt 1 ]; then torchrun --standalone --nproc_per_node="$n" "$@"; else python "$@"; fi; }
    recipe=(--seq_len=2048 --vocab_size=32768 --compile=1)
    case $DATA in
    "" | climbmix | c4 | tinystories)
        if [ "$n" -gt 0 ]; then
            # 8 tokens for each weight, as the models read that reached GPT-2's CORE in the least time
            recipe+=(--horizon=8 --depth="${DEPTH:-0}" --hours="${HOURS:-2.5}")
            # a card whose speed is not known ends this with a line that says so
            if plan=$(python pretrain.py "${recipe[@]}" --plan=here); then
                echo "$plan"
                planned=$(awk '/shards$/ {print $(NF - 1)}' <<<"$plan")
                [ "$DATA" != c4 ] || planned=$((2 * planned))  # its files hold half as much
                DATA=${DATA:-climbmix} SHARDS=${SHARDS:-$planned}
            elif [ -n "$DATA" ] && [ -z "${DEPTH:-}" ]; then
                fail "DEPTH=12 would name a depth"
            fi
        fi ;;
    *) recipe+=(--depth="${DEPTH:-12}") ;;
    esac
    public=
    case $DATA in climbmix | c4 | tinystories)
        public=1
        mkdir -p "$OUT"
        begun=$(mktemp) log=$OUT/download.log
        echo "downloading $DATA: $log says how far it is"
        python data.py download --source="$DATA" --shards="${SHARDS:-1}" --mirror="${MIRROR:-}" --out="$OUT/text" >"$log" 2>&1 &
        loader=$!
        trap unload EXIT  # also after Ctrl-C
        until [ "$OUT/text/source.json" -nt "$begun" ]; do  # it says what will be there
            kill -0 $loader 2>/dev/null || fail "nothing can be downloaded; DATA=demo bash run.sh needs no network"
            sleep 0.2
        done
        DATA=$OUT/text/train VAL=$OUT/text/val ;;
    esac
    if [ -z "$DATA" ] || [ "$DATA" = demo ]; then
        # three layers learn the embedded world, in minutes on a CPU; more GPUs would not help
        n=0
        run pretrain.py --out="$OUT" --depth=3 --seq_len=256 --batch_tokens=4096 --steps=300
    elif [ "$n" = 0 ]; then
        run pretrain.py --out="$OUT" --data="$DATA" --val_data="$VAL" --depth=4 --vocab_size=4096 --steps=1000 --compile=1
    else
        run pretrain.py --out="$OUT" --data="$DATA" --val_data="$VAL" "${recipe[@]}" --save_every=500 --eval_every=500 --sample_every=500 --eval_rows=2000
    fi
    if [ "$n" -gt 0 ] && [ -n "$public" ]; then
        # what cannot be had is named, and the rest goes on without it
        for source in slimorca ultrachat oasst2 dolly gsm8k mmlu core; do
            python data.py download --source=$source --mirror="${MIRROR:-}" --out="$OUT/chats" || echo "run.sh: going on without $source" >&2
        done
        run evals.py --out="$OUT" --stage=base --core="$OUT/chats" || echo "run.sh: going on without CORE" >&2
        run sft.py --out="$OUT" --mix="$OUT/chats" --chats=4000 --steps=500 --batch_rows=64 --micro_rows=4 --compile=1
        run rl.py --out="$OUT" --task=gsm8k --files="$OUT/chats" --tasks=gsm8k --max_tokens=256 --problems=32 --samples=16 --micro_rows=8
    else
        run sft.py --out="$OUT"
        run rl.py --out="$OUT"
    fi
    echo "done: the report is $OUT/report.html; chat with 'bash run.sh serve' or '.venv/bin/python sample.py --out=$OUT'"
    ;;
*)
    fail "unknown command '$1'; there are: bash run.sh, bash run.sh test, bash run.sh serve"
    ;;
esac
