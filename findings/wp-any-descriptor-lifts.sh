#!/bin/sh
# Any userfaultfd of a process can lift the write protection that another one put on.
#
# One would guess: a range belongs to the descriptor that registered it, and the others get an
#   error for it.  UFFDIO_REGISTER says EBUSY, and UFFDIO_UNREGISTER says EINVAL.
# What is so: UFFDIO_WRITEPROTECT does not ask who registered the range.  A second descriptor of
#   the same process takes the protection off, gets success, and the first hears of no write.
# Seen with: Linux 6.18 on amd64.
# Output seen: second descriptor, register: Device or resource busy
#              second descriptor, unregister: Invalid argument
#              second descriptor, unprotect: Success, then 1 write, 0 faults
# Why it matters: two parts of an emulator that each use userfaultfd (postcopy, a snapshot, a
#   library that watches its own memory) are not kept apart by the kernel.
#
# Needs: root (or vm.unprivileged_userfaultfd=1), gcc.

set -eu
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
trap 'exit 1' HUP INT TERM

cat > "$work/finding.c" << 'END'
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <linux/userfaultfd.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 16 };

static int uffd;
static volatile int faults;

static void must(int ok, const char *what)
{
    if (!ok) {
        perror(what);
        exit(1);
    }
}

static int new_uffd(void)
{
    struct uffdio_api api = {
        .api = UFFD_API,
        .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
    };
    int fd = syscall(SYS_userfaultfd, O_CLOEXEC);
    must(fd >= 0, "userfaultfd");
    must(!ioctl(fd, UFFDIO_API, &api), "UFFDIO_API");
    return fd;
}

static int change_protection(int fd, uintptr_t start, size_t size, int on)
{
    struct uffdio_writeprotect arg = {
        .range = {start, size}, .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0,
    };
    return ioctl(fd, UFFDIO_WRITEPROTECT, &arg) ? errno : 0;
}

static void *serve(void *unused)
{
    struct uffd_msg msg;
    while (read(uffd, &msg, sizeof(msg)) == sizeof(msg)) {
        __atomic_add_fetch(&faults, 1, __ATOMIC_SEQ_CST);
        must(!change_protection(uffd, msg.arg.pagefault.address & -(uint64_t)PAGE, PAGE, 0),
             "UFFDIO_WRITEPROTECT");
    }
    return unused;
}

/* Memory that is filled, registered and protected: of the file `fd`, or anonymous for -1. */
static char *protected_memory(int fd)
{
    size_t size = PAGES * PAGE;
    int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
    char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);
    struct uffdio_register reg = {
        .range = {(uintptr_t)memory, size}, .mode = UFFDIO_REGISTER_MODE_WP,
    };
    must(memory != MAP_FAILED, "mmap");
    must(!madvise(memory, size, MADV_NOHUGEPAGE), "MADV_NOHUGEPAGE");
    memset(memory, 'x', size);
    must(!ioctl(uffd, UFFDIO_REGISTER, &reg), "UFFDIO_REGISTER");
    must(!change_protection(uffd, (uintptr_t)memory, size, 1), "UFFDIO_WRITEPROTECT");
    faults = 0;
    return memory;
}

int main(void)
{
    pthread_t server;
    uffd = new_uffd();
    must(!pthread_create(&server, NULL, serve, NULL), "pthread_create");
    char *memory = protected_memory(-1);
    int second = new_uffd();
    struct uffdio_register reg = {
        .range = {(uintptr_t)memory, PAGES * PAGE}, .mode = UFFDIO_REGISTER_MODE_WP,
    };

    int error = ioctl(second, UFFDIO_REGISTER, &reg) ? errno : 0;
    printf("second descriptor, register: %s\n", strerror(error));
    int ok = error == EBUSY;
    error = ioctl(second, UFFDIO_UNREGISTER, &reg.range) ? errno : 0;
    printf("second descriptor, unregister: %s\n", strerror(error));
    ok &= error == EINVAL;
    error = change_protection(second, (uintptr_t)memory, PAGE, 0);
    *(volatile char *)memory = 'y';
    printf("second descriptor, unprotect: %s, then 1 write, %d faults\n", strerror(error), faults);
    ok &= !error && !faults;
    /* What it left alone is still watched. */
    *(volatile char *)(memory + PAGE) = 'y';
    return !(ok && faults == 1);
}
END
gcc -O1 -Wall -pthread -o "$work/finding" "$work/finding.c"
uname -sr
"$work/finding"
