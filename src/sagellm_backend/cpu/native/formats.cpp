#include "formats.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>

namespace sage {
namespace {

constexpr std::array<const char*, 11> kSources{"F32",  "F16",  "BF16", "Q4_0", "Q4_1", "Q5_0",
                                               "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"};
constexpr std::array<SourceBlock, 11> kBlocks{{{1, 4},   {1, 2},   {1, 2},     {32, 18},   {32, 20},  {32, 22},
                                               {32, 24}, {32, 34}, {256, 144}, {256, 176}, {256, 210}}};
constexpr std::array<const char*, 6> kFormats{"Q4", "Q4M", "Q8", "Q8M", "BF16", "F32"};

uint16_t u16(const uint8_t* p) {
  uint16_t v;
  std::memcpy(&v, p, 2);
  return v;
}

uint32_t u32(const uint8_t* p) {
  uint32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

float half(const uint8_t* p) { return half_to_float(u16(p)); }

void nibbles(const uint8_t* p, uint8_t* q) {
  for (int i = 0; i < 16; i++) {
    q[i] = p[i] & 15;
    q[i + 16] = p[i] >> 4;
  }
}

void fifth_bits(uint32_t high, uint8_t* q) {
  for (int i = 0; i < 32; i++) q[i] |= ((high >> i) & 1u) << 4;
}

// Scale and minimum of sub-block `i` of a Q4_K or Q5_K block: 6 bits each, 12 bytes for 8 of them.
void k_scale(const uint8_t* p, int i, int& scale, int& min) {
  if (i < 4) {
    scale = p[i] & 63;
    min = p[i + 4] & 63;
  } else {
    scale = (p[i + 4] & 15) | ((p[i - 4] >> 6) << 4);
    min = (p[i + 4] >> 4) | ((p[i] >> 6) << 4);
  }
}

// Sub-blocks of 32 in pairs share 32 bytes: low nibbles first, then high.
void k_group(Source source, const uint8_t* block, int sub, Group& out) {
  int scale, min;
  k_scale(block + 4, sub, scale, min);
  out.scale = half(block) * static_cast<float>(scale);
  out.min = -half(block + 2) * static_cast<float>(min);
  const uint8_t* high = block + 16;
  const uint8_t* low = block + (source == Source::Q5_K ? 48 : 16) + sub / 2 * 32;
  for (int i = 0; i < 32; i++) {
    out.q[i] = sub % 2 ? low[i] >> 4 : low[i] & 15;
    if (source == Source::Q5_K) out.q[i] |= ((high[i] >> sub) & 1) << 4;
  }
}

void decode_q6k(const uint8_t* b, float* out) {
  const uint8_t *low = b, *high = b + 128;
  const int8_t* scales = reinterpret_cast<const int8_t*>(b + 192);
  const float d = half(b + 208);
  for (int i = 0; i < 256; i++) {  // 128 weights share 64 bytes of low nibbles and 32 bytes of high pairs
    const int part = i / 128, j = i % 128;
    const int l = (low[part * 64 + j % 64] >> (j / 64 * 4)) & 15;
    const int h = (high[part * 32 + j % 32] >> (j / 32 * 2)) & 3;
    out[i] = d * static_cast<float>(scales[i / 16]) * static_cast<float>((l | (h << 4)) - 32);
  }
}

float group_value(WeightFormat format, const Group& g, int i) {
  switch (format) {
    case WeightFormat::Q4: return static_cast<float>(g.q[i] - 8) * g.scale;
    case WeightFormat::Q8: return static_cast<float>(g.q[i] - 128) * g.scale;
    default: return static_cast<float>(g.q[i]) * g.scale + g.min;
  }
}

void quantise_q8(const float* v, Group& out) {
  float top = 0.0f;
  for (int i = 0; i < kGroup; i++) top = std::max(top, std::fabs(v[i]));
  out.scale = half_to_float(float_to_half(top / 127.0f));
  out.min = 0.0f;
  for (int i = 0; i < kGroup; i++) {
    const float q = out.scale > 0.0f ? std::nearbyint(v[i] / out.scale) : 0.0f;
    out.q[i] = static_cast<uint8_t>(static_cast<int>(std::clamp(q, -127.0f, 127.0f)) + 128);
  }
}

struct Fit {
  float scale, min, error;
};

// Round with (scale, min), then fit both to the rounded values by least squares.
Fit fit_q4(const float* v, float scale, float min) {
  double sq = 0, sqq = 0, sv = 0, sqv = 0;
  float q[kGroup];
  for (int i = 0; i < kGroup; i++) {
    q[i] = scale > 0.0f ? std::clamp(std::nearbyint((v[i] - min) / scale), 0.0f, 15.0f) : 0.0f;
    sq += q[i];
    sqq += q[i] * q[i];
    sv += v[i];
    sqv += q[i] * v[i];
  }
  const double det = kGroup * sqq - sq * sq;
  if (det > 0) {
    scale = static_cast<float>((kGroup * sqv - sq * sv) / det);
    min = static_cast<float>((sv - scale * sq) / kGroup);
  }
  scale = half_to_float(float_to_half(scale));
  min = half_to_float(float_to_half(min));
  float error = 0.0f;
  for (int i = 0; i < kGroup; i++) {
    const float r = scale > 0.0f ? std::clamp(std::nearbyint((v[i] - min) / scale), 0.0f, 15.0f) : 0.0f;
    const float e = v[i] - (r * scale + min);
    error += e * e;
  }
  return {scale, min, error};
}

void quantise_q4m(const float* v, Group& out) {
  const auto [low, high] = std::minmax_element(v, v + kGroup);
  const float width = *high - *low, middle = 0.5f * (*high + *low);
  Fit best{0.0f, *low, INFINITY};
  for (int step = 0; step < 12; step++) {  // ranges from the full one to 0.725 of it: clipping outliers may pay
    const float part = 1.0f - 0.025f * static_cast<float>(step);
    const Fit fit = fit_q4(v, width * part / 15.0f, middle - 0.5f * width * part);
    if (fit.error < best.error) best = fit;
  }
  out.scale = best.scale;
  out.min = best.min;
  for (int i = 0; i < kGroup; i++)
    out.q[i] = best.scale > 0.0f ? static_cast<uint8_t>(std::clamp(std::nearbyint((v[i] - best.min) / best.scale), 0.0f, 15.0f)) : 0;
}

template <size_t N>
int index_of(const std::array<const char*, N>& names, const std::string& name, const char* what) {
  for (size_t i = 0; i < N; i++)
    if (name == names[i]) return static_cast<int>(i);
  throw std::invalid_argument(std::string(what) + " '" + name + "' is unknown to the cpu backend");
}

}  // namespace

Source source_of(const std::string& name) { return static_cast<Source>(index_of(kSources, name, "weight format")); }
WeightFormat weight_format_of(const std::string& name) {
  return static_cast<WeightFormat>(index_of(kFormats, name, "packed format"));
}
SourceBlock source_block(Source source) { return kBlocks[static_cast<size_t>(source)]; }

WeightFormat natural_format(Source source) {
  switch (source) {
    case Source::Q4_0: return WeightFormat::Q4;
    case Source::Q4_1:
    case Source::Q4_K: return WeightFormat::Q4M;
    case Source::Q5_1:
    case Source::Q5_K: return WeightFormat::Q8M;
    case Source::Q5_0:
    case Source::Q8_0:
    case Source::Q6_K: return WeightFormat::Q8;
    case Source::F16:
    case Source::BF16: return WeightFormat::BF16;
    case Source::F32: return WeightFormat::F32;
  }
  return WeightFormat::F32;
}

bool keeps_quants(Source source) { return source_block(source).weights > 1 && source != Source::Q6_K; }

void decode_group(Source source, const uint8_t* row, int g, Group& out) {
  const SourceBlock size = source_block(source);
  const uint8_t* b = row + static_cast<size_t>(g) * kGroup / size.weights * size.bytes;
  switch (source) {
    case Source::Q4_0:
      out.scale = half(b);
      nibbles(b + 2, out.q);
      break;
    case Source::Q4_1:
      out.scale = half(b);
      out.min = half(b + 2);
      nibbles(b + 4, out.q);
      break;
    case Source::Q5_0:
      out.scale = half(b);
      nibbles(b + 6, out.q);
      fifth_bits(u32(b + 2), out.q);
      for (auto& q : out.q) q += 112;  // q - 16 = (q + 112) - 128
      break;
    case Source::Q5_1:
      out.scale = half(b);
      out.min = half(b + 2);
      nibbles(b + 8, out.q);
      fifth_bits(u32(b + 4), out.q);
      break;
    case Source::Q8_0:
      out.scale = half(b);
      for (int i = 0; i < kGroup; i++) out.q[i] = b[2 + i] ^ 0x80;
      break;
    case Source::Q4_K:
    case Source::Q5_K: k_group(source, b, g % 8, out); break;
    default: throw std::logic_error("decode_group: the source has no groups of 32");
  }
}

void decode_row(Source source, const uint8_t* row, int k, float* out) {
  switch (source) {
    case Source::F32: std::memcpy(out, row, static_cast<size_t>(k) * 4); return;
    case Source::F16:
      for (int i = 0; i < k; i++) out[i] = half(row + 2 * i);
      return;
    case Source::BF16:
      for (int i = 0; i < k; i++) out[i] = bf16_to_float(u16(row + 2 * i));
      return;
    case Source::Q6_K:
      for (int i = 0; i < k / 256; i++) decode_q6k(row + static_cast<size_t>(i) * 210, out + i * 256);
      return;
    default: break;
  }
  Group g;
  for (int i = 0; i < k / kGroup; i++) {
    decode_group(source, row, i, g);
    for (int j = 0; j < kGroup; j++) out[i * kGroup + j] = group_value(natural_format(source), g, j);
  }
}

void quantise_group(WeightFormat format, const float* values, Group& out) {
  if (format == WeightFormat::Q8)
    quantise_q8(values, out);
  else if (format == WeightFormat::Q4M)
    quantise_q4m(values, out);
  else
    throw std::logic_error("quantise_group: only Q8 and Q4M are made from floats");
}

}  // namespace sage
