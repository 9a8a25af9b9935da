// Float32 master weights: a float32 parameter, or a bf16 parameter with the lower halves in `remainder`.
// Included once per instruction set by adamw.cpp and muon.cpp.

PEAK_INLINE Vec LoadMaster(const float* param, const int16_t*, int64_t i, int64_t n) { return Load(param + i, n); }
PEAK_INLINE Vec LoadMaster(const bf16* param, const int16_t* remainder, int64_t i, int64_t n) {
  return LoadSplit(param + i, remainder + i, n);
}
PEAK_INLINE void StoreMaster(float* param, int16_t*, Vec p, int64_t i, int64_t n) { Store(param + i, p, n); }
PEAK_INLINE void StoreMaster(bf16* param, int16_t* remainder, Vec p, int64_t i, int64_t n) {
  StoreSplit(param + i, remainder + i, p, n);
}
