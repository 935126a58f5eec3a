// Gradients of keys and values for compute capability 9.0: GradKeys of attention_backward.h, with products that a
// warpgroup issues (wgmma) and tiles that come by themselves (TMA).
//
//   S^T = K Q^T, dP^T = V dO^T, P = exp2((S - highest) factor) inverse_sum, dS = P (dP - delta)
//   dV = dV + P^T dO, dK = dK + dS^T Q
//
// Block: 128 keys of a key head, whose keys and values stay in shared memory. It goes over the query heads that share
// them, one after the other, and over the queries that see any of them, which come through three stages.
// Warpgroup 0 brings them: one thread the tiles, three warps the numbers of each query (highest, inverse_sum, delta).
// Warpgroups 1 and 2 have 64 keys each, S^T and dP^T of these in registers, and feed P^T and dS^T from there to the
// next products. They take turns: one has its exponentials while dV, dK and the next tile's S and dP of the other are
// multiplied.
// From 192 features on they have the same 64 keys: 1 makes dK, 2 dV; S is made by both.
//
// Assumes tensors that a tensor map can tell (strides of 16 bytes), and no options but a mask, or a scale that needs
// scores (kMasked).
//
// Cost of a tile of 128 keys and 64 queries, 128 features: 4 x 128 x 64 x 128 = 4.2 M multiply-adds, 2048 cycles of
// the tensor cores; 32 KB of Q and dO from the second-level cache (16 bytes a cycle); of shared memory, for each
// warpgroup, twice 32 KB for S and dP, whose left operand is there too, and twice 16 KB: 1536 cycles in all; 8192 ex2,
// 512 cycles, and some ten other operations for each, 640 cycles.
// Once a block, beside its tiles: S and dP of the last tile a second time, 1024 cycles, see consume().
// Registers: 64 + 64 sums, 32 + 32 scores, and what is left of 240. Shared memory: 163 KB.
//
// In the one-pass form (kOnePass), for who does not need the same bits every time, it makes gradients of queries too:
//
//   dQ = dQ + dS K of 64 queries, each consumer half of the features, added to float32 sums in memory in any order
//
// dS^T goes through shared memory, a buffer for each stage, from which dK takes it too: so its registers are free. Of a
// tile dQ is multiplied in the turn of the tile after it: by then both consumers have stored theirs, with no barrier
// but those of the turns. Three buffers, for the third tile's may be stored while the first one's are still read.
// Five products a tile instead of seven: 2560 cycles of the tensor cores; 272 KB of shared memory read, 2176 cycles,
// and 16 KB written; 8192 adds to memory, in pairs, while dV and dK are multiplied. Registers: in a turn 64 + 64 sums,
// 32 of dQ and 16 of P, then 32 of the next S. Shared memory: 210 KB. No masks, and up to 128 features: there are no
// registers for more.
#pragma once

#include "attention_hopper_backward_tiles.h"

namespace fastseq::FASTSEQ_ISA::attention {

template <class E, int kFeatures, bool kMasked, bool kOnePass = false>
struct HopperGradKeys {
  using Args = HopperCall;
  static constexpr HopperBackwardShape kShape =
      kOnePass ? hopper_one_pass(kFeatures) : hopper_grad_keys(kFeatures, kMasked);
  static constexpr int kThreads = kHopperBackwardThreads, kSharedBytes = kShape.shared_bytes();
  static constexpr int kKeys = kShape.own, kQueries = kShape.other, kStages = kShape.stages;
  static constexpr int kKeyBytes = hopper_tile_bytes(kFeatures, kKeys);
  static constexpr int kQueryBytes = hopper_tile_bytes(kFeatures, kQueries);
  static constexpr int kScoreBytes = kShape.score_bytes();
  static constexpr int kPart = kFeatures == 64 ? 32 : 64;  // features of a consumer's gradients of queries
  static_assert(kQueries % kWarp == 0);
  static_assert(!kOnePass || (kQueries == 64 && hopper_has_one_pass(kFeatures, kMasked)));

  struct Shared {
    unsigned char *keys, *values, *queries, *grads, *scores;
    float* statistics;
    PhaseBarrier *own, *full, *empty;
    int* flags;

