// What is done once for each row: the results of the forward pass, the numbers that the backward pass needs of a query.
#pragma once

#include "attention_scores.h"

namespace fastseq::FASTSEQ_ISA::attention {

// lse, and what makes weights of scores, of a row with this highest score and this sum of weights relative to it.
template <class T>
FS_DEVICE void write_normalizer(const Call& call, const Scoring<T>& scoring, const Sequence& s, int64_t head,
                                int query, T highest, T sum) {
  const AttentionArgs& a = call.a;
  const bool nothing = sum == 0;
  if (a.lse.data) {
    *s.of_query<T>(a.lse, head, query) = nothing ? -T(INFINITY) : highest * scoring.unit + log(sum);
  }
  if (a.highest.data) {
    *s.of_query<T>(a.highest, head, query) = nothing || !is_finite(highest) ? T(0) : highest;
    *s.of_query<T>(a.inverse_sum, head, query) = nothing ? T(0) : T(1) / sum;
  }
}

template <class E, class T>
FS_DEVICE Two<E> narrow_two(T first, T second) {
  Two<E> rounded;
  if constexpr (sizeof(E) == 2) {
    const uint32_t word = pack(first, second, E{});
    rounded.value[0].bits = uint16_t(word), rounded.value[1].bits = uint16_t(word >> 16);
  } else {
    narrow(first, rounded.value[0]), narrow(second, rounded.value[1]);
  }
  return rounded;
}
// A lane's features of a row, from the warp's first column on: value(n, e) is e of two of tile n. With `pairs` two lie at
// a multiple of two elements.
template <class E, int kTiles, class Value>
FS_DEVICE void write_row(E* row, int first_column, int features, bool pairs, const Value& value) {
  const int column = first_column + 2 * (thread_index() % 4);
  E* const to = row + column;
  if (pairs && features % 2 == 0) {
    FS_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      if (column + 8 * n < features)
        *reinterpret_cast<Two<E>*>(to + 8 * n) = narrow_two<E>(value(n, 0), value(n, 1));
    }
    return;
  }
  FS_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    FS_UNROLL
    for (int e = 0; e < 2; ++e) {
      if (column + 8 * n + e < features) narrow(value(n, e), to[8 * n + e]);
    }
  }
}
// What rounding takes from a number: nothing where that is no number.
template <class E, class T>
FS_DEVICE T remainder_of(T x) {
  E rounded;
  narrow(x, rounded);
  const T r = x - widen(rounded);
  return is_finite(r) ? r : T(0);
}

// A lane's features of a query's output, as write_row() has them, and what rounding took from them if somebody wants it.
template <class E, int kTiles, class Value>
FS_DEVICE void write_with_remainder(const HeadTensor& to, const HeadTensor& remainder, const Sequence& s,
                                    int64_t head, int query, int first_column, int features, bool pairs,
                                    const Value& value) {
  write_row<E, kTiles>(s.query_row<E>(to, head, query), first_column, features, pairs, value);
  if (sizeof(E) == 2 && remainder.data) {
    write_row<E, kTiles>(s.query_row<E>(remainder, head, query), first_column, features, pairs,
                         [&](int n, int e) { return remainder_of<E>(value(n, e)); });
  }
}

// Two neighbouring features of a row, rounded; with `pair` at a multiple of two elements. The second may not be there.
template <class E, class T>
FS_DEVICE void write_two(E* to, T first, T second, bool two, bool pair) {
  const Two<E> rounded = narrow_two<E>(first, second);
  if (two && pair) {
    *reinterpret_cast<Two<E>*>(to) = rounded;
  } else {
    to[0] = rounded.value[0];
    if (two) to[1] = rounded.value[1];
  }
}
// Of output, and what rounding took from it: nothing where that is no number.
template <class E, class T>
FS_DEVICE void write_output(const Call& call, const Sequence& s, int64_t head, int query, int column, T first,
                            T second) {
  const AttentionArgs& a = call.a;
  const bool two = column + 1 < a.value_size;
  write_two(s.query_row<E>(a.output, head, query) + column, first, second, two, call.pairs_of_output);
  if constexpr (sizeof(E) == 2) {
    if (!a.remainder.data) return;
    write_two(s.query_row<E>(a.remainder, head, query) + column, remainder_of<E>(first),
              remainder_of<E>(second), two, call.pairs_of_output);
  }
}

