// The kernels in plain C++: any processor, and what the others are compared with.
#define KVIK_KERNELS kGenericKernels
#define KVIK_EMULATED_TILES kGenericEmulatedTiles
#define KVIK_ISA_NAME "generic"
#include "kernels.inl"
