// The kernels of one instruction set. CMakeLists.txt compiles this file once for each.

#include "gan.h"
#include "losses.h"
#include "noise.h"
#include "norm.h"

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
    .widen = [](Dtype dtype, const void* x, float* out, int64_t count) {
      for_dtype(dtype, [&](auto type) { widen(static_cast<const decltype(type)*>(x), out, count); });
    },
    .softplus = softplus_sum,
    .softplus_slope = softplus_slope,
    .group_norm_silu = [](Dtype dtype, const GroupNorm& arguments, Groups groups, float* scratch) {
      for_dtype(dtype, [&](auto type) { group_norm_silu<decltype(type)>(arguments, groups, scratch); });
    },
    .group_norm_silu_backward = [](Dtype dtype, const GroupNorm& arguments, Groups groups, float* scratch) {
      for_dtype(dtype, [&](auto type) { group_norm_silu_backward<decltype(type)>(arguments, groups, scratch); });
    },
    .gan_head = [](Dtype dtype, const GanHead& arguments, int64_t sample) {
      for_dtype(dtype, [&](auto type) { gan_head<decltype(type)>(arguments, sample); });
    },
    .gan_head_backward = [](Dtype dtype, const GanHead& arguments, int64_t group, float* scratch, double* totals) {
      for_dtype(dtype, [&](auto type) { GanHeadBackward<decltype(type)>(arguments, group, scratch).run(totals); });
    },
};

}  // namespace DMD2_FAST_ISA
}  // namespace dmd2_fast
