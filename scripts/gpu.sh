#!/usr/bin/env bash
# Build with CUDA, run the GPU tests, measure T1 to T7, training steps beside TRL's, and real SGLang: with the machine's own
# Python and torch, and without network.
#   PYTHON=python3   whose torch sees the GPU; it needs pip, scikit-build-core, pybind11, cmake, ninja, pytest, and for the policy's
#                    tests and the training steps transformers and jinja2
#   RESULTS=DIR      where results files and the test log go, as they come (default: benchmarks/results)
#   PARTS="tests kernels train engine"   which of them. Each ends within 9 minutes, the build counted to the first; what fails or
#                    hangs is ended and named, and the others run all the same. The exit status is 1 then.
#   SGLANG_ARCHIVE=FILE   what benchmarks/pack_sglang.sh made (default: build/sglang-0.5.17-cu130.tar.xz); without it no engine;
#                    with it the machine's Python needs httpx too
# Unpacked, it also serves the rollouts of one question of the training part.
# Peers (liger-kernel, trl, verl, cut-cross-entropy) are measured where they are importable; name their folder in PYTHONPATH.
set -euo pipefail
python=${PYTHON:-python3}
results=${RESULTS:-benchmarks/results}
archive=${SGLANG_ARCHIVE:-build/sglang-0.5.17-cu130.tar.xz}
part_s=525
status=0

card=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")' 2>/dev/null) || card=
[ -n "$card" ] || { echo "make gpu needs an NVIDIA GPU that $python's torch can see; here there is none (try make bench)" >&2; exit 2; }
name=$(printf '%s' "$card" | tr 'A-Z' 'a-z' | tr -cs 'a-z0-9' '-' | sed 's/-$//')

# Runs a program for so many seconds at most, and never beyond the part's time. Only SIGKILL ends one whose kernel never ends.
within() {
  local cap=$1 left=$((part_s - SECONDS)) code=0
  shift
  ((left <= cap)) || left=$cap
  ((left >= 5)) || { echo "left out, no time: $*"; return 1; }
  timeout --kill-after=5 "$left" "$@" || code=$?
  case $code in
    0) ;;
    124 | 137) echo "ended after its $left s: $*" ;;
    *) echo "exit status $code: $*" ;;
  esac
  return $code
}

# Whether a part is wanted; its time begins, but for the first, whose time began with the build.
begun=
part() {
  [[ " ${PARTS:-tests kernels train engine} " == *" $1 "* ]] || return 1
  echo "== $1"
  [ -z "$begun" ] || SECONDS=0
  begun=$1
}

echo "== $card: building"
site=$PWD/build/gpu-site
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin  # nvcc, where it is not in the path
mkdir -p "$results"
rm -rf "$site"
within 300 "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation \
  --target "$site" -C cmake.define.OMNI_CUDA=ON -C build-dir=build/gpu . || { status=1; site=$PWD/kernels; }
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
# Where a module does not compile there is a package without it, whose tests are skipped: that is no success.
within 60 "$python" -c '
import torch
from omni_kernels.backends import reason_unavailable
here, reasons = "ready", {name: reason_unavailable(name) for name in ("cpu", "triton", "cuda")}
print(*(f"backend {name}: {reason or here}" for name, reason in reasons.items()), sep="\n")
hopper = torch.cuda.get_device_capability() == (9, 0)
raise SystemExit(any(reason for name, reason in reasons.items() if hopper or name != "cuda"))' || status=1

# In processes of their own, the surest first: after an illegal access nothing more works in the process it happened in.
tests() {
  local cap=$1
  shift
  within "$cap" "$python" -m pytest -vv -m gpu -ra -p no:cacheprovider "$@" 2>&1 | tee -a "$log" | tail -n 40 || status=1
}
if part tests; then
  log=$results/gpu-tests.log
  : > "$log"
  rows=tests/kernels/test_kernels_gpu.py
  tests 240 -k "triton and not against_triton" $rows
  tests 150 -k "not triton and not cuda_exp and not linear_kernel and not exponentials" $rows
  tests 150 -k "cuda_exp or linear_kernel or exponentials" $rows
  tests 150 tests/policy/test_policy_gpu.py tests/rollout/test_rollout_local.py
  if command -v compute-sanitizer > /dev/null; then  # illegal accesses that hit memory; its word is in the log alone
    within 120 compute-sanitizer "$python" -m pytest -vv -m gpu -p no:cacheprovider -k hopeless_rows $rows >> "$log" 2>&1 || true
  fi
fi
if part kernels; then
  bench=("$python" benchmarks/bench_kernels.py --rounds 11 --output "$results/$name.json" --questions)
  for question in T1 T2 T4 T3 T5 T6 T7; do  # in a process each; once more without the CUDA kernels, should they have ended it
    within 120 "${bench[@]}" $question || { status=1; within 60 "${bench[@]}" $question --without cuda cuda_exp || true; }
  done
fi

# Servers see the archive's packages alone, of which the trainer sees none but pydantic, and that where it has none. Kernels are
# compiled at first use, by the toolkit and not by what stands for its nvcc; the memory saver is loaded ahead of torch, and links
# to its CUDA runtime.
unpack() {
  [[ -f $archive && -z ${OMNI_FAST_ENGINE_PYTHON:-} ]] || return 0
  echo "== unpacking $archive"
  rm -rf build/sglang-site build/pydantic-site
  mkdir -p build/sglang-site build/pydantic-site
  local cuda=${CUDA_HOME:-/usr/local/cuda} nvcc libraries
  [ -x "$cuda/bin/nvcc" ] || ! nvcc=$(command -v nvcc) || cuda=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
  libraries=$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1] / "nvidia/cu13/lib")')
  cat > build/sglang-python << END
#!/bin/sh
export PYTHONPATH=$PWD/build/sglang-site CUDA_HOME=$cuda LD_LIBRARY_PATH=$libraries\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}
export SGLANG_ENABLE_JIT_DEEPGEMM=0 SGLANG_IS_FLASHINFER_AVAILABLE=false
exec $(command -v "$python") "\$@"
END
  chmod +x build/sglang-python
  if within 200 tar -xJf "$archive" -C build/sglang-site; then
    export OMNI_FAST_ENGINE_PYTHON=$PWD/build/sglang-python
    if ! "$python" -c 'import pydantic' 2> /dev/null; then
      cp -r build/sglang-site/{pydantic,annotated_types,typing_inspection}* build/pydantic-site
      export PYTHONPATH=$PYTHONPATH:$PWD/build/pydantic-site
    fi
  else
    status=1
  fi
}
# Of a program that keeps to its budget, and writes its results as they come.
budget() { echo "--budget-s $((part_s - SECONDS - 40))"; }
if part train; then
  unpack
  within $part_s "$python" benchmarks/gpu_train.py $(budget) --output "$results/gpu-train-$name.json" || status=1
fi
if part engine; then
  unpack
  if [[ -n ${OMNI_FAST_ENGINE_PYTHON:-} ]]; then
    within $part_s "$python" benchmarks/gpu_engine.py $(budget) --output "$results/engine-$name.json" || status=1
  else
    echo "left out without $archive (benchmarks/pack_sglang.sh makes it where there is a package index)"
  fi
fi
exit "$status"
