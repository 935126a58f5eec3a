// Gradients of queries for compute capability 9.0: GradQueries of attention_backward.h, as
// attention_hopper_backward_keys.h, which tells how, is GradKeys.
//
//   S = Q K^T, dP = dO V^T, P = exp2((S - highest) factor) inverse_sum, dS = P (dP - delta), dQ = dQ + dS K
//
// Block: 128 queries of one query head, which stay in shared memory with the gradients of their outputs. It goes over
// the keys that any of them sees, which come through three stages, 96 at a time with 128 features.
// Warpgroup 0 brings them; warpgroups 1 and 2 have 64 queries each, whose numbers are in registers.
// Where its queries see few keys, all of which are in one tile, it makes delta too: see kFewKeys. Without gradients of
// queries that is all that is done.
//
// Cost of a tile of 128 queries and 96 keys, 128 features: 3 x 128 x 96 x 128 = 4.7 M multiply-adds, 2304 cycles of
// the tensor cores; 48 KB of K and V from the second-level cache (21 bytes a cycle); of shared memory, for each
// warpgroup, twice 40 KB for S and dP and once 24 KB: 1664 cycles in all; 12288 ex2, 768 cycles, and some ten other
// operations for each, 960 cycles.
// Registers: 64 sums, 48 + 48 scores, and what is left of 240. Shared memory: 208 KB.
#pragma once

#include "attention_hopper_backward_tiles.h"

namespace fastseq::FASTSEQ_ISA::attention {

template <class E, int kFeatures, bool kMasked>
struct HopperGradQueries {
  using Args = HopperCall;
  static constexpr HopperBackwardShape kShape = hopper_grad_queries(kFeatures, kMasked);
  static constexpr int kThreads = kHopperBackwardThreads, kSharedBytes = kShape.shared_bytes();
  static constexpr int kQueries = kShape.own, kKeys = kShape.other, kStages = kShape.stages;
  static constexpr int kQueryBytes = hopper_tile_bytes(kFeatures, kQueries);
  static constexpr int kKeyBytes = hopper_tile_bytes(kFeatures, kKeys);
  static_assert(kKeys >= kFewKeys);

  struct Shared {
    unsigned char *queries, *grads, *keys, *values;
    PhaseBarrier *own, *full, *empty;
    int* flags;

    FS_DEVICE explicit Shared(unsigned char* memory)
        : queries(memory),
          grads(queries + kQueryBytes),
          keys(grads + kQueryBytes),
          values(keys + kStages * kKeyBytes),
          own(reinterpret_cast<PhaseBarrier*>(memory + kShape.tile_bytes())),
          full(own + 1),
          empty(full + kStages),
          flags(reinterpret_cast<int*>(empty + kStages)) {}
  };
  // Made by each of the roles for itself, so that none has registers for what another needs.
  struct Work {
    Sequence s;
    int64_t kv_head, head;
    int first_query, first_key, tiles;
    bool nothing, few_keys;

    FS_DEVICE explicit Work(const Call& call)
        : Work(call, place_of_block(call, call.a.cu_seqlens_q, call.a.queries, 1, kQueries, true)) {}
    FS_DEVICE Work(const Call& call, const Place& place)
        : s(call.a, place.sequence),
          kv_head(place.kv_head),
          head(kv_head * call.group + place.part),
          first_query(int(place.tile * kQueries)),
          first_key(0),
          tiles(0),
          nothing(place.tile < 0 || first_query >= s.queries),
          few_keys(false) {
      if (nothing) return;
      const int last_query = smaller(first_query + kQueries, s.queries) - 1;
      first_key = s.visible(first_query).begin;
      const int visible = larger(s.visible(last_query).end - first_key, 0);
      few_keys = visible <= kFewKeys;
      nothing = !few_keys && !call.a.grad_query.data;
      if (!nothing) tiles = (visible + kKeys - 1) / kKeys;
    }
  };

