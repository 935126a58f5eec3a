// The shapes of tiles for each arithmetic and size of heads, and what they take of a multiprocessor.
//
// Registers of a lane: the sums (16 rows a row tile: features / 2 and keys / 2 of 32 bits each, twice that of doubles)
// and some 60 others, of 255. Shared memory: within the 99 KB of a block on an RTX GPU where that is possible (an A100
// has 163, an H200 227).
#pragma once

#include <cstdint>
#include <type_traits>

namespace fastseq::attention {

template <int features, int warps, int row_tiles, int keys, int column_warps = 1>
struct TileShape {
  static constexpr int kFeatures = features, kWarps = warps, kRowTiles = row_tiles, kKeys = keys;
  static constexpr int kColumnWarps = column_warps;
};

// Bytes of a tile in shared memory: see Tile in attention_tiles.h.
constexpr int row_elements(int size, int features) { return features + (size == 2 ? 0 : 4); }
constexpr int tile_bytes(int size, int features, int rows) {
  return rows * row_elements(size, features) * size;
}
// Of Query in attention_scores.h.
constexpr int query_bytes(int size) { return size == 8 ? 32 : 20; }
constexpr int dual_query_bytes(int size) { return size == 8 ? 48 : 28; }

// Of the gradients of scores that the one-pass form exchanges: see add_to_queries() in attention_backward.h.
constexpr int score_bytes(int size, int queries, int keys) {
  return queries * (keys + 4) * (size == 8 ? 8 : 4);
}

// One of three, for elements of 2, 4 and 8 bytes.
template <int kSize, class A, class B, class C>
using BySize = std::conditional_t<kSize == 2, A, std::conditional_t<kSize == 4, B, C>>;
template <int kFeatures, class A, class B, class C>
using ByFeatures = std::conditional_t<kFeatures == 64, A, std::conditional_t<kFeatures == 128, B, C>>;

// Forward: rows = warps / column_warps * row_tiles * 16, by keys. What options need leaves no room for two row tiles.
template <int kSize, int kFeatures, bool kAny>
using ForwardShape = ByFeatures<
    kFeatures,
    BySize<kSize, TileShape<64, 4, kAny ? 1 : 2, 64>, TileShape<64, 4, kAny ? 1 : 2, 32>,
           TileShape<64, 4, 1, 16>>,
    BySize<kSize, TileShape<128, 4, kAny ? 1 : 2, 32>, TileShape<128, 4, 1, 32>, TileShape<128, 2, 1, 8>>,
    BySize<kSize, TileShape<256, 4, 1, 32>, TileShape<256, 4, 1, 16, 2>, TileShape<256, 2, 1, 8, 2>>>;

// Forward over dual numbers: likewise, with tiles of the tangents too. Rows x keys, registers of a lane (ptxas, the most of
// sm_80 and sm_90a), and shared memory, of 64, 128 and 256 features:
//
//   16 bits   64 x 32, 246, 48 KB    64 x 16, 244, 64 KB    32 x 16, 250, 96 KB
//   float32   64 x 16, 200, 68 KB    64 x 8, 240, 99 KB     16 x 8, 254, 98 KB
//   float64   32 x 8, 228, 68 KB     16 x 8, 228, 99 KB     16 x 8, 228, 195 KB
template <int kSize, int kFeatures>
using DualForwardShape = ByFeatures<
    kFeatures, BySize<kSize, TileShape<64, 4, 1, 32>, TileShape<64, 4, 1, 16>, TileShape<64, 4, 1, 8, 2>>,
    BySize<kSize, TileShape<128, 4, 1, 16>, TileShape<128, 4, 1, 8>, TileShape<128, 4, 1, 8, 4>>,
    BySize<kSize, TileShape<256, 4, 1, 16, 2>, TileShape<256, 2, 1, 8, 2>, TileShape<256, 8, 1, 8, 8>>>;

// Up to 16 rows: one warp each, many blocks side by side, with keys in parts.
template <int kSize, int kFeatures>
using DecodeShape = ByFeatures<
    kFeatures, BySize<kSize, TileShape<64, 1, 1, 64>, TileShape<64, 1, 1, 32>, TileShape<64, 1, 1, 16>>,
    BySize<kSize, TileShape<128, 1, 1, 32>, TileShape<128, 1, 1, 16>, TileShape<128, 2, 1, 8, 2>>,
    BySize<kSize, TileShape<256, 1, 1, 32>, TileShape<256, 2, 1, 16, 2>, TileShape<256, 2, 1, 8, 2>>>;

// Gradients of queries: rows by keys, as above.
template <int kSize, int kFeatures, bool kAny>
using GradQueriesShape = ByFeatures<
    kFeatures,
    BySize<kSize, TileShape<64, 4, kAny ? 1 : 2, kAny ? 64 : 32>, TileShape<64, 4, 1, 32>,
           TileShape<64, 2, 1, 16>>,
    BySize<kSize, TileShape<128, 4, 1, 32>, TileShape<128, 2, 1, 16>, TileShape<128, 2, 1, 8, 2>>,
    BySize<kSize, TileShape<256, 4, 1, 16>, TileShape<256, 4, 1, 8, 2>, TileShape<256, 4, 1, 8, 4>>>;

// Gradients of keys: keys = warps / column_warps * row_tiles * 16, by queries.
template <int kSize, int kFeatures, bool kAny>
using GradKeysShape = ByFeatures<
    kFeatures,
    BySize<kSize, TileShape<64, 4, kAny ? 1 : 2, kAny ? 64 : 16>, TileShape<64, 4, 1, 32>,
           TileShape<64, 4, 1, 16, 2>>,
    BySize<kSize, TileShape<128, 4, 1, kAny ? 16 : 32>, TileShape<128, 4, 1, 16, 2>,
           TileShape<128, 2, 1, 8, 2>>,
    BySize<kSize, TileShape<256, 8, 1, 16, 2>, TileShape<256, 4, 1, 8, 2>, TileShape<256, 4, 1, 8, 4>>>;

// Tangents of the gradients of queries, and of keys: as those, with tiles of tangents too. Rows x keys and keys x rows,
// registers, and shared memory, as above. Doubles of 256 features are more than a multiprocessor holds.
//
//   16 bits   64 x 32, 254, 64 KB    64 x 16, 225, 96 KB    32 x 16, 238, 128 KB     queries
//             64 x 32, 254, 66 KB    64 x 16, 254, 97 KB    32 x 16, 210, 129 KB     keys
//   float32   64 x 8, 206, 85 KB     32 x 8, 188, 99 KB     16 x 8, 191, 130 KB      queries
//             64 x 8, 185, 85 KB     32 x 8, 187, 99 KB     16 x 8, 187, 130 KB      keys
//   float64   16 x 8, 240, 68 KB     16 x 8, 254, 132 KB                             queries
//             16 x 8, 212, 69 KB     16 x 8, 212, 133 KB                             keys
template <int kSize, int kFeatures>
using DualGradQueriesShape = ByFeatures<
    kFeatures, BySize<kSize, TileShape<64, 4, 1, 32>, TileShape<64, 4, 1, 8>, TileShape<64, 2, 1, 8, 2>>,
    BySize<kSize, TileShape<128, 4, 1, 16>, TileShape<128, 2, 1, 8>, TileShape<128, 2, 1, 8, 2>>,
    BySize<kSize, TileShape<256, 4, 1, 16, 2>, TileShape<256, 2, 1, 8, 2>, TileShape<256, 4, 1, 8, 4>>>;
template <int kSize, int kFeatures>
using DualGradKeysShape = ByFeatures<
    kFeatures, BySize<kSize, TileShape<64, 4, 1, 32>, TileShape<64, 4, 1, 8>, TileShape<64, 2, 1, 8, 2>>,
    BySize<kSize, TileShape<128, 4, 1, 16>, TileShape<128, 4, 1, 8, 2>, TileShape<128, 4, 1, 8, 4>>,
    BySize<kSize, TileShape<256, 8, 1, 16, 4>, TileShape<256, 4, 1, 8, 4>, TileShape<256, 4, 1, 8, 4>>>;

// The same of the one-pass form, which has dS in shared memory too.
template <int kSize, int kFeatures>
using OnePassShape = ByFeatures<
    kFeatures, BySize<kSize, TileShape<64, 4, 1, 32>, TileShape<64, 4, 1, 16>, TileShape<64, 4, 1, 16, 2>>,
    BySize<kSize, TileShape<128, 8, 1, 16, 2>, TileShape<128, 4, 1, 16, 2>, TileShape<128, 4, 1, 8, 4>>,
    BySize<kSize, TileShape<256, 8, 1, 16, 4>, TileShape<256, 8, 1, 8, 4>, TileShape<256, 8, 1, 8, 8>>>;

// Weights and the gradient of the mask: rows by keys.
template <int kSize, int kFeatures>
using PairShape =
    ByFeatures<kFeatures,
               BySize<kSize, TileShape<64, 4, 1, 64>, TileShape<64, 4, 1, 32>, TileShape<64, 2, 1, 16>>,
               BySize<kSize, TileShape<128, 4, 1, 64>, TileShape<128, 2, 1, 32>, TileShape<128, 2, 1, 8>>,
               BySize<kSize, TileShape<256, 4, 1, 32>, TileShape<256, 1, 1, 16>, TileShape<256, 1, 1, 8>>>;

// Of the kernel for sm_90a: consumers of 64 rows each, beside the producer; keys of a tile; stages of tiles.
//
//   features   rows x keys   registers of S, P and O, of how many   shared memory
//   64         192 x 128     64 + 32 + 32 of 160                    112 KB of 227
//   96         128 x 144     72 + 36 + 64 of 240                    208 KB
//   128        128 x 128     64 + 32 + 64 of 240                    192 KB
//   192        128 x 112     56 + 28 + 96 of 240                    216 KB
//   256        128 x 64      32 + 16 + 128 of 240                   192 KB
// Up to 128 features there is room for the next tile of queries too. With a mask, which takes as many registers as S, 64
// features have two consumers, 128 have 112 keys and 256 have 48.
template <int features, int consumers, int keys, int stages = 2>
struct HopperShape {
  static constexpr int kFeatures = features, kConsumers = consumers, kKeys = keys, kStages = stages;
  static constexpr int kRows = 64 * consumers, kThreads = 128 * (1 + consumers),
                       kTiles = (features + 63) / 64, kQueryStages = features <= 128 ? 2 : 1;
  // Tiles; barriers of each stage; eight words of each consumer.
  static constexpr int kSharedBytes = 128 * kTiles * (kQueryStages * kRows + 2 * stages * keys) +
                                      8 * (2 * kQueryStages + 5 * stages) + 32 * consumers;
};

// Which one has tiles of so many features: 64, 96, 128, 192 or 256; with a mask 64, 128 or 256.
constexpr int hopper_features(int64_t most_features, bool masked) {
  if (most_features <= 64) return 64;
  if (most_features <= 96 && !masked) return 96;
  if (most_features <= 128) return 128;
  return most_features <= 192 && !masked ? 192 : 256;
}
// Calls body(shape, masked), which have them as types.
template <class Body>
auto with_hopper_shape(int features, bool masked, const Body& body) {
  if (masked) {
    constexpr std::true_type yes;
    if (features == 64) return body(HopperShape<64, 2, 128>(), yes);
    if (features == 128) return body(HopperShape<128, 2, 112>(), yes);
    return body(HopperShape<256, 2, 48>(), yes);
  }
  constexpr std::false_type no;
  if (features == 64) return body(HopperShape<64, 3, 128>(), no);
  if (features == 96) return body(HopperShape<96, 2, 144>(), no);
  if (features == 128) return body(HopperShape<128, 2, 128>(), no);
  if (features == 192) return body(HopperShape<192, 2, 112>(), no);
  return body(HopperShape<256, 2, 64>(), no);
}

// Backward: of few keys the sum of weights times their gradients, which delta should be, is made from these themselves:
// what the rounding of output leaves in the other form is more than such a small sum can bear. See
// csrc/cpu/attention_backward.cpp.
constexpr int kFewKeys = 16;

constexpr bool has_dual_backward(int size, int features) { return size < 8 || features < 256; }

// Calls body(element size, features) with the two as constants; features 64, 128 or 256.
template <class Body>
auto with_sizes(int size, int features, const Body& body) {
  const auto with_features = [&](auto s) {
    using std::integral_constant;
    if (features == 64) return body(s, integral_constant<int, 64>());
    if (features == 128) return body(s, integral_constant<int, 128>());
    return body(s, integral_constant<int, 256>());
  };
  if (size == 2) return with_features(std::integral_constant<int, 2>());
  if (size == 4) return with_features(std::integral_constant<int, 4>());
  return with_features(std::integral_constant<int, 8>());
}

}  // namespace fastseq::attention
