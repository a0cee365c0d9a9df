// What flash.cu is made of: tiles of a matrix in shared memory, and products of them by the tensor cores, which take 16 x 8 numbers at a
// time. To them a row is a row of 32-bit words, of one float32 (cut to TF32) or of two 16-bit numbers, and a step of a product reads
// eight of them. Lane 4 g + t of a warp holds
//
//     of A (16 rows):     words t, t + 4 of rows g and g + 8
//     of B (8 columns):   words t, t + 4 of column g
//     of C (16 x 8):      columns 2 t, 2 t + 1 of rows g and g + 8
//
// so that C, two columns to a word, is the A of the next product: P and dS never leave the registers.
//
// A tile lies row by row. 16-bit numbers are copied to it while the previous tile is being worked on (cp.async), and `ldmatrix` gives each lane
// its words, transposed where the product runs over the rows. For float32 there is no such instruction: a tile that is needed transposed
// is there a second time, column by column, and copies are not overlapped.

#define IN_WORD (4 / (int)sizeof(ACT))                                    // numbers in a word
#define HALF (IN_WORD == 2)
#define STAGES IN_WORD                                                    // tiles in shared memory at a time
#define WORDS (D / IN_WORD)                                               // words of a row
#define LOOP (8192 / (D * (int)sizeof(ACT)) < 64 ? 8192 / (D * (int)sizeof(ACT)) : 64)  // rows of a tile
#define WIDTH (WORDS + 4)                                                 // of a row in shared memory: no two lanes meet in a bank
#define TRANSPOSED (LOOP / IN_WORD + 4)                                   // the same of a tile that lies column by column
#define TILE (LOOP * WIDTH)                                               // words
#define TRANSPOSED_TILE (HALF ? 0 : D * TRANSPOSED)
#define LOG2E 1.4426950408889634f

template <class T> struct Core;  // c += a b

#ifdef __CUDACC__
#define MMA(type, name)                                                                                                    \
    template <> struct Core<type> {                                                                                        \
        static __device__ void run(float* c, const unsigned* a, unsigned b0, unsigned b1) {                                \
            asm volatile("mma.sync.aligned." name " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                \
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                           \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                           \
        }                                                                                                                  \
    };
MMA(bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
MMA(float16, "m16n8k16.row.col.f32.f16.f16.f32")
MMA(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#else
template <class T> struct Core {
    static void run(float* c, const unsigned* a, unsigned b0, unsigned b1) { emulated_mma<T>(c, a, b0, b1); }
};
#endif

// The word of one number, or of two.
template <class T> struct Words;
#ifdef __CUDACC__
template <> struct Words<bfloat16> {
    static __device__ void pack(unsigned& bits, float x, float y) { asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(y), "f"(x)); }
};
template <> struct Words<float16> {
    static __device__ void pack(unsigned& bits, float x, float y) { asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(y), "f"(x)); }
};
template <> struct Words<float> {  // else it would be cut off, not rounded
    static __device__ void pack(unsigned& bits, float x, float) { asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x)); }
};
#else
template <class T> struct Words {
    static void pack(unsigned& bits, float x, float y) {
        union { T numbers[IN_WORD]; unsigned bits; } packed;
        packed.numbers[0] = x;
        if (IN_WORD == 2) packed.numbers[IN_WORD - 1] = y;
        bits = packed.bits;
    }
};
#endif

__device__ unsigned word(float x, float y) {
    unsigned bits;
    Words<ACT>::pack(bits, x, y);
    return bits;
}

__device__ unsigned rounded(unsigned bits) {  // a word from memory, for the tensor cores
    union { unsigned bits; float value; } x = {bits};
    return IN_WORD == 1 ? word(x.value, 0) : bits;
}

// 2^x, by the instruction itself: to two units in the last place, and 0 where the result would be subnormal.
__device__ float power_of_two(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// Begin to copy BYTES (4 or 16) to shared memory, or zeros. Complete for this thread after wait_for_copies, for all after __syncthreads.
template <int BYTES> __device__ void copy(void* to, const void* from, bool there) {
#ifdef __CUDACC__
    const unsigned place = (unsigned)__cvta_generic_to_shared(to), size = there ? BYTES : 0;
    if (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(size) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(place), "l"(from), "r"(size) : "memory");
#else
    emulated_copy(to, from, BYTES, there);
#endif
}

__device__ void wait_for_copies() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_all;" ::: "memory");
#else
    emulated_wait_for_copies();
#endif
}

// Four 8 x 8 matrices of 16-bit numbers: lane 8 i + r gives the address of row r of matrix i, lane 4 g + t gets the word t of row g of each,
// or, transposed, the numbers of rows 2 t and 2 t + 1 in column g.
template <bool TRANSPOSE> __device__ void load_matrices(unsigned b[4], const unsigned* row) {
#ifdef __CUDACC__
    const unsigned place = (unsigned)__cvta_generic_to_shared(row);
    if (TRANSPOSE)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(place));
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(place));
#else
    emulated_ldmatrix(b, row, TRANSPOSE);
#endif
}

