// The system calls that change files, each counted; at call number `at` the process ends, or the call fails. Loaded with LD_PRELOAD.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum { COUNT, BEFORE, AFTER, NO_SPACE, IO_ERROR, SHORT_WRITE };
static int mode = -1, at, calls;

int arm(int how, int number) { mode = how; at = number; calls = 0; return 0; }
int disarm(void) { mode = -1; return calls; }

// 1 when this call is to fail; ends the process before it
static int begins(void) {
    if (mode < 0 || ++calls != at) return 0;
    if (mode == BEFORE) _exit(9);
    if (mode == NO_SPACE) { errno = ENOSPC; return 1; }
    if (mode == IO_ERROR) { errno = EIO; return 1; }
    return 0;
}
static void ends(void) { if (mode == AFTER && calls == at) _exit(9); }

#define WRAP(type, name, parameters, arguments)                                      \
    type name parameters {                                                           \
        static type(*real) parameters;                                               \
        if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, #name);               \
        if (begins()) return -1;                                                     \
        type result = real arguments;                                                \
        ends();                                                                      \
        return result;                                                               \
    }

WRAP(int, fsync, (int f), (f))
WRAP(int, fdatasync, (int f), (f))
WRAP(int, rename, (const char *a, const char *b), (a, b))
WRAP(int, renameat, (int d, const char *a, int e, const char *b), (d, a, e, b))
WRAP(int, unlink, (const char *a), (a))
WRAP(int, unlinkat, (int d, const char *a, int flags), (d, a, flags))
WRAP(int, rmdir, (const char *a), (a))
WRAP(int, mkdir, (const char *a, mode_t m), (a, m))
WRAP(int, mkdirat, (int d, const char *a, mode_t m), (d, a, m))
WRAP(int, chmod, (const char *a, mode_t m), (a, m))
WRAP(int, ftruncate, (int f, off_t n), (f, n))
WRAP(int, ftruncate64, (int f, off_t n), (f, n))

ssize_t write(int f, const void *data, size_t n) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = (ssize_t(*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
    if (f < 3) return real(f, data, n);
    if (begins()) return -1;
    ssize_t result = real(f, data, mode == SHORT_WRITE && calls == at ? (n + 1) / 2 : n);
    ends();
    return result;
}

#define OPEN(name)                                                                   \
    int name(const char *path, int flags, ...) {                                     \
        static int (*real)(const char *, int, ...);                                  \
        if (!real) real = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name);  \
        va_list more; va_start(more, flags); mode_t m = va_arg(more, mode_t); va_end(more); \
        int writes = flags & (O_WRONLY | O_RDWR | O_CREAT);                          \
        if (writes && begins()) return -1;                                           \
        int result = real(path, flags, m);                                           \
        if (writes) ends();                                                          \
        return result;                                                               \
    }
OPEN(open)
OPEN(open64)
