/*
 * floor: what this kernel asks for the steps that a live snapshot is made of, with no VM.
 *
 * One invocation measures one block: one benchmark in one variant, in a process that does
 * nothing else, so that no block inherits another's memory, page tables or threads.  What it
 * allocates is not freed: it goes with the process.
 *
 *     floor BENCHMARK VARIANT [KEY=VALUE]...
 *
 * It prints, after everything has been measured:
 *
 *     sample STAGE PAGES NS     one timed step; PAGES of 4 KiB were handled in it
 *     count NAME VALUE          what really happened, for the caller to compare with what it asked
 *     skip REASON               this host cannot do it: nothing was measured
 *     error REASON              it should have worked: nothing is to be trusted
 *     done                      the last line of a block that was measured
 *
 * Times are CLOCK_MONOTONIC, in ns, the reading of the clock included (some 20 to 50 ns).
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* Headers may be older than the kernel that runs this. */
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif
#ifndef UFFD_FEATURE_WP_HUGETLBFS_SHMEM
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM (1 << 12)
#endif
#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif
#ifndef MAP_HUGE_2MB
#define MAP_HUGE_2MB (21 << 26)
#endif

enum {
    PAGE_BYTES = 4096,
    PAGE_WORDS = PAGE_BYTES / 8,
    HUGE_BYTES = 2 << 20,
    HUGE_PAGES = HUGE_BYTES / PAGE_BYTES,
    PAGES_PER_MIB = (1 << 20) / PAGE_BYTES,

    /* Between two faults, so that a handler that sleeps is asleep when the next one comes. */
    PACE_NS = 50000,
    /* Pages among which the faulting ones are drawn, for each of them. */
    FAULT_SPREAD = 8,
};

struct options {
    const char *benchmark;
    const char *variant;
    const char *ram;      /* kind of memory */
    const char *dir;      /* where `write` writes */
    uint64_t mib;         /* memory, or bytes of the file */
    uint64_t chunk;       /* pages an unprotect call releases */
    uint64_t busy;        /* 1: with a thread that computes beside, else 0 */
    uint64_t samples;     /* at most so many */
    uint64_t delay_us;    /* injected before a page is released */
    uint64_t seed;
};

/* ------------------------------------------------------------------ results */

struct sample {
    const char *stage;
    uint64_t pages;
    int64_t ns;
};

static struct sample *samples;
static size_t sample_count, sample_room;

static _Noreturn __attribute__((format(printf, 2, 3))) void finish(const char *how,
                                                                   const char *format, ...)
{
    va_list arguments;

    printf("%s ", how);
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    putchar('\n');
    fflush(stdout);
    /* Other threads may still run: nothing that they use may go away before them. */
    _exit(strcmp(how, "skip") == 0 ? 0 : 1);
}

#define skip(...) finish("skip", __VA_ARGS__)
#define fail(...) finish("error", __VA_ARGS__)

/* Room for the results, touched now so that storing one does not fault. */
static void reserve_samples(size_t room)
{
    samples = malloc(room * sizeof(*samples));
    if (samples == NULL) {
        fail("no memory for %zu samples", room);
    }
    memset(samples, 0xff, room * sizeof(*samples));
    sample_room = room;
}

static void add_sample(const char *stage, uint64_t pages, int64_t ns)
{
    if (sample_count == sample_room) {
        fail("more than %zu samples", sample_room);
    }
    samples[sample_count++] = (struct sample){stage, pages, ns};
}

static void print_samples(void)
{
    for (size_t k = 0; k < sample_count; k++) {
        printf("sample %s %" PRIu64 " %" PRId64 "\n", samples[k].stage, samples[k].pages,
               samples[k].ns);
    }
    printf("count samples %zu\n", sample_count);
}

/* ------------------------------------------------------------------ small parts */

static int64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Pass the time without giving the CPU away. */
static void spin_ns(int64_t ns)
{
    for (int64_t end = now_ns() + ns; now_ns() < end;) {
    }
}

/* The next number of the SplitMix64 sequence. */
static uint64_t next_random(uint64_t *state)
{
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));

    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* The numbers 0 to n - 1 in a random order. */
static uint64_t *shuffled(uint64_t n, uint64_t seed)
{
    uint64_t *order = malloc(n * sizeof(*order));

    if (order == NULL) {
        fail("no memory for an order of %" PRIu64 " pages", n);
    }
    for (uint64_t k = 0; k < n; k++) {
        uint64_t other = next_random(&seed) % (k + 1);

        order[k] = order[other];
        order[other] = k;
    }
    return order;
}

