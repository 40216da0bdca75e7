#!/usr/bin/env bash
# Build with CUDA, run the GPU tests, measure T1 to T7: with the machine's own Python and torch, and without network.
#   PYTHON=python3   whose torch sees the GPU; it needs pip, scikit-build-core, pybind11, cmake, ninja and pytest
#   RESULTS=DIR      where the results file and the test log go (default: benchmarks/results)
# Peers (liger-kernel, trl, verl, cut-cross-entropy) are measured where they are importable; name their folder in PYTHONPATH.
set -euo pipefail
python=${PYTHON:-python3}
results=${RESULTS:-benchmarks/results}
site=build/gpu-site

card=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")' 2>/dev/null) || card=
[ -n "$card" ] || { echo "make gpu needs an NVIDIA GPU that $python's torch can see; here there is none (try make bench)" >&2; exit 2; }
mkdir -p "$results"
echo "== $card: building"
rm -rf "$site"
"$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation \
  --target "$site" -C cmake.define.OMNI_CUDA=ON -C build-dir=build/gpu .
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"

echo "== tests"
status=0
"$python" -m pytest -q -m gpu -p no:cacheprovider tests/kernels 2>&1 | tee "$results/gpu-tests.log" || status=$?

echo "== benchmarks"
name=$(printf '%s' "$card" | tr 'A-Z' 'a-z' | tr -cs 'a-z0-9' '-' | sed 's/-$//')
"$python" benchmarks/bench_kernels.py --questions T1 T2 T3 T4 T5 T6 T7 --rounds 11 --output "$results/$name.json"
exit "$status"
