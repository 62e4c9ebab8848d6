// Compiled with the flags of its instruction set (CMakeLists.txt); called only where isa.cpp found it present.
#define SAGE_ISA portable
#include "simd_portable.hpp"

#include "kernels.inl"