/* ------------------------------------------------------------------ threads on CPUs */

/*
 * Where threads run decides what a fault costs, and a scheduler that is free to choose chooses
 * differently from run to run.  So threads whose place matters are tied to one CPU each.  The
 * last one is meant to be no sibling of the first, as they are usually numbered.
 */
enum place { PLACE_FIRST, PLACE_LAST, PLACE_BEFORE_LAST };

static unsigned cpus_allowed(cpu_set_t *set)
{
    if (sched_getaffinity(getpid(), sizeof(*set), set) < 0) {
        fail("sched_getaffinity: %s", strerror(errno));
    }
    return (unsigned)CPU_COUNT(set);
}

static void tie(pthread_t thread, enum place place)
{
    static cpu_set_t allowed;
    static unsigned count;
    cpu_set_t one;
    unsigned wanted, seen = 0;

    /* Asked once: the calling thread is tied itself afterwards. */
    if (count == 0) {
        count = cpus_allowed(&allowed);
    }
    if (count <= (unsigned)place) {
        skip("it needs %d CPUs", place + 1);
    }
    wanted = place == PLACE_FIRST ? 0 : count - (unsigned)place;
    CPU_ZERO(&one);
    for (unsigned cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (CPU_ISSET(cpu, &allowed) && seen++ == wanted) {
            CPU_SET(cpu, &one);
        }
    }

    int error = pthread_setaffinity_np(thread, sizeof(one), &one);

    if (error != 0) {
        fail("pthread_setaffinity_np: %s", strerror(error));
    }
}

static void start_thread(pthread_t *thread, void *(*body)(void *), enum place place)
{
    int error = pthread_create(thread, NULL, body, NULL);

    if (error != 0) {
        fail("no thread: %s", strerror(error));
    }
    tie(*thread, place);
}

/* ------------------------------------------------------------------ memory */

struct area {
    unsigned char *base;
    size_t bytes;
    size_t mapped_bytes; /* with what was mapped to have `base` aligned */
    unsigned char *mapped;
    int fd;
};

static bool is_kind(const struct options *o, const char *kind)
{
    return strcmp(o->ram, kind) == 0;
}

static bool is_variant(const struct options *o, const char *variant)
{
    return strcmp(o->variant, variant) == 0;
}

static bool is_shared_or_huge(const struct options *o)
{
    return is_kind(o, "memfd") || is_kind(o, "hugetlb");
}

static struct area map_area(const struct options *o, size_t bytes)
{
    struct area area = {.bytes = bytes, .fd = -1};
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;

    area.mapped_bytes = bytes + HUGE_BYTES;
    if (is_kind(o, "hugetlb")) {
        flags |= MAP_HUGETLB | MAP_HUGE_2MB;
        area.mapped_bytes = bytes;
    } else if (is_kind(o, "memfd")) {
        area.fd = memfd_create("floor", MFD_CLOEXEC);
        if (area.fd < 0 || ftruncate(area.fd, (off_t)area.mapped_bytes) < 0) {
            fail("memfd: %s", strerror(errno));
        }
        flags = MAP_SHARED;
    } else if (!is_kind(o, "anon-thp") && !is_kind(o, "anon-4k")) {
        fail("unknown kind of memory %s", o->ram);
    }
    area.mapped = mmap(NULL, area.mapped_bytes, PROT_READ | PROT_WRITE, flags, area.fd, 0);
    if (area.mapped == MAP_FAILED) {
        if (is_kind(o, "hugetlb")) {
            skip("too few huge pages of 2 MiB are reserved and free (vm.nr_hugepages)");
        }
        fail("mmap of %zu bytes: %s", area.mapped_bytes, strerror(errno));
    }
    area.base = (unsigned char *)(((uintptr_t)area.mapped + HUGE_BYTES - 1) &
                                  ~(uintptr_t)(HUGE_BYTES - 1));
    if (is_kind(o, "anon-4k")) {
        if (madvise(area.mapped, area.mapped_bytes, MADV_NOHUGEPAGE) < 0 && errno != EINVAL) {
            fail("MADV_NOHUGEPAGE: %s", strerror(errno));
        }
    } else if (is_kind(o, "anon-thp")) {
        if (madvise(area.mapped, area.mapped_bytes, MADV_HUGEPAGE) < 0) {
            skip("no transparent huge pages in this kernel");
        }
    }
    return area;
}

