/* For x86-64 with AVX-512 (F, BW, DQ, VL). */
#if defined(__x86_64__)
#define LANES 16
#define TARGET __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")))
#define TABLE kernels_avx512
#define TABLE_NAME "avx512"
#include "kernels_impl.h"
#else
typedef int not_for_this_machine;
#endif
