// Attention, forward, written for sm_90a: tiles by TMA, products by wgmma, in one persistent block a multiprocessor.
//
// A block takes tiles of rows, of one pack of heads each, in an order that its number alone decides (see
// attention_hopper_items.h). Its first warpgroup brings tiles of keys and values into kStages stages (one thread of it;
// it gives its registers to the others), and the first keys of a tile of rows before its queries, which wait longer for
// room; each other one, a consumer, owns 64 rows and goes over the tiles of keys that one of the block's rows sees:
//
//   S = Q K^T                        both from shared memory, S in registers
//   m' = max(m, row maxima of S), P = exp2((S - m') factor), l = l exp2((m - m') factor) + row sums of P
//   O = O exp2((m - m') factor) + P V     P from the registers of S, rounded; V from shared memory, O in registers
//
// Tiles that all rows see whole are the rule. There S of one tile and O of the one before are issued together, and while
// tensor cores make O, the consumer makes P of S. Up to 128 features the consumers take turns at issuing, so that one
// multiplies while another is at its exponentials. Tiles of which some element is hidden are worked on one step after
// the other: lengths, causality and windows have one or two of them, at the ends; with a mask all tiles are such. The
// mask is read while S is being made, once, into registers; where it shows a consumer nothing, that is all.
// Of these, values that are hidden may be NaN or infinite, and zero times that is NaN. So a consumer from whose rows
// something is hidden also looks through the tile of values while S is being made. If there is one, it adds to O what
// comes of those that are seen, waits until all consumers have read the values, makes zeros of them, and goes on as if
// nothing had been: the others, from whom nothing may be hidden, want them as they are.
//
// Rows are those of attention_call.h, of packs of heads: as many of those that share a key head as divide the rows of
// a tile, so that a box of Q is (features, heads of the pack, queries). What lies outside of a tensor is zero, what lies
// outside of a sequence is another's; neither is seen, or written.
//
// Shared memory: one or two tiles of Q, then kStages of K and of V, in columns of 64 features as portable_hopper.h has
// tiles, then barriers. "full" is for the bytes of a load, "empty" for one arrival of each consumer's warp.
//
// Cost of a score: D + Dv multiply-adds of tensor cores (4096 operations a cycle: at D = 128 a tile of 64 x 128 takes
// 1024 cycles); a maximum, a multiply-add, an addition, half a conversion, and one ex2, of which a
// multiprocessor makes 16 a cycle (512 cycles a tile, whatever D is). Shared memory is read once for each 64 rows: 64
// of 128 cycles of a product. From L2, 2 (D + Dv) bytes of a key for each tile of rows.
// Registers: S and P of kKeys / 2 and kKeys / 4, O of kColumns / 2, of the 240 (two consumers) or 160 (three); what a
// mask adds takes kKeys / 2, while there is no P. O has whole columns of 64 features, for the products of 96 would take
// half of a tile's swizzled rows of values.
// Tiles and shared memory: HopperShape in attention_shapes.h.
#pragma once

#include <prim_hopper.h>

#include "attention_hopper_items.h"
#include "attention_hopper_masks.h"
#include "attention_hopper_results.h"
#include "attention_hopper_softmax.h"
#include "attention_rows.h"

namespace fastseq::FASTSEQ_ISA::attention {

template <class M, class Shape, bool kMasked>
struct HopperForward {
  using E = typename M::Element;
  using Args = HopperArgs;
  static constexpr int kConsumers = Shape::kConsumers, kThreads = Shape::kThreads, kStages = Shape::kStages,
                       kQueryStages = Shape::kQueryStages;
  static constexpr int kRows = Shape::kRows, kKeys = Shape::kKeys, kFeatures = Shape::kFeatures;
  static constexpr int kSharedBytes = Shape::kSharedBytes;
  static constexpr int kTiles = Shape::kTiles;            // of 64 features
  static constexpr int kColumns = kTiles * kTileColumns;  // of O
  static constexpr int kQueryBytes = kTiles * kRows * kTileRowBytes, kTileBytes = kKeys * kTileRowBytes,
                       kStageBytes = kTiles * kTileBytes;
  static constexpr int kWarps = 4 * kConsumers;  // that read
  static constexpr bool kTurns = kFeatures <= 128;
  static constexpr int kFirstTurn = 1, kFirstMeeting = 1 + kConsumers;  // named barriers of each consumer
  using Rows = RowTile<kRows>;
  using Scores = float[kKeys / 2];
  using Output = float[kColumns / 2];
  using Weights = uint32_t[kKeys / 16][4];

