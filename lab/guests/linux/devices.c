/*
 * Load on the guest's devices: threads that have a disk, a network card and a screen
 * write to guest RAM, or write to a device's memory, for as long as the guest runs.
 *
 * None of them blocks for ever and none of them minds a restore, after which the disk
 * is empty and packets on their way are lost.  Each checks what it gets, as far as that
 * is possible on such terms: a block of the disk is either empty or says itself what is
 * in it, a packet that comes back is the one that was sent, and a page of the screen's
 * memory holds what was last written there.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#define _GNU_SOURCE
#include "workload.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/ip.h>
#include <netinet/ip_icmp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#ifndef BLKGETSIZE64
#define BLKGETSIZE64 _IOR(0x12, 114, size_t)
#endif

enum {
    APPEAR_S = 60, /* how long a driver may take to find the network card */

    DISK_THREADS = 4,
    DISK_BUFFER_PAGES = 1024,
    DISK_MAX_PAGES = 32, /* of one request */

    NET_PAYLOAD_WORDS = 170, /* a packet of 1388 bytes */
    NET_WINDOW = 8,

    DISPLAY_PAGES = 1024,
    DISPLAY_WIDTH = 640,
    DISPLAY_HEIGHT = 480,
    DISPLAY_BATCH = 64,
};

static const uint64_t DISK_MAGIC = UINT64_C(0x4b5349444c42414c); /* "LABDISK" */

static void count(unsigned word, uint64_t n)
{
    __atomic_fetch_add(&progress[word], n, __ATOMIC_RELAXED);
}

/* Count an error; say what the first few are, and not flood the console with the rest. */
static void device_error(const char *device, const char *what, uint64_t detail)
{
    uint64_t before = __atomic_fetch_add(&progress[PROGRESS_DEVICE_ERRORS], 1, __ATOMIC_RELAXED);

    if (before < 8) {
        record("LAB1 error what=device name=%s problem=%s detail=%llu", device, what,
               (unsigned long long)detail);
    }
}

static void start(void *(*body)(void *), void *argument)
{
    pthread_t thread;

    if ((errno = pthread_create(&thread, NULL, body, argument))) {
        fail("what=thread errno=%d", errno);
    }
}

/* ------------------------------------------------------------------- drivers */

void load_drivers(const struct devices *devices)
{
    static const char *const DISK_LISTS[] = {
        [DISK_IDE] = "disk-ide", [DISK_VIRTIO] = "disk-virtio", [DISK_SCSI] = "disk-scsi"};

    if (devices->disk) {
        if (mount("dev", "/dev", "devtmpfs", 0, NULL) && errno != EBUSY) {
            fail("what=mount errno=%d", errno);
        }
        load_list(DISK_LISTS[devices->disk]);
    }
    if (devices->net) {
        load_list("net");
    }
    if (devices->balloon) {
        load_list("balloon");
    }
    if (devices->display && mount("sys", "/sys", "sysfs", 0, NULL) && errno != EBUSY) {
        fail("what=mount errno=%d", errno);
    }
}

/* ---------------------------------------------------------------------- disk */

struct disk_user {
    int fd;
    uint64_t first; /* block, of the share of this thread */
    uint64_t blocks;
    uint64_t state; /* of its random numbers */
    uint64_t version;
    uint64_t *buffer;
};

static uint64_t disk_random(struct disk_user *u, uint64_t below)
{
    return scale(mix64(u->state += GAMMA), below);
}

static void fill_block(uint64_t *words, uint64_t block, uint64_t version)
{
    uint64_t value = mix64(block ^ mix64(version));

    words[0] = DISK_MAGIC;
    words[1] = block;
    words[2] = version;
    for (unsigned i = 3; i < PAGE_WORDS; i++) {
        words[i] = value += GAMMA;
    }
}

static bool block_is_right(const uint64_t *words, uint64_t block)
{
    uint64_t value = mix64(block ^ mix64(words[2])), wrong = 0;

    if (words[0] != DISK_MAGIC) {
        for (unsigned i = 0; i < PAGE_WORDS; i++) {
            wrong |= words[i];
        }
        return !wrong; /* never written to this disk */
    }
    wrong = words[1] ^ block;
    for (unsigned i = 3; i < PAGE_WORDS; i++) {
        wrong |= words[i] ^ (value += GAMMA);
    }
    return !wrong;
}

