// Attention over a paged cache equals a double-precision softmax, with the same bits in steps of any size.
#include "attention/cache_attention.h"

#include <cstring>

#include "base/isa.h"
#include "base/parallel.h"
#include "buffer.h"

namespace peak::test {
namespace {

constexpr int64_t kHeads = 4, kGroup = 2, kKvHeads = kHeads / kGroup, kBlocks = 5, kTableRow = 3;
constexpr int32_t kTables[] = {3, 0, 4, 2, 1, 0};  // the last entry is not used
constexpr int64_t kTokens[] = {130, 70};           // of each sequence after the last step

// A cache full of NaN, with 64 bytes after its last block: memory without a token must not affect a result.
template <class T>
struct Cache {
  Buffer<T> keys, values;
  Cache(Placer& place, int64_t width, bool int8)
      : keys(place.Out<T>(Size(width, int8))), values(place.Out<T>(Size(width, int8))) {}
  static int64_t Size(int64_t width, bool int8) {
    const int64_t size = sizeof(T), token = int8 ? width + 4 : width * size;
    return (kBlocks * kKvHeads * kCacheBlock * token + 64) / size;
  }
};

template <class T>
struct Problem {
  int64_t width, row, window;
  const float *alibi, *sinks;
  float softcap;  // 0: none
  bool int8;
  const Buffer<float>& qkv;  // (200, heads + 2 kv_heads, width): the tokens of both sequences, one after the other
  std::vector<double> read;  // qkv as the products read it

  Problem(int64_t width_, int64_t window_, const float* alibi_, const float* sinks_, bool int8_,
          const Buffer<float>& qkv_)
      : width(width_), row((kHeads + 2 * kKvHeads) * width_), window(window_), alibi(alibi_), sinks(sinks_),
        softcap(sinks_ == nullptr ? 0.0f : 1.5f), int8(int8_), qkv(qkv_) {
    const bool rounds_queries = std::strcmp(ActiveIsa(), "avx512bf16") == 0;
    for (int64_t i = 0; i < (kTokens[0] + kTokens[1]) * row; ++i) {
      const bool is_query = i % row < kHeads * width, rounds = is_query ? rounds_queries : !int8;
      read.push_back(rounds ? Widen(Narrow<T>(qkv.At(i))) : qkv.At(i));
    }
    for (int64_t head = 0; int8 && head < static_cast<int64_t>(read.size()) / width; ++head) {
      if (head % (kHeads + 2 * kKvHeads) < kHeads) continue;
      double* x = read.data() + head * width;
      float high = 0.0f;
      for (int64_t d = 0; d < width; ++d) high = std::max(high, static_cast<float>(std::fabs(x[d])));
      const float scale = high / 127.0f;
      for (int64_t d = 0; d < width; ++d) {
        x[d] = scale > 0.0f ? std::nearbyint(static_cast<float>(x[d]) / scale) * static_cast<double>(scale) : 0.0;
      }
    }
  }

  // Runs tokens past[s] .. past[s] + count[s] - 1 of each sequence s.
  void Run(Cache<T>& cache, const int64_t (&past)[2], const int64_t (&count)[2], float* out, int threads) const {
    std::vector<float> rows((count[0] + count[1]) * row);
    for (int64_t s = 0, at = 0; s < 2; ++s) {
      for (int64_t i = 0; i < count[s] * row; ++i) rows[at++] = qkv[(s * kTokens[0] + past[s]) * row + i];
    }
    const int64_t begins[] = {0, count[0], count[0] + count[1]};
    const Buffer<float> scratch(Role::kOutput, CacheAttentionScratch(width, threads) / 4, 3);  // ends at a page
    char* const memory = reinterpret_cast<char*>(scratch.data());
    const CacheAttentionArgs args{
        .dtype = kDtype<T>, .heads = kHeads, .kv_heads = kKvHeads, .width = width, .sequences = 2, .begins = begins,
        .past = past, .tables = kTables, .table_row = kTableRow, .q = rows.data(), .k = rows.data() + kHeads * width,
        .v = rows.data() + (kHeads + kKvHeads) * width, .q_row = row, .int8_cache = int8, .keys = cache.keys.data(),
        .values = cache.values.data(), .window = window, .scale = 0.3f, .alibi = alibi, .out = out, .softcap = softcap,
        .sinks = sinks};
    Team::Open(threads, [&] { CacheAttention(args, memory, threads); });
  }

  // The softmax of one head's query, without the division by its total. Its outputs are asked for one after the other.
  struct Softmax {
    int64_t s = -1, i = -1, h = -1, from = 0;
    std::vector<double> p;
    double total = 0.0;
  };
  mutable Softmax softmax;

  double At(int64_t s, int64_t token, int64_t head, int64_t x) const {
    return read[(s * kTokens[0] + token) * row + head * width + x];
  }

