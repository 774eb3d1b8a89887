// What the emulation says of a failure: names of threads, places in the source, and who waits for what.
#include <dlfcn.h>
#include <stdio.h>

#include <map>

#include "state.h"

namespace frnn_emulation {
namespace {

std::string triple(uint3 v) {
  return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

uint3 unravel(uint32_t linear, const dim3& size) {
  return uint3{linear % size.x, linear / size.x % size.y, linear / size.x / size.y};
}

// The file and line of an instruction, or its function: what addr2line of binutils says.
std::string look_up(const void* pc, bool function) {
  Dl_info info;
  if (!dladdr(pc, &info) || !info.dli_fname) return "?";
  char command[1200];
  snprintf(command, sizeof command, "addr2line -C%s -e '%s' 0x%llx 2>/dev/null", function ? "f" : "ip",
           info.dli_fname,
           (unsigned long long)(static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase)));
  FILE* pipe = popen(command, "r");
  if (!pipe) return "?";
  std::string text;
  char line[600];
  while (fgets(line, sizeof line, pipe)) {
    text += line;
    if (function) break;  // the place follows
  }
  pclose(pipe);
  while (!text.empty() && text.back() == '\n') text.pop_back();
  return text.empty() ? "?" : text;
}

std::string ranges(const std::vector<uint32_t>& threads) {
  std::string text;
  for (size_t i = 0; i < threads.size();) {
    size_t end = i + 1;
    while (end < threads.size() && threads[end] == threads[end - 1] + 1) ++end;
    if (!text.empty()) text += ", ";
    text += std::to_string(threads[i]);
    if (end - i > 1) text += "-" + std::to_string(threads[end - 1]);
    i = end;
  }
  return text;
}

}  // namespace

std::string last_error;
cudaError_t last_error_code = cudaSuccess;

std::string name(uint32_t thread) {
  if (thread / kThreadsOfBlock >= kMostBlocks) return "an asynchronous store or copy";
  return "block " + triple(unravel(thread / kThreadsOfBlock, launch_state.grid)) + " thread " +
         triple(unravel(thread % kThreadsOfBlock, launch_state.block));
}

std::string name(const Fiber& fiber) { return name(fiber.id); }

void fail(cudaError_t error, std::string text, const void* pc) {
  Failure& failure = launch_state.failure;
  failure.error = error;
  failure.text = std::move(text);
  if (pc) {
    failure.text = name(*launch_state.current) + ": " + failure.text;
    failure.places.assign({{"there", pc}});
  }
  _longjmp(launch_state.scheduler, 1);
}

void trap(const char* why) { fail(cudaErrorLaunchFailure, why, __builtin_return_address(0)); }

std::string render(const Failure& failure) {
  const char* kernel = static_cast<const char*>(launch_state.kernel);
  std::string text = "kernel " + look_up(kernel, true) + ": " + failure.text;
  for (const auto& [verb, pc] : failure.places) {
    text += std::string("\n  ") + verb + " at " + look_up(static_cast<const char*>(pc) - 1, false);
  }
  return text;
}

std::string describe_waiting() {
  std::string text;
  for (const Block* block : launch_state.blocks) {
    std::map<std::string, std::vector<uint32_t>> by_reason;
    for (const Fiber* fiber : block->fibers) {
      std::string reason;
      if (fiber->finished) {
        reason = "have finished";
      } else if (fiber->waits_for) {
        char what[160];
        snprintf(what, sizeof what, fiber->waits_for, (unsigned long long)fiber->waits_detail);
        reason = std::string("wait at ") + what;
      } else {
        reason = "look again and again at memory that nobody writes";
      }
      by_reason[reason].push_back(fiber->thread);
    }
    for (const auto& [reason, threads] : by_reason) {
      text += "\n  block " + triple(block->index) + ": threads " + ranges(threads) + " " + reason;
    }
  }
  return text;
}

}  // namespace frnn_emulation