__device__ float largest_of_quad(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ float sum_of_quad(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// LOOP rows of a matrix into shared memory, row by row; beyond `count`, zeros.
__device__ void load(unsigned* tile, const ACT* rows, long long step, int count) {
#pragma unroll
    for (int k = 0; k < LOOP * WORDS / 512; k++) {
        const int i = k * 128 + threadIdx.x, row = i / (WORDS / 4), part = i % (WORDS / 4) * 4;
        unsigned* place = tile + row * WIDTH + part;
        const unsigned* from = (const unsigned*)(rows + row * step) + part;
        if (HALF) {
            copy<16>(place, from, row < count);
        } else {
            uint4 four = {0, 0, 0, 0};
            if (row < count) four = *(const uint4*)from;
            *(uint4*)place = {rounded(four.x), rounded(four.y), rounded(four.z), rounded(four.w)};
        }
    }
}

// The same, column by column, of float32. The eight rows of a step change places: words t and t + 4 are to be rows 2 t and 2 t + 1.
__device__ void load_transposed(unsigned* tile, const ACT* rows, long long step, int count) {
    for (int i = threadIdx.x; !HALF && i < LOOP * WORDS / 4; i += 128) {
        const int row = i % LOOP, part = i / LOOP * 4, place = row / 8 * 8 + row % 2 * 4 + row % 8 / 2;
        union { uint4 four; unsigned words[4]; } read = {{0, 0, 0, 0}};
        if (row < count) read.four = *(const uint4*)((const unsigned*)(rows + row * step) + part);
        for (int j = 0; j < 4; j++) tile[(part + j) * TRANSPOSED + place] = rounded(read.words[j]);
    }
}

// LOOP numbers, each `step` behind the one before it; beyond `count`, zeros.
template <class T> __device__ void load_numbers(T* to, const T* from, int step, int count) {
    for (int i = threadIdx.x; i < LOOP; i += 128) {
        if (HALF) copy<4>(to + i, from + (long long)i * step, i < count);
        else to[i] = i < count ? from[(long long)i * step] : 0;
    }
}

// A warp's 16 rows of a matrix as A; rows beyond `count` are zeros.
__device__ void load_rows(unsigned a[WORDS / 8][4], const ACT* rows, long long step, int row, int count, int t) {
#pragma unroll
    for (int s = 0; s < WORDS / 8; s++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int r = row + i % 2 * 8;
            a[s][i] = r < count ? rounded(((const unsigned*)(rows + r * step))[8 * s + t + i / 2 * 4]) : 0;
        }
}

// c (16 x 16) += a (16 x D) part^T: rows 16 m to 16 m + 15 of a tile.
__device__ void times_rows(float c[2][4], const unsigned a[WORDS / 8][4], const unsigned* tile, int m, int lane) {
    const unsigned* of_lane = tile + (16 * m + (HALF ? lane % 8 + lane / 16 * 8 : lane / 4)) * WIDTH + (HALF ? lane / 8 % 2 * 4 : lane % 4);
#pragma unroll
    for (int s = 0; s < WORDS / 8; s++) {
        unsigned b[4];
        if (HALF) load_matrices<false>(b, of_lane + 8 * s);
        else for (int i = 0; i < 4; i++) b[i] = of_lane[i / 2 * 8 * WIDTH + 8 * s + i % 2 * 4];
        Core<ACT>::run(c[0], a[s], b[0], b[1]);
        Core<ACT>::run(c[1], a[s], b[2], b[3]);
    }
}

// c (16 x D) += p (16 x 16) part: rows 16 m to 16 m + 15 of a tile, or of `transposed` for float32; p is the C of an earlier product.
__device__ void times_columns(float c[D / 8][4], const float p[2][4], const unsigned* tile, const unsigned* transposed, int m, int lane) {
    if (HALF) {
        const unsigned a[4] = {word(p[0][0], p[0][1]), word(p[0][2], p[0][3]), word(p[1][0], p[1][1]), word(p[1][2], p[1][3])};
        const unsigned* of_lane = tile + (16 * m + lane % 16) * WIDTH + lane / 16 * 4;
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            unsigned b[4];
            load_matrices<true>(b, of_lane + 4 * n);
            Core<ACT>::run(c[n], a, b[0], b[1]);
            Core<ACT>::run(c[n + 1], a, b[2], b[3]);
        }
    } else {
#pragma unroll
        for (int s = 0; s < 2; s++) {
            const unsigned a[4] = {word(p[s][0], 0), word(p[s][2], 0), word(p[s][1], 0), word(p[s][3], 0)};
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                const unsigned* column = transposed + (8 * n + lane / 4) * TRANSPOSED + 16 * m + 8 * s + lane % 4;
                Core<ACT>::run(c[n], a, column[0], column[4]);
            }
        }
    }
}

// c (16 x D) times a factor of each row, to memory.
__device__ void store_rows(ACT* rows, long long step, float c[D / 8][4], int row, int count, int t, float factor, float factor_8) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int r = row + 8 * i;
        const float f = i ? factor_8 : factor;
        ACT* place = rows + r * step + 2 * t;
        if (r >= count) continue;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            if (HALF) {
                *(unsigned*)(place + 8 * n) = word(c[n][2 * i] * f, c[n][2 * i + 1] * f);
            } else {
                place[8 * n] = c[n][2 * i] * f;
                place[8 * n + 1] = c[n][2 * i + 1] * f;
            }
        }
    }
}

// The sum of the products of the numbers of two rows, of which each lane of a quad takes every fourth word; in all four of them.
__device__ float dot_of_quad(const ACT* x, const ACT* y, bool there, int t) {
    float sum = 0;
    for (int w = t; there && w < WORDS; w += 4) {
        union { unsigned bits; ACT numbers[IN_WORD]; } a = {((const unsigned*)x)[w]}, b = {((const unsigned*)y)[w]};
        for (int i = 0; i < IN_WORD; i++) sum += (float)a.numbers[i] * (float)b.numbers[i];
    }
    return sum_of_quad(sum);
}
