// The kernels for x86 processors with AVX-512 and its integer dot products (Ice Lake, Zen 4 and later).
#define KVIK_KERNELS kAvx512Kernels
#define KVIK_ISA_NAME "avx512"
#include "kernels.inl"
