#!/usr/bin/env bash
# The native core's tests with its module compiled with sanitizers: first address and undefined, then thread.
#
#   PYTHON=.venv/bin/python tests/sanitize.sh [--whole] [address|thread ...]
#
# Whether a kernel reads outside its arrays depends on shapes, not on which formats and settings are multiplied: the
# tests marked `sanitize` run with one weight format a kernel. --whole (make nightly) runs every test of the ops.
#
# Python itself is not instrumented: what is checked is every load and store of kvik's own code, also into NumPy's arrays,
# which lie between red zones because they come from the sanitizer's allocator.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python3}")
[[ $python == /* ]] || python=$PWD/$python
chosen=(-m "sanitize and not full") one_format=1 thread_tests=()
if [[ ${1:-} == --whole ]]; then
  shift
  chosen=() one_format=0 thread_tests=(tests/ops/test_bits.py tests/ops/test_machine_limits.py)
fi
kinds=("$@")
[[ $# -gt 0 ]] || kinds=(address thread)
! command -v ccache >/dev/null || export CMAKE_CXX_COMPILER_LAUNCHER=ccache
root=$PWD/build/sanitize
say() { printf '\n== %s\n' "$1"; }

# build <name> <sanitizers>: a package kvik in $root/<name> that is this one with another native module.
build() {
  local folder=$root/$1
  say "Compile with -fsanitize=$2"
  # cmake and ninja where the system has them, else from pip; installed by one of several that run at once.
  exec 9>"$root/lock"
  flock 9
  if ! command -v cmake >/dev/null || ! command -v ninja >/dev/null; then
    [[ -x $root/venv/bin/ninja ]] || { "$python" -m venv "$root/venv" && "$root/venv/bin/pip" install -q cmake ninja; }
    export PATH=$root/venv/bin:$PATH
  fi
  "$python" -c 'import nanobind' 2>/dev/null || "$python" -m pip install -q 'nanobind>=2.8'
  exec 9>&-
  local avx512=ON
  ! grep -q '^flags' /proc/cpuinfo || grep -q 'avx512_vnni' /proc/cpuinfo || avx512=OFF
  cmake -S . -B "$folder/cmake" -G Ninja -DPython_EXECUTABLE="$python" -DKVIK_SANITIZE="$2" -DKVIK_AVX512=$avx512 >"$folder.log" 2>&1 ||
    { cat "$folder.log"; exit 1; }
  ninja -C "$folder/cmake" >"$folder.log" 2>&1 || { cat "$folder.log"; exit 1; }
  mkdir -p "$folder/path/kvik"
  find "$folder/path/kvik" -mindepth 1 -delete
  find "$PWD/src/kvik" -mindepth 1 -maxdepth 1 ! -name '*.so' ! -name __pycache__ -exec ln -s {} "$folder/path/kvik/" \;
  cp "$folder"/cmake/_native*.so "$folder/path/kvik/"
  # An editable install of kvik would come before PYTHONPATH.
  cat >"$folder/path/sitecustomize.py" <<'EOF'
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__name__.startswith("ScikitBuild")]
EOF
}

# run <name> <runtime library> <pytest arguments ...>
run() {
  local folder=$root/$1 runtime=$2
  shift 2
  # libstdc++ too: its functions are looked up when the sanitizer starts, and Python itself does not load it.
  local libraries
  libraries="$(gcc -print-file-name="lib$runtime.so"):$(gcc -print-file-name=libstdc++.so.6)"
  # NumPy's BLAS has threads of its own, and the thread sanitizer does not see what orders them: it gets one.
  env KVIK_ONE_FORMAT=$one_format OPENBLAS_NUM_THREADS=1 LD_PRELOAD="$libraries" PYTHONPATH="$folder/path" PYTHONDONTWRITEBYTECODE=1 PYTHONFAULTHANDLER= \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:handle_abort=1 UBSAN_OPTIONS=print_stacktrace=1 \
    TSAN_OPTIONS=halt_on_error=1:die_after_fork=0:second_deadlock_stack=1 \
    "${without_aslr[@]}" "$python" -c "
import sys, kvik._native
assert kvik._native.__file__.startswith('$folder'), kvik._native.__file__
assert 'lib$runtime' in open('/proc/self/maps').read()
import pytest
sys.exit(pytest.main(sys.argv[1:]))" -q --capture=sys -p no:cacheprovider -o faulthandler_timeout=120 \
    -k 'not reference and not instruction_set' "${chosen[@]}" "$@"
}

mkdir -p "$root"
# The thread sanitizer of older compilers knows fewer places where the system may put a program.
without_aslr=()
for kind in "${kinds[@]}"; do
  case $kind in
  address)
    build address address,undefined,float-cast-overflow
    say "ASan and UBSan: the ops, and engines over them"
    run address asan tests/ops tests/engine/test_several_sequences.py >"$root/ops.log" 2>&1 &
    ops=$!
    say "The same kernels in plain C++, meanwhile"
    KVIK_ISA=generic run address asan tests/ops/test_bits.py tests/ops/test_program.py tests/ops/test_packing.py \
      tests/ops/test_shared_prefix.py tests/ops/test_blocks.py tests/ops/test_garbage.py tests/ops/test_bad_arguments.py tests/ops/test_sampler.py
    say "Products by emulated tiles of AMX"
    KVIK_ISA=amx-emulated run address asan tests/ops/test_bits.py -k test_project
    wait $ops || { cat "$root/ops.log"; exit 1; }
    cat "$root/ops.log"
    ;;
  thread)
    build thread thread
    ! setarch "$(uname -m)" -R true 2>/dev/null || without_aslr=(setarch "$(uname -m)" -R)
    say "TSan: the pool, every op shared out among threads, several engines, a fork"
    run thread tsan tests/ops/test_threads.py tests/ops/test_program.py tests/ops/test_shared_prefix.py \
      tests/ops/test_sampler.py tests/engine/test_several_sequences.py "${thread_tests[@]}"
    ;;
  *)
    echo "unknown: $kind; there are address and thread" >&2
    exit 2
    ;;
  esac
done
say "No sanitizer had anything to say"
