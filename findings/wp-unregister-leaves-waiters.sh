#!/bin/sh
# UFFDIO_UNREGISTER does not wake a thread that waits on a write-protect fault.
#
# One would guess: unregistering a range wakes whoever waits for a page in it, since nobody will
#   answer that fault any more.  For missing pages this is so.
# What is so: a thread that waits on a write-protected page sleeps on in handle_userfault.  The
#   protection is gone, and another thread writes to that very page meanwhile, unhindered.  Only
#   UFFDIO_WAKE, or the last close of the descriptor, lets the thread go.
# Seen with: Linux 6.18 on amd64.
# Output seen: missing: awake after UFFDIO_UNREGISTER
#              write-protect: asleep in handle_userfault after UFFDIO_UNREGISTER, page writable
#              write-protect: awake after UFFDIO_WAKE
# Why it matters: a snapshot that ends by unregistering the memory leaves a virtual CPU standing
#   until the descriptor is closed.  Wake the whole range after it is unregistered.
#
# Needs: root (or vm.unprivileged_userfaultfd=1), gcc.

set -eu
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
trap 'exit 1' HUP INT TERM

cat > "$work/finding.c" << 'END'
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

enum { PAGE = 4096 };

static int uffd, written;
static long writer_id;

static void must(int ok, const char *what)
{
    if (!ok) {
        perror(what);
        exit(1);
    }
}

static void *writer(void *page)
{
    writer_id = syscall(SYS_gettid);
    *(volatile char *)page = 'w';
    __atomic_store_n(&written, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

/* Whether the thread has written, within half a second. */
static int awake(void)
{
    for (int i = 0; i < 50 && !__atomic_load_n(&written, __ATOMIC_SEQ_CST); i++) {
        usleep(10000);
    }
    return __atomic_load_n(&written, __ATOMIC_SEQ_CST);
}

static int sleeps_in_handle_userfault(void)
{
    char path[64], where[64] = "";
    snprintf(path, sizeof(path), "/proc/self/task/%ld/wchan", writer_id);
    int fd = open(path, O_RDONLY);
    must(fd >= 0 && read(fd, where, sizeof(where) - 1) > 0, "wchan");
    close(fd);
    return !strcmp(where, "handle_userfault");
}

static pthread_t fault_and_unregister(char *page, int mode)
{
    struct uffdio_register reg = {.range = {(uintptr_t)page, PAGE}, .mode = mode};
    struct uffdio_writeprotect protect = {
        .range = reg.range, .mode = UFFDIO_WRITEPROTECT_MODE_WP,
    };
    struct pollfd fault = {.fd = uffd, .events = POLLIN};
    pthread_t thread;

    must(!ioctl(uffd, UFFDIO_REGISTER, &reg), "UFFDIO_REGISTER");
    if (mode == UFFDIO_REGISTER_MODE_WP) {
        must(!ioctl(uffd, UFFDIO_WRITEPROTECT, &protect), "UFFDIO_WRITEPROTECT");
    }
    written = 0;
    must(!pthread_create(&thread, NULL, writer, page), "pthread_create");
    must(poll(&fault, 1, 10000) == 1, "no fault");
    must(!ioctl(uffd, UFFDIO_UNREGISTER, &reg.range), "UFFDIO_UNREGISTER");
    return thread;
}

int main(void)
{
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP};
    char *memory = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *page = memory + PAGE;
    struct uffdio_range range = {(uintptr_t)page, PAGE};
    pthread_t thread;

    uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    must(uffd >= 0, "userfaultfd");
    must(!ioctl(uffd, UFFDIO_API, &api), "UFFDIO_API");

    thread = fault_and_unregister(memory, UFFDIO_REGISTER_MODE_MISSING);
    int missing_awake = awake();
    printf("missing: %s after UFFDIO_UNREGISTER\n", missing_awake ? "awake" : "asleep");
    must(missing_awake, "missing");
    pthread_join(thread, NULL);

    *page = 'x';
    thread = fault_and_unregister(page, UFFDIO_REGISTER_MODE_WP);
    int asleep = !awake() && sleeps_in_handle_userfault();
    *(volatile char *)page = 'm';
    printf("write-protect: %s after UFFDIO_UNREGISTER, page writable\n",
           asleep ? "asleep in handle_userfault" : "awake");
    must(!ioctl(uffd, UFFDIO_WAKE, &range), "UFFDIO_WAKE");
    pthread_join(thread, NULL);
    printf("write-protect: awake after UFFDIO_WAKE\n");
    return !asleep;
}
END
gcc -O1 -Wall -pthread -o "$work/finding" "$work/finding.c"
uname -sr
"$work/finding"