    FS_DEVICE explicit Shared(unsigned char* memory)
        : keys(memory),
          values(keys + kKeyBytes),
          queries(values + kKeyBytes),
          grads(queries + kStages * kQueryBytes),
          scores(grads + kStages * kQueryBytes),
          statistics(reinterpret_cast<float*>(scores + kStages * kScoreBytes)),
          own(reinterpret_cast<PhaseBarrier*>(reinterpret_cast<unsigned char*>(statistics) +
                                              kShape.statistics_bytes())),
          full(own + 1),
          empty(full + kStages),
          flags(reinterpret_cast<int*>(empty + kStages)) {}
  };
  // What the block goes over: for each head `tiles` tiles of queries. Made by each of the roles for itself, so that
  // none has registers for what another needs.
  struct Work {
    Sequence s;
    int kv_head;
    int first_key, own_keys, first_query, tiles;

    FS_DEVICE explicit Work(const Call& call)
        : Work(call, place_of_block(call, call.a.cu_seqlens_k, call.a.keys, 1, kKeys, false)) {}
    FS_DEVICE Work(const Call& call, const Place& place)
        : s(call.a, place.sequence),
          kv_head(int(place.kv_head)),
          first_key(place.tile < 0 ? 0 : int(place.tile * kKeys)),
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
      for (int i = 0; i < kStages; ++i)
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
      consume<true, true>(args.call, shared, work, warpgroup - 1);
    } else if (warpgroup == 1) {
      consume<true, false>(args.call, shared, work, 0);
    } else {
      consume<false, true>(args.call, shared, work, 1);
    }
  }

 private:
  // A tile of a head, and its stage.
  struct Step {
    int head = 0, tile = 0, stage = 0, parity = 0;

    FS_DEVICE void advance(int tiles) {
      if (++tile == tiles) tile = 0, ++head;
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
    FS_DEVICE int stage_before() const { return stage == 0 ? kStages - 1 : stage - 1; }
  };
  // Calls body(step) for each tile.
  template <class Body>
  static FS_DEVICE void for_tiles(const Call& call, const Work& work, Body body) {
    if (work.tiles == 0) return;
    FS_NO_UNROLL
    for (Step at; at.head < call.group; at.advance(work.tiles)) body(at);
  }

