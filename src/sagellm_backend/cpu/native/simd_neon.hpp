// 16 lanes in four NEON registers. Needs ARMv8.2 with the dot product instructions.
#pragma once

#include <arm_neon.h>

#include "common.hpp"

namespace sage::SAGE_ISA {

constexpr int kRowTile = 2;   // 2 rows × 32 outputs: 16 integer accumulators of 32 registers
constexpr int kLaneTile = 2;  // query vectors of one attention tile
constexpr int kSums = 4;      // sums of an attention tile, four registers each
constexpr int kBias8 = 0;     // dot_biased takes the bias out itself

struct vf {
  float32x4_t v[4];
};
struct vi {
  int32x4_t v[4];
};
struct vw {
  uint8x16_t v[4];
};
using vx = int8x16_t;

#define SAGE_QUARTERS(T, expression) \
  T out;                             \
  for (int i = 0; i < 4; i++) out.v[i] = (expression); \
  return out

inline vf zero() { SAGE_QUARTERS(vf, vdupq_n_f32(0.0f)); }
inline vi zeroi() { SAGE_QUARTERS(vi, vdupq_n_s32(0)); }
inline vf set1(float x) { SAGE_QUARTERS(vf, vdupq_n_f32(x)); }
inline vi set1i(int32_t x) { SAGE_QUARTERS(vi, vdupq_n_s32(x)); }
inline vf load(const float* p) { SAGE_QUARTERS(vf, vld1q_f32(p + 4 * i)); }
inline void store(float* p, vf x) {
  for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, x.v[i]);
}
inline vf add(vf x, vf y) { SAGE_QUARTERS(vf, vaddq_f32(x.v[i], y.v[i])); }
inline vf sub(vf x, vf y) { SAGE_QUARTERS(vf, vsubq_f32(x.v[i], y.v[i])); }
inline vf mul(vf x, vf y) { SAGE_QUARTERS(vf, vmulq_f32(x.v[i], y.v[i])); }
inline vf div(vf x, vf y) { SAGE_QUARTERS(vf, vdivq_f32(x.v[i], y.v[i])); }
inline vf fma(vf x, vf y, vf z) { SAGE_QUARTERS(vf, vfmaq_f32(z.v[i], x.v[i], y.v[i])); }
// y where either is NaN, as on the other machines
inline vf max(vf x, vf y) { SAGE_QUARTERS(vf, vbslq_f32(vcgtq_f32(x.v[i], y.v[i]), x.v[i], y.v[i])); }
inline vf min(vf x, vf y) { SAGE_QUARTERS(vf, vbslq_f32(vcltq_f32(x.v[i], y.v[i]), x.v[i], y.v[i])); }
inline vf abs(vf x) { SAGE_QUARTERS(vf, vabsq_f32(x.v[i])); }
inline vf to_float(vi x) { SAGE_QUARTERS(vf, vcvtq_f32_s32(x.v[i])); }
inline vi round_int(vf x) { SAGE_QUARTERS(vi, vcvtnq_s32_f32(x.v[i])); }
inline vi addi(vi x, vi y) { SAGE_QUARTERS(vi, vaddq_s32(x.v[i], y.v[i])); }
inline float hsum(vf x) { return vaddvq_f32(vaddq_f32(vaddq_f32(x.v[0], x.v[1]), vaddq_f32(x.v[2], x.v[3]))); }
inline float hmax(vf x) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3]))); }
inline int32_t hsumi(vi x) { return vaddvq_s32(vaddq_s32(vaddq_s32(x.v[0], x.v[1]), vaddq_s32(x.v[2], x.v[3]))); }
inline vi load_i32(const int32_t* p) { SAGE_QUARTERS(vi, vld1q_s32(p + 4 * i)); }
inline vf load_half(const uint16_t* p) { SAGE_QUARTERS(vf, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)))); }
inline vf load_bf16(const uint16_t* p) { SAGE_QUARTERS(vf, vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16))); }
inline void store_i8(int8_t* p, vi x) {
  const int16x8_t low = vcombine_s16(vqmovn_s32(x.v[0]), vqmovn_s32(x.v[1]));
  const int16x8_t high = vcombine_s16(vqmovn_s32(x.v[2]), vqmovn_s32(x.v[3]));
  vst1q_s8(p, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
}
#include "simd_fours.inl"
inline void store_bf16(uint16_t* p, vf x) {
  for (int i = 0; i < 4; i++) {
    const uint32x4_t u = vreinterpretq_u32_f32(x.v[i]);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    vst1_u16(p + 4 * i, vshrn_n_u32(vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd), 16));
  }
}
inline vf round_even(vf x) { SAGE_QUARTERS(vf, vrndnq_f32(x.v[i])); }
inline vf round_down(vf x) { SAGE_QUARTERS(vf, vrndmq_f32(x.v[i])); }
inline float32x4_t pow2_quarter(float32x4_t x, float32x4_t n) {
  // In two factors, so that results below the smallest normal number are reached without overflow of the exponent field.
  const int32x4_t e = vcvtnq_s32_f32(n), half = vshrq_n_s32(e, 1), bias = vdupq_n_s32(127);
  const float32x4_t f = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(half, bias), 23));
  const float32x4_t g = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vsubq_s32(e, half), bias), 23));
  return vmulq_f32(vmulq_f32(x, f), g);
}
inline vf scale_pow2(vf x, vf n) { SAGE_QUARTERS(vf, pow2_quarter(x.v[i], n.v[i])); }
inline vf fraction(vf x) { return sub(x, round_down(x)); }
// p · 2^floor(x)
inline vf scale_floor(vf p, vf x) { return scale_pow2(p, round_down(max(x, set1(-200.0f)))); }
inline vf keep_range(vf x, int base, int low, int high, vf y) {
  const int32_t first[4] = {0, 1, 2, 3};
  vf out;
  for (int i = 0; i < 4; i++) {
    const int32x4_t index = vaddq_s32(vld1q_s32(first), vdupq_n_s32(base + 4 * i));
    const uint32x4_t in = vandq_u32(vcgeq_s32(index, vdupq_n_s32(low)), vcleq_s32(index, vdupq_n_s32(high)));
    out.v[i] = vbslq_f32(in, x.v[i], y.v[i]);
  }
  return out;
}
inline vf choose_less(vf a, vf b, vf yes, vf no) { SAGE_QUARTERS(vf, vbslq_f32(vcltq_f32(a.v[i], b.v[i]), yes.v[i], no.v[i])); }
inline vf copy_sign(vf x, vf s) { SAGE_QUARTERS(vf, vbslq_f32(vdupq_n_u32(0x80000000u), s.v[i], x.v[i])); }

