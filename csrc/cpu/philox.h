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
    uint32_t key_low = uint32_t(key), key_high = uint32_t(key >> 32);
    for (int i = 0; i < kPhiloxLanes; ++i) {
      word[0][i] = first + uint32_t(i), word[1][i] = second, word[2][i] = third, word[3][i] = fourth;
    }
    for (int round = 0; round < 10; ++round) {
      for (int i = 0; i < kPhiloxLanes; ++i) {
        const uint64_t a = uint64_t(0xD2511F53u) * word[0][i], b = uint64_t(0xCD9E8D57u) * word[2][i];
        word[0][i] = uint32_t(b >> 32) ^ word[1][i] ^ key_low;
        word[1][i] = uint32_t(b);
        word[2][i] = uint32_t(a >> 32) ^ word[3][i] ^ key_high;
        word[3][i] = uint32_t(a);
      }
      key_low += 0x9E3779B9u, key_high += 0xBB67AE85u;
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
