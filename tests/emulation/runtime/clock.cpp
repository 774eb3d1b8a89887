// See clock.h.
#include "clock.h"

#include <algorithm>

namespace frnn_emulation {

uint32_t Clock::behind(uint32_t thread, uint32_t lanes, uint32_t time) const {
  const WarpClock* warp = warp_of(thread);
  if (!warp) return lanes;
  uint32_t found = 0;
  for (uint32_t lane = 0; lane < kLanes; ++lane)
    found |= static_cast<uint32_t>(warp->lanes[lane] < time) << lane;
  return found & lanes;
}

void Clock::set(uint32_t thread, uint32_t time) {
  auto& blocks = known_.change().blocks;
  const uint32_t block = thread / kThreadsOfBlock;
  auto place = std::lower_bound(blocks.begin(), blocks.end(), block,
                                [](const auto& entry, uint32_t wanted) { return entry.first < wanted; });
  if (place == blocks.end() || place->first != block) place = blocks.insert(place, {block, {}});
  place->second.change().warps[thread / kLanes % kLanes].change().lanes[thread % kLanes] = time;
}

// Where one side knows all that the other does, its own tree is kept: the next join of the two is then a comparison
// of pointers.
void Clock::join(Shared<WarpClock>& into, const Shared<WarpClock>& other) {
  if (into.get() == other.get() || !other.get()) return;
  if (!into.get()) {
    into = other;
    return;
  }
  std::array<uint32_t, kLanes> both;
  for (uint32_t lane = 0; lane < kLanes; ++lane) both[lane] = std::max(into->lanes[lane], other->lanes[lane]);
  if (both == into->lanes) return;
  if (both == other->lanes) {
    into = other;
  } else {
    into.change().lanes = both;
  }
}

void Clock::join(Shared<BlockClock>& into, const Shared<BlockClock>& other) {
  if (into.get() == other.get() || !other.get()) return;
  if (!into.get()) {
    into = other;
    return;
  }
  bool into_is_more = true, other_is_more = true;
  BlockClock both = *into.get();
  for (size_t warp = 0; warp < both.warps.size(); ++warp) {
    join(both.warps[warp], other->warps[warp]);
    into_is_more &= both.warps[warp].get() == into->warps[warp].get();
    other_is_more &= both.warps[warp].get() == other->warps[warp].get();
  }
  if (into_is_more) return;
  if (other_is_more) {
    into = other;
  } else {
    into.change().warps = std::move(both.warps);
  }
}

void Clock::join(const Clock& other) {
  if (same(other) || other.empty()) return;
  if (empty()) {
    *this = other;
    return;
  }
  bool other_is_more = known_->blocks.size() == other.known_->blocks.size();
  auto& blocks = known_.change().blocks;
  size_t place = 0;
  for (const auto& [block, clock] : other.known_->blocks) {
    while (place < blocks.size() && blocks[place].first < block) ++place;
    if (place == blocks.size() || blocks[place].first != block) {
      blocks.insert(blocks.begin() + static_cast<std::ptrdiff_t>(place), {block, clock});
    } else {
      join(blocks[place].second, clock);
    }
    other_is_more &= blocks[place].second.get() == clock.get();
  }
  if (other_is_more && blocks.size() == other.known_->blocks.size()) *this = other;
}

}  // namespace frnn_emulation