static void *disk_main(void *argument)
{
    struct disk_user *u = argument;

    for (;;) {
        uint64_t blocks = 1 + disk_random(u, DISK_MAX_PAGES);
        uint64_t first = u->first + disk_random(u, u->blocks - blocks + 1);
        uint64_t *data = u->buffer + disk_random(u, DISK_BUFFER_PAGES - blocks + 1) * PAGE_WORDS;
        bool is_write = disk_random(u, 2);
        size_t bytes = blocks * PAGE_BYTES;
        off_t offset = (off_t)(first * PAGE_BYTES);
        ssize_t done;

        if (is_write) {
            u->version++;
            for (uint64_t i = 0; i < blocks; i++) {
                fill_block(data + i * PAGE_WORDS, first + i, u->version);
            }
            done = pwrite(u->fd, data, bytes, offset);
        } else {
            done = pread(u->fd, data, bytes, offset);
        }
        if (done != (ssize_t)bytes) {
            device_error("disk", is_write ? "write" : "read", done < 0 ? (uint64_t)errno : 0);
            nap_ms(100);
            continue;
        }
        for (uint64_t i = 0; !is_write && i < blocks; i++) {
            if (!block_is_right(data + i * PAGE_WORDS, first + i)) {
                device_error("disk", "data", first + i);
            }
        }
        count(PROGRESS_DISK_OPS, 1);
    }
    return NULL;
}

static void start_disk(enum disk kind, uint64_t seed)
{
    static struct disk_user users[DISK_THREADS];
    int fd = open_disk(kind == DISK_VIRTIO ? "/dev/vda" : "/dev/sda", O_DIRECT);
    uint64_t bytes = 0;

    if (ioctl(fd, BLKGETSIZE64, &bytes)) {
        fail("what=device name=disk problem=size errno=%d", errno);
    }
    for (uint64_t i = 0; i < DISK_THREADS; i++) {
        uint64_t share = bytes / PAGE_BYTES / DISK_THREADS;

        if (share < DISK_MAX_PAGES) {
            fail("what=device name=disk problem=size bytes=%llu", (unsigned long long)bytes);
        }
        users[i] = (struct disk_user){
            .fd = fd,
            .first = i * share,
            .blocks = share,
            .state = mix64(seed ^ mix64(DISK_MAGIC + i)),
            .buffer = allocate(DISK_BUFFER_PAGES * PAGE_BYTES),
        };
        start(disk_main, &users[i]);
    }
}

/* ------------------------------------------------------------------- network */

/* QEMU's user network: it answers pings to its own address itself. */
#define NET_OWN_ADDRESS "10.0.2.15"
#define NET_PEER_ADDRESS "10.0.2.2"

struct packet {
    struct icmphdr header;
    uint64_t payload[NET_PAYLOAD_WORDS];
} __attribute__((packed));

static uint16_t checksum(const void *data, size_t bytes)
{
    const uint8_t *octets = data;
    uint32_t sum = 0;

    for (size_t i = 0; i + 1 < bytes; i += 2) {
        sum += (uint32_t)octets[i] | (uint32_t)octets[i + 1] << 8;
    }
    while (sum >> 16) {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    return (uint16_t)~sum;
}

static void fill_packet(struct packet *p, uint64_t sequence)
{
    *p = (struct packet){
        .header = {
            .type = ICMP_ECHO,
            .un.echo = {.id = htons(0x4c41), .sequence = htons((uint16_t)sequence)},
        },
        .payload = {sequence},
    };
    for (unsigned i = 1; i < NET_PAYLOAD_WORDS; i++) {
        p->payload[i] = mix64(sequence + i * GAMMA);
    }
    p->header.checksum = checksum(p, sizeof(*p));
}

static bool packet_is_right(const struct packet *p)
{
    uint64_t wrong = 0;

    for (unsigned i = 1; i < NET_PAYLOAD_WORDS; i++) {
        wrong |= p->payload[i] ^ mix64(p->payload[0] + i * GAMMA);
    }
    return !wrong;
}

/* Take one packet that came; returns false when none does. */
static bool receive(int fd)
{
    uint8_t data[2048];
    struct packet p;
    ssize_t length = recv(fd, data, sizeof(data), 0);
    size_t header;

    if (length < 0) {
        return false; /* lost, as in a restore: the next ones will not be */
    }
    header = (size_t)(data[0] & 15) * 4;
    if ((size_t)length != header + sizeof(p)) {
        return true; /* not one of ours */
    }
    memcpy(&p, data + header, sizeof(p));
    if (p.header.type == ICMP_ECHOREPLY) {
        if (packet_is_right(&p)) {
            count(PROGRESS_NET_PACKETS, 1);
        } else {
            device_error("net", "data", p.payload[0]);
        }
    }
    return true;
}

static void *net_main(void *argument)
{
    int fd = (int)(intptr_t)argument;
    struct sockaddr_in peer = {.sin_family = AF_INET};
    struct packet p;

    inet_pton(AF_INET, NET_PEER_ADDRESS, &peer.sin_addr);
    for (uint64_t sequence = 0;; sequence += NET_WINDOW) {
        for (unsigned i = 0; i < NET_WINDOW; i++) {
            fill_packet(&p, sequence + i);
            /* A full queue is no error, and the reply that does not come is waited for below. */
            sendto(fd, &p, sizeof(p), 0, (struct sockaddr *)&peer, sizeof(peer));
        }
        for (unsigned i = 0; i < NET_WINDOW && receive(fd); i++) {
        }
    }
    return NULL;
}

static void set_address(int fd, struct ifreq *request, unsigned long command, const char *address)
{
    struct sockaddr_in *in = (struct sockaddr_in *)&request->ifr_addr;

    *in = (struct sockaddr_in){.sin_family = AF_INET};
    inet_pton(AF_INET, address, &in->sin_addr);
    if (ioctl(fd, command, request)) {
        fail("what=device name=net problem=address errno=%d", errno);
    }
}

static void start_net(void)
{
    uint64_t end = now_ns() + APPEAR_S * UINT64_C(1000000000);
    int fd = socket(AF_INET, SOCK_RAW | SOCK_CLOEXEC, IPPROTO_ICMP);
    struct timeval timeout = {.tv_usec = 200000};
    struct ifreq request = {.ifr_name = "eth0"};

    while (ioctl(fd, SIOCGIFINDEX, &request)) {
        if (now_ns() > end) {
            fail("what=device name=net problem=missing errno=%d", errno);
        }
        nap_ms(10);
    }
    set_address(fd, &request, SIOCSIFADDR, NET_OWN_ADDRESS);
    set_address(fd, &request, SIOCSIFNETMASK, "255.255.255.0");
    request.ifr_flags = IFF_UP | IFF_RUNNING;
    if (ioctl(fd, SIOCSIFFLAGS, &request) ||
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout))) {
        fail("what=device name=net problem=up errno=%d", errno);
    }
    start(net_main, (void *)(intptr_t)fd);
}