// Packed sequences need not begin with the first row, nor end with the last: what is outside of all sees nothing. Its
// results are written before the others, whose kernels know sequences alone. One warp a row of a head.
template <class M, bool kBackward>
struct Outside {
  using E = typename M::Element;
  using T = typename M::Sum;
  using Args = Call;
  static constexpr int kThreads = 128, kRows = kThreads / kWarp;

  static FS_DEVICE void run(const Call& call) {
    const AttentionArgs& a = call.a;
    int64_t index = int64_t(block_index()) * kRows + thread_index() / kWarp;
    const int64_t of_queries = a.heads * a.queries;
    if (index < of_queries) {
      const int64_t head = index / a.queries, row = index % a.queries;
      if (inside(a.cu_seqlens_q, a.batch, row)) return;
      if constexpr (kBackward) {
        clear(a.grad_query, head, row, a.head_size);
      } else {
        clear(a.output, head, row, a.value_size);
        clear(a.remainder, head, row, a.value_size);
        fill(a.lse, head, row, -T(INFINITY));
        fill(a.highest, head, row, T(0));
        fill(a.inverse_sum, head, row, T(0));
      }
    } else if (kBackward && index < of_queries + a.kv_heads * a.keys) {
      index -= of_queries;
      const int64_t head = index / a.keys, row = index % a.keys;
      if (inside(a.cu_seqlens_k, a.batch, row)) return;
      clear(a.grad_key, head, row, a.head_size);
      clear(a.grad_value, head, row, a.value_size);
    }
  }

 private:
  static FS_DEVICE bool inside(const int64_t* starts, int64_t batch, int64_t row) {
    return row >= starts[0] && row < starts[batch];
  }
  static FS_DEVICE void clear(const HeadTensor& t, int64_t head, int64_t row, int64_t features) {
    if (!t.data) return;
    E* const to = static_cast<E*>(t.data) + head * t.stride[1] + row * t.stride[2];
    for (int64_t i = thread_index() % kWarp; i < features; i += kWarp) narrow(T(0), to[i]);
  }
  static FS_DEVICE void fill(const HeadRows& t, int64_t head, int64_t row, T value) {
    if (t.data && thread_index() % kWarp == 0) static_cast<T*>(t.data)[head * t.stride[1] + row] = value;
  }
};

// Rows of [B, Hkv, parts, rows], which the parts of the keys leave.
FS_DEVICE int64_t part_row(const Call& call, int64_t sequence, int64_t kv_head, int part, int64_t row) {
  const int64_t rows = call.a.queries * call.group;
  return ((sequence * call.a.kv_heads + kv_head) * call.parts + part) * rows + row;
}

