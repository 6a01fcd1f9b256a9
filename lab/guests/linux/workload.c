/*
 * workload: the main part of the guest's only program; devices.c has the load on devices, and
 * basics.c what is no business of the workload.
 *
 * It runs as PID 1, fills a working set with pages that describe themselves, and
 * then dirties them as fast as it can while checking every page it touches.  The
 * host never asks it anything while a measurement runs: it reads one page of
 * guest RAM, the progress page, behind the guest's back.
 *
 * ../README.md describes the records, the progress page, the
 * working set and the order of the stores.  writers.h has what the microguest does
 * alike.  protocol.py is the host's side of the same definitions; a test compiles
 * this file with -DLAB_HOST_TEST and compares.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#define _GNU_SOURCE
#include "workload.h"
#include "writers.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static __attribute__((cold)) _Noreturn void memory_is_kept(void);

/* Check a piece of the share a last time, and give its memory back to the kernel. */
static void give_back(struct writer *w, uint64_t page, uint64_t end)
{
    for (uint64_t old = page; old < end; old++) {
        volatile uint64_t *words = w->pages + old * PAGE_WORDS;
        uint64_t version = w->table[old];

        if ((words[WORD_MAGIC] ^ w->magic) | (words[WORD_INDEX] ^ (w->first + old)) |
            (words[WORD_HEAD] ^ version) | (words[WORD_BODY] ^ version) |
            (words[WORD_TAIL] ^ version)) {
            page_is_bad(w, old);
        }
        w->table[old] = 0;
    }
    if (madvise((void *)(w->pages + page * PAGE_WORDS), (end - page) * PAGE_BYTES,
                MADV_DONTNEED)) {
        memory_is_kept();
    }
}

static void run_allocate(struct writer *shared, uint64_t n)
{
    struct writer w = *shared;

    while (n--) {
        if (w.next == w.count) {
            w.next = 0;
        }
        if (w.next % PIECE_PAGES == 0) {
            give_back(&w, w.next,
                      w.count - w.next > PIECE_PAGES ? w.next + PIECE_PAGES : w.count);
        }
        operate(&w, w.next, ACTION_TAKE);
        w.next++;
    }
    shared->next = w.next;
    shared->done = w.done;
}

static void run(struct writer *w, uint64_t n)
{
    if (w->kind == KIND_ALLOCATE) {
        run_allocate(w, n);
    } else {
        run_operations(w, n);
    }
}

#ifdef LAB_HOST_TEST
/* ------------------------------------------------------------------- host test */

static void page_is_bad(struct writer *w, uint64_t page)
{
    fprintf(stderr, "thread %llu: page %llu is bad\n", (unsigned long long)w->thread,
            (unsigned long long)page);
    exit(3);
}

static void memory_is_kept(void)
{
    perror("madvise");
    exit(4);
}

/* KIND SEED THREADS WSS_PAGES NONCE OPS... (one OPS per thread): run the writers on
 * this machine and write the working set to standard output.
 * bucket TICKS...: print the latency bucket of each. */
int main(int argc, char **argv)
{
    enum kind kind;
    uint64_t seed, threads, wss_pages, nonce;
    uint64_t *set, *table, ops = 0;

    if (argc > 1 && !strcmp(argv[1], "bucket")) {
        for (int i = 2; i < argc; i++) {
            printf("%llu\n",
                   (unsigned long long)latency_bucket(strtoull(argv[i], NULL, 10)));
        }
        return 0;
    }
    if (argc < 7) {
        return 2;
    }
    kind = (enum kind)atoi(argv[1]);
    seed = strtoull(argv[2], NULL, 10);
    threads = strtoull(argv[3], NULL, 10);
    wss_pages = strtoull(argv[4], NULL, 10);
    nonce = strtoull(argv[5], NULL, 10);
    if ((uint64_t)argc != 6 + threads) {
        return 2;
    }
    set = mmap(NULL, wss_pages * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
               -1, 0);
    table = calloc(wss_pages, sizeof(*table));
    if (set == MAP_FAILED || !table) {
        return 1;
    }
    for (uint64_t index = 0; index < wss_pages; index++) {
        populate(set + index * PAGE_WORDS, kind, PAGE_MAGIC ^ nonce, index);
    }
    for (uint64_t thread = 0; thread < threads; thread++) {
        struct writer w;

        writer_init(&w, kind, seed, thread, threads, wss_pages);
        w.pages = set + w.first * PAGE_WORDS;
        w.table = table + w.first;
        w.ops = &ops;
        w.magic = PAGE_MAGIC ^ nonce;
        run(&w, strtoull(argv[6 + thread], NULL, 10));
    }
    return fwrite(set, PAGE_BYTES, wss_pages, stdout) == wss_pages ? 0 : 1;
}

