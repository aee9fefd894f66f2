// Threads that compute together.
//
// A job is cut into chunks, which whoever is free takes from one counter: a thread whose core is taken away delays the
// chunk it holds and nothing else, and one that sleeps too soundly misses the job. Threads that run dry spin for some tens
// of microseconds, for the next job of the same step comes within a few, and then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "kernels.h"
#include "memory.h"

namespace bsns {

class Pool {
  public:
    // Starts threads - 1 of them. Throws std::system_error, std::bad_alloc.
    Pool(int threads, const Kernels &kernels);
    ~Pool();
    Pool(const Pool &) = delete;
    Pool &operator=(const Pool &) = delete;

    // Run work(chunk, worker) for every chunk below `chunks`, in any order, in any thread; returns when all are done.
    template <typename Work> void run(int chunks, const Work &work) {
        run_job(
            chunks, [](const void *context, int chunk, Worker &worker) { (*static_cast<const Work *>(context))(chunk, worker); },
            &work
        );
    }

    // Memory for each thread to work in. False if there is none.
    bool reserve(size_t bytes);

    int threads() const { return static_cast<int>(workers_.size()); }
    const Kernels &kernels() const { return kernels_; }

  private:
    using Function = void (*)(const void *, int, Worker &);

    void run_job(int chunks, Function function, const void *context);
    bool take(Worker &worker);
    void serve(int index);

    struct alignas(64) Member : Worker {
        Scratch memory;
    };

    const Kernels &kernels_;
    std::vector<std::unique_ptr<Member>> workers_;
    std::vector<std::thread> threads_;
    // What the present job is. Read only by who holds one of its chunks, so that it cannot end meanwhile.
    Function function_ = nullptr;
    const void *context_ = nullptr;
    int chunks_ = 0;
    alignas(64) std::atomic<uint64_t> ticket_{0};  // the job's number, and in the low half how many chunks are to be taken
    alignas(64) std::atomic<uint32_t> done_{0};
    std::atomic<bool> waited_for_{false};
    alignas(64) std::atomic<uint32_t> signal_{0};  // what sleeping threads wait for
    std::atomic<int> sleeping_{0};
    std::atomic<bool> ending_{false};
};

}  // namespace bsns
