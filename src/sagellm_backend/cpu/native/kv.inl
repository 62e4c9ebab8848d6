// Precisions of the KV cache. K of a block lies as [dim / step][16 tokens][step], V as [16 / step][dim][step], step inputs of
// one dot instruction being neighbours (2 for bf16, 4 for int8, 1 for f32).
//
// A precision says how it stores a token, how queries and softmax weights are converted for its dot product, and how sums
// become floats again. `Lane` is what it remembers of a query. Converted queries are pieces of 16 dimensions, `apart` bytes
// from piece to piece.

// Softmax weights of a lane in a chunk: their sum, and the factor that the converted ones lack.
struct Spread {
  float sum, factor;
};

template <class T>
struct KvPlain {  // bf16 and f32: the dot product accumulates floats
  using Acc = vf;
  struct Lane {};
  static constexpr int kPlanes = 1;
  static constexpr size_t kElement = sizeof(T);
  static inline Acc start(const Lane&) { return zero(); }
  static inline vf score(Acc a, const Lane&, const uint8_t*, int) { return a; }
  static inline vf total(const Acc* planes, size_t, float) { return planes[0]; }
  static inline void put(T* to, vf x) {
    if constexpr (kElement == 2)
      store_bf16(to, x);
    else
      store(to, x);
  }
  static inline Lane query(const float* from, uint8_t* to, size_t apart, int dim) {
    for (int i = 0; i < dim; i += 16, to += apart) put((T*)to, load(from + i));
    return {};
  }
  static inline Spread weights(const AttentionTile&, int, float* s, int n, float top, uint8_t* to) {
    vf sum = zero();
    const vf down = set1(-top * kLog2e);
    for (int i = 0; i < n; i += 16) {
      const vf e = exp2(fma(load(s + i), set1(kLog2e), down));
      sum = add(sum, e);
      put((T*)to + i, e);
    }
    return {hsum(sum), 1.0f};
  }
};

struct KvBf16 : KvPlain<uint16_t> {
  static constexpr int kStep = 2;
  static inline vf dot(vf a, const uint8_t* kv, const uint8_t* x) { return dot_bf16(a, load_w(kv), broadcast4(x)); }
  static inline vf weigh(vf a, const uint8_t* kv, const uint8_t* x) { return dot(a, kv, x); }
};

struct KvF32 : KvPlain<float> {
  static constexpr int kStep = 1;
  static inline vf dot(vf a, const uint8_t* kv, const uint8_t* x) {
    float b;
    std::memcpy(&b, x, 4);
    return fma(load((const float*)kv), set1(b), a);
  }
  static inline vf weigh(vf a, const uint8_t* kv, const uint8_t* x) { return dot(a, kv, x); }
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
  static inline vf total(const Acc* planes, size_t next, float factor) {
    return mul(fma(to_float(planes[0]), set1(128.0f), to_float(planes[next])), set1(factor));
  }
  static inline Lane query(const float* from, uint8_t* to, size_t apart, int dim) {
    vf top = zero();
    for (int i = 0; i < dim; i += 16) top = max(top, abs(load(from + i)));
    const float most = hmax(top), scale = most / 127.0f;
    const vf inverse = set1(scale > 0.0f ? 127.0f / most : 0.0f);
    vi sum = zeroi();
    for (int i = 0; i < dim; i += 16, to += apart) {
      const vi q = round_int(mul(load(from + i), inverse));
      store_i8((int8_t*)to, q);
      sum = addi(sum, q);
    }
    return {scale, kBias8 * hsumi(sum)};
  }
  static inline Spread weights(const AttentionTile& t, int begin, float* s, int n, float top, uint8_t* to) {
    const int dim = round_up(t.head_dim, 16);
    vf sum = zero(), most = zero();
    const vf down = set1(-top * kLog2e);
    for (int i = 0; i < n; i += kBlock) {
      const vf e = exp2(fma(load(s + i), set1(kLog2e), down));
      sum = add(sum, e);
      const vf w = mul(e, load(scales(block_of(t, t.v, (begin + i) / kBlock), dim)));
      store(s + i, w);
      most = max(most, w);
    }
    const float peak = hmax(most), factor = peak / 16383.0f;
    const vf inverse = set1(factor > 0.0f ? 16383.0f / peak : 0.0f);
    for (int i = 0; i < n; i += kBlock) {
      const vf w = mul(load(s + i), inverse);
      const vf high = round_even(mul(sub(w, set1(63.5f)), set1(1.0f / 128.0f)));
      store_i8((int8_t*)to + i, round_int(high));
      store_i8((int8_t*)to + kChunk + i, round_int(max(min(fma(high, set1(-128.0f), w), set1(127.0f)), zero())));
    }
    return {hsum(sum), factor};
  }
};