static void unmap_area(struct area *area)
{
    munmap(area->mapped, area->mapped_bytes);
    if (area->fd >= 0) {
        close(area->fd);
    }
}

static uint64_t *page_at(const struct area *area, uint64_t page)
{
    return (uint64_t *)(void *)(area->base + page * PAGE_BYTES);
}

/* Write to every page: its number plus `add` in its first word. */
static void touch(const struct area *area, uint64_t add)
{
    for (uint64_t page = 0; page < area->bytes / PAGE_BYTES; page++) {
        *(volatile uint64_t *)page_at(area, page) = page + add;
    }
}

/* Transparent huge pages are a wish: a kernel short of them gives small ones. */
static void require_huge_pages(const struct area *area)
{
    char line[256];
    uint64_t huge_kib = 0;
    FILE *smaps = fopen("/proc/self/smaps_rollup", "re");

    if (smaps == NULL) {
        skip("/proc/self/smaps_rollup does not say whether there are huge pages");
    }
    while (fgets(line, sizeof(line), smaps) != NULL) {
        if (sscanf(line, "AnonHugePages: %" SCNu64 " kB", &huge_kib) == 1) {
            break;
        }
    }
    fclose(smaps);
    if (huge_kib < area->bytes / 1024 / 100 * 95) {
        skip("the kernel gave %" PRIu64 " of %zu MiB in huge pages", huge_kib / 1024,
             area->bytes >> 20);
    }
}

static struct area populated_area(const struct options *o, size_t bytes)
{
    struct area area = map_area(o, bytes);

    touch(&area, 0);
    if (is_kind(o, "anon-thp")) {
        require_huge_pages(&area);
    }
    return area;
}

static size_t area_bytes(const struct options *o)
{
    /* Whole huge pages, so that each kind gets the same size. */
    return ((size_t)o->mib << 20) / HUGE_BYTES * HUGE_BYTES;
}

/* ------------------------------------------------------------------ userfaultfd */

static int new_uffd(void)
{
    /* As QEMU does: the device, which file permissions open, before the system call. */
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    int fd = -1;

    if (device >= 0) {
        fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        close(device);
    }
    if (fd < 0) {
        fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    }
    if (fd < 0) {
        fail("userfaultfd cannot be used: %s", strerror(errno));
    }
    return fd;
}

static int open_uffd(uint64_t wanted)
{
    struct uffdio_api api = {.api = UFFD_API, .features = 0};
    int fd = new_uffd();

    /* Asking for nothing makes the kernel tell all that it has, once a descriptor. */
    if (ioctl(fd, UFFDIO_API, &api) < 0) {
        fail("UFFDIO_API: %s", strerror(errno));
    }
    close(fd);
    if (wanted & ~api.features & UFFD_FEATURE_WP_UNPOPULATED) {
        skip("this kernel cannot protect unpopulated memory");
    }
    if (wanted & ~api.features & UFFD_FEATURE_WP_HUGETLBFS_SHMEM) {
        skip("this kernel cannot protect shared memory and hugetlb pages");
    }
    if (wanted & ~api.features) {
        skip("this kernel's userfaultfd lacks features 0x%" PRIx64,
             (uint64_t)(wanted & ~api.features));
    }
    fd = new_uffd();
    api = (struct uffdio_api){.api = UFFD_API, .features = wanted};
    if (ioctl(fd, UFFDIO_API, &api) < 0) {
        fail("UFFDIO_API: %s", strerror(errno));
    }
    return fd;
}

static void register_area(int uffd, const struct area *area)
{
    struct uffdio_register request = {
        .range = {.start = (uintptr_t)area->base, .len = area->bytes},
        .mode = UFFDIO_REGISTER_MODE_WP,
    };

    if (ioctl(uffd, UFFDIO_REGISTER, &request) < 0) {
        fail("UFFDIO_REGISTER: %s", strerror(errno));
    }
}

/* Returns false with errno set: it is called from a signal handler too. */
static bool set_protection(int uffd, void *start, size_t bytes, bool protect)
{
    struct uffdio_writeprotect request = {
        .range = {.start = (uintptr_t)start, .len = bytes},
        .mode = protect ? UFFDIO_WRITEPROTECT_MODE_WP : 0,
    };

    return ioctl(uffd, UFFDIO_WRITEPROTECT, &request) == 0;
}

static void protect_area(int uffd, const struct area *area, bool protect)
{
    if (!set_protection(uffd, area->base, area->bytes, protect)) {
        fail("UFFDIO_WRITEPROTECT: %s", strerror(errno));
    }
}

