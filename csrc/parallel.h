// Threads, borrowed: the pool is the one torch already has.
//
// A second pool beside torch's would fight it for the cores. So Python hands over the OpenMP runtime that is loaded in
// the process, by address, and work runs on its threads; the library links no OpenMP itself.
#pragma once

#include <atomic>
#include <cstdint>

namespace halfbyte {

using Range = void (*)(void *context, int64_t first, int64_t last);

void run_parallel(int threads, int64_t count, int64_t grain, Range range, void *context);

// Calls body(first, last) over [0, count) in pieces of `grain`, which are taken by whichever thread is free: on a
// machine that does something else besides, equal shares would wait for the slowest. Which thread computes a piece
// changes nothing in it.
template <class Body>
void parallel_for(int threads, int64_t count, int64_t grain, Body body) {
    run_parallel(
        threads, count, grain,
        [](void *context, int64_t first, int64_t last) { (*static_cast<Body *>(context))(first, last); }, &body);
}

// A crew of threads that goes through phases of work together, inside one parallel region: what follows needs all of
// what came before. Leaving and entering a region between phases would cost more than a small product.
//
// A phase is over when its pieces are done, not when its threads have met. So it does not matter how many threads the
// runtime really gave, or whether one of them comes late: the others take its pieces.
class Crew {
  public:
    struct Phase {
        alignas(64) std::atomic<int64_t> next{0};
        alignas(64) std::atomic<int64_t> done{0};
    };
    explicit Crew(Phase *phases) : phase_(phases) {}

    // Calls body(piece) for the pieces [0, count) that this thread gets, and returns when all of them are done.
    template <class Body>
    void phase(int64_t count, Body body) {
        Phase &phase = *phase_++;
        for (;;) {
            const int64_t piece = phase.next.fetch_add(1, std::memory_order_relaxed);
            if (piece >= count) break;
            body(piece);
            phase.done.fetch_add(1, std::memory_order_release);
        }
        wait(phase.done, count);
    }

  private:
    static void wait(const std::atomic<int64_t> &done, int64_t count);
    Phase *phase_;
};

// Runs body(Crew) on up to `threads` threads, which share `phases`: one for each call of Crew::phase.
template <class Body>
void run_crew(int threads, Crew::Phase *phases, Body body) {
    parallel_for(threads, threads, 1, [&](int64_t, int64_t) { body(Crew(phases)); });
}

}  // namespace halfbyte