  struct Shared {
    unsigned char *query, *keys, *values;
    PhaseBarrier *query_full, *query_empty, *keys_full, *keys_empty, *values_full, *values_empty;
    PhaseBarrier* values_read;  // see edge_tile()
    uint32_t* votes;            // [kConsumers][2][4]

    FS_DEVICE Shared() {
      query = tile_memory(), keys = query + kQueryStages * kQueryBytes, values = keys + kStages * kStageBytes;
      query_full = reinterpret_cast<PhaseBarrier*>(values + kStages * kStageBytes);
      query_empty = query_full + kQueryStages;
      keys_full = query_empty + kQueryStages, keys_empty = keys_full + kStages;
      values_full = keys_empty + kStages, values_empty = values_full + kStages;
      values_read = values_empty + kStages;
      votes = reinterpret_cast<uint32_t*>(values_read + kStages);
    }
  };
  static_assert(kSharedBytes == kQueryStages * kQueryBytes + 2 * kStages * kStageBytes +
                                    8 * (2 * kQueryStages + 5 * kStages) + 32 * kConsumers);

  static FS_DEVICE void run(const Args& args) {
    const Shared shared;
    if (thread_index() == 0) {
      for (int i = 0; i < kQueryStages; ++i)
        barrier_begin(shared.query_full + i, 1), barrier_begin(shared.query_empty + i, kWarps);
      for (int i = 0; i < kStages; ++i) {
        barrier_begin(shared.keys_full + i, 1), barrier_begin(shared.keys_empty + i, kWarps);
        barrier_begin(shared.values_full + i, 1), barrier_begin(shared.values_empty + i, kWarps);
        barrier_begin(shared.values_read + i, kWarps);
      }
      barriers_begun();
    }
    sync_block();
    if (thread_index() < kWarpgroup) {
      registers_give<kConsumers == 2 ? 24 : 32>();
      if (thread_index() < kWarp && one_lane()) produce(args, shared);
    } else {
      registers_take<kConsumers == 2 ? 240 : 160>();
      consume(args, shared);
    }
  }

 private:
  // Once more, from its number: cheaper than to keep all of it in registers meanwhile.
  static FS_DEVICE Rows rows_again(const Args& args, int item) {
    return rows_of_item<kRows>(args, int(as_new(uint32_t(item))));
  }

  // ---- the producer ----

