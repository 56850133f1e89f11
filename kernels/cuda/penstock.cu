/* All kernels, as one module: what kernels/cuda/compile.py gives to NVRTC. */
#include "prepare.cu"
#include "rows.cu"
