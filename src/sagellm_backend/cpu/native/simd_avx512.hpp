// 16 lanes in one AVX-512 register. Needs F, BW, DQ, VL, VNNI; BF16 where the compiler flag is given.
#pragma once

#include <immintrin.h>

#include "common.hpp"

namespace sage::SAGE_ISA {

constexpr int kRowTile = 6;        // 6 rows × 32 outputs: 24 accumulators of 32 registers
constexpr int kLaneTile = 8;       // query vectors of one attention tile
constexpr int kSums = 16;          // sums of an attention tile: as many more registers hold what is added
constexpr int kBias8 = -128;       // zero8 is this times the sum of a group

using vf = __m512;
using vi = __m512i;
using vw = __m512i;  // 64 bytes of weights

inline vf zero() { return _mm512_setzero_ps(); }
inline vi zeroi() { return _mm512_setzero_si512(); }
inline vf set1(float x) { return _mm512_set1_ps(x); }
inline vi set1i(int32_t x) { return _mm512_set1_epi32(x); }
inline vf load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
inline vf min(vf a, vf b) { return _mm512_min_ps(a, b); }
inline vf abs(vf a) { return _mm512_abs_ps(a); }
inline vf to_float(vi a) { return _mm512_cvtepi32_ps(a); }
inline vi round_int(vf a) { return _mm512_cvtps_epi32(a); }
inline vi addi(vi a, vi b) { return _mm512_add_epi32(a, b); }
inline float hsum(vf a) { return _mm512_reduce_add_ps(a); }
inline float hmax(vf a) { return _mm512_reduce_max_ps(a); }
inline int32_t hsumi(vi a) { return _mm512_reduce_add_epi32(a); }
inline vi load_i32(const int32_t* p) { return _mm512_loadu_si512(p); }
inline vf load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline vf load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline void store_i8(int8_t* p, vi a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a)); }
// a, b to the 32 bytes at p, c, d to those at q; values fit 8 bits
inline void store_i8(int8_t* p, int8_t* q, vi a, vi b, vi c, vi d) {
  // packs work on 128-bit quarters: four bytes of a, b, c, d in turn
  const __m512i mixed = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i sorted = _mm512_permutexvar_epi32(order, mixed);
  _mm256_storeu_si256((__m256i*)p, _mm512_castsi512_si256(sorted));
  _mm256_storeu_si256((__m256i*)q, _mm512_extracti64x4_epi64(sorted, 1));
}
// Of four vectors the greatest lane, and the sum of lanes.
inline void hmax4(const vf (&m)[4], float* out) {
  const vf s = max(_mm512_unpacklo_ps(m[0], m[1]), _mm512_unpackhi_ps(m[0], m[1]));
  const vf t = max(_mm512_unpacklo_ps(m[2], m[3]), _mm512_unpackhi_ps(m[2], m[3]));
  const __m512d u = _mm512_castps_pd(s), v = _mm512_castps_pd(t);
  const vf w = max(_mm512_castpd_ps(_mm512_unpacklo_pd(u, v)), _mm512_castpd_ps(_mm512_unpackhi_pd(u, v)));
  const __m256 x = _mm256_max_ps(_mm512_castps512_ps256(w), _mm512_extractf32x8_ps(w, 1));
  _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}
inline void hsum4(const vi (&a)[4], int32_t* out) {
  const vi s = addi(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
  const vi t = addi(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
  const vi w = addi(_mm512_unpacklo_epi64(s, t), _mm512_unpackhi_epi64(s, t));
  const __m256i x = _mm256_add_epi32(_mm512_castsi512_si256(w), _mm512_extracti64x4_epi64(w, 1));
  _mm_storeu_si128((__m128i*)out, _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
}
inline vf round_even(vf a) { return _mm512_roundscale_ps(a, 0); }
// x · 2^n for integral n
inline vf scale_pow2(vf x, vf n) { return _mm512_scalef_ps(x, n); }
inline vf fraction(vf x) { return _mm512_reduce_ps(x, 9); }  // x - floor(x)
// p · 2^floor(x)
inline vf scale_floor(vf p, vf x) { return _mm512_scalef_ps(p, x); }
// Lanes whose index base + lane lies in [low, high] keep x, the others become y.
inline vf keep_range(vf x, int base, int low, int high, vf y) {
  const __m512i index = _mm512_add_epi32(_mm512_set1_epi32(base),
                                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  const __mmask16 in = _mm512_cmple_epi32_mask(index, _mm512_set1_epi32(high)) &
                       _mm512_cmpge_epi32_mask(index, _mm512_set1_epi32(low));
  return _mm512_mask_mov_ps(y, in, x);
}
inline vf choose_less(vf a, vf b, vf yes, vf no) { return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), yes); }
inline vf copy_sign(vf magnitude, vf sign) {
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(magnitude), _mm512_castps_si512(sign),
                                                       _mm512_set1_epi32(INT32_MIN), 0xd8));
}

inline vw load_w(const void* p) { return _mm512_loadu_si512(p); }
inline vw low_nibbles(vw w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
inline vw high_nibbles(vw w) { return _mm512_and_si512(_mm512_srli_epi16(w, 4), _mm512_set1_epi8(15)); }
using vx = __m512i;  // 4 activations, in every lane
inline vx broadcast4(const void* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}
inline vi dot_small(vi a, vw w, vx x) { return _mm512_dpbusd_epi32(a, w, x); }
// unsigned activations (at most 127) times signed weights
inline vi dot_left(vi a, vx x, vw w) { return _mm512_dpbusd_epi32(a, x, w); }
inline vi dot_biased(vi a, vw w, vx x) { return _mm512_dpbusd_epi32(a, w, x); }

#ifdef __AVX512BF16__
inline void store_bf16(uint16_t* p, vf a) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a)); }
inline vf dot_bf16(vf a, vw w, vx x) { return _mm512_dpbf16_ps(a, (__m512bh)w, (__m512bh)x); }
#else
inline void store_bf16(uint16_t* p, vf a) {
  const __m512i u = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(r));
}
inline vf dot_bf16(vf a, vw w, vx x) {
  const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u));
  a = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), a);
  return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(w, high)), _mm512_castsi512_ps(_mm512_and_si512(x, high)), a);
}
#endif

}  // namespace sage::SAGE_ISA
