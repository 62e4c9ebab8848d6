// Paged attention of up to 8 query vectors over one KV head. K of a block lies as [dim / step][16 tokens][step], V as
// [16 / step][dim][step], step inputs of one dot instruction being neighbours (2 for bf16, 1 for f32).
// Chunks of 256 tokens are computed on their own and merged in ascending order (Milakov & Gimelshein, 2018).

//
// A cache precision says how it stores a token, how queries and weights are converted for its dot product, and how sums
// become floats again. `Lane` is what it remembers of a query.

template <class T>
struct KvPlain {  // bf16 and f32: the dot product accumulates floats
  using Acc = vf;
  struct Lane {};
  static constexpr int kPlanes = 1;
  static inline Acc start(const Lane&) { return zero(); }
  static inline vf score(Acc a, const Lane&, const uint8_t*, int) { return a; }
  static inline vf total(const Acc* planes, size_t, float) { return planes[0]; }
};

struct KvBf16 : KvPlain<uint16_t> {
  static constexpr int kStep = 2;
  static constexpr size_t kElement = 2;
  static inline vf dot(vf a, const uint8_t* kv, const uint8_t* x) { return dot_bf16(a, load_w(kv), broadcast4(x)); }
  static inline vf weigh(vf a, const uint8_t* kv, const uint8_t* x) { return dot(a, kv, x); }
  static inline Lane query(const float* from, uint8_t* to, int n) {
    for (int i = 0; i < n; i += 16) store_bf16((uint16_t*)to + i, load(from + i));
    return {};
  }
  static inline float spread(const AttentionTile&, int, const float* from, uint8_t* to, int n) {
    query(from, to, n);
    return 1.0f;
  }
};

struct KvF32 : KvPlain<float> {
  static constexpr int kStep = 1;
  static constexpr size_t kElement = 4;
  static inline vf dot(vf a, const uint8_t* kv, const uint8_t* x) {
    float b;
    std::memcpy(&b, x, 4);
    return fma(load((const float*)kv), set1(b), a);
  }
  static inline vf weigh(vf a, const uint8_t* kv, const uint8_t* x) { return dot(a, kv, x); }
  static inline Lane query(const float* from, uint8_t* to, int n) {
    std::memcpy(to, from, n * sizeof(float));
    return {};
  }
  static inline float spread(const AttentionTile&, int, const float* from, uint8_t* to, int n) {
    query(from, to, n);
    return 1.0f;
  }
};

// Blocks outside every window may be missing; their scores are masked, so any block serves.
inline const uint8_t* block_of(const AttentionTile& t, const uint8_t* base, int index) {
  const int block = t.blocks[index];
  return base + static_cast<size_t>(block < 0 ? 0 : block) * t.block_stride;
}

