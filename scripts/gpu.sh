#!/usr/bin/env bash
# Build with CUDA, run the GPU tests, measure T1 to T7, training steps beside TRL's, and real SGLang: with the machine's own
# Python and torch, and without network.
#   PYTHON=python3   whose torch sees the GPU; it needs pip, scikit-build-core, pybind11, cmake, ninja and pytest
#   RESULTS=DIR      where the results file and the test log go (default: benchmarks/results)
#   PARTS="tests kernels train engine"   which of them; each ends within 9 minutes
#   SGLANG_ARCHIVE=FILE   what benchmarks/pack_sglang.sh made (default: build/sglang-0.5.17-cu130.tar.xz); without it no engine;
#                    with it the machine's Python needs pydantic too
# Unpacked, it also serves the rollouts of one question of the training part.
# Peers (liger-kernel, trl, verl, cut-cross-entropy) are measured where they are importable; name their folder in PYTHONPATH.
set -euo pipefail
python=${PYTHON:-python3}
results=${RESULTS:-benchmarks/results}
site=build/gpu-site
parts=" ${PARTS:-tests kernels train engine} "
archive=${SGLANG_ARCHIVE:-build/sglang-0.5.17-cu130.tar.xz}

card=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")' 2>/dev/null) || card=
[ -n "$card" ] || { echo "make gpu needs an NVIDIA GPU that $python's torch can see; here there is none (try make bench)" >&2; exit 2; }
mkdir -p "$results"
echo "== $card: building"
rm -rf "$site"
"$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation \
  --target "$site" -C cmake.define.OMNI_CUDA=ON -C build-dir=build/gpu .
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"

status=0  # of what fails; the other parts run all the same
name=$(printf '%s' "$card" | tr 'A-Z' 'a-z' | tr -cs 'a-z0-9' '-' | sed 's/-$//')
if [[ $parts == *" tests "* ]]; then
  echo "== tests"
  "$python" -m pytest -q -m gpu -p no:cacheprovider tests/kernels tests/policy/test_policy_gpu.py 2>&1 \
    | tee "$results/gpu-tests.log" || status=$?
fi
if [[ $parts == *" kernels "* ]]; then
  echo "== kernels"
  "$python" benchmarks/bench_kernels.py --questions T1 T2 T3 T4 T5 T6 T7 --rounds 11 --output "$results/$name.json" || status=$?
fi
if [[ -f $archive && ($parts == *" train "* || $parts == *" engine "*) ]]; then
  # Servers see the archive's packages alone, of which the trainer sees none; kernels are compiled at first use.
  echo "== unpacking $archive"
  rm -rf build/sglang-site
  mkdir -p build/sglang-site
  cuda=${CUDA_HOME:-$(dirname "$(dirname "$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)")")}
  printf '#!/bin/sh\nPYTHONPATH=%s CUDA_HOME=%s SGLANG_ENABLE_JIT_DEEPGEMM=0 SGLANG_IS_FLASHINFER_AVAILABLE=false exec %s "$@"\n' \
    "$PWD/build/sglang-site" "$cuda" "$(command -v "$python")" > build/sglang-python
  chmod +x build/sglang-python
  if tar -xJf "$archive" -C build/sglang-site; then
    export OMNI_FAST_ENGINE_PYTHON=$PWD/build/sglang-python
  else
    status=1
  fi
fi
if [[ $parts == *" train "* ]]; then
  echo "== train"
  "$python" benchmarks/gpu_train.py --output "$results/gpu-train-$name.json" || status=$?
fi
if [[ $parts == *" engine "* && -n ${OMNI_FAST_ENGINE_PYTHON:-} ]]; then
  echo "== engine"
  "$python" benchmarks/gpu_engine.py --output "$results/engine-$name.json" || status=$?
elif [[ $parts == *" engine "* ]]; then
  echo "== engine: left out without $archive (benchmarks/pack_sglang.sh makes it where there is a package index)"
fi
exit "$status"
