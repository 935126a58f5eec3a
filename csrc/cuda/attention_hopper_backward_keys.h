// Gradients of keys and values for compute capability 9.0: GradKeys of attention_backward.h, with products that a
// warpgroup issues (wgmma) and tiles that come by themselves (TMA).
//
//   S^T = K Q^T, dP^T = V dO^T, P = exp2((S - highest) factor) inverse_sum, dS = P (dP - delta)
//   dV = dV + P^T dO, dK = dK + dS^T Q
//
// Block: 128 keys of a key head, whose keys and values stay in shared memory. It goes over the query heads that share
// them, one after the other, and over the queries that see any of them, which come through two stages.
// Warpgroup 0 brings them: one thread the tiles, three warps the numbers of each query
// (highest, inverse_sum, delta).
// Warpgroups 1 and 2 have 64 keys each, S^T and dP^T of these in registers, and feed P^T and dS^T from there to the
// next products. Nothing goes from one to the other, so that one multiplies while the other has its exponentials.
// From 192 features on they have the same 64 keys: 1 makes dK, 2 dV; S is made by both.
//
// Assumes tensors that a tensor map can tell (16-byte strides), and no options but a mask, or a scale that needs scores (kMasked).
//
// Cost of a tile of 128 keys and 64 queries, 128 features: 4 x 128 x 64 x 128 = 4.2 M multiply-adds, 2048 cycles of
// the tensor cores; 32 KB of Q and dO from the second-level cache (16 bytes a cycle) and, of shared memory, for each warpgroup
// twice 32 KB for S and dP, whose left operand is there too, and twice 16 KB: 1536 cycles in all; 8192 ex2, 512
// cycles, and some ten other operations for each, 640 cycles, beside the products of the other warpgroup.
// Registers: 64 + 64 sums, 32 + 32 scores, and what is left of 240. Shared memory: 130 KB.
#pragma once

#include "attention_hopper_backward_tiles.h"

namespace fastseq::FASTSEQ_ISA::attention {

template <class E, int kFeatures, bool kMasked>
struct HopperGradKeys {
  using Args = HopperCall;
  static constexpr HopperGradShape kShape = hopper_grad_keys(kFeatures, kMasked);
  static constexpr int kThreads = kHopperThreads, kSharedBytes = kShape.shared_bytes();
  static constexpr int kKeys = kShape.own, kQueries = kShape.other;
  static constexpr int kKeyBytes = hopper_tile_bytes(kFeatures, kKeys);
  static constexpr int kQueryBytes = hopper_tile_bytes(kFeatures, kQueries);

  struct Shared {
    unsigned char *keys, *values, *queries, *grads;
    float* statistics;
    PhaseBarrier *own, *full, *empty;
    int* flags;

    FS_DEVICE explicit Shared(unsigned char* memory)
        : keys(memory),
          values(keys + kKeyBytes),
          queries(values + kKeyBytes),
          grads(queries + 2 * kQueryBytes),
          statistics(reinterpret_cast<float*>(grads + 2 * kQueryBytes)),
          own(reinterpret_cast<PhaseBarrier*>(memory + kShape.tile_bytes() + kShape.statistics_bytes())),
          full(own + 1),
          empty(own + 3),
          flags(reinterpret_cast<int*>(own + 5)) {}
  };
  // What the block goes over: for each head `tiles` tiles of queries. Made by each of the roles for itself, so that none
  // has registers for what another needs.
  struct Work {
    Sequence s;
    int64_t kv_head;
    int first_key, own_keys, first_query, tiles;

    FS_DEVICE explicit Work(const Call& call)
        : Work(call, place_of_block(call, call.a.cu_seqlens_k, call.a.keys, 1, kKeys, false)) {}
    FS_DEVICE Work(const Call& call, const Place& place)
        : s(call.a, place.sequence),
          kv_head(place.kv_head),
          first_key(int(place.tile * kKeys)),
          // Where tensors are not packed, keys behind the sequence's length have gradients too: zero.
          own_keys(place.tile < 0        ? 0
                   : call.a.cu_seqlens_k ? s.keys
                                         : int(call.a.keys)),
          first_query(0),
          tiles(0) {
      const int last_key = smaller(first_key + kKeys, smaller(s.keys, own_keys)) - 1;
      if (last_key < first_key) return;
      const Range seeing = s.seeing(first_key, last_key);
      first_query = seeing.begin;
      tiles = larger(seeing.end - seeing.begin + kQueries - 1, 0) / kQueries;
    }
  };