/* -------------------------------------------------------------------- screen */

static volatile uint64_t *display;

/* The registers of QEMU's VGA; no driver of the guest's kernel touches them. */
static void display_register(unsigned short index, unsigned short value)
{
    outw(index, 0x1ce);
    outw(value, 0x1cf);
}

static void set_display_mode(void)
{
    if (ioperm(0x1ce, 3, 1)) {
        fail("what=device name=display problem=ports errno=%d", errno);
    }
    display_register(4, 0); /* off */
    display_register(1, DISPLAY_WIDTH);
    display_register(2, DISPLAY_HEIGHT);
    display_register(3, 32);     /* bits per pixel */
    display_register(4, 0x41);   /* on, with its memory in one piece */
}

static int open_display_memory(void)
{
    DIR *devices = opendir("/sys/bus/pci/devices");
    struct dirent *entry;
    int found = -1;

    while (devices && found < 0 && (entry = readdir(devices))) {
        char path[320], class[16] = "";
        int fd;

        snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/class", entry->d_name);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0) {
            continue;
        }
        if (read(fd, class, sizeof(class) - 1) > 0 && !strncmp(class, "0x030000", 8)) {
            snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/resource0", entry->d_name);
            found = open(path, O_RDWR | O_CLOEXEC);
        }
        close(fd);
    }
    if (devices) {
        closedir(devices);
    }
    return found;
}

/* Write a word of random pages, on the screen and beyond it, and check what was there. */
static void *display_main(void *argument)
{
    static uint64_t table[DISPLAY_PAGES];
    uint64_t state = (uint64_t)(uintptr_t)argument;

    for (unsigned page = 0; page < DISPLAY_PAGES; page++) {
        display[page * PAGE_WORDS] = 0;
    }
    for (;;) {
        for (unsigned i = 0; i < DISPLAY_BATCH; i++) {
            uint64_t random = mix64(state += GAMMA);
            uint64_t page = scale(random, DISPLAY_PAGES);
            uint64_t found = display[page * PAGE_WORDS];

            if (found != table[page]) {
                device_error("display", "data", page);
            }
            display[page * PAGE_WORDS] = random;
            table[page] = random;
        }
        count(PROGRESS_DISPLAY_WRITES, DISPLAY_BATCH);
        nap_ms(1);
    }
    return NULL;
}

static void start_display(uint64_t seed)
{
    int fd = open_display_memory();
    void *memory = MAP_FAILED;

    if (fd >= 0) {
        memory = mmap(NULL, DISPLAY_PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        close(fd);
    }
    if (memory == MAP_FAILED) {
        fail("what=device name=display problem=memory errno=%d", errno);
    }
    display = memory;
    set_display_mode();
    start(display_main, (void *)(uintptr_t)mix64(~seed));
}

/* ----------------------------------------------------------------------- all */

uint64_t devices_need_mib(const struct devices *devices)
{
    return devices->disk ? (uint64_t)DISK_THREADS * DISK_BUFFER_PAGES * PAGE_BYTES >> 20 : 0;
}

void start_devices(const struct devices *devices, uint64_t seed)
{
    if (devices->disk) {
        start_disk(devices->disk, seed);
    }
    if (devices->net) {
        start_net();
    }
    if (devices->display) {
        start_display(seed);
    }
}
