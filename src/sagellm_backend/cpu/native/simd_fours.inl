// Four vectors at a time, by one at a time: for instruction sets that gain nothing by more.

// a, b to the 32 bytes at p, c, d to those at q; values fit 8 bits
inline void store_i8(int8_t* p, int8_t* q, vi a, vi b, vi c, vi d) {
  store_i8(p, a);
  store_i8(p + 16, b);
  store_i8(q, c);
  store_i8(q + 16, d);
}
// Of four vectors the greatest lane, and the sum of lanes.
inline void hmax4(const vf (&m)[4], float* out) {
  for (int i = 0; i < 4; i++) out[i] = hmax(m[i]);
}
inline void hsum4(const vi (&a)[4], int32_t* out) {
  for (int i = 0; i < 4; i++) out[i] = hsumi(a[i]);
}
