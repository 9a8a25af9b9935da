// Quantizing the inputs of a product to bytes. Included once per instruction set by quantized.cpp, after simd/simd.h.

// Copies `count` elements of a row in the order of the weight's inputs. Returns the copy.
template <class T>
const T* Reordered(const T* x, const int32_t* order, int64_t count, T* copy) {
  for (int64_t i = 0; i < count; ++i) copy[i] = x[order[i]];
  return copy;
}

// Quantizes one block of a row: `count` elements. The quads of bytes are `stride` quads apart.
template <class T>
void QuantizeBlock(const T* x, int64_t count, int64_t quads, int64_t stride, int8_t* out, float* scale, int32_t* start,
                   float* scaled_total) {
  Vec most = Set(0.0f), sum = Set(0.0f);
#pragma GCC unroll 4
  for (int64_t i = 0; i < count; i += kLanes) most = Max(most, Abs(Load(x + i, count - i)));
  const float largest = MaxOf(most), inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;
  alignas(64) int8_t bytes[kMaxBlock + kLanes] = {};
#pragma GCC unroll 4
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec v = Round(Load(x + i, count - i) * Set(inverse));
    sum = sum + v;
    StoreBytes(bytes + i, Max(v, Set(-127.0f)));  // -127 for a NaN
  }
  const float total = Sum(sum), poison = total - total;  // NaN if an element is not finite (inf * 0 is NaN too)
  *scale = largest / 127.0f + poison;
  *start = poison == 0.0f ? (kQuadZero - 128) * static_cast<int32_t>(total) : 0;
  if (scaled_total != nullptr) *scaled_total = *scale * total;
#pragma GCC unroll 8
  for (int64_t q = 0; q < quads; ++q, out += stride * 4) std::memcpy(out, bytes + q * 4, 4);
}

// Quantizes blocks [begin, end) of all rows. The padding rows of the last tile become 0.
template <class T>
void QuantizeBlocks(const QuantizedArgs& args, const QuantizedLayout& layout, int64_t begin, int64_t end) {
  for (int64_t first = 0; first < layout.rows; first += kTileRows) {
    const int64_t rows = layout.TileRows(first);
    for (int64_t i = 0; i < rows; ++i) {
      const bool exists = first + i < args.rows;
      const T* x = static_cast<const T*>(args.x) + (exists ? (first + i) * args.x_row : 0);
      [[maybe_unused]] alignas(64) T copy[kMaxBlock];
      for (int64_t block = begin; block < end; ++block) {
        const int64_t at = block * args.block, count = exists ? std::min(args.block, args.k - at) : 0;
        const int64_t entry = first * layout.blocks + block * rows + i;
        const T* source = args.order == nullptr ? x + at : Reordered(x, args.order + at, count, copy);
        QuantizeBlock(source, count, std::min(args.block, layout.quads * 4 - at) / 4, rows,
                      layout.bytes + first * layout.quads * 4 + (at / 4 * rows + i) * 4, layout.scales + entry,
                      layout.starts + entry, args.offset == nullptr ? nullptr : layout.totals + entry);
      }
    }
  }
}