inline vw load_w(const void* p) { SAGE_QUARTERS(vw, vld1q_u8((const uint8_t*)p + 16 * i)); }
inline vw low_nibbles(vw w) { SAGE_QUARTERS(vw, vandq_u8(w.v[i], vdupq_n_u8(15))); }
inline vw high_nibbles(vw w) { SAGE_QUARTERS(vw, vshrq_n_u8(w.v[i], 4)); }
inline vx broadcast4(const void* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(x));
}
// weights of at most 127
inline vi dot_small(vi a, vw w, vx x) { SAGE_QUARTERS(vi, vdotq_s32(a.v[i], vreinterpretq_s8_u8(w.v[i]), x)); }
inline vi dot_left(vi a, vx x, vw w) { return dot_small(a, w, x); }
inline vi dot_biased(vi a, vw w, vx x) {
  SAGE_QUARTERS(vi, vdotq_s32(a.v[i], vreinterpretq_s8_u8(veorq_u8(w.v[i], vdupq_n_u8(128))), x));
}
inline float32x4_t bf16_low(uint8x16_t w) { return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u8(w), 16)); }
inline float32x4_t bf16_high(uint8x16_t w) {
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u8(w), vdupq_n_u32(0xffff0000u)));
}
inline vf dot_bf16(vf a, vw w, vx x) {
  const uint8x16_t b = vreinterpretq_u8_s8(x);
  SAGE_QUARTERS(vf, vfmaq_f32(vfmaq_f32(a.v[i], bf16_low(w.v[i]), bf16_low(b)), bf16_high(w.v[i]), bf16_high(b)));
}
#undef SAGE_QUARTERS

}  // namespace sage::SAGE_ISA
