// The shapes of tiles for each arithmetic and size of heads, and what they take of a multiprocessor.
//
// Registers of a lane: the sums (16 rows a row tile: features / 2 and keys / 2 of 32 bits each, twice that of doubles)
// and some 60 others, of 255. Shared memory: within the 99 KB of a block on an RTX GPU where that is possible (an A100
// has 163, an H200 227).
#pragma once

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
constexpr int query_bytes(int size) { return size == 8 ? 40 : 28; }

// One of three, for elements of 2, 4 and 8 bytes.
template <int kSize, class A, class B, class C>
using BySize = std::conditional_t<kSize == 2, A, std::conditional_t<kSize == 4, B, C>>;
template <int kFeatures, class A, class B, class C>
using ByFeatures = std::conditional_t<kFeatures == 64, A, std::conditional_t<kFeatures == 128, B, C>>;

// Forward: rows = warps / column_warps * row_tiles * 16, by keys. Calls with options have smaller tiles, for their
// numbers need registers too.
template <int kSize, int kFeatures, bool kAny>
using ForwardShape = ByFeatures<
    kFeatures,
    BySize<kSize, TileShape<64, 4, 2, kAny ? 32 : 64>, TileShape<64, 4, kAny ? 1 : 2, 32>,
           TileShape<64, 4, 1, 16>>,
    BySize<kSize, TileShape<128, 4, kAny ? 1 : 2, 32>, TileShape<128, 4, 1, 16>, TileShape<128, 2, 1, 8>>,
    BySize<kSize, TileShape<256, 4, 1, 32>, TileShape<256, 2, 1, 16>, TileShape<256, 2, 1, 8, 2>>>;

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
    BySize<kSize, TileShape<64, 4, kAny ? 1 : 2, 32>, TileShape<64, 4, 1, 32>, TileShape<64, 2, 1, 16>>,
    BySize<kSize, TileShape<128, 4, 1, 32>, TileShape<128, 2, 1, 16>, TileShape<128, 2, 1, 8, 2>>,
    BySize<kSize, TileShape<256, 4, 1, 16>, TileShape<256, 4, 1, 8, 2>, TileShape<256, 4, 1, 8, 4>>>;

// Gradients of keys: keys = warps / column_warps * row_tiles * 16, by queries.
template <int kSize, int kFeatures, bool kAny>
using GradKeysShape = ByFeatures<
    kFeatures,
    BySize<kSize, TileShape<64, 4, 1, kAny ? 32 : 64>, TileShape<64, 4, 1, 32>, TileShape<64, 4, 1, 16, 2>>,
    BySize<kSize, TileShape<128, 4, 1, 16>, TileShape<128, 4, 1, 16, 2>,
           TileShape<128, kAny ? 4 : 2, 1, 8, kAny ? 4 : 2>>,
    BySize<kSize, TileShape<256, 8, 1, 16, kAny ? 4 : 2>, TileShape<256, kAny ? 8 : 4, 1, 8, kAny ? 4 : 2>,
           TileShape<256, kAny ? 8 : 4, 1, 8, kAny ? 8 : 4>>>;

// Weights and the gradient of the mask: rows by keys.
template <int kSize, int kFeatures>
using PairShape =
    ByFeatures<kFeatures,
               BySize<kSize, TileShape<64, 4, 1, 64>, TileShape<64, 4, 1, 32>, TileShape<64, 2, 1, 16>>,
               BySize<kSize, TileShape<128, 4, 1, 64>, TileShape<128, 2, 1, 32>, TileShape<128, 2, 1, 8>>,
               BySize<kSize, TileShape<256, 4, 1, 32>, TileShape<256, 1, 1, 16>, TileShape<256, 1, 1, 8>>>;

// Backward: of few keys the sum of weights times their gradients, which delta should be, is made from these themselves:
// what the rounding of output leaves in the other form is more than such a small sum can bear. See
// csrc/cpu/attention_backward.cpp.
constexpr int kFewKeys = 16;

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
