#!/usr/bin/env bash
# Build, test and measure on a GPU with the interpreter at hand: no virtual environment, no network.
#
#   make gpu                            all steps; PYTHON=python3.12 make gpu takes another interpreter
#   make gpu STEPS="build test"         some of them, in the order given
#
# A step that fails does not stop the next. Each leaves its log in bench/results/logs/ and the records go to
# bench/results/<device>/. LIMIT is the most seconds a step may take. Exit status: 0; 1 if a step failed; 2 for an
# unknown step; 3 without a GPU (make reports "Error 3", and its own status is 2).
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
limit=${LIMIT:-1800}
logs=${LOGS:-bench/results/logs}
all="build status test memcheck racecheck quick attention spectral_norm sqrtm fid train_step report"
read -r -a steps <<<"${STEPS:-$all}"

command_of() {
  case $1 in
    build) echo "$python -m pip install --no-index --no-deps --no-build-isolation --editable ." ;;
    status) echo "nvidia-smi && $python -m fastgan status && $python -m fastgan.kernels.report" ;;
    test) echo "$python -m pytest -q -m gpu -p no:cacheprovider --durations=20" ;;
    memcheck) echo "PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 $python -m bench.sanitize" ;;
    racecheck) echo "compute-sanitizer --tool racecheck --error-exitcode 1 $python -m bench.sanitize spectral_norm" ;;
    quick) echo "$python -m bench --device cuda --quick" ;;
    attention | spectral_norm | sqrtm | fid | train_step) echo "$python -m bench --device cuda --suite $1" ;;
    report) echo "$python -m bench report" ;;
    *) return 1 ;;
  esac
}

for step in "${steps[@]}"; do
  if ! command_of "$step" >/dev/null; then
    echo "make gpu: no step '$step'; there are: $all" >&2
    exit 2
  fi
done

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "make gpu: no CUDA device is visible to $python. With one, it would run:"
  for step in "${steps[@]}"; do printf '  %-14s %s\n' "$step" "$(command_of "$step")"; done
  exit 3
fi

mkdir -p "$logs"
failed=0
summary=""
for step in "${steps[@]}"; do
  log=$logs/$step.log
  start=$SECONDS
  timeout --kill-after=20 "$limit" bash -c "$(command_of "$step")" 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  case $status in
    0) outcome=passed ;;
    124 | 137) outcome="stopped after $limit s" ;;
    *) outcome="FAILED, status $status" ;;
  esac
  [ "$status" -eq 0 ] || failed=1
  summary+=$(printf '%-14s %-24s %5s s  %s' "$step" "$outcome" "$((SECONDS - start))" "$log")$'\n'
done
echo
printf '%s' "$summary" | tee "$logs/summary.txt"
exit "$failed"
