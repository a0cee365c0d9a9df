// Attention whose scores are never in memory (FlashAttention-2, arXiv 2307.08691): a block of four warps takes 64 rows of one head and
// walks over what they meet, a tile of LOOP rows at a time. See flash.py. D, the features of a head, is given when the source is compiled.
// Scores are scaled where they become powers of 2: 2^(s scale log2(e) - m) is one multiply-add and one instruction. Only tiles that hold a hidden
// pair are masked, by a score so low that its power is 0.

#include "tiles.cuh"

#define LOWEST -3.0e38f                               // what a hidden score is
#define RESIDENT (D <= 64 ? 4 : HALF ? 3 : 2)         // blocks of the forward kernel that a multiprocessor is to have registers for

struct Tile {  // which rows a block takes, and which it meets; offset: the place of the first key in its sequence. Host side: flash.py
    int first, count, offset, other_first, other_count;
};
struct Keys {  // the first and the last that a query sees, in its sequence
    int first, last;
    __device__ bool hide(int key) const { return key < first || key > last; }
};

// O = softmax(scale Q K^T) V, and of each row the logarithm, to base 2, of the sum that the softmax divides by.
// A tile's own rows are queries, the others keys; a query sees the keys seen[query] of its sequence.
extern "C" __global__ void __launch_bounds__(128, RESIDENT) flash_forward(
    const ACT* q, const ACT* k, const ACT* v, const int* tiles, const int* seen, float scale, int heads, int group, long long q_step,
    long long k_step, long long v_step, ACT* o, float* log_sum) {
    extern __shared__ __align__(16) unsigned shared[];
    const int lane = threadIdx.x % 32, t = lane % 4, row = threadIdx.x / 32 * 16 + lane / 4, head = blockIdx.x % heads;
    const Tile tile = ((const Tile*)tiles)[blockIdx.x / heads];
    const int steps = (tile.other_count + LOOP - 1) / LOOP, size = (HALF ? 2 : 1) * TILE + TRANSPOSED_TILE;
    const ACT* first_key = k + tile.other_first * k_step + head / group * D;
    const ACT* first_value = v + tile.other_first * v_step + head / group * D;
    auto fetch = [&](int step) {
        unsigned* keys = shared + step % STAGES * size;
        const int j = step * LOOP, count = tile.other_count - j;
        load(keys, first_key + j * k_step, k_step, count);
        if (HALF) load(keys + TILE, first_value + j * v_step, v_step, count);
        else load_transposed(keys + TILE, first_value + j * v_step, v_step, count);
    };
    if (STAGES == 2 && steps) fetch(0);
    unsigned a[WORDS / 8][4];
    load_rows(a, q + tile.first * q_step + head * D, q_step, row, tile.count, t);
    float c[D / 8][4] = {}, most[2] = {LOWEST, LOWEST}, sum[2] = {0, 0};
    Keys own[2];
    for (int i = 0; i < 2; i++) own[i] = row + 8 * i < tile.count ? ((const Keys*)seen)[tile.first + row + 8 * i] : Keys{0, -1};
    const float factor = scale * LOG2E;

    for (int step = 0; step < steps; step++) {
        if (STAGES == 1) {
            __syncthreads();
            fetch(step);
        }
        wait_for_copies();
        __syncthreads();  // the tile is there, and the one before it is no longer read
        if (STAGES == 2 && step + 1 < steps) fetch(step + 1);
        const unsigned *keys = shared + step % STAGES * size, *values = keys + TILE;
        const int j = tile.offset + step * LOOP;
        float s[LOOP / 16][2][4] = {};
#pragma unroll
        for (int m = 0; m < LOOP / 16; m++) times_rows(s[m], a, keys, m, lane);
        if (j + LOOP > min(own[0].last, own[1].last) + 1 || j < own[0].first || j < own[1].first) {
#pragma unroll
            for (int n = 0; n < LOOP / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (own[i / 2].hide(j + 8 * n + 2 * t + i % 2)) s[n / 2][n % 2][i] = LOWEST;
        }
        float now[2] = {most[0], most[1]};
#pragma unroll
        for (int n = 0; n < LOOP / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) now[i / 2] = fmaxf(now[i / 2], s[n / 2][n % 2][i]);
        float shrink[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            now[i] = largest_of_quad(now[i]);
            shrink[i] = power_of_two((most[i] - now[i]) * factor);
            most[i] = now[i];
            sum[i] *= shrink[i];
            now[i] *= factor;
        }
#pragma unroll
        for (int n = 0; n < LOOP / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float* p = &s[n / 2][n % 2][i];
                *p = power_of_two(fmaf(*p, factor, -now[i / 2]));
                sum[i / 2] += *p;
            }
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) c[n][i] *= shrink[i / 2];
#pragma unroll
        for (int m = 0; m < LOOP / 16; m++) times_columns(c, s[m], values, values, m, lane);
    }
    for (int i = 0; i < 2; i++) {
        sum[i] = sum_of_quad(sum[i]);
        if (t == 0 && row + 8 * i < tile.count) log_sum[(long long)(tile.first + row + 8 * i) * heads + head] = most[i] * factor + log2f(sum[i]);
    }
    store_rows(o + (long long)tile.first * heads * D + head * D, (long long)heads * D, c, row, tile.count, t, 1 / sum[0], 1 / sum[1]);
}

