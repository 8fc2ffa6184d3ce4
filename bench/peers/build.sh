#!/usr/bin/env bash
# Makes build/peers/venvs/NAME for each engine that kvik is compared with, from PyPI; what is there already stays.
#
#   PYTHON=.venv/bin/python bench/peers/build.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
venvs=build/peers/venvs

# make_venv <name> <packages ...>
make_venv() {
  local folder=$venvs/$1
  shift
  if [[ -e $folder/.made ]]; then return; fi
  printf '\n== %s: %s\n' "${folder##*/}" "$*"
  rm -rf "$folder"
  "$python" -m venv "$folder"
  "$folder/bin/pip" install -q "$@"
  touch "$folder/.made"
}

# llama-cpp-python comes as source. With gcc 12 its code for AMX dies; AVX2 and AVX-512 are what it has besides.
flags="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF"
if grep -qw avx512_vnni /proc/cpuinfo; then flags="$flags -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON"; fi
# pip would give back a wheel that it once built with other flags.
CMAKE_ARGS="$flags" make_venv llama-cpp-python --no-cache-dir llama-cpp-python==0.3.36
make_venv transformers torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0
make_venv openvino-genai openvino-genai==2026.4.1.0
