// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): random numbers as a function
// of a key and a counter, so that a dropout mask needs no memory.
#pragma once

#include <cstdint>

#include "vec.h"

namespace fastseq::FASTSEQ_ISA {

constexpr int kPhiloxLanes = 16;

// 4 x 16 words for the counters (lane + first, second, third, fourth).
struct PhiloxBlock {
  uint32_t word[4][kPhiloxLanes];

  PhiloxBlock(uint64_t key, uint32_t first, uint32_t second, uint32_t third, uint32_t fourth) {
    Word32 lane;
    for (int i = 0; i < kFloats; ++i) lane[i] = uint32_t(i);
    for (int at = 0; at < kPhiloxLanes; at += kFloats) {
      uint32_t key_low = uint32_t(key), key_high = uint32_t(key >> 32);
      Word32 w[4] = {lane + (first + uint32_t(at)), lane * 0 + second, lane * 0 + third, lane * 0 + fourth};
      for (int round = 0; round < 10; ++round) {
        Word32 high[2], low[2];
        multiply_wide(w[0], 0xD2511F53u, high[0], low[0]);
        multiply_wide(w[2], 0xCD9E8D57u, high[1], low[1]);
        w[0] = high[1] ^ w[1] ^ key_low, w[1] = low[1];
        w[2] = high[0] ^ w[3] ^ key_high, w[3] = low[0];
        key_low += 0x9E3779B9u, key_high += 0xBB67AE85u;
      }
      for (int i = 0; i < 4; ++i) std::memcpy(word[i] + at, &w[i], sizeof w[i]);
    }
  }
};

// Which weights of attention are kept: a function of seed, head and query, and key alone. Of each 64 keys, from a
// multiple of 64 on, key 16 w + i takes word w of lane i.
struct Dropout {
  bool active;
  uint64_t seed;
  uint32_t threshold;  // kept where the word is below

  Dropout(double p, uint64_t seed)
      : active(p > 0), seed(seed), threshold(uint32_t((1 - p) * 4294967295.0 + 0.5)) {}

  // keep[i] = 1 where the weight of key first + i is kept, else 0.
  template <class T>
  void keep(int64_t head, int64_t query, int64_t first, int64_t count, T* keep) const {
    constexpr int kKeys = 4 * kPhiloxLanes;
    for (int64_t group = first / kKeys; group * kKeys < first + count; ++group) {
      const PhiloxBlock block(seed, uint32_t(group * kPhiloxLanes), uint32_t(query), uint32_t(head),
                              uint32_t(query >> 32));
      const uint32_t* const word = block.word[0];
      const int64_t begin = group * kKeys - first;  // of the group in keep
      const int64_t low = begin < 0 ? -begin : 0, high = count - begin < kKeys ? count - begin : kKeys;
      for (int64_t i = low; i < high; ++i) keep[begin + i] = word[i] < threshold ? T(1) : T(0);
    }
  }
};

}  // namespace fastseq::FASTSEQ_ISA