  static FS_DEVICE void run(const Args& args) {
    const Shared shared(tile_memory());
    if (thread_index() == 0) {
      barrier_begin(shared.own, 1);
      for (int i = 0; i < kStages; ++i)
        barrier_begin(shared.full + i, 1), barrier_begin(shared.empty + i, kConsumerWarps);
      barriers_begun();
    }
    sync_block();
    if (thread_index() < kWarpgroup) {
      registers_give<kProducerRegisters>();
      if (thread_index() < kWarp && one_lane()) bring_tiles(args, shared, Work(args.call));
    } else {
      registers_take<kConsumerRegisters>();
      consume(args.call, shared, Work(args.call), thread_index() / kWarpgroup - 1);
    }
  }

 private:
  struct Step {
    int tile = 0, stage = 0, parity = 0;

    FS_DEVICE void advance() {
      ++tile;
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
  };

  static FS_DEVICE void bring_tiles(const Args& args, const Shared& shared, const Work& work) {
    if (work.tiles == 0) return;
    const Sequence& s = work.s;
    const int row = int(s.first_query) + work.first_query, b = int(s.b);
    const int head = int(work.head), kv_head = int(work.kv_head);
    barrier_expect(shared.own, 2 * kQueryBytes);
    load_features<kFeatures>(shared.queries, args.query, shared.own, kQueries, row, head, b);
    load_features<kFeatures>(shared.grads, args.grad_output, shared.own, kQueries, row, head, b);
    FS_NO_UNROLL
    for (Step at; at.tile < work.tiles; at.advance()) {
      PhaseBarrier* const full = shared.full + at.stage;
      const int key_row = int(s.first_key) + work.first_key + at.tile * kKeys;
      barrier_wait(shared.empty + at.stage, at.parity ^ 1);
      barrier_expect(full, 2 * kKeyBytes);
      load_features<kFeatures>(shared.keys + at.stage * kKeyBytes, args.key, full, kKeys, key_row, kv_head,
                               b);
      load_features<kFeatures>(shared.values + at.stage * kKeyBytes, args.value, full, kKeys, key_row,
                               kv_head, b);
    }
  }

  // A thread's two queries.
  struct Queries {
    float highest[2], inverse_sum[2], delta[2];
  };

  // 64 queries.
  static FS_DEVICE void consume(const Call& call, const Shared& shared, const Work& work, int consumer) {
    if (work.nothing) return;
    const int own_row = 64 * consumer;
    const AttentionArgs& a = call.a;
    const Sequence& s = work.s;
    const Band band(s);
    const int first_query = work.first_query + own_row;
    const float factor = Scoring<float>(call).factor;
    const uint64_t queries = operand_of_tiles<Major::k>(shared.queries + own_row * kTileRowBytes, kQueries);
    const uint64_t grads = operand_of_tiles<Major::k>(shared.grads + own_row * kTileRowBytes, kQueries);
    Queries of{};
    FS_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int query = first_query + row_of_accumulator(thread_index(), 2 * half);
      if (query >= s.queries) continue;
      of.highest[half] = *s.of_query<const float>(a.highest, work.head, query);
      of.inverse_sum[half] = *s.of_query<const float>(a.inverse_sum, work.head, query);
      of.delta[half] = *delta_of(call, work, query);
    }
    float sums[kFeatures / 2];
    FS_UNROLL
    for (int i = 0; i < kFeatures / 2; ++i) sums[i] = 0;
    const auto keys_of = [&](const Step& at) { return shared.keys + at.stage * kKeyBytes; };
    if (work.tiles) {
      float x[kKeys / 2], dx[kKeys / 2];
      const auto begin_scores = [&](const Step& at) {
        barrier_wait(shared.full + at.stage, at.parity);
        wgmma_fence(x);
        multiply_features<E, kFeatures, kKeys>(x, queries, kQueries, keys_of(at));
      };
      const auto begin_grads = [&](const Step& at) {
        wgmma_fence(dx);
        multiply_features<E, kFeatures, kKeys>(dx, grads, kQueries, shared.values + at.stage * kKeyBytes);
      };
      Step now;
      barrier_wait(shared.own, 0);
      begin_scores(now);
      begin_grads(now);
      if (consumer == 1) named_arrive(kFirstTurn, kConsumerThreads);
      wgmma_wait<0>(x, dx);
      FS_NO_UNROLL
      do {
        const int key = work.first_key + now.tile * kKeys;
        const auto at_edge = [&] {
          return any_in_warp(!band.shows_all(work.first_query, kQueries, key, kKeys));
        };
        const bool hides = kMasked || at_edge();
        bool special = false;
        if (hides) {
          int* const flags = shared.flags + now.stage * kConsumerWarps;
          special = any_of_consumers(special_in<E>(keys_of(now), kKeyBytes), flags);
          const Orient<true> orient{work.first_query + first_row_of_warp(kQueries), key};
          score_and_hide<kMasked, E>(call, s, band, orient, int(work.head), !kMasked || at_edge(), x);
          weigh<true>(x, of, factor);
          if (work.few_keys) sum_few(call, work, first_query, x, dx, of);
          grad_scores<true>(x, dx, of);
        } else {
          weigh<false>(x, of, factor);
          grad_scores<false>(x, dx, of);
        }
        if (special) {
          add_special_rows<E>(sums, dx, keys_of(now));
          clear_special<E>(keys_of(now), kKeyBytes, nullptr, 0);
        }
        uint32_t words[kKeys / 16][4];
        round_to_words<E>(dx, words);
        named_sync(kFirstTurn + consumer, kConsumerThreads);
        wgmma_fence(sums, words);
        add_rows<E, kFeatures, kKeys>(sums, words, keys_of(now));
        Step next = now;
        next.advance();
        const bool more = next.tile < work.tiles;  // see attention_hopper_backward_keys.h
        const Step then = more ? next : now;
        begin_scores(then);
        wgmma_wait<1>(sums, words);
        sync_warp();
        if (more && thread_index() % kWarp == 0) barrier_arrive(shared.empty + now.stage);
        begin_grads(then);
        named_arrive(kFirstTurn + 1 - consumer, kConsumerThreads);
        wgmma_wait<0>(x, dx);
        now = next;
      } while (now.tile < work.tiles);
    }