// dQ = scale dS K,  dS = P (dP - delta),  dP = dO V^T,  delta = the sum over a row of dO O, which is kept for the other kernel.
extern "C" __global__ void __launch_bounds__(128) flash_dq(
    const ACT* q, const ACT* k, const ACT* v, const ACT* o, const ACT* d_o, const float* log_sum, const int* tiles, const int* seen, float scale,
    int heads, int group, long long q_step, long long k_step, long long v_step, float* delta, ACT* dq, long long dq_step) {
    extern __shared__ __align__(16) unsigned shared[];
    const int lane = threadIdx.x % 32, t = lane % 4, row = threadIdx.x / 32 * 16 + lane / 4, head = blockIdx.x % heads;
    const Tile tile = ((const Tile*)tiles)[blockIdx.x / heads];
    const int steps = (tile.other_count + LOOP - 1) / LOOP, size = 2 * TILE + TRANSPOSED_TILE;
    const ACT* first_key = k + tile.other_first * k_step + head / group * D;
    const ACT* first_value = v + tile.other_first * v_step + head / group * D;
    auto fetch = [&](int step) {
        unsigned* keys = shared + step % STAGES * size;
        const int j = step * LOOP, count = tile.other_count - j;
        load(keys, first_key + j * k_step, k_step, count);
        load(keys + TILE, first_value + j * v_step, v_step, count);
        load_transposed(keys + 2 * TILE, first_key + j * k_step, k_step, count);
    };
    if (STAGES == 2 && steps) fetch(0);
    const long long o_step = (long long)heads * D, mine = tile.first * o_step + head * D;
    unsigned a[WORDS / 8][4], a_do[WORDS / 8][4];
    load_rows(a, q + tile.first * q_step + head * D, q_step, row, tile.count, t);
    load_rows(a_do, d_o + mine, o_step, row, tile.count, t);
    float c[D / 8][4] = {}, log_sums[2], along[2];
    Keys own[2];
    for (int i = 0; i < 2; i++) {
        const int r = row + 8 * i;
        const bool there = r < tile.count;
        const long long place = (long long)(tile.first + r) * heads + head;
        own[i] = there ? ((const Keys*)seen)[tile.first + r] : Keys{0, -1};
        log_sums[i] = there ? log_sum[place] : 0;
        along[i] = dot_of_quad(o + mine + r * o_step, d_o + mine + r * o_step, there, t);
        if (t == 0 && there) delta[place] = along[i];
    }
    const float factor = scale * LOG2E;

    for (int step = 0; step < steps; step++) {
        if (STAGES == 1) {
            __syncthreads();
            fetch(step);
        }
        wait_for_copies();
        __syncthreads();
        if (STAGES == 2 && step + 1 < steps) fetch(step + 1);
        const unsigned *keys = shared + step % STAGES * size, *values = keys + TILE;
        const int j = tile.offset + step * LOOP;
        const bool hides = j + LOOP > min(own[0].last, own[1].last) + 1 || j < own[0].first || j < own[1].first;
#pragma unroll
        for (int m = 0; m < LOOP / 16; m++) {
            float s[2][4] = {}, dp[2][4] = {};
            times_rows(s, a, keys, m, lane);
            times_rows(dp, a_do, values, m, lane);
            if (hides) {
#pragma unroll
                for (int i = 0; i < 8; i++)
                    if (own[i % 4 / 2].hide(j + 16 * m + i / 4 * 8 + 2 * t + i % 2)) s[i / 4][i % 4] = LOWEST;
            }
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int half = i % 4 / 2;
                float* d = &s[i / 4][i % 4];
                *d = power_of_two(fmaf(*d, factor, -log_sums[half])) * (dp[i / 4][i % 4] - along[half]);
            }
            times_columns(c, s, keys, keys + 2 * TILE, m, lane);
        }
    }
    store_rows(dq + tile.first * dq_step + head * D, dq_step, c, row, tile.count, t, scale, scale);
}

