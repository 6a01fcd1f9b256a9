#!/bin/sh
# Writing to a write-protected page through /proc/PID/mem or ptrace fails; it raises no fault.
#
# One would guess: a debugger's write waits until the userfaultfd's owner has let the page go,
#   like a write by the process itself, or it passes by the protection.
# What is so: it fails at once with EIO, the owner hears nothing, and the page stays as it was.
#   process_vm_writev, which does nearly the same, does raise the fault and waits for its answer.
# Seen with: Linux 6.18 on amd64.
# Output seen: /proc/self/mem: Input/output error, 0 faults
#              ptrace: Input/output error, 0 faults
#              process_vm_writev: Success, 1 faults
# Why it matters: a debugger that sets a breakpoint or a value in a guest's memory by way of the
#   emulator's process fails now and then while a live snapshot is taken, and works a moment later.
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
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
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

/* ptrace is for a process other than oneself, so this one is looked at by its child. */
static int poke_by_child(char *page)
{
    pid_t parent = getpid();
    must(!prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY) || errno == EINVAL, "PR_SET_PTRACER");
    pid_t child = fork();
    must(child >= 0, "fork");
    if (!child) {
        long thread = parent;
        if (ptrace(PTRACE_ATTACH, thread, 0, 0) || waitpid(thread, NULL, __WALL) < 0) {
            _exit(255);
        }
        int error = ptrace(PTRACE_POKEDATA, thread, page, 0L) ? errno : 0;
        ptrace(PTRACE_DETACH, thread, 0, 0);
        _exit(error);
    }
    int status;
    while (waitpid(child, &status, 0) < 0) {
        must(errno == EINTR, "waitpid");
    }
    must(WIFEXITED(status) && WEXITSTATUS(status) != 255, "ptrace");
    return WEXITSTATUS(status);
}

static int seen(const char *name, int error, int expected_error, int expected_faults)
{
    printf("%s: %s, %d faults\n", name, strerror(error), faults);
    return error == expected_error && faults == expected_faults;
}

int main(void)
{
    pthread_t server;
    uffd = new_uffd();
    must(!pthread_create(&server, NULL, serve, NULL), "pthread_create");
    char *memory = protected_memory(-1);
    struct iovec from = {"y", 1}, to = {memory + PAGE, 1};
    int fd = open("/proc/self/mem", O_RDWR | O_CLOEXEC);

    must(fd >= 0, "/proc/self/mem");
    int error = pwrite(fd, "y", 1, (uintptr_t)memory) == 1 ? 0 : errno;
    int ok = seen("/proc/self/mem", error, EIO, 0) && *memory == 'x';
    ok &= seen("ptrace", poke_by_child(memory), EIO, 0) && *memory == 'x';
    error = process_vm_writev(getpid(), &from, 1, &to, 1, 0) == 1 ? 0 : errno;
    ok &= seen("process_vm_writev", error, 0, 1) && memory[PAGE] == 'y';
    return !ok;
}
END
gcc -O1 -Wall -pthread -o "$work/finding" "$work/finding.c"
uname -sr
"$work/finding"
