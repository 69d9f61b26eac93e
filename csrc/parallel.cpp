#include "parallel.h"

#include <algorithm>
#include <thread>

#include "halfbyte.h"

namespace halfbyte {
namespace {

// libgomp's entry for a parallel region; LLVM's and Intel's runtimes have it too.
using GompParallel = void (*)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

std::atomic<GompParallel> gomp_parallel{nullptr};

struct Work {
    std::atomic<int64_t> next;
    int64_t count, grain;
    Range range;
    void *context;
};

void take_pieces(void *data) {
    Work &work = *static_cast<Work *>(data);
    for (;;) {
        const int64_t first = work.next.fetch_add(work.grain, std::memory_order_relaxed);
        if (first >= work.count) return;
        work.range(work.context, first, std::min(first + work.grain, work.count));
    }
}

}  // namespace

void run_parallel(int threads, int64_t count, int64_t grain, Range range, void *context) {
    const GompParallel region = gomp_parallel.load(std::memory_order_relaxed);
    const int64_t wanted = std::min<int64_t>(threads, (count + grain - 1) / grain);
    Work work{{0}, count, grain, range, context};
    if (region && wanted > 1) {
        region(take_pieces, &work, unsigned(wanted), 0);
    } else {
        take_pieces(&work);
    }
}

// A piece takes microseconds, so waiting is spinning; but where the machine has other work than ours, the thread that is
// waited for may not be running, and needs this one's core.
void Crew::wait(const std::atomic<int64_t> &done, int64_t count) {
    constexpr int kSpins = 4096;
    for (int spins = 0; done.load(std::memory_order_acquire) < count; ++spins) {
        if (spins < kSpins) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#elif defined(__aarch64__)
            __asm__ volatile("yield");
#endif
        } else {
            std::this_thread::yield();
        }
    }
}

}  // namespace halfbyte

void hb_set_openmp(void *parallel) {
    halfbyte::gomp_parallel.store(reinterpret_cast<halfbyte::GompParallel>(parallel));
}
