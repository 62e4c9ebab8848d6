// Compiled with the flags of its instruction set (CMakeLists.txt); called only where isa.cpp found it present.
#define SAGE_ISA neon
#include "simd_neon.hpp"

#include "kernels.inl"
