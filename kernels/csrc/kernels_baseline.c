/* For every machine: what the compiler assumes of the architecture (SSE2, NEON). */
#define LANES 4
#define TARGET
#define TABLE kernels_baseline
#define TABLE_NAME "baseline"
#include "kernels_impl.h"
