// One persistent kernel by itself: CELL, NUMBER, K_GROUPS, EXCHANGE. Compiled from a copy of csrc in which a
// line is missing, see ../test_cuda_persistent_mistakes.py: the headers are those beside it.
#include "cuda/persistent_backward.cuh"
#include "cuda/persistent_forward.cuh"

namespace frnn {

const char* run(const PersistentForward<NUMBER>& args, const Tile& tile) {
  return launch_persistent(&persistent_forward_kernel<CELL, NUMBER, K_GROUPS, EXCHANGE>, Pass::forward,
                           CELL::kGates, sizeof(NUMBER), tile, args, in_pairs(args), nullptr);
}
const char* run(const PersistentBackward<NUMBER>& args, const Tile& tile) {
  return launch_persistent(&persistent_backward_kernel<CELL, NUMBER, K_GROUPS, EXCHANGE>, Pass::backward,
                           CELL::kGates, sizeof(NUMBER), tile, args, in_pairs(args), nullptr);
}

}  // namespace frnn

#define TEST_EXPORT extern "C" __attribute__((visibility("default")))

TEST_EXPORT const char* run_persistent(int pass, int, int, const frnn::Tile* tile, const void* args) {
  using namespace frnn;
  return static_cast<Pass>(pass) == Pass::forward
             ? run(*static_cast<const PersistentForward<NUMBER>*>(args), *tile)
             : run(*static_cast<const PersistentBackward<NUMBER>*>(args), *tile);
}
TEST_EXPORT int64_t persistent_exchange_bytes(int pass, int gates, int size, const frnn::Tile* tile,
                                              int64_t B, int64_t H, int64_t D) {
  return frnn::tile_exchange_bytes(static_cast<frnn::Pass>(pass), gates, size, *tile, B, H, D);
}
