// Philox4x32-7 for kLanes counters at once. kernels/ops/philox.py has the formulas and the source. Included once per
// instruction set, after simd.h.

struct PhiloxKey { uint32_t low, high; };

// Replaces each counter by its four random words.
PEAK_INLINE void Philox(PhiloxKey key, Words* c) {
  for (int round = 0; round < 7; ++round) {
    Words high_a, high_b;
    const Words low_a = MultiplyWide(c[0], 0xd2511f53u, &high_a), low_b = MultiplyWide(c[2], 0xcd9e8d57u, &high_b);
    c[0] = high_b ^ c[1] ^ SetWords(key.low);
    c[1] = low_b;
    c[2] = high_a ^ c[3] ^ SetWords(key.high);
    c[3] = low_a;
    key = {key.low + 0x9e3779b9u, key.high + 0xbb67ae85u};
  }
}
