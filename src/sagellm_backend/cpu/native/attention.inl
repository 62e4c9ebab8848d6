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

// Blocks outside every window may be missing; their scores are masked, so any block serves.
inline const uint8_t* block_of(const AttentionTile& t, const uint8_t* base, int index) {
  const int block = t.blocks[index];
  return base + static_cast<size_t>(block < 0 ? 0 : block) * t.block_stride;
}

// Scores of NB blocks from position `base` on. Queries are interleaved: step i of lane r at (i · NL + r).
template <class Kv, int NL, int NB>
inline __attribute__((always_inline)) void scores_of(const AttentionTile& t, const uint8_t* q, const LaneRange& range, int base,
                                                     int last_block, float* s, vf (&best)[NL]) {
  constexpr size_t kVector = 16 * Kv::kStep * Kv::kElement, kPair = Kv::kStep * Kv::kElement;
  const int steps = (t.head_dim + Kv::kStep - 1) / Kv::kStep, first = base / kBlock;
  const uint8_t *k[NB], *ahead[NB];
  vf acc[NB][NL];
#pragma GCC unroll 2
  for (int n = 0; n < NB; n++) {
    k[n] = block_of(t, t.k, first + n);
    ahead[n] = block_of(t, t.k, first + n + NB <= last_block ? first + n + NB : first + n);
#pragma GCC unroll 8
    for (int r = 0; r < NL; r++) acc[n][r] = zero();
  }
#pragma GCC unroll 2
  for (int i = 0; i < steps; i++, q += NL * kPair) {
#pragma GCC unroll 2
    for (int n = 0; n < NB; n++) __builtin_prefetch(ahead[n] + i * kVector);
#pragma GCC unroll 8
    for (int r = 0; r < NL; r++)
#pragma GCC unroll 2
      for (int n = 0; n < NB; n++) acc[n][r] = Kv::dot(acc[n][r], k[n] + i * kVector, q + r * kPair);
  }
#pragma GCC unroll 2
  for (int n = 0; n < NB; n++) {
    const int at = base + n * kBlock;
    const bool missing = t.blocks[first + n] < 0;
#pragma GCC unroll 8
    for (int r = 0; r < NL; r++) {
      vf v = acc[n][r];
      if (t.softcap > 0.0f) v = mul(set1(t.softcap), tanh(div(v, set1(t.softcap))));
      if (at < range.low[r] || at + kBlock - 1 > range.high[r] || missing)
        v = keep_range(v, at, missing ? at + kBlock : range.low[r], range.high[r], set1(kMasked));
      best[r] = max(best[r], v);
      store(s + r * kChunk + n * kBlock, v);
    }
  }
}

template <class Kv, int NL>
inline void scores(const AttentionTile& t, const uint8_t* q, const LaneRange& range, int begin, int end, float* s, float* top) {
  vf best[NL];
  for (int r = 0; r < NL; r++) best[r] = set1(kMasked);
  const int last_block = (end - 1) / kBlock;
  int base = begin;
  for (; base + 2 * kBlock <= end; base += 2 * kBlock) scores_of<Kv, NL, 2>(t, q, range, base, last_block, s + base - begin, best);
  if (base < end) scores_of<Kv, NL, 1>(t, q, range, base, last_block, s + base - begin, best);
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
inline void values_of(const AttentionTile& t, const uint8_t* p, int dim0, int dim, int begin, int end, float* out) {
  constexpr size_t kPair = Kv::kStep * Kv::kElement, kVector = 16 * kPair, kLine = kChunk * Kv::kElement;
  vf acc[NL][ND];
#pragma GCC unroll 8
  for (int r = 0; r < NL; r++)
#pragma GCC unroll 4
    for (int j = 0; j < ND; j++) acc[r][j] = zero();
  const int last_block = (end - 1) / kBlock;
  const size_t row = dim * kPair;
  for (int b = begin / kBlock; b <= last_block; b++) {
    const uint8_t* v = block_of(t, t.v, b) + dim0 * kPair;
    const uint8_t* ahead = block_of(t, t.v, b < last_block ? b + 1 : b) + dim0 * kPair;
    const uint8_t* w = p + (b * kBlock - begin) * Kv::kElement;
#pragma GCC unroll 2
    for (int i = 0; i < kBlock / Kv::kStep; i++, v += row, ahead += row) {
#pragma GCC unroll 4
      for (int j = 0; j < ND; j++) __builtin_prefetch(ahead + j * kVector);
#pragma GCC unroll 8
      for (int r = 0; r < NL; r++)
#pragma GCC unroll 4
        for (int j = 0; j < ND; j++) acc[r][j] = Kv::dot(acc[r][j], v + j * kVector, w + r * kLine + i * kPair);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < NL; r++)
    for (int j = 0; j < ND; j++) store(out + r * dim + dim0 + j * 16, acc[r][j]);
}

template <class Kv, int NL>
inline void values(const AttentionTile& t, const uint8_t* p, int dim, int begin, int end, float* out) {
  constexpr int kWide = NL <= 4 ? 4 : 2;
  int d = 0;
  for (; d + kWide * 16 <= dim; d += kWide * 16) values_of<Kv, NL, kWide>(t, p, d, dim, begin, end, out);
  for (; d < dim; d += 16) values_of<Kv, NL, 1>(t, p, d, dim, begin, end, out);
}

template <class Kv, int NL>
void attend(const AttentionTile& t) {
  const int dim = round_up(t.head_dim, 16);
  float* s = t.scratch;                                             // [lanes][kChunk]
  uint8_t* p = (uint8_t*)(s + kLanes * kChunk);                     // [lanes][kChunk], converted
  uint8_t* q = (uint8_t*)(s + 2 * kLanes * kChunk);                 // [lanes][dim], converted
  float* part = s + 2 * kLanes * kChunk + kLanes * dim;             // [lanes][dim]
  float* total = part + kLanes * dim;                               // [lanes][dim]
  constexpr size_t kPair = Kv::kStep * Kv::kElement, kLine = kChunk * Kv::kElement;
  LaneRange range;
  float top[NL], sum[NL];
  int first = t.position[0], last = t.position[0];
  for (int r = 0; r < NL; r++) {
    for (int i = 0; i < dim; i++) part[i] = i < t.head_dim ? t.q[r][i] * t.scale : 0.0f;
    Kv::convert(part, (uint8_t*)total, dim);
    for (int i = 0; i < dim / Kv::kStep; i++) std::memcpy(q + (i * NL + r) * kPair, (uint8_t*)total + i * kPair, kPair);
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
    scores<Kv, NL>(t, q, range, begin, end, s, chunk_top);
    float keep[NL], take[NL];
    for (int r = 0; r < NL; r++) {
      const float chunk_sum = weights(s + r * kChunk, end - begin, chunk_top[r]);
      Kv::convert(s + r * kChunk, p + r * kLine, end - begin);
      const float merged = chunk_top[r] > top[r] ? chunk_top[r] : top[r];
      alignas(64) float e[16] = {top[r] - merged, chunk_top[r] - merged};
      store(e, exp(load(e)));
      keep[r] = e[0];
      take[r] = e[1];
      sum[r] = sum[r] * keep[r] + chunk_sum * take[r];
      top[r] = merged;
    }
    values<Kv, NL>(t, p, dim, begin, end, part);
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
