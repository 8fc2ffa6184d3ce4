#!/usr/bin/env bash
# Builds llama.cpp's benchmarks and its server for this processor, from the sources inside the llama-cpp-python package.
#
#   bench/peers/build_llama_cpp.sh [folder]      default: build/peers
#
# Afterwards the tools are in <folder>/bin, and <folder>/version.txt says what they are. Does nothing where it has
# succeeded before. cmake and ninja come from pip, into a virtual environment in the folder.
set -euo pipefail

VERSION=0.3.36
SHA256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
TARGETS=(llama-bench llama-batched-bench llama-quantize llama-completion llama-server)

cd "$(dirname "$0")/../.."
folder=${1:-build/peers}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
say() { printf '\n== %s\n' "$1"; }

stamp="llama-cpp-python $VERSION"
has_all() { for target in "${TARGETS[@]}"; do [[ -x $folder/bin/$target ]] || return 1; done; }
if [[ -f $folder/version.txt && $(head -n 1 "$folder/version.txt") == "$stamp" ]] && has_all; then
  echo "llama.cpp is built already: $folder/bin ($stamp)"
  exit 0
fi

say "A virtual environment with cmake and ninja in $folder/venv"
[[ -x $folder/venv/bin/ninja ]] || {
  "${PYTHON:-python3}" -m venv "$folder/venv"
  "$folder/venv/bin/pip" install -q cmake ninja
}
export PATH="$folder/venv/bin:$PATH"

say "The sources: $stamp"
archive=$folder/llama_cpp_python-$VERSION.tar.gz
[[ -f $archive ]] || pip download -q --no-deps --no-binary llama-cpp-python -d "$folder" "llama-cpp-python==$VERSION"
echo "$SHA256  $archive" | sha256sum --check --quiet
source=$folder/llama_cpp_python-$VERSION/vendor/llama.cpp
[[ -f $source/CMakeLists.txt ]] || tar -xzf "$archive" -C "$folder"
# gcc 12 takes ldtilecfg to read 8 bytes and drops the stores to the rest of its 64: llama.cpp's AMX then dies of a
# general protection fault. One line makes the compiler keep them.
loads="$source/ggml/src/ggml-cpu/amx/mmq.cpp"
grep -q 'asm volatile.*&tc' "$loads" ||
  sed -i 's|^    _tile_loadconfig(&tc);|    asm volatile("" : : "r"(\&tc) : "memory");\n&|' "$loads"
grep -q 'asm volatile.*&tc' "$loads"

# Some virtual machines report AMX and do not allow it. Ask with a program of the same first steps.
say "AMX: does it work here, if the processor reports it?"
cat >"$folder/amx.c" <<'EOF'
#include <immintrin.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
__attribute__((target("amx-tile,amx-int8"))) int main(void) {
  struct { unsigned char palette, start, reserved[14]; unsigned short columns[16]; unsigned char rows[16]; } config;
  unsigned char data[1024];
  if (syscall(SYS_arch_prctl, 0x1023, 18)) return 1; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
  memset(&config, 0, sizeof config);
  memset(data, 0, sizeof data);
  config.palette = 1;
  for (int i = 0; i < 3; ++i) config.rows[i] = 16, config.columns[i] = 64;
  __asm__ volatile("" : : "r"(&config) : "memory"); /* as above */
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_loadd(1, data, 64);
  _tile_loadd(2, data, 64);
  _tile_dpbssd(0, 1, 2);
  _tile_stored(0, data, 64);
  _tile_release();
  return 0;
}
EOF
flags=""
if ! cc -O1 -o "$folder/amx" "$folder/amx.c" 2>"$folder/amx.log"; then
  amx="the compiler does not know AMX"
elif ! grep -qw amx_tile /proc/cpuinfo; then
  amx="the processor has no AMX"
elif ("$folder/amx") 2>/dev/null; then
  amx="with AMX"
else
  amx="without AMX, which the processor reports but this machine does not allow"
  flags="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
fi
echo "$amx"

say "Build ${TARGETS[*]} (some minutes)"
cmake -S "$source" -B "$folder/llama.cpp" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
  -DCMAKE_C_FLAGS="$flags" -DCMAKE_CXX_FLAGS="$flags" -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF \
  -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=ON -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_EXAMPLES=OFF >"$folder/configure.log" 2>&1 ||
  { tail -n 30 "$folder/configure.log"; exit 1; }
ninja -C "$folder/llama.cpp" "${TARGETS[@]}" >"$folder/build.log" 2>&1 || { tail -n 30 "$folder/build.log"; exit 1; }
mkdir -p "$folder/bin"
for target in "${TARGETS[@]}"; do cp "$folder/llama.cpp/bin/$target" "$folder/bin/"; done

# Written last: it says that all of the above went well.
printf '%s\n%s\n%s\n' "$stamp" "$(cc --version | head -n 1), -march=native" "$amx" >"$folder/version.txt"
echo "built: $folder/bin"
