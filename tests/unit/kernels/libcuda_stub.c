/* The few functions of CUDA's driver that are used, by the prototypes of the CUDA 13.0 Driver API, on host memory: what a test needs to see
   that arguments arrive in their places. Built with VERSION 1 it has the batch copy of CUDA 12.8, with 0 none. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int CUresult;
typedef unsigned long long CUdeviceptr;
typedef void *CUstream;
typedef struct {
    int type;
    int id;
} CUmemLocation;
typedef struct {
    int srcAccessOrder;
    CUmemLocation srcLocHint;
    CUmemLocation dstLocHint;
    unsigned int flags;
} CUmemcpyAttributes;

#define CUDA_SUCCESS 0
#define CUDA_ERROR_INVALID_VALUE 1
#define CUDA_ERROR_OUT_OF_MEMORY 2
#define EXPECTED_STREAM ((CUstream)(uintptr_t)0x123456789abcull)

int single_copies, batches;
size_t attributes_bytes = sizeof(CUmemcpyAttributes);

CUresult cuMemcpyAsync(CUdeviceptr dst, CUdeviceptr src, size_t bytes, CUstream stream) {
    if (stream != EXPECTED_STREAM) return CUDA_ERROR_INVALID_VALUE;
    memcpy((void *)dst, (const void *)src, bytes);
    single_copies++;
    return CUDA_SUCCESS;
}

static CUresult batch(CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes, size_t count, CUmemcpyAttributes *attrs,
                      size_t *attrs_idxs, size_t num_attrs, CUstream stream) {
    if (stream != EXPECTED_STREAM || num_attrs != 1 || attrs_idxs[0] != 0) return CUDA_ERROR_INVALID_VALUE;
    /* CU_MEMCPY_SRC_ACCESS_ORDER_STREAM: the source is written by earlier work of the stream. */
    if (attrs->srcAccessOrder != 1 || attrs->flags != 0) return CUDA_ERROR_INVALID_VALUE;
    for (size_t i = 0; i < count; i++) memcpy((void *)dsts[i], (const void *)srcs[i], sizes[i]);
    batches++;
    return CUDA_SUCCESS;
}

#if VERSION == 2
CUresult cuMemcpyBatchAsync_v2(CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes, size_t count,
                               CUmemcpyAttributes *attrs, size_t *attrs_idxs, size_t num_attrs, CUstream stream) {
    return batch(dsts, srcs, sizes, count, attrs, attrs_idxs, num_attrs, stream);
}
#endif

#if VERSION >= 1
CUresult cuMemcpyBatchAsync(CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes, size_t count,
                            CUmemcpyAttributes *attrs, size_t *attrs_idxs, size_t num_attrs, size_t *fail_idx,
                            CUstream stream) {
    *fail_idx = SIZE_MAX;
    return batch(dsts, srcs, sizes, count, attrs, attrs_idxs, num_attrs, stream);
}
#endif

CUresult cuMemHostRegister_v2(void *address, size_t bytes, unsigned int flags) {
    if (flags != 3) return CUDA_ERROR_INVALID_VALUE; /* portable and mapped */
    return bytes > (1ull << 40) ? CUDA_ERROR_OUT_OF_MEMORY : (address ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE);
}

CUresult cuMemHostUnregister(void *address) {
    return address ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

/* Memory below 1 MiB is mapped elsewhere. */
CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *device, void *address, unsigned int flags) {
    if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
    *device = (CUdeviceptr)address + ((uintptr_t)address < (1 << 20) ? 4096 : 0);
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "invalid argument";
    return CUDA_SUCCESS;
}
