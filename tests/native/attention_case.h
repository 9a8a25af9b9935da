// The tensors and arguments of one call of attention, with every mask, bias and dropout.
#ifndef PEAK_TESTS_NATIVE_ATTENTION_CASE_H_
#define PEAK_TESTS_NATIVE_ATTENTION_CASE_H_

#include "attention/attention.h"
#include "buffer.h"

namespace peak::test {

constexpr int64_t kGap = 5;  // elements of NaN after each token's heads
constexpr float kScale = 0.3f;

// Which keys a query may see: all keys, a range of keys for each sequence, or the keys of its document.
enum class Range { kAll, kPadded, kDocuments };

// An additive bias: none, one for all heads, one for each head, or one for each head of each sequence.
enum class Bias { kNone, kShared, kByHead, kFull };

struct Problem {
  int64_t batch, queries, keys, heads, kv_heads, width;
  bool causal;
  int64_t window;
  bool alibi;
  Range range;
  Bias bias = Bias::kNone;
  double dropout = 0.0;
  int64_t pairs = 0;  // of rotary embedding: dq and dk are rotated back
  bool interleaved = false;
  float softcap = 0.0f;  // 0: none
  bool sinks = false;

  int64_t BiasBatch() const { return bias == Bias::kFull ? batch : 1; }
  int64_t BiasHeads() const { return bias == Bias::kFull || bias == Bias::kByHead ? heads : 1; }
};

// A tensor (batch, tokens, heads, width) with a gap after each token.
template <class T>
struct Tensor4 {
  int64_t tokens, heads, width;
  Buffer<T> buffer;

  Tensor4(Placer& place, Role role, int64_t batch, int64_t tokens_, int64_t heads_, int64_t width_)
      : tokens(tokens_), heads(heads_), width(width_),
        buffer(role == Role::kInput ? place.In<T>(batch * StrideB()) : place.Out<T>(batch * StrideB())) {}
  StridedInput Input() const { return {buffer.data(), StrideB(), StrideT(), width}; }
  StridedOutput Output() const { return {buffer.data(), StrideB(), StrideT(), width}; }
  int64_t StrideT() const { return heads * width + kGap; }
  int64_t StrideB() const { return tokens * StrideT(); }
  int64_t Index(int64_t b, int64_t t, int64_t h, int64_t d) const {
    return b * StrideB() + t * StrideT() + h * width + d;
  }
  double At(int64_t b, int64_t t, int64_t h, int64_t d) const { return buffer.At(Index(b, t, h, d)); }
  void FillRow(int64_t b, int64_t t, double value) const {
    for (int64_t i = 0; i < heads * width; ++i) buffer[Index(b, t, 0, i)] = Narrow<T>(value);
  }
  void FillNormal(Random& random) const {
    for (int64_t row = 0; row < buffer.count(); row += StrideT()) {
      for (int64_t i = 0; i < heads * width; ++i) buffer[row + i] = Narrow<T>(random.Normal());
    }
  }
};

// The tensors of one call and its arguments.
template <class T>
struct Attention {
  Problem p;
  Placer place;
  Tensor4<T> q, k, v, dout, dq, dk, dv;
  Buffer<T> out;
  Buffer<float> lse, alibi, sinks, cos, minus_sin;
  Buffer<int64_t> start, length, documents, dropout_seed;
  int64_t bias_s, bias_t, bias_h, bias_b;
  Buffer<T> bias;
  Buffer<float> dbias, dalibi, dalibi_rows, dsinks, dsinks_rows;
  AttentionForwardArgs forward{};
  AttentionBackwardArgs backward{};

