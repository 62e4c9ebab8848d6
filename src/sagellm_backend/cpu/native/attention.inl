// Paged attention of up to 32 query vectors over one KV head. Chunks of 256 tokens are computed on their own and merged in
// ascending order (Milakov & Gimelshein, 2018); a chunk serves all queries before the next is read.

constexpr float kMasked = -1e30f;
constexpr int kFew = 4;  // lanes of a decoding sequence: K and V come from far, and are fetched together

// What is known of the queries so far. The sums of values lie where the results will be.
template <class Kv>
struct AttentionState {
  const AttentionTile& t;
  int dim;                                        // head_dim rounded up to 16
  uint8_t* q;                                     // of the lanes [first, first + NL) from first · dim on: [dim / 16][NL][16]
  float* s;                                       // [8][kChunk]
  uint8_t* p;                                     // [8][kChunk], converted weights
  typename Kv::Lane lanes[kLanes];
  int low[kLanes], high[kLanes];                  // positions that a lane sees
  float top[kLanes], sum[kLanes];
};

// Scores of NB blocks from position `base` on.
template <class Kv, int NL, int NB>
inline __attribute__((always_inline)) void scores_of(const AttentionState<Kv>& a, int first, int base, int last_block, float* s,
                                                     vf (&best)[NL]) {
  constexpr size_t kPair = Kv::kStep * Kv::kElement, kVector = 16 * kPair, kPiece = 16 * Kv::kElement;
  constexpr int kSteps = 16 / Kv::kStep;
  const AttentionTile& t = a.t;
  const int block = base / kBlock;
  const uint8_t *k[NB], *ahead[NB], *v[NB];
  typename Kv::Acc acc[NB][NL];
#pragma GCC unroll 2
  for (int n = 0; n < NB; n++) {
    k[n] = block_of(t, t.k, block + n);
    v[n] = block_of(t, t.v, block + n);
    ahead[n] = block_of(t, t.k, block + n + NB <= last_block ? block + n + NB : block + n);
#pragma GCC unroll 8
    for (int r = 0; r < NL; r++) acc[n][r] = Kv::start(a.lanes[first + r]);
  }
  const uint8_t* q = a.q + static_cast<size_t>(first) * a.dim * Kv::kElement;
  size_t at = 0;
  for (int piece = 0; piece < a.dim; piece += 16, q += NL * kPiece) {
#pragma GCC unroll 16
    for (int i = 0; i < kSteps; i++, at += kVector) {
#pragma GCC unroll 2
      for (int n = 0; n < NB; n++) {
        __builtin_prefetch(ahead[n] + at);
        if (NL <= kFew) __builtin_prefetch(v[n] + at);
      }
#pragma GCC unroll 8
      for (int r = 0; r < NL; r++)
#pragma GCC unroll 2
        for (int n = 0; n < NB; n++) acc[n][r] = Kv::dot(acc[n][r], k[n] + at, q + r * kPiece + i * kPair);
    }
  }
#pragma GCC unroll 2
  for (int n = 0; n < NB; n++) {
    const int from = base + n * kBlock;
    const bool missing = t.blocks[block + n] < 0;
    const bool all = from >= a.low[first + NL - 1] && from + kBlock - 1 <= a.high[first] && !missing;
#pragma GCC unroll 8
    for (int r = 0; r < NL; r++) {
      vf x = Kv::score(acc[n][r], a.lanes[first + r], k[n], a.dim);
      if (t.softcap > 0.0f) {
        const vf cap = set1(t.softcap);
        x = mul(cap, tanh(div(x, cap)));
      }
      if (!all) x = keep_range(x, from, missing ? from + kBlock : a.low[first + r], a.high[first + r], set1(kMasked));
      best[r] = max(best[r], x);
      store(s + r * kChunk + n * kBlock, x);
    }
  }
}

template <class Kv, int NL>
inline void scores(const AttentionState<Kv>& a, int first, int begin, int end, float* top) {
  vf best[NL];
  for (int r = 0; r < NL; r++) best[r] = set1(kMasked);
  const int last_block = (end - 1) / kBlock;
  int base = begin;
  for (; base + 2 * kBlock <= end; base += 2 * kBlock) scores_of<Kv, NL, 2>(a, first, base, last_block, a.s + base - begin, best);
  if (base < end) scores_of<Kv, NL, 1>(a, first, base, last_block, a.s + base - begin, best);
  for (int r = 0; r < NL; r++) top[r] = hmax(best[r]);
}

