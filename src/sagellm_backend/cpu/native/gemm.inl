// Rows of activations times one panel of 32 packed outputs. Every row count runs the same sequence of operations for each
// output (groups of inputs in ascending order), so a row's result does not depend on how many rows there are.

template <bool kMin>
struct Q4Step {
  static constexpr size_t kHead = kMin ? 128 : 64;
  static constexpr size_t kBytes = kHead + 512;
  template <int NR>
  static inline __attribute__((always_inline)) void dot(const uint8_t* w, const int8_t* x, size_t ld, vi (&a)[NR][2]) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const vw w0 = load_w(w + i * 128), w1 = load_w(w + i * 128 + 64);
      const vw l0 = low_nibbles(w0), l1 = low_nibbles(w1);
#pragma GCC unroll 8
      for (int r = 0; r < NR; r++) {
        const vx b = broadcast4(x + r * ld + i * 8);
        a[r][0] = dot_small(a[r][0], l0, b);
        a[r][1] = dot_small(a[r][1], l1, b);
      }
      const vw h0 = high_nibbles(w0), h1 = high_nibbles(w1);
#pragma GCC unroll 8
      for (int r = 0; r < NR; r++) {
        const vx b = broadcast4(x + r * ld + i * 8 + 4);
        a[r][0] = dot_small(a[r][0], h0, b);
        a[r][1] = dot_small(a[r][1], h1, b);
      }
    }
  }
  static inline vi start(const GroupMeta& m) { return kMin ? zeroi() : set1i(m.zero4); }
};

template <bool kMin>
struct Q8Step {
  static constexpr size_t kHead = kMin ? 128 : 64;
  static constexpr size_t kBytes = kHead + 1024;
  template <int NR>
  static inline __attribute__((always_inline)) void dot(const uint8_t* w, const int8_t* x, size_t ld, vi (&a)[NR][2]) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      const vw w0 = load_w(w + i * 128), w1 = load_w(w + i * 128 + 64);
#pragma GCC unroll 8
      for (int r = 0; r < NR; r++) {
        const vx b = broadcast4(x + r * ld + i * 4);
        a[r][0] = kMin ? dot_small(a[r][0], w0, b) : dot_biased(a[r][0], w0, b);
        a[r][1] = kMin ? dot_small(a[r][1], w1, b) : dot_biased(a[r][1], w1, b);
      }
    }
  }
  static inline vi start(const GroupMeta& m) { return kMin ? zeroi() : set1i(m.zero8); }
};

constexpr size_t kPrefetch = 4096;  // bytes ahead of the weights' stream

// Cache lines that a tile fetches of the panel behind, while it computes, with each group: so many tiles that follow each other
// on one panel hide the reading of the next. None but the stream's own where `lines` is 0, nothing at all where it is negative.
struct Ahead {
  const uint8_t* at;
  int lines;
};

template <size_t kBytes>
inline __attribute__((always_inline)) void prefetch(const uint8_t* w) {
#pragma GCC unroll 20
  for (size_t i = 0; i < kBytes; i += 64) __builtin_prefetch(w + kPrefetch + i);
}

template <class Step, bool kMin, int NR>
inline __attribute__((always_inline)) void tile_int(const Packed& p, const uint8_t* w, const Activations& x, int row, Ahead ahead,
                                                    vf (&acc)[NR][2]) {
  const int8_t* q = x.q + row * x.ld;
  const GroupMeta* meta = x.meta + row * x.ld_meta;
  const int groups = p.groups();
  for (int g = 0; g < groups; g++, w += Step::kBytes, q += kGroup, meta++) {
    if (NR <= 2 || ahead.lines == 0) prefetch<Step::kBytes>(w);
    if constexpr (NR > 2)  // one or two rows are as fast as the stream, or the rest of others
      for (int i = 0; i < ahead.lines; i++, ahead.at += 64) __builtin_prefetch(ahead.at, 0, 2);
    vi a[NR][2];
#pragma GCC unroll 8
    for (int r = 0; r < NR; r++) a[r][0] = a[r][1] = Step::start(meta[r * x.ld_meta]);
    Step::template dot<NR>(w + Step::kHead, q, x.ld, a);
    const vf d0 = load_half((const uint16_t*)w), d1 = load_half((const uint16_t*)w + 16);
#pragma GCC unroll 8
    for (int r = 0; r < NR; r++) {
      const vf scale = set1(meta[r * x.ld_meta].scale);
      acc[r][0] = fma(to_float(a[r][0]), mul(d0, scale), acc[r][0]);
      acc[r][1] = fma(to_float(a[r][1]), mul(d1, scale), acc[r][1]);
    }
    if constexpr (kMin) {
      const vf m0 = load_half((const uint16_t*)w + 32), m1 = load_half((const uint16_t*)w + 48);
#pragma GCC unroll 8
      for (int r = 0; r < NR; r++) {
        const vf sum = set1(meta[r * x.ld_meta].scaled_sum);
        acc[r][0] = fma(m0, sum, acc[r][0]);
        acc[r][1] = fma(m1, sum, acc[r][1]);
      }
    }
  }
}