// int8 with one float scale for each token and head, behind the 16 tokens of the block. K is stored with a bias of 128,
// queries are int8. The softmax weights, times V's scales, have 14 bits in two planes of 7.
struct KvInt8 {
  using Acc = vi;
  struct Lane {
    float scale;
    int32_t zero;
  };
  static constexpr int kStep = 4, kPlanes = 2;
  static constexpr size_t kElement = 1;
  static inline const float* scales(const uint8_t* block, int dim) { return (const float*)(block + 16 * static_cast<size_t>(dim)); }
  static inline Acc start(const Lane& lane) { return set1i(lane.zero); }
  static inline vi dot(vi a, const uint8_t* kv, const uint8_t* x) { return dot_biased(a, load_w(kv), broadcast4(x)); }
  static inline vi weigh(vi a, const uint8_t* kv, const uint8_t* x) { return dot_left(a, broadcast4(x), load_w(kv)); }
  static inline vf score(vi a, const Lane& lane, const uint8_t* block, int dim) {
    return mul(to_float(a), mul(load(scales(block, dim)), set1(lane.scale)));
  }
  static inline vf total(const Acc* planes, size_t next, float scale) {
    return mul(fma(to_float(planes[0]), set1(128.0f), to_float(planes[next])), set1(scale));
  }
  static inline Lane query(const float* from, uint8_t* to, int n) {
    vf top = zero();
    for (int i = 0; i < n; i += 16) top = max(top, abs(load(from + i)));
    const float most = hmax(top), scale = most / 127.0f;
    const vf inverse = set1(scale > 0.0f ? 127.0f / most : 0.0f);
    vi sum = zeroi();
    for (int i = 0; i < n; i += 16) {
      const vi q = round_int(mul(load(from + i), inverse));
      store_i8((int8_t*)to + i, q);
      sum = addi(sum, q);
    }
    return {scale, kBias8 * hsumi(sum)};
  }
  static inline float spread(const AttentionTile& t, int begin, float* from, uint8_t* to, int n) {
    const int dim = round_up(t.head_dim, 16);
    vf top = zero();
    for (int i = 0; i < n; i += kBlock) {
      const vf w = mul(load(from + i), load(scales(block_of(t, t.v, (begin + i) / kBlock), dim)));
      store(from + i, w);
      top = max(top, w);
    }
    const float most = hmax(top), scale = most / 16383.0f;
    const vf inverse = set1(scale > 0.0f ? 16383.0f / most : 0.0f);
    for (int i = 0; i < n; i += kBlock) {
      const vf w = mul(load(from + i), inverse);
      const vf high = round_even(mul(sub(w, set1(63.5f)), set1(1.0f / 128.0f)));
      store_i8((int8_t*)to + i, round_int(high));
      store_i8((int8_t*)to + kChunk + i, round_int(max(min(fma(high, set1(-128.0f), w), set1(127.0f)), zero())));
    }
    return scale;
  }
};

constexpr float kMasked = -1e30f;

struct LaneRange {
  int low[kLanes], high[kLanes];  // positions that a lane sees
};

// Scores of NB blocks from position `base` on. Queries are interleaved: step i of lane r at (i · NL + r).
template <class Kv, int NL, int NB>
inline __attribute__((always_inline)) void scores_of(const AttentionTile& t, const uint8_t* q, const typename Kv::Lane* lanes,
                                                     const LaneRange& range, int base, int last_block, float* s, vf (&best)[NL]) {
  constexpr size_t kVector = 16 * Kv::kStep * Kv::kElement, kPair = Kv::kStep * Kv::kElement;
  const int dim = round_up(t.head_dim, 16), steps = (t.head_dim + Kv::kStep - 1) / Kv::kStep, first = base / kBlock;
  const uint8_t *k[NB], *ahead[NB];
  typename Kv::Acc acc[NB][NL];
#pragma GCC unroll 2
  for (int n = 0; n < NB; n++) {
    k[n] = block_of(t, t.k, first + n);
    ahead[n] = block_of(t, t.k, first + n + NB <= last_block ? first + n + NB : first + n);
#pragma GCC unroll 8
    for (int r = 0; r < NL; r++) acc[n][r] = Kv::start(lanes[r]);
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
      vf v = Kv::score(acc[n][r], lanes[r], k[n], dim);
      if (t.softcap > 0.0f) v = mul(set1(t.softcap), tanh(div(v, set1(t.softcap))));
      if (at < range.low[r] || at + kBlock - 1 > range.high[r] || missing)
        v = keep_range(v, at, missing ? at + kBlock : range.low[r], range.high[r], set1(kMasked));
      best[r] = max(best[r], v);
      store(s + r * kChunk + n * kBlock, v);
    }
  }
}

