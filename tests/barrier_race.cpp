// The barrier of csrc/cpu/team.h on std::thread, for ThreadSanitizer, which cannot see how OpenMP's threads start and
// end. Every member writes a number of its own each round and, past the barrier, reads those of all: plain memory, so
// that any way past the barrier without an order of memory is a race. More members than cores, and rounds that wait long,
// send some of them to sleep. test_barrier.py compiles and runs this.
#include <stdio.h>
#include <stdlib.h>

#include <chrono>
#include <thread>
#include <vector>

#include "../csrc/cpu/team.h"

int main(int, char** argv) {
  const int members = atoi(argv[1]), rounds = atoi(argv[2]);
  std::vector<int> number(members);
  std::vector<long> sum(members);
  frnn::Barrier barrier;
  const auto member = [&](int rank) {
    for (int round = 0; round < rounds; ++round) {
      if (round % 100 == rank) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      number[rank] = round * members + rank;
      barrier.wait(members);
      for (const int n : number) sum[rank] += n;
      barrier.wait(members);
    }
  };
  std::vector<std::thread> threads;
  for (int rank = 0; rank < members; ++rank) threads.emplace_back(member, rank);
  for (std::thread& thread : threads) thread.join();
  const long numbers = static_cast<long>(members) * rounds;
  for (const long found : sum)
    if (found != numbers * (numbers - 1) / 2) return printf("a member passed the barrier too early\n"), 1;
  return 0;
}
