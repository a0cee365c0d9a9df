// What all kernels share. REAL is the type that is computed in (float or double), ACT that of activations: REAL itself unless given when
// the source is compiled, or one of the two half-precision types below. They turn into a float where they are read, and round where they are written.
//
// Elementwise kernels: a thread takes every (threads of the grid)th element. Kernels over rows: a block takes a row, its threads every
// (threads of the block)th element, and what they have summed is joined in `shared`, which holds one number a thread.

#ifndef ACT
#define ACT REAL
#endif

// The upper half of a float. Rounded to the nearest, of two equally near to the even one; what is no number stays none.
struct bfloat16 {
    unsigned short bits;

    __device__ operator float() const {
        union { unsigned int bits; float value; } whole = {(unsigned int)bits << 16};
        return whole.value;
    }
    __device__ void operator=(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
        union { float value; unsigned int bits; } whole = {value};
        bits = value == value ? (unsigned short)((whole.bits + 0x7fffu + ((whole.bits >> 16) & 1)) >> 16) : (unsigned short)0x7fc0;
#endif
    }
};

// IEEE half precision. The device converts by instructions whose names the headers would have.
struct float16 {
    unsigned short bits;

    __device__ operator float() const {
#ifdef __CUDACC__
        float value;
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
        return value;
#else
        return __builtin_bit_cast(_Float16, bits);
#endif
    }
    __device__ void operator=(float value) {
#ifdef __CUDACC__
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
        bits = __builtin_bit_cast(unsigned short, (_Float16)value);
#endif
    }
};

// N numbers that are moved at once, where they lie at a multiple of their size, or of 16 bytes.
template <class T, int N> struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
    T at[N];
};

// 16 bytes of activations, as many as a thread moves at once: pack i of an array begins at number i PACK, and the array at a multiple of 16 bytes.
#define PACK (16 / (int)sizeof(ACT))
union Pack {
    uint4 whole;
    ACT at[PACK];
};
__device__ bool aligned(const void* x) { return (unsigned long long)x % 16 == 0; }
__device__ Pack load_pack(const ACT* x, long long i) { return {((const uint4*)x)[i]}; }
__device__ void store_pack(ACT* x, long long i, const Pack& pack) { ((uint4*)x)[i] = pack.whole; }

#define GRID_STRIDE(i, n) \
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < (n); i += (long long)gridDim.x * blockDim.x)

// The sum (or the largest) over the block, in every thread: first over each warp, in registers. The number of threads is a power of two.
__device__ REAL block_sum(REAL value, REAL* shared) {
    if (blockDim.x >= 32) {
        for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
        if (blockDim.x == 32) return value;
        if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
        __syncthreads();
        REAL total = 0;
        for (int warp = 0; warp < blockDim.x / 32; warp++) total += shared[warp];
        __syncthreads();  // before anybody writes there again
        return total;
    }
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
    if (blockDim.x >= 32) {
        for (int mask = 16; mask > 0; mask /= 2) {
            const REAL other = __shfl_xor_sync(0xffffffffu, value, mask);
            value = other > value ? other : value;
        }
        if (blockDim.x == 32) return value;
        if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
        __syncthreads();
        for (int warp = 0; warp < blockDim.x / 32; warp++) value = shared[warp] > value ? shared[warp] : value;
        __syncthreads();
        return value;
    }
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