template <class Kv, int NL>
inline void scores(const AttentionTile& t, const uint8_t* q, const typename Kv::Lane* lanes, const LaneRange& range, int begin,
                   int end, float* s, float* top) {
  vf best[NL];
  for (int r = 0; r < NL; r++) best[r] = set1(kMasked);
  const int last_block = (end - 1) / kBlock;
  int base = begin;
  for (; base + 2 * kBlock <= end; base += 2 * kBlock) scores_of<Kv, NL, 2>(t, q, lanes, range, base, last_block, s + base - begin, best);
  if (base < end) scores_of<Kv, NL, 1>(t, q, lanes, range, base, last_block, s + base - begin, best);
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
inline void values_of(const AttentionTile& t, const uint8_t* p, const float* spread, int dim0, int dim, int begin, int end, float* out) {
  constexpr size_t kPair = Kv::kStep * Kv::kElement, kVector = 16 * kPair, kPlane = kChunk * Kv::kElement, kLine = Kv::kPlanes * kPlane;
  typename Kv::Acc acc[Kv::kPlanes][NL][ND];
#pragma GCC unroll 8
  for (int r = 0; r < NL; r++)
#pragma GCC unroll 4
    for (int j = 0; j < ND; j++)
      for (int plane = 0; plane < Kv::kPlanes; plane++) acc[plane][r][j] = typename Kv::Acc{};
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
        for (int j = 0; j < ND; j++)
#pragma GCC unroll 2
          for (int plane = 0; plane < Kv::kPlanes; plane++)
            acc[plane][r][j] = Kv::weigh(acc[plane][r][j], v + j * kVector, w + r * kLine + plane * kPlane + i * kPair);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < NL; r++)
#pragma GCC unroll 4
    for (int j = 0; j < ND; j++) store(out + r * dim + dim0 + j * 16, Kv::total(&acc[0][r][j], NL * ND, spread[r]));
}

template <class Kv, int NL>
inline void values(const AttentionTile& t, const uint8_t* p, const float* spread, int dim, int begin, int end, float* out) {
  constexpr int kWide = (NL <= 4 ? 4 : 2) / Kv::kPlanes;
  int d = 0;
  for (; d + kWide * 16 <= dim; d += kWide * 16) values_of<Kv, NL, kWide>(t, p, spread, d, dim, begin, end, out);
  for (; d < dim; d += 16) values_of<Kv, NL, 1>(t, p, spread, d, dim, begin, end, out);
}

template <class Kv, int NL>
void attend(const AttentionTile& t) {
  const int dim = round_up(t.head_dim, 16);
  float* s = t.scratch;                                             // [lanes][kChunk]
  uint8_t* p = (uint8_t*)(s + kLanes * kChunk);                     // [lanes][kChunk], converted
  uint8_t* q = (uint8_t*)(s + 2 * kLanes * kChunk);                 // [lanes][dim], converted
  float* part = s + 2 * kLanes * kChunk + kLanes * dim;             // [lanes][dim]
  float* total = part + kLanes * dim;                               // [lanes][dim]
  constexpr size_t kPair = Kv::kStep * Kv::kElement, kLine = Kv::kPlanes * kChunk * Kv::kElement;
  LaneRange range;
  typename Kv::Lane lanes[NL];
  float top[NL], sum[NL];
  int first = t.position[0], last = t.position[0];
  for (int r = 0; r < NL; r++) {
    for (int i = 0; i < dim; i++) part[i] = i < t.head_dim ? t.q[r][i] * t.scale : 0.0f;
    lanes[r] = Kv::query(part, (uint8_t*)total, dim);
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
    scores<Kv, NL>(t, q, lanes, range, begin, end, s, chunk_top);
    float keep[NL], take[NL], spread[NL];
    for (int r = 0; r < NL; r++) {
      const float chunk_sum = weights(s + r * kChunk, end - begin, chunk_top[r]);
      spread[r] = Kv::spread(t, begin, s + r * kChunk, p + r * kLine, end - begin);
      const float merged = chunk_top[r] > top[r] ? chunk_top[r] : top[r];
      alignas(64) float e[16] = {top[r] - merged, chunk_top[r] - merged};
      store(e, exp(load(e)));
      keep[r] = e[0];
      take[r] = e[1];
      sum[r] = sum[r] * keep[r] + chunk_sum * take[r];
      top[r] = merged;
    }
    values<Kv, NL>(t, p, spread, dim, begin, end, part);
    for (int r = 0; r < NL; r++)
      for (int i = r * dim; i < (r + 1) * dim; i += 16)
        store(total + i, fma(load(part + i), set1(take[r]), mul(load(total + i), set1(keep[r]))));
  }
  for (int r = 0; r < NL; r++) {
    const vf inverse = set1(sum[r] > 0.0f ? 1.0f / sum[r] : 0.0f);
    for (int i = 0; i < dim; i += 16) store(t.out[r] + i, mul(load(total + r * dim + i), inverse));
  }
}

