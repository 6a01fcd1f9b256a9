#!/bin/sh
# io_uring writes into a write-protected page of a registered buffer, and raises no fault.
#
# One would guess: whatever stores into the page through the kernel raises the same userfaultfd
#   fault as a write by the process itself; read(2) into it does.
# What is so: IORING_REGISTER_BUFFERS pins the page and remembers where it is.  Protection put on
#   later sits in the page table, which a fixed read does not pass: the data change, no fault
#   comes, and /proc/self/pagemap still shows the page as protected.
# Seen with: Linux 6.18 on amd64.
# Output seen: read(2): data changed, 1 faults, protected no
#              fixed read: data changed, 0 faults, protected yes
# Why it matters: a live snapshot of memory that is a registered buffer has the content of a later
#   time, and the pagemap bit cannot be used to find that out.  The same is to be expected of
#   whatever else pins pages for long (VFIO, RDMA); that was not tried here.
#
# Needs: root (or vm.unprivileged_userfaultfd=1), gcc, io_uring not disabled by sysctl.

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
#include <sys/uio.h>
#include <linux/io_uring.h>
#include <linux/userfaultfd.h>
#include <unistd.h>

enum { PAGE = 4096 };

static int uffd;
static volatile int faults;

static void must(int ok, const char *what)
{
    if (!ok) {
        perror(what);
        exit(1);
    }
}

static void protect(uintptr_t start, size_t size, int on)
{
    struct uffdio_writeprotect arg = {
        .range = {start, size}, .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0,
    };
    must(!ioctl(uffd, UFFDIO_WRITEPROTECT, &arg), "UFFDIO_WRITEPROTECT");
}

static void *serve(void *unused)
{
    struct uffd_msg msg;
    while (read(uffd, &msg, sizeof(msg)) == sizeof(msg)) {
        __atomic_add_fetch(&faults, 1, __ATOMIC_SEQ_CST);
        protect(msg.arg.pagefault.address & -(uint64_t)PAGE, PAGE, 0);
    }
    return unused;
}

static int is_protected(char *page)
{
    uint64_t entry;
    int fd = open("/proc/self/pagemap", O_RDONLY);
    must(pread(fd, &entry, 8, (uintptr_t)page / PAGE * 8) == 8, "pagemap");
    close(fd);
    return entry >> 57 & 1;
}

static int seen(const char *name, char *page, int expected_faults, int expected_protected)
{
    int changed = *page == 'y', guarded = is_protected(page);
    printf("%s: data %s, %d faults, protected %s\n", name, changed ? "changed" : "as before",
           faults, guarded ? "yes" : "no");
    return changed && faults == expected_faults && guarded == expected_protected;
}

int main(void)
{
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP};
    struct io_uring_params setup = {0};
    char *memory = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct uffdio_register reg = {
        .range = {(uintptr_t)memory, 2 * PAGE}, .mode = UFFDIO_REGISTER_MODE_WP,
    };
    struct iovec buffer = {memory, PAGE};
    pthread_t server;
    char data[PAGE];

    memset(memory, 'x', 2 * PAGE);
    memset(data, 'y', PAGE);
    int file = memfd_create("disk", MFD_CLOEXEC);
    must(pwrite(file, data, PAGE, 0) == PAGE, "pwrite");

    int ring = syscall(SYS_io_uring_setup, 1, &setup);
    must(ring >= 0, "io_uring_setup");
    must(!syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &buffer, 1), "register");
    char *queue = mmap(NULL, setup.sq_off.array + setup.sq_entries * sizeof(unsigned),
                       PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
    struct io_uring_sqe *entry = mmap(NULL, setup.sq_entries * sizeof(*entry),
                                      PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQES);
    must(queue != MAP_FAILED && entry != MAP_FAILED, "mmap");

    uffd = syscall(SYS_userfaultfd, O_CLOEXEC);
    must(uffd >= 0, "userfaultfd");
    must(!ioctl(uffd, UFFDIO_API, &api), "UFFDIO_API");
    must(!ioctl(uffd, UFFDIO_REGISTER, &reg), "UFFDIO_REGISTER");
    protect((uintptr_t)memory, 2 * PAGE, 1);
    must(!pthread_create(&server, NULL, serve, NULL), "pthread_create");

    must(pread(file, memory + PAGE, PAGE, 0) == PAGE, "pread");
    int ok = seen("read(2)", memory + PAGE, 1, 0);

    faults = 0;
    memset(entry, 0, sizeof(*entry));
    entry->opcode = IORING_OP_READ_FIXED;
    entry->fd = file;
    entry->addr = (uintptr_t)memory;
    entry->len = PAGE;
    ((unsigned *)(queue + setup.sq_off.array))[0] = 0;
    __atomic_store_n((unsigned *)(queue + setup.sq_off.tail), 1, __ATOMIC_RELEASE);
    must(syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) == 1, "enter");
    return !(seen("fixed read", memory, 0, 1) && ok);
}
END
gcc -O1 -Wall -pthread -o "$work/finding" "$work/finding.c"
uname -sr
"$work/finding"
