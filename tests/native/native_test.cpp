// The C interface, called at random: every instruction set against plain C++, every buffer between guard pages.
//
//   native_test [--cases N | --fuzz SECONDS] [--seed N]
//   native_test --case SEED          one case again, as a failure names it
//
// For each case and each instruction set that this machine has: the results equal the generic ones to the bit
// (products: lie within a derived bound of the exact one; a decoder's step: within a measured one of plain C++), no byte
// beside a buffer is read or written, and neither several threads in a call nor several callers at once change a bit.
// The last line says how much was run; its digest is over the results that have to be equal everywhere, so it is the
// same on every processor.
#include <chrono>
#include <cinttypes>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "calls.h"
#include "guarded.h"
#include "halfbyte.h"

namespace {

using Results = std::vector<std::unique_ptr<Guarded>>;

constexpr int kMostIsas = 64;
constexpr int kCallers = 4;

char running[400] = "nothing";  // the case under way, for the message when it crashes

// Stands for the OpenMP runtime's GOMP_parallel.
void on_threads(void (*body)(void *), void *data, unsigned threads, unsigned) {
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; ++i) others.emplace_back(body, data);
    body(data);
    for (std::thread &other : others) other.join();
}

std::vector<int> isas() {
    std::vector<int> found;
    for (int isa = 0; isa < kMostIsas; ++isa) {
        if (hb_has_isa(isa)) found.push_back(isa);
    }
    return found;
}

// Outputs begin as 0xff, a NaN as a float of any width: what is not written cannot pass for a result.
Results outputs_of(const Call &call, Random &random) {
    Results made;
    for (const Output &output : call.outputs) {
        made.push_back(std::make_unique<Guarded>(output.bytes, !random.one_in(4)));
        std::memset(made.back()->data(), 0xff, made.back()->size());
    }
    return made;
}

int run(const Call &call, int threads, const Results &results) {
    std::vector<void *> out;
    for (const auto &result : results) out.push_back(result->data());
    return call.run(threads, out.data());
}

int64_t element_size(Element element) {
    return element == Element::kByte ? 1 : element == Element::kFloat32 ? 4 : 2;
}

// Element `at`, with one NaN for all.
uint32_t bits_at(const Guarded &result, Element element, int64_t at) {
    uint32_t bits = 0;
    std::memcpy(&bits, result.data<uint8_t>() + at * element_size(element), size_t(element_size(element)));
    const bool nan = element != Element::kByte && std::isnan(to_double(result.data(), element, at));
    return nan ? 0x7fffffff : bits;
}

// What is wrong with the results, or nothing. `expected` is null for the first run of a product.
std::string difference(const Call &call, const Results &results, const Results *expected) {
    size_t first = 0;  // of the output's elements among those of all outputs
    for (size_t i = 0; i < results.size(); ++i) {
        const Element element = call.outputs[i].element;
        const int64_t count = call.outputs[i].bytes / element_size(element);
        const std::string place = "output " + std::to_string(i) + " of " + std::to_string(count) + ", at ";
        if (!results[i]->intact()) return place + "a place beside it: written";
        for (int64_t at = 0; at < count; ++at) {
            if (expected && bits_at(*results[i], element, at) != bits_at(*(*expected)[i], element, at)) {
                return place + std::to_string(at) + ": other bits";
            }
            if (!call.exact.empty()) {
                const double found = to_double(results[i]->data(), element, at), exact = call.exact[first + size_t(at)],
                             allowed = call.allowed[first + size_t(at)];
                if (!(std::fabs(found - exact) <= allowed)) {
                    return place + std::to_string(at) + ": " + std::to_string(found) + " instead of " +
                           std::to_string(exact) + ", allowed error " + std::to_string(allowed);
                }
            }
        }
        first += size_t(count);
    }
    return "";
}

struct Checked {
    uint64_t cases = 0, calls = 0, digest = 0xcbf29ce484222325;  // FNV-1a

    void add(const Call &call, const Results &results) {
        for (size_t i = 0; i < results.size(); ++i) {
            const Element element = call.outputs[i].element;
            for (int64_t at = 0; at < call.outputs[i].bytes / element_size(element); ++at) {
                digest = (digest ^ bits_at(*results[i], element, at)) * 0x100000001b3;
            }
        }
    }
};

