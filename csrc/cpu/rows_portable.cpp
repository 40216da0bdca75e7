#include "vec_portable.h"
#include "rows_kernel.h"
#include "decoder_kernel.h"

namespace omni {
const RowKernels kPortable = {"portable", &forward, &backward, &fused, &exp2_array, kDecoder,
    kProduct<std::uint16_t>, kProduct<float>};
}