  Attention(const Problem& problem, int placement, uint64_t seed)
      : p(problem),
        place(placement),
        q(place, Role::kInput, p.batch, p.queries, p.heads, p.width),
        k(place, Role::kInput, p.batch, p.keys, p.kv_heads, p.width),
        v(place, Role::kInput, p.batch, p.keys, p.kv_heads, p.width),
        dout(place, Role::kInput, p.batch, p.queries, p.heads, p.width),
        dq(place, Role::kOutput, p.batch, p.queries, p.heads, p.width),
        dk(place, Role::kOutput, p.batch, p.keys, p.kv_heads, p.width),
        dv(place, Role::kOutput, p.batch, p.keys, p.kv_heads, p.width),
        out(place.Out<T>(p.batch * p.queries * p.heads * p.width)),
        lse(place.Out<float>(p.batch * p.heads * p.queries)),
        alibi(place.In<float>(p.heads)),
        sinks(place.In<float>(p.heads)),
        cos(place.In<float>(p.queries * p.pairs)),
        minus_sin(place.In<float>(p.queries * p.pairs)),
        start(place.In<int64_t>(p.batch)),
        length(place.In<int64_t>(p.batch)),
        documents(place.In<int64_t>(4)),
        dropout_seed(place.In<int64_t>(1)),
        bias_s(p.bias == Bias::kByHead ? 2 : 1),
        bias_t(p.keys * bias_s + kGap),
        bias_h(p.queries * bias_t),
        bias_b(p.BiasHeads() * bias_h),
        bias(place.In<T>(p.BiasBatch() * bias_b)),
        dbias(place.Out<float>(p.BiasBatch() * p.BiasHeads() * p.queries * p.keys)),
        dalibi(place.Out<float>(p.heads)),
        dalibi_rows(place.Out<float>(3 * p.batch * p.heads * p.queries)),
        dsinks(place.Out<float>(p.heads)),
        dsinks_rows(place.Out<float>(p.batch * p.heads * p.queries)) {
    Random random(seed);
    for (const auto* tensor : {&q, &k, &v, &dout}) tensor->FillNormal(random);
    cos.FillNormal(random);
    minus_sin.FillNormal(random);
    for (int64_t h = 0; h < p.heads; ++h) alibi[h] = 0.125f * static_cast<float>(h + 1);
    for (int64_t h = 0; h < p.heads; ++h) sinks[h] = 2.0f - 1.5f * static_cast<float>(h);
    for (int64_t slice = 0; slice < p.BiasBatch() * p.BiasHeads(); ++slice) {
      for (int64_t i = 0; i < p.queries; ++i) {
        for (int64_t j = 0; j < p.keys; ++j) {
          const bool masks = (i + j) % 7 == 3 && j % 3 == 2;  // leaves every query at least one of its keys
          bias[slice * bias_h + i * bias_t + j * bias_s] = Narrow<T>(masks ? -kInf : random.Normal());
        }
      }
    }
    dropout_seed[0] = -123456789012345;
    dbias.Fill([](int64_t) { return 0.0; });
    dalibi_rows.Fill([](int64_t) { return 0.0; });
    const int64_t starts[] = {3, 0, p.keys + 2}, lengths[] = {p.keys, p.keys / 2, 4};
    for (int64_t b = 0; b < p.batch; ++b) {
      start[b] = starts[b % 3];
      length[b] = lengths[b % 3];
    }
    const int64_t ends[] = {0, p.keys / 3, p.keys / 3, p.keys};  // the second document is empty
    for (int i = 0; i < 4; ++i) documents[i] = ends[i];
    // Padded keys are NaN: they must not affect a result.
    for (int64_t b = 0; p.range == Range::kPadded && b < p.batch; ++b) {
      for (int64_t j = 0; j < p.keys; ++j) {
        if (j >= start[b] && j < start[b] + length[b]) continue;
        k.FillRow(b, j, kNan);
        v.FillRow(b, j, kNan);
      }
    }
    const bool padded = p.range == Range::kPadded, packed = p.range == Range::kDocuments;
    const AttentionProblem problem_args = {
        .dtype = kDtype<T>, .batch = p.batch, .queries = p.queries, .keys = p.keys, .heads = p.heads,
        .kv_heads = p.kv_heads, .width = p.width, .q = q.Input(), .k = k.Input(), .v = v.Input(), .causal = p.causal,
        .scale = kScale, .window = p.window, .softcap = p.softcap, .alibi = p.alibi ? alibi.data() : nullptr,
        .sinks = p.sinks ? sinks.data() : nullptr,
        .kv_start = padded ? start.data() : nullptr, .kv_len = padded ? length.data() : nullptr,
        .cu_seqlens = packed ? documents.data() : nullptr, .documents = packed ? 3 : 0,
        .bias = p.bias == Bias::kNone ? nullptr : bias.data(), .bias_dtype = kDtype<T>, .bias_batch = p.BiasBatch(),
        .bias_heads = p.BiasHeads(), .bias_stride_b = bias_b, .bias_stride_h = bias_h, .bias_stride_t = bias_t,
        .bias_stride_s = bias_s, .dropout = p.dropout, .seed = p.dropout > 0.0 ? dropout_seed.data() : nullptr};
    static_cast<AttentionProblem&>(forward) = problem_args;
    forward.out = out.data();
    forward.lse = lse.data();
    static_cast<AttentionProblem&>(backward) = problem_args;
    backward.out = out.data();
    backward.lse = lse.data();
    backward.dout = dout.Input();
    backward.dq = dq.Output();
    backward.dk = dk.Output();
    backward.dv = dv.Output();
    backward.cos = p.pairs > 0 ? cos.data() : nullptr;
    backward.minus_sin = minus_sin.data();
    backward.pairs = p.pairs;
    backward.interleaved = p.interleaved;
    backward.dbias = p.bias == Bias::kNone ? nullptr : dbias.data();
    backward.dalibi = p.alibi ? dalibi.data() : nullptr;
    backward.dalibi_rows = p.alibi ? dalibi_rows.data() : nullptr;
    backward.dsinks = p.sinks ? dsinks.data() : nullptr;
    backward.dsinks_rows = p.sinks ? dsinks_rows.data() : nullptr;
  }

