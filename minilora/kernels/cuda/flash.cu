// Attention whose scores are never in memory (FlashAttention-2, arXiv 2307.08691): a block of four warps takes 64 rows of one head and
// walks over what they meet, LOOP rows at a time. See ../flash.py. D, the features of a head, is given when the source is compiled.
//
// Products are the tensor cores', 16 x 8 numbers at a time. To them a row is a row of 32-bit words, of one float32 (cut to TF32) or of two
// 16-bit numbers, and a step of a product reads eight of them. Lane 4 g + t of a warp holds
//
//     of A (16 rows):     words t, t + 4 of rows g and g + 8
//     of B (8 columns):   words t, t + 4 of column g
//     of C (16 x 8):      columns 2 t, 2 t + 1 of rows g and g + 8
//
// so that C, two columns to a word, is the A of the next product: P and dS never leave the registers.

#define ROWS 64
#define IN_WORD (4 / (int)sizeof(ACT))                                    // numbers in a word
#define WORDS (D / IN_WORD)                                               // words of a row
#define LOOP (8192 / (D * (int)sizeof(ACT)) < 64 ? 8192 / (D * (int)sizeof(ACT)) : 64)
#define WIDTH (WORDS + 4)                                                 // of a row in shared memory: no two lanes meet in a bank
#define TURNED (LOOP / IN_WORD + 4)                                       // the same of a tile that lies column by column
#define LOG2E 1.4426950408889634f
#define LOWEST -3.0e38f                                                   // what a hidden score is

struct Tile {  // which rows a block takes, and which it meets; host side: flash.py
    int first, count, offset, other_first, other_count;
};

template <class T> struct Core;  // c += a b

