// Paged attention of up to 8 query vectors over one KV head. K of a block lies as [dim / step][16 tokens][step], V as
// [16 / step][dim][step], step inputs of one dot instruction being neighbours (2 for bf16, 1 for f32).
// Chunks of 256 tokens are computed on their own and merged in ascending order (Milakov & Gimelshein, 2018).

struct KvBf16 {
  static constexpr int kStep = 2;
  static constexpr size_t kElement = 2;
  static inline vf dot(vf a, const uint8_t* kv, const uint8_t* x) { return dot_bf16(a, load_w(kv), broadcast4(x)); }
  static inline void convert(float* from, uint8_t* to, int n) {
    for (int i = 0; i < n; i += 16) store_bf16((uint16_t*)to + i, load(from + i));
  }
};

struct KvF32 {
  static constexpr int kStep = 1;
  static constexpr size_t kElement = 4;
  static inline vf dot(vf a, const uint8_t* kv, const uint8_t* x) {
    float b;
    std::memcpy(&b, x, 4);
    return fma(load((const float*)kv), set1(b), a);
  }
  static inline void convert(float* from, uint8_t* to, int n) { std::memcpy(to, from, n * sizeof(float)); }
};

constexpr float kMasked = -1e30f;

struct LaneRange {
  int low[kLanes], high[kLanes];  // positions that a lane sees
};

template <class Kv, int NL>
inline void scores(const AttentionTile& t, const uint8_t* q, size_t ld_q, const LaneRange& range, int begin, int end, float* s,
                   float* top) {
  constexpr size_t kVector = 16 * Kv::kStep * Kv::kElement;
  const int steps = (t.head_dim + Kv::kStep - 1) / Kv::kStep;
  vf best[NL];
  for (int r = 0; r < NL; r++) best[r] = set1(kMasked);
  for (int base = begin; base < end; base += kBlock) {
    const int block = t.blocks[base / kBlock];
    const uint8_t* k = t.k + static_cast<size_t>(block < 0 ? 0 : block) * t.block_stride;
    vf acc[NL];
#pragma GCC unroll 8
    for (int r = 0; r < NL; r++) acc[r] = zero();
    for (int i = 0; i < steps; i++) {
#pragma GCC unroll 8
      for (int r = 0; r < NL; r++)
        acc[r] = Kv::dot(acc[r], k + i * kVector, q + r * ld_q + i * Kv::kStep * Kv::kElement);
    }
#pragma GCC unroll 8
    for (int r = 0; r < NL; r++) {
      vf v = acc[r];
      if (t.softcap > 0.0f) v = mul(set1(t.softcap), tanh(div(v, set1(t.softcap))));
      if (base < range.low[r] || base + kBlock - 1 > range.high[r] || block < 0)
        v = keep_range(v, base, block < 0 ? base + kBlock : range.low[r], range.high[r], set1(kMasked));
      best[r] = max(best[r], v);
      store(s + r * kChunk + base - begin, v);
    }
  }
  for (int r = 0; r < NL; r++) top[r] = hmax(best[r]);
}

// Weights exp(s - top), zero where masked; returns their sum. The tail of the last step is zero.
inline float weights(float* s, int n, float top) {
  vf sum = zero();
  const vf m = set1(top);
  for (int i = 0; i < n; i += 16) {
    const vf v = load(s + i);
    const vf e = choose_less(v, set1(0.5f * kMasked), zero(), exp(sub(v, m)));
    sum = add(sum, e);
    store(s + i, e);
  }
  return hsum(sum);
}

