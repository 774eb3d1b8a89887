// How the blocks of a replica hand each other the state of a step: V vectors of H numbers (h_t, or the gradients of the
// gates) for each row of the batch tile. Every block puts what it has computed, sends, and receives the whole: a tile
// [V][8 * columns][row] in its shared memory, from which its warps multiply. Numbers beyond H, and rows beyond the batch,
// are zero there for ever.
//
// All three policies have
//   start()     once, after initial() was filled with the state before the first step: the first tile to multiply
//   put()       one pair of units of the message under way. The block must have finished multiplying: a __syncthreads
//               lies between a receive() and the put() that follows; see Exchange::block for the exception
//   send()      after the last put(); `more`: another message will follow
//   receive()   the next tile, for all threads
//   finish()    after the last step
// Messages are counted from 0; all blocks of a replica send and receive equally many.
#pragma once

#include "tile.cuh"
#include "wait.cuh"

namespace frnn {

// Where a block stands.
struct Replica {
  int direction, first_row, rows;  // of the batch
  int blocks, rank;
  int columns;  // eights of rows that the tile has room for
  int H;
  int row;  // numbers from row to row of a tile, tile_row
};

// What an exchange works in; of a policy's members the others are not read.
template <class T>
struct ExchangeMemory {
  T* tiles;             // kTiles [V][8 * columns][row]
  T* staged;            // [8 * columns][V][units of the block]
  uint64_t* mbarriers;  // [4]
  void* messages;       // global, tile_exchange_bytes
  unsigned* gave_up;    // global, or null; see gives_up()
  int64_t B;
};

// The smallest n with 1 << n at least `count`. Items in rows of so many are told apart by a shift: a row that is too long
// by a few idle items costs less than a division.
__device__ __forceinline__ int shift_for(int count) { return 32 - __clz(count - 1); }

// The tiles of a block, side by side.
template <class T, int V>
class Tiles {
 public:
  // Zeroes `count` tiles; others may write after a barrier.
  __device__ __forceinline__ Tiles(T* memory, const Replica& replica, int count)
      : vector(8 * replica.columns * replica.row), memory_(memory), row_(replica.row) {
    uint4* all = reinterpret_cast<uint4*>(memory);
    const int chunks = count * V * vector * static_cast<int>(sizeof(T)) / 16;
    for (int i = threadIdx.x; i < chunks; i += kTileThreads) all[i] = uint4{0, 0, 0, 0};
    __syncthreads();
  }
  __device__ __forceinline__ T* at(int tile, int v, int b, int k) const {
    return memory_ + (tile * V + v) * vector + b * row_ + k;
  }
  const int vector;  // numbers from one vector to the next

 private:
  T* memory_;
  int row_;
};

template <Exchange kExchange, class T, int V, int kGroups>
class StateExchange;

// ---- Inside one block -----------------------------------------------------------------------------------------------

// Two tiles: put() writes the one that is not multiplied, so that one barrier a step is enough. A thread that puts message
// m + 1 has met all others at the receive() of message m, and they had finished multiplying message m - 1, which lay in
// the same tile.
template <class T, int V, int kGroups>
class StateExchange<Exchange::block, T, V, kGroups> {
 public:
  static constexpr int kTiles = 2;
  __device__ __forceinline__ StateExchange(const Replica& replica, const ExchangeMemory<T>& memory)
      : tiles_(memory.tiles, replica, kTiles) {}

  __device__ __forceinline__ T* initial() const { return tiles_.at(0, 0, 0, 0); }
  __device__ __forceinline__ const T* start() {
    __syncthreads();
    return initial();
  }
  __device__ __forceinline__ void put(int v, int b, int unit, const StoredPair<T>& pair) const {
    store_pair<true>(tiles_.at((message_ + 1) % 2, v, b, unit), pair.multiplied(), true);
  }
  __device__ __forceinline__ void send(bool) const {}
  __device__ __forceinline__ const T* receive() {
    __syncthreads();
    ++message_;
    return tiles_.at(message_ % 2, 0, 0, 0);
  }
  __device__ __forceinline__ void finish() const {}
  __device__ __forceinline__ int vector() const { return tiles_.vector; }