  static FS_DEVICE void produce(const Args& args, const Shared& shared) {
    prefetch(args.query), prefetch(args.key), prefetch(args.value);
    int loads = 0, queries = 0;
    for_items(args, [&](int item) {
      const Rows rows = rows_of_item<kRows>(args, item);
      const KeyTiles tiles = key_tiles_of<kKeys>(rows, kMasked);
      if (tiles.begin == tiles.end) return;
      const int kv_head = int(rows.kv_head) / args.packs, batch = int(rows.s.b);
      int row = int(rows.s.first_key) + tiles.begin * kKeys;
      const auto load_keys = [&] {
        load(shared.keys, args.key, shared.keys_full, shared.keys_empty, loads, row, kv_head, batch);
      };
      // The first keys need not wait until the products with the queries before are done.
      load_keys();
      load_queries(args, shared, rows, queries++);
      for (int left = tiles.end - tiles.begin;;) {
        load(shared.values, args.value, shared.values_full, shared.values_empty, loads, row, kv_head, batch);
        ++loads, row += kKeys;
        if (--left == 0) break;
        load_keys();
      }
    });
  }
  static FS_DEVICE void load_queries(const Args& args, const Shared& shared, const Rows& rows, int number) {
    const int stage = number % kQueryStages;
    PhaseBarrier* const full = shared.query_full + stage;
    barrier_wait(shared.query_empty + stage, (number / kQueryStages & 1) ^ 1);
    barrier_expect(full, kQueryBytes);
    FS_NO_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      fastseq::FASTSEQ_ISA::load_tile<Keep::first_to_go>(
          shared.query + stage * kQueryBytes + i * kRows * kTileRowBytes, args.query, full,
          {i * kTileColumns, 0, int(rows.s.first_query) + rows.first_query, int(rows.kv_head),
           int(rows.s.b)});
    }
  }
  // The number-th tile of keys or values.
  static FS_DEVICE void load(unsigned char* stages, const TensorMap& map, PhaseBarrier* full,
                             PhaseBarrier* empty, int number, int row, int head, int batch) {
    const int stage = number % kStages;
    barrier_wait(empty + stage, (number / kStages & 1) ^ 1);
    barrier_expect(full + stage, kStageBytes);
    FS_NO_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      fastseq::FASTSEQ_ISA::load_tile<Keep::last_to_go>(stages + stage * kStageBytes + i * kTileBytes, map,
                                                        full + stage, {i * kTileColumns, row, head, batch});
    }
  }

  // ---- a consumer ----

  static constexpr int kEdges = 2, kQueries = kEdges << kStages;
  struct State {
    int number;     // of the consumer
    int loads = 0;  // tiles of keys and values so far, which tell stage and phase
    // One word, for registers are few: from kQueries on the tiles of queries so far; bit 0 whether that of the votes is
    // odd, see any_in_warpgroup(); from kEdges on whether that of a stage's tiles in edge_tile() is.
    int counts = 0;
    float highest[2], sum[2];  // of the thread's rows; the sum over its own columns
    FS_DEVICE int stage() const { return loads % kStages; }
    FS_DEVICE int phase() const { return loads / kStages & 1; }
    FS_DEVICE int query_stage() const { return counts / kQueries % kQueryStages; }
    FS_DEVICE int query_phase() const { return counts / (kQueries * kQueryStages) & 1; }
    FS_DEVICE int first_row() const { return number * 64 + thread_index() % kWarpgroup / kWarp * 16; }
  };

  // What edge_tile() needs to know of the rows.
  struct Own {
    Query<float> query[2];  // of the thread; of a row that is not there nothing is written
    int first, count;       // the consumer's queries
    Band band;
    int64_t mask[2];  // where those of the thread's rows begin

    FS_DEVICE Own(const AttentionArgs& a, const Rows& rows, const State& state) : band(rows.s) {
      FS_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int row = state.first_row() + thread_index() % kWarp / 4 + 8 * i;
        const int known = row < rows.count ? row : 0;
        query[i] = {rows.query(known), 0, 0, 0, 0};
        mask[i] = rows.s.b * a.mask.stride[0] + rows.head(known) * a.mask.stride[1] +
                  query[i].index * a.mask.stride[2];
      }
      const int begin = state.number * 64, end = smaller(begin + 64, rows.count);
      first = rows.query(begin);
      count = begin < end ? rows.query(end - 1) - first + 1 : 0;
    }
  };

  static FS_DEVICE void release(PhaseBarrier* empty) {
    if (thread_index() % kWarp == 0) barrier_arrive(empty);
  }

  static FS_DEVICE void consume(const Args& args, const Shared& shared) {
    const Call& call = args.call;
    const AttentionArgs& a = call.a;
    const Scoring<float> scoring(call);
    State state;
    state.number = thread_index() / kWarpgroup - 1;
    if (kTurns && state.number == kConsumers - 1) named_arrive(kFirstTurn, 2 * kWarpgroup);
    Scores s;
    Output o;
    Weights p;
    for_items(args, [&](int item) {
      const Rows rows = rows_of_item<kRows>(args, item);
      if (rows.count <= 0) return;
      const KeyTiles tiles = key_tiles_of<kKeys>(rows, kMasked);
      FS_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int row = state.first_row() + thread_index() % kWarp / 4 + 8 * i;
        const int64_t head = rows.head(row < rows.count ? row : 0);
        state.highest[i] =
            a.sinks ? static_cast<const float*>(a.sinks)[head] / scoring.unit : -float(INFINITY);
        const bool counts = state.highest[i] > -float(INFINITY) && thread_index() % 4 == 0;
        state.sum[i] = counts ? excess(state.highest[i], scoring.factor) : 0;
      }
      FS_UNROLL
      for (int i = 0; i < kColumns / 2; ++i) o[i] = 0;
      if (tiles.begin < tiles.end) {
        [[maybe_unused]] const Own own(a, rows, state);
        barrier_wait(shared.query_full + state.query_stage(), state.query_phase());
        FS_NO_UNROLL
        for (int tile = tiles.begin; tile < tiles.end;) {
          if (!kMasked && tile == tiles.whole && tile < tiles.edge) {
            whole_tiles(scoring, shared, state, tiles.edge - tile, tiles.edge == tiles.end, s, o, p);
            tile = tiles.edge;
          } else {
            const bool last = tile + 1 == tiles.end;
            if constexpr (kMasked) {
              edge_tile(call, scoring, shared, state, own, tile++, last, s, o, p);
            } else {  // few are such
              edge_tile(call, scoring, shared, state, Own(a, rows_again(args, item), state), tile++, last, s,
                        o, p);
            }
          }
        }
        state.counts += kQueries;
      }
      finish(call, scoring, state, rows_again(args, item), o);
    });
  }

  // S and O of the tile that is the load-th, issued.
  static FS_DEVICE void issue_scores(const Shared& shared, const State& state, int load, Scores& s) {
    const uint64_t q = operand_of_tiles<Major::k>(
        shared.query + state.query_stage() * kQueryBytes + state.number * 64 * kTileRowBytes, kRows);
    const uint64_t k = operand_of_tiles<Major::k>(shared.keys + load % kStages * kStageBytes, kKeys);
    FS_UNROLL
    for (int i = 0; i < kFeatures / 16; ++i) {
      wgmma<E, kKeys, Major::k, Major::k>(s, at_step<Major::k>(q, kRows, i), at_step<Major::k>(k, kKeys, i),
                                          i > 0);
    }
    wgmma_commit();
  }
  static FS_DEVICE void issue_output(const Shared& shared, int load, Output& o, Weights& p) {
    const uint64_t v = operand_of_tiles<Major::mn>(shared.values + load % kStages * kStageBytes, kKeys);
    FS_UNROLL
    for (int i = 0; i < kKeys / 16; ++i) {
      wgmma<E, kColumns, Major::mn>(o, p[i], at_step<Major::mn>(v, kKeys, i), true);
    }
    wgmma_commit();
  }

  static FS_DEVICE void multiply_rows(Output& o, const float (&by)[2]) {
    FS_UNROLL
    for (int i = 0; i < kColumns / 2; ++i) o[i] *= by[i / 2 % 2];
  }
  static FS_DEVICE void round(const Scores& s, Weights& p) {
    FS_UNROLL
    for (int i = 0; i < kKeys / 4; ++i) p[i / 4][i % 4] = pack(s[2 * i], s[2 * i + 1], E{});
  }

  // ---- tiles that all rows see whole ----

  static FS_DEVICE void whole_tiles(const Scoring<float>& scoring, const Shared& shared, State& state,
                                    int count, bool last, Scores& s, Output& o, Weights& p) {
    float rescale[2];
    barrier_wait(shared.keys_full + state.stage(), state.phase());
    wgmma_fence(s);
    issue_scores(shared, state, state.loads, s);
    wgmma_wait<0>(s);
    release(shared.keys_empty + state.stage());
    softmax(scoring.factor, s, state.highest, state.sum, rescale);
    multiply_rows(o, rescale);
    round(s, p);
    barrier_wait(shared.values_full + state.stage(), state.phase());
    FS_NO_UNROLL
    for (int i = 1; i < count; ++i) {
      const int before = state.loads++;
      barrier_wait(shared.keys_full + state.stage(), state.phase());
      if (kTurns) named_sync(kFirstTurn + state.number, 2 * kWarpgroup);
      wgmma_fence(s, o, p);
      issue_scores(shared, state, state.loads, s);
      issue_output(shared, before, o, p);
      if (kTurns) named_arrive(kFirstTurn + (state.number + 1) % kConsumers, 2 * kWarpgroup);
      wgmma_wait<1>(s);
      release(shared.keys_empty + state.stage());
      softmax(scoring.factor, s, state.highest, state.sum, rescale);
      // For the next product. Before the wait for this one, across which ptxas moves the exponentials, unless there is a
      // loop between.
      barrier_wait(shared.values_full + state.stage(), state.phase());
      wgmma_wait<0>(o, p);
      release(shared.values_empty + before % kStages);
      multiply_rows(o, rescale);
      round(s, p);
    }
    if (last) release(shared.query_empty + state.query_stage());
    wgmma_fence(o, p);
    issue_output(shared, state.loads, o, p);
    wgmma_wait<0>(o, p);
    release(shared.values_empty + state.stage());
    ++state.loads;
  }

  // ---- tiles of which something is hidden ----

  // What is so for any thread of the warpgroup: bit 0, bit 1. Two places in turn: who writes to one has met, since it
  // was read last, all that have read it.
  static FS_DEVICE uint32_t any_in_warpgroup(const Shared& shared, State& state, bool x, bool y = false) {
    uint32_t* const votes = shared.votes + (state.number * 2 + (state.counts & 1)) * 4;
    state.counts ^= 1;
    const uint32_t any = any_in_warp(x) | any_in_warp(y) << 1;
    if (thread_index() % kWarp == 0) votes[thread_index() / kWarp % 4] = any;
    sync_warp();
    named_sync(kFirstMeeting + state.number, kWarpgroup);
    return votes[0] | votes[1] | votes[2] | votes[3];
  }

  // Whether there is a NaN or an infinity in this thread's share of a tile of values.
  static FS_DEVICE bool is_special(const unsigned char* tile) {
    constexpr int kShare = kStageBytes / 16 / kWarpgroup, kAtOnce = kShare % 4 == 0   ? 4
                                                                    : kShare % 3 == 0 ? 3
                                                                                      : 2;
    static_assert(kStageBytes % (16 * kWarpgroup) == 0 && kShare % kAtOnce == 0);
    const Vector16* const share = reinterpret_cast<const Vector16*>(tile) + thread_index() % kWarpgroup;
    uint32_t carries = 0;
    FS_NO_UNROLL
    for (int i = 0; i < kShare; i += kAtOnce) {
      FS_UNROLL
      for (int j = 0; j < kAtOnce; ++j) carries |= carries_of<E>(share[(i + j) * kWarpgroup]);
    }
    return carries != 0;
  }

  // What of P V is not finite, added to O. The copies are made in loops: with memcpy() of an array ptxas sees it in
  // memory elsewhere too, and serialises the products.
  static FS_DEVICE void add_special(unsigned char* values, const Scores& s, Output& o) {
    Scores from;
    Output to;
    FS_UNROLL
    for (int i = 0; i < kKeys / 2; ++i) from[i] = s[i];
    FS_UNROLL
    for (int i = 0; i < kColumns / 2; ++i) to[i] = o[i];
    FS_NO_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      add_special_product<M, false>(
          reinterpret_cast<Sums<float>*>(to) + i * 8, 1, 8, reinterpret_cast<Sums<float>*>(from), kKeys / 8,
          Tile<E, kTileColumns>{reinterpret_cast<E*>(values + i * kTileBytes)}, 0, kTileColumns);
    }
    FS_UNROLL
    for (int i = 0; i < kColumns / 2; ++i) o[i] = to[i];
  }
  // This thread's share of a tile, for the products.
  static FS_DEVICE void make_finite(unsigned char* tile) {
    FS_NO_UNROLL
    for (int i = thread_index() % kWarpgroup; i < kStageBytes / 2; i += kWarpgroup) {
      E& x = reinterpret_cast<E*>(tile)[i];
      if (!is_finite(widen(x))) x.bits = 0;
    }
    fence_async();
  }

  static FS_DEVICE void edge_tile(const Call& call, const Scoring<float>& scoring, const Shared& shared,
                                  State& state, const Own& own, int tile, bool last, Scores& s, Output& o,
                                  Weights& p) {
    using Matrix = Sums<float>[1][kKeys / 8];  // S as the general kernels have it
    const auto query_at = [&](int m, int, int e) -> const Query<float>& { return own.query[2 * m + e / 2]; };
    const Orient<true> orient{state.first_row(), tile * kKeys};
    const Band& band = own.band;
    // Whether this consumer's rows see any of the tile, and whether something of it is hidden from them.
    bool works = own.count > 0 && band.shows_any(own.first, own.count, tile * kKeys, kKeys);
    const bool edge = works && !band.shows_all(own.first, own.count, tile * kKeys, kKeys);
    const bool masked = kMasked && call.a.mask.kind != MaskKind::kNone;
    const int load = state.loads++, stage = load % kStages, phase = load / kStages & 1;
    unsigned char* const values = shared.values + stage * kStageBytes;
    [[maybe_unused]] float bias[kMasked ? kKeys / 2 : 1];
    bool values_are_there = false, special = false;
    barrier_wait(shared.keys_full + stage, phase);
    if (works) {
      wgmma_fence(s);
      issue_scores(shared, state, load, s);
      // Meanwhile: what does the mask show, and is there anything in the values that must not meet a weight of zero?
      bool hides = edge;
      if constexpr (kMasked) {
        if (masked) {
          read_biases<E, kKeys>(call, own.mask, tile * kKeys, bias);
          bool any_shown = false, any_hidden = false;
          FS_UNROLL
          for (int i = 0; i < kKeys / 2; ++i) {
            const bool hidden = bias[i] == -float(INFINITY);
            any_hidden |= hidden, any_shown |= !hidden;
          }
          const uint32_t found = any_in_warpgroup(shared, state, any_shown, any_hidden);
          works = found & 1, hides |= (found & 2) != 0;
        }
      }
      if (works && hides) {
        barrier_wait(shared.values_full + stage, phase);
        values_are_there = true;
        special = any_in_warpgroup(shared, state, is_special(values));
      }
      wgmma_wait<0>(s);
    } else {
      sync_warp();  // all of its lanes have seen the phase that now ends
    }
    release(shared.keys_empty + stage);
    if (last) release(shared.query_empty + state.query_stage());
    if (works) {
      Matrix& x = reinterpret_cast<Matrix&>(s);
      if constexpr (kMasked) {
        if (!call.product_units) {
          FS_UNROLL
          for (int i = 0; i < kKeys / 2; ++i) s[i] *= scoring.scale;
        }
        if (masked) {
          FS_UNROLL
          for (int i = 0; i < kKeys / 2; ++i) s[i] = add_bias(s[i], bias[i]);
        }
      }
      if (edge) hide_edge(band, orient, query_at, x);
      float rescale[2];
      softmax(scoring.factor, s, state.highest, state.sum, rescale);
      multiply_rows(o, rescale);
    }
    if (!values_are_there) barrier_wait(shared.values_full + stage, phase);
    if (special) {
      // Others may not have found it, for nothing is hidden from them, and still want the values as they are.
      add_special(values, s, o);
      sync_warp();
      release(shared.values_read + stage);
      barrier_wait(shared.values_read + stage, state.counts / (kEdges << stage) & 1);
      make_finite(values);
      named_sync(kFirstMeeting + state.number, kWarpgroup);
    }
    if (works) {
      round(s, p);
      wgmma_fence(o, p);
      issue_output(shared, load, o, p);
      wgmma_wait<0>(o, p);
    } else {
      sync_warp();
    }
    if (!special) release(shared.values_read + stage);
    state.counts ^= kEdges << stage;
    release(shared.values_empty + stage);
  }

  // ---- results ----

  static FS_DEVICE void finish(const Call& call, const Scoring<float>& scoring, const State& state,
                               const Rows& rows, Output& o) {
    const AttentionArgs& a = call.a;
    const int lane = thread_index() % kWarp, value_size = int(a.value_size);
    E *output[2] = {}, *remainder[2] = {};
    float inverse[2];
    FS_UNROLL
    for (int h = 0; h < 2; ++h) {
      float whole = state.sum[h] + shuffle_xor(state.sum[h], 1);
      whole += shuffle_xor(whole, 2);
      inverse[h] = whole == 0 ? 0.0f : 1 / whole;
      const int row = state.first_row() + lane / 4 + 8 * h;
      if (row >= rows.count) continue;
      const int index = rows.query(row);
      const int64_t head = rows.head(row);
      output[h] = rows.s.template query_row<E>(a.output, head, index);
      if (a.remainder.data) remainder[h] = rows.s.template query_row<E>(a.remainder, head, index);
      if (lane % 4 != 0) continue;
      const float highest = state.highest[h];
      write_normalizer(call, scoring, rows.s, head, index, highest, whole / excess(highest, scoring.factor));
    }
    multiply_rows(o, inverse);
    write_features(output, o, value_size, 1, call.pairs_of_output);
    if (!a.remainder.data) return;
    FS_UNROLL
    for (int i = 0; i < kColumns / 2; i += 2) {
      const uint32_t rounded = pack(o[i], o[i + 1], E{});
      FS_UNROLL
      for (int j = i; j < i + 2; ++j) {
        o[j] -= widen(E{uint16_t(j == i ? rounded : rounded >> 16)});
        if (!is_finite(o[j])) o[j] = 0;
      }
    }
    write_features(remainder, o, value_size, 1, call.pairs_of_output);
  }
};

}  // namespace fastseq::FASTSEQ_ISA::attention
