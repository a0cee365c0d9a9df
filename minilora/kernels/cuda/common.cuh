// What all kernels share. REAL is the type of the arrays (float or double), given when the source is compiled.
//
// Elementwise kernels: a thread takes every (threads of the grid)th element. Kernels over rows: a block takes a row, its threads every
// (threads of the block)th element, and what they have summed is joined in `shared`, which holds one number a thread.

#define GRID_STRIDE(i, n) \
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < (n); i += (long long)gridDim.x * blockDim.x)

// The sum (or the largest) over the block, in every thread. The number of threads is a power of two.
__device__ REAL block_sum(REAL value, REAL* shared) {
    shared[threadIdx.x] = value;
    __syncthreads();
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
        __syncthreads();
    }
    REAL total = shared[0];
    __syncthreads();  // before anybody writes there again
    return total;
}

__device__ REAL block_max(REAL value, REAL* shared) {
    shared[threadIdx.x] = value;
    __syncthreads();
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half && shared[threadIdx.x + half] > shared[threadIdx.x]) shared[threadIdx.x] = shared[threadIdx.x + half];
        __syncthreads();
    }
    REAL largest = shared[0];
    __syncthreads();
    return largest;
}
