#!/usr/bin/env bash
# The C++ operators under the address and undefined-behaviour sanitizers: builds the extension into build/sanitize and
# runs its tests on that build, once for each instruction set. `make sanitize`; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="$PWD/.venv/bin/python"
folder="$PWD/build/sanitize"

torch=$("$python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
cmake -S . -B "$folder" -DDMD2_FAST_SANITIZE=ON -DDMD2_FAST_TORCH="$torch" -DDMD2_FAST_OUTPUT="$folder" \
      -DCMAKE_CXX_FLAGS_RELEASE=-O1 >/dev/null
cmake --build "$folder" --parallel 2

# The runtimes must be there before anything else allocates; Python and torch leave memory at exit.
runtimes=$(ldd "$folder/_C.abi3.so" | awk '/lib(clang_rt\.)?(asan|ubsan)/ { print $3 }' | paste -sd: -)
[ -n "$runtimes" ] || { echo "sanitize: the extension is not linked to libasan" >&2; exit 1; }
export DMD2_FAST_EXTENSION="$folder/_C.abi3.so"
export ASAN_OPTIONS="detect_leaks=0:${ASAN_OPTIONS:-}" UBSAN_OPTIONS="print_stacktrace=1:${UBSAN_OPTIONS:-}"

tests=(noise dmd denoising gan r1 norm random extension)
tests=("${tests[@]/#/tests/test_}")
for isa in avx512 avx2 portable; do  # a machine without one of them takes the portable code
  echo "sanitize: $isa"
  if ! LD_PRELOAD="$runtimes" DMD2_FAST_ISA=$isa "$python" -m pytest -q -p no:cacheprovider --capture=sys \
       -k "(cpp or extension) and not triton" "${tests[@]/%/.py}" "$@" >"$folder/tests.log" 2>&1; then
    grep -m 1 -A 20 -E "ERROR: AddressSanitizer|runtime error:" "$folder/tests.log" >&2 || tail -n 40 "$folder/tests.log" >&2
    echo "sanitize: failed, all of it is in $folder/tests.log" >&2
    exit 1
  fi
  tail -1 "$folder/tests.log"
done
