// The instructions of csrc/cpu/amx.h themselves, on any CPU of x86-64: without AMX they raise SIGILL, and a handler
// reads them and does to emulated tiles what they would do to tiles. A product of matrices then comes out right only if
// the assembly says what the emulation does.
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "cpu/amx.h"
#include "emulated_tiles.h"

namespace {

// An instruction of AMX, all of which are VEX.128.0F38.W0: C4, ~R ~X ~B and the map, W ~vvvv L pp, opcode, operands.
class Instruction {
 public:
  Instruction(ucontext_t* thread, const unsigned char* code) : thread_(thread), code_(code) {}

  // Returns its length.
  int execute() {
    require(code_[0] == 0xc4 && (code_[1] & 0x1f) == 2, "no instruction of AMX");
    require((code_[2] & 0x84) == 0 && (code_[1] & 0x80), "W, L or R of no instruction of AMX");
    const int prefix = code_[2] & 3, source = ~code_[2] >> 3 & 15;  // of which 0 is none, 2 is F3, 3 is F2
    const int opcode = code_[3] << 4 | prefix, tile = code_[4] >> 3 & 7, other = code_[4] & 7;
    const bool registers = code_[4] >> 6 == 3;
    int length = 5;
    int64_t stride = 0;
    char* const address = registers ? nullptr : memory(length, stride);
    frnn::EmulatedTiles& tiles = frnn::emulated_tiles();
    if (opcode == 0x490 && !registers && tile == 0)
      tiles.configure(address);
    else if (opcode == 0x490 && code_[4] == 0xc0)
      tiles.release();
    else if (opcode == 0x493 && registers && other == 0)
      tiles.zero(tile);
    else if (opcode == 0x4b3 && !registers && other == 4)
      tiles.load(tile, address, stride);
    else if (opcode == 0x4b2 && !registers && other == 4)
      tiles.store(tile, address, stride);
    else if (opcode == 0x5c2 && registers)
      tiles.add_product(tile, other, source);
    else
      require(false, "an instruction of AMX that is not known here");
    return length;
  }

 private:
  void require(bool holds, const char* what) const {
    if (holds) return;
    fprintf(stderr, "SIGILL, %s:", what);
    for (int i = 0; i < 8; ++i) fprintf(stderr, " %02x", code_[i]);
    fprintf(stderr, "\n");
    abort();
  }
  int64_t general(int number) const {
    static constexpr int kIndex[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                     REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return thread_->uc_mcontext.gregs[kIndex[number]];
  }
  // base + displacement, and the index as a stride.
  char* memory(int& length, int64_t& stride) const {
    const int form = code_[4] >> 6, upper_index = code_[1] & 0x40 ? 0 : 8,
              upper_base = code_[1] & 0x20 ? 0 : 8;
    int base = code_[4] & 7;
    if (base == 4) {
      const int sib = code_[length++], index = (sib >> 3 & 7) | upper_index;
      if (index != 4) stride = general(index) << (sib >> 6);
      base = sib & 7;
    }
    require(base != 5 || form != 0, "an address without a base register");
    int64_t displacement = 0;
    if (form == 1) displacement = static_cast<signed char>(code_[length]), length += 1;
    if (form == 2) {
      int32_t wide;
      memcpy(&wide, code_ + length, sizeof wide);
      displacement = wide, length += 4;
    }
    return reinterpret_cast<char*>(general(base | upper_base) + displacement);
  }

  ucontext_t* thread_;
  const unsigned char* code_;
};

void on_illegal_instruction(int, siginfo_t*, void* context) {
  auto* thread = static_cast<ucontext_t*>(context);
  greg_t& next = thread->uc_mcontext.gregs[REG_RIP];
  next += Instruction(thread, reinterpret_cast<const unsigned char*>(next)).execute();
}

// c[rows][16] + 2 a[rows][32] b[16][16][2], each with a stride of its own. Small whole numbers: every sum is exact.
template <int kSum, int kA, int kB>
bool right(int rows) {
  const auto number = [](int i) { return static_cast<float>(i % 7 - 3); };
  const auto upper_half = [&](int i) {
    uint32_t bits;
    const float x = number(i);
    memcpy(&bits, &x, sizeof bits);
    return static_cast<uint16_t>(bits >> 16);
  };
  uint16_t a[16][40], b[16][48];
  float c[16][20], expected[16][20];
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 40; ++k) a[m][k] = upper_half(5 * m + k);
    for (int n = 0; n < 48; ++n) b[m][n] = upper_half(3 * m + n);
    for (int n = 0; n < 20; ++n) expected[m][n] = c[m][n] = static_cast<float>(m - 3 * n);
  }
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < 16; ++n)
      for (int k = 0; k < 32; ++k)
        expected[m][n] += 2 * number(5 * m + k) * number(3 * (k / 2) + 2 * n + k % 2);

  frnn::TileShapes shapes;
  shapes.set(kSum, rows, 64);
  shapes.set(kA, rows, 64);
  shapes.set(kB, 16, 64);
  frnn::shape_tiles(shapes);
  frnn::load_tile<kSum>(c, sizeof c[0]);
  frnn::load_tile<kA>(a, sizeof a[0]);
  frnn::load_tile<kB>(b, sizeof b[0]);
  frnn::add_tile_product<kSum, kA, kB>();
  frnn::add_tile_product<kSum, kA, kB>();
  frnn::store_tile<kSum>(c, sizeof c[0]);
  bool same = memcmp(c, expected, sizeof c) == 0;
  frnn::zero_tile<kSum>();
  frnn::store_tile<kSum>(c, sizeof c[0]);
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < 16; ++n) same &= c[m][n] == 0;
  frnn::release_tiles();
  return same && frnn::EmulatedTiles::users() == 0;
}

}  // namespace

int main() {
  syscall(SYS_arch_prctl, 0x1023, 18);  // permission, where there is AMX
  struct sigaction action{};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
  return right<0, 1, 2>(16) && right<7, 4, 5>(1) && right<3, 5, 6>(9) && right<2, 7, 0>(16) ? 0 : 1;
}