#else
/* ----------------------------------------------------------------------- guest */

#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/sysinfo.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#define COUNT(array) (sizeof(array) / sizeof(*(array)))

enum {
    /* Left free beside the working set, for the kernel itself. */
    MARGIN_MIB = 24,
    MAX_RATE = 1000000000,
};

static const char *const kind_names[] = KIND_NAMES;

struct parameters {
    enum kind kind;
    uint64_t wss_mib;
    uint64_t threads;
    uint64_t seed;
    uint64_t time_writes;
    uint64_t rate; /* operations a second of all writers; 0 is as many as they can do */
    struct devices devices;
};

static const char *const DISK_NAMES[] = {"none", "ide", "virtio", "scsi"};

volatile uint64_t *progress;
static volatile uint64_t *latency; /* the latency page, or NULL */
static struct writer writers[MAX_THREADS];

/* How paced writers work: so many operations, and as long from the start of these until the start
 * of the next.  Not paced while `pace_ops` is zero. */
static atomic_uint_fast64_t pace_ops;
static uint64_t pace_ns;

/* Pausing the writers between two operations, for the whole-set verifier. */
static atomic_bool pause_wanted = true;
static pthread_mutex_t pause_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t pause_changed = PTHREAD_COND_INITIALIZER;
static uint64_t writers_paused;

/* ---------------------------------------------------------------- parameters */

static void parse_parameter(void *to, const char *name, const char *value)
{
    struct parameters *p = to;

    if (!strcmp(name, "lab.workload")) {
        p->kind = (enum kind)choice(name, value, kind_names, COUNT(kind_names));
    } else if (!strcmp(name, "lab.wss_mib")) {
        p->wss_mib = number(name, value, 0, UINT64_C(1) << 20);
    } else if (!strcmp(name, "lab.threads")) {
        p->threads = number(name, value, 1, MAX_THREADS);
    } else if (!strcmp(name, "lab.seed")) {
        p->seed = number(name, value, 0, UINT64_MAX);
    } else if (!strcmp(name, "lab.time_writes")) {
        p->time_writes = number(name, value, 0, 1);
    } else if (!strcmp(name, "lab.rate")) {
        p->rate = number(name, value, 0, MAX_RATE);
    } else if (!strcmp(name, "lab.disk")) {
        p->devices.disk = (enum disk)choice(name, value, DISK_NAMES, COUNT(DISK_NAMES));
    } else if (!strcmp(name, "lab.net")) {
        p->devices.net = number(name, value, 0, 1);
    } else if (!strcmp(name, "lab.display")) {
        p->devices.display = number(name, value, 0, 1);
    } else if (!strcmp(name, "lab.balloon")) {
        p->devices.balloon = number(name, value, 0, 1);
    } else {
        char unknown[64];

        snprintf(unknown, sizeof(unknown), "%s", printable(name));
        fail("what=parameter name=%s value=%s", unknown, printable(value));
    }
}

static struct parameters read_parameters(void)
{
    struct parameters p = {.kind = KIND_IDLE, .wss_mib = 0, .threads = 1, .seed = 1};

    each_parameter("lab.", parse_parameter, &p);
    return p;
}

/* -------------------------------------------------------------------- memory */

static void check_memory(uint64_t need_mib)
{
    struct sysinfo info;
    uint64_t free_mib;

    if (sysinfo(&info)) {
        fail("what=sysinfo errno=%d", errno);
    }
    free_mib = (uint64_t)info.freeram * info.mem_unit >> 20;
    if (need_mib + MARGIN_MIB > free_mib) {
        fail("what=memory need_mib=%llu free_mib=%llu", (unsigned long long)(need_mib + MARGIN_MIB),
             (unsigned long long)free_mib);
    }
}

/* ------------------------------------------------------------------- writers */

/* Count a page that is not what its writer left there, say so at most once a second, and
 * mend what the operation does not write anyway, so that one fault is counted once. */
