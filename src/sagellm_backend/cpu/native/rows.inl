// Row-wise work: conversion of activations, RMSNorm, rotation, gate activations, soft cap, log-sum-exp.

// Where groups of 32 lie: so much from one to the next.
struct GroupStep {
  size_t x, q, meta;
};

// Up to 16 groups to int8, each with its own scale. What is done for all comes in phases, which leave no group waiting for the
// maxima and quotients of another.
inline void quantise_some(const float* x, int8_t* q, GroupMeta* meta, const GroupStep& step, int count) {
  alignas(64) float top[16] = {}, scale[16], inverse[16], scaled_sum[16];
  alignas(64) int32_t sum[16] = {};
  int j = 0;
  auto most = [&](int i) { return max(abs(load(x + i * step.x)), abs(load(x + i * step.x + 16))); };
  for (; j + 4 <= count; j += 4) hmax4({most(j), most(j + 1), most(j + 2), most(j + 3)}, top + j);
  for (; j < count; j++) top[j] = hmax(most(j));
  const vf most16 = load(top), scale16 = div(most16, set1(127.0f));
  store(scale, scale16);
  store(inverse, choose_less(zero(), scale16, div(set1(127.0f), most16), zero()));
  auto rounded = [&](int i, int half) { return round_int(mul(load(x + i * step.x + half), set1(inverse[i]))); };
  for (j = 0; j + 4 <= count; j += 4) {
    const vi a = rounded(j, 0), b = rounded(j, 16), c = rounded(j + 1, 0), d = rounded(j + 1, 16);
    store_i8(q + j * step.q, q + (j + 1) * step.q, a, b, c, d);
    const vi e = rounded(j + 2, 0), f = rounded(j + 2, 16), g = rounded(j + 3, 0), h = rounded(j + 3, 16);
    store_i8(q + (j + 2) * step.q, q + (j + 3) * step.q, e, f, g, h);
    hsum4({addi(a, b), addi(c, d), addi(e, f), addi(g, h)}, sum + j);
  }
  for (; j < count; j++) {
    const vi a = rounded(j, 0), b = rounded(j, 16);
    store_i8(q + j * step.q, a);
    store_i8(q + j * step.q + 16, b);
    sum[j] = hsumi(addi(a, b));
  }
  store(scaled_sum, mul(scale16, to_float(load_i32(sum))));
  for (j = 0; j < count; j++) meta[j * step.meta] = {scale[j], scaled_sum[j], -8 * sum[j], kBias8 * sum[j]};
}

// `n` columns of `rows` rows: along a row, or, where a row has a single group, down the rows. Values past `n` count as zero.
inline void quantise(const float* x, size_t ld, int rows, int n, int8_t* q, size_t ld_q, GroupMeta* meta, size_t ld_meta) {
  if (n == kGroup) {
    for (int r = 0; r < rows; r += 16)
      quantise_some(x + r * ld, q + r * ld_q, meta + r * ld_meta, {ld, ld_q, ld_meta}, rows - r < 16 ? rows - r : 16);
    return;
  }
  const GroupStep along{kGroup, kGroup, 1};
  const int groups = n / kGroup, rest = n % kGroup;
  for (int r = 0; r < rows; r++, x += ld, q += ld_q, meta += ld_meta) {
    for (int g = 0; g < groups; g += 16)
      quantise_some(x + g * kGroup, q + g * kGroup, meta + g, along, groups - g < 16 ? groups - g : 16);
    if (rest == 0) continue;
    alignas(64) float padded[kGroup] = {};
    std::memcpy(padded, x + groups * kGroup, rest * sizeof(float));
    quantise_some(padded, q + groups * kGroup, meta + groups, along, 1);
  }
}

inline void prepare(const float* x, size_t ld, int rows, int begin, int end, const Activations& to, int to_row) {
  if (to.q)
    quantise(x, ld, rows, end - begin, to.q + to_row * to.ld + begin, to.ld, to.meta + to_row * to.ld_meta + begin / kGroup, to.ld_meta);
  for (int r = 0; r < rows; r++, x += ld, to_row++) {
    if (to.bf16) {
      uint16_t* out = to.bf16 + to_row * to.ld;
      int i = begin;
      for (; i + 16 <= end; i += 16) store_bf16(out + i, load(x + i - begin));
      for (; i < end; i++) out[i] = float_to_bf16(x[i - begin]);
      if (end % 2) out[end] = 0;
    }
    if (to.f32) std::memcpy(to.f32 + to_row * to.ld + begin, x, (end - begin) * sizeof(float));
  }
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

inline float greatest(const float* x, int n) {
  vf top = load(x);
  for (int i = 16; i < n; i += 16) top = max(top, load(x + i));
  return hmax(top);
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
