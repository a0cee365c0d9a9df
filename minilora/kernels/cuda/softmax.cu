// Rows of scores, a block for each. See ../grouped.py and losses.py.

// In place: e = exp(s - max) where a query may look, else 0; and 1 / sum. scores (sequences, heads, t, n) of the keys from `begin` on; the query
// sees the keys first to last (sequences, t) each; first null: all up to the last. heads_t is heads times t. With P, in half precision, the rows
// of it get e / sum, and `inverse` is not written.
extern "C" __global__ void masked_exp(
    REAL* scores, const int* first, const int* last, int begin, int heads_t, int t, int n, REAL* inverse, ACT* P) {
    extern __shared__ REAL shared[];
    const long long row = (long long)blockIdx.x * n;
    const int query = blockIdx.x / heads_t * t + blockIdx.x % t;
    const int end = last[query] + 1 - begin, seen = end < n ? end : n, from = first ? first[query] - begin : 0;
    REAL m = scores[row + from];
    for (int j = from + threadIdx.x; j < seen; j += blockDim.x) m = scores[row + j] > m ? scores[row + j] : m;
    m = block_max(m, shared);
    REAL sum = 0;
    for (int j = threadIdx.x; j < n; j += blockDim.x) {
        REAL e = from <= j && j < seen ? exp(scores[row + j] - m) : REAL(0);
        scores[row + j] = e;
        sum += e;
    }
    sum = block_sum(sum, shared);
    if (P) {
        for (int j = threadIdx.x; j < n; j += blockDim.x) P[row + j] = scores[row + j] / sum;
    } else if (threadIdx.x == 0) {
        inverse[blockIdx.x] = 1 / sum;
    }
}

// In place: dS = E (dS - D / sum), D = row sum of E dS. With `out`, in half precision, it goes there; `inverse` null: E is divided already.
extern "C" __global__ void softmax_backward(REAL* dS, const ACT* E, const REAL* inverse, int n, ACT* out) {
    extern __shared__ REAL shared[];
    const long long row = (long long)blockIdx.x * n;
    REAL along = 0;
    for (int j = threadIdx.x; j < n; j += blockDim.x) along += E[row + j] * dS[row + j];
    along = block_sum(along, shared);
    if (inverse) along *= inverse[blockIdx.x];
    for (int j = threadIdx.x; j < n; j += blockDim.x) {
        REAL d = E[row + j] * (dS[row + j] - along);
        if (out) out[row + j] = d;
        else dS[row + j] = d;
    }
}

// A block of `n` columns of the logits z, in place: e = exp(z - m) with m the largest so far, this block included; what was summed
// before is to be multiplied by exp(m_before - m), and `total` is. (The online softmax, arXiv 1805.02867.) With `out`, of 16 bits, e goes there instead.
// Rows begin at multiples of 16 bytes, z_step and out_step numbers behind each other; what lies between their ends is written too. A thread keeps
// what it has read: a row of up to KEPT blockDim vectors is read once.
#define KEPT 8
#define REALS (16 / (int)sizeof(REAL))
extern "C" __global__ void online_exp(REAL* z, long long z_step, int n, REAL* m, REAL* total, REAL* shrink, ACT* out, long long out_step) {
    extern __shared__ REAL shared[];
    z += blockIdx.x * z_step;
    out += out ? blockIdx.x * out_step : 0;
    const REAL before = m[blockIdx.x];
    const int beyond = KEPT * REALS * blockDim.x + threadIdx.x;
    REAL largest = before;
    Vector<REAL, REALS> kept[KEPT];
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        const int j = (i * blockDim.x + threadIdx.x) * REALS;
        if (j < n) kept[i] = *(const Vector<REAL, REALS>*)(z + j);
#pragma unroll
        for (int l = 0; l < REALS; l++)
            if (j + l < n && kept[i].at[l] > largest) largest = kept[i].at[l];
    }
    for (int j = beyond; j < n; j += blockDim.x) largest = z[j] > largest ? z[j] : largest;
    largest = block_max(largest, shared);
    REAL sum = 0;
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        const int j = (i * blockDim.x + threadIdx.x) * REALS;
        if (j >= n) continue;
        Vector<ACT, REALS> narrow;
#pragma unroll
        for (int l = 0; l < REALS; l++) {
            const REAL e = j + l < n ? exp(kept[i].at[l] - largest) : REAL(0);
            sum += e;
            kept[i].at[l] = e;
            narrow.at[l] = e;
        }
        if (out) *(Vector<ACT, REALS>*)(out + j) = narrow;
        else *(Vector<REAL, REALS>*)(z + j) = kept[i];
    }
    for (int j = beyond; j < n; j += blockDim.x) {
        const REAL e = exp(z[j] - largest);
        sum += e;
        if (out) out[j] = e;
        else z[j] = e;
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) {
        shrink[blockIdx.x] = exp(before - largest);
        total[blockIdx.x] = total[blockIdx.x] * shrink[blockIdx.x] + sum;
        m[blockIdx.x] = largest;
    }
}