// dV = P^T dO,  dK = scale dS^T Q, of 64 keys of a head, summed over the `group` heads of queries that share it. A tile's own rows are keys,
// the first of them key `offset` of its sequence; the others are the queries that see one of them. Rows of a tile beyond its count are zeros, of Q
// and dO alike, and add nothing.
extern "C" __global__ void __launch_bounds__(128) flash_dkv(
    const ACT* q, const ACT* k, const ACT* v, const ACT* d_o, const float* log_sum, const float* delta, const int* tiles, const int* seen,
    float scale, int heads, int group, long long q_step, long long k_step, long long v_step, ACT* dk, long long dk_step, ACT* dv, long long dv_step) {
    extern __shared__ __align__(16) unsigned shared[];
    const int lane = threadIdx.x % 32, t = lane % 4, row = threadIdx.x / 32 * 16 + lane / 4, shared_head = blockIdx.x % (heads / group);
    const Tile tile = ((const Tile*)tiles)[blockIdx.x / (heads / group)];
    const int of_a_head = (tile.other_count + LOOP - 1) / LOOP, steps = group * of_a_head, size = 2 * (TILE + TRANSPOSED_TILE) + 4 * LOOP;
    const long long o_step = (long long)heads * D;
    auto fetch = [&](int step) {
        unsigned *queries = shared + step % STAGES * size, *dos = queries + TILE, *rest = dos + TILE;
        const int head = shared_head * group + step / of_a_head, j = step % of_a_head * LOOP, count = tile.other_count - j;
        const long long first = tile.other_first + j;
        const ACT *from_q = q + first * q_step + head * D, *from_do = d_o + first * o_step + head * D;
        load(queries, from_q, q_step, count);
        load(dos, from_do, o_step, count);
        load_transposed(rest, from_q, q_step, count);
        load_transposed(rest + TRANSPOSED_TILE, from_do, o_step, count);
        rest += 2 * TRANSPOSED_TILE;
        load_numbers((float*)rest, log_sum + first * heads + head, heads, count);
        load_numbers((float*)rest + LOOP, delta + first * heads + head, heads, count);
        load_numbers((int*)rest + 2 * LOOP, seen + 2 * first, 2, count);
        load_numbers((int*)rest + 3 * LOOP, seen + 2 * first + 1, 2, count);
    };
    if (STAGES == 2 && steps) fetch(0);
    unsigned a[WORDS / 8][4], a_v[WORDS / 8][4];
    load_rows(a, k + tile.first * k_step + shared_head * D, k_step, row, tile.count, t);
    load_rows(a_v, v + tile.first * v_step + shared_head * D, v_step, row, tile.count, t);
    float c[D / 8][4] = {}, c_v[D / 8][4] = {};
    const float factor = scale * LOG2E;
    const int key = tile.offset + row;

    for (int step = 0; step < steps; step++) {
        if (STAGES == 1) {
            __syncthreads();
            fetch(step);
        }
        wait_for_copies();
        __syncthreads();
        if (STAGES == 2 && step + 1 < steps) fetch(step + 1);
        const unsigned *queries = shared + step % STAGES * size, *dos = queries + TILE, *transposed = dos + TILE;
        const float *log_sums = (const float*)(transposed + 2 * TRANSPOSED_TILE), *deltas = log_sums + LOOP;
        const int *firsts = (const int*)(deltas + LOOP), *lasts = firsts + LOOP;
        const int rows = tile.other_count - step % of_a_head * LOOP;
        const bool hides = key + 8 > lasts[0] || key < firsts[min(rows, LOOP) - 1];  // neither falls from one query to the next
#pragma unroll
        for (int m = 0; m < LOOP / 16; m++) {
            float s[2][4] = {}, dp[2][4] = {};
            times_rows(s, a, queries, m, lane);
            times_rows(dp, a_v, dos, m, lane);
            if (hides) {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const int query = 16 * m + i / 4 * 8 + 2 * t + i % 2;
                    if (Keys{firsts[query], lasts[query]}.hide(key + i % 4 / 2 * 8)) s[i / 4][i % 4] = LOWEST;
                }
            }
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int query = 16 * m + i / 4 * 8 + 2 * t + i % 2;
                float *p = &s[i / 4][i % 4], *d = &dp[i / 4][i % 4];
                *p = power_of_two(fmaf(*p, factor, -log_sums[query]));
                *d = *p * (*d - deltas[query]);
            }
            times_columns(c_v, s, dos, transposed + TRANSPOSED_TILE, m, lane);
            times_columns(c, dp, queries, transposed, m, lane);
        }
    }
    store_rows(dk + tile.first * dk_step + shared_head * D, dk_step, c, row, tile.count, t, scale, scale);
    store_rows(dv + tile.first * dv_step + shared_head * D, dv_step, c_v, row, tile.count, t, 1, 1);
}
