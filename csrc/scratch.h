// Memory for one call. See scalar.h for the unnamed namespace.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace halfbyte {
namespace {

// Memory that begins on a cache line, or null.
class Scratch {
  public:
    explicit Scratch(int64_t bytes)
        : block_(std::malloc(size_t(bytes) + 64)),
          data_(block_ ? reinterpret_cast<void *>((reinterpret_cast<uintptr_t>(block_) + 63) & ~uintptr_t(63))
                       : nullptr) {}
    ~Scratch() { std::free(block_); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    void *data() const { return data_; }

  private:
    void *block_, *data_;
};

}  // namespace
}  // namespace halfbyte
