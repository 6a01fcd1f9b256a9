#!/bin/sh
# Merging equal pages (KSM) takes userfaultfd write protection off them, and nothing tells.
#
# One would guess: a page that is write-protected by userfaultfd either is not merged, or is
#   still protected afterwards: a merged page is read-only anyway, so the kernel sees the write.
# What is so: the merge makes a new page table entry without the protection bit.  The next write
#   is served by copy on write, and no fault reaches the userfaultfd.  Of equal pages only the
#   first, to which the others are added, keeps its bit.
# Seen with: Linux 6.18 on amd64.
# Output seen: with KSM: 63 of 64 pages lost their protection; 64 writes, 1 faults
#              without KSM: 0 of 64 pages lost their protection; 64 writes, 64 faults
# Why it matters: a live snapshot then holds what the guest wrote after its instant.  QEMU offers
#   guest memory for merging by default (`-machine mem-merge=on`), and some hosts run KSM.
#
# Needs: root, gcc, flock.  It runs KSM for some seconds, and puts the settings back also when it
# is killed; it does not run beside something else that holds the lock on KSM's `run` file.

set -eu
ksm=/sys/kernel/mm/ksm
test -w "$ksm/run" || { echo "needs root, and a kernel with KSM" >&2; exit 1; }
work=$(mktemp -d)
exec 8< "$ksm/run"
flock -n 8 || { rm -r "$work"; echo "something else has KSM running; try later" >&2; exit 1; }

# In this order; it is put back in the opposite one.
names="sleep_millisecs pages_to_scan run"
before=$(cd "$ksm" && cat $names)

# Waits for the end of this script, however it ends, and puts everything back.
mkfifo "$work/alive"
(
    trap '' HUP INT TERM
    cat "$work/alive" > "$work/nothing"
    set -- $before
    echo "$3" > "$ksm/run"
    echo "$2" > "$ksm/pages_to_scan"
    echo "$1" > "$ksm/sleep_millisecs"
    rm -r "$work"
) &
restorer=$!
exec 9> "$work/alive"
trap 'exec 9>&-; wait "$restorer"' EXIT
trap 'exit 1' HUP INT TERM

cat > "$work/merge.c" << 'END'
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
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

enum { PAGE = 4096, PAGES = 64 };
#define PROTECTED (UINT64_C(1) << 57)

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
        .range = {start, size},
        .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0,
    };
    must(!ioctl(uffd, UFFDIO_WRITEPROTECT, &arg), "UFFDIO_WRITEPROTECT");
}

static void *serve(void *unused)
{
    struct uffd_msg msg;
    while (read(uffd, &msg, sizeof(msg)) == sizeof(msg)) {
        __atomic_add_fetch(&faults, 1, __ATOMIC_RELAXED);
        protect(msg.arg.pagefault.address & -(uint64_t)PAGE, PAGE, 0);
    }
    return unused;
}

static int protected_pages(char *memory)
{
    uint64_t entries[PAGES];
    int count = 0, fd = open("/proc/self/pagemap", O_RDONLY);
    must(pread(fd, entries, sizeof(entries), (uintptr_t)memory / PAGE * 8) == sizeof(entries),
         "pagemap");
    close(fd);
    for (int i = 0; i < PAGES; i++) {
        count += (entries[i] & PROTECTED) != 0;
    }
    return count;
}

int main(int argc, char **argv)
{
    int merge = argc > 1 && !strcmp(argv[1], "merge");
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP};
    pthread_t server;
    char *memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct uffdio_register reg = {
        .range = {(uintptr_t)memory, PAGES * PAGE}, .mode = UFFDIO_REGISTER_MODE_WP,
    };

    uffd = syscall(SYS_userfaultfd, O_CLOEXEC);
    must(uffd >= 0, "userfaultfd");
    must(!ioctl(uffd, UFFDIO_API, &api), "UFFDIO_API");
    must(!madvise(memory, PAGES * PAGE, MADV_NOHUGEPAGE), "MADV_NOHUGEPAGE");
    memset(memory, 'x', PAGES * PAGE);
    must(!ioctl(uffd, UFFDIO_REGISTER, &reg), "UFFDIO_REGISTER");
    protect((uintptr_t)memory, PAGES * PAGE, 1);
    must(protected_pages(memory) == PAGES, "protection");
    must(!pthread_create(&server, NULL, serve, NULL), "pthread_create");

    if (merge) {
        must(!madvise(memory, PAGES * PAGE, MADV_MERGEABLE), "MADV_MERGEABLE");
        for (int i = 0; i < 300 && protected_pages(memory) > 1; i++) {
            usleep(100000);
        }
    }
    int left = protected_pages(memory);
    for (int i = 0; i < PAGES; i++) {
        ((volatile char *)memory)[i * PAGE] = 'y';
    }
    printf("%s: %d of %d pages lost their protection; %d writes, %d faults\n",
           merge ? "with KSM" : "without KSM", PAGES - left, PAGES, PAGES, faults);
    return !(faults == left && (merge ? left <= 1 : left == PAGES));
}
END
gcc -O1 -pthread -o "$work/merge" "$work/merge.c"

uname -sr
"$work/merge" alone 9>&-
echo 0 > "$ksm/sleep_millisecs"
echo 1000 > "$ksm/pages_to_scan"
echo 1 > "$ksm/run"
"$work/merge" merge 9>&-
