// Files that shrink while they are mapped.
//
// Touching a page of a mapping whose file no longer reaches it raises SIGBUS, which ends the process: a model that
// somebody overwrites in place would take a server down with it. Here the fault becomes a note. The handler puts empty
// pages where the file is gone, so that whoever reads goes on (and reads zeros), writes down where it happened, and
// calls `notify`, by which Python raises an error as soon as it runs its next instruction.
//
// Everything the handler does is safe in a signal handler: system calls, and atomics that take no lock.
#include <atomic>
#include <cerrno>

#include "halfbyte.h"

#ifndef _WIN32
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif

namespace {

struct Mapping {
    std::atomic<uintptr_t> begin{0}, end{0};  // end 0: a free place
    std::atomic<int64_t> lost{-1};            // offset of the lowest page that was missed, -1: none
};

constexpr int kMost = 1024;
Mapping mappings[kMost];
std::atomic<void (*)(int)> notify{nullptr};
struct sigaction previous;
uintptr_t page_size;

// The mapping that holds an address, or null.
Mapping *find(uintptr_t address) {
    for (Mapping &mapping : mappings) {
        const uintptr_t end = mapping.end.load();
        if (end && mapping.begin.load() <= address && address < end) return &mapping;
    }
    return nullptr;
}

// What was there before us: another handler, or the end of the process once the instruction is run again.
void pass_on(int number, siginfo_t *info, void *context) {
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(number, info, context);
    } else if (previous.sa_handler == SIG_DFL || previous.sa_handler == SIG_IGN) {
        signal(number, SIG_DFL);
    } else {
        previous.sa_handler(number);
    }
}

void on_fault(int number, siginfo_t *info, void *context) {
    const int error = errno;
    const uintptr_t address = reinterpret_cast<uintptr_t>(info->si_addr);
    Mapping *const mapping = info->si_code == BUS_ADRERR ? find(address) : nullptr;
    if (!mapping) return pass_on(number, info, context);
    // Where a file ends, all that follows is gone as well: one fault for all of it.
    const uintptr_t page = address & ~(page_size - 1);
    void *const empty = mmap(reinterpret_cast<void *>(page), mapping->end.load() - page, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    if (empty == MAP_FAILED) return pass_on(number, info, context);
    const int64_t offset = int64_t(page - mapping->begin.load());
    int64_t lost = mapping->lost.load();
    while ((lost < 0 || offset < lost) && !mapping->lost.compare_exchange_weak(lost, offset)) {
    }
    if (void (*const tell)(int) = notify.load()) tell(number);
    errno = error;
}

}  // namespace

int hb_watch_mappings(void (*tell)(int)) {
    struct sigaction now = {}, ours = {};
    if (sigaction(SIGBUS, nullptr, &now)) return -1;
    // Called again after Python has put its own handler over ours: then what was there before stays what it was.
    if (!notify.load()) previous = now;
    page_size = uintptr_t(sysconf(_SC_PAGESIZE));
    notify.store(tell);
    ours.sa_sigaction = on_fault;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&ours.sa_mask);
    return sigaction(SIGBUS, &ours, nullptr);
}

int hb_watch_mapping(void *begin, int64_t nbytes) {
    for (int place = 0; place < kMost; ++place) {
        uintptr_t free = 0;
        // A place that is taken but not yet filled ends at 1 and holds no address.
        if (!mappings[place].end.compare_exchange_strong(free, 1)) continue;
        mappings[place].lost.store(-1);
        mappings[place].begin.store(reinterpret_cast<uintptr_t>(begin));
        mappings[place].end.store(reinterpret_cast<uintptr_t>(begin) + uintptr_t(nbytes));
        return place;
    }
    return -1;
}

int64_t hb_lost_of_mapping(int place) { return mappings[place].lost.load(); }

void hb_forget_mapping(int place) {
    mappings[place].end.store(1);  // nothing lies below 1, so it holds no address from here on
    mappings[place].end.store(0);
}

#else

int hb_watch_mappings(void (*)(int)) { return -1; }
int hb_watch_mapping(void *, int64_t) { return -1; }
int64_t hb_lost_of_mapping(int) { return -1; }
void hb_forget_mapping(int) {}

#endif
