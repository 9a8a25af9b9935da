// Packing a quantized weight (gemm/quantized.h) as the b of a product: its outputs are the steps of k, its inputs the
// columns. Only panels that stay in the cache are decoded. Included once per instruction set by gemm.cpp, after
// gemm/panels.h.

// A weight is scale * level + shift, for kLanes outputs and the inputs of one block.
struct BlockScales {
  Vec scale, shift;
};

PEAK_INLINE BlockScales LoadScales(const QuantizedMatrix& w, int64_t output, int64_t block) {
  if (!HasBlockScales(w)) return {Load(static_cast<const float*>(w.scale) + output, w.n - output), Set(0.0f)};
  const int64_t panel = output / kPanelOutputs, lane = output % kPanelOutputs;
  const int64_t at = (panel * QuantizedBlocks(w) + block) * kPanelOutputs + lane;
  const Vec scale = w.f16_scales ? Load(static_cast<const f16*>(w.scale) + at) : Load(static_cast<const bf16*>(w.scale) + at);
  if (w.offset == nullptr) return {scale, Set(0.0f)};
  const Vec offset = Load(w.offset + at);
  return {scale, w.zero_points ? Set(0.0f) - offset * scale : offset};  // exact: 11 bits times 9 bits
}

// Decodes kLanes outputs of inputs [column, column + columns): row i of `out`, `stride` elements apart, is an input.
template <class T>
void Decode(const QuantizedMatrix& w, int64_t output, int64_t column, int64_t columns, int64_t stride, T* out) {
  constexpr int8_t kOnly[4][4] = {{1, 0, 0, 0}, {0, 1, 0, 0}, {0, 0, 1, 0}, {0, 0, 0, 1}};
  const bool nibbles = w.bits == 4;
  const int64_t panel_bytes = (w.k + 7) / 8 * kLine * (nibbles ? 1 : 2);
  const uint8_t* const lanes = w.weight + output / kPanelOutputs * panel_bytes + output % kPanelOutputs * 4;
  const Table table = LoadTable(kQuantizedLevels[w.levels]);
  BlockScales block = LoadScales(w, output, column / w.block);
  for (int64_t quad = column / 4; quad * 4 < column + columns; ++quad) {
    if (quad * 4 % w.block == 0) block = LoadScales(w, output, quad * 4 / w.block);
    Quads levels = LoadQuads(lanes + (nibbles ? quad / 2 : quad) * kLine);
    if (nibbles) levels = LookUp(table, quad % 2 == 0 ? LowerNibbles(levels) : UpperNibbles(levels));
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t i = quad * 4 + j - column;
      if (i < 0 || i >= columns) continue;
      const Vec level = ToFloats(DotQuads(SetInts(kQuadZero - 128), levels, SetQuad(kOnly[j])));
      Store(out + i * stride, Fma(level, block.scale, block.shift));
    }
  }
}

// Packs columns [column, column + columns) and steps [k, k + depth) as Pack does; k is a multiple of kPanelOutputs.
template <class T>
void PackDecoded(const QuantizedMatrix& w, int64_t column, int64_t columns, int64_t k, int64_t depth, float* out) {
  constexpr int64_t kStep = kLanes * kSlot<T>;
  const int64_t slots = (depth + kSlot<T> - 1) / kSlot<T>;
  alignas(64) T decoded[kColumns * kStep];
  for (int64_t first = 0; first < columns; first += kColumns, out += slots * kColumns) {
    const int64_t count = std::min<int64_t>(kColumns, columns - first);
    for (int64_t at = 0; at < depth; at += kStep) {
      for (int64_t lane = 0; lane < std::min(kStep, depth - at); lane += kLanes) {
        Decode(w, k + at + lane, column + first, count, kStep, decoded + lane);
      }
      for (int64_t v = 0; v < kColumnVecs; ++v) {
        const int64_t lanes = std::max<int64_t>(0, std::min<int64_t>(kLanes, count - v * kLanes));
        const PackedLanes<false> to{out + at / kSlot<T> * kColumns + v * kLanes, kColumns, 0};
        PackAlong<T>(decoded + v * kLanes * kStep, kStep, lanes, std::min(kStep, depth - at), to);
      }
    }
  }
}
