// Compiled with the flags of its instruction set (CMakeLists.txt); called only where isa.cpp found it present.
#define SAGE_ISA avx2
#include "simd_avx2.hpp"

#include "kernels.inl"