    if (!a.grad_query.data) return;
    E* rows[2];
    FS_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int query = first_query + row_of_accumulator(thread_index(), 2 * half);
      rows[half] = query < s.queries ? s.template query_row<E>(a.grad_query, work.head, query) : nullptr;
    }
    write_features(rows, sums, int(a.head_size), float(a.scale), call.pairs_of_grad_query);
  }

  static FS_DEVICE float* delta_of(const Call& call, const Work& work, int query) {
    return work.s.template of_query<float>(call.delta, work.head, query);
  }

  // As in attention_hopper_backward_keys.h, of rows.
  template <bool kHides>
  static FS_DEVICE void weigh(float (&x)[kKeys / 2], const Queries& of, float factor) {
    FS_UNROLL
    for (int i = 0; i < kKeys / 2; ++i) {
      const float weight = weight_of(x[i], of.highest[i / 2 % 2], factor);
      x[i] = kHides && weight == 0 ? 0.0f : weight * of.inverse_sum[i / 2 % 2];
    }
  }
  template <bool kHides>
  static FS_DEVICE void grad_scores(const float (&x)[kKeys / 2], float (&dx)[kKeys / 2], const Queries& of) {
    FS_UNROLL
    for (int i = 0; i < kKeys / 2; ++i) {
      dx[i] = kHides && x[i] == 0 ? 0.0f : x[i] * (dx[i] - of.delta[i / 2 % 2]);
    }
  }

  // delta of the queries, all of whose keys are in this tile, here and where others read it.
  static FS_DEVICE void sum_few(const Call& call, const Work& work, int first_query,
                                const float (&x)[kKeys / 2], const float (&dx)[kKeys / 2], Queries& of) {
    const AttentionArgs& a = call.a;
    const Sequence& s = work.s;
    FS_UNROLL
    for (int half = 0; half < 2; ++half) {
      float sum = 0;
      FS_UNROLL
      for (int i = 0; i < kFewKeys / 2; ++i) {  // from the tile's first key on
        if (i / 2 % 2 == half && x[i] != 0) sum = fma(x[i], dx[i], sum);
      }
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      const int query = first_query + row_of_accumulator(thread_index(), 2 * half);
      if (query >= s.queries) continue;
      if (a.grad_lse.data) sum -= *s.of_query<const float>(a.grad_lse, work.head, query);
      of.delta[half] = sum;
      if (thread_index() % 4 == 0) *delta_of(call, work, query) = sum;
    }
  }
};

}  // namespace fastseq::FASTSEQ_ISA::attention