  static FS_DEVICE void run(const Args& args) {
    const Shared shared(tile_memory());
    if (thread_index() == 0) {
      barrier_begin(shared.own, 1);
      for (int i = 0; i < 2; ++i)
        barrier_begin(shared.full + i, 4), barrier_begin(shared.empty + i, kConsumerWarps);
      barriers_begun();
    }
    sync_block();
    const int warpgroup = thread_index() / kWarpgroup;
    if (warpgroup == 0) {
      registers_give<kProducerRegisters>();
      if (thread_index() < kWarp) {
        if (one_lane()) bring_tiles(args, shared, Work(args.call));
      } else {
        bring_statistics(args.call, shared, Work(args.call), thread_index() / kWarp - 1);
      }
      return;
    }
    registers_take<kConsumerRegisters>();
    const Work work(args.call);
    if constexpr (!kShape.split) {
      consume<true, true>(args.call, shared, work, 64 * warpgroup - 64);
    } else if (warpgroup == 1) {
      consume<true, false>(args.call, shared, work, 0);
    } else {
      consume<false, true>(args.call, shared, work, 0);
    }
  }

 private:
  // Calls body(query head, first query, stage, parity) for each tile.
  template <class Body>
  static FS_DEVICE void for_tiles(const Call& call, const Work& work, Body body) {
    int stage = 0, parity = 0;
    FS_NO_UNROLL
    for (int i = 0; i < call.group; ++i) {
      FS_NO_UNROLL
      for (int tile = 0; tile < work.tiles; ++tile) {
        body(int(work.kv_head) * call.group + i, work.first_query + tile * kQueries, stage, parity);
        stage ^= 1;
        parity ^= stage == 0;
      }
    }
  }

  static FS_DEVICE void bring_tiles(const Args& args, const Shared& shared, const Work& work) {
    if (work.tiles == 0) return;
    const Sequence& s = work.s;
    const int key_row = int(s.first_key) + work.first_key, b = int(s.b), kv_head = int(work.kv_head);
    barrier_expect(shared.own, 2 * kKeyBytes);
    load_features<kFeatures>(shared.keys, args.key, shared.own, kKeys, key_row, kv_head, b);
    load_features<kFeatures>(shared.values, args.value, shared.own, kKeys, key_row, kv_head, b);
    for_tiles(args.call, work, [&](int head, int query, int stage, int parity) {
      PhaseBarrier* const full = shared.full + stage;
      const int row = int(s.first_query) + query;
      barrier_wait(shared.empty + stage, parity ^ 1);
      barrier_expect(full, 2 * kQueryBytes);
      load_features<kFeatures>(shared.queries + stage * kQueryBytes, args.query, full, kQueries, row, head,
                               b);
      load_features<kFeatures>(shared.grads + stage * kQueryBytes, args.grad_output, full, kQueries, row,
                               head, b);
    });
  }

  // Three rows of kQueries numbers, each brought by a warp; zeros of queries that are not there.
  static FS_DEVICE void bring_statistics(const Call& call, const Shared& shared, const Work& work,
                                         int which) {
    const AttentionArgs& a = call.a;
    const Sequence& s = work.s;
    const void* const rows = which == 0 ? a.highest.data : which == 1 ? a.inverse_sum.data : call.delta;
    const auto stride = [&](int i) {
      return which == 0 ? a.highest.stride[i] : which == 1 ? a.inverse_sum.stride[i] : call.delta_stride[i];
    };
    const int lane = thread_index() % kWarp;
    const int64_t of_head = stride(1);
    const float* from = static_cast<const float*>(rows) + s.b * stride(0) +
                        work.kv_head * call.group * of_head + s.first_query + work.first_query + lane;
    const int left = s.queries - work.first_query - lane;
    float* const to = shared.statistics + which * kQueries + lane;
    int at = 0;  // of the head's queries
    for_tiles(call, work, [&](int, int first, int stage, int parity) {
      if (first == work.first_query && at) from += of_head, at = 0;
      barrier_wait(shared.empty + stage, parity ^ 1);
      FS_NO_UNROLL
      for (int i = 0; i < kQueries; i += kWarp)
        to[stage * 3 * kQueries + i] = at + i < left ? from[at + i] : 0.0f;
      at += kQueries;
      sync_warp();
      if (lane == 0) barrier_arrive(shared.full + stage);
    });
  }