static void page_is_bad(struct writer *w, uint64_t page)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static uint64_t last_ns;
    volatile uint64_t *words = w->pages + page * PAGE_WORDS;
    uint64_t now = now_ns();
    bool say;

    __atomic_fetch_add(&progress[PROGRESS_ERRORS], 1, __ATOMIC_RELAXED);
    pthread_mutex_lock(&lock);
    say = !last_ns || now - last_ns >= 1000000000u;
    if (say) {
        last_ns = now;
    }
    pthread_mutex_unlock(&lock);
    if (say) {
        record("LAB1 error what=page thread=%llu page=%llu op=%llu magic=%016llx index=%llu"
               " head=%llu body=%llu tail=%llu table=%llu",
               (unsigned long long)w->thread, (unsigned long long)(w->first + page),
               (unsigned long long)w->done, (unsigned long long)words[WORD_MAGIC],
               (unsigned long long)words[WORD_INDEX], (unsigned long long)words[WORD_HEAD],
               (unsigned long long)words[WORD_BODY], (unsigned long long)words[WORD_TAIL],
               (unsigned long long)w->table[page]);
    }
    words[WORD_MAGIC] = w->magic;
    words[WORD_INDEX] = w->first + page;
}

static void memory_is_kept(void)
{
    fail("what=madvise errno=%d", errno);
}

static void pause_if_wanted(void)
{
    if (!atomic_load_explicit(&pause_wanted, memory_order_relaxed)) {
        return;
    }
    pthread_mutex_lock(&pause_lock);
    writers_paused++;
    pthread_cond_broadcast(&pause_changed);
    while (atomic_load(&pause_wanted)) {
        pthread_cond_wait(&pause_changed, &pause_lock);
    }
    writers_paused--;
    pthread_cond_broadcast(&pause_changed);
    pthread_mutex_unlock(&pause_lock);
}

static void wait_for_paused(uint64_t count)
{
    pthread_mutex_lock(&pause_lock);
    while (writers_paused != count) {
        pthread_cond_wait(&pause_changed, &pause_lock);
    }
    pthread_mutex_unlock(&pause_lock);
}

static void set_pause(bool wanted)
{
    pthread_mutex_lock(&pause_lock);
    atomic_store(&pause_wanted, wanted);
    pthread_cond_broadcast(&pause_changed);
    pthread_mutex_unlock(&pause_lock);
}

/* Thread i stays on vCPU i, so that a fault's vCPU says whose page it was. */
static void pin(uint64_t thread)
{
    cpu_set_t cpus;

    CPU_ZERO(&cpus);
    CPU_SET(thread % (uint64_t)get_nprocs(), &cpus);
    sched_setaffinity(0, sizeof(cpus), &cpus);
}

/* Pace the writers from now on; `rate` is not zero. */
static void set_pace(uint64_t rate, uint64_t threads)
{
    uint64_t ops = rate / threads / PACES_PER_S;

    ops = ops ? ops : 1;
    pace_ns = ops * threads * UINT64_C(1000000000) / rate;
    atomic_store(&pace_ops, ops);
}

/* Wait until it is time for a paced writer's next operations, and say when those after them are
 * due. */
static uint64_t wait_for_turn(uint64_t due_ns)
{
    uint64_t now = now_ns();

    if (now > due_ns + LATE_NS) {
        return now + pace_ns; /* begin anew: also what the first time does */
    }
    if (now < due_ns) {
        struct timespec due = {.tv_sec = (time_t)(due_ns / 1000000000u),
                               .tv_nsec = (long)(due_ns % 1000000000u)};

        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL);
    }
    return due_ns + pace_ns;
}

static void *writer_main(void *argument)
{
    struct writer *w = argument;
    uint64_t due_ns = 0;

    pin(w->thread);
    for (;;) {
        uint64_t ops = atomic_load_explicit(&pace_ops, memory_order_acquire);

        pause_if_wanted();
        if (w->kind == KIND_IDLE) {
            nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
            *w->ops = ++w->done;
        } else if (ops) {
            due_ns = wait_for_turn(due_ns);
            run(w, ops);
        } else {
            run(w, BATCH);
        }
    }
    return NULL;
}

/* Note what the time stamp counter and the clock say, so that the host can convert ticks. */
static void note_time(unsigned ticks_word, unsigned ns_word)
{
    latency[ns_word] = now_ns();
    latency[ticks_word] = __builtin_ia32_rdtsc();
}

