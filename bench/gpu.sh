#!/usr/bin/env bash
# Build, test and measure on a GPU with the interpreter at hand: nothing is installed, nothing is fetched.
#
#   make gpu                            all steps; PYTHON=python3.12 make gpu takes another interpreter
#   make gpu PART=1                     a third of the steps in 9 minutes: 1 tests, 2 layers, 3 the rest; each builds
#   make gpu STEPS="build test"         some of them, in the order given
#   make gpu MINUTES=90                 the time that they share, 25 by default
#
# What a step leaves of its share goes to those after it; a suite begins no workload when three quarters are over. A
# step that fails does not stop the next. Each leaves its log in bench/results/logs/ and the records go to
# bench/results/<device>/. Exit status: 0; 1 if a step failed or was stopped; 2 for an unknown step; 3 without a GPU
# (make reports "Error 3", and its own status is 2).
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
logs=${LOGS:-bench/results/logs}
all="build status test memcheck racecheck quick sqrtm spectral_norm attention train_step fid report"
case ${PART:-} in
  "") chosen=$all minutes=25 ;;
  1) chosen="build status test memcheck racecheck quick report" minutes=9 ;;
  2) chosen="build attention spectral_norm report" minutes=9 ;;
  3) chosen="build train_step sqrtm fid report" minutes=9 ;;
  *)
    echo "make gpu: PART must be 1, 2 or 3, got '$PART'" >&2
    exit 2
    ;;
esac
read -r -a steps <<<"${STEPS:-$chosen}"
total=$((60 * ${MINUTES:-$minutes}))

# command_of STEP SECONDS
command_of() {
  local build="$python setup.py -q build_ext --inplace"
  case $1 in
    build) echo "[ -e fastgan/kernels ] || ln -s ../kernels fastgan/kernels; FASTGAN_CUDA=1 $build || { FASTGAN_CUDA=0 $build; false; }" ;;
    status) echo "nvidia-smi; $python -c 'import fastgan; print(fastgan.backend_status())'" ;;
    test) echo "$python -m pytest -q -m gpu -p no:cacheprovider --durations=20 $workers" ;;
    memcheck) echo "PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 $python -m bench.sanitize" ;;
    racecheck) echo "compute-sanitizer --tool racecheck --error-exitcode 1 $python -m bench.sanitize spectral_norm" ;;
    quick) echo "$python -m bench --device cuda --quick --limit $(($2 * 3 / 4))" ;;
    attention | spectral_norm | sqrtm | fid | train_step)
      echo "$python -m bench --device cuda --suite $1 --limit $(($2 * 3 / 4))" ;;
    report) echo "$python -m bench report" ;;
    *) return 1 ;;
  esac
}

# share_of STEP: of the time, in hundredths where all steps run
share_of() {
  case $1 in
    test) echo 25 ;;
    build | attention | train_step) echo 11 ;;
    memcheck | quick | sqrtm) echo 8 ;;
    spectral_norm | fid) echo 6 ;;
    racecheck) echo 3 ;;
    *) echo 2 ;;
  esac
}

# missing_for STEP: the program without which it is left out
missing_for() {
  case $1 in
    memcheck | racecheck) command -v compute-sanitizer >/dev/null || echo compute-sanitizer ;;
  esac
}

# seconds_for INDEX SECONDS: what this step may take where so much is left
seconds_for() {
  local shares=0 step
  for step in "${steps[@]:$1}"; do shares=$((shares + $(share_of "$step"))); done
  local seconds=$(($2 * $(share_of "${steps[$1]}") / shares))
  echo $((seconds > 1 ? seconds : 1))
}

workers=""
"$python" -c "import xdist" 2>/dev/null && workers="-n 4"

for step in "${steps[@]}"; do
  if ! command_of "$step" 0 >/dev/null; then
    echo "make gpu: no step '$step'; there are: $all" >&2
    exit 2
  fi
done

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "make gpu: no CUDA device is visible to $python. With one, it would run:"
  for i in "${!steps[@]}"; do
    limit=$(seconds_for "$i" "$total")
    total=$((total - limit))
    printf '  %-14s %4s s  %s\n' "${steps[i]}" "$limit" "$(command_of "${steps[i]}" "$limit")"
  done
  exit 3
fi

export PATH=$PATH:/usr/local/cuda/bin PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# Only this GPU's code: another architecture takes nvcc as long again.
TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}
export TORCH_CUDA_ARCH_LIST
mkdir -p "$logs"
failed=0
summary=""
for i in "${!steps[@]}"; do
  step=${steps[i]}
  log=$logs/$step.log
  limit=$(seconds_for "$i" $((total - SECONDS)))
  start=$SECONDS
  missing=$(missing_for "$step")
  if [ -n "$missing" ]; then
    outcome="left out: no $missing"
    echo "$step: $outcome" | tee "$log"
  else
    command=$(command_of "$step" "$limit")
    echo "== $step, at most $limit s: $command"
    timeout --kill-after=20 "$limit" bash -c "$command" 2>&1 | tee "$log"
    status=${PIPESTATUS[0]}
    case $status in
      0) outcome=passed ;;
      124 | 137) outcome="STOPPED after $limit s" ;;
      *) outcome="FAILED, status $status" ;;
    esac
    [ "$status" -eq 0 ] || failed=1
  fi
  summary+=$(printf '%-14s %-28s %5s s  %s' "$step" "$outcome" "$((SECONDS - start))" "$log")$'\n'
done
echo
printf '%s' "$summary" | tee "$logs/summary.txt"
exit "$failed"