// What becomes of a lane when a chunk is merged: out = keep · out + take · chunk.
template <int NL>
struct Merge {
  float factor[NL], keep[NL], take[NL];
};

// ND · 16 dimensions of values, from dim0 on.
template <class Kv, int NL, int ND>
inline void values_of(const AttentionState<Kv>& a, int first, const Merge<NL>& merge, int dim0, int begin, int end) {
  constexpr size_t kPair = Kv::kStep * Kv::kElement, kVector = 16 * kPair, kPlane = kChunk * Kv::kElement, kLine = Kv::kPlanes * kPlane;
  const AttentionTile& t = a.t;
  typename Kv::Acc acc[Kv::kPlanes][NL][ND];
#pragma GCC unroll 8
  for (int r = 0; r < NL; r++)
#pragma GCC unroll 4
    for (int j = 0; j < ND; j++)
#pragma GCC unroll 2
      for (int plane = 0; plane < Kv::kPlanes; plane++) acc[plane][r][j] = typename Kv::Acc{};
  const int last_block = (end - 1) / kBlock;
  const size_t row = a.dim * kPair;
  for (int b = begin / kBlock; b <= last_block; b++) {
    const uint8_t* v = block_of(t, t.v, b) + dim0 * kPair;
    const uint8_t* ahead = block_of(t, t.v, b < last_block ? b + 1 : b) + dim0 * kPair;
    const uint8_t* w = a.p + (b * kBlock - begin) * Kv::kElement;
#pragma GCC unroll 2
    for (int i = 0; i < kBlock / Kv::kStep; i++, v += row, ahead += row) {
#pragma GCC unroll 4
      for (int j = 0; j < ND && NL > kFew; j++) __builtin_prefetch(ahead + j * kVector);
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
  for (int r = 0; r < NL; r++) {
    float* out = t.out[first + r] + dim0;
    const vf keep = set1(merge.keep[r]), take = set1(merge.take[r]);
#pragma GCC unroll 4
    for (int j = 0; j < ND; j++)
      store(out + j * 16, fma(Kv::total(&acc[0][r][j], NL * ND, merge.factor[r]), take, mul(load(out + j * 16), keep)));
  }
}

template <class Kv, int NL>
inline void values(const AttentionState<Kv>& a, int first, const Merge<NL>& merge, int begin, int end) {
  constexpr int kWide = kSums / NL / Kv::kPlanes >= 4 ? 4 : kSums / NL / Kv::kPlanes >= 2 ? 2 : 1;
  int d = 0;
  for (; d + kWide * 16 <= a.dim; d += kWide * 16) values_of<Kv, NL, kWide>(a, first, merge, d, begin, end);
  for (; d < a.dim; d += 16) values_of<Kv, NL, 1>(a, first, merge, d, begin, end);
}

// The chunk from `begin` on, for the lanes [first, first + NL). Masked tokens add exact zeros, so it does not matter which
// lanes share a tile, nor how much of a chunk the others see.
template <class Kv, int NL>
void attend_chunk(AttentionState<Kv>& a, int first, int begin) {
  const int last = a.high[first + NL - 1];  // positions ascend
  if (begin > last || begin + kChunk <= a.low[first]) return;
  const int end = begin + kChunk <= last ? begin + kChunk : round_up(last + 1, kBlock);
  float tops[NL], sums[NL];
  scores<Kv, NL>(a, first, begin, end, tops);
  Merge<NL> merge;
  alignas(64) float e[2 * NL < 16 ? 16 : 2 * NL] = {};
  for (int r = 0; r < NL; r++) {
    float& top = a.top[first + r];
    const float from = tops[r] > 0.5f * kMasked ? tops[r] : 0.0f;  // all masked: every weight is 0
    const Spread spread = Kv::weights(a.t, begin, a.s + r * kChunk, end - begin, from, a.p + r * kChunk * Kv::kPlanes * Kv::kElement);
    const float merged = tops[r] > top ? tops[r] : top;
    e[r] = (top - merged) * kLog2e;
    e[NL + r] = (tops[r] - merged) * kLog2e;
    top = merged;
    sums[r] = spread.sum;
    merge.factor[r] = spread.factor;
  }
  store(e, exp2(load(e)));
  for (int r = 0; r < NL; r++) {
    merge.keep[r] = e[r];
    merge.take[r] = e[NL + r];
    a.sum[first + r] = a.sum[first + r] * e[r] + sums[r] * e[NL + r];
  }
  values<Kv, NL>(a, first, merge, begin, end);
}

template <class Kv, int NL>
void attend_begin(AttentionState<Kv>& a, int first) {
  constexpr size_t kPiece = 16 * Kv::kElement;
  const AttentionTile& t = a.t;
  uint8_t* q = a.q + static_cast<size_t>(first) * a.dim * Kv::kElement;
  const vf scale = set1(t.scale);
  for (int r = first; r < first + NL; r++, q += kPiece) {
    float* scaled = t.out[r];
    int i = 0;
    for (; i + 16 <= t.head_dim; i += 16) store(scaled + i, mul(load(t.q[r] + i), scale));
    for (; i < a.dim; i++) scaled[i] = i < t.head_dim ? t.q[r][i] * t.scale : 0.0f;
    a.lanes[r] = Kv::query(scaled, q, NL * kPiece, a.dim);
    for (i = 0; i < a.dim; i += 16) store(t.out[r] + i, zero());
    a.high[r] = t.position[r];
    a.low[r] = t.window > 0 && t.position[r] >= t.window ? t.position[r] - t.window + 1 : 0;
    a.top[r] = kMasked;
    a.sum[r] = 0.0f;
  }
}

// Call f<NL>(first) for groups of lanes in sizes that are compiled: 8, 4, 3, 2, 1, as far as the instruction set has registers.
template <class F>
inline void in_groups(int lanes, F&& f) {
  for (int first = 0; first < lanes;) {
    const int left = lanes - first;
    if (kLaneTile >= 8 && left >= 8) {
      if constexpr (kLaneTile >= 8) f.template operator()<8>(first);
      first += 8;
    } else if (kLaneTile >= 4 && (left == 4 || left > 5)) {
      if constexpr (kLaneTile >= 4) f.template operator()<4>(first);
      first += 4;
    } else if (kLaneTile >= 3 && left >= 3) {
      if constexpr (kLaneTile >= 3) f.template operator()<3>(first);
      first += 3;
    } else if (kLaneTile >= 2 && left >= 2) {
      if constexpr (kLaneTile >= 2) f.template operator()<2>(first);
      first += 2;
    } else {
      f.template operator()<1>(first);
      first += 1;
    }
  }
}

template <class Kv>
void attend(const AttentionTile& t) {
  const int dim = round_up(t.head_dim, 16);
  float* s = t.scratch;
  AttentionState<Kv> a{t, dim, (uint8_t*)(s + 2 * kTile * kChunk), s, (uint8_t*)(s + kTile * kChunk), {}, {}, {}, {}, {}};
  in_groups(t.lanes, [&]<int NL>(int first) { attend_begin<Kv, NL>(a, first); });
  const int last = a.high[t.lanes - 1];
  for (int begin = a.low[0] / kChunk * kChunk; begin <= last; begin += kChunk)
    in_groups(t.lanes, [&]<int NL>(int first) { attend_chunk<Kv, NL>(a, first, begin); });
  for (int r = 0; r < t.lanes; r++) {
    const vf inverse = set1(a.sum[r] > 0.0f ? 1.0f / a.sum[r] : 0.0f);
    for (int i = 0; i < dim; i += 16) store(t.out[r] + i, mul(load(t.out[r] + i), inverse));
  }
}

inline void attention(KvFormat format, const AttentionTile& tile) {
  switch (format) {
    case KvFormat::BF16: return attend<KvBf16>(tile);
    case KvFormat::F32: return attend<KvF32>(tile);
    case KvFormat::INT8: return attend<KvInt8>(tile);
  }
}
