#!/usr/bin/env bash
# Pack SGLang 0.5.17 for a GPU machine without network: one archive (about 50 MB) of package-index wheels, thinned out.
#   bash benchmarks/pack_sglang.sh [ARCHIVE]      default: build/sglang-0.5.17-cu130.tar.xz
#   TARGET_PYTHON=3.12                            of that machine; it brings torch 2.11 for CUDA 13 and triton 3.6
# There: mkdir SITE && tar -xJf ARCHIVE -C SITE, then OMNI_FAST_ENGINE_PYTHON=python3 with PYTHONPATH=SITE, and these settings:
#   SGLANG_ENABLE_JIT_DEEPGEMM=0 SGLANG_IS_FLASHINFER_AVAILABLE=false
#   engine.flags = ["--attention-backend", "triton", "--sampling-backend", "pytorch", "--grammar-backend", "none"]
# Left out: FlashAttention-3 (1.1 GB), the kernels for other cards than Hopper, image generation, static libraries. Made from
# the wheels' contents; the archive was not yet started on a GPU.
set -euo pipefail
archive=$(realpath -m "${1:-build/sglang-0.5.17-cu130.tar.xz}")
python=${PYTHON:-python3}
version=${TARGET_PYTHON:-3.12}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=$work/site
mkdir -p "$site" "$(dirname "$archive")"

# Big ones first, in the versions that SGLang names; then the small ones, of which numpy, torch and their kin are there already.
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --target "$site" --only-binary :all: \
  --python-version "$version" --implementation cp --abi "cp${version/./}" --abi abi3 --abi none \
  --platform manylinux_2_34_x86_64 --platform manylinux_2_31_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_26_x86_64 \
  --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any \
  sglang==0.5.17 sglang-kernel==0.4.5 flashinfer-python==0.6.15.post1 xgrammar==0.2.1 transformers==5.12.1 \
  tokenizers==0.22.2 apache-tvm-ffi==0.1.11 torch-memory-saver==0.0.10 nvidia-cudnn-frontend==1.18.0 cuda-tile tabulate \
  compressed-tensors==0.18.0 fastapi starlette annotated-doc annotated-types pydantic==2.14.3 pydantic-core==2.50.4 uvicorn \
  orjson pyzmq msgspec setproctitle python-multipart partial-json-parser pybase64 ipython traitlets decorator jedi parso \
  prompt-toolkit wcwidth matplotlib-inline pexpect ptyprocess stack-data executing asttokens pure-eval \
  ipython-pygments-lexers dill openai distro jiter sniffio jsonschema jsonschema-specifications referencing rpds-py \
  soundfile cffi pycparser loguru gguf typing-inspection

cd "$site"
rm -rf bin sglang/multimodal_gen xgrammar/lib/libxgrammar.a
find sgl_kernel -name 'flash_ops*.so' -delete -o -name 'infllm_ops*.so' -delete -o -name 'flashmla_ops*.so' -delete
rm -rf sgl_kernel/sm100
find xgrammar -name '*.so' -exec strip --strip-debug {} +
echo "unpacked: $(du -sm . | cut -f1) MB"
tar -c . | xz -6 -T2 > "$archive"
echo "$archive: $(($(stat -c %s "$archive") / 1000000)) MB"
