// What the machine could do at most: loops for sagellm_backend.cpu.limits.

// Sum of n bytes (a multiple of 512) as 32-bit words: a pure read stream.
inline uint32_t read_stream(const uint8_t* p, size_t n) {
  vi s[8];
  for (auto& x : s) x = zeroi();
  for (size_t i = 0; i < n; i += 512) {
    for (int j = 0; j < 8; j++) {
      __builtin_prefetch(p + i + j * 64 + 4096);
      s[j] = addi(s[j], load_i32((const int32_t*)(p + i + j * 64)));
    }
  }
  for (int j = 1; j < 8; j++) s[0] = addi(s[0], s[j]);
  return static_cast<uint32_t>(hsumi(s[0]));
}

// `rounds` times 12 independent dot products of 64 bytes (or 32 bf16) from registers; returns something that depends on all.
inline float dot_int8_loop(int64_t rounds) {
  const vw w = low_nibbles(load_w(kLoopData));
  const vx x = broadcast4(kLoopData);
  vi a[12];
  for (auto& v : a) v = zeroi();
  for (int64_t r = 0; r < rounds; r++) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; j++) a[j] = dot_small(a[j], w, x);
  }
  for (int j = 1; j < 12; j++) a[0] = addi(a[0], a[j]);
  return static_cast<float>(hsumi(a[0]));
}

inline float dot_bf16_loop(int64_t rounds) {
  const vw w = load_w(kLoopData);
  const vx x = broadcast4(kLoopData);
  vf a[12];
  for (auto& v : a) v = zero();
  for (int64_t r = 0; r < rounds; r++) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; j++) a[j] = dot_bf16(a[j], w, x);
  }
  for (int j = 1; j < 12; j++) a[0] = add(a[0], a[j]);
  return hsum(a[0]);
}