static void set_up_latency(uint64_t threads)
{
    latency = allocate_locked(PAGE_BYTES);
    latency[LATENCY_COUNT] = LATENCY_BUCKETS;
    for (uint64_t i = 0; i < threads; i++) {
        volatile uint64_t *buckets = allocate_locked(LATENCY_BUCKETS * sizeof(*buckets));

        writers[i].latency = buckets;
        for (uint64_t page = 0; page < LATENCY_PAGES; page++) {
            latency[LATENCY_GPAS + LATENCY_GPAS_STRIDE * i + page] =
                physical_address(buckets + page * PAGE_WORDS);
        }
    }
    note_time(LATENCY_START_TICKS, LATENCY_START_NS);
    note_time(LATENCY_TICKS, LATENCY_NS);
    latency[LATENCY_MAGIC] = LATENCY_PAGE_MAGIC;
    progress[PROGRESS_LATENCY_GPA] = physical_address(latency);
}

static uint64_t total_operations(uint64_t threads)
{
    uint64_t sum = 0;

    for (uint64_t i = 0; i < threads; i++) {
        sum += progress[PROGRESS_OPS + PROGRESS_OPS_STRIDE * i];
    }
    return sum;
}

/*
 * Let the writers run until the machine's address translation caches are as large and as
 * full as they are going to be.
 *
 * This is for TCG.  Its software TLB starts with 256 entries and doubles only when it is
 * flushed while mostly full; a guest that never flushes stays at 256, and the first flush,
 * such as the one a snapshot causes, would change its speed.  So have it flushed, by a
 * change of protection that is too wide to be flushed page by page, each time the writers
 * have done enough to fill the size it has by then.  Elsewhere it costs some milliseconds.
 */
static void warm_up(const struct parameters *p, uint64_t wss_pages)
{
    enum { BLOCK = 64 * PAGE_BYTES };
    void *block = allocate(BLOCK);
    /* Skewed kinds need more operations to get to as many pages. */
    uint64_t visits = p->kind == KIND_ZIPF || p->kind == KIND_HOTCOLD ? 16 : 2;

    for (uint64_t entries = 256; entries < 2 * wss_pages; entries *= 2) {
        uint64_t before[MAX_THREADS];

        for (uint64_t i = 0; i < p->threads; i++) {
            before[i] = *writers[i].ops;
        }
        for (uint64_t i = 0; i < p->threads; i++) {
            uint64_t fill = visits * (entries < writers[i].count ? entries : writers[i].count);

            while (*writers[i].ops - before[i] < fill) {
                nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
            }
        }
        mprotect(block, BLOCK, PROT_READ);
        mprotect(block, BLOCK, PROT_READ | PROT_WRITE);
    }
    munmap(block, BLOCK);
}

/* Between two operations of every writer, compare every word of the working set. */
static void verify(const struct parameters *p, uint64_t running)
{
    uint64_t wss_pages = progress[PROGRESS_WSS_PAGES];
    uint64_t bad = 0;

    set_pause(true);
    wait_for_paused(running);
    for (uint64_t i = 0; wss_pages && i < p->threads; i++) {
        struct writer *w = &writers[i];

        for (uint64_t page = 0; page < w->count; page++) {
            bad += !page_is_intact(w, page);
        }
    }
    record("LAB1 verify pages=%llu bad=%llu errors=%llu ops=%llu", (unsigned long long)wss_pages,
           (unsigned long long)bad, (unsigned long long)progress[PROGRESS_ERRORS],
           (unsigned long long)total_operations(p->threads));
    set_pause(false);
}

/* ---------------------------------------------------------------------- main */

static void tick(const struct parameters *p)
{
    progress[PROGRESS_CHECKS] = p->kind == KIND_IDLE ? 0 : total_operations(p->threads);
    progress[PROGRESS_TICK_NS] = now_ns();
    if (latency) {
        note_time(LATENCY_TICKS, LATENCY_NS);
    }
}

static void command(const char *line, const struct parameters *p, uint64_t running)
{
    if (!strcmp(line, "verify")) {
        verify(p, running);
    } else if (!strcmp(line, "tick")) {
        record("LAB1 tick ns=%llu ops=%llu errors=%llu", (unsigned long long)now_ns(),
               (unsigned long long)total_operations(p->threads),
               (unsigned long long)progress[PROGRESS_ERRORS]);
    } else if (!strcmp(line, "poweroff")) {
        record("LAB1 bye ops=%llu errors=%llu", (unsigned long long)total_operations(p->threads),
               (unsigned long long)progress[PROGRESS_ERRORS]);
        power_off();
    } else if (*line) {
        record("LAB1 error what=command value=%s", printable(line));
    }
}

