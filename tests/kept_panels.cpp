// Packed weights that outlive their call (csrc/cpu/kept_panels.h, panels.h): exits with 0 if all is as promised. Built with
// sanitizers: AddressSanitizer finds what is read beyond the weights, ThreadSanitizer blocks that two threads have at once.
#include <stdio.h>
#include <string.h>

#include <set>
#include <thread>
#include <vector>

#include "../csrc/cpu/isa_prelude.h"
#define FRNN_ISA portable
#define FRNN_VECTOR_BYTES 32  // whatever the machine has
#include "../csrc/cpu/weights.h"

namespace {

using frnn::PanelsBlock;
using frnn::PanelsKey;
int failures = 0;

void expect(bool holds, const char* what) {
  if (!holds) fprintf(stderr, "not so: %s\n", what), ++failures;
}

PanelsKey key_of(const void* weights, int64_t units = 1) { return {weights, &failures, units, 1, 1}; }
const void* weights_at(size_t address) { return reinterpret_cast<const void*>(address); }

// Takes, fills and gives back a block of so many bytes for each of the keys from `first` on; counts those known.
int pass(size_t first, int count, size_t bytes) {
  int known = 0;
  for (int i = 0; i < count; ++i) {
    const PanelsKey key = key_of(weights_at(first + i));
    const PanelsBlock block = frnn::take_panels(key, bytes);
    char* const begin = static_cast<char*>(block.memory.data);
    if (block.known)
      expect(*begin == static_cast<char>(first + i), "a known block holds what it was left with");
    known += block.known;
    memset(begin, static_cast<int>(first + i), bytes);
    frnn::keep_panels(key, block.memory);
  }
  return known;
}

void check_store() {
  constexpr size_t kBlock = 9 << 20;
  constexpr int kFit = frnn::kKeptPanels / kBlock;
  expect(pass(1, kFit, kBlock) == 0 && pass(1, kFit, kBlock) == kFit, "what fits is kept");
  expect(pass(1, kFit + 1, kBlock) == kFit && pass(1, kFit + 1, kBlock) == kFit,
         "one more drives out none in use");
  const PanelsBlock one = frnn::take_panels(key_of(weights_at(1)), kBlock);
  const PanelsBlock two = frnn::take_panels(key_of(weights_at(1)), kBlock);
  expect(one.known && !two.known && one.memory.data != two.memory.data, "nobody shares a block");
  frnn::keep_panels(key_of(weights_at(1)), one.memory);
  frnn::keep_panels(key_of(weights_at(1)), two.memory);
  const PanelsBlock other = frnn::take_panels(key_of(weights_at(1), 2), kBlock);
  expect(!other.known, "of other sizes it is another matrix");
  frnn::keep_panels(key_of(weights_at(1), 2), other.memory);
  int rounds = 0;  // of other weights alone, until they have the room
  while (pass(100, kFit, kBlock) < kFit && rounds < 1000) ++rounds;
  expect(rounds > 8 && rounds < 200, "what is out of use makes room, after a while");
  const PanelsBlock large = frnn::take_panels(key_of(weights_at(200)), frnn::kKeptPanels + 1);
  frnn::keep_panels(key_of(weights_at(200)), large.memory);
  const PanelsBlock again = frnn::take_panels(key_of(weights_at(200)), 1);
  expect(!again.known, "a block above the bound is not kept");
  frnn::keep_scratch(again.memory);
  expect(pass(100, kFit, kBlock) == kFit, "and drives out no other");
}

// Changes that a sum, or a product that loses its upper bits, would not show.
void check_digest() {
  std::vector<float> weights(301);
  for (size_t i = 0; i < weights.size(); ++i) weights[i] = 0.01f * static_cast<float>(i % 37) - 0.2f;
  for (const size_t bytes :
       {size_t{2}, size_t{4}, size_t{62}, size_t{256}, size_t{258}, 4 * weights.size()}) {
    std::set<std::vector<char>> contents;
    std::set<uint64_t> digests;
    const auto see = [&](const std::vector<float>& numbers) {
      const char* const begin = reinterpret_cast<const char*>(numbers.data());
      const std::vector<char> exact(begin, begin + bytes);  // so that a byte beyond is out of bounds
      frnn::Digest digest;
      digest.add(exact.data(), static_cast<int64_t>(bytes));
      digests.insert(digest.value());
      contents.insert(exact);
    };
    std::vector<float> changed = weights;
    see(changed);
    for (float& w : changed) w = -w;
    see(changed);
    for (size_t bit = 0; bit < 8 * bytes; ++bit) {
      changed = weights;
      reinterpret_cast<unsigned char*>(changed.data())[bit / 8] ^= static_cast<unsigned char>(1 << bit % 8);
      see(changed);
    }
    for (size_t i = 0; i < weights.size(); ++i)
      for (const size_t other : {i + 1, i + 2, i + 8, i + 16, i + 64, i + 128}) {
        if (other >= weights.size()) continue;
        changed = weights;
        std::swap(changed[i], changed[other]);
        see(changed);
        changed = weights;
        changed[i] = -changed[i], changed[other] = -changed[other];
        see(changed);
      }
    expect(digests.size() == contents.size(), "different numbers have different digests");
  }
}

// How often the panels of a matrix that is multiplied again are packed.
void check_panels() {
  constexpr int64_t kUnits = 24, kK = 40, kPanels = 3, kSize = 8 * kK;
  std::vector<float> weights(kUnits * kK, 0.5f);
  const auto call = [&](bool kept) {
    int packed = 0;
    const frnn::Panels<float> panels({weights.data(), &failures, kUnits, kK, 1}, kPanels, kSize, kept);
    for (int64_t p = 0; p < kPanels; ++p)
      panels.renew(
          p, [&] { return frnn::digest_of_units<1>(weights.data(), kUnits, kK, p * 8, 8); },
          [&](float* to) {
            memcpy(to, weights.data() + p * kSize, kSize * sizeof(float));
            ++packed;
            return p == 1;
          });
    for (int64_t p = 0; p < kPanels; ++p)
      expect(memcmp(panels.at(p), weights.data() + p * kSize, kSize * sizeof(float)) == 0 &&
                 panels.note(p) == (p == 1),
             "a panel holds the weights as they are now");
    return packed;
  };
  expect(call(true) == 3 && call(true) == 0, "the same weights are packed once");
  weights[kSize] = -0.0f;
  expect(call(true) == 1, "of changed ones the panel that changed");
  expect(call(false) == 3 && call(true) == 0, "for one call all of them, and nothing of that is kept");
}

void check_threads() {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([] {
      for (int round = 0; round < 200; ++round) pass(300, 3, 4096);
    });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main() {
  check_digest();
  check_panels();
  check_store();
  check_threads();
  return failures;
}
