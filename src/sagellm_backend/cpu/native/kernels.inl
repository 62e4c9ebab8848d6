// The kernels of one instruction set. The including file defines SAGE_ISA and has included its simd header.
#include <cmath>

#include "kernels.hpp"

namespace sage::SAGE_ISA {

#include "math.inl"

#include "gemm.inl"

#include "rows.inl"

#include "kv.inl"

#include "attention.inl"

alignas(64) const uint8_t kLoopData[64] = {1, 63, 2, 63, 3, 63, 4, 63};

#include "limits.inl"

const Kernels& table(const char* name) {
  static const Kernels kernels{name,     gemm,     panel_norm,      prepare, rms_norm, activate,  softcap,     sum_exp,
                               argmax,   greatest, integer_weights, rope,    write_kv, attention, read_stream, dot_int8_loop,
                               dot_bf16_loop};
  return kernels;
}

}  // namespace sage::SAGE_ISA
