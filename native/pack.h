// Packing weights, and unpacking them again for tests.
#pragma once

#include "bsns_native.h"

namespace bsns {

// Arguments as of bsns_pack, checked before. False if a number is not finite. Throws std::bad_alloc.
bool pack_rows(
    const bsns_matrix &into, const bsns_source &source, int32_t first, int32_t step, int32_t segment, int32_t padded_segment
);
void unpack_rows(const bsns_matrix &from, float *into);

}  // namespace bsns