/* ------------------------------------------------------------------ the busy thread */

static atomic_bool busy_stop;
static atomic_uint_fast64_t busy_rounds;
static pthread_t busy_thread;

/* Runs in user mode all the time, as a vCPU does: its CPU has to be told of every change. */
static void *keep_busy(void *unused)
{
    uint64_t buffer[PAGE_WORDS] = {0};

    (void)unused;
    while (!atomic_load_explicit(&busy_stop, memory_order_relaxed)) {
        for (unsigned k = 0; k < PAGE_WORDS; k++) {
            ((volatile uint64_t *)buffer)[k] += k;
        }
        atomic_fetch_add_explicit(&busy_rounds, 1, memory_order_relaxed);
    }
    return NULL;
}

static void start_busy(const struct options *o, enum place place)
{
    if (o->busy == 0) {
        return;
    }
    start_thread(&busy_thread, keep_busy, place);
    /* It is where it belongs once it has been seen to run after it was put there. */
    for (uint64_t before = atomic_load(&busy_rounds); atomic_load(&busy_rounds) < before + 2;) {
        sched_yield();
    }
}

static void stop_busy(const struct options *o)
{
    if (o->busy != 0) {
        atomic_store(&busy_stop, true);
        pthread_join(busy_thread, NULL);
    }
    printf("count busy_rounds %" PRIuFAST64 "\n", atomic_load(&busy_rounds));
}

/* ------------------------------------------------------------------ arm */

/*
 * Protect all of the memory by one call.  Populated memory is armed again and again, with a
 * write to every page in between; unpopulated memory is new each time, because page tables
 * that an earlier call has made stay.
 */
static void measure_arm(const struct options *o)
{
    bool populated = is_variant(o, "populated");
    uint64_t features = UFFD_FEATURE_PAGEFAULT_FLAG_WP;
    size_t bytes = area_bytes(o);

    if (!populated && !is_variant(o, "unpopulated")) {
        fail("unknown variant %s", o->variant);
    }
    features |= is_shared_or_huge(o) ? UFFD_FEATURE_WP_HUGETLBFS_SHMEM : 0;
    features |= populated ? 0 : UFFD_FEATURE_WP_UNPOPULATED;
    reserve_samples(o->samples);

    int uffd = open_uffd(features);
    struct area area = {0};

    for (uint64_t k = 0; k < o->samples; k++) {
        if (k == 0 || !populated) {
            area = populated ? populated_area(o, bytes) : map_area(o, bytes);
            register_area(uffd, &area);
        }
        int64_t start = now_ns();

        protect_area(uffd, &area, true);
        add_sample("call", bytes / PAGE_BYTES, now_ns() - start);
        if (populated) {
            protect_area(uffd, &area, false);
            touch(&area, k + 1);
        } else {
            unmap_area(&area);
        }
    }
    print_samples();
}

/* ------------------------------------------------------------------ unprotect */

/*
 * Release protected memory from its start, so many pages a call, as a sweep does.  With a busy
 * thread on another CPU, which has to be interrupted so that it forgets the protection.
 */
static void measure_unprotect(const struct options *o)
{
    struct area area = populated_area(o, area_bytes(o));
    size_t step = o->chunk * PAGE_BYTES;
    uint64_t calls = step == 0 ? 0 : area.bytes / step;
    int uffd = open_uffd(UFFD_FEATURE_PAGEFAULT_FLAG_WP);

    calls = calls < o->samples ? calls : o->samples;
    if (calls == 0) {
        fail("no chunk of %" PRIu64 " pages fits into %" PRIu64 " MiB", o->chunk, o->mib);
    }
    reserve_samples(calls);
    register_area(uffd, &area);
    protect_area(uffd, &area, true);

    tie(pthread_self(), PLACE_FIRST);
    start_busy(o, PLACE_LAST);
    for (uint64_t k = 0; k < calls; k++) {
        int64_t start = now_ns();

        if (!set_protection(uffd, area.base + k * step, step, false)) {
            fail("UFFDIO_WRITEPROTECT: %s", strerror(errno));
        }
        add_sample("call", o->chunk, now_ns() - start);
    }
    stop_busy(o);
    /* What was released can be written without anybody to serve a fault. */
    for (uint64_t page = 0; page < calls * o->chunk; page++) {
        *(volatile uint64_t *)page_at(&area, page) = page;
    }
    print_samples();
}

/* ------------------------------------------------------------------ fault */

