#!/usr/bin/env bash
# Build, test and measure on a GPU with the interpreter at hand ($PYTHON) and no network. Logs and results: bench/results/.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
logs=bench/results/logs
steps=(
  "build|$python -m pip install --no-index --no-deps --no-build-isolation --editable ."
  "test|$python -m pytest -q -m gpu"
  "kernels|$python -m pytest -q tests/ops tests/kernels tests/nn"
  "bench|$python -m bench --device cuda"
)

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "make gpu: no CUDA device is visible to $python. With one, it would run:"
  for step in "${steps[@]}"; do echo "  ${step#*|}"; done
  exit 3
fi

mkdir -p "$logs"
failed=0
summary=""
for step in "${steps[@]}"; do
  name=${step%%|*}
  start=$SECONDS
  ${step#*|} 2>&1 | tee "$logs/$name.log"
  status=${PIPESTATUS[0]}
  [ "$status" -eq 0 ] || failed=1
  summary+=$(printf '%-10s status %-3s %4s s  %s' "$name" "$status" "$((SECONDS - start))" "$logs/$name.log")$'\n'
done
printf '\n%s' "$summary"
exit "$failed"
