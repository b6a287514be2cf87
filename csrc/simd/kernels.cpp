// The kernels of one instruction set. CMakeLists.txt compiles this file once for each.

#include "losses.h"
#include "noise.h"

namespace dmd2_fast {
namespace DMD2_FAST_ISA {
namespace {

// Calls f with a value of the C++ type of a dtype.
template <typename F>
auto for_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kBFloat16: return f(BFloat16{});
    case Dtype::kFloat16: return f(Float16{});
    default: return f(float{});
  }
}

}  // namespace

extern const Kernels kTable;
const Kernels kTable = {
    .normal = [](Dtype dtype, const Noise& noise, void* out, int64_t size, Range range) {
      for_dtype(dtype, [&](auto type) { normal(noise, static_cast<decltype(type)*>(out), size, range); });
    },
    .uniform = uniform,
    .affine = [](Dtype dtype, const Affine& arguments, Range range) {
      for_dtype(dtype, [&](auto type) { affine<decltype(type)>(arguments, range); });
    },
    .scale = [](Dtype dtype, const float* x, float factor, void* out, int64_t count) {
      for_dtype(dtype, [&](auto type) { scale(x, factor, static_cast<decltype(type)*>(out), count); });
    },
    .dmd_loss = [](Dtype dtype, const DmdLoss& arguments, int64_t tile) {
      for_dtype(dtype, [&](auto type) { dmd_loss<decltype(type)>(arguments, tile); });
    },
    .denoising_loss = [](Dtype dtype, const DenoisingLoss& arguments, int64_t tile) {
      for_dtype(dtype, [&](auto type) { denoising_loss<decltype(type)>(arguments, tile); });
    },
};

}  // namespace DMD2_FAST_ISA
}  // namespace dmd2_fast