// The sum, or the highest, of a value of each lane of so many, a power of two.
template <int kLanes = kWarp, class T>
FS_DEVICE T sum_of_lanes(T x) {
  FS_UNROLL
  for (int mask = kLanes / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
template <class T>
FS_DEVICE T highest_of_lanes(T x) {
  FS_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = max(x, shuffle_xor(x, mask));
  return x;
}

// Joins the parts of a row: one warp a row. A lane has every 32nd part's weight, in shared memory for the others, and of
// all parts its own features, two of each 64.
template <class M>
struct Combine {
  using E = typename M::Element;
  using T = typename M::Sum;
  using Args = Call;
  static constexpr int kThreads = 128, kRows = kThreads / kWarp, kMostFeatures = 256;
  static constexpr int kSharedBytes = kThreads * int(sizeof(T));

  static FS_DEVICE void run(const Call& call) {
    const AttentionArgs& a = call.a;
    const int lane = thread_index() % kWarp;
    const int64_t rows = a.queries * call.group;
    const int64_t index = int64_t(block_index()) * kRows + thread_index() / kWarp;
    if (index >= rows * a.kv_heads * a.batch) return;
    const int64_t row = index % rows, kv_head = index / rows % a.kv_heads;
    const Sequence s(a, int(index / rows / a.kv_heads));
    const int64_t head = kv_head * call.group + row % call.group;
    const int query = int(row / call.group);
    const Scoring<T> scoring(call);
    const int64_t first = part_row(call, s.index, kv_head, 0, row);  // of each part, `rows` apart
    const T* const highests = static_cast<const T*>(call.part_highest) + first;
    const T* const sums = static_cast<const T*>(call.part_sum) + first;
    T* const weights = reinterpret_cast<T*>(shared_memory()) + thread_index() / kWarp * kWarp;

    T highest = -T(INFINITY);
    for (int part = lane; part < call.parts; part += kWarp) highest = max(highest, highests[part * rows]);
    highest = highest_of_lanes(highest);
    const T from = highest == -T(INFINITY) ? T(0) : highest;
    T sum = 0;
    T output[kMostFeatures / 64][2] = {};
    for (int begin = 0; begin < call.parts; begin += kWarp) {
      const int own = begin + lane;
      T weight = 0;
      if (own < call.parts) {
        weight = weight_of(highests[own * rows], from, scoring.factor);
        sum = fma(weight, sums[own * rows], sum);
      }
      sync_warp();  // nobody reads the last ones any more
      weights[lane] = weight;
      sync_warp();
      const int count = smaller(call.parts - begin, kWarp);
      FS_NO_UNROLL
      for (int i = 0; i < count; ++i) {
        const T* const part =
            static_cast<const T*>(call.part_output) + (first + (begin + i) * rows) * a.value_size;
        FS_UNROLL
        for (int j = 0; j < kMostFeatures / 64; ++j) {
          const int column = 64 * j + 2 * lane;
          if (column < a.value_size) output[j][0] = fma(weights[i], part[column], output[j][0]);
          if (column + 1 < a.value_size) output[j][1] = fma(weights[i], part[column + 1], output[j][1]);
        }
      }
    }
    sum = sum_of_lanes(sum);
    const T inverse = (sum == 0 ? T(0) : T(1) / sum) * T(1 / (1 - a.dropout_p));
    FS_UNROLL
    for (int j = 0; j < kMostFeatures / 64; ++j) {
      const int column = 64 * j + 2 * lane;
      if (column < a.value_size)
        write_output<E>(call, s, head, query, column, output[j][0] * inverse, output[j][1] * inverse);
    }
    if (lane == 0) write_normalizer(call, scoring, s, head, query, highest, sum);
  }
};

// A row of a head, which has as many lanes as there are 16 bytes in it, 32 at most.
template <class M, int kFeatures>
struct DeltaRow {
  using E = typename M::Element;
  using T = typename M::Sum;
  static constexpr int kChunk = 16 / int(sizeof(E));
  static constexpr int kLanes = kFeatures / kChunk < kWarp ? kFeatures / kChunk : kWarp;
  static constexpr int kThreads = 128, kRows = kThreads / kLanes;

  int64_t b, head, query;
  int features;
  bool writes;

  FS_DEVICE explicit DeltaRow(const Call& call) {
    const AttentionArgs& a = call.a;
    const int64_t index = int64_t(block_index()) * kRows + thread_index() / kLanes;
    const int64_t batch = a.cu_seqlens_q ? 1 : a.batch, rows = batch * a.heads * a.queries;
    const int64_t known = index < rows ? index : rows - 1;  // all lanes meet
    query = known % a.queries, head = known / a.queries % a.heads, b = known / a.queries / a.heads;
    features = int(a.value_size);
    writes = index < rows && thread_index() % kLanes == 0;
  }

  // Of a gradient and what it is of, with what rounding took from that. `aligned`: rows begin at a multiple of 16 bytes.
  FS_DEVICE T dot(const HeadTensor& of_grad, const HeadTensor& of, const HeadTensor& remainder,
                  bool aligned) const {
    const E *const grad = at(of_grad), *const output = at(of),
                   *const rest = remainder.data ? at(remainder) : nullptr;
    T sum = 0;
    for (int first = thread_index() % kLanes * kChunk; first < features; first += kLanes * kChunk) {
      const int count = smaller(features - first, kChunk);
      const bool whole = aligned && count == kChunk;
      E of_output[kChunk], of_grad[kChunk], of_rest[kChunk] = {};
      read(of_output, output + first, count, whole), read(of_grad, grad + first, count, whole);
      if (rest) read(of_rest, rest + first, count, whole);
      FS_UNROLL
      for (int i = 0; i < kChunk; ++i) {
        const T x = T(widen(of_output[i])) + T(widen(of_rest[i]));
        if (i < count) sum = fma(T(widen(of_grad[i])), x, sum);
      }
    }
    return sum_of_lanes<kLanes>(sum);
  }
  FS_DEVICE void write(const HeadRows& to, T sum, const HeadRows& grad_lse) const {
    if (!writes) return;
    if (grad_lse.data) sum -= number(grad_lse);
    number(to) = sum;
  }

 private:
  FS_DEVICE const E* at(const HeadTensor& t) const {
    return static_cast<const E*>(t.data) + b * t.stride[0] + head * t.stride[1] + query * t.stride[2];
  }
  FS_DEVICE T& number(const HeadRows& t) const {
    return static_cast<T*>(t.data)[b * t.stride[0] + head * t.stride[1] + query];
  }
  // `whole`: all of it, from a multiple of 16 bytes.
  static FS_DEVICE void read(E (&to)[kChunk], const E* from, int count, bool whole) {
    if (whole) {
      const Vector16 words = *reinterpret_cast<const Vector16*>(from);
      memcpy(to, &words, 16);
      return;
    }
    FS_UNROLL
    for (int i = 0; i < kChunk; ++i) to[i] = i < count ? from[i] : E{};
  }
};

// delta of each query: the sum over features of grad_output * output, less the gradient of lse.
template <class M, int kFeatures>
struct Delta {
  using Args = Call;
  using Row = DeltaRow<M, kFeatures>;
  static constexpr int kThreads = Row::kThreads, kRows = Row::kRows;

  static FS_DEVICE void run(const Call& call) {
    const AttentionArgs& a = call.a;
    const Row row(call);
    row.write(call.delta, row.dot(a.grad_output, a.output, a.remainder, call.aligned_deltas), a.grad_lse);
  }
};

// The gradient of a head's sink in one sequence: its weight times what the sum of all gradients of a softmax leaves,
// - delta, added up over the queries. One warp a head and sequence, in a fixed order.
template <class M>
struct GradSinks {
  using T = typename M::Sum;
  using Args = Call;
  static constexpr int kThreads = kWarp;

  static FS_DEVICE void run(const Call& call) {
    const AttentionArgs& a = call.a;
    const Sequence s(a, int(block_index() / a.heads));
    const int64_t head = block_index() % a.heads;
    const Scoring<T> scoring(call);
    const T sink = static_cast<const T*>(a.sinks)[head] / scoring.unit;
    T sum = 0;
    for (int i = thread_index(); i < s.queries; i += kWarp) {
      const T inverse = *s.of_query<T>(a.inverse_sum, head, i);
      const T weight = weight_of(sink, *s.of_query<T>(a.highest, head, i), scoring.factor) * inverse;
      const T delta = *s.of_query<T>(call.delta, head, i);
      if (weight != 0) sum = fma(-weight, delta, sum);
    }
    sum = sum_of_lanes(sum);
    if (thread_index() == 0) static_cast<T*>(a.grad_sinks)[s.index * a.heads + head] = sum;
  }
};

}  // namespace fastseq::FASTSEQ_ISA::attention
