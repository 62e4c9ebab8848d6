// Row-wise work: conversion of activations, RMSNorm, rotation, gate activations, soft cap, log-sum-exp.

// Quantise one group of 32 to int8 with its own scale. Values past `n` count as zero.
inline void quantise_group(const float* v, int n, int8_t* q, GroupMeta& meta) {
  alignas(64) float padded[kGroup] = {};
  if (n < kGroup) {
    std::memcpy(padded, v, n * sizeof(float));
    v = padded;
  }
  const vf a = load(v), b = load(v + 16);
  const float top = hmax(max(abs(a), abs(b)));
  const float scale = top / 127.0f;
  const vf inverse = set1(scale > 0.0f ? 127.0f / top : 0.0f);
  const vi ia = round_int(mul(a, inverse)), ib = round_int(mul(b, inverse));
  store_i8(q, ia);
  store_i8(q + 16, ib);
  const int32_t sum = hsumi(addi(ia, ib));
  meta = {scale, scale * static_cast<float>(sum), -8 * sum, kBias8 * sum};
}

inline void prepare(const float* row, int begin, int end, const Activations& to, int to_row) {
  if (to.q)
    for (int i = begin; i < end; i += kGroup)
      quantise_group(row + i, end - i < kGroup ? end - i : kGroup, to.q + to_row * to.ld + i,
                     to.meta[to_row * to.ld_meta + i / kGroup]);
  if (to.bf16) {
    uint16_t* out = to.bf16 + to_row * to.ld;
    int i = begin;
    for (; i + 16 <= end; i += 16) store_bf16(out + i, load(row + i));
    for (; i < end; i++) out[i] = float_to_bf16(row[i]);
    if (end % 2) out[end] = 0;
  }
  if (to.f32) std::memcpy(to.f32 + to_row * to.ld + begin, row + begin, (end - begin) * sizeof(float));
}

inline void rms_norm(const float* x, const float* weight, int n, float eps, float* out) {
  vf s = zero();
  int i = 0;
  for (; i + 16 <= n; i += 16) s = fma(load(x + i), load(x + i), s);
  float squares = hsum(s);
  for (; i < n; i++) squares += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
  const vf scales = set1(scale);
  for (i = 0; i + 16 <= n; i += 16) store(out + i, mul(mul(load(x + i), scales), load(weight + i)));
  for (; i < n; i++) out[i] = x[i] * scale * weight[i];
}

inline void rope(float* head, const float* cos_sin, int dim, bool interleaved) {
  const int half = dim / 2;
  const float* c = cos_sin;
  const float* s = cos_sin + half;
  if (interleaved) {
    for (int i = 0; i < half; i++) {
      const float a = head[2 * i], b = head[2 * i + 1];
      head[2 * i] = a * c[i] - b * s[i];
      head[2 * i + 1] = a * s[i] + b * c[i];
    }
    return;
  }
  for (int i = 0; i < half; i++) {
    const float a = head[i], b = head[i + half];
    head[i] = a * c[i] - b * s[i];
    head[i + half] = a * s[i] + b * c[i];
  }
}

inline vf gate(Activation kind, vf x) {
  const vf one = set1(1.0f), half = set1(0.5f);
  switch (kind) {
    case Activation::Silu: return div(x, add(one, exp(sub(zero(), x))));
    case Activation::GeluTanh: {
      const vf inner = mul(set1(0.7978845608f), mul(x, fma(mul(x, x), set1(0.044715f), one)));
      return mul(mul(half, x), add(one, tanh(inner)));
    }
    case Activation::Gelu: return mul(mul(half, x), add(one, erf(mul(x, set1(0.7071067812f)))));
  }
  return x;
}

inline void activate(Activation kind, float* g, const float* up, int n) {
  for (int i = 0; i < n; i += 16) store(g + i, mul(gate(kind, load(g + i)), load(up + i)));
}

inline void softcap(float* x, int n, float cap) {
  const vf c = set1(cap);
  for (int i = 0; i < n; i += 16) store(x + i, mul(c, tanh(div(load(x + i), c))));
}

inline double sum_exp(const float* x, int n, float top) {
  double total = 0.0;
  const vf t = set1(top);
  int i = 0;
  while (i + 16 <= n) {  // short float sums, added up in double
    vf s = zero();
    const int stop = i + 512 < n ? i + 512 : n;
    for (; i + 16 <= stop; i += 16) s = add(s, exp(sub(load(x + i), t)));
    total += hsum(s);
  }
  for (; i < n; i++) total += std::exp(x[i] - top);
  return total;
}

inline void argmax(const float* x, int n, int base, float* best, int* index) {
  constexpr float kMost = 3.402823466e38f;
  for (int i = 0; i < n; i += 16) {
    const int lanes = n - i < 16 ? n - i : 16;
    if (lanes == 16 && !(hmax(load(x + i)) > *best)) continue;
    for (int j = i; j < i + lanes; j++)
      if (x[j] > *best && x[j] <= kMost) {
        *best = x[j];
        *index = base + j;
      }
  }
}

inline void integer_weights(const float* z, int n, double top, double scale, uint64_t* w) {
  static constexpr double c[12] = {0x1.0000000000000p+0,  0x1.62e42fefa39efp-1,  0x1.ebfbdff82c58fp-3,  0x1.c6b08d704a0c0p-5,
                                   0x1.3b2ab6fba4e77p-7,  0x1.5d87fe78a6731p-10, 0x1.430912f86c787p-13, 0x1.ffcbfc588b0c7p-17,
                                   0x1.62c0223a5c824p-20, 0x1.b5253d395e7c4p-24, 0x1.e4cf5158b8ecap-28, 0x1.e8cac7351bb25p-32};
  for (int i = 0; i < n; i++) {
    const double exact = (static_cast<double>(z[i]) - top) * scale;
    const bool live = exact >= -45.0;
    const double x = live ? exact : 0.0;
    const double r = __builtin_rint(x);
    const double f = x - r;
    double p = c[11];
    for (int k = 10; k >= 0; k--) p = p * f + c[k];
    const int64_t power = static_cast<int64_t>(r) + 44 + 1023;  // 2^(r + 44) as the bits of a double
    double factor;
    const int64_t bits = power << 52;
    std::memcpy(&factor, &bits, 8);
    const int64_t value = static_cast<int64_t>(p * factor);
    w[i] = live ? static_cast<uint64_t>(value) : 0;
  }
}
