// CUDA features that C++ lacks, placed before a source. The threads of a block are fibers of one CPU thread: each runs until it has to
// wait for its warp or its block, and one warp runs ahead of the others as far as it can. A missing synchronisation therefore gives a
// wrong result every time: data are read before they are written, or overwritten before they are read.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#include <ucontext.h>

using std::erfc, std::exp, std::exp2, std::min, std::sqrt, std::tanh;
struct Dim { int x = 1, y = 1, z = 1; };
struct uint4 { unsigned x, y, z, w; };
static Dim gridDim, blockDim, threadIdx, blockIdx;
#define __global__
#define __device__ inline
#define __shared__
#define __launch_bounds__(...)
alignas(16) static char shared_memory[65536];

enum Waits { nobody, block, warp, over };
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[1 << 17]};
    Waits waits = nobody;
};
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static int running = -1;  // no fibers: one thread, which never waits
static std::function<void()> body;

static void wait_for(Waits whom) {
    if (running < 0) return;
    fibers[running].waits = whom;
    swapcontext(&fibers[running].context, &scheduler);
}
static void __syncthreads() { wait_for(block); }

static void start() {
    body();
    fibers[running].waits = over;
    swapcontext(&fibers[running].context, &scheduler);
}

static void resume(int i) {
    running = threadIdx.x = i;
    swapcontext(&scheduler, &fibers[i].context);
}

// Run a warp until all its threads wait for the block or have ended. False: some wait for others of the warp that never arrive.
static bool run_warp(int first, int end) {
    for (;;) {
        int together = 0, blocked = 0;
        for (int i = first; i < end; i++) {
            if (fibers[i].waits == nobody) resume(i);
            together += fibers[i].waits == warp;
            blocked += fibers[i].waits == block || fibers[i].waits == over;
        }
        if (blocked == end - first) return true;
        if (together != end - first) return false;
        for (int i = first; i < end; i++) fibers[i].waits = nobody;
    }
}

// Run a block: one warp runs ahead as far as it can, in odd blocks the last, else the first. False: some threads wait for ever.
static bool run_block(int threads, bool backwards) {
    const int warps = (threads + 31) / 32;
    for (int over_now = 0; over_now < threads;) {
        for (int i = 0; i < warps; i++) {
            const int w = backwards ? warps - 1 - i : i;
            if (!run_warp(32 * w, std::min(32 * w + 32, threads))) return false;
        }
        over_now = 0;
        for (auto& f : fibers) over_now += f.waits == over;
        if (over_now != 0 && over_now != threads) return false;
        for (auto& f : fibers)
            if (f.waits == block) f.waits = nobody;
    }
    return true;
}

template <class F> static int launch_(F kernel, int grid, int threads) {
    gridDim.x = grid;
    blockDim.x = threads;
    body = kernel;
    threadIdx.x = 0;
    if (threads == 1) {
        for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++) body();
        return 0;
    }
    for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++) {
        fibers = std::vector<Fiber>(threads);
        for (auto& f : fibers) {
            getcontext(&f.context);
            f.context.uc_stack.ss_sp = f.stack.get();
            f.context.uc_stack.ss_size = 1 << 17;
            makecontext(&f.context, start, 0);
        }
        const bool good = run_block(threads, blockIdx.x % 2);
        running = -1;
        if (!good) return 1;
    }
    return 0;
}

// The value of lane `lane`, for all threads of the warp.
template <class T> static T of_lane(T value, int lane) {
    static T values[1024];
    values[threadIdx.x] = value;
    wait_for(warp);
    T result = values[threadIdx.x / 32 * 32 + lane];
    wait_for(warp);
    return result;
}
template <class T> static T __shfl_xor_sync(unsigned, T value, int mask) { return of_lane(value, threadIdx.x % 32 ^ mask); }

// ldmatrix.x4 of 8 x 8 matrices of 16-bit numbers: lane 8 i + r gives row r of matrix i, of 16 bytes at a multiple of 16.
static void emulated_ldmatrix(unsigned* result, const void* row, bool transpose) {
    static const unsigned short* rows[1024];
    const int first = threadIdx.x / 32 * 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    if ((size_t)row % 16) std::abort();
    rows[threadIdx.x] = (const unsigned short*)row;
    wait_for(warp);
    for (int i = 0; i < 4; i++) {
        const unsigned short** matrix = rows + first + 8 * i;
        result[i] = transpose ? matrix[2 * t][g] | (unsigned)matrix[2 * t + 1][g] << 16 : matrix[g][2 * t] | (unsigned)matrix[g][2 * t + 1] << 16;
    }
    wait_for(warp);
}

// cp.async: in every other block it is done at once, in the others when it is waited for, so that what comes too early or too late goes wrong.
struct Copy { void* to; const void* from; int bytes; bool there; };
static std::vector<Copy> copies[1024];
static void complete(const Copy& c) {
    if (c.there) std::memcpy(c.to, c.from, c.bytes);
    else std::memset(c.to, 0, c.bytes);
}
static void emulated_copy(void* to, const void* from, int bytes, bool there) {
    if ((size_t)to % bytes || (there && (size_t)from % bytes)) std::abort();
    if (blockIdx.x % 2) complete({to, from, bytes, there});
    else copies[threadIdx.x].push_back({to, from, bytes, there});
}
static void emulated_wait_for_copies() {
    for (auto& c : copies[threadIdx.x]) complete(c);
    copies[threadIdx.x].clear();
}

// mma.sync.m16n8k16 (two numbers of T per word) or m16n8k8 (one), with the operand layouts of PTX over the lanes. No rounding to TF32.
template <class T> static void emulated_mma(float* c, const unsigned* a, unsigned b0, unsigned b1) {
    struct Words { unsigned a[4], b[2]; };
    static Words words[1024];
    const int first = threadIdx.x / 32 * 32, lane = threadIdx.x % 32, in_word = 4 / sizeof(T);
    words[threadIdx.x] = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    wait_for(warp);
    auto number = [](unsigned word, int i) { T numbers[4 / sizeof(T)]; std::memcpy(numbers, &word, 4); return (float)numbers[i]; };
    float sums[4];
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        sums[i] = c[i];
        for (int w = 0; w < 8; w++)
            for (int k = 0; k < in_word; k++)
                sums[i] += number(words[first + row % 8 * 4 + w % 4].a[row / 8 + w / 4 * 2], k) * number(words[first + column * 4 + w % 4].b[w / 4], k);
    }
    wait_for(warp);
    for (int i = 0; i < 4; i++) c[i] = sums[i];
}
