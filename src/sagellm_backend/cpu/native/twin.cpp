#include "twin.hpp"

#include <cmath>
#include <vector>

#include "pack.hpp"

namespace sage::twin {
namespace {

double activation_at(const Packed& w, const Activations& x, int row, int k) {
  const size_t at = row * x.ld + k;
  switch (w.format) {
    case WeightFormat::F32: return x.f32[at];
    case WeightFormat::BF16: return bf16_to_float(x.bf16[at]);
    default: return static_cast<double>(x.q[at]) * x.meta[row * x.ld_meta + k / kGroup].scale;
  }
}

double act(Activation kind, double x) {
  switch (kind) {
    case Activation::Silu: return x / (1.0 + std::exp(-x));
    case Activation::GeluTanh: return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::Gelu: return 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0)));
  }
  return x;
}

int step_of(KvFormat format) { return format == KvFormat::BF16 ? 2 : format == KvFormat::F32 ? 1 : 4; }

double kv_at(KvFormat format, const uint8_t* block, size_t element, int dim, int slot, int bias) {
  if (format == KvFormat::BF16) {
    uint16_t b;
    std::memcpy(&b, block + element * 2, 2);
    return bf16_to_float(b);
  }
  float f;
  std::memcpy(&f, block + (format == KvFormat::INT8 ? 16 * static_cast<size_t>(dim) + slot * 4 : element * 4), 4);
  if (format == KvFormat::F32) return f;
  return f * (bias ? block[element] - bias : static_cast<int8_t>(block[element]));
}

double key_at(KvFormat format, const uint8_t* block, int dim, int slot, int i) {
  const int step = step_of(format);
  return kv_at(format, block, static_cast<size_t>(i / step) * 16 * step + slot * step + i % step, dim, slot, 128);
}

double value_at(KvFormat format, const uint8_t* block, int dim, int slot, int i) {
  const int step = step_of(format);
  return kv_at(format, block, static_cast<size_t>(slot / step) * dim * step + i * step + slot % step, dim, slot, 0);
}

}  // namespace

void gemm(const Packed& w, const Activations& x, int rows, float* out) {
  std::vector<float> weights(round_up(w.k, kGroup));
  for (int j = 0; j < w.n; j++) {
    unpack_row(w, j, weights.data());
    for (int r = 0; r < rows; r++) {
      double s = 0.0;
      for (int k = 0; k < w.k; k++) s += activation_at(w, x, r, k) * weights[k];
      out[static_cast<size_t>(r) * w.n + j] = static_cast<float>(s);
    }
  }
}

void rms_norm(const float* x, const float* weight, int n, float eps, float* out) {
  double s = 0.0;
  for (int i = 0; i < n; i++) s += static_cast<double>(x[i]) * x[i];
  const double scale = 1.0 / std::sqrt(s / n + eps);
  for (int i = 0; i < n; i++) out[i] = static_cast<float>(x[i] * scale * weight[i]);
}

void activate(Activation kind, float* gate, const float* up, int n) {
  for (int i = 0; i < n; i++) gate[i] = static_cast<float>(act(kind, gate[i]) * up[i]);
}

void softcap(float* x, int n, float cap) {
  for (int i = 0; i < n; i++) x[i] = static_cast<float>(cap * std::tanh(static_cast<double>(x[i]) / cap));
}

void rope(float* head, const float* cos_sin, int dim, bool interleaved) {
  const int half = dim / 2;
  for (int i = 0; i < half; i++) {
    float* a = interleaved ? head + 2 * i : head + i;
    float* b = interleaved ? a + 1 : a + half;
    const double c = cos_sin[i], s = cos_sin[half + i], x = *a, y = *b;
    *a = static_cast<float>(x * c - y * s);
    *b = static_cast<float>(x * s + y * c);
  }
}

void attention(KvFormat format, const AttentionTile& t, int lane, float* out) {
  const int dim = round_up(t.head_dim, 16), last = t.position[lane];
  const int first = t.window > 0 && last >= t.window ? last - t.window + 1 : 0;
  std::vector<double> s, total(t.head_dim, 0.0);
  double top = -INFINITY, sum = 0.0;
  for (int pos = first; pos <= last; pos++) {
    const uint8_t* k = t.k + static_cast<size_t>(t.blocks[pos / kBlock]) * t.block_stride;
    double dot = 0.0;
    for (int i = 0; i < t.head_dim; i++) dot += t.q[lane][i] * key_at(format, k, dim, pos % kBlock, i);
    dot *= t.scale;
    if (t.softcap > 0.0f) dot = t.softcap * std::tanh(dot / t.softcap);
    s.push_back(dot);
    top = std::max(top, dot);
  }
  for (int pos = first; pos <= last; pos++) {
    const uint8_t* v = t.v + static_cast<size_t>(t.blocks[pos / kBlock]) * t.block_stride;
    const double p = std::exp(s[pos - first] - top);
    sum += p;
    for (int i = 0; i < t.head_dim; i++) total[i] += p * value_at(format, v, dim, pos % kBlock, i);
  }
  for (int i = 0; i < t.head_dim; i++) out[i] = static_cast<float>(total[i] / sum);
}

}  // namespace sage::twin
