#!/bin/sh
# MADV_DONTNEED takes userfaultfd write protection off anonymous memory, and not off a memfd.
#
# One would guess: the two kinds of memory behave alike.  Either a page that is given back is
#   still watched, or it is not.
# What is so: in anonymous memory a given back page has lost its protection, and the next write to
#   it raises no fault.  MADV_FREE, which asks nearly the same, keeps the protection.  In a
#   shared mapping of a memfd a marker stays behind in the page table, even when the page is
#   punched out of the file with MADV_REMOVE or fallocate: the next write raises a fault.
# Seen with: Linux 6.18 on amd64.
# Output seen: anonymous MADV_DONTNEED: 0 faults
#              anonymous MADV_FREE: 1 faults
#              memfd MADV_DONTNEED: 1 faults
#              memfd MADV_REMOVE: 1 faults
#              memfd punched hole: 1 faults
# Why it matters: a balloon or free page reporting gives pages back during a live snapshot.  What
#   was in them is gone in both cases, but only with a memfd does the snapshot get to know, at
#   the next write.
#
# Needs: root (or vm.unprivileged_userfaultfd=1), gcc.

set -eu
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
trap 'exit 1' HUP INT TERM

cat > "$work/finding.c" << 'END'
#define _GNU_SOURCE
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

enum { PAGE = 4096 };

static int uffd, wrong;
static volatile int faults;

static void must(int ok, const char *what)
{
    if (!ok) {
        perror(what);
        exit(1);
    }
}

static void protect(uintptr_t start, int on)
{
    struct uffdio_writeprotect arg = {
        .range = {start, PAGE}, .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0,
    };
    must(!ioctl(uffd, UFFDIO_WRITEPROTECT, &arg), "UFFDIO_WRITEPROTECT");
}

static void *serve(void *unused)
{
    struct uffd_msg msg;
    while (read(uffd, &msg, sizeof(msg)) == sizeof(msg)) {
        __atomic_add_fetch(&faults, 1, __ATOMIC_SEQ_CST);
        protect(msg.arg.pagefault.address & -(uint64_t)PAGE, 0);
    }
    return unused;
}

/* Protects a page, gives it back by `advice` (or by a hole in the file for -1), writes to it. */
static void try(const char *name, int fd, int advice, int expected)
{
    int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
    char *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, flags, fd, 0);
    struct uffdio_register reg = {
        .range = {(uintptr_t)page, PAGE}, .mode = UFFDIO_REGISTER_MODE_WP,
    };

    *page = 'x';
    must(!ioctl(uffd, UFFDIO_REGISTER, &reg), "UFFDIO_REGISTER");
    protect((uintptr_t)page, 1);
    if (advice < 0) {
        must(!fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, PAGE), "fallocate");
    } else {
        must(!madvise(page, PAGE, advice), "madvise");
    }
    faults = 0;
    *(volatile char *)page = 'y';
    printf("%s: %d faults\n", name, faults);
    wrong |= faults != expected;
    munmap(page, PAGE);
}

int main(void)
{
    struct uffdio_api api = {
        .api = UFFD_API,
        .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
    };
    pthread_t server;
    int fd = memfd_create("guest", MFD_CLOEXEC);

    must(fd >= 0 && !ftruncate(fd, PAGE), "memfd");
    uffd = syscall(SYS_userfaultfd, O_CLOEXEC);
    must(uffd >= 0, "userfaultfd");
    must(!ioctl(uffd, UFFDIO_API, &api), "UFFDIO_API");
    must(!pthread_create(&server, NULL, serve, NULL), "pthread_create");

    try("anonymous MADV_DONTNEED", -1, MADV_DONTNEED, 0);
    try("anonymous MADV_FREE", -1, MADV_FREE, 1);
    try("memfd MADV_DONTNEED", fd, MADV_DONTNEED, 1);
    try("memfd MADV_REMOVE", fd, MADV_REMOVE, 1);
    try("memfd punched hole", fd, -1, 1);
    return wrong;
}
END
gcc -O1 -Wall -pthread -o "$work/finding" "$work/finding.c"
uname -sr
"$work/finding"