template <int NR>
inline __attribute__((always_inline)) void tile_bf16(const Packed& p, const uint8_t* w, const Activations& x, int row,
                                                     vf (&acc)[NR][2]) {
  const uint16_t* a = x.bf16 + row * x.ld;
  for (int k = 0; k < p.k; k += 2, w += 128, a += 2) {
    __builtin_prefetch(w + kPrefetch);
    __builtin_prefetch(w + kPrefetch + 64);
    const vw w0 = load_w(w), w1 = load_w(w + 64);
#pragma GCC unroll 12
    for (int r = 0; r < NR; r++) {
      const vx b = broadcast4(a + r * x.ld);
      acc[r][0] = dot_bf16(acc[r][0], w0, b);
      acc[r][1] = dot_bf16(acc[r][1], w1, b);
    }
  }
}

template <int NR>
inline __attribute__((always_inline)) void tile_f32(const Packed& p, const uint8_t* w, const Activations& x, int row,
                                                    vf (&acc)[NR][2]) {
  const float* a = x.f32 + row * x.ld;
  const float* f = (const float*)w;
  for (int k = 0; k < p.k; k++, f += kPanel) {
    __builtin_prefetch((const uint8_t*)f + kPrefetch);
    __builtin_prefetch((const uint8_t*)f + kPrefetch + 64);
    const vf w0 = load(f), w1 = load(f + 16);
#pragma GCC unroll 12
    for (int r = 0; r < NR; r++) {
      const vf b = set1(a[r * x.ld + k]);
      acc[r][0] = fma(w0, b, acc[r][0]);
      acc[r][1] = fma(w1, b, acc[r][1]);
    }
  }
}

struct Output {
  float* data;
  size_t ld;
  bool add;
  float factor;
};

template <WeightFormat F, int NR>
void tile(const Packed& p, const uint8_t* w, const Activations& x, int row, const Output& out, int out_row, Ahead ahead) {
  vf acc[NR][2];
#pragma GCC unroll 12
  for (int r = 0; r < NR; r++) acc[r][0] = acc[r][1] = zero();
  if constexpr (F == WeightFormat::Q4) tile_int<Q4Step<false>, false, NR>(p, w, x, row, ahead, acc);
  if constexpr (F == WeightFormat::Q4M) tile_int<Q4Step<true>, true, NR>(p, w, x, row, ahead, acc);
  if constexpr (F == WeightFormat::Q8) tile_int<Q8Step<false>, false, NR>(p, w, x, row, ahead, acc);
  if constexpr (F == WeightFormat::Q8M) tile_int<Q8Step<true>, true, NR>(p, w, x, row, ahead, acc);
  if constexpr (F == WeightFormat::BF16) tile_bf16<NR>(p, w, x, row, acc);
  if constexpr (F == WeightFormat::F32) tile_f32<NR>(p, w, x, row, acc);
  const vf factor = set1(out.factor);
#pragma GCC unroll 12
  for (int r = 0; r < NR; r++) {
    float* o = out.data + (out_row + r) * out.ld;
    if (out.add) {
      store(o, fma(acc[r][0], factor, load(o)));
      store(o + 16, fma(acc[r][1], factor, load(o + 16)));
    } else {
      store(o, acc[r][0]);
      store(o + 16, acc[r][1]);
    }
  }
}