struct fault {
    int64_t begin_ns;    /* before the store */
    int64_t read_ns;     /* the handler has the message, or the signal */
    int64_t released_ns; /* the unprotect call has returned */
    int64_t end_ns;      /* after the store */
};

/* Of the one block that this process measures; the signal handler has no other way to it. */
static struct {
    int uffd;
    int stop_fd;
    bool sleeps;
    int64_t delay_ns;
    uint64_t count;              /* faults to come */
    struct fault *faults;
    void *_Atomic page;          /* the page about to be written */
    atomic_uint_fast64_t seen;   /* faults served */
    atomic_uint_fast64_t strange; /* faults on any other page */
    atomic_uint_fast64_t waits;  /* times that the handler began to wait for one */
    atomic_bool stop;
} run;

static void serve_fault(uintptr_t address, int64_t read_ns)
{
    void *page = (void *)(address & ~(uintptr_t)(PAGE_BYTES - 1));
    uint64_t index = atomic_load(&run.seen);

    if (page != atomic_load(&run.page) || index >= run.count) {
        atomic_fetch_add(&run.strange, 1);
    }
    if (run.delay_ns > 0) {
        spin_ns(run.delay_ns);
    }
    if (!set_protection(run.uffd, page, PAGE_BYTES, false)) {
        static const char message[] = "error a page could not be released\n";

        /* Whoever waits for the page would wait for ever. */
        (void)!write(STDOUT_FILENO, message, sizeof(message) - 1);
        _exit(1);
    }
    if (index < run.count) {
        run.faults[index].read_ns = read_ns;
        run.faults[index].released_ns = now_ns();
    }
    atomic_fetch_add(&run.seen, 1);
}

static void serve_signal(int number, siginfo_t *info, void *context)
{
    int64_t read_ns = now_ns();
    int saved = errno;

    (void)context;
    if ((void *)((uintptr_t)info->si_addr & ~(uintptr_t)(PAGE_BYTES - 1)) !=
        atomic_load(&run.page)) {
        signal(number, SIG_DFL); /* somebody else's: it comes again and ends the process */
        return;
    }
    serve_fault((uintptr_t)info->si_addr, read_ns);
    errno = saved;
}

/* Wait for a message; false when there is to be none any more. */
static bool next_message(struct uffd_msg *message)
{
    struct pollfd sources[] = {{.fd = run.uffd, .events = POLLIN},
                               {.fd = run.stop_fd, .events = POLLIN}};

    atomic_fetch_add(&run.waits, 1);
    while (true) {
        if (run.sleeps && poll(sources, 2, -1) < 0 && errno != EINTR) {
            fail("poll: %s", strerror(errno));
        }
        if (read(run.uffd, message, sizeof(*message)) == (ssize_t)sizeof(*message)) {
            return true;
        }
        if (errno != EAGAIN && errno != EINTR) {
            fail("userfaultfd: %s", strerror(errno));
        }
        if (atomic_load(&run.stop)) {
            return false;
        }
    }
}

static void *serve_messages(void *unused)
{
    struct uffd_msg message;

    (void)unused;
    while (next_message(&message)) {
        int64_t read_ns = now_ns();

        if (message.event == UFFD_EVENT_PAGEFAULT &&
            (message.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP)) {
            serve_fault(message.arg.pagefault.address, read_ns);
        } else {
            fail("message %u where a write fault was to come", message.event);
        }
    }
    return NULL;
}

/*
 * Write to protected pages in random order, one fault each, and let somebody release them:
 *
 * sleep-near  a thread that sleeps until there is a message, on the writer's CPU
 * sleep-far   the same on another CPU, which is idle then and has to be woken
 * spin        a thread on another CPU that asks all the time
 * sigbus      a signal handler in the writer itself
 *
 * The busy thread has a CPU of its own where there are enough.  With two CPUs it shares that of
 * the handler of sleep-far, which is then a machine all of whose CPUs have work.
 */
