#!/usr/bin/env bash
# Builds the benchmarks of ik_llama.cpp, a fork of llama.cpp with kernels of its own for processors, from the sources
# inside the ik-llama-cpp-python package.
#
#   bench/peers/build_ik_llama_cpp.sh [folder]      default: build/peers
#
# Afterwards the tools are in <folder>/bin, their names begin with ik-, and <folder>/ik_version.txt says what they are.
# Does nothing where it has succeeded before. cmake and ninja come from pip where the machine has none.
set -euo pipefail

VERSION=0.1.5
SHA256=33c67eb99e4dcab5e611050433243815709b8b3067753f9ce18375013cf002ad
TARGETS=(llama-bench llama-batched-bench)

cd "$(dirname "$0")/../.."
folder=${1:-build/peers}
mkdir -p "$folder/bin"
folder=$(cd "$folder" && pwd)
say() { printf '\n== %s\n' "$1"; }

stamp="ik-llama-cpp-python $VERSION"
has_all() { for target in "${TARGETS[@]}"; do [[ -x $folder/bin/ik-$target ]] || return 1; done; }
if [[ -f $folder/ik_version.txt && $(head -n 1 "$folder/ik_version.txt") == "$stamp" ]] && has_all; then
  echo "ik_llama.cpp is built already: $folder/bin ($stamp)"
  exit 0
fi

command -v cmake >/dev/null && command -v ninja >/dev/null || {
  say "A virtual environment with cmake and ninja in $folder/venv"
  [[ -x $folder/venv/bin/ninja ]] || {
    "${PYTHON:-python3}" -m venv "$folder/venv"
    "$folder/venv/bin/pip" install -q cmake ninja
  }
  export PATH="$folder/venv/bin:$PATH"
}

say "The sources: $stamp"
archive=$folder/ik_llama_cpp_python-$VERSION.tar.gz
[[ -f $archive ]] || "${PYTHON:-python3}" -m pip download -q --no-deps --no-binary :all: -d "$folder" "ik-llama-cpp-python==$VERSION"
echo "$SHA256  $archive" | sha256sum --check --quiet
source=$folder/ik_llama_cpp_python-$VERSION/vendor/ik_llama.cpp
[[ -f $source/CMakeLists.txt ]] || tar -xzf "$archive" -C "$folder"

# The package lacks the script with which the build writes down what it is of.
mkdir -p "$source/common/cmake"
cat >"$source/common/cmake/build-info-gen-cpp.cmake" <<'EOF'
set(BUILD_NUMBER 0)
set(BUILD_COMMIT "unknown")
set(BUILD_COMPILER "unknown")
set(BUILD_TARGET "unknown")
configure_file(common/build-info.cpp.in common/build-info.cpp @ONLY)
EOF

# Without FA_ALL_QUANTS its attention knows f16, q8_0, q6_0 and q8_KV, all that is compared, and compiles sooner.
say "Build ${TARGETS[*]} (half an hour or more on two processors)"
cmake -S "$source" -B "$folder/ik_llama.cpp" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
  -DGGML_IQK_FA_ALL_QUANTS=OFF -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF \
  -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_EXAMPLES=ON >"$folder/ik_configure.log" 2>&1 ||
  { tail -n 30 "$folder/ik_configure.log"; exit 1; }
ninja -C "$folder/ik_llama.cpp" "${TARGETS[@]}" >"$folder/ik_build.log" 2>&1 || { tail -n 30 "$folder/ik_build.log"; exit 1; }
for target in "${TARGETS[@]}"; do cp "$folder/ik_llama.cpp/bin/$target" "$folder/bin/ik-$target"; done

# Written last: it says that all of the above went well.
printf '%s\n%s\n' "$stamp" "$(cc --version | head -n 1), -march=native" >"$folder/ik_version.txt"
echo "built: $folder/bin"