  static FS_DEVICE void bring_tiles(const Args& args, const Shared& shared, const Work& work) {
    if (work.tiles == 0) return;
    const Sequence& s = work.s;
    const int key_row = int(s.first_key) + work.first_key, b = int(s.b), kv_head = work.kv_head;
    barrier_expect(shared.own, 2 * kKeyBytes);
    load_features<kFeatures>(shared.keys, args.key, shared.own, kKeys, key_row, kv_head, b);
    load_features<kFeatures>(shared.values, args.value, shared.own, kKeys, key_row, kv_head, b);
    for_tiles(args.call, work, [&](const Step& at) {
      const int stage = at.stage, head = kv_head * args.call.group + at.head;
      PhaseBarrier* const full = shared.full + stage;
      const int row = int(s.first_query) + work.first_query + at.tile * kQueries;
      barrier_wait(shared.empty + stage, at.parity ^ 1);
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
    const void* const rows = which == 0 ? a.highest.data : which == 1 ? a.inverse_sum.data : call.delta.data;
    const auto stride = [&](int i) {
      return which == 0 ? a.highest.stride[i] : which == 1 ? a.inverse_sum.stride[i] : call.delta.stride[i];
    };
    const int lane = thread_index() % kWarp;
    const int64_t of_head = stride(1);
    const float* from = static_cast<const float*>(rows) + s.b * stride(0) +
                        work.kv_head * call.group * of_head + s.first_query + work.first_query + lane;
    const int left = s.queries - work.first_query - lane;
    float* const to = shared.statistics + which * kQueries + lane;
    int row = 0;  // of the head's
    for_tiles(call, work, [&](const Step& at) {
      float numbers[kQueries / kWarp];  // on their way while the stage is waited for
      FS_UNROLL
      for (float& number : numbers) {
        number = row < left ? *from : 0.0f;
        row += kWarp, from += kWarp;
      }
      barrier_wait(shared.empty + at.stage, at.parity ^ 1);
      FS_UNROLL
      for (int i = 0; i < kQueries / kWarp; ++i) to[at.stage * 3 * kQueries + i * kWarp] = numbers[i];
      sync_warp();
      if (lane == 0) barrier_arrive(shared.full + at.stage);
      if (at.tile + 1 < work.tiles) return;
      from += of_head - row;
      row = 0;
    });
  }

  // 64 keys. The products of the next tile are begun before those of this one are waited for, and the two consumers
  // take turns: one has its exponentials while the other multiplies. What a consumer does not see it hides: the other
  // one, which shares the stages with it, would have to be waited for anyhow.
  template <bool kOfKey, bool kOfValue>
  static FS_DEVICE void consume(const Call& call, const Shared& shared, const Work& work, int consumer) {
    const AttentionArgs& a = call.a;
    const int own_row = kShape.split ? 0 : 64 * consumer;
    const Band band(work.s);
    const float factor = Scoring<float>(call).factor;
    const uint64_t keys = operand_of_tiles<Major::k>(shared.keys + own_row * kTileRowBytes, kKeys);
    const uint64_t values = operand_of_tiles<Major::k>(shared.values + own_row * kTileRowBytes, kKeys);
    float of_key[kFeatures / 2], of_value[kFeatures / 2];
    FS_UNROLL
    for (int i = 0; i < kFeatures / 2; ++i) of_key[i] = of_value[i] = 0;
    const auto queries_of = [&](const Step& at) { return shared.queries + uint32_t(at.stage) * kQueryBytes; };
    const auto grads_of = [&](const Step& at) { return shared.grads + uint32_t(at.stage) * kQueryBytes; };
    if (work.tiles) {
      float x[kQueries / 2], dx[kQueries / 2];
      const auto begin_scores = [&](const Step& at) {
        barrier_wait(shared.full + at.stage, at.parity);
        wgmma_fence(x);
        multiply_features<E, kFeatures, kQueries>(x, keys, kKeys, queries_of(at));
      };
      const auto begin_grads = [&](const Step& at) {
        if constexpr (kOfKey) {
          wgmma_fence(dx);
          multiply_features<E, kFeatures, kQueries>(dx, values, kKeys, grads_of(at));
        }
      };
      const auto finish_scores = [&] {
        if constexpr (kOfKey) {
          wgmma_wait<0>(x, dx);
        } else {
          wgmma_wait<0>(x);
        }
      };
      Step now;
      barrier_wait(shared.own, 0);
      const OfQueries of_queries(shared, consumer);
      begin_scores(now);
      begin_grads(now);
      if (consumer == 1) named_arrive(kFirstTurn, kConsumerThreads);
      finish_scores();
      FS_NO_UNROLL
      do {
        if constexpr (kOnePass) of_queries.add_special(call, shared, work, now);
        const int query = work.first_query + now.tile * kQueries;
        const float* const statistics =
            shared.statistics + now.stage * 3 * kQueries + column_of_accumulator(thread_index(), 0);
        const auto at_edge = [&] {
          return any_in_warp(!band.shows_all(query, kQueries, work.first_key, kKeys));
        };
        const bool hides = kMasked || at_edge();
        bool special = false;
        if (hides) {
          const uint32_t found =
              special_in<E>(queries_of(now), kQueryBytes) | special_in<E>(grads_of(now), kQueryBytes);
          special = any_of_consumers(found, shared.flags + now.stage * kConsumerWarps);
        }
        if (hides) {
          const Orient<false> orient{query, work.first_key + first_row_of_warp(kKeys)};
          const int head = work.kv_head * call.group + now.head;
          // Of 256 features there are no registers for the other way to read a mask.
          const bool edge = !kMasked || kFeatures == 256 || at_edge();
          score_and_hide<kMasked, E>(call, work.s, band, orient, head, edge, x);
          weigh<true>(x, statistics, factor);
        } else {
          weigh<false>(x, statistics, factor);
        }
        if constexpr (kOfKey) {
          if (hides) {
            grad_scores<true>(x, dx, statistics);
          } else {
            grad_scores<false>(x, dx, statistics);
          }
        }
        if (special) {
          if constexpr (kOfKey) add_special_rows<E>(of_key, dx, queries_of(now));
          if constexpr (kOfValue) add_special_rows<E>(of_value, x, grads_of(now));
          clear_special<E>(queries_of(now), kQueryBytes, grads_of(now), kQueryBytes);
        }
        uint32_t p[kQueries / 16][4], dp[kQueries / 16][4];
        if constexpr (kOfValue) round_to_words<E>(x, p);
        if constexpr (kOfKey) round_to_words<E>(dx, dp);
        if constexpr (kOnePass) store_scores(dp, shared.scores + uint32_t(now.stage) * kScoreBytes);
        named_sync(kFirstTurn + consumer, kConsumerThreads);
        float of_query[kPart / 2];
        if constexpr (kOnePass) of_queries.multiply(of_query, shared, now.stage_before());
        if constexpr (kOfValue) {
          wgmma_fence(of_value, p);
          add_rows<E, kFeatures, kQueries>(of_value, p, grads_of(now));
        }
        if constexpr (kOnePass) {
          wgmma_fence(of_key);
          add_rows_of_tile<E, kFeatures, kQueries>(
              of_key, shared.scores + uint32_t(now.stage) * kScoreBytes + own_row * kTileRowBytes, kKeys,
              queries_of(now));
        } else if constexpr (kOfKey) {
          wgmma_fence(of_key, dp);
          add_rows<E, kFeatures, kQueries>(of_key, dp, queries_of(now));
        }
        if constexpr (kOnePass) {
          wgmma_wait<2>(of_query);
          of_queries.add(call, work, now, of_query);
        }
        Step next = now;
        next.advance(work.tiles);
        // After the last tile it is made once more, for nothing: a branch here would have each product waited for.
        const bool more = next.head < call.group;
        const Step then = more ? next : now;
        begin_scores(then);
        if constexpr (kOnePass) {
          wgmma_wait<1>(of_value, p, of_key);
        } else if constexpr (kOfKey && kOfValue) {
          wgmma_wait<1>(of_value, p, of_key, dp);
        } else if constexpr (kOfKey) {
          wgmma_wait<1>(of_key, dp);
        } else {
          wgmma_wait<1>(of_value, p);
        }
        sync_warp();
        if (more && thread_index() % kWarp == 0) barrier_arrive(shared.empty + now.stage);
        begin_grads(then);
        named_arrive(kFirstTurn + 1 - consumer, kConsumerThreads);
        finish_scores();
        now = next;
      } while (now.head < call.group);
      if constexpr (kOnePass) {
        of_queries.add_special(call, shared, work, now);
        named_sync(kAllConsumers, kConsumerThreads);
        float of_query[kPart / 2];
        of_queries.multiply(of_query, shared, now.stage_before());
        wgmma_wait<0>(of_query);
        of_queries.add(call, work, now, of_query);
      }
    }

    E* rows[2];
    const auto write = [&](const HeadTensor& to, const float (&sums)[kFeatures / 2], int64_t features,
                           float by, bool pairs) {
      if (!to.data) return;
      FS_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int key =
            work.first_key + first_row_of_warp(kKeys) + row_of_accumulator(thread_index() % kWarp, 2 * half);
        rows[half] = key < work.own_keys ? work.s.template key_row<E>(to, work.kv_head, key) : nullptr;
      }
      write_features(rows, sums, int(features), by, pairs);
    };
    if constexpr (kOfKey) write(a.grad_key, of_key, a.head_size, float(a.scale), call.pairs_of_grad_key);
    if constexpr (kOfValue) write(a.grad_value, of_value, a.value_size, 1, call.pairs_of_grad_value);
  }

  // ---- the one-pass form ----

  // dS^T of the consumer's keys, in the tile [keys][queries]: the left operand of dK and, the other way round, of dQ.
  static FS_DEVICE void store_scores(const uint32_t (&words)[kQueries / 16][4], unsigned char* to) {
    const int lane = int(as_new(uint32_t(thread_index() % kWarp)));  // or all addresses would be kept
    const int row = first_row_of_warp(kKeys) + lane / 4;
    FS_UNROLL
    for (int i = 0; i < kQueries / 4; ++i) {
      *reinterpret_cast<uint32_t*>(to + tile_offset(row + i % 2 * 8, i / 2 * 8 + lane % 4 * 2)) =
          words[i / 4][i % 4];
    }
    fence_async();
  }

  // Where a thread adds to the gradients of queries of the tile before that of `now`, and how many queries and features
  // there are from its first on: none of no tile.
  struct Target {
    float* to;
    int64_t stride;
    int queries, features;

    FS_DEVICE Target(const Call& call, const Work& work, const Step& now, int first_feature) {
      const int head = now.tile == 0 ? now.head - 1 : now.head,
                tile = now.tile == 0 ? work.tiles - 1 : now.tile - 1;
      const int thread = int(as_new(uint32_t(thread_index() % kWarpgroup)));  // or all of it would be kept
      const int query = work.first_query + tile * kQueries + row_of_accumulator(thread, 0);
      const int feature = first_feature + column_of_accumulator(thread, 0);
      HeadTensor all = call.a.grad_query;
      all.data = call.grad_query_sums;
      to = work.s.template query_row<float>(all, work.kv_head * call.group + head, query) + feature;
      stride = all.stride[2];
      queries = head < 0 ? 0 : work.s.queries - query, features = int(call.a.head_size) - feature;
    }
  };
  // dQ = dS K of a tile, of kPart of the features: what the consumer adds to those of other blocks.
  struct OfQueries {
    uint64_t keys;
    int first_feature;
    bool special;

    FS_DEVICE OfQueries(const Shared& shared, int consumer)
        : keys(operand_of_tiles<Major::mn>(
              shared.keys + (kFeatures == 64 ? kPart * 2 : kKeys * kTileRowBytes) * consumer, kKeys)),
          first_feature(kPart * consumer),
          special(false) {
      // Flags of a stage that is used again after the turns.
      if constexpr (kOnePass)
        special = any_of_consumers(special_in<E>(shared.keys, kKeyBytes),
                                   shared.flags + (kStages - 1) * kConsumerWarps);
    }

    FS_DEVICE void multiply(float (&sums)[kPart / 2], const Shared& shared, int stage) const {
      const uint64_t scores =
          operand_of_tiles<Major::mn>(shared.scores + uint32_t(stage) * kScoreBytes, kKeys);
      const uint64_t keys = made_here(this->keys);
      wgmma_fence(sums);
      FS_UNROLL
      for (int step = 0; step < kKeys / 16; ++step) {
        wgmma<E, kPart, Major::mn, Major::mn>(sums, at_step<Major::mn>(scores, kKeys, step),
                                              at_step<Major::mn>(keys, kKeys, step), step > 0);
      }
      wgmma_commit();
    }
    // The sums of the tile before that of `now`, if there is one.
    FS_DEVICE void add(const Call& call, const Work& work, const Step& now,
                       const float (&sums)[kPart / 2]) const {
      if (special) return;
      const Target target(call, work, now, first_feature);
      FS_UNROLL
      for (int i = 0; i < kPart / 2; i += 2) {
        const int half = i / 2 % 2, column = i / 4 * 8;
        if (8 * half < target.queries && column < target.features)
          add_in_any_order(target.to + 8 * half * target.stride + column, Two<float>{{sums[i], sums[i + 1]}});
      }
    }
    // Where there is a NaN or an infinity among the keys, all consumers do this instead, between the products.
    FS_DEVICE void add_special(const Call& call, const Shared& shared, const Work& work,
                               const Step& now) const {
      if (!special) return;
      named_sync(kAllConsumers, kConsumerThreads);
      add_slowly(Target(call, work, now, first_feature), shared.scores + now.stage_before() * kScoreBytes,
                 shared.keys, first_feature);
    }
  };
  // A gradient of a score of zero may mean hidden: then it takes nothing from the key. A call, for it is hardly ever
  // needed.
  static FS_DEVICE_CALL void add_slowly(Target target, const unsigned char* scores, const unsigned char* keys,
                                        int first_feature) {
    FS_NO_UNROLL
    for (int i = 0; i < kPart / 2; ++i) {
      const int half = i / 2 % 2, column = i / 4 * 8 + i % 2;
      if (8 * half >= target.queries || column >= target.features) continue;
      const int query = row_of_accumulator(thread_index() % kWarpgroup, i);
      const int feature = first_feature + column_of_accumulator(thread_index(), i);
      const unsigned char* const tile = keys + feature / kTileColumns * kKeys * kTileRowBytes;
      float sum = 0;
      FS_NO_UNROLL
      for (int row = 0; row < kKeys; ++row) {
        const float grad = widen(*reinterpret_cast<const E*>(scores + tile_offset(row, query)));
        const float key = widen(*reinterpret_cast<const E*>(tile + tile_offset(row, feature % kTileColumns)));
        if (grad != 0) sum = fma(grad, key, sum);
      }
      add_in_any_order(target.to + 8 * half * target.stride + column, sum);
    }
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
