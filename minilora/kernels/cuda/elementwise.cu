// Sums and products of two arrays of activations, rows filled with a bias, and matrices cast to the activations' dtype. See pointwise.py.
// A thread moves a pack of 16 bytes (common.cuh): what these do is bound by memory. Arithmetic is in REAL; each result is rounded once.

template <class F> __device__ void of_two(const ACT* x, const ACT* y, ACT* z, long long n, F f) {
    const long long packs = aligned(x) && aligned(y) && aligned(z) ? n / PACK : 0;
    GRID_STRIDE(i, packs) {
        const Pack a = load_pack(x, i), b = load_pack(y, i);
        Pack c;
#pragma unroll
        for (int j = 0; j < PACK; j++) c.at[j] = f(a.at[j], b.at[j]);
        store_pack(z, i, c);
    }
    GRID_STRIDE(i, n - packs * PACK) z[packs * PACK + i] = f(x[packs * PACK + i], y[packs * PACK + i]);
}

// z = x + y
extern "C" __global__ void add(const ACT* x, const ACT* y, ACT* z, long long n) {
    of_two(x, y, z, n, [](REAL a, REAL b) { return a + b; });
}

// z = x y
extern "C" __global__ void multiply(const ACT* x, const ACT* y, ACT* z, long long n) {
    of_two(x, y, z, n, [](REAL a, REAL b) { return a * b; });
}

// y (rows, n): every row is the bias b (n). A block takes PER_BLOCK rows, so that b is read and cast once for all of them.
#define PER_BLOCK 4
extern "C" __global__ void fill_rows(const REAL* b, ACT* y, long long rows, int n) {
    const long long first = (long long)blockIdx.x * PER_BLOCK;
    const int count = rows - first < PER_BLOCK ? rows - first : PER_BLOCK, packs = aligned(y) && n % PACK == 0 ? n / PACK : 0;
    for (int i = threadIdx.x; i < packs; i += blockDim.x) {
        Pack c;
#pragma unroll
        for (int j = 0; j < PACK; j++) c.at[j] = b[i * PACK + j];
        for (int row = 0; row < count; row++) store_pack(y + (first + row) * n, i, c);
    }
    for (int j = packs * PACK + threadIdx.x; j < n; j += blockDim.x)
        for (int row = 0; row < count; row++) y[(first + row) * n + j] = b[j];
}

// a16 = a (n_a numbers) and b16 = b (n - n_a numbers), in one launch.
extern "C" __global__ void cast_two(const REAL* a, const REAL* b, ACT* a16, ACT* b16, long long n_a, long long n) {
    GRID_STRIDE(i, n) {
        if (i < n_a) a16[i] = a[i];
        else b16[i - n_a] = b[i - n_a];
    }
}

// The factors of y = [u 1 0] [s B; b; 0] in half precision, the bias being one more row of B: A16 (n_a numbers), B16 (r + more, n), and columns r to
// r + more of u, whose others a product fills. See linear.py.
extern "C" __global__ void lora_factors(
    const REAL* A, const REAL* B, const REAL* b, REAL s, ACT* A16, ACT* B16, ACT* u, long long n_a, int r, int more, int n, long long count) {
    const long long n_b = (long long)r * n;
    GRID_STRIDE(i, count) {  // A, then B and what is below it, then what is beside u, row by row
        const long long j = i - n_a, beside = j - n_b - (long long)more * n;
        if (j < 0) A16[i] = A[i];
        else if (j < n_b) B16[j] = s * B[j];
        else if (beside < 0) B16[j] = j - n_b < n ? b[j - n_b] : REAL(0);
        else u[beside / more * (r + more) + r + beside % more] = beside % more ? REAL(0) : REAL(1);
    }
}