  // The dropout factor of a weight, by Philox4x32-7.
  double Factor(int64_t b, int64_t h, int64_t i, int64_t j) const {
    if (p.dropout == 0.0) return 1.0;
    const uint64_t key = static_cast<uint64_t>(dropout_seed[0]);
    uint64_t c[] = {static_cast<uint64_t>(i), static_cast<uint64_t>(j / 4), static_cast<uint64_t>(b),
                    static_cast<uint64_t>(h)};
    uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 7; ++round, low += 0x9e3779b9, high += 0xbb67ae85) {
      const uint64_t first = c[0] * 0xd2511f53, second = c[2] * 0xcd9e8d57;
      c[0] = (second >> 32) ^ c[1] ^ low;
      c[1] = second & 0xffffffff;
      c[2] = (first >> 32) ^ c[3] ^ high;
      c[3] = first & 0xffffffff;
    }
    return static_cast<double>(c[j % 4]) >= p.dropout * 0x1p32 ? 1.0 / (1.0 - p.dropout) : 0.0;
  }

  int64_t Slice(int64_t b, int64_t h) const {
    return (p.BiasBatch() > 1 ? b * p.BiasHeads() : 0) + (p.BiasHeads() > 1 ? h : 0);
  }
  double BiasAt(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return p.bias == Bias::kNone ? 0.0 : bias.At(Slice(b, h) * bias_h + i * bias_t + j * bias_s);
  }
  // The distance of key j from query i, as in ALiBi.
  double Distance(int64_t i, int64_t j) const { return static_cast<double>(j - i - (p.keys - p.queries)); }

  // Whether query i sees key j.
  bool Sees(int64_t b, int64_t i, int64_t j) const {
    const int64_t position = i + p.keys - p.queries;
    if (p.causal && j > position) return false;
    if (p.window > 0 && j <= position - p.window) return false;
    if (p.range == Range::kPadded) return j >= start[b] && j < start[b] + length[b];
    return p.range == Range::kAll || (i < documents[1]) == (j < documents[1]);
  }
};

}  // namespace peak::test

#endif  // PEAK_TESTS_NATIVE_ATTENTION_CASE_H_