static void measure_fault(const struct options *o)
{
    bool sigbus = is_variant(o, "sigbus");
    bool spins = is_variant(o, "spin");
    bool far = spins || is_variant(o, "sleep-far");
    size_t bytes = (o->samples * FAULT_SPREAD * PAGE_BYTES + HUGE_BYTES) / HUGE_BYTES * HUGE_BYTES;
    struct area area = populated_area(o, bytes);
    uint64_t *order = shuffled(bytes / PAGE_BYTES, o->seed);
    uint64_t released_late = 0;
    pthread_t handler;

    cpu_set_t allowed;
    enum place busy_place = far && cpus_allowed(&allowed) > 2 ? PLACE_BEFORE_LAST : PLACE_LAST;

    if (!sigbus && !far && !is_variant(o, "sleep-near")) {
        fail("unknown variant %s", o->variant);
    }
    if (spins && o->busy && busy_place == PLACE_LAST) {
        skip("a writer, a handler that spins and a busy thread need three CPUs");
    }
    run.sleeps = !spins;
    reserve_samples(4 * o->samples);
    run.faults = malloc(o->samples * sizeof(*run.faults));
    run.stop_fd = eventfd(0, EFD_CLOEXEC);
    if (run.faults == NULL || run.stop_fd < 0) {
        fail("no room for %" PRIu64 " faults", o->samples);
    }
    memset(run.faults, 0, o->samples * sizeof(*run.faults));
    run.count = o->samples;
    run.delay_ns = (int64_t)o->delay_us * 1000;
    run.uffd = open_uffd(UFFD_FEATURE_PAGEFAULT_FLAG_WP | (sigbus ? UFFD_FEATURE_SIGBUS : 0));
    register_area(run.uffd, &area);
    protect_area(run.uffd, &area, true);
    tie(pthread_self(), PLACE_FIRST);
    if (sigbus) {
        struct sigaction action = {.sa_sigaction = serve_signal, .sa_flags = SA_SIGINFO};

        sigaction(SIGBUS, &action, NULL);
    } else {
        start_thread(&handler, serve_messages, far ? PLACE_LAST : PLACE_FIRST);
    }
    start_busy(o, busy_place);
    for (uint64_t k = 0; k < o->samples; k++) {
        volatile uint64_t *page = page_at(&area, order[k]);

        /* The handler may still be on its way back from the fault before. */
        while (!sigbus && atomic_load(&run.waits) <= k) {
            sched_yield();
        }
        spin_ns(PACE_NS);
        atomic_store(&run.page, (void *)(uintptr_t)page);
        run.faults[k].begin_ns = now_ns();
        *page = ~order[k];
        run.faults[k].end_ns = now_ns();
    }
    if (!sigbus) {
        uint64_t one = 1;

        while (atomic_load(&run.seen) < o->samples) {
            sched_yield();
        }
        atomic_store(&run.stop, true);
        if (write(run.stop_fd, &one, sizeof(one)) != (ssize_t)sizeof(one)) {
            fail("eventfd: %s", strerror(errno));
        }
        pthread_join(handler, NULL);
    }
    stop_busy(o);

    for (uint64_t k = 0; k < o->samples; k++) {
        const struct fault *f = &run.faults[k];

        if (*page_at(&area, order[k]) != ~order[k]) {
            fail("a page does not hold what was written to it");
        }
        released_late += f->released_ns > f->end_ns;
        add_sample("fault", 1, f->end_ns - f->begin_ns);
        add_sample("deliver", 1, f->read_ns - f->begin_ns);
        add_sample("unprotect", 1, f->released_ns - f->read_ns);
        add_sample("return", 1, f->end_ns - f->released_ns);
    }
    print_samples();
    printf("count faults %" PRIuFAST64 "\n", atomic_load(&run.seen));
    printf("count strange_faults %" PRIuFAST64 "\n", atomic_load(&run.strange));
    printf("count pages_written %" PRIu64 "\n", o->samples);
    printf("count released_late %" PRIu64 "\n", released_late);
}

/* ------------------------------------------------------------------ copy and scan */

/* Copy 2 MiB at a time, of one piece or gathered from pages all over the memory. */
static void measure_copy(const struct options *o)
{
    bool gather = is_variant(o, "gather-4k");
    struct area area = populated_area(o, area_bytes(o));
    uint64_t pages = area.bytes / PAGE_BYTES;
    uint64_t calls = pages / HUGE_PAGES;
    uint64_t *order = shuffled(pages, o->seed);
    unsigned char *target = aligned_alloc(HUGE_BYTES, HUGE_BYTES);

    if (!gather && !is_variant(o, "bulk-2m")) {
        fail("unknown variant %s", o->variant);
    }
    calls = calls < o->samples ? calls : o->samples;
    if (calls == 0 || target == NULL) {
        fail("no room to copy to or from");
    }
    memset(target, 0xff, HUGE_BYTES);
    reserve_samples(calls);
    for (uint64_t k = 0; k < calls; k++) {
        const uint64_t *from = order + k * HUGE_PAGES;
        int64_t start = now_ns();

        if (gather) {
            for (unsigned page = 0; page < HUGE_PAGES; page++) {
                memcpy(target + page * PAGE_BYTES, page_at(&area, from[page]), PAGE_BYTES);
            }
        } else {
            memcpy(target, area.base + k * HUGE_BYTES, HUGE_BYTES);
        }
        add_sample("call", HUGE_PAGES, now_ns() - start);
        for (unsigned page = 0; page < HUGE_PAGES; page++) {
            uint64_t expected = gather ? from[page] : k * HUGE_PAGES + page;

            if (*(uint64_t *)(void *)(target + page * PAGE_BYTES) != expected) {
                fail("a copied page is not the page that was to be copied");
            }
        }
    }
    print_samples();
}

