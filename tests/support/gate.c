/*
 * A gate in front of some of QEMU's system calls, loaded with LD_PRELOAD by the tests of failures.
 *
 * A phase of a snapshot lasts for microseconds, so that nothing can be sent to QEMU "during" it by
 * chance. Here a call can be held until the test lets it go on, or be made to fail. The test and
 * this code share one page, the file that LAB_GATES names: an array of struct gate by the order of
 * the names in gate.py. Calls that no gate is shut for go to the kernel as they are.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { OPEN, HOLD, FAIL, SILENT };
enum { REGISTER, PROTECT, RELEASE, WAKE, UNREGISTER, CLOSE, READ, WRITE, TRUNCATE, GATES };

struct gate {
    _Atomic int state;
    _Atomic int error; /* errno of a call that fails */
    _Atomic int skip;  /* calls to let pass before */
    _Atomic int hits;  /* calls that were held, or failed */
};

static struct gate *gates;
static int (*real_ioctl)(int, unsigned long, ...);
static int (*real_close)(int);
static ssize_t (*real_read)(int, void *, size_t);
static ssize_t (*real_writev)(int, const struct iovec *, int);
static int (*real_ftruncate)(int, off_t);

__attribute__((constructor)) static void attach(void)
{
    const char *path = getenv("LAB_GATES");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    void *page;

    real_ioctl = dlsym(RTLD_NEXT, "ioctl");
    real_close = dlsym(RTLD_NEXT, "close");
    real_read = dlsym(RTLD_NEXT, "read");
    real_writev = dlsym(RTLD_NEXT, "writev");
    real_ftruncate = dlsym(RTLD_NEXT, "ftruncate64");
    if (fd < 0) {
        return;
    }
    page = mmap(NULL, GATES * sizeof(struct gate), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (page != MAP_FAILED) {
        gates = page;
    }
}

static int gate_of(unsigned long request, const void *argument)
{
    switch (request) {
    case UFFDIO_REGISTER:
        return REGISTER;
    case UFFDIO_WRITEPROTECT:
        return ((const struct uffdio_writeprotect *)argument)->mode & UFFDIO_WRITEPROTECT_MODE_WP
                   ? PROTECT : RELEASE;
    case UFFDIO_WAKE:
        return WAKE;
    case UFFDIO_UNREGISTER:
        return UNREGISTER;
    default:
        return -1;
    }
}

/* Whether a call is to fail; returns after it was held, if it was. */
static bool fails(int number)
{
    struct gate *gate = &gates[number];

    if (gate->state == OPEN || atomic_fetch_sub(&gate->skip, 1) > 0) {
        return false;
    }
    atomic_fetch_add(&gate->hits, 1);
    if (gate->state == FAIL) {
        errno = gate->error;
        return true;
    }
    while (gate->state == HOLD) {
        nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
    }
    return false;
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list list;
    void *argument;
    int number;

    va_start(list, request);
    argument = va_arg(list, void *);
    va_end(list);

    number = gates ? gate_of(request, argument) : -1;
    if (number == RELEASE && gates[number].state == SILENT) {
        /* As if all had been woken before somebody began to wait. */
        ((struct uffdio_writeprotect *)argument)->mode |= UFFDIO_WRITEPROTECT_MODE_DONTWAKE;
        atomic_fetch_add(&gates[number].hits, 1);
        return real_ioctl(fd, request, argument);
    }
    if (number == WAKE && gates[number].state == SILENT) {
        atomic_fetch_add(&gates[number].hits, 1);
        return 0;
    }
    return number >= 0 && fails(number) ? -1 : real_ioctl(fd, request, argument);
}

static bool may_be_written(int fd)
{
    struct stat status;

    return !fstat(fd, &status) && S_ISREG(status.st_mode) &&
           (fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDONLY;
}

/* Of a file that was written to. It is closed even if that fails, as by the kernel. */
int close(int fd)
{
    bool written = gates && gates[CLOSE].state != OPEN && may_be_written(fd);
    int result = real_close ? real_close(fd) : (int)syscall(SYS_close, fd);

    return written && fails(CLOSE) ? -1 : result;
}

static bool is_userfaultfd(int fd)
{
    static const char name[] = "anon_inode:[userfaultfd]";
    char path[32], target[sizeof(name)];

    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    return readlink(path, target, sizeof(target)) == sizeof(name) - 1 &&
           !memcmp(target, name, sizeof(name) - 1);
}

/* Of what the kernel says about faults. */
ssize_t read(int fd, void *buffer, size_t size)
{
    if (gates && gates[READ].state != OPEN && is_userfaultfd(fd) && fails(READ)) {
        return -1;
    }
    /* Others read before this was set up. */
    return real_read ? real_read(fd, buffer, size) : syscall(SYS_read, fd, buffer, size);
}

/* Of a stream into a file. */
ssize_t writev(int fd, const struct iovec *parts, int count)
{
    if (gates && gates[WRITE].state != OPEN && may_be_written(fd) && fails(WRITE)) {
        return -1;
    }
    return real_writev ? real_writev(fd, parts, count) : syscall(SYS_writev, fd, parts, count);
}

/* QEMU is built for large files, and calls this one. */
int ftruncate64(int fd, off_t size)
{
    if (gates && gates[TRUNCATE].state != OPEN && fails(TRUNCATE)) {
        return -1;
    }
    return real_ftruncate ? real_ftruncate(fd, size) : (int)syscall(SYS_ftruncate, fd, size);
}
