/* MUSA C++ as mcc compiles it: CUDA's words, subgroups of 128 lanes up to architecture 22 and of 32 from 31 on. */
#include "simt.h"

#define HAL_SHUFFLE_XOR(mask, value, offset, width) __shfl_xor_sync(mask, value, offset, width)
#define HAL_ALL_LANES 0xffffffffu
#define HAL_AS_U32(x) __float_as_uint(x)
#define HAL_AS_FLOAT(x) __uint_as_float(x)
/* Half precision is converted with integers, by kernels/elements.h. */

#include "cxx.h"
