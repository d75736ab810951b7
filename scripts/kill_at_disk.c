/* Preloaded: counts what a process does to files below a folder, and kills it at the n-th time.
 *
 *   kill_at(root, op, pattern, n, log)
 *
 * root: "" counts nothing. op: open (for writing), write, half (a write of which half is done), sync, rename, unlink or
 * truncate. pattern: of a path below root, see fnmatch(3). n: from 1; 0: never. log: gets a line "op path" each time.
 * A process that is forked goes on counting for itself. What stdio writes from its own buffer is not seen.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX], wanted[16], pattern[PATH_MAX];
static size_t length;
static int log_to = -1;
static atomic_long left;

void kill_at(const char *folder, const char *op, const char *path, long n, const char *log) {
    length = 0;
    if (log_to >= 0) syscall(SYS_close, log_to);
    log_to = *log ? (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND, 0644) : -1;
    snprintf(wanted, sizeof wanted, "%s", op);
    snprintf(pattern, sizeof pattern, "%s", path);
    snprintf(root, sizeof root, "%s/", folder);
    atomic_store(&left, n);
    length = *folder ? strlen(root) : 0;
}

/* 1 where a write is to be torn: its caller does half of it and calls die(). */
static int seen(const char *op, const char *path) {
    char whole[2 * PATH_MAX];
    if (!length || !path) return 0;
    if (*path != '/') {
        long got = syscall(SYS_getcwd, whole, PATH_MAX);
        if (got <= 0) return 0;
        snprintf(whole + got - 1, sizeof whole - got, "/%s", path);
        path = whole;
    }
    if (strncmp(path, root, length)) return 0;
    path += length;
    if (log_to >= 0) {
        char line[PATH_MAX + 32];
        int count = snprintf(line, sizeof line, "%s %s\n", op, path);
        syscall(SYS_write, log_to, line, count);
    }
    int torn = !strcmp(wanted, "half") && !strcmp(op, "write");
    if ((torn || !strcmp(wanted, op)) && !fnmatch(pattern, path, 0) && atomic_fetch_sub(&left, 1) == 1) {
        if (torn) return 1;
        syscall(SYS_kill, getpid(), SIGKILL);
    }
    return 0;
}

static void die(void) {
    syscall(SYS_kill, getpid(), SIGKILL);
}

static int seen_file(const char *op, int file) {
    char link[64], path[PATH_MAX];
    if (!length) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    long count = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    if (count <= 0) return 0;
    path[count] = 0;
    return seen(op, path);
}

#define NEXT(type, name, ...) static type (*next)(__VA_ARGS__); if (!next) next = dlsym(RTLD_NEXT, name)
#define WRITES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))

#define OPEN(name) int name(const char *path, int flags, ...) { \
    NEXT(int, #name, const char *, int, ...); va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); \
    va_end(rest); if (WRITES(flags)) seen("open", path); return next(path, flags, mode); }
OPEN(open) OPEN(open64)

#define OPENAT(name) int name(int folder, const char *path, int flags, ...) { \
    NEXT(int, #name, int, const char *, int, ...); va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); \
    va_end(rest); if (WRITES(flags)) seen("open", path); return next(folder, path, flags, mode); }
OPENAT(openat) OPENAT(openat64)

#define FOPEN(name) FILE *name(const char *path, const char *mode) { \
    NEXT(FILE *, #name, const char *, const char *); \
    if (strpbrk(mode, "wa+")) { seen("open", path); } return next(path, mode); }
FOPEN(fopen) FOPEN(fopen64)

ssize_t write(int file, const void *data, size_t count) {
    NEXT(ssize_t, "write", int, const void *, size_t);
    if (seen_file("write", file)) { next(file, data, count / 2); die(); }
    return next(file, data, count);
}

#define PWRITE(name, offset_type) ssize_t name(int file, const void *data, size_t count, offset_type at) { \
    NEXT(ssize_t, #name, int, const void *, size_t, offset_type); \
    if (seen_file("write", file)) { next(file, data, count / 2, at); die(); } return next(file, data, count, at); }
PWRITE(pwrite, off_t) PWRITE(pwrite64, off64_t)

ssize_t writev(int file, const struct iovec *parts, int count) {
    NEXT(ssize_t, "writev", int, const struct iovec *, int);
    if (seen_file("write", file)) { next(file, parts, count / 2); die(); }
    return next(file, parts, count);
}

#define SENDFILE(name, offset_type) ssize_t name(int to, int from, offset_type *at, size_t count) { \
    NEXT(ssize_t, #name, int, int, offset_type *, size_t); \
    if (seen_file("write", to)) { next(to, from, at, 1); die(); } return next(to, from, at, count); }
SENDFILE(sendfile, off_t) SENDFILE(sendfile64, off64_t)

ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *where, size_t count, unsigned flags) {
    NEXT(ssize_t, "copy_file_range", int, off64_t *, int, off64_t *, size_t, unsigned);
    if (seen_file("write", to)) { next(from, at, to, where, 1, flags); die(); }
    return next(from, at, to, where, count, flags);
}

#define SYNC(name) int name(int file) { NEXT(int, #name, int); seen_file("sync", file); return next(file); }
SYNC(fsync) SYNC(fdatasync)

#define CUT(name, offset_type) int name(int file, offset_type size) { \
    NEXT(int, #name, int, offset_type); seen_file("truncate", file); return next(file, size); }
CUT(ftruncate, off_t) CUT(ftruncate64, off64_t)

#define CUT_PATH(name, offset_type) int name(const char *path, offset_type size) { \
    NEXT(int, #name, const char *, offset_type); seen("truncate", path); return next(path, size); }
CUT_PATH(truncate, off_t) CUT_PATH(truncate64, off64_t)

int rename(const char *from, const char *to) {
    NEXT(int, "rename", const char *, const char *);
    seen("rename", to);
    return next(from, to);
}

int renameat(int a, const char *from, int b, const char *to) {
    NEXT(int, "renameat", int, const char *, int, const char *);
    seen("rename", to);
    return next(a, from, b, to);
}

int unlink(const char *path) {
    NEXT(int, "unlink", const char *);
    seen("unlink", path);
    return next(path);
}

int unlinkat(int folder, const char *path, int flags) {
    NEXT(int, "unlinkat", int, const char *, int);
    if (*path == '/') seen("unlink", path);
    return next(folder, path, flags);
}