static bool is_zero_page(const uint64_t *words)
{
    for (unsigned k = 0; k < PAGE_WORDS; k += 16) {
        uint64_t any = 0;

        for (unsigned n = 0; n < 16; n++) {
            any |= words[k + n];
        }
        if (any != 0) {
            return false;
        }
    }
    return true;
}

/* Look for what is not zero in pages that are, 2 MiB at a time: all of each has to be read. */
static void measure_scan(const struct options *o)
{
    struct area area = populated_area(o, area_bytes(o));
    uint64_t calls = area.bytes / HUGE_BYTES;
    uint64_t zeros = 0;

    calls = calls < o->samples ? calls : o->samples;
    if (calls == 0 || !is_variant(o, "zeros")) {
        fail("nothing to scan, or unknown variant %s", o->variant);
    }
    /* Written: memory that was only read would be one page of zeros, in the cache. */
    memset(area.base, 0, area.bytes);
    reserve_samples(calls);
    for (uint64_t k = 0; k < calls; k++) {
        int64_t start = now_ns();

        for (unsigned page = 0; page < HUGE_PAGES; page++) {
            zeros += is_zero_page(page_at(&area, k * HUGE_PAGES + page));
        }
        add_sample("call", HUGE_PAGES, now_ns() - start);
    }
    print_samples();
    printf("count zero_pages %" PRIu64 "\n", zeros);
    printf("count scanned_pages %" PRIu64 "\n", calls * HUGE_PAGES);
}

/* ------------------------------------------------------------------ write */

static int open_file(const char *path, int flags)
{
    int fd = open(path, O_CLOEXEC | O_WRONLY | flags, 0600);

    if (fd < 0) {
        if ((flags & O_DIRECT) && errno == EINVAL) {
            (void)unlink(path);
            skip("the file system has no direct I/O");
        }
        fail("open: %s", strerror(errno));
    }
    return fd;
}

/* Write the file from its start; its size in the end.  `timed`: with a sample a call. */
static uint64_t write_file(int fd, const char *path, const unsigned char *data, uint64_t calls,
                           bool timed)
{
    for (uint64_t k = 0; k < calls; k++) {
        int64_t start = now_ns();
        ssize_t written = write(fd, data, HUGE_BYTES);
        int64_t ns = now_ns() - start;

        if (written != HUGE_BYTES) {
            int error = errno;

            (void)unlink(path);
            if (written < 0 && error == EINVAL) {
                skip("the file system has no direct I/O in 2 MiB");
            }
            fail("write: %s", written < 0 ? strerror(error) : "the disk is full");
        }
        if (timed) {
            add_sample("write", HUGE_PAGES, ns);
        }
    }

    struct stat status;

    return fstat(fd, &status) == 0 ? (uint64_t)status.st_size : 0;
}

static void sync_file(int fd)
{
    if (fsync(fd) < 0) {
        fail("fsync: %s", strerror(errno));
    }
}

/* Memory that was free for long is slow to get where the host took it away: get it before. */
static void warm_host_memory(const struct options *o)
{
    struct options plain = *o;

    plain.ram = "anon-4k";

    struct area area = populated_area(&plain, area_bytes(o));

    unmap_area(&area);
}

/*
 * Write a file in pieces of 2 MiB, close it, and have it written to the medium.
 *
 * fresh: a new file through the page cache.  overwrite: a file all of whose pages are in the
 * page cache and clean.  direct: a new file past the page cache.
 */