  void Compute(int64_t s, int64_t i, int64_t h) const {
    if (softmax.s == s && softmax.i == i && softmax.h == h) return;
    const int64_t from = window > 0 ? std::max<int64_t>(0, i - window + 1) : 0, k = kHeads + h / kGroup;
    softmax = {s, i, h, from, {}, 0.0};
    double m = sinks == nullptr ? -kInf : sinks[h];
    for (int64_t j = from; j <= i; ++j) {
      double sum = 0.0;
      for (int64_t x = 0; x < width; ++x) sum += At(s, i, h, x) * At(s, j, k, x);
      sum *= 0.3f;
      if (softcap > 0.0f) sum = softcap * std::tanh(sum / softcap);
      softmax.p.push_back(sum + (alibi == nullptr ? 0.0 : alibi[h] * static_cast<double>(j - i)));
      m = std::max(m, softmax.p.back());
    }
    softmax.total = sinks == nullptr ? 0.0 : std::exp(sinks[h] - m);
    for (double& p : softmax.p) {
      p = std::exp(p - m);
      softmax.total += p;
    }
  }

  Want Expected(int64_t s, int64_t i, int64_t h, int64_t d) const {
    Compute(s, i, h);
    double value = 0.0, size = 0.0;
    for (int64_t j = softmax.from; j <= i; ++j) {
      const double p = softmax.p[j - softmax.from], v = At(s, j, kHeads + h / kGroup + kKvHeads, d);
      value += p * v;
      size += p * std::fabs(v);
    }
    // Pairs of bf16 round the weights before the product with the values; scores are float32 sums.
    const bool rounds_weights = sizeof(T) == 2 && std::strcmp(ActiveIsa(), "avx512bf16") == 0;
    const double slack = size / softmax.total * (rounds_weights ? 0x1p17 : 300.0);
    return {value / softmax.total, slack};
  }
};

template <class T>
void CheckOne(int64_t width, int64_t window, bool slopes, bool caps, bool int8, int placement) {
  SetCase("cache attention %s%s width %lld window %lld placement %d", kName<T>, int8 ? " int8" : "",
          static_cast<long long>(width), static_cast<long long>(window), placement);
  const float alibi[kHeads] = {0.5f, 0.25f, 0.125f, 0.0f};
  const float sinks[kHeads] = {2.0f, -1.0f, 0.5f, 3.0f};
  const int64_t row = (kHeads + 2 * kKvHeads) * width, tokens = kTokens[0] + kTokens[1];
  Random random(width);
  Placer place(placement);
  auto qkv = place.In<float>(tokens * row);
  qkv.FillNormal(random);
  for (int64_t d = 0; d < width; ++d) qkv[kHeads * width + d] = 0.0f;  // a key of zeros
  const Problem<T> problem(width, window, slopes ? alibi : nullptr, caps ? sinks : nullptr, int8, qkv);
  Cache<T> whole(place, width, int8), parts(place, width, int8);
  auto out = place.Out<float>(tokens * kHeads * width);
  problem.Run(whole, {0, 0}, {kTokens[0], kTokens[1]}, out.data(), 2);
  out.Expect("out", [&](int64_t at) {
    const int64_t token = at / width / kHeads, s = token >= kTokens[0];
    return problem.Expected(s, token - s * kTokens[0], at / width % kHeads, at % width);
  });
  // The result has the same bits if it is computed in steps of one, a few or many tokens.
  constexpr int64_t kCuts[][2] = {{0, 0}, {1, 66}, {100, 67}, {101, 68}, {kTokens[0], kTokens[1]}};
  for (int step = 0; step < 4; ++step) {
    const int64_t past[] = {kCuts[step][0], kCuts[step][1]};
    const int64_t count[] = {kCuts[step + 1][0] - past[0], kCuts[step + 1][1] - past[1]};
    std::vector<float> part((count[0] + count[1]) * kHeads * width);
    problem.Run(parts, past, count, part.data(), 1 + step % 2);
    for (int64_t s = 0; s < 2; ++s) {
      const float* expected = out.data() + (s * kTokens[0] + past[s]) * kHeads * width;
      const float* got = part.data() + s * count[0] * kHeads * width;
      Check(std::memcmp(got, expected, count[s] * kHeads * width * sizeof(float)) == 0,
            "sequence %lld has different bits in steps", static_cast<long long>(s));
    }
  }
}

PEAK_TEST(cache_attention_equals_double_precision_in_steps_of_any_size) {
  ForEachDtype([](auto element) {
    using T = decltype(element);
    for (const bool int8 : {false, true}) {
      for (int placement = 0; placement < kPlacements; ++placement) {
        CheckOne<T>(8, 0, false, false, int8, placement);
        CheckOne<T>(24, 50, true, placement % 2 == 0, int8, placement);
      }
      CheckOne<T>(64, 0, true, false, int8, 3);
      CheckOne<T>(64, 0, false, true, int8, 3);
    }
  });
}

}  // namespace
}  // namespace peak::test