static _Noreturn void serve(const struct parameters *p, uint64_t running)
{
    char line[64];
    size_t used = 0;
    bool console = true;

    for (;;) {
        struct pollfd input = {.fd = console ? STDIN_FILENO : -1, .events = POLLIN};
        char byte;

        if (poll(&input, 1, TICK_MS) <= 0) {
            tick(p);
            continue;
        }
        tick(p);
        if (read(STDIN_FILENO, &byte, 1) != 1) {
            console = false; /* nobody will ever type: go on without */
        } else if (byte == '\n' || byte == '\r') {
            line[used] = 0;
            used = 0;
            command(line, p, running);
        } else if (used < sizeof(line) - 1) {
            line[used++] = byte;
        }
    }
}

int main(void)
{
    struct parameters p;
    struct utsname system;
    uint64_t wss_pages, nonce, running;
    uint64_t *set = NULL, *table = NULL;

    set_up_console();
    uname(&system);
    record("LAB1 hello protocol=1 kernel=%s", printable(system.release));
    if (mount("proc", "/proc", "proc", 0, NULL)) {
        fail("what=mount errno=%d", errno);
    }
    p = read_parameters();
    wss_pages = p.wss_mib << 8;
    record("LAB1 params kind=%s wss_mib=%llu threads=%llu seed=%llu cpus=%d", kind_names[p.kind],
           (unsigned long long)p.wss_mib, (unsigned long long)p.threads,
           (unsigned long long)p.seed, get_nprocs());
    if (p.kind != KIND_IDLE && wss_pages < p.threads) {
        fail("what=parameter name=lab.wss_mib value=%llu", (unsigned long long)p.wss_mib);
    }
    if (p.kind == KIND_IDLE && p.rate) {
        fail("what=parameter name=lab.rate value=%llu", (unsigned long long)p.rate);
    }
    load_drivers(&p.devices);
    check_memory(p.wss_mib + (wss_pages * sizeof(*table) >> 20) + devices_need_mib(&p.devices));

    progress = allocate_locked(PAGE_BYTES);
    nonce = make_nonce();
    progress[PROGRESS_LAYOUT] = 1;
    progress[PROGRESS_NONCE] = nonce;
    progress[PROGRESS_THREADS] = p.threads;
    progress[PROGRESS_WSS_PAGES] = wss_pages;
    progress[PROGRESS_KIND] = p.kind;
    progress[PROGRESS_SEED] = p.seed;
    progress[PROGRESS_STATE] = STATE_POPULATING;
    progress[PROGRESS_MAGIC] = PROGRESS_PAGE_MAGIC;

    if (wss_pages) {
        set = allocate(wss_pages * PAGE_BYTES);
        table = allocate(wss_pages * sizeof(*table));
        for (uint64_t index = 0; index < wss_pages; index++) {
            populate(set + index * PAGE_WORDS, p.kind, PAGE_MAGIC ^ nonce, index);
        }
        progress[PROGRESS_TABLE_GPA] = physical_address(table);
    }

    running = p.kind == KIND_IDLE ? 1 : p.threads;
    for (uint64_t i = 0; i < p.threads; i++) {
        struct writer *w = &writers[i];

        writer_init(w, p.kind, p.seed, i, p.threads, wss_pages);
        if (wss_pages) {
            w->pages = set + w->first * PAGE_WORDS;
            w->table = table + w->first;
        }
        w->ops = &progress[PROGRESS_OPS + PROGRESS_OPS_STRIDE * i];
        w->magic = PAGE_MAGIC ^ nonce;
    }
    if (p.time_writes && wss_pages) {
        set_up_latency(p.threads);
    }
    for (uint64_t i = 0; i < running; i++) {
        pthread_t thread;

        if ((errno = pthread_create(&thread, NULL, writer_main, &writers[i]))) {
            fail("what=thread errno=%d", errno);
        }
    }
    wait_for_paused(running);
    set_pause(false);
    /* The allocate kind has the TLB flushed all the time by what it does. */
    if (p.kind != KIND_IDLE && p.kind != KIND_ALLOCATE) {
        warm_up(&p, wss_pages);
    }
    if (p.rate) {
        set_pace(p.rate, p.threads);
    }
    start_devices(&p.devices, p.seed);
    tick(&p);
    progress[PROGRESS_STATE] = STATE_RUNNING;
    record("LAB1 ready nonce=%016llx progress_gpa=%llx wss_pages=%llu threads=%llu seed=%llu"
           " kind=%s", (unsigned long long)nonce,
           (unsigned long long)physical_address(progress), (unsigned long long)wss_pages,
           (unsigned long long)p.threads, (unsigned long long)p.seed, kind_names[p.kind]);
    serve(&p, running);
}
#endif
