// Memory of exactly the size that a call is promised, between two pages that nobody may touch.
//
// A buffer lies flush against the page after it or flush against the page before it; what is left of its own pages
// holds a pattern. One byte read past the flush end is a fault, one byte written past the other is seen by `intact`.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

class Guarded {
  public:
    // `at_end`: flush against the page after. The start is then aligned only as far as `bytes` is.
    Guarded(int64_t bytes, bool at_end) : bytes_(size_t(bytes)) {
        const size_t page = size_t(sysconf(_SC_PAGESIZE));
        inner_ = (bytes_ + page - 1) / page * page;
        total_ = inner_ + 2 * page;
        void *const mapped = mmap(nullptr, total_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        base_ = static_cast<uint8_t *>(mapped);
        begin_ = base_ + page;
        if (mapped == MAP_FAILED || (inner_ && mprotect(begin_, inner_, PROT_READ | PROT_WRITE))) {
            std::perror("guarded memory");
            std::exit(2);
        }
        data_ = at_end ? begin_ + inner_ - bytes_ : begin_;
        std::memset(begin_, kPattern, inner_);
    }
    ~Guarded() { munmap(base_, total_); }
    Guarded(const Guarded &) = delete;
    Guarded &operator=(const Guarded &) = delete;

    template <class T = void>
    T *data() const {
        return reinterpret_cast<T *>(data_);
    }
    size_t size() const { return bytes_; }

    // Whether nothing was written beside the buffer.
    bool intact() const {
        for (const uint8_t *at = begin_; at < begin_ + inner_; ++at) {
            if (at == data_) at += bytes_;
            if (at < begin_ + inner_ && *at != kPattern) return false;
        }
        return true;
    }

  private:
    static constexpr uint8_t kPattern = 0xc3;
    size_t bytes_, inner_, total_;
    uint8_t *base_, *begin_, *data_;
};
