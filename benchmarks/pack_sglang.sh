#!/usr/bin/env bash
# Pack SGLang 0.5.17 for a GPU machine without network: one archive (about 45 MB) of package-index wheels, thinned out.
#   bash benchmarks/pack_sglang.sh [ARCHIVE]      default: build/sglang-0.5.17-cu130.tar.xz
#   TARGET_PYTHON=3.12                            of that machine; it brings torch 2.11 for CUDA 13 and triton 3.6
# There: mkdir SITE && tar -xJf ARCHIVE -C SITE, then OMNI_FAST_ENGINE_PYTHON=python3 with PYTHONPATH=SITE, and these settings:
#   SGLANG_ENABLE_JIT_DEEPGEMM=0 SGLANG_IS_FLASHINFER_AVAILABLE=false
#   engine.flags = ["--attention-backend", "triton", "--sampling-backend", "pytorch", "--grammar-backend", "none"]
# Left out: FlashAttention-3 (1.1 GB), the kernels for other cards than Hopper, image generation, static libraries, sources
# of FlashInfer. Its server was imported from the archive with such a machine's packages; on a GPU it was not yet started.
set -euo pipefail
archive=$(realpath -m "${1:-build/sglang-0.5.17-cu130.tar.xz}")
python=${PYTHON:-python3}
version=${TARGET_PYTHON:-3.12}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=$work/site
mkdir -p "$site" "$(dirname "$archive")"

# All pinned, those that SGLang pins as it does: what runs there was imported together. Big ones first; numpy, torch, httpx and
# their kin are there already.
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --target "$site" --only-binary :all: \
  --python-version "$version" --implementation cp --abi "cp${version/./}" --abi abi3 --abi none \
  --platform manylinux_2_34_x86_64 --platform manylinux_2_31_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_26_x86_64 \
  --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any \
  sglang==0.5.17 sglang-kernel==0.4.5 flashinfer-python==0.6.15.post1 xgrammar==0.2.1 transformers==5.12.1 \
  tokenizers==0.22.2 apache-tvm-ffi==0.1.11 torch-memory-saver==0.0.10 nvidia-cudnn-frontend==1.18.0 cuda-tile==1.7.0 \
  compressed-tensors==0.18.0 fastapi==0.165.0 opentelemetry-api==1.45.2 starlette==1.10.0 annotated-doc==0.0.7 \
  annotated-types==0.8.0 pydantic==2.14.3 pydantic-core==2.50.4 typing-inspection==0.4.5 uvicorn==0.54.0 orjson==3.13.0 \
  pyzmq==27.3.0 msgspec==0.22.0 setproctitle==1.3.8 python-multipart==0.0.34 partial-json-parser==0.2.1.1.post7 \
  pybase64==1.5.1 ipython==9.18.1 traitlets==5.16.1 decorator==5.3.1 jedi==0.20.1 parso==0.8.7 prompt-toolkit==3.0.53 \
  wcwidth==0.9.4 matplotlib-inline==0.2.2 pexpect==4.9.0 ptyprocess==0.7.0 stack-data==0.6.3 executing==2.3.0 \
  asttokens==3.0.2 pure-eval==0.2.4 ipython-pygments-lexers==1.1.1 dill==0.4.1 openai==2.6.1 distro==1.9.0 jiter==0.19.0 \
  sniffio==1.3.1 jsonschema==4.26.0 jsonschema-specifications==2025.9.1 referencing==0.37.0 rpds-py==2026.9.1 \
  soundfile==0.13.1 cffi==2.1.1 pycparser==3.12 loguru==0.7.3 gguf==0.19.0 tabulate==0.10.0

cd "$site"
# With it RMSNorm would be FlashInfer's, which nvcc compiles at the first forward; SGLang's own is compiled already.
sed -i 's/^    _has_flashinfer = True$/    _has_flashinfer = False/' sgl_kernel/elementwise.py
grep -q '_has_flashinfer = False$' sgl_kernel/elementwise.py || { echo "sgl_kernel/elementwise.py has no such line" >&2; exit 1; }
rm -rf bin sglang/multimodal_gen xgrammar/lib/libxgrammar.a flashinfer/data jedi/third_party
find sgl_kernel -name 'flash_ops*.so' -delete -o -name 'infllm_ops*.so' -delete -o -name 'flashmla_ops*.so' -delete
rm -rf sgl_kernel/sm100
find xgrammar -name '*.so' -exec strip --strip-debug {} +
echo "unpacked: $(du -sm . | cut -f1) MB"
tar -c . | xz -6 > "$archive"
echo "$archive: $(($(stat -c %s "$archive") / 1000000)) MB"