[[noreturn]] void fail(const std::string &what) {
    std::printf("FAILED: %s\n%s\n", running, what.c_str());
    std::exit(1);
}

// Several callers at once, two threads each.
void check_callers(const Call &call, int isa, const Results &expected, Random &random) {
    std::vector<Results> results;
    std::vector<std::thread> callers;
    int failed[kCallers] = {};
    for (int i = 0; i < kCallers; ++i) results.push_back(outputs_of(call, random));
    for (int i = 0; i < kCallers; ++i) {
        callers.emplace_back([&, i] { failed[i] = run(call, 2, results[size_t(i)]); });
    }
    for (std::thread &caller : callers) caller.join();
    for (int i = 0; i < kCallers; ++i) {
        const std::string wrong = failed[i] ? "no memory" : difference(call, results[size_t(i)], &expected);
        if (!wrong.empty()) fail("instruction set " + std::to_string(isa) + ", several callers: " + wrong);
    }
}

void check(uint64_t seed, const std::vector<int> &available, Checked &checked) {
    std::snprintf(running, sizeof running, "--case %" PRIu64 ", while it was made", seed);
    const Call call = random_call(seed);
    Random random(~seed);
    Results expected;
    for (const int isa : available) {
        std::snprintf(running, sizeof running, "--case %" PRIu64 ", instruction set %d: %s", seed, isa,
                      call.text.c_str());
        hb_set_isa(isa);
        Results alone = outputs_of(call, random), shared = outputs_of(call, random);
        if (run(call, 1, alone)) fail("no memory");
        std::string wrong = difference(call, alone, isa == HB_GENERIC || !call.exact.empty() ? nullptr : &expected);
        if (!wrong.empty()) fail(wrong);
        const int threads = int(random.between(2, 5));
        if (run(call, threads, shared)) fail("no memory");
        wrong = difference(call, shared, &alone);
        if (!wrong.empty()) fail(std::to_string(threads) + " threads: " + wrong);
        checked.calls += 2;
        if (random.one_in(16)) check_callers(call, isa, alone, random), checked.calls += kCallers;
        if (isa == HB_GENERIC) {
            if (call.exact.empty()) checked.add(call, alone);
            expected = std::move(alone);
        }
    }
    ++checked.cases;
}

// Names the case, then lets the fault happen again for whoever handled it before: a sanitizer, or the system.
struct sigaction before[NSIG];

void on_fault(int signal) {
    const char start[] = "CRASHED: ";
    (void)!write(2, start, sizeof start - 1);
    (void)!write(2, running, std::strlen(running));
    (void)!write(2, "\n", 1);
    sigaction(signal, &before[signal], nullptr);
}

}  // namespace

int main(int argc, char **argv) {
    uint64_t seed = 1, cases = 1000;
    double seconds = 0;
    for (int i = 1; i < argc; ++i) {
        const std::string option = argv[i];
        if (i + 1 == argc || (option != "--cases" && option != "--fuzz" && option != "--seed" && option != "--case")) {
            std::fprintf(stderr, "usage: %s [--cases N | --fuzz SECONDS] [--seed N] | --case SEED\n", argv[0]);
            return 2;
        }
        const char *const value = argv[++i];
        if (option == "--fuzz") {
            seconds = std::strtod(value, nullptr);
        } else if (option == "--cases") {
            cases = std::strtoull(value, nullptr, 10);
        } else {
            seed = std::strtoull(value, nullptr, 10);
            if (option == "--case") cases = 1;
        }
    }
    struct sigaction action = {};
    action.sa_handler = on_fault;
    for (const int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) sigaction(signal, &action, &before[signal]);
    hb_set_openmp(reinterpret_cast<void *>(on_threads));
    const std::vector<int> available = isas();
    Checked checked;
    const auto begin = std::chrono::steady_clock::now();
    const auto elapsed = [=] {
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    };
    while (seconds > 0 ? elapsed() < seconds : checked.cases < cases) check(seed + checked.cases, available, checked);
    std::printf("instruction sets");
    for (const int isa : available) std::printf(" %d", isa);
    std::printf("; best %d\n%" PRIu64 " cases, %" PRIu64 " calls in %.1f s from seed %" PRIu64, hb_best_isa(),
                checked.cases, checked.calls, elapsed(), seed);
    std::printf(", digest %016" PRIx64 "\n", checked.digest);
    return 0;
}
