// Copies of a call's operands that end where memory ends: a kernel that reads or writes past one stops there.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <memory>
#include <vector>

namespace frnn {

// A copy that ends where a page begins that nobody may touch; copied back at the end.
class Guarded {
 public:
  Guarded(void* original, size_t bytes) : original_(original), bytes_(bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t room = (bytes + page - 1) / page * page;
    size_ = room + page;
    pages_ =
        static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (pages_ == MAP_FAILED || mprotect(pages_ + room, page, PROT_NONE) != 0) abort();
    data_ = pages_ + room - bytes;
    memcpy(data_, original, bytes);
  }
  ~Guarded() {
    memcpy(original_, data_, bytes_);
    munmap(pages_, size_);
  }
  Guarded(const Guarded&) = delete;
  void* get() const { return data_; }

 private:
  void* original_;
  size_t bytes_, size_;
  char *pages_, *data_;
};

struct Operands {
  std::vector<std::unique_ptr<Guarded>> all;

  template <class T>
  T* guarded(T* original, int64_t count) {
    if (!original) return nullptr;
    all.push_back(std::make_unique<Guarded>(original, static_cast<size_t>(count) * sizeof(T)));
    return static_cast<T*>(all.back()->get());
  }
};

}  // namespace frnn
