// Which sets of kernels are compiled in, and which of them this processor can run.
#include <cstring>

#include "kernels.h"
#include "sets.h"  // made by CMake: BSNS_SETS(X), best first

namespace bsns {

#define BSNS_DECLARE(set) extern const Kernels set;
BSNS_SETS(BSNS_DECLARE)

namespace {

#define BSNS_ENTRY(set) &set,
const Kernels *const ALL[] = {BSNS_SETS(BSNS_ENTRY)};

}  // namespace

const Kernels *const *all_kernels(int *count) {
    *count = static_cast<int>(sizeof ALL / sizeof ALL[0]);
    return ALL;
}

const Kernels *best_kernels() {
    for (const Kernels *kernels : ALL)
        if (kernels->supported()) return kernels;
    return nullptr;
}

const Kernels *kernels_named(const char *name) {
    for (const Kernels *kernels : ALL)
        if (std::strcmp(kernels->name, name) == 0 && kernels->supported()) return kernels;
    return nullptr;
}

}  // namespace bsns
