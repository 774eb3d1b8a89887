// Strong accesses (relaxed, acquire, release, atomic) and fences: what a thread makes known through them, as the memory
// model of PTX has it. Relaxed accesses order nothing by themselves; with a fence on both sides they do.
#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "state.h"

namespace frnn_emulation {
namespace {

struct Publication {
  Knowledge clock;
  Scope scope;  // who may take it in: threads of this block, of this cluster, all
  uint32_t block, cluster;
};
// By the address of the store that published. An atomic update adds to what is there, a store replaces it.
std::unordered_map<const void*, std::vector<Publication>> publications;

Scope distance(const Publication& publication, const Fiber& fiber) {
  if (publication.block == fiber.block->number) return Scope::block;
  return publication.cluster == fiber.block->cluster ? Scope::cluster : Scope::device;
}

void take_in(Fiber& fiber, const void* address, Order order, Scope scope) {
  const auto found = publications.find(address);
  if (found == publications.end()) return;
  for (const Publication& publication : found->second) {
    const Scope far = distance(publication, fiber);
    if (far > publication.scope) continue;
    if (order == Order::ordered && far <= scope) fiber.known.join(publication.clock);
    fiber.seen[static_cast<int>(far)].join(publication.clock);
  }
}

void publish_at(Fiber& fiber, const void* address, Order order, Scope scope, bool update) {
  Publication publication{{}, scope, fiber.block->number, fiber.block->cluster};
  if (order == Order::ordered) {
    publication.clock = knowledge(&fiber);
    publish(&fiber);
  } else if (!fiber.fenced.empty()) {
    publication.clock = fiber.fenced;
    publication.scope = fiber.fenced_scope;
  } else {
    if (!update) publications.erase(address);
    return;
  }
  std::vector<Publication>& at = publications[address];
  if (!update) at.clear();
  for (Publication& there : at) {
    if (there.scope == publication.scope && there.block == publication.block) {
      there.clock.join(publication.clock);
      return;
    }
  }
  at.push_back(std::move(publication));
}

template <class T>
T cast(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
uint64_t update(void* address, Atomic operation, uint64_t operand_bits, uint64_t compare_bits) {
  T old;
  memcpy(&old, address, sizeof old);
  const T operand = cast<T>(operand_bits), compare = cast<T>(compare_bits);
  T result = old;
  switch (operation) {
    case Atomic::add:
      result = old + operand;
      break;
    case Atomic::exchange:
      result = operand;
      break;
    case Atomic::compare_exchange:
      if (memcmp(&old, &compare, sizeof old) == 0) result = operand;
      break;
    case Atomic::maximum:
      result = std::max(old, operand);
      break;
    case Atomic::minimum:
      result = std::min(old, operand);
      break;
    case Atomic::bit_and:
    case Atomic::bit_or:
      if constexpr (std::is_integral_v<T>)
        result = operation == Atomic::bit_or ? old | operand : old & operand;
      break;
  }
  memcpy(address, &result, sizeof result);
  uint64_t bits = 0;
  memcpy(&bits, &old, sizeof old);
  return bits;
}

}  // namespace

Knowledge knowledge(const Fiber* fiber) {
  Knowledge clock = fiber->known;
  clock.set(fiber->id, fiber->time);
  return clock;
}

void publish(Fiber* fiber) {
  ++fiber->time;
  launch_state.last_time = std::max(launch_state.last_time, fiber->time);
  fiber->epoch = (launch_state.base + fiber->time) << kTimeShift | static_cast<Epoch>(fiber->id)
                                                                       << kThreadShift;
}

void forget_publications() { publications.clear(); }

void strong_load(const void* address, void* value, unsigned bytes, Order order, Scope scope) {
  const void* pc = __builtin_return_address(0);
  poll();
  check_access(address, bytes, false, true, pc);
  memcpy(value, address, bytes);
  uint64_t bits = 0;
  memcpy(&bits, value, std::min(bytes, 8u));
  saw(address, bits);
  take_in(*launch_state.current, address, order, scope);
}

void strong_store(void* address, const void* value, unsigned bytes, Order order, Scope scope) {
  const void* pc = __builtin_return_address(0);
  yield();
  check_access(address, bytes, true, true, pc);
  if (messages_are_lost && bytes == 8) return;
  publish_at(*launch_state.current, address, order, scope, false);
  memcpy(address, value, bytes);
  progress();
}

uint64_t atomic(void* address, Atomic operation, Number type, uint64_t operand, uint64_t compare) {
  const void* pc = __builtin_return_address(0);
  const unsigned bytes = type == Number::u64 || type == Number::f64 ? 8 : 4;
  // A failing compare-and-swap is how a lock is waited for, an update that changes nothing how a flag is read.
  launch_state.current->polls ? poll() : yield();
  Fiber& fiber = *launch_state.current;
  check_access(address, bytes, false, true, pc);
  check_access(address, bytes, true, true, pc);
  take_in(fiber, address, Order::relaxed, Scope::device);
  publish_at(fiber, address, Order::relaxed, Scope::device, true);
  uint64_t before = 0, old = 0, after = 0;
  memcpy(&before, address, bytes);
  switch (type) {
    case Number::i32:
      old = update<int32_t>(address, operation, operand, compare);
      break;
    case Number::u32:
      old = update<uint32_t>(address, operation, operand, compare);
      break;
    case Number::u64:
      old = update<uint64_t>(address, operation, operand, compare);
      break;
    case Number::f32:
      old = update<float>(address, operation, operand, compare);
      break;
    case Number::f64:
      old = update<double>(address, operation, operand, compare);
      break;
  }
  memcpy(&after, address, bytes);
  if (after != before) {
    progress();
  } else {
    saw(address, before);
  }
  return old;
}

void fence(Scope scope) {
  Fiber& fiber = *launch_state.current;
  for (int far = 0; far <= static_cast<int>(scope); ++far) {
    fiber.known.join(fiber.seen[far]);
    fiber.seen[far] = Knowledge();
  }
  fiber.fenced = knowledge(&fiber);
  fiber.fenced_scope = scope;
  publish(&fiber);
}

}  // namespace frnn_emulation