template <class Kv, int NL, int ND>
inline void values_of(const AttentionTile& t, const uint8_t* p, size_t ld_p, int dim0, int dim, int begin, int end, float* out) {
  constexpr size_t kVector = 16 * Kv::kStep * Kv::kElement;
  vf acc[NL][ND];
#pragma GCC unroll 8
  for (int r = 0; r < NL; r++)
    for (int j = 0; j < ND; j++) acc[r][j] = zero();
  for (int base = begin; base < end; base += kBlock) {
    const int block = t.blocks[base / kBlock];
    const uint8_t* v = t.v + static_cast<size_t>(block < 0 ? 0 : block) * t.block_stride + dim0 * Kv::kStep * Kv::kElement;
    const uint8_t* w = p + (base - begin) * Kv::kElement;
    for (int i = 0; i < kBlock / Kv::kStep; i++) {
#pragma GCC unroll 8
      for (int r = 0; r < NL; r++)
#pragma GCC unroll 4
        for (int j = 0; j < ND; j++)
          acc[r][j] = Kv::dot(acc[r][j], v + i * dim * Kv::kStep * Kv::kElement + j * kVector,
                              w + r * ld_p + i * Kv::kStep * Kv::kElement);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < NL; r++)
    for (int j = 0; j < ND; j++) store(out + r * dim + dim0 + j * 16, acc[r][j]);
}

template <class Kv, int NL>
inline void values(const AttentionTile& t, const uint8_t* p, size_t ld_p, int dim, int begin, int end, float* out) {
  constexpr int kWide = NL <= 4 ? 4 : 2;
  int d = 0;
  for (; d + kWide * 16 <= dim; d += kWide * 16) values_of<Kv, NL, kWide>(t, p, ld_p, d, dim, begin, end, out);
  for (; d < dim; d += 16) values_of<Kv, NL, 1>(t, p, ld_p, d, dim, begin, end, out);
}

template <class Kv, int NL>
void attend(const AttentionTile& t) {
  const int dim = round_up(t.head_dim, 16);
  float* s = t.scratch;                                             // [lanes][kChunk]
  uint8_t* p = (uint8_t*)(s + kLanes * kChunk);                     // [lanes][kChunk], converted
  uint8_t* q = (uint8_t*)(s + 2 * kLanes * kChunk);                 // [lanes][dim], converted
  float* part = s + 2 * kLanes * kChunk + kLanes * dim;             // [lanes][dim]
  float* total = part + kLanes * dim;                               // [lanes][dim]
  const size_t ld_q = dim * Kv::kElement, ld_p = kChunk * Kv::kElement;
  LaneRange range;
  float top[NL], sum[NL];
  int first = t.position[0], last = t.position[0];
  for (int r = 0; r < NL; r++) {
    for (int i = 0; i < dim; i++) part[i] = i < t.head_dim ? t.q[r][i] * t.scale : 0.0f;
    Kv::convert(part, q + r * ld_q, dim);
    range.high[r] = t.position[r];
    range.low[r] = t.window > 0 && t.position[r] >= t.window ? t.position[r] - t.window + 1 : 0;
    first = range.low[r] < first ? range.low[r] : first;
    last = range.high[r] > last ? range.high[r] : last;
    top[r] = kMasked;
    sum[r] = 0.0f;
  }
  for (int i = 0; i < NL * dim; i++) total[i] = 0.0f;
  for (int begin = first / kChunk * kChunk; begin <= last; begin += kChunk) {
    const int end = begin + kChunk <= last ? begin + kChunk : round_up(last + 1, kBlock);
    float chunk_top[NL];
    scores<Kv, NL>(t, q, ld_q, range, begin, end, s, chunk_top);
    float keep[NL], take[NL];
    for (int r = 0; r < NL; r++) {
      const float chunk_sum = weights(s + r * kChunk, end - begin, chunk_top[r]);
      Kv::convert(s + r * kChunk, p + r * ld_p, end - begin);
      const float merged = chunk_top[r] > top[r] ? chunk_top[r] : top[r];
      alignas(64) float e[16] = {top[r] - merged, chunk_top[r] - merged};
      store(e, exp(load(e)));
      keep[r] = e[0];
      take[r] = e[1];
      sum[r] = sum[r] * keep[r] + chunk_sum * take[r];
      top[r] = merged;
    }
    values<Kv, NL>(t, p, ld_p, dim, begin, end, part);
    for (int r = 0; r < NL; r++)
      for (int i = r * dim; i < (r + 1) * dim; i += 16)
        store(total + i, fma(load(part + i), set1(take[r]), mul(load(total + i), set1(keep[r]))));
  }
  for (int r = 0; r < NL; r++) {
    const vf inverse = set1(sum[r] > 0.0f ? 1.0f / sum[r] : 0.0f);
    for (int i = 0; i < dim; i += 16) store(t.out[r] + i, mul(load(total + r * dim + i), inverse));
  }
}

template <class Kv, int NL>
void attend_lanes(const AttentionTile& t) {
  if constexpr (NL > 0) {
    if (t.lanes == NL)
      attend<Kv, NL>(t);
    else
      attend_lanes<Kv, NL - 1>(t);
  }
}

inline void attention(KvFormat format, const AttentionTile& tile) {
  if (format == KvFormat::F32)
    attend_lanes<KvF32, kLanes>(tile);
  else
    attend_lanes<KvBf16, kLanes>(tile);
}

// Values that are not finite would reach other sequences through a reused block (0 · inf): the cache holds finite ones only.
inline float finite(float x) {
  constexpr float kMost = 3.3e38f;
  return x > -kMost ? (x < kMost ? x : kMost) : (x <= -kMost ? -kMost : 0.0f);
}

template <class T, int kStep, class Convert>
inline void write_token(const float* k, const float* v, int n, int slot, uint8_t* k_block, uint8_t* v_block, Convert convert) {
  const int dim = round_up(n, 16);
  T* kt = (T*)k_block;
  T* vt = (T*)v_block + (slot / kStep) * dim * kStep + slot % kStep;
  for (int i = 0; i < n; i++) {
    kt[(i / kStep) * 16 * kStep + slot * kStep + i % kStep] = convert(finite(k[i]));
    vt[i * kStep] = convert(finite(v[i]));
  }
}

inline void write_kv(KvFormat format, const float* k, const float* v, int n, int slot, uint8_t* k_block, uint8_t* v_block) {
  if (format == KvFormat::F32)
    write_token<float, 1>(k, v, n, slot, k_block, v_block, [](float x) { return x; });
  else
    write_token<uint16_t, 2>(k, v, n, slot, k_block, v_block, float_to_bf16);
}
