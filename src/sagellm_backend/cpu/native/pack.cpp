#include "pack.hpp"

#include <atomic>
#include <stdexcept>
#include <vector>

namespace sage {
namespace {

bool has_min(WeightFormat f) { return f == WeightFormat::Q4M || f == WeightFormat::Q8M; }
bool is_q4(WeightFormat f) { return f == WeightFormat::Q4 || f == WeightFormat::Q4M; }
size_t head_bytes(WeightFormat f) { return has_min(f) ? 128 : 64; }

// Byte of quant (lane, input) in the quants of a group, and its shift for 4 bits.
size_t q8_at(int lane, int i) { return static_cast<size_t>(i / 4) * 128 + lane * 4 + i % 4; }
size_t q4_at(int lane, int i) { return static_cast<size_t>(i / 8) * 128 + lane * 4 + i % 4; }
int q4_shift(int i) { return i % 8 < 4 ? 0 : 4; }

void put_half(uint8_t* p, float v) {
  const uint16_t h = float_to_half(v);
  std::memcpy(p, &h, 2);
}

float get_half(const uint8_t* p) {
  uint16_t h;
  std::memcpy(&h, p, 2);
  return half_to_float(h);
}

void put_group(WeightFormat f, const Group& g, int lane, uint8_t* at) {
  put_half(at + lane * 2, g.scale);
  if (has_min(f)) put_half(at + 64 + lane * 2, g.min);
  uint8_t* q = at + head_bytes(f);
  for (int i = 0; i < kGroup; i++) {
    if (is_q4(f))
      q[q4_at(lane, i)] |= static_cast<uint8_t>(g.q[i] << q4_shift(i));
    else
      q[q8_at(lane, i)] = g.q[i];
  }
}

void put_floats(WeightFormat f, const float* row, int k, int lane, uint8_t* at) {
  for (int i = 0; i < k; i++) {
    if (f == WeightFormat::BF16) {
      const uint16_t b = float_to_bf16(row[i]);
      std::memcpy(at + (static_cast<size_t>(i / 2) * kPanel + lane) * 4 + i % 2 * 2, &b, 2);
    } else {
      std::memcpy(at + (static_cast<size_t>(i) * kPanel + lane) * 4, row + i, 4);
    }
  }
}

void pack_row(Source source, const uint8_t* row, const Packed& shape, int lane, uint8_t* panel, std::vector<float>& values) {
  const size_t step = group_bytes(shape.format);
  Group g;
  if (keeps_quants(source) && natural_format(source) == shape.format) {
    for (int i = 0; i < shape.groups(); i++) {
      decode_group(source, row, i, g);
      put_group(shape.format, g, lane, panel + i * step);
    }
    return;
  }
  decode_row(source, row, shape.k, values.data());
  if (shape.format == WeightFormat::BF16 || shape.format == WeightFormat::F32)
    return put_floats(shape.format, values.data(), shape.k, lane, panel);
  for (int i = 0; i < shape.groups(); i++) {
    quantise_group(shape.format, values.data() + i * kGroup, g);
    put_group(shape.format, g, lane, panel + i * step);
  }
}

void check_target(Source source, const Packed& shape) {
  const bool made = shape.format != WeightFormat::Q4 && shape.format != WeightFormat::Q8M;
  if (!made && !(keeps_quants(source) && natural_format(source) == shape.format))
    throw std::invalid_argument("this source cannot be packed into the asked format");
  if (shape.k % source_block(source).weights != 0)
    throw std::invalid_argument("rows of " + std::to_string(shape.k) + " weights do not fill the source's blocks");
}

}  // namespace

size_t group_bytes(WeightFormat format) {
  switch (format) {
    case WeightFormat::Q4: return 64 + 512;
    case WeightFormat::Q4M: return 128 + 512;
    case WeightFormat::Q8: return 64 + 1024;
    case WeightFormat::Q8M: return 128 + 1024;
    case WeightFormat::BF16: return 2048;
    case WeightFormat::F32: return 4096;
  }
  return 0;
}

void pack(Source source, const uint8_t* data, const Packed& shape, uint8_t* to, ThreadPool& pool) {
  check_target(source, shape);
  const size_t row_bytes = static_cast<size_t>(shape.k) / source_block(source).weights * source_block(source).bytes;
  std::atomic<int> next{0};
  std::vector<std::vector<float>> values(pool.size(), std::vector<float>(round_up(shape.k, kGroup)));
  pool.run([&](int thread) {
    for (int p = next.fetch_add(1); p < shape.panels(); p = next.fetch_add(1)) {
      uint8_t* panel = to + p * shape.panel_stride;
      std::memset(panel, 0, panel_bytes(shape.format, shape.k));
      for (int lane = 0; lane < kPanel && p * kPanel + lane < shape.n; lane++)
        pack_row(source, data + static_cast<size_t>(p * kPanel + lane) * row_bytes, shape, lane, panel, values[thread]);
    }
  });
}

void unpack_row(const Packed& w, int row, float* out) {
  const uint8_t* at = w.data + row / kPanel * w.panel_stride;
  const int lane = row % kPanel;
  if (w.format == WeightFormat::BF16 || w.format == WeightFormat::F32) {
    for (int i = 0; i < w.k; i++) {
      if (w.format == WeightFormat::BF16) {
        uint16_t b;
        std::memcpy(&b, at + (static_cast<size_t>(i / 2) * kPanel + lane) * 4 + i % 2 * 2, 2);
        out[i] = bf16_to_float(b);
      } else {
        std::memcpy(out + i, at + (static_cast<size_t>(i) * kPanel + lane) * 4, 4);
      }
    }
    return;
  }
  const float zero = w.format == WeightFormat::Q4 ? 8.0f : w.format == WeightFormat::Q8 ? 128.0f : 0.0f;
  for (int g = 0; g < w.groups(); g++, at += group_bytes(w.format)) {
    const float scale = get_half(at + lane * 2), min = has_min(w.format) ? get_half(at + 64 + lane * 2) : 0.0f;
    const uint8_t* q = at + head_bytes(w.format);
    for (int i = 0; i < kGroup && g * kGroup + i < w.k; i++) {
      const int v = is_q4(w.format) ? (q[q4_at(lane, i)] >> q4_shift(i)) & 15 : q[q8_at(lane, i)];
      out[g * kGroup + i] = (static_cast<float>(v) - zero) * scale + min;
    }
  }
}

}  // namespace sage
