/* For x86-64 with AVX2 and FMA. */
#if defined(__x86_64__)
#define LANES 8
#define TARGET __attribute__((target("avx2,fma")))
#define TABLE kernels_avx2
#define TABLE_NAME "avx2"
#include "kernels_impl.h"
#else
typedef int not_for_this_machine;
#endif