// The lanes [first, first + NL) of a tile.
template <class Kv, int NL>
void attend_some(const AttentionTile& all, int first) {
  AttentionTile t = all;
  for (int r = 0; r < NL; r++) {
    t.q[r] = all.q[first + r];
    t.out[r] = all.out[first + r];
    t.position[r] = all.position[first + r];
  }
  attend<Kv, NL>(t);
}

// Lanes in sizes that are compiled: 8, 4, 3, 2, 1, as far as the instruction set has registers for them.
template <class Kv>
void attend_all(const AttentionTile& t) {
  for (int first = 0; first < t.lanes;) {
    const int left = t.lanes - first;
    if constexpr (kLaneTile >= 8) {
      if (left >= 8) {
        attend_some<Kv, 8>(t, first);
        first += 8;
        continue;
      }
      if (left == 4 || left > 5) {
        attend_some<Kv, 4>(t, first);
        first += 4;
        continue;
      }
      if (left == 3 || left == 5) {
        attend_some<Kv, 3>(t, first);
        first += 3;
        continue;
      }
    }
    if constexpr (kLaneTile >= 2) {
      if (left >= 2) {
        attend_some<Kv, 2>(t, first);
        first += 2;
        continue;
      }
    }
    attend_some<Kv, 1>(t, first);
    first += 1;
  }
}

inline void attention(KvFormat format, const AttentionTile& tile) {
  switch (format) {
    case KvFormat::BF16: return attend_all<KvBf16>(tile);
    case KvFormat::F32: return attend_all<KvF32>(tile);
    case KvFormat::INT8: return attend_all<KvInt8>(tile);
  }
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

inline float int8_scale(const float* x, int n) {
  float top = 0.0f;
  for (int i = 0; i < n; i++) top = std::fmax(top, std::fabs(finite(x[i])));
  return top / 127.0f;
}

inline void write_int8(const float* k, const float* v, int n, int slot, uint8_t* k_block, uint8_t* v_block) {
  const int dim = round_up(n, 16);
  const float k_scale = int8_scale(k, n), v_scale = int8_scale(v, n);
  const float k_inverse = k_scale > 0.0f ? 1.0f / k_scale : 0.0f, v_inverse = v_scale > 0.0f ? 1.0f / v_scale : 0.0f;
  for (int i = 0; i < n; i++) {
    const float kq = std::nearbyint(finite(k[i]) * k_inverse), vq = std::nearbyint(finite(v[i]) * v_inverse);
    k_block[i / 4 * 64 + slot * 4 + i % 4] = static_cast<uint8_t>(static_cast<int>(kq) + 128);
    v_block[(slot / 4) * dim * 4 + i * 4 + slot % 4] = static_cast<uint8_t>(static_cast<int>(vq));
  }
  std::memcpy(k_block + 16 * dim + slot * 4, &k_scale, 4);
  std::memcpy(v_block + 16 * dim + slot * 4, &v_scale, 4);
}

inline void write_kv(KvFormat format, const float* k, const float* v, int n, int slot, uint8_t* k_block, uint8_t* v_block) {
  switch (format) {
    case KvFormat::BF16: return write_token<uint16_t, 2>(k, v, n, slot, k_block, v_block, float_to_bf16);
    case KvFormat::F32: return write_token<float, 1>(k, v, n, slot, k_block, v_block, [](float x) { return x; });
    case KvFormat::INT8: return write_int8(k, v, n, slot, k_block, v_block);
  }
}
