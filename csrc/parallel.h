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

}  // namespace halfbyte
