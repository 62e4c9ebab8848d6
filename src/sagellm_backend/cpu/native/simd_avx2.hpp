// 16 lanes in two AVX2 registers. Needs AVX2, FMA, F16C; uses AVX-VNNI where the compiler flag is given.
#pragma once

#include <immintrin.h>

#include "common.hpp"

namespace sage::SAGE_ISA {

constexpr int kRowTile = 2;   // 2 rows × 32 outputs: 8 integer accumulators of 16 registers
constexpr int kLaneTile = 2;  // query vectors of one attention tile
constexpr int kSums = 4;      // sums of an attention tile, two registers each
#ifdef __AVXVNNI__
constexpr int kBias8 = -128;
#else
constexpr int kBias8 = 0;     // dot_biased takes the bias out itself
#endif

struct vf {
  __m256 a, b;
};
struct vi {
  __m256i a, b;
};
using vw = vi;
using vx = __m256i;

inline vf zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline vi zeroi() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline vf set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline vi set1i(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline vf load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, vf x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline vf add(vf x, vf y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline vf sub(vf x, vf y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline vf mul(vf x, vf y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline vf div(vf x, vf y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline vf fma(vf x, vf y, vf z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline vf max(vf x, vf y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline vf min(vf x, vf y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline vf abs(vf x) {
  const __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(x.a, m), _mm256_and_ps(x.b, m)};
}
inline vf to_float(vi x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline vi round_int(vf x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline vi addi(vi x, vi y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline float hsum(vf x) {
  const __m256 s = _mm256_add_ps(x.a, x.b);
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
inline float hmax(vf x) {
  const __m256 s = _mm256_max_ps(x.a, x.b);
  __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_max_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}
inline int32_t hsumi(vi x) {
  const __m256i s = _mm256_add_epi32(x.a, x.b);
  __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}
inline vi load_i32(const int32_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
inline vf load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline __m256 widen_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline vf load_bf16(const uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
inline void store_i8(int8_t* p, vi x) {
  // packs work on 128-bit halves: a0 b0 a1 b1, which the permutation puts in order
  const __m256i w = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
}
#include "simd_fours.inl"
inline __m256i bf16_bits(__m256 x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
}
inline void store_bf16(uint16_t* p, vf x) {
  const __m256i w = _mm256_permute4x64_epi64(_mm256_packus_epi32(bf16_bits(x.a), bf16_bits(x.b)), 0xd8);
  _mm256_storeu_si256((__m256i*)p, w);
}
inline vf round_even(vf x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
inline __m256 pow2_half(__m256 x, __m256 n) {
  // In two factors, so that results below the smallest normal number are reached without overflow of the exponent field.
  const __m256i e = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(e, 1);
  const __m256i rest = _mm256_sub_epi32(e, half);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 f = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 g = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return _mm256_mul_ps(_mm256_mul_ps(x, f), g);
}
inline vf scale_pow2(vf x, vf n) { return {pow2_half(x.a, n.a), pow2_half(x.b, n.b)}; }
inline vf round_down(vf x) { return {_mm256_floor_ps(x.a), _mm256_floor_ps(x.b)}; }
inline vf fraction(vf x) { return sub(x, round_down(x)); }
// p · 2^floor(x)
inline vf scale_floor(vf p, vf x) { return scale_pow2(p, round_down(max(x, set1(-200.0f)))); }
inline __m256 keep_half(__m256 x, int base, int low, int high, __m256 y) {
  const __m256i index = _mm256_add_epi32(_mm256_set1_epi32(base), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  const __m256i out = _mm256_or_si256(_mm256_cmpgt_epi32(index, _mm256_set1_epi32(high)),
                                      _mm256_cmpgt_epi32(_mm256_set1_epi32(low), index));
  return _mm256_blendv_ps(x, y, _mm256_castsi256_ps(out));
}
inline vf keep_range(vf x, int base, int low, int high, vf y) {
  return {keep_half(x.a, base, low, high, y.a), keep_half(x.b, base + 8, low, high, y.b)};
}
inline vf choose_less(vf a, vf b, vf yes, vf no) {
  return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(a.a, b.a, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(a.b, b.b, _CMP_LT_OQ))};
}
inline vf copy_sign(vf magnitude, vf sign) {
  const __m256 m = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(m, magnitude.a), _mm256_and_ps(m, sign.a)),
          _mm256_or_ps(_mm256_andnot_ps(m, magnitude.b), _mm256_and_ps(m, sign.b))};
}

inline vw load_w(const void* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
inline vw low_nibbles(vw w) {
  const __m256i m = _mm256_set1_epi8(15);
  return {_mm256_and_si256(w.a, m), _mm256_and_si256(w.b, m)};
}
inline vw high_nibbles(vw w) {
  const __m256i m = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_srli_epi16(w.a, 4), m), _mm256_and_si256(_mm256_srli_epi16(w.b, 4), m)};
}
inline vx broadcast4(const void* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return _mm256_set1_epi32(x);
}
#ifdef __AVXVNNI__
inline vi dot_small(vi a, vw w, vx x) {
  return {_mm256_dpbusd_avx_epi32(a.a, w.a, x), _mm256_dpbusd_avx_epi32(a.b, w.b, x)};
}
inline vi dot_biased(vi a, vw w, vx x) { return dot_small(a, w, x); }
inline vi dot_left(vi a, vx x, vw w) {
  return {_mm256_dpbusd_avx_epi32(a.a, x, w.a), _mm256_dpbusd_avx_epi32(a.b, x, w.b)};
}
#else
inline __m256i dot_unsigned(__m256i a, __m256i w, __m256i x) {  // w <= 128, |x| <= 127: pairs fit 16 bits
  return _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
inline vi dot_small(vi a, vw w, vx x) { return {dot_unsigned(a.a, w.a, x), dot_unsigned(a.b, w.b, x)}; }
inline vi dot_left(vi a, vx x, vw w) { return {dot_unsigned(a.a, x, w.a), dot_unsigned(a.b, x, w.b)}; }
inline __m256i dot_half(__m256i a, __m256i w, __m256i x) {
  const __m256i s = _mm256_xor_si256(w, _mm256_set1_epi8(-128));  // q - 128, signed
  return dot_unsigned(a, _mm256_abs_epi8(s), _mm256_sign_epi8(x, s));
}
inline vi dot_biased(vi a, vw w, vx x) { return {dot_half(a.a, w.a, x), dot_half(a.b, w.b, x)}; }
#endif
inline __m256 bf16_half(__m256 a, __m256i w, __m256i x) {
  const __m256i high = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u));
  a = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), a);
  return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(w, high)), _mm256_castsi256_ps(_mm256_and_si256(x, high)), a);
}
inline vf dot_bf16(vf a, vw w, vx x) { return {bf16_half(a.a, w.a, x), bf16_half(a.b, w.b, x)}; }

}  // namespace sage::SAGE_ISA
