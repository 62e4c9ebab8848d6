// 16 lanes as a plain array: what the compiler makes of it is right on any machine.
#pragma once

#include <cmath>

#include "common.hpp"

namespace sage::SAGE_ISA {

constexpr int kRowTile = 1;
constexpr int kLaneTile = 1;
constexpr int kSums = 1;
constexpr int kBias8 = 0;

struct vf {
  float v[16];
};
struct vi {
  int32_t v[16];
};
struct vw {
  uint8_t v[64];
};
struct vx {
  int8_t v[4];
};

#define SAGE_LANES(T, expression)             \
  T out;                                      \
  for (int i = 0; i < 16; i++) out.v[i] = (expression); \
  return out

inline vf zero() { SAGE_LANES(vf, 0.0f); }
inline vi zeroi() { SAGE_LANES(vi, 0); }
inline vf set1(float x) { SAGE_LANES(vf, x); }
inline vi set1i(int32_t x) { SAGE_LANES(vi, x); }
inline vf load(const float* p) { SAGE_LANES(vf, p[i]); }
inline void store(float* p, vf x) { std::memcpy(p, x.v, sizeof x.v); }
inline vf add(vf x, vf y) { SAGE_LANES(vf, x.v[i] + y.v[i]); }
inline vf sub(vf x, vf y) { SAGE_LANES(vf, x.v[i] - y.v[i]); }
inline vf mul(vf x, vf y) { SAGE_LANES(vf, x.v[i] * y.v[i]); }
inline vf div(vf x, vf y) { SAGE_LANES(vf, x.v[i] / y.v[i]); }
inline vf fma(vf x, vf y, vf z) { SAGE_LANES(vf, x.v[i] * y.v[i] + z.v[i]); }
inline vf max(vf x, vf y) { SAGE_LANES(vf, x.v[i] > y.v[i] ? x.v[i] : y.v[i]); }
inline vf min(vf x, vf y) { SAGE_LANES(vf, x.v[i] < y.v[i] ? x.v[i] : y.v[i]); }
inline vf abs(vf x) { SAGE_LANES(vf, std::fabs(x.v[i])); }
inline vf to_float(vi x) { SAGE_LANES(vf, static_cast<float>(x.v[i])); }
inline int32_t round_one(float x) { return std::fabs(x) < 2147483648.0f ? static_cast<int32_t>(std::nearbyint(x)) : INT32_MIN; }
inline vi round_int(vf x) { SAGE_LANES(vi, round_one(x.v[i])); }
inline vi addi(vi x, vi y) { SAGE_LANES(vi, x.v[i] + y.v[i]); }
inline float hsum(vf x) {
  for (int n = 8; n > 0; n /= 2)
    for (int i = 0; i < n; i++) x.v[i] += x.v[i + n];
  return x.v[0];
}
inline float hmax(vf x) {
  float m = x.v[0];
  for (int i = 1; i < 16; i++) m = x.v[i] > m ? x.v[i] : m;
  return m;
}
inline int32_t hsumi(vi x) {
  int32_t s = 0;
  for (int i = 0; i < 16; i++) s += x.v[i];
  return s;
}
inline vi load_i32(const int32_t* p) { SAGE_LANES(vi, p[i]); }
inline vf load_half(const uint16_t* p) { SAGE_LANES(vf, half_to_float(p[i])); }
inline vf load_bf16(const uint16_t* p) { SAGE_LANES(vf, bf16_to_float(p[i])); }
inline void store_i8(int8_t* p, vi x) {
  for (int i = 0; i < 16; i++) p[i] = static_cast<int8_t>(x.v[i]);
}
#include "simd_fours.inl"
inline void store_bf16(uint16_t* p, vf x) {
  for (int i = 0; i < 16; i++) p[i] = float_to_bf16(x.v[i]);
}
inline vf round_even(vf x) { SAGE_LANES(vf, std::nearbyint(x.v[i])); }
inline vf scale_pow2(vf x, vf n) { SAGE_LANES(vf, std::ldexp(x.v[i], round_one(n.v[i]))); }
inline vf fraction(vf x) { SAGE_LANES(vf, x.v[i] - std::floor(x.v[i])); }
inline vf scale_floor(vf p, vf x) { SAGE_LANES(vf, std::ldexp(p.v[i], round_one(std::floor(std::fmax(x.v[i], -200.0f))))); }
inline vf keep_range(vf x, int base, int low, int high, vf y) {
  SAGE_LANES(vf, base + i >= low && base + i <= high ? x.v[i] : y.v[i]);
}
inline vf choose_less(vf a, vf b, vf yes, vf no) { SAGE_LANES(vf, a.v[i] < b.v[i] ? yes.v[i] : no.v[i]); }
inline vf copy_sign(vf x, vf s) { SAGE_LANES(vf, std::copysign(x.v[i], s.v[i])); }

inline vw load_w(const void* p) {
  vw w;
  std::memcpy(w.v, p, 64);
  return w;
}
inline vw low_nibbles(vw w) {
  for (auto& b : w.v) b &= 15;
  return w;
}
inline vw high_nibbles(vw w) {
  for (auto& b : w.v) b >>= 4;
  return w;
}
inline vx broadcast4(const void* p) {
  vx x;
  std::memcpy(x.v, p, 4);
  return x;
}
inline vi dot_small(vi a, vw w, vx x) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 4; j++) a.v[i] += static_cast<int32_t>(w.v[4 * i + j]) * x.v[j];
  return a;
}
inline vi dot_left(vi a, vx x, vw w) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 4; j++) a.v[i] += static_cast<int8_t>(w.v[4 * i + j]) * static_cast<int32_t>(x.v[j]);
  return a;
}
inline vi dot_biased(vi a, vw w, vx x) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 4; j++) a.v[i] += (static_cast<int32_t>(w.v[4 * i + j]) - 128) * x.v[j];
  return a;
}
inline vf dot_bf16(vf a, vw w, vx x) {
  uint16_t ws[32], xs[2];
  std::memcpy(ws, w.v, 64);
  std::memcpy(xs, x.v, 4);
  const float x0 = bf16_to_float(xs[0]), x1 = bf16_to_float(xs[1]);
  for (int i = 0; i < 16; i++) a.v[i] += bf16_to_float(ws[2 * i]) * x0 + bf16_to_float(ws[2 * i + 1]) * x1;
  return a;
}
#undef SAGE_LANES

}  // namespace sage::SAGE_ISA