  // 64 keys, from own_row of the block's on.
  template <bool kOfKey, bool kOfValue>
  static FS_DEVICE void consume(const Call& call, const Shared& shared, const Work& work, int own_row) {
    const AttentionArgs& a = call.a;
    const Band band(work.s);
    const int first_key = work.first_key + own_row;
    const float factor = Scoring<float>(call).factor;
    const uint64_t keys = operand_of_tiles<Major::k>(shared.keys + own_row * kTileRowBytes, kKeys);
    const uint64_t values = operand_of_tiles<Major::k>(shared.values + own_row * kTileRowBytes, kKeys);
    float of_key[kFeatures / 2], of_value[kFeatures / 2];
    FS_UNROLL
    for (int i = 0; i < kFeatures / 2; ++i) of_key[i] = of_value[i] = 0;
    if (work.tiles) barrier_wait(shared.own, 0);

    for_tiles(call, work, [&](int head, int query, int stage, int parity) {
      unsigned char *const queries = shared.queries + stage * kQueryBytes, *const grads = shared.grads +
                                                                                          stage * kQueryBytes;
      const float* const statistics =
          shared.statistics + stage * 3 * kQueries + column_of_accumulator(thread_index(), 0);
      const bool hides = kMasked || any_in_warp(!band.shows_all(query, kQueries, work.first_key, kKeys));
      const bool sees = any_in_warp(band.shows_any(query, kQueries, first_key, 64));
      barrier_wait(shared.full + stage, parity);
      bool special = false;
      if (hides) {
        const uint32_t found = special_in<E>(queries, kQueryBytes) | special_in<E>(grads, kQueryBytes);
        special = any_of_consumers(found, shared.flags + stage * kConsumerWarps);
      }
      const auto settle = [&] {
        if (special) clear_special<E>(queries, kQueryBytes, grads, kQueryBytes);
      };
      if (sees) {
        float x[kQueries / 2], dx[kQueries / 2];
        wgmma_fence(x);
        multiply_features<E, kFeatures, kQueries>(x, keys, kKeys, queries);
        if constexpr (kOfKey) {
          wgmma_fence(dx);
          multiply_features<E, kFeatures, kQueries>(dx, values, kKeys, grads);
        }
        wgmma_wait<kOfKey ? 1 : 0>(x);
        const Field<false> field(query, first_key);
        if constexpr (kMasked) add_mask<E>(call, work.s, band, field, head, x);
        if (hides) {
          hide(band, field, x);
          weigh<true>(x, statistics, factor);
        } else {
          weigh<false>(x, statistics, factor);
        }
        if constexpr (kOfKey) {
          wgmma_wait<0>(dx);
          if (hides)
            grad_scores<true>(x, dx, statistics);
          else
            grad_scores<false>(x, dx, statistics);
        }
        if (special) {
          if constexpr (kOfKey) add_special_rows<E>(of_key, dx, queries);
          if constexpr (kOfValue) add_special_rows<E>(of_value, x, grads);
        }
        settle();
        uint32_t p[kQueries / 16][4], dp[kQueries / 16][4];
        if constexpr (kOfValue) {
          round_to_words<E>(x, p);
          wgmma_fence(of_value, p);
          add_rows<E, kFeatures, kQueries>(of_value, p, grads);
        }
        if constexpr (kOfKey) {
          round_to_words<E>(dx, dp);
          wgmma_fence(of_key, dp);
          add_rows<E, kFeatures, kQueries>(of_key, dp, queries);
        }
        if constexpr (kOfValue) wgmma_wait<0>(of_value, p);
        if constexpr (kOfKey) wgmma_wait<0>(of_key, dp);
      } else {
        settle();
      }
      sync_warp();
      if (thread_index() % kWarp == 0) barrier_arrive(shared.empty + stage);
    });

    E* rows[2];
    const auto write = [&](const HeadTensor& to, const float (&sums)[kFeatures / 2], int64_t features,
                           float by, bool pairs) {
      if (!to.data) return;
      FS_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int key = first_key + row_of_accumulator(thread_index(), 2 * half);
        rows[half] = key < work.own_keys ? work.s.template key_row<E>(to, work.kv_head, key) : nullptr;
      }
      write_features(rows, sums, int(features), by, pairs);
    };
    if constexpr (kOfKey) write(a.grad_key, of_key, a.head_size, float(a.scale), call.pairs_of_grad_key);
    if constexpr (kOfValue) write(a.grad_value, of_value, a.value_size, 1, call.pairs_of_grad_value);
  }

  // Columns are queries, whose numbers lie in rows, from the thread's first on. Where something is hidden, it has no
  // weight whatever the others are.
  template <bool kHides>
  static FS_DEVICE void weigh(float (&x)[kQueries / 2], const float* statistics, float factor) {
    FS_UNROLL
    for (int n = 0; n < kQueries / 8; ++n) {
      const auto highest = *reinterpret_cast<const Two<float>*>(statistics + 8 * n);
      const auto inverse_sum = *reinterpret_cast<const Two<float>*>(statistics + kQueries + 8 * n);
      FS_UNROLL
      for (int e = 0; e < 4; ++e) {
        float& score = x[4 * n + e];
        const float weight = weight_of(score, highest.value[e % 2], factor);
        score = kHides && weight == 0 ? 0.0f : weight * inverse_sum.value[e % 2];
      }
    }
  }
  template <bool kHides>
  static FS_DEVICE void grad_scores(const float (&x)[kQueries / 2], float (&dx)[kQueries / 2],
                                    const float* statistics) {
    FS_UNROLL
    for (int n = 0; n < kQueries / 8; ++n) {
      const auto delta = *reinterpret_cast<const Two<float>*>(statistics + 2 * kQueries + 8 * n);
      FS_UNROLL
      for (int e = 0; e < 4; ++e) {
        const float weight = x[4 * n + e];
        dx[4 * n + e] = kHides && weight == 0 ? 0.0f : weight * (dx[4 * n + e] - delta.value[e % 2]);
      }
    }
  }
};

}  // namespace fastseq::FASTSEQ_ISA::attention