#ifdef __CUDACC__
#define MMA(type, name)                                                                                                    \
    template <> struct Core<type> {                                                                                        \
        static __device__ void run(float* c, const unsigned* a, unsigned b0, unsigned b1) {                                \
            asm("mma.sync.aligned." name " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                \
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

// LOOP rows of a matrix into shared memory, row by row; beyond `count`, zeros.
__device__ void load(unsigned* tile, const ACT* rows, long long step, int count) {
    for (int i = threadIdx.x; i < LOOP * WORDS / 4; i += 128) {
        const int row = i / (WORDS / 4), part = i % (WORDS / 4) * 4;
        uint4 four = {0, 0, 0, 0};
        if (row < count) four = *(const uint4*)((const unsigned*)(rows + row * step) + part);
        *(uint4*)(tile + row * WIDTH + part) = {rounded(four.x), rounded(four.y), rounded(four.z), rounded(four.w)};
    }
}

// The same, column by column. Of float32 the eight rows of a step change places: words t and t + 4 are to be rows 2 t and 2 t + 1.
__device__ void load_turned(unsigned* tile, const ACT* rows, long long step, int count) {
    for (int i = threadIdx.x; i < LOOP * WORDS / 4; i += 128) {
        const int row = i % LOOP, part = i / LOOP * 4;
        union { uint4 four; unsigned words[4]; ACT numbers[4 * IN_WORD]; } read = {{0, 0, 0, 0}};
        if (row < count) read.four = *(const uint4*)((const unsigned*)(rows + row * step) + part);
        for (int j = 0; j < 4; j++) read.words[j] = rounded(read.words[j]);
        const int place = IN_WORD == 2 ? row : row / 8 * 8 + row % 2 * 4 + row % 8 / 2;
        for (int j = 0; j < 4 * IN_WORD; j++) ((ACT*)(tile + (part * IN_WORD + j) * TURNED))[place] = read.numbers[j];
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

// c (16 x 8 n) += a (16 x D) tile^T, where the tile has n times 8 rows of D.
__device__ void times_rows(float c[LOOP / 8][4], unsigned a[WORDS / 8][4], const unsigned* tile, int g, int t) {
#pragma unroll
    for (int n = 0; n < LOOP / 8; n++) {
        const unsigned* column = tile + (8 * n + g) * WIDTH + t;
#pragma unroll
        for (int s = 0; s < WORDS / 8; s++) Core<ACT>::run(c[n], a[s], column[8 * s], column[8 * s + 4]);
    }
}

// c (16 x D) += p (16 x LOOP) tile, where the tile lies column by column; p is the C of an earlier product.
__device__ void times_turned(float c[D / 8][4], float p[LOOP / 8][4], const unsigned* tile, int g, int t) {
#pragma unroll
    for (int s = 0; s < LOOP / 8 / IN_WORD; s++) {
        float* left = p[s * IN_WORD];
        float* right = p[s * IN_WORD + IN_WORD - 1];
        unsigned a[4];
        if (IN_WORD == 2) {
            a[0] = word(left[0], left[1]), a[1] = word(left[2], left[3]), a[2] = word(right[0], right[1]), a[3] = word(right[2], right[3]);
        } else {
            a[0] = word(left[0], 0), a[1] = word(left[2], 0), a[2] = word(left[1], 0), a[3] = word(left[3], 0);
        }
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            const unsigned* column = tile + (8 * n + g) * TURNED + 8 * s + t;
            Core<ACT>::run(c[n], a, column[0], column[4]);
        }
    }
}

// c (16 x D) times a factor of each row, to memory.
__device__ void store_rows(ACT* rows, long long step, float c[D / 8][4], int row, int count, int t, float factor, float factor_8) {
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int r = row + i / 2 * 8;
            if (r < count) rows[r * step + 8 * n + 2 * t + i % 2] = c[n][i] * (i / 2 ? factor_8 : factor);
        }
}

__device__ float largest_of_quad(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ float sum_of_quad(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// O = softmax(scale Q K^T) V, and of each row the logarithm, to base 2, of the sum that the softmax divides by.
// A tile's own rows are queries, the others keys; a query sees the keys 0 to limit[query] of its sequence.
extern "C" __global__ void __launch_bounds__(128) flash_forward(
    const ACT* q, const ACT* k, const ACT* v, const int* tiles, const int* limit, float scale, int heads, int group, long long q_step,
    long long k_step, long long v_step, ACT* o, float* log_sum) {
    extern __shared__ unsigned shared[];
    unsigned *keys = shared, *values = shared + LOOP * WIDTH;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, row = threadIdx.x / 32 * 16 + g, head = blockIdx.x % heads;
    const Tile tile = ((const Tile*)tiles)[blockIdx.x / heads];
    const int column = head / group * D;
    unsigned a[WORDS / 8][4];
    load_rows(a, q + tile.first * q_step + head * D, q_step, row, tile.count, t);
    float c[D / 8][4] = {}, most[2] = {LOWEST, LOWEST}, sum[2] = {0, 0};
    int seen[2];
    for (int i = 0; i < 2; i++) seen[i] = row + 8 * i < tile.count ? limit[tile.first + row + 8 * i] : -1;

    for (int j = 0; j < tile.other_count; j += LOOP) {
        const long long first = tile.other_first + j;
        __syncthreads();
        load(keys, k + first * k_step + column, k_step, tile.other_count - j);
        load_turned(values, v + first * v_step + column, v_step, tile.other_count - j);
        __syncthreads();
        float s[LOOP / 8][4] = {};
        times_rows(s, a, keys, g, t);
        float now[2] = {most[0], most[1]};
#pragma unroll
        for (int n = 0; n < LOOP / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[n][i] = j + 8 * n + 2 * t + i % 2 <= seen[i / 2] ? s[n][i] * (scale * LOG2E) : LOWEST;
                now[i / 2] = fmaxf(now[i / 2], s[n][i]);
            }
        float shrink[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            now[i] = largest_of_quad(now[i]);
            shrink[i] = exp2f(most[i] - now[i]);
            most[i] = now[i];
            sum[i] *= shrink[i];
        }
#pragma unroll
        for (int n = 0; n < LOOP / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[n][i] = s[n][i] == LOWEST ? 0 : exp2f(s[n][i] - most[i / 2]);
                sum[i / 2] += s[n][i];
            }
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) c[n][i] *= shrink[i / 2];
        times_turned(c, s, values, g, t);
    }
    for (int i = 0; i < 2; i++) {
        sum[i] = sum_of_quad(sum[i]);
        if (t == 0 && row + 8 * i < tile.count) log_sum[(long long)(tile.first + row + 8 * i) * heads + head] = most[i] + log2f(sum[i]);
    }
    store_rows(o + (long long)tile.first * heads * D + head * D, (long long)heads * D, c, row, tile.count, t, 1 / sum[0], 1 / sum[1]);
}

// dQ = scale dS K,  dS = P (dP - delta),  dP = dO V^T,  delta = the sum over a row of dO O, which is kept for the other kernel.
extern "C" __global__ void __launch_bounds__(128) flash_dq(
    const ACT* q, const ACT* k, const ACT* v, const ACT* o, const ACT* d_o, const float* log_sum, const int* tiles, const int* limit, float scale,
    int heads, int group, long long q_step, long long k_step, long long v_step, float* delta, ACT* dq) {
    extern __shared__ unsigned shared[];
    unsigned *keys = shared, *values = keys + LOOP * WIDTH, *keys_turned = values + LOOP * WIDTH;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, row = threadIdx.x / 32 * 16 + g, head = blockIdx.x % heads;
    const Tile tile = ((const Tile*)tiles)[blockIdx.x / heads];
    const int column = head / group * D;
    const long long o_step = (long long)heads * D, own = tile.first * o_step + head * D;
    unsigned a[WORDS / 8][4], a_do[WORDS / 8][4];
    load_rows(a, q + tile.first * q_step + head * D, q_step, row, tile.count, t);
    load_rows(a_do, d_o + own, o_step, row, tile.count, t);
    float c[D / 8][4] = {}, log_sums[2], along[2] = {0, 0};
    int seen[2];
    for (int i = 0; i < 2; i++) {
        const int r = row + 8 * i;
        const long long place = (long long)(tile.first + r) * heads + head;
        seen[i] = r < tile.count ? limit[tile.first + r] : -1;
        log_sums[i] = r < tile.count ? log_sum[place] : 0;
        if (r < tile.count)
            for (int n = t; n < D; n += 4) along[i] += (float)o[own + r * o_step + n] * (float)d_o[own + r * o_step + n];
        along[i] = sum_of_quad(along[i]);
        if (t == 0 && r < tile.count) delta[place] = along[i];
    }

    for (int j = 0; j < tile.other_count; j += LOOP) {
        const long long first = tile.other_first + j;
        const int count = tile.other_count - j;
        __syncthreads();
        load(keys, k + first * k_step + column, k_step, count);
        load(values, v + first * v_step + column, v_step, count);
        load_turned(keys_turned, k + first * k_step + column, k_step, count);
        __syncthreads();
        float s[LOOP / 8][4] = {}, dp[LOOP / 8][4] = {};
        times_rows(s, a, keys, g, t);
        times_rows(dp, a_do, values, g, t);
#pragma unroll
        for (int n = 0; n < LOOP / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const bool there = j + 8 * n + 2 * t + i % 2 <= seen[i / 2];
                s[n][i] = there ? exp2f(s[n][i] * (scale * LOG2E) - log_sums[i / 2]) * (dp[n][i] - along[i / 2]) : 0;
            }
        times_turned(c, s, keys_turned, g, t);
    }
    store_rows(dq + own, o_step, c, row, tile.count, t, scale, scale);
}

// dV = P^T dO,  dK = scale dS^T Q, of 64 keys of a head, summed over the `group` heads of queries that share it. A tile's own rows are keys,
// the first of them key `offset` of its sequence; the others are the queries that see one of them.
extern "C" __global__ void __launch_bounds__(128) flash_dkv(
    const ACT* q, const ACT* k, const ACT* v, const ACT* d_o, const float* log_sum, const float* delta, const int* tiles, const int* limit,
    float scale, int heads, int group, long long q_step, long long k_step, long long v_step, ACT* dk, ACT* dv) {
    extern __shared__ unsigned shared[];
    unsigned *queries = shared, *dos = queries + LOOP * WIDTH, *queries_turned = dos + LOOP * WIDTH, *dos_turned = queries_turned + D * TURNED;
    float *log_sums = (float*)(dos_turned + D * TURNED), *deltas = log_sums + LOOP;
    int* limits = (int*)(deltas + LOOP);
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, row = threadIdx.x / 32 * 16 + g, shared_head = blockIdx.x % (heads / group);
    const Tile tile = ((const Tile*)tiles)[blockIdx.x / (heads / group)];
    const long long o_step = (long long)heads * D, kv_step = (long long)(heads / group) * D;
    unsigned a[WORDS / 8][4], a_v[WORDS / 8][4];
    load_rows(a, k + tile.first * k_step + shared_head * D, k_step, row, tile.count, t);
    load_rows(a_v, v + tile.first * v_step + shared_head * D, v_step, row, tile.count, t);
    float c[D / 8][4] = {}, c_v[D / 8][4] = {};

    for (int head = shared_head * group; head < (shared_head + 1) * group; head++)
        for (int j = 0; j < tile.other_count; j += LOOP) {
            const long long first = tile.other_first + j;
            const int count = tile.other_count - j;
            __syncthreads();
            load(queries, q + first * q_step + head * D, q_step, count);
            load(dos, d_o + first * o_step + head * D, o_step, count);
            load_turned(queries_turned, q + first * q_step + head * D, q_step, count);
            load_turned(dos_turned, d_o + first * o_step + head * D, o_step, count);
            for (int i = threadIdx.x; i < LOOP; i += 128) {
                const bool there = i < count;
                limits[i] = there ? limit[first + i] : -1;
                log_sums[i] = there ? log_sum[(first + i) * heads + head] : 0;
                deltas[i] = there ? delta[(first + i) * heads + head] : 0;
            }
            __syncthreads();
            float s[LOOP / 8][4] = {}, dp[LOOP / 8][4] = {};
            times_rows(s, a, queries, g, t);
            times_rows(dp, a_v, dos, g, t);
#pragma unroll
            for (int n = 0; n < LOOP / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int query = 8 * n + 2 * t + i % 2;
                    const bool there = tile.offset + row + i / 2 * 8 <= limits[query];
                    s[n][i] = there ? exp2f(s[n][i] * (scale * LOG2E) - log_sums[query]) : 0;
                    dp[n][i] = there ? s[n][i] * (dp[n][i] - deltas[query]) : 0;
                }
            times_turned(c_v, s, dos_turned, g, t);
            times_turned(c, dp, queries_turned, g, t);
        }
    store_rows(dk + tile.first * kv_step + shared_head * D, kv_step, c, row, tile.count, t, scale, scale);
    store_rows(dv + tile.first * kv_step + shared_head * D, kv_step, c_v, row, tile.count, t, 1, 1);
}
