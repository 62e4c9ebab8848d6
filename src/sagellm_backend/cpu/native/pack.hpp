// From a file's rows to panels of 32 outputs, and back.
#pragma once

#include "formats.hpp"
#include "threads.hpp"

namespace sage {

// Pack an n × k matrix into `to` (panel p at p · panel_stride). The target is the source's natural format, or Q4M, Q8, BF16, F32.
// Throws std::invalid_argument for another target.
void pack(Source source, const uint8_t* data, const Packed& shape, uint8_t* to, ThreadPool& pool);

// Row `row` of a packed matrix as float: embeddings, and the twin that tests compare kernels with.
void unpack_row(const Packed& w, int row, float* out);

}  // namespace sage
