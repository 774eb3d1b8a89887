// What a thread keeps of its scratch memory (csrc/cpu/scratch.h): exits with 0 if all is as promised. Built with
// AddressSanitizer, which also finds what a thread does not free when it ends.
#include <stdio.h>
#include <string.h>

#include <thread>

#include "../csrc/cpu/scratch.h"

namespace {

using frnn::ScratchBlock;
constexpr size_t kMegabyte = size_t{1} << 20;
int failures = 0;

void expect(bool holds, const char* what) {
  if (!holds) fprintf(stderr, "not so: %s\n", what), ++failures;
}

// How many of `count` blocks, given back one after another, are still there afterwards.
int still_kept(int count, size_t bytes) {
  ScratchBlock blocks[16], again[16];
  for (int i = 0; i < count; ++i) {
    blocks[i] = frnn::take_scratch(bytes);
    memset(blocks[i].data, 1, bytes);
  }
  for (int i = 0; i < count; ++i) frnn::keep_scratch(blocks[i]);
  int kept = 0;
  for (int i = 0; i < count; ++i) {
    again[i] = frnn::take_scratch(bytes);
    for (int k = 0; k < count; ++k) kept += again[i].data == blocks[k].data;
  }
  for (int i = 0; i < count; ++i) frnn::keep_scratch(again[i]);
  return kept;
}

void check() {
  expect(still_kept(4, 7 * kMegabyte) == 4, "28 MB are kept");
  expect(still_kept(1, frnn::kKeptScratch) == 1, "so is a block of the whole bound");
  const ScratchBlock small = frnn::take_scratch(100);
  expect(small.bytes == frnn::kKeptScratch, "and a smaller request has it, where it is the only one");
  frnn::keep_scratch(small);
  expect(reinterpret_cast<size_t>(small.data) % 64 == 0, "blocks are aligned to a cache line");
  const ScratchBlock large = frnn::take_scratch(frnn::kKeptScratch + 1);
  frnn::keep_scratch(large);
  const ScratchBlock other = frnn::take_scratch(1);
  expect(other.bytes == frnn::kKeptScratch, "a block above the bound is not kept, and drives out no other");
  frnn::keep_scratch(other);
  still_kept(16, 10);  // more than a thread keeps: AddressSanitizer sees whether the others are freed
}

}  // namespace

int main() {
  check();
  std::thread(check).join();
  return failures;
}
