// The kernels of one instruction set. The including file defines SAGE_ISA and has included its simd header.
#include <cmath>

#include "kernels.hpp"

namespace sage::SAGE_ISA {

#include "math.inl"

#include "gemm.inl"

#include "rows.inl"

#include "attention.inl"

const Kernels& table(const char* name) {
  static const Kernels kernels{name,   gemm,            prepare, rms_norm, activate, softcap, sum_exp,
                               argmax, integer_weights, rope,    write_kv, attention};
  return kernels;
}

}  // namespace sage::SAGE_ISA
