#!/usr/bin/env bash
# Measure in 9 minutes everything that only a GPU can decide, and print the project's goals last.
#
#     OUT=device-out WHEELS=folder bash benchmarks/device.sh
#
# OUT gets at most eight files. figures.jsonl has a line for each figure as soon as it is known, so a
# run that is stopped at any moment leaves all that it measured. log.txt has all that was printed. On
# an H200 the report h200.json and the picture h200.png are those of docs/benchmarks.
# WHEELS is a folder with the wheels of array-api-compat and array-api-strict, where Python lacks
# them. LIMIT is the time of the whole run, in seconds, and PYTHON the interpreter.
# The exit status is 1 if a part failed or could not run, or if its time was up.
set -u -o pipefail
SECONDS=0

LIMIT=${LIMIT:-555} PYTHON=${PYTHON:-python3} WHEELS=${WHEELS:-}
OUT=${OUT:-device-out}
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
[[ -z $WHEELS ]] || WHEELS=$(cd "$WHEELS" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

LEAST=${LEAST:-5} # seconds: a part that has less left is not started
KILL=${KILL:-3}   # seconds from asking a part to end until it is killed
status=0 child='' tee='' site=''
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD/src DEVICE_FOLDER=$OUT

finish() {
    trap '' TERM INT HUP
    trap - EXIT
    [[ -z $child ]] || kill "$child" 2>/dev/null
    printf '\n== %d s: the goals\n' "$SECONDS"
    "$PYTHON" benchmarks/device_report.py "$OUT" || status=1
    [[ -z $site ]] || rm -rf "$site"
    exec >&- 2>&-
    for _ in {1..20}; do # tee ends when the last process that prints has ended
        kill -0 "$tee" 2>/dev/null || break
        sleep 0.1
    done
    exit "$status"
}

# part NAME SECONDS COMMAND...: run a command for at most so many seconds, and at most until LIMIT.
part() {
    local name=$1 most=$2 left=$((LIMIT - SECONDS - KILL)) code
    shift 2
    printf '\n== %d s: %s\n' "$SECONDS" "$name"
    if [[ -n $reason ]]; then
        skip "$name" "$reason"
        return
    fi
    if ((left < LEAST)); then
        skip "$name" "no time is left: $SECONDS of $LIMIT s are used"
        return
    fi
    if ((most > left)); then most=$left; fi
    timeout --kill-after="$KILL" "$most" "$@" &
    child=$!
    wait "$child"
    code=$?
    child=''
    ((code == 0)) && return
    status=1
    if ((code == 124 || code == 137)); then
        printf '%s: stopped after %d s\n' "$name" "$most"
    else
        printf '%s: failed with exit status %d\n' "$name" "$code"
    fi
}

# skip NAME REASON: print why a part does not run, and keep it.
skip() {
    status=1
    printf '%s: could not run: %s\n' "$1" "$2"
    "$PYTHON" benchmarks/device_report.py "$OUT" skip "$1" "$2"
}

# tool NAME: print the path of one of NVIDIA's tools.
tool() {
    local found
    for found in "$(command -v "$1")" /usr/local/cuda/bin/"$1" /opt/nvidia/nsight-compute/*/"$1"; do
        if [[ -x $found ]]; then
            printf '%s\n' "$found"
            return
        fi
    done
    printf '%s\n' "$1"
}

# bench NAME SECONDS ARGUMENTS...: run `doraxp bench` and keep its report.
bench() {
    local name="benchmark, $1" most=$2 left=$((benched + 180 - SECONDS))
    shift 2
    if ((most > left)); then most=$((left > 0 ? left : 0)); fi
    if ((most == 0)); then
        printf '\n== %d s: %s\n' "$SECONDS" "$name"
        skip "$name" "the time of the benchmark is used"
        return
    fi
    part "$name" "$most" \
        "$PYTHON" -m doraxp bench --rounds 3 --json "$OUT/bench.json" "$@"
    "$PYTHON" benchmarks/device_report.py "$OUT" add bench.json
}

# sanitize TOOL SECONDS: make each call once on small layers under one of compute-sanitizer's tools.
# A tool that is stopped writes no summary, so no layer is begun in the last 20 seconds.
sanitize() {
    local left=$((LIMIT - SECONDS - KILL))
    part "$1" "$2" "$(tool compute-sanitizer)" --tool "$1" --error-exitcode 9 \
        --log-file "$OUT/$1.log" "$PYTHON" benchmarks/gpu_kernels.py --calls small \
        --folder "$OUT" --seconds $((($2 < left ? $2 : left) - 20))
    [[ ! -e $OUT/$1.log ]] || tail -n 20 "$OUT/$1.log"
}

# why_not: print the reason why nothing can be measured here, if there is one.
why_not() {
    local code='from doraxp.backends._cupy.operations import why_not as why; print(why() or "")'
    "$PYTHON" -c "$code" 2>/dev/null || "$PYTHON" -c "$code" 2>&1 | tail -n 1
}

rm -f "$OUT"/{figures.jsonl,log.txt,bench.json,bench.png,verify.json,counters.csv,racecheck.log,memcheck.log}
exec > >(tee -a "$OUT/log.txt") 2>&1
tee=$!
trap finish EXIT
trap 'status=1; exit' TERM INT HUP

if [[ -n $WHEELS ]] && ! "$PYTHON" -c 'import array_api_compat, array_api_strict' 2>/dev/null; then
    site=$(mktemp -d)
    export PYTHONPATH=$PYTHONPATH:$site
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
        --target "$site" "$WHEELS"/*.whl
fi
reason=$(why_not)

part 'the device' 40 "$PYTHON" benchmarks/probe.py machine "$OUT"

export DEVICE_UNTIL
pytest=("$PYTHON" -m pytest -q -p device_tests -p no:cacheprovider --backend cupy --tb=short)
together=()
"$PYTHON" -c 'import xdist' 2>/dev/null && together=(-p xdist -n 8)
# Other plugins of a machine may warn, and a warning is an error here: pytest-benchmark beside xdist.
tests=(env PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 "PYTHONPATH=$PYTHONPATH:$PWD/benchmarks" "${pytest[@]}")
DEVICE_UNTIL=$(($(date +%s) + 25))
part 'tests of the device' 35 "${tests[@]}" tests/test_cupy_device.py
DEVICE_UNTIL=$(($(date +%s) + 35))
part 'other tests' 50 "${tests[@]}" "${together[@]}" --ignore=tests/test_cupy_device.py tests

# JAX compiles each operation by itself, which takes minutes: `doraxp verify --device cuda` has it.
part 'array libraries' 25 "$PYTHON" -m doraxp verify --device cuda --backend cupy --backend torch \
    --json "$OUT/verify.json"
"$PYTHON" benchmarks/device_report.py "$OUT" add verify.json

part 'variants' 45 "$PYTHON" benchmarks/probe.py variants "$OUT"

benched=$SECONDS
square='--shapes 4096x4096 --rank 16' wide='--shapes 4096x11008 --rank 16'
large='--shapes 8192x28672 --rank 64'
cupy='--backend cupy' torch='--backend torch --device cuda'
step='--tokens 4096 --tasks step norm merge' token='--tokens 1 --tasks evaluation'
# shellcheck disable=SC2086 # each of the texts is several words
{
    bench '4096×4096' 60 $cupy $square --dtype bfloat16 $step adamw --plot "$OUT/bench.png"
    bench 'PyTorch' 60 $torch $square --dtype bfloat16 float32 --tokens 4096 1
    bench 'PyTorch, autocast' 40 $torch $square --autocast --tokens 4096
    bench '4096×4096, one token' 30 $cupy $square --dtype bfloat16 $token
    bench '4096×11008' 40 $cupy $wide --dtype bfloat16 $step
    bench '8192×28672' 60 $cupy $large --dtype bfloat16 $step
    bench '4096×4096, float32' 40 $cupy $square --dtype float32 $step
    bench '8192×28672, one token' 40 $cupy $large --dtype bfloat16 $token
}

part 'kernels' 31 "$PYTHON" benchmarks/gpu_kernels.py --folder "$OUT"

part 'quantised base' 15 "$PYTHON" benchmarks/quantised_step.py --library cupy --rounds 5 \
    --folder "$OUT"

passes='merge|token|outputs|update|gradients|mixed_gradients|gradient_a|squares|adapted_norm|project|pull'
ratio=l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op
part 'counters of the passes over large arrays' 40 \
    "$(tool ncu)" --clock-control none --csv --print-units base --log-file "$OUT/counters.csv" \
    --metrics "gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,${ratio}_ld.ratio,${ratio}_st.ratio" \
    --kernel-name "regex:^($passes)$" --launch-count 24 \
    "$PYTHON" benchmarks/gpu_kernels.py --calls large

sanitize racecheck 50
sanitize memcheck 40
