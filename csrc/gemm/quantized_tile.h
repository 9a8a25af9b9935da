// The innermost loops of a product with quantized weights. Included once per instruction set by quantized.cpp, after
// simd/simd.h.

constexpr int kPanelVecs = kPanelOutputs / kLanes;
// The sums of a tile take most of the registers. With 16 registers a tile has one panel and half the rows.
constexpr int kTilePanels = kLanes == 16 ? kUnitPanels : 1;
constexpr int kMostRows = kLanes == 16 ? kTileRows : kTileRows / 2;
// Bytes from the line that is read to the one that is prefetched: a line takes 2 to 10 cycles, and memory some 300.
constexpr int64_t kAhead = 4096;

// Formats of a panel's weights: the number of quads of inputs in a line, and the type of the scales of blocks, if any.
template <class S>
struct Bytes {
  using Scale = S;
  static constexpr int kLineQuads = 1;
  static constexpr bool kGrouped = !std::is_void_v<Scale>;
  Table table;
  PEAK_INLINE Quads Get(Quads line, int) const { return line; }
};
template <class S>
struct Nibbles {
  using Scale = S;
  static constexpr int kLineQuads = 2;
  static constexpr bool kGrouped = true;
  Table table;
  PEAK_INLINE Quads Get(Quads line, int half) const {
    return LookUp(table, half == 0 ? LowerNibbles(line) : UpperNibbles(line));
  }
};

// The inputs of a tile: rows of x and panels of weights.
struct TileArgs {
  const int8_t* bytes;
  const float* scales;
  const int32_t* starts;
  const float* totals;
  int64_t rows;
  const uint8_t* weight;
  int64_t panel_bytes;
  const uint8_t* levels;          // the table of 4-bit weights
  const uint16_t* weight_scales;  // of blocks: (panels, blocks, kPanelOutputs)
  const f16* offsets;             // as weight_scales, or null
  bool zero_points;               // of `offsets`
  int64_t scales_stride;          // between panels
  const uint8_t* next;            // the same panels of the next unit, as they are stored
  int64_t next_bytes;             // of such a panel
  // What is prefetched with each line: a line of each panel. The panels are ahead_stride bytes apart.
  const uint8_t* ahead;
  int64_t ahead_stride, ahead_step;
};

// sums[kRows][kPanels * kPanelOutputs] = Q(x) W^T, without the scales of outputs.
template <class Weight, int kRows, int kPanels>
void Tile(const TileArgs& tile, int64_t blocks, int64_t block_quads, int64_t quads, float* sums) {
  constexpr int kVecs = kPanels * kPanelVecs;
  Weight weights;
  weights.table = LoadTable(tile.levels);
  const int64_t rows = tile.rows, panel_bytes = tile.panel_bytes;
  const int8_t* x = tile.bytes;
  const float* scales = tile.scales;
  const int32_t* starts = tile.starts;
  const uint8_t* w = tile.weight;
  using Scale = std::conditional_t<Weight::kGrouped, typename Weight::Scale, bf16>;
  const Scale* weight_scales = reinterpret_cast<const Scale*>(tile.weight_scales);
  [[maybe_unused]] const f16* offsets = tile.offsets;
  [[maybe_unused]] const float* totals = tile.totals;
  const uint8_t* ahead = tile.ahead;
  // All loops over both arrays of sums are unrolled: otherwise GCC 12 keeps the inner sums in memory.
  Vec total[kRows][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) total[i][v] = Set(0.0f);
  }
  constexpr int64_t kNextScales = Weight::kGrouped ? kPanelOutputs : 0;
  for (; blocks > 0; --blocks, quads -= block_quads, scales += rows, starts += rows, weight_scales += kNextScales) {
    Ints acc[kRows][kVecs];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[i][v] = SetInts(starts[i]);
    }
    for (int64_t line = std::min(block_quads, quads) / Weight::kLineQuads; line > 0; --line) {
      Quads lines[kVecs];
      for (int p = 0; p < kPanels; ++p) {
        __builtin_prefetch(kPanels == 1 ? w + kAhead : ahead + p * tile.ahead_stride);
        for (int v = 0; v < kPanelVecs; ++v) {
          lines[p * kPanelVecs + v] = LoadQuads(w + p * panel_bytes + v * kLanes * 4);
        }
      }
      for (int half = 0; half < Weight::kLineQuads; ++half, x += rows * 4) {
        Quads right[kVecs];
        for (int v = 0; v < kVecs; ++v) right[v] = weights.Get(lines[v], half);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const Quads left = SetQuad(x + i * 4);
#pragma GCC unroll 4
          for (int v = 0; v < kVecs; ++v) acc[i][v] = DotQuads(acc[i][v], right[v], left);
        }
      }
      w += kLine;
      if constexpr (kPanels > 1) ahead += tile.ahead_step;
    }
    [[maybe_unused]] Vec groups[kVecs];
    if constexpr (Weight::kGrouped) {
      for (int p = 0; p < kPanels; ++p) __builtin_prefetch(weight_scales + (p + kPanels) * tile.scales_stride);
      for (int v = 0; v < kVecs; ++v) {
        groups[v] = Load(weight_scales + v / kPanelVecs * tile.scales_stride + v % kPanelVecs * kLanes);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec scale = Set(scales[i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        Vec factor = scale;
        if constexpr (Weight::kGrouped) factor = scale * groups[v];
        total[i][v] = Fma(ToFloats(acc[i][v]), factor, total[i][v]);
      }
    }
    if constexpr (std::is_same_v<Scale, f16>) {
      if (offsets != nullptr) {
        for (int v = 0; v < kVecs; ++v) {
          const Vec offset = Load(offsets + v / kPanelVecs * tile.scales_stride + v % kPanelVecs * kLanes);
          groups[v] = tile.zero_points ? Set(0.0f) - offset * groups[v] : offset;  // exact: 11 bits times 9 bits
        }
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const Vec sum = Set(totals[i]);
#pragma GCC unroll 4
          for (int v = 0; v < kVecs; ++v) total[i][v] = Fma(sum, groups[v], total[i][v]);
        }
        offsets += kPanelOutputs, totals += rows;
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) Store(sums + (i * kVecs + v) * kLanes, total[i][v]);
  }
}