static void measure_write(const struct options *o)
{
    uint64_t calls = area_bytes(o) / HUGE_BYTES;
    unsigned char *data = aligned_alloc(HUGE_BYTES, HUGE_BYTES);
    bool direct = is_variant(o, "direct");
    bool overwrite = is_variant(o, "overwrite");
    uint64_t seed = o->seed;
    char path[4096];

    if (!direct && !overwrite && !is_variant(o, "fresh")) {
        fail("unknown variant %s", o->variant);
    }
    if (o->dir == NULL || data == NULL || calls == 0 ||
        snprintf(path, sizeof(path), "%s/floor.bin", o->dir) >= (int)sizeof(path)) {
        fail("nothing to write, or nowhere to write it to");
    }
    for (size_t k = 0; k < HUGE_BYTES / 8; k++) {
        ((uint64_t *)(void *)data)[k] = next_random(&seed);
    }
    warm_host_memory(o);
    reserve_samples(calls + 2);

    int fd = open_file(path, O_CREAT | O_TRUNC | (direct ? O_DIRECT : 0));

    /* QEMU truncates its image, which makes some file systems start writing when it is closed. */
    if (ftruncate(fd, 0) < 0) {
        fail("ftruncate: %s", strerror(errno));
    }
    if (overwrite) {
        write_file(fd, path, data, calls, false);
        sync_file(fd);
        if (lseek(fd, 0, SEEK_SET) != 0) {
            fail("lseek: %s", strerror(errno));
        }
    }

    uint64_t size = write_file(fd, path, data, calls, true);
    int64_t start = now_ns();

    close(fd);
    add_sample("close", calls * HUGE_PAGES, now_ns() - start);
    fd = open_file(path, 0);
    start = now_ns();
    sync_file(fd);
    add_sample("sync", calls * HUGE_PAGES, now_ns() - start);
    close(fd);
    (void)unlink(path);
    print_samples();
    printf("count bytes_written %" PRIu64 "\n", calls * HUGE_BYTES);
    printf("count file_bytes %" PRIu64 "\n", size);
}

/* ------------------------------------------------------------------ main */

static uint64_t number(const char *key, const char *text)
{
    char *end;

    errno = 0;

    unsigned long long value = strtoull(text, &end, 10);

    if (errno != 0 || *end != '\0' || *text < '0' || *text > '9') {
        fail("%s=%s is no number", key, text);
    }
    return value;
}

static void read_option(struct options *o, const char *argument)
{
    struct {
        const char *key;
        uint64_t *value;
    } const numbers[] = {
        {"mib", &o->mib},         {"chunk", &o->chunk},       {"busy", &o->busy},
        {"samples", &o->samples}, {"delay_us", &o->delay_us}, {"seed", &o->seed},
    };
    const char *value = strchr(argument, '=');

    if (value == NULL) {
        fail("%s is no KEY=VALUE", argument);
    }

    size_t length = (size_t)(value++ - argument);

    if (length == 3 && strncmp(argument, "ram", length) == 0) {
        o->ram = value;
        return;
    }
    if (length == 3 && strncmp(argument, "dir", length) == 0) {
        o->dir = value;
        return;
    }
    for (size_t k = 0; k < sizeof(numbers) / sizeof(numbers[0]); k++) {
        if (strlen(numbers[k].key) == length && strncmp(argument, numbers[k].key, length) == 0) {
            *numbers[k].value = number(numbers[k].key, value);
            return;
        }
    }
    fail("unknown option %s", argument);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*measure)(const struct options *);
    } benchmarks[] = {
        {"arm", measure_arm},   {"unprotect", measure_unprotect}, {"fault", measure_fault},
        {"copy", measure_copy}, {"scan", measure_scan},           {"write", measure_write},
    };
    struct options o = {.ram = "anon-4k", .mib = 64, .chunk = 1, .samples = 199, .seed = 1};

    if (argc < 3) {
        fail("usage: floor BENCHMARK VARIANT [KEY=VALUE]...");
    }
    o.benchmark = argv[1];
    o.variant = argv[2];
    for (int k = 3; k < argc; k++) {
        read_option(&o, argv[k]);
    }
    if (o.samples == 0 || o.samples > 1000000 || o.busy > 1 || o.mib > 1 << 20) {
        fail("samples, busy or mib out of range");
    }
    for (size_t k = 0; k < sizeof(benchmarks) / sizeof(benchmarks[0]); k++) {
        if (strcmp(benchmarks[k].name, o.benchmark) == 0) {
            benchmarks[k].measure(&o);
            puts("done");
            return fflush(stdout) == 0 ? 0 : 1;
        }
    }
    fail("unknown benchmark %s", o.benchmark);
}
