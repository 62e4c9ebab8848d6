// Which instruction sets were compiled in and run on this machine.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace sage {

// Fastest first; "portable" is always there.
std::vector<const Kernels*> supported_kernels();

// An empty name is the fastest. Throws std::invalid_argument that lists what is supported.
const Kernels& kernels_of(const std::string& name);

}  // namespace sage
