#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bsns {

namespace {

// About 30 us of looking before a thread sleeps: jobs of one step follow each other faster, steps hardly ever.
constexpr int SPINS = 1500;
constexpr uint64_t CHUNKS = 0xffffffffu;

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

Pool::Pool(int threads, const Kernels &kernels) : kernels_(kernels) {
    for (int i = 0; i < threads; i++) workers_.push_back(std::make_unique<Member>());
    try {
        for (int i = 1; i < threads; i++) threads_.emplace_back([this, i] { serve(i); });
    } catch (...) {
        ending_ = true;
        signal_++;
        signal_.notify_all();
        for (auto &thread : threads_) thread.join();
        throw;
    }
}

Pool::~Pool() {
    ending_ = true;
    signal_++;
    signal_.notify_all();
    for (auto &thread : threads_) thread.join();
}

bool Pool::reserve(size_t bytes) {
    for (auto &worker : workers_) {
        if (!worker->memory.reserve(bytes)) return false;
        worker->scratch = worker->memory.as<uint8_t>();
    }
    return true;
}

void Pool::run_job(int chunks, Function function, const void *context) {
    if (chunks <= 0) return;
    Worker &own = *workers_[0];
    if (chunks == 1 || workers_.size() == 1) {
        for (int chunk = 0; chunk < chunks; chunk++) function(context, chunk, own);
        return;
    }
    function_ = function;
    context_ = context;
    chunks_ = chunks;
    done_.store(0, std::memory_order_relaxed);
    const uint64_t number = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    ticket_.store(number << 32 | static_cast<uint32_t>(chunks), std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) {
        signal_.fetch_add(1, std::memory_order_seq_cst);
        signal_.notify_all();
    }
    while (take(own)) {}
    const auto all = static_cast<uint32_t>(chunks);
    for (int spin = 0; done_.load(std::memory_order_acquire) != all; spin++) {
        if (spin < SPINS) {
            relax();
            continue;
        }
        waited_for_.store(true, std::memory_order_seq_cst);
        const uint32_t done = done_.load(std::memory_order_seq_cst);
        if (done != all) done_.wait(done, std::memory_order_acquire);
        waited_for_.store(false, std::memory_order_relaxed);
    }
}

// Take and do one chunk of the present job, if one is left.
bool Pool::take(Worker &worker) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    do {
        if ((ticket & CHUNKS) == 0) return false;
    } while (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel, std::memory_order_acquire));
    // From here on the job cannot end: our chunk is not done. Chunks are numbered from the first, so that memory is read
    // in its order.
    const auto left = static_cast<int>(ticket & CHUNKS);
    function_(context_, chunks_ - left, worker);
    done_.fetch_add(1, std::memory_order_seq_cst);
    if (waited_for_.load(std::memory_order_seq_cst)) done_.notify_one();
    return true;
}

void Pool::serve(int index) {
    Worker &worker = *workers_[static_cast<size_t>(index)];
    const auto mode = kernels_.enter();
    while (!ending_.load(std::memory_order_relaxed)) {
        bool found = false;
        for (int spin = 0; spin < SPINS && !found; spin++) {
            found = take(worker);
            if (!found) relax();
        }
        if (found) continue;
        const uint32_t signal = signal_.load(std::memory_order_seq_cst);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        if ((ticket_.load(std::memory_order_seq_cst) & CHUNKS) == 0 && !ending_) signal_.wait(signal);
        sleeping_.fetch_sub(1, std::memory_order_seq_cst);
    }
    kernels_.leave(mode);
}

}  // namespace bsns
