// Compiled with the flags of its instruction set (CMakeLists.txt); called only where isa.cpp found it present.
#define SAGE_ISA avx512_bf16
#include "simd_avx512.hpp"

#include "kernels.inl"