template <WeightFormat F, int NR>
void tile_rest(int rows, const Packed& p, const uint8_t* w, const Activations& x, int row, const Output& out, int out_row, Ahead ahead) {
  if constexpr (NR > 0) {
    if (rows == NR)
      tile<F, NR>(p, w, x, row, out, out_row, ahead);
    else
      tile_rest<F, NR - 1>(rows, p, w, x, row, out, out_row, ahead);
  }
}

constexpr size_t group_size(WeightFormat format) {
  switch (format) {
    case WeightFormat::Q4: return Q4Step<false>::kBytes;
    case WeightFormat::Q4M: return Q4Step<true>::kBytes;
    case WeightFormat::Q8: return Q8Step<false>::kBytes;
    case WeightFormat::Q8M: return Q8Step<true>::kBytes;
    default: return 0;
  }
}

// Rows of a tile. Integer tiles need twice the registers of float ones: sums of a group, and of all groups.
constexpr int tile_rows(WeightFormat format) { return reads_int8(format) ? kRowTile : 2 * kRowTile; }

template <WeightFormat F>
void panel_of(const Packed& p, int panel, const Activations& x, int row0, int rows, const Output& out) {
  constexpr int kRows = tile_rows(F);
  constexpr int kLines = group_size(F) / 64;  // of a group
  const uint8_t* w = p.data + panel * p.panel_stride;
  const uint8_t* next = w + p.groups() * group_size(F);
  const int tiles = (rows + kRows - 1) / kRows, lines = tiles > 1 ? (kLines + tiles - 1) / tiles : 0;
  auto ahead = [&](int r) {
    const int t = r / kRows;
    return t * lines < kLines || tiles == 1 ? Ahead{next + static_cast<size_t>(t) * p.groups() * lines * 64, lines} : Ahead{next, -1};
  };
  int r = 0;
  for (; r + kRows <= rows; r += kRows) tile<F, kRows>(p, w, x, row0 + r, out, r, ahead(r));
  tile_rest<F, kRows - 1>(rows - r, p, w, x, row0 + r, out, r, ahead(r));
}

inline void gemm(const Packed& p, int panel, const Activations& x, int row0, int rows, float* data, size_t ld, bool add,
                 float factor) {
  const Output out{data, ld, add, factor};
  switch (p.format) {
    case WeightFormat::Q4: return panel_of<WeightFormat::Q4>(p, panel, x, row0, rows, out);
    case WeightFormat::Q4M: return panel_of<WeightFormat::Q4M>(p, panel, x, row0, rows, out);
    case WeightFormat::Q8: return panel_of<WeightFormat::Q8>(p, panel, x, row0, rows, out);
    case WeightFormat::Q8M: return panel_of<WeightFormat::Q8M>(p, panel, x, row0, rows, out);
    case WeightFormat::BF16: return panel_of<WeightFormat::BF16>(p, panel, x, row0, rows, out);
    case WeightFormat::F32: return panel_of<WeightFormat::F32>(p, panel, x, row0, rows, out);
  }
}

// The greatest magnitude that a group's scales and minimums allow, for each row of the matrix.
inline float panel_norm(const Packed& p, int panel) {
  const bool has_min = p.format == WeightFormat::Q4M || p.format == WeightFormat::Q8M;
  const bool small = p.format == WeightFormat::Q4 || p.format == WeightFormat::Q4M;
  const vf most = set1(has_min ? (small ? 15.0f : 127.0f) : (small ? 8.0f : 128.0f));
  const uint8_t* w = p.data + panel * p.panel_stride;
  const size_t step = group_size(p.format);
  vf squares[2] = {zero(), zero()};
  for (int g = 0; g < p.groups(); g++, w += step)
    for (int half = 0; half < 2; half++) {
      const vf d = load_half((const uint16_t*)w + 16 * half);
      vf top = mul(abs(d), most);
      if (has_min) {
        const vf m = load_half((const uint16_t*)w + 32 + 16 * half);
        top = max(abs(m), abs(fma(d, most, m)));
      }
      squares[half] = fma(top, top, squares[half]);
    }
  return 1.001f * std::sqrt(kGroup * hmax(max(squares[0], squares[1])));
}
