// Which instruction set's kernels run: the widest that the machine has, or what DMD2_FAST_ISA names.

#include <cstdlib>
#include <cstring>

#include "../arguments.h"

namespace dmd2_fast {

namespace portable {
extern const Kernels kTable;
}
#if defined(DMD2_FAST_X86)
namespace avx2 {
extern const Kernels kTable;
}
namespace avx512 {
extern const Kernels kTable;
}
#endif

namespace {

const Kernels& widest() {
#if defined(DMD2_FAST_X86)
  const char* asked = std::getenv("DMD2_FAST_ISA");
  const auto allows = [asked](const char* name) { return !asked || !*asked || std::strcmp(asked, name) == 0; };
  if (allows("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return avx512::kTable;
  }
  if (allows("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2::kTable;
  }
#endif
  return portable::kTable;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = widest();
  return chosen;
}

int instruction_set() {
#if defined(DMD2_FAST_X86)
  return &kernels() == &avx512::kTable ? 512 : &kernels() == &avx2::kTable ? 256 : 0;
#else
  return 0;
#endif
}

}  // namespace dmd2_fast
