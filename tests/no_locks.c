/* Preloaded: a disk that refuses locks, as network disks without a lock service do. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <sys/file.h>

int flock(int file, int operation) {
    errno = ENOLCK;
    return -1;
}

static int locks(int command) {
    return command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || command == F_OFD_SETLKW;
}

#define REAL(name)                                                                                                    \
    int name(int file, int command, ...) {                                                                            \
        static int (*real)(int, int, void *);                                                                         \
        va_list rest;                                                                                                 \
        va_start(rest, command);                                                                                      \
        void *argument = va_arg(rest, void *);                                                                        \
        va_end(rest);                                                                                                 \
        if (locks(command)) {                                                                                         \
            errno = ENOLCK;                                                                                           \
            return -1;                                                                                                \
        }                                                                                                             \
        if (!real) real = (int (*)(int, int, void *))dlsym(RTLD_NEXT, #name);                                         \
        return real(file, command, argument);                                                                         \
    }

REAL(fcntl)
REAL(fcntl64)
