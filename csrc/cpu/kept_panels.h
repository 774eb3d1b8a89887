// Packed weights that outlive their call. Without gradients the same weights come again and again, and to pack them is a
// good part of a short sequence of few rows. Nothing tells reliably that weights are still the same: a
// write through `.data`, one by another process, another tensor in the same memory leave no trace. So what is kept has a
// digest of what it was packed from (panels.h), and whoever takes it compares.
#pragma once

#include <stdint.h>

#include "scratch.h"

namespace frnn {

// What a block was packed from, and how.
struct PanelsKey {
  const void* weights;
  const void* layout;  // an address for each way to pack
  int64_t units, K;
  int parts;
};

struct PanelsBlock {
  ScratchBlock memory;
  bool known;  // holds what was kept under this key
};

// At least `bytes`, and nobody else's until it is given back: of two calls at once one packs anew. Throws std::bad_alloc.
PanelsBlock take_panels(const PanelsKey& key, size_t bytes);
// Gives a block back, as scratch memory if the process keeps kKeptPanels bytes already that are in use.
void keep_panels(const PanelsKey& key, ScratchBlock memory) noexcept;

constexpr size_t kKeptPanels = size_t{64} << 20;

}  // namespace frnn
