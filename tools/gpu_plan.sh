#!/bin/bash
# What a GPU shows, in one call of six minutes: bash tools/gpu_plan.sh [--quick] [--rtx] [--dry-run]; see docs/gpu.md.
#   --quick    three minutes: two presets, shorter figures, no engine contract, no sanitizer
#   --rtx      TensorRT-RTX only
#   --unpack   only unpack what tools/gpu_wheels.py packed, for a later call
#   --dry-run  every stage on the CPU, tiny, to try this script
# Results go to $OUT (default gpu-results/; 8 files, written as they grow). Every stage has a limit of time, and a
# failure ends that stage only.
set -u
cd "$(dirname "$0")/.."
quick='' rtx='' dry='' unpack_only=''
for option in "$@"; do
  case $option in
    --quick) quick=1 ;;
    --rtx) rtx=1 ;;
    --dry-run) dry=1 ;;
    --unpack) unpack_only=1 ;;
    *) echo "gpu_plan.sh: unknown option $option" >&2; exit 2 ;;
  esac
done
python=${PYTHON:-python3} work=${TMPDIR:-/tmp}/slide2vec-gpu out=${OUT:-gpu-results}
site=$work/site
mkdir -p "$out" "$site" && out=$(cd "$out" && pwd) || exit 1
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 SLIDE2VEC_ENGINES=$work/engines
export CUFILE_ENV_PATH_JSON=$PWD/slide2vec/readers/cufile.json

# What the machine lacks, packed by tools/gpu_wheels.py; an archive is unpacked once.
unpack() {
  local mark; mark=$site/.$(basename "$(dirname "$1")")
  [ -e "$mark" ] || { "$python" -m tarfile -e "$1" "$site" && touch "$mark"; }
}
if [ -z "$dry" ]; then
  for archive in "${WHEELS:-.whl}"/*/site.tar.xz; do [ -e "$archive" ] && unpack "$archive" & done
  wait
  export PYTHONPATH=$site:$PWD
fi
[ -n "$unpack_only" ] && { ls -a "$site"; exit 0; }

# stage NAME SECONDS FILE COMMAND…: its output to $out/FILE, the end of it to the screen, a line to results.md.
stage() {
  local name=$1 limit=$2 log=$out/$3 left=$((budget - SECONDS)) before ended; shift 3
  [ -n "$dry" ] && limit=$((10 * limit))
  [ "$limit" -gt "$left" ] && limit=$left
  if [ "$limit" -lt 5 ]; then
    echo "| $name | not run: no time is left | $SECONDS | |" | tee -a "$out/results.md"
    return
  fi
  echo "=== $name (at $SECONDS s, $limit s at most)" | tee -a "$log"
  before=$(wc -l < "$log")
  timeout -k 5 "$limit" "$@" >> "$log" 2>&1 < /dev/null
  ended=$?
  [ $ended = 124 ] && ended="stopped after $limit s"
  tail -n +$((before + 1)) "$log" | tail -n "${shown:-12}" | cut -c1-300
  echo "| $name | $ended | $SECONDS | $(tail -n 1 "$log" | cut -c1-160 | tr '|' '/') |" >> "$out/results.md"
}

# The memory checker over the project's own kernels. A machine that refuses it is no failure.
sanitize() {
  command -v compute-sanitizer > /dev/null || { echo "not run: compute-sanitizer is not installed"; return 0; }
  compute-sanitizer --tool memcheck --error-exitcode 9 "$1" -m pytest -q -m gpu -p no:cacheprovider \
    tests/gpu/test_pixels.py -k "cutting or decoding or triton" 2>&1 | tee "$2"
  local ended=${PIPESTATUS[0]}
  grep -qE "Device not supported|Failed to initialize|not supported on this" "$2" || return "$ended"
  echo "not run: compute-sanitizer is refused here"
}
export -f sanitize

device=cuda presets="virchow2 prost40m uni" budget=345 probe_limit=120 tests_limit=80 stream_limit=60
figures=(--size 12288 --seconds 0.8) stream=(--parts presets --rounds 1 --seconds 3) tests=()
if [ -n "$quick" ]; then
  presets="virchow2 prost40m" budget=170 probe_limit=50 tests_limit=45 stream_limit=45
  figures=(--size 12288 --seconds 0.5) stream=(--parts presets --rounds 1 --seconds 2) tests=(-k "not memory")
fi
if [ -n "$dry" ]; then
  export SLIDE2VEC_GPU_TEST_DEVICE=cpu
  device=cpu presets=scattering budget=3000
  figures=(--size 1024 --batch-size 2 --seconds 0.01 --trial 1) stream=(--rounds 1 --most-slides 2 --parts decode presets prepare) tests=(-k "cutting and not kernel")
fi
rtx_presets=${presets/virchow2 prost40m/prost40m virchow2}  # the small one first
figures+=(--device $device --work-dir "$work")
for slide in .gpu-slides/*; do [ -e "$slide" ] && slides+=("$slide"); done
[ -n "${slides[*]:-}" ] && figures+=(--slide "${slides[@]}")
check=("$python" tools/gpu_check.py --no-benchmarks -p no:cacheprovider --durations=5)
"$python" -c "import pytest_timeout" 2> /dev/null && check+=(--timeout 60)

rm -f "$out"/{environment.txt,probe.json,probe.log,tests.log,bench.json,bench.md,bench.log}
printf '| stage | status | until, s | last line |\n|---|---|---|---|\n' > "$out/results.md"
stage environment 30 environment.txt bash -c "
  date; nvidia-smi; nproc; lscpu | head -20; free -g; $python --version; ls -a $site; ldconfig -p | grep -E 'libcuda.so|libnvjpeg'
  $python -m pip list 2> /dev/null | grep -iE '^(torch|triton|timm|numpy|nvidia|cuda|onnx|tensorrt)'
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || echo 'no nvidia-smi'"
if [ -n "$rtx" ]; then
  stage "TensorRT-RTX" 140 probe.log "$python" -m tools.gpu_probe --rtx --out "$out/probe.json" --presets $rtx_presets "${figures[@]}"
  stage "TensorRT-RTX, tests" 120 tests.log "${check[@]}" --only tensorrt
else
  stage probe $probe_limit probe.log "$python" -m tools.gpu_probe --out "$out/probe.json" --presets $presets "${figures[@]}"
  stage tests $tests_limit tests.log "${check[@]}" --only stream "${tests[@]}"
  for preset in $presets; do
    shown=40 stage "stream, $preset" $stream_limit bench.log "$python" -m benchmarks.gpu --presets "$preset" \
      --out "$out/bench" --add "${figures[@]}" "${stream[@]}"
  done
  if [ -z "$quick" ]; then
    stage "engine contract" 50 tests.log "${check[@]}" --only engines -k "torch or inductor"
    stage sanitizer 45 tests.log bash -c "sanitize $python $work/sanitizer.log"
  fi
fi
[ -e "$out/bench.md" ] && { echo; cat "$out/bench.md"; } >> "$out/results.md"
echo "=== done at $SECONDS s"
cat "$out/results.md"