// Values that are not finite would reach other sequences through a reused block (0 · inf): the cache holds finite ones only.
inline vf finite(vf x) {
  const vf most = set1(3.3e38f);
  return choose_less(set1(-1.0f), abs(x), max(min(x, most), sub(zero(), most)), zero());  // a NaN is less than nothing
}

// 16 values of a head, fewer at its end.
inline vf load_some(const float* x, int n) {
  if (n >= 16) return finite(load(x));
  alignas(64) float padded[16] = {};
  std::memcpy(padded, x, n * sizeof(float));
  return finite(load(padded));
}

template <class T, int kStep>
inline void write_token(const float* k, const float* v, int n, int slot, uint8_t* k_block, uint8_t* v_block) {
  const int dim = round_up(n, 16);
  T* kt = (T*)k_block + slot * kStep;
  T* vt = (T*)v_block + (slot / kStep) * dim * kStep + slot % kStep;
  alignas(64) T piece[16];
  for (int i = 0; i < n; i += 16, kt += 256, vt += 16 * kStep) {
    KvPlain<T>::put(piece, load_some(k + i, n - i));
    for (int j = 0; j < 16 / kStep; j++) std::memcpy(kt + j * 16 * kStep, piece + j * kStep, kStep * sizeof(T));
    KvPlain<T>::put(piece, load_some(v + i, n - i));
    for (int j = 0; j < 16; j++) vt[j * kStep] = piece[j];
  }
}

inline float int8_scale(const float* x, int n) {
  vf top = zero();
  for (int i = 0; i < n; i += 16) top = max(top, abs(load_some(x + i, n - i)));
  return hmax(top) / 127.0f;
}

inline void write_int8(const float* k, const float* v, int n, int slot, uint8_t* k_block, uint8_t* v_block) {
  const int dim = round_up(n, 16);
  const float k_scale = int8_scale(k, n), v_scale = int8_scale(v, n);
  const vf k_inverse = set1(k_scale > 0.0f ? 1.0f / k_scale : 0.0f), v_inverse = set1(v_scale > 0.0f ? 1.0f / v_scale : 0.0f);
  alignas(64) int8_t piece[16];
  for (int i = 0; i < n; i += 16) {
    store_i8(piece, round_int(mul(load_some(k + i, n - i), k_inverse)));
    for (int j = 0; j < 16; j++) k_block[(i + j) / 4 * 64 + slot * 4 + j % 4] = static_cast<uint8_t>(piece[j] + 128);
    store_i8(piece, round_int(mul(load_some(v + i, n - i), v_inverse)));
    for (int j = 0; j < 16; j++) v_block[(slot / 4) * dim * 4 + (i + j) * 4 + slot % 4] = static_cast<uint8_t>(piece[j]);
  }
  std::memcpy(k_block + 16 * dim + slot * 4, &k_scale, 4);
  std::memcpy(v_block + 16 * dim + slot * 4, &v_scale, 4);
}

inline void write_kv(KvFormat format, const float* k, const float* v, int n, int slot, uint8_t* k_block, uint8_t* v_block) {
  switch (format) {
    case KvFormat::BF16: return write_token<uint16_t, 2>(k, v, n, slot, k_block, v_block);
    case KvFormat::F32: return write_token<float, 1>(k, v, n, slot, k_block, v_block);
    case KvFormat::INT8: return write_int8(k, v, n, slot, k_block, v_block);
  }
}
