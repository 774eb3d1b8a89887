// The matrix instructions of a warp, on fragments laid out as PTX has them (see csrc/cuda/ptx.cuh). Products are exact
// and added in float, in order of k: what a tensor core does to the last bit is not known.
#include <cstring>

#include "../include/emulation/ptx_hooks.h"
#include "../include/emulation/sixteen_bits.h"
#include "state.h"

namespace frnn_emulation {
namespace {

struct Product {
  Mma kind;
  const uint32_t *a, *b;
  float* acc;
};

struct Load {
  uint16_t row[8];
  uint32_t* registers;
  bool transpose;
};

template <class T>
void gather(Fiber* const* lanes, const T* (&of)[kLanes]) {
  for (uint32_t lane = 0; lane < kLanes; ++lane) of[lane] = reinterpret_cast<const T*>(lanes[lane]->given);
}

float sixteen(uint32_t word, uint32_t half, Mma kind) {
  const auto bits = static_cast<uint16_t>(word >> 16 * half);
  return kind == Mma::bf16 ? bfloat16_to_float(bits) : half_to_float(bits);
}

// What a tensor core reads of a register: the last 13 bits are no part of a tf32.
float tf32(uint32_t word) {
  word &= ~0x1fffu;
  float value;
  memcpy(&value, &word, 4);
  return value;
}

// a: row, k. b: column, k.
float element(const uint32_t* registers, uint32_t line_high, uint32_t k, Mma kind, bool is_a) {
  const uint32_t lines = is_a ? 2 : 1;
  if (kind == Mma::tf32) return tf32(registers[k / 4 * lines + line_high]);
  return sixteen(registers[k / 8 * lines + line_high], k % 2, kind);
}

uint32_t lane_of(uint32_t line, uint32_t k, Mma kind) {
  return line % 8 * 4 + (kind == Mma::tf32 ? k % 4 : k % 8 / 2);
}

}  // namespace

void multiply(Fiber* const* lanes) {
  const Product* of[kLanes];
  gather(lanes, of);
  const Mma kind = of[0]->kind;
  const uint32_t depth = kind == Mma::bf16 || kind == Mma::f16 ? 16 : 8;
  float a[16][16], b[16][8];
  for (uint32_t k = 0; k < depth; ++k) {
    for (uint32_t row = 0; row < 16; ++row)
      a[row][k] = element(of[lane_of(row, k, kind)]->a, row / 8, k, kind, true);
    for (uint32_t column = 0; column < 8; ++column) {
      b[k][column] = element(of[lane_of(column, k, kind)]->b, 0, k, kind, false);
    }
  }
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    if (of[lane]->kind != kind) trap("lanes of a warp multiply matrices of different types together");
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = of[lane]->acc[i];
      for (uint32_t k = products_are_wrong; k < depth; ++k) sum += a[row][k] * b[k][column];
      of[lane]->acc[i] = sum;
    }
  }
}

void mma(Mma kind, float* acc, const uint32_t* a, const uint32_t* b) {
  const Product product{kind, a, b, acc};
  warp_meet(WarpOperation::multiply, ~0u, reinterpret_cast<uint64_t>(&product), 0);
}

uint32_t to_tf32(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7f800000) == 0x7f800000) return value != value ? 0x7fffffff : bits;
  return (bits + 0x1000) & ~0x1fffu;
}

void distribute_matrices(Fiber* const* lanes) {
  const Load* of[kLanes];
  gather(lanes, of);
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    const uint32_t g = lane / 4, t = lane % 4;
    for (uint32_t matrix = 0; matrix < 4; ++matrix) {
      const auto at = [&](uint32_t row, uint32_t column) -> uint32_t {
        return of[matrix * 8 + row]->row[column];
      };
      of[lane]->registers[matrix] =
          of[lane]->transpose ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
    }
  }
}

void load_matrices(uint32_t* registers, const void* row, bool transpose) {
  const void* pc = __builtin_return_address(0);
  yield();
  shared_address(row);
  check_access(row, 16, false, false, pc);
  Load load{{}, registers, transpose};
  memcpy(load.row, row, sizeof load.row);
  warp_meet(WarpOperation::load_matrices, ~0u, reinterpret_cast<uint64_t>(&load), 0);
}

}  // namespace frnn_emulation
