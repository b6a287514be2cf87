// Which instruction set's kernels run: the widest that the machine has, or what DMD2_FAST_ISA names.

#include <cstdlib>
#include <stdexcept>
#include <string>

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

// Where the machine lacks what is asked for, the portable kernels run.
const Kernels& widest() {
  const char* value = std::getenv("DMD2_FAST_ISA");
  const std::string asked = value ? value : "";
  if (asked != "" && asked != "portable" && asked != "avx2" && asked != "avx512") {
    throw std::runtime_error("DMD2_FAST_ISA is '" + asked + "': expected portable, avx2, avx512 or nothing");
  }
#if defined(DMD2_FAST_X86)
  const auto allows = [&asked](const char* name) { return asked == "" || asked == name; };
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
