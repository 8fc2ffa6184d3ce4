// The kernels for x86 processors with AVX-512 and its integer dot products (Ice Lake, Zen 4 and later); for AMX too.
#define KVIK_KERNELS kAvx512Kernels
#define KVIK_EMULATED_TILES kAvx512EmulatedTiles
#define KVIK_ISA_NAME "avx512"
#include "kernels.inl"
