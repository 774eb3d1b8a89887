// The persistent kernels as tests call them: arguments as C structs, the tile as numbers. See ../persistent_layer.py.
#include "cuda/persistent.h"

namespace {

using frnn::CellKind;
using frnn::Exchange;
using frnn::Pass;
using frnn::Tile;

// Calls f with a value of the stored numbers' type.
template <class F>
auto with_numbers(int number, F&& f) {
  if (number == 0) return f(frnn::BFloat16{});
  if (number == 1) return f(frnn::Half{});
  if (number == 2) return f(float{});
  return f(frnn::Exact{});
}

}  // namespace

#define TEST_EXPORT extern "C" __attribute__((visibility("default")))

TEST_EXPORT const char* run_persistent(int pass, int number, int cell, const Tile* tile, const void* args) {
  return with_numbers(number, [&](auto zero) {
    using T = decltype(zero);
    const auto kind = static_cast<CellKind>(cell);
    if (static_cast<Pass>(pass) == Pass::forward)
      return frnn::persistent_forward(kind, *tile, *static_cast<const frnn::PersistentForward<T>*>(args),
                                      nullptr);
    return frnn::persistent_backward(kind, *tile, *static_cast<const frnn::PersistentBackward<T>*>(args),
                                     nullptr);
  });
}

TEST_EXPORT int64_t persistent_residents(int pass, int number, int cell, const Tile* tile, int64_t H) {
  return with_numbers(number, [&](auto zero) {
    using T = decltype(zero);
    int64_t replicas = 0;
    const auto kind = static_cast<CellKind>(cell);
    const char* error = static_cast<Pass>(pass) == Pass::forward
                            ? frnn::persistent_forward_residents<T>(kind, *tile, H, &replicas)
                            : frnn::persistent_backward_residents<T>(kind, *tile, H, &replicas);
    return error ? int64_t{-1} : replicas;
  });
}

TEST_EXPORT int64_t persistent_exchange_bytes(int pass, int gates, int size, const Tile* tile, int64_t B,
                                              int64_t H, int64_t D) {
  return frnn::tile_exchange_bytes(static_cast<Pass>(pass), gates, size, *tile, B, H, D);
}
TEST_EXPORT int64_t persistent_shared_bytes(int pass, int gates, int size, const Tile* tile, int64_t H) {
  return frnn::tile_shared_bytes(static_cast<Pass>(pass), gates, size, *tile, H);
}