 private:
  Tiles<T, V> tiles_;
  unsigned message_ = 0;
};

// ---- Inside a cluster -----------------------------------------------------------------------------------------------

// A block stages its units of a message in its own shared memory, then stores them asynchronously into a tile of every
// block, itself included. Each tile has two mbarriers: `full` counts the bytes of a whole message, `empty` the blocks that
// have multiplied what lies there. Message m goes to tile (m + 1) % 2, where m - 2 lay.
//
// Of `empty` nobody ever waits long: a block that has received message m - 1 from all others knows as much, for they had
// all multiplied m - 2 before they sent it. But an asynchronous store that arrives makes known what it wrote and nothing
// else of its sender, so that only the arrival at `empty` orders their reads before the next store.
//
// A block that exits has waited for all that anyone sends to it: for every message, and, before its last, for the arrivals
// at `empty`, which nobody makes for a message that does not follow.
//
// Unless it has given up. Then its mbarriers are in phases that nobody can tell, so from then on it neither sends nor arrives
// anywhere, and the others give up in their turn. It stays until they have, see finish().
template <class T, int V, int kGroups>
class StateExchange<Exchange::cluster, T, V, kGroups> {
 public:
  static constexpr int kTiles = 2;
  __device__ __forceinline__ StateExchange(const Replica& replica, const ExchangeMemory<T>& memory)
      : replica_(replica), tiles_(memory.tiles, replica, kTiles), staged_(memory.staged),
        full_(memory.mbarriers), empty_(memory.mbarriers + kTiles), gave_up_(memory.gave_up),
        peer_shift_(shift_for(replica.rows * V * kChunks)),
        message_bytes_(replica.rows * V * ((replica.H * static_cast<int>(sizeof(T)) + 15) / 16 * 16)) {
    // Units beyond H are staged by nobody, and sent.
    uint4* all = reinterpret_cast<uint4*>(staged_);
    for (int i = threadIdx.x; i < V * 8 * replica.columns * kChunks; i += kTileThreads)
      all[i] = uint4{0, 0, 0, 0};
    if (threadIdx.x == 0) {
      for (int tile = 0; tile < kTiles; ++tile) {
        mbarrier_init(&full_[tile], 1);
        mbarrier_init(&empty_[tile], replica.blocks);
        mbarrier_arrive_expect(&full_[tile], message_bytes_);
      }
    }
  }

  __device__ __forceinline__ T* initial() const { return tiles_.at(0, 0, 0, 0); }
  // Every block's tiles and mbarriers must be ready before the first message.
  __device__ __forceinline__ const T* start() const {
    cluster_arrive();
    cluster_wait();
    return initial();
  }
  __device__ __forceinline__ void put(int v, int b, int unit, const StoredPair<T>& pair) const {
    T* to = staged_ + (b * V + v) * kUnits + unit - replica_.rank * kUnits;
    store_pair<true>(to, pair.multiplied(), true);
  }
  __device__ __forceinline__ void send(bool more) const {
    const unsigned tile = (message_ + 1) % kTiles;
    if (threadIdx.x == 0 && message_ > 0)
      mbarrier_wait<Reach::block>(&empty_[tile], (message_ - 1) / kTiles % 2, gave_up_);
    __syncthreads();
    if (is_given_up(gave_up_)) return;          // by any thread of this block, or by another
    if (more && threadIdx.x < replica_.blocks)  // the other tile is multiplied
      mbarrier_arrive_after_reads(address_at_rank(shared_address(&empty_[message_ % kTiles]), threadIdx.x));
    // A thread loads a chunk once and stores it to every block, or, where the threads outnumber the chunks, to some. Each
    // block begins with itself, so that not all store to the same one at once.
    const int chunks = 1 << peer_shift_, peers_at_once = max(kTileThreads >> peer_shift_, 1);
    for (int item = threadIdx.x & (chunks - 1); item < chunks; item += kTileThreads) {
      const int line = item / kChunks, k = replica_.rank * kUnits + item % kChunks * kChunk;
      if (line >= replica_.rows * V || k >= replica_.H) continue;
      const uint4 value = *reinterpret_cast<const uint4*>(staged_ + item * kChunk);
      const SharedAddress to = shared_address(tiles_.at(tile, line % V, line / V, k));
      const SharedAddress full = shared_address(&full_[tile]);
      for (int turn = threadIdx.x >> peer_shift_; turn < replica_.blocks; turn += peers_at_once) {
        int peer = replica_.rank + turn;
        if (peer >= replica_.blocks) peer -= replica_.blocks;
        store_async(address_at_rank(to, peer), value, address_at_rank(full, peer));
      }
    }
  }
  __device__ __forceinline__ const T* receive() {
    const unsigned tile = (message_ + 1) % kTiles;
    mbarrier_wait<Reach::stores>(&full_[tile], message_ / kTiles % 2, gave_up_);
    if (threadIdx.x == 0 && !is_given_up(gave_up_)) mbarrier_arrive_expect(&full_[tile], message_bytes_);
    ++message_;
    return tiles_.at(tile, 0, 0, 0);
  }
  // In a check no block leaves before all have stopped sending, and what is on its way then has had the time of many round
  // trips to arrive.
  __device__ __forceinline__ void finish() const {
    if (!gave_up_) return;
    cluster_arrive();
    cluster_wait();
    if (!is_given_up(gave_up_)) return;
    for (int i = 0; i < 64; ++i) __nanosleep(20000);
  }
  __device__ __forceinline__ int vector() const { return tiles_.vector; }

 private:
  static constexpr int kUnits = kTileUnits<kGroups>;
  static constexpr int kChunk = 16 / sizeof(T), kChunks = kUnits / kChunk;

