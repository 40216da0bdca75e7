#include "vec_avx2.h"
#include "rows_kernel.h"
#include "decoder_kernel.h"

namespace omni {
const RowKernels kAvx2 = {"avx2", &forward, &backward, &fused, &exp2_array, kDecoder,
    kProduct<std::uint16_t>, kProduct<float>};
}
