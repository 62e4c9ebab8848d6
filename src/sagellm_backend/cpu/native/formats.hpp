// Weight formats of files (ggml's block formats and plain numbers) and how to read them.
#pragma once

#include <string>

#include "kernels.hpp"

namespace sage {

enum class Source : int { F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K };

// Throws std::invalid_argument for an unknown name.
Source source_of(const std::string& name);
WeightFormat weight_format_of(const std::string& name);

struct SourceBlock {
  int weights, bytes;
};
SourceBlock source_block(Source source);

// The packed format that keeps a source's quants as they are; for Q6_K, F16 the nearest one.
WeightFormat natural_format(Source source);

// Whether `decode_group` gives the quants of `natural_format` without rounding them anew.
bool keeps_quants(Source source);

struct Group {
  uint8_t q[kGroup];
  float scale, min;  // `min` is used by the formats with a minimum
};

// Group `g` (32 weights) of a row, in its natural format.
void decode_group(Source source, const uint8_t* row, int g, Group& out);

// A whole row of k weights as float.
void decode_row(Source source, const uint8_t* row, int k, float* out);

// The best group of `format` (Q4M or Q8) for 32 values.
void quantise_group(WeightFormat format, const float* values, Group& out);

}  // namespace sage
