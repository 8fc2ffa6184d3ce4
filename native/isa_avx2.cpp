// The kernels for x86 processors with AVX2, FMA and F16C (since 2013).
#define KVIK_KERNELS kAvx2Kernels
#define KVIK_ISA_NAME "avx2"
#include "kernels.inl"
