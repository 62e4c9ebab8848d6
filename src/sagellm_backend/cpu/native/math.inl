// exp and tanh on 16 lanes. Included once for each instruction set, inside its namespace.

constexpr float kLog2e = 1.44269504f;

// Cephes' expf: 2^n · polynomial on [-ln2/2, ln2/2], about 1 unit in the last place. Below -104 the result is 0.
inline vf exp(vf x) {
  x = max(x, set1(-104.0f));
  x = min(x, set1(88.7f));
  const vf n = round_even(mul(x, set1(kLog2e)));
  vf r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  vf p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set1(1.0f)));
  return scale_pow2(p, n);
}

// 2^x for x <= 127, by a polynomial of the fraction, about 2 units in the last place; 2^0 is 1. Below -150 the result is 0.
inline vf exp2(vf x) {
  const vf f = fraction(x);
  vf p = set1(0x1.e974fap-10f);
  p = fma(p, f, set1(0x1.277856p-7f));
  p = fma(p, f, set1(0x1.c91ce6p-5f));
  p = fma(p, f, set1(0x1.ebdb56p-3f));
  p = fma(p, f, set1(0x1.62e4bap-1f));
  return scale_floor(fma(p, f, set1(1.0f)), x);
}

// tanh |x| = 1 - 2/(exp(2|x|) + 1); near 0, where that cancels, the odd series x - x³/3 + 2x⁵/15 - 17x⁷/315.
inline vf tanh(vf x) {
  const vf a = abs(x);
  const vf far = sub(set1(1.0f), div(set1(2.0f), add(exp(add(a, a)), set1(1.0f))));
  const vf s = mul(x, x);
  vf near = fma(s, set1(-17.0f / 315.0f), set1(2.0f / 15.0f));
  near = fma(near, s, set1(-1.0f / 3.0f));
  near = fma(mul(near, s), a, a);
  return copy_sign(choose_less(a, set1(0.125f), near, far), x);
}

// Abramowitz & Stegun 7.1.26, |error| <= 1.5e-7.
inline vf erf(vf x) {
  const vf a = abs(x);
  const vf t = div(set1(1.0f), fma(a, set1(0.3275911f), set1(1.0f)));
  vf p = set1(1.061405429f);
  p = fma(p, t, set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = fma(p, t, set1(0.254829592f));
  const vf tail = mul(mul(p, t), exp(sub(zero(), mul(a, a))));
  return copy_sign(sub(set1(1.0f), tail), x);
}
