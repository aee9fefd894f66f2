#include "memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

namespace bsns {

namespace {

[[maybe_unused]] constexpr size_t LARGE_PAGE = size_t{2} << 20;
constexpr size_t PAGE = 4096;

[[maybe_unused]] size_t whole_pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

}  // namespace

#if defined(__SANITIZE_ADDRESS__)

// From the heap, so that the sanitizer sees who reads beyond an end.
void *new_memory(size_t bytes) {
    constexpr size_t LINE = 64;
    if (bytes == 0 || bytes > (size_t{1} << 46)) return nullptr;
    void *memory = std::aligned_alloc(LINE, (bytes + LINE - 1) / LINE * LINE);
    if (memory != nullptr) std::memset(memory, 0, bytes);
    return memory;
}

void free_memory(void *memory, size_t) { std::free(memory); }

void *new_cache_memory(size_t bytes) { return new_memory(bytes); }

#else

void *new_memory(size_t bytes) {
    if (bytes == 0 || bytes > (size_t{1} << 46)) return nullptr;
    const size_t wanted = whole_pages(bytes);
    const bool large = wanted >= LARGE_PAGE;
    const size_t mapped = large ? wanted + LARGE_PAGE : wanted;
    void *memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    if (!large) return memory;
    // cut off what stands out on both sides of the aligned part
    char *start = static_cast<char *>(memory);
    const size_t before = (LARGE_PAGE - reinterpret_cast<uintptr_t>(start) % LARGE_PAGE) % LARGE_PAGE;
    if (before != 0) munmap(start, before);
    if (LARGE_PAGE - before != 0) munmap(start + before + wanted, LARGE_PAGE - before);
#ifdef MADV_HUGEPAGE
    madvise(start + before, wanted, MADV_HUGEPAGE);  // a wish; without it the pages are small
#endif
    return start + before;
}

void free_memory(void *memory, size_t bytes) {
    if (memory != nullptr) munmap(memory, whole_pages(bytes));
}

void *new_cache_memory(size_t bytes) {
    if (bytes == 0 || bytes > (size_t{1} << 46)) return nullptr;
    constexpr int FLAGS = MAP_PRIVATE | MAP_ANONYMOUS;
    void *memory = mmap(nullptr, whole_pages(bytes), PROT_READ | PROT_WRITE, FLAGS, -1, 0);
    return memory == MAP_FAILED ? nullptr : memory;
}

#endif

void let_go(const void *memory, int64_t bytes) {
    const auto start = (reinterpret_cast<uintptr_t>(memory) + PAGE - 1) / PAGE * PAGE;
    const auto end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / PAGE * PAGE;
    if (bytes > 0 && end > start) madvise(reinterpret_cast<void *>(start), end - start, MADV_DONTNEED);
}

bool Scratch::reserve(size_t bytes) {
    if (bytes <= bytes_) return true;
    void *memory = new_memory(bytes);
    if (memory == nullptr) return false;
    free_memory(memory_, bytes_);
    memory_ = memory;
    bytes_ = bytes;
    return true;
}

}  // namespace bsns