  const Replica& replica_;
  Tiles<T, V> tiles_;
  T* staged_;
  uint64_t *full_, *empty_;
  unsigned* gave_up_;
  int peer_shift_;  // of what a peer is sent, chunk by chunk
  int message_bytes_;
  unsigned message_ = 0;
};

// ---- Across the grid ------------------------------------------------------------------------------------------------

// Through global memory, that is L2: every 32-bit word of a message travels with its number in one 64-bit store, and a
// reader looks at the words that it needs until they bear the number that it waits for. So a word is its own flag: no
// other access has to become visible before or after it, and relaxed accesses, each indivisible, are enough.
//
// [D][2][B][V][words]: message m goes to half m % 2, where nobody may still look for message m - 2. Block X sends message m
// after it has received the whole of m - 1, so a word of it from every block Y. Y stored that word behind a __syncthreads
// at which all its threads had received message m - 2: see receive().
struct alignas(8) Message {
  uint32_t word, number;
};

template <class T, int V, int kGroups>
class StateExchange<Exchange::grid, T, V, kGroups> {
 public:
  static constexpr int kTiles = 1;
  __device__ __forceinline__ StateExchange(const Replica& replica, const ExchangeMemory<T>& memory)
      : replica_(replica), tiles_(memory.tiles, replica, kTiles), gave_up_(memory.gave_up) {
    const int words = (replica.H + kInWord<T> - 1) / kInWord<T>;
    // A thread reads two words at a time, and has the same place in every line.
    line_ = (words + 1) / 2 * 2;
    const int shift = shift_for(line_ / 2);
    column_ = (threadIdx.x & ((1 << shift) - 1)) * 2;
    first_line_ = threadIdx.x >> shift;
    lines_at_once_ = kTileThreads >> shift;
    alone_ = column_ + 1 == words;
    half_ = static_cast<int>(memory.B) * V * line_;
    messages_ = static_cast<Message*>(memory.messages) + int64_t{2} * replica.direction * half_ +
                int64_t{replica.first_row} * V * line_;
  }

  __device__ __forceinline__ T* initial() const { return tiles_.at(0, 0, 0, 0); }
  __device__ __forceinline__ const T* start() {
    __syncthreads();
    return initial();
  }
  __device__ __forceinline__ void put(int v, int b, int unit, const StoredPair<T>& pair) const {
    const StoredPair<T> words = pair.multiplied();
    Message* to = messages_ + message_ % 2 * half_ + (b * V + v) * line_ + unit / kInWord<T>;
    if constexpr (kInWord<T> == 2) {
      store_relaxed(to, Message{words.word[0], message_ + 1});
    } else {
      const Message both[2] = {{words.word[0], message_ + 1}, {words.word[1], message_ + 1}};
      store_relaxed_both(to, both);
    }
  }
  __device__ __forceinline__ void send(bool) const {}
  __device__ __forceinline__ const T* receive() {
    const Message* from = messages_ + message_ % 2 * half_ + column_;
    const int lines = column_ < line_ ? replica_.rows * V : 0, step = lines_at_once_ * line_;
    ++message_;
    for (int first = first_line_; first < lines; first += kAtOnce * lines_at_once_) {
      // Side by side: one after the other each would take its way to L2 and back. And without a branch between them, which
      // would take as long as many loads.
      Message got[kAtOnce][2];
      unsigned missing = 0;  // a bit for each line of which a word has not come
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        got[i][0].number = message_ - 1;
        missing |= static_cast<unsigned>(first + i * lines_at_once_ < lines) << i;
      }
      const Message* at = from + first * line_;
      const unsigned start = clock_high();
      do {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
          if (missing >> i & 1) load_relaxed_both(got[i], at + i * step);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) missing &= ~(arrived(got[i]) << i);
      } while (missing != 0 && !gives_up(start, gave_up_, message_ == 1));
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int line = first + i * lines_at_once_;
        if (line < lines)
          *reinterpret_cast<uint2*>(tiles_.at(0, line % V, line / V, column_ * kInWord<T>)) =
              uint2{got[i][0].word, got[i][1].word};
      }
    }
    __syncthreads();
    return initial();
  }
  __device__ __forceinline__ void finish() const {}  // nobody reaches into another block's memory
  __device__ __forceinline__ int vector() const { return tiles_.vector; }

 private:
  // Eight lines of the longest vector that k_groups warps multiply, or more of a short one. The gradients of an LSTM's gates
  // in float32 leave registers for four, and so do exact products.
  static constexpr bool kFewRegisters = std::is_same_v<T, Exact> || (kGroups == 8 && V * sizeof(T) == 16);
  static constexpr int kAtOnce = kGroups < 4 || kFewRegisters ? 4 : kGroups;

  // 1 or 0. The second word of the last pair may lie behind the last word: nobody sends it, and it is zero.
  __device__ __forceinline__ unsigned arrived(const Message (&pair)[2]) const {
    return (pair[0].number == message_) & (alone_ | (pair[1].number == message_));
  }

  const Replica& replica_;
  Tiles<T, V> tiles_;
  int line_;                                 // words of a vector, and perhaps one more
  int column_, first_line_, lines_at_once_;  // of the thread
  bool alone_;
  int half_;  // of the messages of a direction; the rows are no more than the blocks of a whole GPU have
  Message* messages_;  // of the rows of this tile
  unsigned* gave_up_;
  unsigned message_ = 0;  // its number, in the messages themselves, is one more: they are zero at first
};

}  // namespace frnn
